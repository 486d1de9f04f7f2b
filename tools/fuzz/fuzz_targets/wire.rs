//! The libFuzzer target `wire`; what it checks is in `src/wire.rs`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| volley_fuzz::wire::run(input));
