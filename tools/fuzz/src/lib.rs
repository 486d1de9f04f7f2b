//! What is fuzzed: one function for each kind of hostile input. The libFuzzer targets in `fuzz_targets/` and the plain
//! test `tools/tests/fuzz.rs` (which includes this file as a module) call the same ones. See docs/fuzzing.md.

pub mod config;
pub mod journal;
pub mod manifest;
pub mod measure;
pub mod nbd;
pub mod wire;

/// One kind of hostile input.
pub struct Target {
    pub name: &'static str,
    /// Panics when the input breaks a property.
    pub run: fn(&[u8]),
    /// Valid inputs of every kind, by name: the committed corpus starts with them.
    pub seeds: fn() -> Vec<(String, Vec<u8>)>,
}

pub const TARGETS: [Target; 5] = [
    Target { name: "wire", run: wire::run, seeds: wire::seeds },
    Target { name: "manifest", run: manifest::run, seeds: manifest::seeds },
    Target { name: "journal", run: journal::run, seeds: journal::seeds },
    Target { name: "config", run: config::run, seeds: config::seeds },
    Target { name: "nbd", run: nbd::run, seeds: nbd::seeds },
];

/// An error that goes to a log or to a peer: something is said, in one line, without control characters.
pub fn assert_one_line(text: &str, bytes_max: usize) {
    assert!(!text.is_empty(), "an error without a word");
    assert!(!text.contains(char::is_control), "control characters in {text:?}");
    assert!(text.len() <= bytes_max, "an error of {} bytes, more than {bytes_max}", text.len());
}
