//! Operations on any bytes as a qcow2 image that has been repaired.
#![no_main]

#[path = "../harness/qcow2.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::repair(data));
