//! Tests of deletion and garbage collection: one after the other, interleaved at each request, and stopped at each.

mod alone;
mod faults;
mod races;
mod world;
