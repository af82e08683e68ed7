//! Requests as they come in: whole, in pieces, wrong.

use bytes::Bytes;

use super::*;
use crate::limits::{NBD_OWN_BUFFER_MIN, NBD_PAYLOAD_MAX, NBD_SKIP_MAX};
use crate::nbd::Errno;
use crate::nbd::request::{ExtentsWanted, Fragments};
use crate::nbd::wire::{cmd, cmd_flag};
use crate::range::ByteRange;
use crate::storage::{Durability, ZeroEffort, ZeroSpace};

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

#[test]
fn each_command_is_understood() {
    let (fua, cached) = (Durability::Fua, Durability::Cached);
    let write_zeroes = |space, effort, durability| Command::WriteZeroes {
        range: range(512, 1024),
        space,
        effort,
        durability,
    };
    let table = [
        (cmd::READ, 0, Command::Read { range: range(512, 1024), fragments: Fragments::Allowed }),
        (cmd::READ, cmd_flag::DF, Command::Read { range: range(512, 1024), fragments: Fragments::Forbidden }),
        (cmd::READ, cmd_flag::FUA, Command::Read { range: range(512, 1024), fragments: Fragments::Allowed }),
        (cmd::TRIM, 0, Command::Trim { range: range(512, 1024), durability: cached }),
        (cmd::TRIM, cmd_flag::FUA, Command::Trim { range: range(512, 1024), durability: fua }),
        (cmd::WRITE_ZEROES, 0, write_zeroes(ZeroSpace::MayUnmap, ZeroEffort::Any, cached)),
        (cmd::WRITE_ZEROES, cmd_flag::NO_HOLE, write_zeroes(ZeroSpace::Keep, ZeroEffort::Any, cached)),
        (
            cmd::WRITE_ZEROES,
            cmd_flag::FAST_ZERO | cmd_flag::FUA,
            write_zeroes(ZeroSpace::MayUnmap, ZeroEffort::FastOnly, fua),
        ),
        (cmd::CACHE, 0, Command::Cache { range: range(512, 1024) }),
        (
            cmd::BLOCK_STATUS,
            0,
            Command::BlockStatus {
                range: range(512, 1024),
                extents: ExtentsWanted::Many,
                contexts: [1].into(),
            },
        ),
        (
            cmd::BLOCK_STATUS,
            cmd_flag::REQ_ONE,
            Command::BlockStatus {
                range: range(512, 1024),
                extents: ExtentsWanted::One,
                contexts: [1].into(),
            },
        ),
    ];
    for (kind, flags, expected) in table {
        let bytes = request_bytes(kind, flags, 7, 512, 1024);
        assert_eq!(parse_one(terms(ReplyStyle::Structured), &bytes), expected);
    }
    assert_eq!(parse_one(terms(ReplyStyle::Simple), &request_bytes(cmd::FLUSH, 0, 7, 0, 0)), Command::Flush);
}

#[test]
fn a_write_takes_its_payload_with_it() {
    let mut bytes = request_bytes(cmd::WRITE, cmd_flag::FUA, 7, 512, 4);
    bytes.extend_from_slice(b"dataand more");
    let data = Bytes::from_static(b"data");
    let expected = Command::Write { offset: 512, data, durability: Durability::Fua };
    assert_eq!(parse_one(terms(ReplyStyle::Simple), &bytes), expected);
}

#[test]
fn requests_of_no_length_are_taken_but_have_no_status() {
    let simple = terms(ReplyStyle::Simple);
    for kind in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE] {
        parse_one(simple, &request_bytes(kind, 0, 7, SIZE, 0));
    }
    let structured = terms(ReplyStyle::Structured);
    assert_eq!(refusal(structured, &request_bytes(cmd::BLOCK_STATUS, 0, 7, 0, 0)), Errno::Invalid);
}

/// The error with which `bytes` are refused. Sees that it is answered once, and that the next is understood.
fn refusal(terms: Terms, bytes: &[u8]) -> Errno {
    let (mut requests, replies) = requests(terms);
    let mut input = Bytes::copy_from_slice(bytes);
    let refused = requests.next(&mut input, u64::MAX);
    let Ok(Parsed::Refused(errno)) = refused else { panic!("not refused: {refused:?}") };
    let answer = drain(&replies);
    let cookie = if terms.replies == ReplyStyle::Simple {
        assert_eq!(answer.len(), 16);
        assert_eq!(answer[4..8], errno.code().to_be_bytes());
        &answer[8..16]
    } else {
        assert_eq!(answer[4..8], [0, 1, 0x80, 1], "one error chunk, the last of its reply");
        assert_eq!(answer[20..24], errno.code().to_be_bytes());
        &answer[8..16]
    };
    assert_eq!(cookie, 7_u64.to_be_bytes());
    receive(&mut input, &request_bytes(cmd::FLUSH, 0, 8, 0, 0));
    let next = requests.next(&mut input, u64::MAX);
    let Ok(Parsed::Request(next)) = next else { panic!("out of step: {next:?}") };
    next.reply.done();
    errno
}

#[test]
fn wrong_requests_get_the_error_of_the_document() {
    let simple = terms(ReplyStyle::Simple);
    let structured = terms(ReplyStyle::Structured);
    let read_only = Terms { access: Access::ReadOnly, ..structured };
    let no_context = Terms { allocation: None, ..structured };
    let sectors = Terms { block_sizes: BlockSizes::new(512, 4096, 1 << 20), ..structured };
    let odd = Terms { size: 1000, ..sectors };
    let (read, write, trim, zero) = (cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES);
    let (status, cache, flush) = (cmd::BLOCK_STATUS, cmd::CACHE, cmd::FLUSH);
    let table: &[(&str, Terms, u16, u16, u64, u32, Errno)] = &[
        ("an unknown command", structured, 8, 0, 0, 0, Errno::Invalid),
        ("another unknown command", simple, 0xffff, 0, 0, 0, Errno::Invalid),
        ("an unknown flag", structured, read, 1 << 15, 0, 512, Errno::Invalid),
        ("a flag of an extension", structured, write, 1 << 5, 0, 512, Errno::Invalid),
        ("DF that was not offered", simple, read, cmd_flag::DF, 0, 512, Errno::Invalid),
        ("DF on a write", structured, write, cmd_flag::DF, 0, 512, Errno::Invalid),
        ("NO_HOLE on a trim", structured, trim, cmd_flag::NO_HOLE, 0, 512, Errno::Invalid),
        ("FAST_ZERO on a write", structured, write, cmd_flag::FAST_ZERO, 0, 512, Errno::Invalid),
        ("REQ_ONE on a read", structured, read, cmd_flag::REQ_ONE, 0, 512, Errno::Invalid),
        ("flags on a cache", structured, cache, cmd_flag::DF, 0, 512, Errno::Invalid),
        ("a flush with an offset", structured, flush, 0, 512, 0, Errno::Invalid),
        ("a flush with a length", structured, flush, 0, 0, 512, Errno::Invalid),
        ("a write to a read-only export", read_only, write, 0, 0, 512, Errno::Permission),
        ("a trim of a read-only export", read_only, trim, 0, 0, 512, Errno::Permission),
        ("zeroes to a read-only export", read_only, zero, 0, 0, 512, Errno::Permission),
        ("a write to a read-only export, beyond", read_only, write, 0, SIZE, 512, Errno::Permission),
        ("a read beyond the end", structured, read, 0, SIZE - 511, 512, Errno::Invalid),
        ("a read far beyond the end", structured, read, 0, u64::MAX, 512, Errno::Invalid),
        ("a trim beyond the end", structured, trim, 0, SIZE, 512, Errno::Invalid),
        ("a cache beyond the end", structured, cache, 0, SIZE, 512, Errno::Invalid),
        ("a status beyond the end", structured, status, 0, SIZE, 512, Errno::Invalid),
        ("a write beyond the end", structured, write, 0, SIZE - 511, 512, Errno::NoSpace),
        ("a write far beyond the end", simple, write, 0, u64::MAX - 3, 512, Errno::NoSpace),
        ("zeroes beyond the end", simple, zero, 0, SIZE, 1, Errno::NoSpace),
        ("a status without a context", no_context, status, 0, 0, 512, Errno::Invalid),
        ("a read that is too long", structured, read, 0, 0, NBD_PAYLOAD_MAX + 1, Errno::Overflow),
        ("a simple read that is too long", simple, read, 0, 0, NBD_PAYLOAD_MAX + 1, Errno::Invalid),
        ("a write that is too long", structured, write, 0, 0, NBD_PAYLOAD_MAX + 1, Errno::Invalid),
        ("a write as long as can be skipped", structured, write, 0, 0, NBD_SKIP_MAX, Errno::Invalid),
        ("a misaligned read", sectors, read, 0, 1, 512, Errno::Invalid),
        ("a read of half a sector", sectors, read, 0, 0, 256, Errno::Invalid),
        ("a misaligned write", sectors, write, 0, 256, 512, Errno::Invalid),
        ("misaligned zeroes", sectors, zero, 0, 0, 513, Errno::Invalid),
        ("a misaligned read up to an odd end", odd, read, 0, 500, 500, Errno::Invalid),
    ];
    for (what, terms, kind, flags, offset, len, expected) in table {
        let mut bytes = request_bytes(*kind, *flags, 7, *offset, *len);
        if *kind == write {
            bytes.resize(28 + usize::try_from(*len).unwrap(), 0x5a);
        }
        assert_eq!(refusal(*terms, &bytes), *expected, "{what}");
    }
    parse_one(odd, &request_bytes(read, 0, 7, 512, 488));
}

#[test]
fn a_payload_that_is_too_long_to_be_skipped_ends_the_connection() {
    for len in [NBD_SKIP_MAX + 1, u32::MAX] {
        let (mut requests, replies) = requests(terms(ReplyStyle::Simple));
        let mut input = request_bytes(cmd::WRITE, 0, 7, 0, len).freeze();
        let end = requests.next(&mut input, u64::MAX);
        assert!(matches!(end, Err(Violation::PayloadTooLong(_))));
        assert!(replies.is_empty());
        assert!(requests.payload_room().is_none(), "nothing was allocated for it");
    }
}

#[test]
fn garbage_ends_the_connection_and_stays_ended() {
    let (mut requests, _) = requests(terms(ReplyStyle::Simple));
    let mut input = Bytes::from_static(&[0x42; 64]);
    assert!(matches!(requests.next(&mut input, u64::MAX), Err(Violation::Magic { .. })));
    assert!(matches!(requests.next(&mut input, u64::MAX), Err(Violation::AfterEnd)));
}

#[test]
fn nothing_may_follow_a_disconnect() {
    let (mut requests, replies) = requests(terms(ReplyStyle::Structured));
    let mut input = request_bytes(cmd::DISC, 0, 7, 0, 0).freeze();
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Disconnect)));
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Incomplete)));
    receive(&mut input, &request_bytes(cmd::FLUSH, 0, 8, 0, 0));
    assert!(matches!(requests.next(&mut input, u64::MAX), Err(Violation::AfterEnd)));
    assert!(replies.is_empty(), "a disconnect has no answer");
}

#[test]
fn a_request_waits_until_there_is_room() {
    for kind in [cmd::READ, cmd::WRITE] {
        let (mut requests, _) = requests(terms(ReplyStyle::Structured));
        let mut input = request_bytes(kind, 0, 7, 0, 4096).freeze();
        receive(&mut input, &[1; 4096]);
        assert!(matches!(requests.next(&mut input, 4095), Ok(Parsed::NoRoom)));
        let Ok(Parsed::Request(request)) = requests.next(&mut input, 4096) else { panic!("room enough") };
        request.reply.failed(Errno::Io, "");
    }
}

#[test]
fn a_long_payload_is_received_into_a_buffer_of_its_own() {
    let len = NBD_OWN_BUFFER_MIN + 5;
    let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let (mut requests, _) = requests(terms(ReplyStyle::Structured));
    let mut input = request_bytes(cmd::WRITE, 0, 7, 4096, len.try_into().unwrap()).freeze();
    receive(&mut input, &payload[..100]);
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Incomplete)));
    assert!(input.is_empty() && requests.is_inside_request(&input));
    let mut from = 100;
    while let Some(room) = requests.payload_room() {
        let now = room.len().min(10_000);
        room[..now].copy_from_slice(&payload[from..from + now]);
        requests.payload_received(now);
        from += now;
    }
    let Ok(Parsed::Request(request)) = requests.next(&mut input, u64::MAX) else { panic!("all was there") };
    request.reply.done();
    let Command::Write { offset: 4096, data, .. } = request.command else { panic!("another command") };
    assert_eq!(data, payload);
    assert_eq!(data.as_ptr().align_offset(4096), 0);
}

#[test]
fn a_short_payload_is_cut_out_of_the_input_without_a_copy() {
    let (mut requests, _) = requests(terms(ReplyStyle::Simple));
    let mut input = request_bytes(cmd::WRITE, 0, 7, 0, 4096).freeze();
    receive(&mut input, &[9; 4000]);
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Incomplete)));
    receive(&mut input, &[9; 96]);
    let place = input[28..].as_ptr();
    let Ok(Parsed::Request(request)) = requests.next(&mut input, u64::MAX) else { panic!("all was there") };
    request.reply.done();
    let Command::Write { data, .. } = request.command else { panic!("another command") };
    assert_eq!(data.as_ptr(), place);
}

#[test]
fn a_server_that_goes_away_refuses_what_comes_and_takes_the_goodbye() {
    let (mut requests, replies) = requests(terms(ReplyStyle::Simple));
    let mut input = Bytes::new();
    // Of the first write a part is there, in a buffer of its own.
    let long = u32::try_from(NBD_OWN_BUFFER_MIN).unwrap();
    receive(&mut input, &request_bytes(cmd::WRITE, 0, 1, 0, long));
    receive(&mut input, &[1; 1000]);
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Incomplete)));
    assert!(requests.payload_room().is_some());
    requests.shut_down();
    assert!(requests.payload_room().is_none(), "what is refused needs no memory");
    receive(&mut input, &vec![1; NBD_OWN_BUFFER_MIN - 1000]);
    receive(&mut input, &request_bytes(cmd::WRITE, 0, 2, 0, 512));
    receive(&mut input, &[2; 512]);
    receive(&mut input, &request_bytes(cmd::READ, 0, 3, 0, 512));
    receive(&mut input, &request_bytes(cmd::FLUSH, 0, 4, 0, 0));
    receive(&mut input, &request_bytes(77, 0, 5, 0, 0));
    for _ in 2..=5 {
        // Without any room: nothing is kept of them.
        let refused = requests.next(&mut input, 0);
        assert!(matches!(refused, Ok(Parsed::Refused(Errno::Shutdown))), "{refused:?}");
    }
    let answers = drain(&replies);
    let answers: Vec<_> = answers.chunks(16).map(|answer| (answer[7], answer[15])).collect();
    assert_eq!(answers, [1, 2, 3, 4, 5].map(|cookie| (108, cookie)), "each is answered once, with ESHUTDOWN");
    receive(&mut input, &request_bytes(cmd::DISC, 0, 6, 0, 0));
    assert!(matches!(requests.next(&mut input, 0), Ok(Parsed::Disconnect)));
}
