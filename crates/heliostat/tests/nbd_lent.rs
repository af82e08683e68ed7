//! Long reads of a cached file, which are sent from where they lie.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use heliostat::front::nbd::ServerSettings;
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::ReplyStyle;
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::node::Node;
use heliostat_host::file::FileStorage;
use heliostat_host::open::OpenOptions;

use common::wait;
use nbd::{Guest, Served};

const SIZE: usize = 2 << 20;
const LONG: usize = 256 << 10;

/// A server of a file in memory in which no two places look alike, and its node.
fn served(folder: &Path) -> (Served, Arc<Node>, Vec<u8>) {
    let bytes: Vec<u8> = (0..SIZE / 8).flat_map(|word| (word * 2_654_435_761).to_le_bytes()).collect();
    let path = folder.join("disk");
    std::fs::write(&path, &bytes).unwrap();
    let served = Served::start(ServerSettings::default());
    let node = served.node("disk", Arc::new(FileStorage::open(&path, &OpenOptions::default()).unwrap()));
    served.export("disk", Arc::clone(&node));
    (served, node, bytes)
}

#[test]
fn what_was_written_last_is_read_wherever_a_long_read_begins() {
    let folder = common::folder();
    let (served, _, mut bytes) = served(folder.path());
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let mut guest = Guest::new(served.raw(), "disk", style).unwrap();
        for (turn, offset) in [0, 1, 4095, 4096, 777_777, SIZE - LONG].into_iter().enumerate() {
            let put = [u8::try_from(turn).unwrap(); 5000];
            let at = offset + LONG / 2;
            guest.write(u64::try_from(at).unwrap(), &put);
            bytes[at..at + put.len()].copy_from_slice(&put);
            let read = guest.read(u64::try_from(offset).unwrap(), LONG);
            assert!(read == bytes[offset..offset + LONG], "{style:?} at {offset}");
        }
    }
}

#[test]
fn who_does_not_read_what_was_lent_keeps_no_request_in_flight() {
    let folder = common::folder();
    let (served, node, bytes) = served(folder.path());
    let mut guest = served.guest("disk");
    let mut output = BytesMut::new();
    for _ in 0..16 {
        let read = Ask::Read { offset: 1, buffer: Buffer::zeroed(LONG) };
        guest.conversation.ask(read, &mut output).unwrap();
    }
    std::io::Write::write_all(&mut guest.stream, &output).unwrap();
    // The first answer has begun to come, and does not fit into the socket with what is behind it.
    let begun = || {
        let waiting = rustix::io::ioctl_fionread(&guest.stream).unwrap();
        (waiting > 0 && node.in_flight() == 0).then_some(())
    };
    wait::until("no request in flight", wait::LIMIT, begun).unwrap();
    let mut other = served.guest("disk");
    assert_eq!(other.read(0, 8), bytes[..8]);
    wait::until("no request in flight", wait::LIMIT, || (node.in_flight() == 0).then_some(())).unwrap();
    for _ in 0..16 {
        let answer = guest.next().unwrap();
        let Ok(heliostat_block::nbd::client_reply::Answered::Data(read)) = answer.outcome else {
            panic!("{answer:?}");
        };
        assert!(*read == bytes[1..=LONG]);
    }
}
