//! The libFuzzer target `config`; what it checks is in `src/config.rs`.
#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| volley_fuzz::config::run(input));
