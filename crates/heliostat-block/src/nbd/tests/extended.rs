//! Extended headers, and several contexts at once: what the branch `extension-ext-header` of the document says.

use super::*;
use crate::buffer::Buffer;
use crate::limits::{NBD_EXTENTS_MAX, NBD_PAYLOAD_MAX};
use crate::nbd::context::Described;
use crate::nbd::reply::Part;
use crate::nbd::request::{ExtentsWanted, Fragments, Request};
use crate::nbd::wire::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, STRUCTURED_REPLY_MAGIC, cmd, cmd_flag, opt, rep,
    transmission_flag,
};
use crate::nbd::{Cookie, Errno};
use crate::range::ByteRange;
use crate::storage::{Durability, ZeroEffort, ZeroSpace};

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);
const TIB: u64 = 1 << 40;

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

/// A disk that is larger than what 32 bits can speak of.
fn large() -> Terms {
    Terms { size: 4 * TIB, ..terms(ReplyStyle::Extended) }
}

fn with_contexts(terms: Terms, contexts: &[u32]) -> (Requests, Replies) {
    let replies = Replies::new(&terms);
    (Requests::new(terms, contexts, BufferPool::new(1 << 20, 2), replies.clone()), replies)
}

fn extended_bytes(kind: u16, flags: u16, offset: u64, len: u64) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u32(EXTENDED_REQUEST_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(COOKIE.0);
    bytes.put_u64(offset);
    bytes.put_u64(len);
    bytes
}

/// The payload of a block status that asks some contexts only.
fn filter(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut bytes = len.to_be_bytes().to_vec();
    ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
    bytes
}

fn extended_chunk(flags: u16, kind: u16, offset: u64, payload: &[u8]) -> Vec<u8> {
    let magic = EXTENDED_REPLY_MAGIC.to_be_bytes();
    let len = u64::try_from(payload.len()).unwrap().to_be_bytes();
    let (cookie, offset) = (COOKIE.0.to_be_bytes(), offset.to_be_bytes());
    [&magic[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie, &offset, &len, payload].concat()
}

#[test]
fn extended_headers_take_precedence_over_structured_replies() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    assert_eq!(server.ask(opt::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
    assert_eq!(server.ask(opt::EXTENDED_HEADERS, &[])[0].0, rep::ACK);
    assert_eq!(server.ask(opt::STRUCTURED_REPLY, &[])[0].0, rep::ERR_EXT_HEADER_REQD);
    assert_eq!(server.go("a").terms.replies, ReplyStyle::Extended);
}

#[test]
fn extended_headers_need_no_structured_replies_before_and_are_enough_for_contexts() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    let set = context_bytes("a", &["base:allocation"]);
    assert_eq!(server.ask(opt::SET_META_CONTEXT, &set)[0].0, rep::ERR_INVALID);
    server.ask(opt::EXTENDED_HEADERS, &[]);
    assert_eq!(server.ask(opt::SET_META_CONTEXT, &set)[0].0, rep::META_CONTEXT);
    assert_eq!(server.go("a").terms.allocation, Some(1));
}

#[test]
fn the_old_message_for_an_export_cannot_follow_extended_headers() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    server.ask(opt::EXTENDED_HEADERS, &[]);
    assert_eq!(server.send(opt::EXPORT_NAME, b"a"), Err(Violation::OldExportName));
    assert!(server.output.is_empty());
}

#[test]
fn the_filter_of_contexts_is_offered_with_extended_headers_and_a_context_only() {
    let exports = [offer("a")];
    let set = context_bytes("a", &["base:allocation"]);
    let flags = |options: &[(u32, &[u8])]| {
        let mut server = Server::new(&exports);
        for (option, data) in options {
            server.ask(*option, data);
        }
        let info = server.ask(opt::INFO, &query_bytes("a", &[])).remove(0).1;
        u16::from_be_bytes([info[10], info[11]])
            & (transmission_flag::BLOCK_STATUS_PAYLOAD | transmission_flag::SEND_DF)
    };
    let both = transmission_flag::BLOCK_STATUS_PAYLOAD | transmission_flag::SEND_DF;
    assert_eq!(flags(&[]), 0);
    assert_eq!(flags(&[(opt::EXTENDED_HEADERS, &[])]), transmission_flag::SEND_DF);
    let structured: &[(u32, &[u8])] = &[(opt::STRUCTURED_REPLY, &[]), (opt::SET_META_CONTEXT, &set)];
    assert_eq!(flags(structured), transmission_flag::SEND_DF);
    assert_eq!(flags(&[(opt::EXTENDED_HEADERS, &[]), (opt::SET_META_CONTEXT, &set)]), both);
}

#[test]
fn several_contexts_are_selected_at_once_and_each_has_its_id() {
    let exports = [offer("a"), offer("b")];
    let mut server = Server::new(&exports);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    let all = ["qemu:dirty-bitmap:b0", "base:allocation", "qemu:allocation-depth", "base:allocation"];
    let replies = server.ask(opt::SET_META_CONTEXT, &context_bytes("a", &all));
    let said: Vec<_> = replies.iter().map(|(kind, data)| (*kind, &data[..])).collect();
    let expected: [(u32, &[u8]); 4] = [
        (4, b"\0\0\0\x01base:allocation"),
        (4, b"\0\0\0\x02qemu:allocation-depth"),
        (4, b"\0\0\0\x03qemu:dirty-bitmap:b0"),
        (1, b""),
    ];
    assert_eq!(said, expected);
    let agreed = server.go("a");
    assert_eq!((agreed.contexts, agreed.terms.allocation), (vec![1, 2, 3], Some(1)));

    let mut server = Server::new(&exports);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    server.ask(opt::SET_META_CONTEXT, &context_bytes("a", &["qemu:dirty-bitmap:b0"]));
    let agreed = server.go("a");
    assert_eq!((agreed.contexts, agreed.terms.allocation), (vec![3], None));

    let mut server = Server::new(&exports);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    server.ask(opt::SET_META_CONTEXT, &context_bytes("a", &all));
    assert!(server.go("b").contexts.is_empty(), "what was selected of another export does not count");
}

#[test]
fn a_listing_has_no_ids_and_selects_nothing() {
    let exports = [offer("a")];
    let mut server = Server::new(&exports);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    let replies = server.ask(opt::LIST_META_CONTEXT, &context_bytes("a", &["qemu:"]));
    assert_eq!(replies[0].1, b"\0\0\0\0qemu:allocation-depth");
    assert_eq!(replies[1].1, b"\0\0\0\0qemu:dirty-bitmap:b0");
    assert!(server.go("a").contexts.is_empty());
}

#[test]
fn who_selected_a_context_that_is_gone_is_not_let_in() {
    let before = [offer("a")];
    let after = [Offer { contexts: vec![Context::Allocation], ..offer("a") }];
    let mut server = Server::new(&before);
    server.ask(opt::STRUCTURED_REPLY, &[]);
    server.ask(opt::SET_META_CONTEXT, &context_bytes("a", &["qemu:dirty-bitmap:b0"]));
    server.offers.exports = &after;
    assert_eq!(server.ask(opt::GO, &query_bytes("a", &[]))[0].0, rep::ERR_UNKNOWN);
    server.ask(opt::SET_META_CONTEXT, &context_bytes("a", &["base:allocation"]));
    assert_eq!(server.go("a").contexts, [1]);
}

#[test]
fn each_extended_command_is_understood() {
    let zeroes = Command::WriteZeroes {
        range: range(512, 3 * TIB),
        space: ZeroSpace::MayUnmap,
        effort: ZeroEffort::FastOnly,
        durability: Durability::Cached,
    };
    let status = |extents| Command::BlockStatus { range: range(512, 3 * TIB), extents, contexts: [1].into() };
    let table = [
        (
            cmd::READ,
            cmd_flag::DF,
            1024,
            Command::Read { range: range(512, 1024), fragments: Fragments::Forbidden },
        ),
        (cmd::TRIM, 0, 3 * TIB, Command::Trim { range: range(512, 3 * TIB), durability: Durability::Cached }),
        (cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 3 * TIB, zeroes),
        (cmd::CACHE, 0, 3 * TIB, Command::Cache { range: range(512, 3 * TIB) }),
        (cmd::BLOCK_STATUS, 0, 3 * TIB, status(ExtentsWanted::Many)),
        (cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 3 * TIB, status(ExtentsWanted::One)),
    ];
    for (kind, flags, len, expected) in table {
        assert_eq!(parse_one(large(), &extended_bytes(kind, flags, 512, len)), expected);
    }
    // QEMU's client leaves the flag out.
    for payload in [cmd_flag::PAYLOAD_LEN, 0] {
        let mut bytes = extended_bytes(cmd::WRITE, payload | cmd_flag::FUA, 512, 4);
        bytes.extend_from_slice(b"dataand more");
        let data = Bytes::from_static(b"data");
        let expected = Command::Write { offset: 512, data, durability: Durability::Fua };
        assert_eq!(parse_one(large(), &bytes), expected);
    }
}

/// How `bytes` are refused; sees that the next request is understood.
fn refusal(terms: Terms, contexts: &[u32], bytes: &[u8]) -> Errno {
    let (mut requests, replies) = with_contexts(terms, contexts);
    let mut input = Bytes::copy_from_slice(bytes);
    let refused = requests.next(&mut input, u64::MAX);
    let Ok(Parsed::Refused(errno)) = refused else { panic!("not refused: {refused:?}") };
    let answer = drain(&replies);
    assert_eq!(answer[..8], [&EXTENDED_REPLY_MAGIC.to_be_bytes()[..], &[0, 1, 0x80, 1]].concat());
    assert_eq!(answer[16..24], bytes[16..24], "the request's offset");
    receive(&mut input, &extended_bytes(cmd::FLUSH, 0, 0, 0));
    let next = requests.next(&mut input, u64::MAX);
    let Ok(Parsed::Request(Request { reply, command: Command::Flush })) = next else {
        panic!("out of step: {next:?}")
    };
    reply.done();
    errno
}

#[test]
fn wrong_extended_requests_get_the_error_of_the_document_and_their_payload_is_passed_over() {
    let payload = cmd_flag::PAYLOAD_LEN;
    let all = &[1, 2, 3][..];
    let read_only = Terms { access: Access::ReadOnly, ..large() };
    let one = |len| filter(len, &[1]);
    type Row<'a> = (&'a str, Terms, &'a [u32], u16, u16, u64, Vec<u8>, Errno);
    let table: &[Row<'_>] = &[
        ("a read with a payload", large(), all, cmd::READ, payload, 0, vec![9; 512], Errno::Invalid),
        ("zeroes with a payload", large(), all, cmd::WRITE_ZEROES, payload, 0, vec![9; 512], Errno::Invalid),
        ("an unknown command with one", large(), all, 99, payload, 0, vec![9; 100], Errno::Invalid),
        (
            "a write to a read-only export",
            read_only,
            all,
            cmd::WRITE,
            payload,
            0,
            vec![9; 512],
            Errno::Permission,
        ),
        ("a write beyond the end", large(), all, cmd::WRITE, payload, 4 * TIB, vec![9; 512], Errno::NoSpace),
        ("a filter without contexts", large(), &[], cmd::BLOCK_STATUS, payload, 0, one(512), Errno::Invalid),
        ("an empty filter", large(), all, cmd::BLOCK_STATUS, payload, 0, filter(512, &[]), Errno::Invalid),
        ("a filter that is cut", large(), all, cmd::BLOCK_STATUS, payload, 0, vec![0; 11], Errno::Invalid),
        ("a filter too short", large(), all, cmd::BLOCK_STATUS, payload, 0, vec![0; 4], Errno::Invalid),
        ("an unknown id", large(), all, cmd::BLOCK_STATUS, payload, 0, filter(512, &[4]), Errno::Invalid),
        ("an id twice", large(), all, cmd::BLOCK_STATUS, payload, 0, filter(512, &[1, 1]), Errno::Invalid),
        ("too many", large(), all, cmd::BLOCK_STATUS, payload, 0, filter(512, &[1, 2, 3, 4]), Errno::Invalid),
        ("a filter of nothing", large(), all, cmd::BLOCK_STATUS, payload, 0, one(0), Errno::Invalid),
        ("a filter beyond", large(), all, cmd::BLOCK_STATUS, payload, 0, one(5 * TIB), Errno::Invalid),
    ];
    for (what, terms, contexts, kind, flags, offset, data, expected) in table {
        let len = u64::try_from(data.len()).unwrap();
        let mut bytes = extended_bytes(*kind, *flags, *offset, len);
        bytes.extend_from_slice(data);
        assert_eq!(refusal(*terms, contexts, &bytes), *expected, "{what}");
    }
    for len in [u64::from(NBD_PAYLOAD_MAX) + 1, u64::from(u32::MAX), TIB] {
        assert_eq!(refusal(large(), all, &extended_bytes(cmd::READ, 0, 0, len)), Errno::Overflow);
    }
}

#[test]
fn compact_headers_do_not_take_the_flag_for_a_payload() {
    let (mut requests, _) = requests(terms(ReplyStyle::Structured));
    let mut input = request_bytes(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 7, 0, 12).freeze();
    assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Refused(Errno::Invalid))));
    assert!(input.is_empty());
}

#[test]
fn a_payload_beyond_the_advertised_maximum_ends_the_connection() {
    for kind in [cmd::WRITE, cmd::READ, cmd::BLOCK_STATUS] {
        for len in [u64::from(NBD_PAYLOAD_MAX) + 1, u64::MAX] {
            let (mut requests, replies) = requests(large());
            let mut input = extended_bytes(kind, cmd_flag::PAYLOAD_LEN, 0, len).freeze();
            let end = requests.next(&mut input, u64::MAX);
            assert!(matches!(end, Err(Violation::PayloadTooLong(_))), "{end:?}");
            assert!(replies.is_empty() && requests.payload_room().is_none());
        }
    }
}

#[test]
fn headers_of_the_other_kind_end_the_connection() {
    let (mut extended, _) = requests(large());
    let mut input =
        [request_bytes(cmd::FLUSH, 0, 7, 0, 0), request_bytes(cmd::FLUSH, 0, 7, 0, 0)].concat().into();
    assert!(matches!(extended.next(&mut input, u64::MAX), Err(Violation::Magic { .. })));
    let (mut compact, _) = requests(terms(ReplyStyle::Structured));
    let mut input = extended_bytes(cmd::FLUSH, 0, 0, 0).freeze();
    assert!(matches!(compact.next(&mut input, u64::MAX), Err(Violation::Magic { .. })));
}

#[test]
fn a_filter_says_which_contexts_and_how_much() {
    let mut bytes = extended_bytes(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN | cmd_flag::REQ_ONE, 512, 16);
    bytes.extend_from_slice(&filter(2 * TIB, &[3, 1]));
    let bytes = bytes.freeze();
    for cut in 0..bytes.len() {
        let (mut requests, _replies) = with_contexts(large(), &[1, 2, 3]);
        let mut input = bytes.slice(..cut);
        assert!(matches!(requests.next(&mut input, u64::MAX), Ok(Parsed::Incomplete)), "cut at {cut}");
        receive(&mut input, &bytes[cut..]);
        let Ok(Parsed::Request(Request { command, reply })) = requests.next(&mut input, u64::MAX) else {
            panic!("not understood, cut at {cut}")
        };
        reply.done();
        let extents = ExtentsWanted::One;
        assert_eq!(
            command,
            Command::BlockStatus { range: range(512, 2 * TIB), extents, contexts: [3, 1].into() }
        );
    }
}

#[test]
fn extended_replies_look_as_the_document_says() {
    let replies = Replies::new(&large());
    replies.owe(COOKIE, 77).done();
    replies.owe(COOKIE, 4096).data(4096, Buffer::copy_of(b"data"));
    replies.owe(COOKIE, 512).zeroes(range(512, 1024));
    replies.owe(COOKIE, 9).failed(Errno::NoSpace, "full");
    let hole = [512_u64.to_be_bytes().to_vec(), 1024_u32.to_be_bytes().to_vec()].concat();
    let expected = [
        extended_chunk(1, 0, 77, b""),
        extended_chunk(1, 1, 4096, &[&4096_u64.to_be_bytes()[..], b"data"].concat()),
        extended_chunk(1, 2, 512, &hole),
        extended_chunk(1, 0x8001, 9, b"\0\0\0\x1c\0\x04full"),
    ];
    assert_eq!(drain(&replies), expected.concat());
}

#[test]
fn only_the_last_chunk_of_a_reply_says_that_it_is_the_last() {
    let replies = Replies::new(&large());
    let parts = || vec![Part::Hole(range(0, 8)), Part::Data(8, Buffer::copy_of(b"data"))];
    replies.owe(COOKIE, 0).parts(parts());
    replies.owe(COOKIE, 0).failed_at(parts(), Errno::Io, "bad", 12);
    replies.owe(COOKIE, 0).parts(vec![]);
    let hole = [&[0; 11][..], &[8]].concat();
    let data = [&8_u64.to_be_bytes()[..], b"data"].concat();
    let failure = [&b"\0\0\0\x05\0\x03bad"[..], &12_u64.to_be_bytes()].concat();
    let expected = [
        extended_chunk(0, 2, 0, &hole),
        extended_chunk(1, 1, 0, &data),
        extended_chunk(0, 2, 0, &hole),
        extended_chunk(0, 1, 0, &data),
        extended_chunk(1, 0x8002, 0, &failure),
        extended_chunk(1, 0, 0, b""),
    ];
    assert_eq!(drain(&replies), expected.concat());
}

#[test]
fn a_client_of_simple_replies_hears_only_the_number_of_an_error() {
    let replies = Replies::new(&terms(ReplyStyle::Simple));
    let reply = replies.owe(COOKIE, 0);
    assert!(!reply.takes_parts());
    reply.failed_at(vec![Part::Hole(range(0, 8))], Errno::Io, "bad", 12);
    assert_eq!(drain(&replies), [&b"\x67\x44\x66\x98\0\0\0\x05"[..], &COOKIE.0.to_be_bytes()].concat());
}

#[test]
fn each_context_has_its_chunk_with_extents_of_64_bits() {
    let described = |from, to, flags| Described { range: ByteRange::from_bounds(from, to), flags };
    let said =
        [(1, vec![described(0, TIB, 3), described(TIB, 4 * TIB, 0)]), (3, vec![described(0, 4 * TIB, 1)])];
    let replies = Replies::new(&large());
    replies.owe(COOKIE, 512).status(range(512, 3 * TIB), ExtentsWanted::Many, &said);
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|word| word.to_be_bytes()).collect() };
    let first = words(&[1 << 32 | 2, TIB - 512, 3, 2 * TIB + 512, 0]);
    let second = words(&[3 << 32 | 1, 3 * TIB, 1]);
    assert_eq!(
        drain(&replies),
        [extended_chunk(0, 6, 512, &first), extended_chunk(1, 6, 512, &second)].concat()
    );
    replies.owe(COOKIE, 512).status(range(512, 3 * TIB), ExtentsWanted::One, &said);
    let first = words(&[1 << 32 | 1, TIB - 512, 3]);
    assert_eq!(
        drain(&replies),
        [extended_chunk(0, 6, 512, &first), extended_chunk(1, 6, 512, &second)].concat()
    );
}

#[test]
fn structured_replies_have_a_chunk_of_32_bits_for_each_context() {
    let described = |from, to, flags| Described { range: ByteRange::from_bounds(from, to), flags };
    let said = [(1, vec![described(0, 4096, 2)]), (2, vec![described(0, 8192, 1)])];
    let replies = Replies::new(&terms(ReplyStyle::Structured));
    replies.owe(COOKIE, 0).status(range(0, 8192), ExtentsWanted::Many, &said);
    let chunk = |last: u8, payload: [u32; 3]| {
        let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_be_bytes()).collect();
        let magic = STRUCTURED_REPLY_MAGIC.to_be_bytes();
        [&magic[..], &[0, last, 0, 5], &COOKIE.0.to_be_bytes(), &[0, 0, 0, 12], &payload].concat()
    };
    assert_eq!(drain(&replies), [chunk(0, [1, 4096, 2]), chunk(1, [2, 8192, 1])].concat());
}

#[test]
fn contexts_share_the_bound_of_an_answer() {
    let each = |parity: u64| -> Vec<_> {
        let one = |at| Described { range: range(at * 512, 512), flags: u32::from(at % 2 == parity) };
        (0..2 * u64::try_from(NBD_EXTENTS_MAX).unwrap()).map(one).collect()
    };
    let replies = Replies::new(&large());
    replies.owe(COOKIE, 0).status(range(0, TIB), ExtentsWanted::Many, &[(1, each(0)), (2, each(1))]);
    assert_eq!(replies.len(), 2 * (32 + 8) + 16 * NBD_EXTENTS_MAX);
}
