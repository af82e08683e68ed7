//! Any bytes as a control client's.
#![no_main]

#[path = "../harness/qmp.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::line(data));
