//! The libFuzzer target `manifest`; what it checks is in `src/manifest.rs`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| volley_fuzz::manifest::run(input));
