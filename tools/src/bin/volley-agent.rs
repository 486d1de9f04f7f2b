//! volley-agent

fn main() {}
