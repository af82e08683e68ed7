//! Any bytes as an NBD client's handshake, and as a server's.
#![no_main]

#[path = "../harness/nbd.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::handshake(data));
