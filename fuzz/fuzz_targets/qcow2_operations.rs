//! Any bytes as operations and a qcow2 image to which they are done.
#![no_main]

#[path = "../harness/qcow2.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::operations(data));
