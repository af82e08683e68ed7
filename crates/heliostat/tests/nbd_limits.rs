//! What the connections of one NBD server may hold together, and who gets it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use heliostat::front::nbd::ServerSettings;
use heliostat_block::buffer::Buffer;
use heliostat_block::nbd::Cookie;
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Durability;

use nbd::{Guest, Memory, Served};

const MIB: usize = 1 << 20;
const DISK: usize = 32 * MIB;

/// As many as would hold all of the budget, at four or five MiB of answers each.
const HOGS: usize = 16;

/// A server with the smallest budget, 64 MiB and a little, and an export in memory.
fn tight(slow_reader_time: Duration) -> (Served, Arc<Memory>) {
    let served =
        Served::start(ServerSettings { memory_max: 0, slow_reader_time, ..ServerSettings::default() });
    let memory = Memory::new(DISK);
    served.export("disk", served.node("disk", Arc::clone(&memory)));
    (served, memory)
}

#[test]
fn who_reads_nothing_leaves_something_for_the_others() {
    let (served, _) = tight(Duration::from_secs(3600));
    let mut hogs: Vec<_> = (0..HOGS).map(|_| served.guest("disk")).collect();
    hogs.iter_mut().for_each(|hog| drop(hog.gorge(MIB)));
    let mut guest = served.guest("disk");
    guest.write(0, b"still here");
    assert_eq!(guest.read(0, 10), b"still here");
}

#[test]
fn held_up_writes_of_one_guest_leave_something_for_the_others() {
    let (served, memory) = tight(Duration::from_secs(3600));
    memory.hold();
    let mut hog = served.guest("disk");
    // One may have half of all.
    let held: Vec<_> = (0..32).map(|index| hog.send_write(index * 1_048_576, &[7; MIB])).collect();
    memory.wait_started(30);
    let mut guest = served.guest("disk");
    assert_eq!(guest.read(0, 5), [0; 5]);
    memory.release();
    for cookie in held {
        hog.wait(cookie).unwrap();
    }
}

#[test]
fn who_needs_more_than_is_left_gets_it_when_others_have_ended() {
    let (served, memory) = tight(Duration::from_secs(3600));
    memory.hold();
    let mut first = served.guest("disk");
    let held: Vec<_> = (0..32).map(|index| first.send_write(index * 1_048_576, &[7; MIB])).collect();
    memory.wait_started(30);
    let mut second = served.guest("disk");
    let read = Ask::Read { offset: 0, buffer: Buffer::zeroed(DISK) };
    let large = second.send(read, &[]).unwrap();
    memory.release();
    for cookie in held {
        first.wait(cookie).unwrap();
    }
    let Ok(Answered::Data(buffer)) = second.wait(large) else { panic!("no data") };
    assert_eq!(buffer[..], vec![7; DISK]);
}

/// Starts a write of the largest size, and sends the first half of its data.
fn half_send(guest: &mut Guest) -> Cookie {
    let range = ByteRange::new(0, DISK.try_into().unwrap()).unwrap();
    guest.send(Ask::Write { range, durability: Durability::Cached }, &vec![7; DISK / 2]).unwrap()
}

#[test]
fn a_write_that_is_half_here_is_received_to_its_end_whoever_waits() {
    let (served, _) = tight(Duration::from_secs(3600));
    let mut writers = [served.guest("disk"), served.guest("disk")];
    let cookies = writers.each_mut().map(half_send);
    // There is not enough left for this one, so it waits.
    let mut third = served.guest("disk");
    let large = third.send(Ask::Read { offset: 0, buffer: Buffer::zeroed(DISK) }, &[]).unwrap();
    for (writer, cookie) in writers.iter_mut().zip(cookies) {
        writer.stream.write_all(&vec![7; DISK / 2]).unwrap();
        writer.wait(cookie).unwrap();
    }
    let Ok(Answered::Data(buffer)) = third.wait(large) else { panic!("no data") };
    assert_eq!(buffer[..], vec![7; DISK]);
}

#[test]
fn requests_by_the_thousand_are_all_answered_though_they_come_at_once() {
    let (served, memory) = tight(Duration::from_secs(3600));
    let mut guest = served.guest("disk");
    let mut output = BytesMut::new();
    let cookies: Vec<_> =
        (0..5000).map(|_| guest.conversation.ask(Ask::Flush, &mut output).unwrap()).collect();
    guest.stream.write_all(&output).unwrap();
    for cookie in cookies {
        guest.wait(cookie).unwrap();
    }
    assert_eq!(memory.flushes.load(Ordering::SeqCst), 5000);
}

#[test]
fn who_reads_nothing_is_given_up_when_others_wait_for_long() {
    let (served, memory) = tight(Duration::from_millis(50));
    let mut hogs: Vec<_> = (0..HOGS).map(|_| served.guest("disk")).collect();
    hogs.iter_mut().for_each(|hog| drop(hog.gorge(MIB)));
    // Needs all but what the hogs hold, and more than that.
    let mut guest = served.guest("disk");
    let large = Ask::Read { offset: 0, buffer: Buffer::zeroed(DISK) };
    assert!(matches!(guest.ask(large, &[]), Ok(Answered::Data(_))));
    drop(memory);
}

#[test]
fn who_announces_data_and_sends_none_is_given_up_when_others_wait_for_long() {
    let (served, _) = tight(Duration::from_millis(50));
    let mut stalled = [served.guest("disk"), served.guest("disk")];
    let _cookies = stalled.each_mut().map(half_send);
    let mut guest = served.guest("disk");
    let large = Ask::Read { offset: 0, buffer: Buffer::zeroed(DISK) };
    assert!(matches!(guest.ask(large, &[]), Ok(Answered::Data(_))));
}

#[test]
fn who_reads_nothing_is_left_alone_while_nobody_waits() {
    let (served, _) = tight(Duration::from_millis(20));
    let mut idle = served.guest("disk");
    idle.gorge(MIB);
    // Another's requests, one at a time, take longer than the patience and do not wait for memory.
    let mut guest = served.guest("disk");
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_millis(100) {
        guest.write(0, b"x");
    }
    idle.stream.set_nonblocking(false).unwrap();
    assert!(matches!(idle.next().unwrap().outcome, Ok(Answered::Data(_))));
}
