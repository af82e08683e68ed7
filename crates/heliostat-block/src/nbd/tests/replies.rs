//! The answers to requests, and what a client makes of them.

use super::*;
use crate::buffer::Buffer;
use crate::error::ErrorKind;
use crate::nbd::context::Described;
use crate::nbd::request::ExtentsWanted;
use crate::nbd::wire::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use crate::nbd::{Cookie, Errno};
use crate::range::ByteRange;
use crate::storage::{Extent, ExtentStatus};

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn simple(error: u32, data: &[u8]) -> Vec<u8> {
    let cookie = COOKIE.0.to_be_bytes();
    [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie, data].concat()
}

fn chunk(kind: u16, payload: &[u8]) -> Vec<u8> {
    let cookie = COOKIE.0.to_be_bytes();
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let magic = STRUCTURED_REPLY_MAGIC.to_be_bytes();
    [&magic[..], &[0, 1], &kind.to_be_bytes(), &cookie, &len, payload].concat()
}

#[test]
fn simple_replies_look_as_the_document_says() {
    let replies = Replies::new(&terms(ReplyStyle::Simple));
    replies.owe(COOKIE, 0).done();
    replies.owe(COOKIE, 0).data(4096, Buffer::copy_of(b"data"));
    replies.owe(COOKIE, 0).zeroes(range(0, 3));
    replies.owe(COOKIE, 0).failed(Errno::NoSpace, "not sent");
    let expected = [simple(0, b""), simple(0, b"data"), simple(0, &[0; 3]), simple(28, b"")].concat();
    assert_eq!(drain(&replies), expected);
}

#[test]
fn structured_replies_look_as_the_document_says() {
    let replies = Replies::new(&terms(ReplyStyle::Structured));
    replies.owe(COOKIE, 0).done();
    replies.owe(COOKIE, 0).data(4096, Buffer::copy_of(b"data"));
    replies.owe(COOKIE, 0).data(4096, Buffer::zeroed(0));
    replies.owe(COOKIE, 0).zeroes(range(512, 1024));
    replies.owe(COOKIE, 0).failed(Errno::NoSpace, "full");
    let offset = 4096_u64.to_be_bytes();
    let hole = [512_u64.to_be_bytes().to_vec(), 1024_u32.to_be_bytes().to_vec()].concat();
    let expected = [
        simple(0, b""),
        chunk(1, &[&offset[..], b"data"].concat()),
        chunk(0, b""),
        chunk(2, &hole),
        chunk(0x8001, b"\0\0\0\x1c\0\x04full"),
    ];
    assert_eq!(drain(&replies), expected.concat());
}

fn status_of(extents: &[(u64, u64, ExtentStatus)], wanted: ExtentsWanted) -> Vec<(u32, u32)> {
    let replies = Replies::new(&terms(ReplyStyle::Structured));
    let said: Vec<_> = extents
        .iter()
        .map(|(offset, len, status)| Extent { range: range(*offset, *len), status: *status })
        .map(Described::allocation)
        .collect();
    replies.owe(COOKIE, 0).status(range(1000, 3000), wanted, &[(1, said)]);
    let bytes = drain(&replies);
    assert_eq!(bytes[6..8], [0, 5]);
    assert_eq!(bytes[20..24], 1_u32.to_be_bytes());
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    bytes[24..].chunks(8).map(|pair| (word(&pair[..4]), word(&pair[4..]))).collect()
}

#[test]
fn extents_are_cut_to_the_range_and_joined() {
    use ExtentStatus::{Data, Hole, Zero};
    use ExtentsWanted::{Many, One};
    let all = [(1000, 500, Data), (1500, 500, Data), (2000, 1000, Hole), (3000, 9000, Zero)];
    assert_eq!(status_of(&all, Many), [(1000, 0), (1000, 3), (1000, 2)]);
    assert_eq!(status_of(&all, One), [(1000, 0)]);
    assert_eq!(status_of(&[(0, 9000, Hole)], Many), [(3000, 3)]);
    assert_eq!(status_of(&[], Many), [(3000, 0)], "what is not known counts as data");
    assert_eq!(status_of(&[(1000, 1000, Hole), (2500, 10, Zero)], Many), [(1000, 3)], "a gap ends the list");
    assert_eq!(status_of(&[(1500, 10, Hole)], Many), [(3000, 0)]);
}

#[test]
fn errors_of_nodes_have_their_number() {
    let table = [
        (ErrorKind::InvalidRequest, 22),
        (ErrorKind::ReadOnly, 1),
        (ErrorKind::NoSpace, 28),
        (ErrorKind::Unsupported, 95),
        (ErrorKind::Closed, 108),
        (ErrorKind::Io, 5),
    ];
    for (kind, code) in table {
        assert_eq!(Errno::from(kind).code(), code);
        assert_eq!(Errno::from_code(code), Errno::from(kind));
    }
    assert_eq!(Errno::from_code(4711), Errno::Invalid);
}

#[test]
fn a_message_is_cut_to_what_a_string_may_hold() {
    let replies = Replies::new(&terms(ReplyStyle::Structured));
    replies.owe(COOKIE, 0).failed(Errno::Io, &"ü".repeat(3000));
    let bytes = drain(&replies);
    assert_eq!(bytes.len(), 20 + 6 + 4096);
    assert!(str::from_utf8(&bytes[26..]).is_ok());
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "dropped unanswered"))]
fn a_reply_that_is_forgotten_is_loud() {
    let replies = Replies::new(&terms(ReplyStyle::Simple));
    drop(replies.owe(COOKIE, 0));
    assert_eq!(drain(&replies), simple(5, b""));
}

#[test]
fn a_reply_that_is_lost_in_a_panic_answers_eio() {
    let replies = Replies::new(&terms(ReplyStyle::Simple));
    let reply = replies.owe(COOKIE, 0);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _owed = reply;
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(drain(&replies), simple(5, b""));
}

#[test]
fn replies_can_be_sent_in_any_pieces() {
    let fill = |replies: &Replies| {
        for i in 0..40_u8 {
            replies.owe(Cookie(u64::from(i)), 0).done();
            replies.owe(Cookie(u64::from(i)), 0).data(0, Buffer::copy_of(&vec![i; usize::from(i)]));
        }
    };
    let whole = Replies::new(&terms(ReplyStyle::Structured));
    fill(&whole);
    let expected = drain(&whole);
    for step in [1, 2, 3, 7, 16, 61, 1000] {
        let replies = Replies::new(&terms(ReplyStyle::Structured));
        fill(&replies);
        let mut bytes = Vec::new();
        while !replies.is_empty() {
            let now = replies.show(|slices| {
                let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                let now = all.len().min(step);
                bytes.extend_from_slice(&all[..now]);
                now
            });
            replies.sent(now);
        }
        assert_eq!(bytes, expected, "in steps of {step}");
    }
}

#[test]
fn a_queue_that_never_runs_empty_does_not_grow() {
    let replies = Replies::new(&terms(ReplyStyle::Simple));
    replies.owe(COOKIE, 0).done();
    for _ in 0..100_000 {
        replies.owe(COOKIE, 0).done();
        replies.sent(16);
    }
    assert_eq!(replies.len(), 16);
    assert!(replies.heads_capacity() < 256);
}
