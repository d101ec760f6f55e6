#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert_fuzz::first_bytes(bytes));
