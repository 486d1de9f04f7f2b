//! The libFuzzer target `nbd`; what it checks is in `src/nbd.rs`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| volley_fuzz::nbd::run(input));
