//! volley

fn main() {}
