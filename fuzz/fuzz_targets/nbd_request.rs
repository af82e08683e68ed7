//! Any bytes as an NBD client's requests, and as a server's answers.
#![no_main]

#[path = "../harness/nbd.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::request(data));
