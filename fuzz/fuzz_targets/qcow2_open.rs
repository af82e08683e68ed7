//! Any bytes as a qcow2 image that is opened and read.
#![no_main]

#[path = "../harness/qcow2.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::open(data));
