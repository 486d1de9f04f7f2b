//! The libFuzzer target `journal`; what it checks is in `src/journal.rs`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| volley_fuzz::journal::run(input));
