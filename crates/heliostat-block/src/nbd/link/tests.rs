//! Tests of the link: tables of what it does when, and conversations with our own server that are cut at every byte.

mod cuts;
mod given_up;

use std::time::Duration;

use bytes::Bytes;

use super::*;
use crate::buffer::Buffer;
use crate::limits::{NBD_REPLAYS_MAX, RECONNECT_PAUSE_LAST};
use crate::nbd::wire::{SIMPLE_REPLY_MAGIC, transmission_flag as flag};
use crate::nbd::{Access, BlockSizes, ReplyStyle, Terms};
use crate::range::ByteRange;
use crate::storage::Durability;

const SIZE: u64 = 1 << 16;
const ALL: u16 = flag::HAS_FLAGS
    | flag::SEND_FLUSH
    | flag::SEND_FUA
    | flag::SEND_TRIM
    | flag::SEND_WRITE_ZEROES
    | flag::SEND_FAST_ZERO
    | flag::CAN_MULTI_CONN;

fn found() -> Found {
    let terms = Terms {
        size: SIZE,
        access: Access::Writable,
        block_sizes: BlockSizes::DEFAULT,
        replies: ReplyStyle::Simple,
        allocation: None,
    };
    Found { terms, flags: ALL, description: String::new() }
}

fn at(milliseconds: u64) -> Moment {
    Moment::START + Duration::from_millis(milliseconds)
}

fn settings(delay: u64, connections: usize) -> LinkSettings {
    LinkSettings { reconnect_delay: Duration::from_millis(delay), connections, reads_bitmap: false }
}

/// One that is connected since the start by as many connections as it may have.
fn up(delay: u64, connections: usize) -> Link {
    let mut link = Link::new(settings(delay, connections), at(0));
    while let Some(line) = link.next_to_connect(at(0)) {
        link.connected(line, found(), at(0), 0).unwrap();
    }
    assert_eq!(link.status(at(0)).connections, connections);
    link
}

fn write(offset: u64, durability: Durability) -> Wanted {
    Wanted::Write { offset, data: Bytes::from_static(&[1; 512]).into(), durability }
}

/// Answers the request that was sent first on a connection since its start, or the one so many later.
fn answer(link: &mut Link, line: usize, cookie: u64) {
    let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(cookie.to_be_bytes());
    link.receive(line, &mut &bytes[..]).unwrap();
}

fn ended(link: &mut Link) -> Vec<(Ticket, Result<(), LinkError>)> {
    std::iter::from_fn(|| link.next_ended()).map(|(ticket, outcome)| (ticket, outcome.map(|_| ()))).collect()
}

#[test]
fn requests_wait_for_as_long_as_was_said_and_then_fail_with_the_reason() {
    let mut link = up(1000, 1);
    let first = link.submit(write(0, Durability::Cached));
    link.hand_out(at(10));
    link.cut(0, "gone", at(10), 0);
    link.hand_out(at(1009));
    assert!(ended(&mut link).is_empty());
    assert_eq!(link.status(at(1009)).state, LinkState::Waiting);
    assert_eq!(link.wakes_at(), Some(at(10)), "the first attempt is made at once");
    let line = link.next_to_connect(at(10)).unwrap();
    link.connect_failed(line, "refused".to_owned(), at(20), 0);
    link.hand_out(at(1010));
    assert_eq!(ended(&mut link), [(first, Err(LinkError::Lost("refused".to_owned())))]);
    assert_eq!(link.status(at(1010)).state, LinkState::Down);
    let second = link.submit(Wanted::Flush);
    link.hand_out(at(1011));
    assert_eq!(ended(&mut link), [(second, Err(LinkError::Lost("refused".to_owned())))]);
    let line = link.next_to_connect(at(2000)).unwrap();
    link.connected(line, found(), at(2000), 0).unwrap();
    let third = link.submit(Wanted::Flush);
    link.hand_out(at(2000));
    answer(&mut link, 0, 1);
    assert_eq!(ended(&mut link), [(third, Ok(()))]);
    assert_eq!(link.status(at(2000)).reconnects, 1);
}

#[test]
fn without_a_delay_requests_fail_at_the_cut() {
    let mut link = up(0, 1);
    let ticket = link.submit(Wanted::Flush);
    link.hand_out(at(0));
    link.cut(0, "gone", at(5), 0);
    link.hand_out(at(5));
    assert_eq!(ended(&mut link), [(ticket, Err(LinkError::Lost("gone".to_owned())))]);
}

#[test]
fn pauses_grow_up_to_a_bound_and_chance_is_a_part_of_each() {
    for (attempts, jitter, expected) in [
        (0, u32::MAX, 0),
        (1, 0, 50),
        (1, u32::MAX, 100),
        (2, 0, 100),
        (4, u32::MAX / 2, 600),
        (7, u32::MAX, 5000),
        (u32::MAX, 0, 2500),
    ] {
        let pause = pause(attempts, jitter).as_millis();
        assert!(pause.abs_diff(expected) <= 1, "{attempts} {jitter}: {pause}");
    }
    // A server that takes connections and never answers is not asked in a circle.
    let mut link = up(0, 1);
    let mut now = at(0);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        link.cut(0, "flaps", now, u32::MAX);
        let then = link.wakes_at().unwrap();
        pauses.push(then.since(now));
        now = then;
        let line = link.next_to_connect(now).unwrap();
        link.connected(line, found(), now, u32::MAX).unwrap();
    }
    assert!(pauses.is_sorted() && pauses[9] == RECONNECT_PAUSE_LAST, "{pauses:?}");
}

#[test]
fn what_is_found_again_must_be_what_it_was() {
    let with = |change: fn(&mut Found)| {
        let mut found = found();
        change(&mut found);
        found
    };
    let table = [
        (with(|_| ()), None),
        (with(|found| found.terms.size = 5), Some("the export has 5 bytes now, not 65536")),
        (with(|found| found.terms.access = Access::ReadOnly), Some("the export is read-only now")),
        (
            with(|found| found.terms.block_sizes = BlockSizes::new(512, 4096, 32 << 20)),
            Some("the export's minimum block size is 512 now, not 1"),
        ),
        (
            with(|found| found.terms.block_sizes = BlockSizes::new(1, 4096, 1 << 20)),
            Some("the export takes 1048576 bytes at once now, not 33554432"),
        ),
        (with(|found| found.flags &= !flag::SEND_FLUSH), Some("the export takes no flushes now")),
        (with(|found| found.flags &= !flag::SEND_TRIM), None),
    ];
    for (again, expected) in table {
        let mut link = up(60_000, 1);
        let ticket = link.submit(Wanted::Flush);
        link.hand_out(at(0));
        link.cut(0, "gone", at(0), 0);
        let line = link.next_to_connect(at(1)).unwrap();
        let result = link.connected(line, again, at(1), 0);
        link.hand_out(at(1));
        assert_eq!(result.as_ref().err().map(String::as_str), expected);
        match expected {
            None => assert_eq!(link.status(at(1)).state, LinkState::Up),
            Some(why) => {
                assert_eq!(link.status(at(1)).state, LinkState::Changed);
                assert_eq!(ended(&mut link), [(ticket, Err(LinkError::Changed(why.to_owned())))]);
                let then = link.wakes_at().unwrap();
                let line = link.next_to_connect(then).unwrap();
                link.connected(line, found(), then, 0).unwrap();
                assert_eq!(link.status(then).state, LinkState::Up, "it is back after all");
            }
        }
    }
}

#[test]
fn a_loss_is_counted_when_something_can_have_been_lost() {
    // What was answered, or is in flight, and how many losses a cut then makes.
    let cached = || write(0, Durability::Cached);
    let fua = || write(0, Durability::Fua);
    let table: [(&str, Vec<Wanted>, usize, u64); 8] = [
        ("nothing", vec![], 0, 0),
        ("a read in flight", vec![Wanted::Read { offset: 0, buffer: Buffer::zeroed(512) }], 0, 0),
        ("a flush in flight", vec![Wanted::Flush], 0, 0),
        ("a write in flight", vec![cached()], 0, 1),
        ("a durable write in flight", vec![fua()], 0, 1),
        ("a write that was answered", vec![cached()], 1, 1),
        ("a durable write that was answered", vec![fua()], 1, 0),
        ("a trim", vec![Wanted::Trim { range: ByteRange::from_bounds(0, 512) }], 1, 1),
    ];
    for (what, wanted, answered, expected) in table {
        let mut link = up(60_000, 1);
        for wanted in wanted {
            link.submit(wanted);
        }
        link.hand_out(at(0));
        for cookie in 1..=answered {
            answer(&mut link, 0, u64::try_from(cookie).unwrap());
        }
        link.cut(0, "gone", at(1), 0);
        assert_eq!(link.losses(), expected, "{what}");
    }
}

#[test]
fn a_flush_covers_what_was_answered_before_it_was_asked_for() {
    for (between, expected) in [(false, 0), (true, 1)] {
        let mut link = up(60_000, 1);
        let mut cookie = 0;
        let mut done = |link: &mut Link, wanted: Wanted| {
            link.submit(wanted);
            link.hand_out(at(0));
            cookie += 1;
            cookie
        };
        let first = done(&mut link, write(0, Durability::Cached));
        answer(&mut link, 0, first);
        let other = between.then(|| done(&mut link, write(512, Durability::Cached)));
        let flush = done(&mut link, Wanted::Flush);
        other.into_iter().for_each(|other| answer(&mut link, 0, other));
        answer(&mut link, 0, flush);
        link.cut(0, "gone", at(1), 0);
        assert_eq!(link.losses(), expected);
        link.next_to_connect(at(1)).unwrap();
        link.connected(0, found(), at(1), 0).unwrap();
        assert_eq!(link.losses(), expected + 1, "it may be another server");
        link.cut(0, "gone again", at(2), 0);
        assert_eq!(link.losses(), expected + 1, "nothing was written since");
    }
}

/// Makes all connections again that are wanted by then.
fn reconnect(link: &mut Link, now: Moment, found: &Found) {
    while let Some(line) = link.next_to_connect(now) {
        link.connected(line, found.clone(), now, 0).unwrap();
    }
}

#[test]
fn all_connections_are_lost_with_one_and_their_requests_are_sent_again() {
    for delay in [0, 60_000] {
        let mut link = up(delay, 3);
        let tickets: Vec<_> = (0..3).map(|n| link.submit(write(n * 512, Durability::Cached))).collect();
        link.hand_out(at(0));
        link.cut(1, "gone", at(5000), 0);
        assert!((0..3).all(|line| !link.is_wanted(line)));
        link.hand_out(at(5000));
        assert_eq!(ended(&mut link), [], "one attempt is waited for, whatever the delay");
        assert_eq!(link.wakes_at(), Some(at(5000)));
        reconnect(&mut link, at(5000), &found());
        link.hand_out(at(5000));
        (0..3).for_each(|line| answer(&mut link, line, 1));
        let ended: Vec<_> = ended(&mut link);
        assert_eq!(ended, tickets.into_iter().map(|ticket| (ticket, Ok(()))).collect::<Vec<_>>());
        assert_eq!(link.losses(), 2, "what was in flight, and another server");
        assert_eq!(link.status(at(5000)).connections, 3);
    }
}

#[test]
fn requests_fail_when_the_attempt_after_one_of_several_connections_was_lost_fails() {
    let mut link = up(0, 2);
    let ticket = link.submit(Wanted::Flush);
    link.hand_out(at(0));
    link.cut(1, "gone", at(5000), 0);
    let line = link.next_to_connect(at(5000)).unwrap();
    link.connect_failed(line, "refused".to_owned(), at(5001), 0);
    link.hand_out(at(5001));
    assert_eq!(ended(&mut link), [(ticket, Err(LinkError::Lost("refused".to_owned())))]);
}

#[test]
fn another_server_behind_one_of_several_connections_does_not_go_unnoticed() {
    let mut link = up(60_000, 4);
    for offset in 0..4 {
        link.submit(write(offset * 512, Durability::Cached));
    }
    link.hand_out(at(0));
    (0..4).for_each(|line| answer(&mut link, line, 1));
    link.submit(Wanted::Flush);
    link.hand_out(at(0));
    answer(&mut link, 0, 2);
    assert_eq!((ended(&mut link).len(), link.losses()), (5, 0));
    link.cut(0, "moved", at(5000), 0);
    reconnect(&mut link, at(5000), &found());
    assert_eq!(link.losses(), 1, "all was flushed, but somewhere else, perhaps");
    link.cut(3, "moved", at(9000), 0);
    reconnect(&mut link, at(9999), &found());
    assert_eq!(link.losses(), 2);
    let status = link.status(at(9999));
    assert_eq!((status.connections, status.reconnects), (4, 2));
}

#[test]
fn a_connection_that_is_being_made_when_another_is_lost_is_given_up() {
    let mut link = Link::new(settings(60_000, 2), at(0));
    let line = link.next_to_connect(at(0)).unwrap();
    link.connected(line, found(), at(0), 0).unwrap();
    let other = link.next_to_connect(at(0)).unwrap();
    link.cut(line, "moved", at(5000), 0);
    assert!(!link.is_wanted(other), "it may have been made to the old server");
}

#[test]
fn a_server_that_closes_each_further_connection_at_once_gets_one() {
    let mut link = up(0, 2);
    let mut now = at(0);
    for _ in 0..NBD_UNWELCOME_MAX {
        assert_eq!(link.status(now).connections, 2);
        let ticket = link.submit(Wanted::Flush);
        link.hand_out(now);
        link.cut(1, "one is enough", now, u32::MAX);
        reconnect(&mut link, now, &found());
        link.hand_out(now);
        answer(&mut link, 0, 1);
        assert_eq!(ended(&mut link), [(ticket, Ok(()))]);
        now = link.wakes_at().unwrap_or(now);
        reconnect(&mut link, now, &found());
    }
    assert_eq!(link.status(now).connections, 1);
    assert_eq!((link.next_to_connect(at(1 << 30)), link.wakes_at()), (None, None));
}

#[test]
fn a_server_that_does_not_say_that_it_may_gets_one_connection() {
    let mut link = Link::new(settings(0, 4), at(0));
    let alone = Found { flags: ALL & !flag::CAN_MULTI_CONN, ..found() };
    let line = link.next_to_connect(at(0)).unwrap();
    assert_eq!(link.next_to_connect(at(0)), None, "nobody knows yet");
    link.connected(line, alone, at(0), 0).unwrap();
    assert_eq!(link.next_to_connect(at(0)), None);
    assert_eq!(link.wakes_at(), None);
}

#[test]
fn a_server_that_comes_back_for_one_connection_gets_one() {
    let alone = Found { flags: ALL & !flag::CAN_MULTI_CONN, ..found() };
    let mut link = up(0, 4);
    link.cut(2, "gone", at(5000), 0);
    reconnect(&mut link, at(5000), &alone);
    assert_eq!((link.status(at(5000)).connections, link.next_to_connect(at(1 << 30))), (1, None));
    assert_eq!(link.wakes_at(), None);
    // And as many as before when it allows it again.
    link.cut(0, "gone", at(10_000), 0);
    reconnect(&mut link, at(20_000), &found());
    reconnect(&mut link, at(20_000), &found());
    assert_eq!(link.status(at(20_000)).connections, 4);
}

#[test]
fn a_further_connection_to_a_server_that_allows_one_only_ends_the_others() {
    let alone = Found { flags: ALL & !flag::CAN_MULTI_CONN, ..found() };
    let mut link = Link::new(settings(0, 3), at(0));
    let line = link.next_to_connect(at(0)).unwrap();
    link.connected(line, found(), at(0), 0).unwrap();
    let ticket = link.submit(write(0, Durability::Cached));
    link.hand_out(at(0));
    let further = link.next_to_connect(at(0)).unwrap();
    link.connected(further, alone.clone(), at(1), 0).unwrap_err();
    assert!((0..3).all(|line| !link.is_wanted(line)), "the first one may end at another server");
    link.hand_out(at(1));
    reconnect(&mut link, at(1000), &alone);
    link.hand_out(at(1000));
    answer(&mut link, 0, 1);
    assert_eq!(ended(&mut link), [(ticket, Ok(()))]);
    assert_eq!((link.losses(), link.status(at(1000)).connections), (2, 1));
}

#[test]
fn a_request_that_kills_every_server_fails_in_the_end() {
    let mut link = up(60_000, 1);
    let ticket = link.submit(write(0, Durability::Cached));
    let mut cuts = 0;
    let mut now = at(0);
    let ended = loop {
        link.hand_out(now);
        link.cut(0, "crashed", now, 0);
        cuts += 1;
        if let Some((ended, outcome)) = link.next_ended() {
            assert!(matches!(outcome, Err(LinkError::Lost(_))));
            break ended;
        }
        now = link.wakes_at().unwrap();
        let line = link.next_to_connect(now).unwrap();
        link.connected(line, found(), now, 0).unwrap();
    };
    assert_eq!((ended, cuts), (ticket, NBD_REPLAYS_MAX + 1));
}

#[test]
fn what_a_server_does_not_offer_is_not_sent() {
    let mut link = Link::new(settings(0, 1), at(0));
    let line = link.next_to_connect(at(0)).unwrap();
    let poor = Found { flags: flag::HAS_FLAGS, ..found() };
    link.connected(line, poor, at(0), 0).unwrap();
    let trim = Wanted::Trim { range: ByteRange::from_bounds(0, 512) };
    for wanted in [Wanted::Flush, trim, write(0, Durability::Fua)] {
        let ticket = link.submit(wanted);
        link.hand_out(at(0));
        assert_eq!(ended(&mut link), [(ticket, Err(LinkError::NotOffered))]);
    }
    assert!(link.outbox(line).unwrap().is_empty());
}
