//! The storage server's program: parse, wire, run, stop.

fn main() {}
