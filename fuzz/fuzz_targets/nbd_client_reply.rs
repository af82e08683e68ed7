//! Any bytes as what an NBD server says to a client: its answers.
#![no_main]

#[path = "../harness/nbd_client.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|data: &[u8]| harness::reply(data));
