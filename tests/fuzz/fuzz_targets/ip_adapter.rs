#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sd_fuzz::ip_adapter(data));
