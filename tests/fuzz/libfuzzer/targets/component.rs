//! Looks for bytes that break the law of `cofferdam_fuzz::component`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::component(bytes);
});
