//! volley-load

fn main() {}
