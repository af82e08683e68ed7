//! Our client against our server, over a disk in memory.

use std::collections::BTreeMap;

use super::*;
use crate::buffer::Buffer;
use crate::convert::usize_from;
use crate::nbd::client::{Allocation, Negotiation, NegotiationError, Wish};
use crate::nbd::client_reply::{Answer, Answered, Conversation};
use crate::nbd::client_request::{Ask, AskError};
use crate::nbd::context::Described;
use crate::nbd::request::{ExtentsWanted, Request};
use crate::nbd::wire::rep;
use crate::nbd::{Cookie, Errno};
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, ZeroEffort, ZeroSpace};

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn wish(export: &str, replies: ReplyStyle) -> Wish {
    Wish { export: export.to_owned(), replies, allocation: Allocation::Wanted }
}

/// Carries bytes between a negotiating client and a server until they agree.
fn negotiate(exports: &[Offer], wish: Wish) -> Result<(Conversation, Agreed), NegotiationError> {
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let mut server = Handshake::new(&mut to_client);
    let mut client = Negotiation::new(wish);
    let offers = Offers { exports, shutting_down: false };
    let mut agreed = None;
    loop {
        let found = client.step(&mut to_client, &mut to_server)?;
        if let (Some(found), Some(agreed)) = (&found, &agreed) {
            let agreed: &Agreed = agreed;
            assert_eq!(found.terms, agreed.terms, "both sides know the same");
            return Ok((Conversation::new(found), agreed.clone()));
        }
        let mut received = to_server.split().freeze();
        let step = server.step(&mut received, offers, &mut to_client);
        to_server.extend_from_slice(&received);
        match step {
            Ok(Step::Agreed(now)) => agreed = Some(now),
            Ok(Step::Answered) => {}
            other => panic!("stuck: {other:?}, client found {found:?}"),
        }
    }
}

/// A disk that carries requests out at once.
pub(in crate::nbd) struct Disk(pub(in crate::nbd) Vec<u8>);

impl Disk {
    pub(in crate::nbd) fn carry_out(&mut self, request: Request) {
        let Request { command, reply } = request;
        match command {
            Command::Read { range, .. } => {
                let bytes = &self.0[usize_from(range.offset())..usize_from(range.end())];
                reply.data(range.offset(), Buffer::copy_of(bytes));
            }
            Command::Write { offset, data, .. } => {
                let at = usize_from(offset);
                self.0[at..at + data.len()].copy_from_slice(&data);
                reply.done();
            }
            Command::WriteZeroes { range, .. } | Command::Trim { range, .. } => {
                self.0[usize_from(range.offset())..usize_from(range.end())].fill(0);
                reply.done();
            }
            Command::Flush | Command::Cache { .. } => reply.done(),
            Command::BlockStatus { range, extents, contexts } => {
                let half = ByteRange::from_bounds(range.offset(), range.offset() + range.len().div_ceil(2));
                let rest = ByteRange::from_bounds(half.end(), range.end());
                let all = [
                    Extent { range: half, status: ExtentStatus::Hole },
                    Extent { range: rest, status: ExtentStatus::Zero },
                ];
                let said = all.map(Described::allocation).to_vec();
                let said: Vec<_> = contexts.iter().map(|id| (*id, said.clone())).collect();
                reply.status(range, extents, &said);
            }
        }
    }
}

/// Both ends of a connection in the transmission phase.
struct Pair {
    client: Conversation,
    server: Requests,
    replies: Replies,
    disk: Disk,
}

impl Pair {
    fn new(replies: ReplyStyle) -> Self {
        let exports = [Offer { size: 1 << 20, ..offer("a") }];
        let (client, agreed) = negotiate(&exports, wish("a", replies)).unwrap();
        let (server, replies) = requests(agreed.terms);
        Self { client, server, replies, disk: Disk(vec![0; 1 << 20]) }
    }

    fn ask(&mut self, ask: Ask, payload: &[u8]) -> Result<Answered, Errno> {
        let mut wire = BytesMut::new();
        let cookie = self.client.ask(ask, &mut wire).unwrap();
        wire.extend_from_slice(payload);
        let mut wire = wire.freeze();
        while let Parsed::Request(request) = self.server.next(&mut wire, u64::MAX).unwrap() {
            self.disk.carry_out(request);
        }
        let mut answers = BytesMut::from(&drain(&self.replies)[..]);
        let answer = self.client.next(&mut answers).unwrap().unwrap();
        assert_eq!((answer.cookie, answers.len(), self.client.in_flight()), (cookie, 0, 0));
        answer.outcome.map_err(|failure| failure.errno)
    }
}

#[test]
fn what_is_written_is_read_back_in_both_styles() {
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let mut pair = Pair::new(style);
        let write = Ask::Write { range: range(1000, 5), durability: Durability::Fua };
        assert!(matches!(pair.ask(write, b"hello"), Ok(Answered::Done)));
        assert!(matches!(pair.ask(Ask::Flush, b""), Ok(Answered::Done)));
        let zeroes = Ask::WriteZeroes {
            range: range(1002, 2),
            space: ZeroSpace::Keep,
            effort: ZeroEffort::FastOnly,
            durability: Durability::Cached,
        };
        assert!(matches!(pair.ask(zeroes, b""), Ok(Answered::Done)));
        assert!(matches!(pair.ask(Ask::Trim { range: range(0, 4096) }, b""), Ok(Answered::Done)));
        let write = Ask::Write { range: range(1000, 5), durability: Durability::Cached };
        assert!(matches!(pair.ask(write, b"he\0\0o"), Ok(Answered::Done)));
        let read = Ask::Read { offset: 998, buffer: Buffer::zeroed(9) };
        let Ok(Answered::Data(buffer)) = pair.ask(read, b"") else { panic!("no data") };
        assert_eq!(&buffer[..], b"\0\0he\0\0o\0\0");
        let read = Ask::Read { offset: 998, buffer: Buffer::zeroed(0) };
        assert!(matches!(pair.ask(read, b""), Ok(Answered::Data(_))));
    }
}

#[test]
fn extents_reach_the_client() {
    let mut pair = Pair::new(ReplyStyle::Structured);
    let ask = Ask::BlockStatus { range: range(512, 1024), extents: ExtentsWanted::Many };
    let Ok(Answered::Extents(extents)) = pair.ask(ask, b"") else { panic!("no extents") };
    let expected = [
        Extent { range: range(512, 512), status: ExtentStatus::Hole },
        Extent { range: range(1024, 512), status: ExtentStatus::Zero },
    ];
    assert_eq!(extents, expected);
}

#[test]
fn a_client_does_not_ask_for_what_was_not_offered() {
    let exports =
        [Offer { access: Access::ReadOnly, block_sizes: BlockSizes::new(512, 4096, 1 << 20), ..offer("a") }];
    let (mut client, _) = negotiate(&exports, wish("a", ReplyStyle::Simple)).unwrap();
    let write = |range| Ask::Write { range, durability: Durability::Cached };
    let read = |offset, len| Ask::Read { offset, buffer: Buffer::zeroed(len) };
    let status = Ask::BlockStatus { range: range(0, 512), extents: ExtentsWanted::One };
    let table = [
        (write(range(0, 512)), AskError::NotOffered),
        (Ask::Trim { range: range(0, 512) }, AskError::NotOffered),
        (status, AskError::NotOffered),
        (read(0, 100), AskError::OutsideTerms),
        (read(100, 512), AskError::OutsideTerms),
        (read(SIZE, 512), AskError::OutsideTerms),
        (read(0, (1 << 20) + 512), AskError::OutsideTerms),
        (read(u64::MAX, 512), AskError::OutsideTerms),
    ];
    let mut output = BytesMut::new();
    for (ask, expected) in table {
        assert_eq!(client.ask(ask, &mut output), Err(expected));
    }
    assert!(output.is_empty() && client.in_flight() == 0);
}

#[test]
fn an_export_that_is_not_there_is_a_refusal() {
    let refused = negotiate(&[offer("a")], wish("b", ReplyStyle::Structured)).map(|_| ());
    let message = "there is no such export".to_owned();
    assert_eq!(refused, Err(NegotiationError::Refused { reply: rep::ERR_UNKNOWN, message }));
}

/// A server that knows only `known` of the options.
fn old_server(known: &[u32]) -> Result<Conversation, NegotiationError> {
    let exports = [offer("a")];
    let offers = Offers { exports: &exports, shutting_down: false };
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let mut server = Handshake::new(&mut to_client);
    let mut client = Negotiation::new(wish("a", ReplyStyle::Structured));
    let step = |server: &mut Handshake, to_server: &mut BytesMut, to_client: &mut BytesMut| {
        let mut received = to_server.split().freeze();
        server.step(&mut received, offers, to_client).unwrap();
        to_server.extend_from_slice(&received);
    };
    for _ in 0..20 {
        if let Some(found) = client.step(&mut to_client, &mut to_server)? {
            return Ok(Conversation::new(&found));
        }
        if to_server.len() >= 16 && to_server[..8] == OPTION_MAGIC.to_be_bytes() {
            let option = u32::from_be_bytes(to_server[8..12].try_into().unwrap());
            if !known.contains(&option) {
                to_server[8..12].copy_from_slice(&99_u32.to_be_bytes());
            }
            step(&mut server, &mut to_server, &mut to_client);
            if to_client.len() >= 12 && to_client[8..12] == 99_u32.to_be_bytes() {
                to_client[8..12].copy_from_slice(&option.to_be_bytes());
            }
        } else {
            step(&mut server, &mut to_server, &mut to_client);
        }
    }
    panic!("no end");
}

#[test]
fn a_client_gets_along_with_servers_that_know_less() {
    use crate::nbd::wire::opt;
    for known in [
        &[opt::EXPORT_NAME][..],
        &[opt::EXPORT_NAME, opt::GO],
        &[opt::EXPORT_NAME, opt::STRUCTURED_REPLY],
        &[opt::EXPORT_NAME, opt::STRUCTURED_REPLY, opt::GO],
    ] {
        assert!(old_server(known).is_ok(), "a server that knows {known:?}");
    }
}

#[test]
fn a_server_that_lies_is_found_out() {
    use crate::nbd::wire::chunk;
    let simple = |error: u32, cookie: u64| {
        [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    };
    let chunk = |flags: u16, kind: u16, cookie: u64, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let magic = 0x668e_33ef_u32.to_be_bytes();
        [&magic[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes(), &len, payload].concat()
    };
    let data = |offset: u64, len: usize| [offset.to_be_bytes().to_vec(), vec![1; len]].concat();
    let hole = |offset: u64, len: u32| [offset.to_be_bytes().to_vec(), len.to_be_bytes().to_vec()].concat();
    let twice = [chunk(0, 1, 1, &data(4096, 1024)), chunk(1, 1, 1, &data(4100, 512))].concat();
    let table: &[(&str, Vec<u8>)] = &[
        ("a simple reply to a structured read", simple(0, 1)),
        ("an answer to no request", simple(0, 77)),
        ("a chunk for no request", chunk(1, chunk::NONE, 77, &[])),
        ("an unknown magic", vec![0; 20]),
        ("success without data", chunk(1, chunk::NONE, 1, &[])),
        ("half the data", chunk(1, chunk::OFFSET_DATA, 1, &data(4096, 512))),
        ("data before the read", chunk(0, chunk::OFFSET_DATA, 1, &data(4095, 512))),
        ("data after the read", chunk(0, chunk::OFFSET_DATA, 1, &data(4097, 1024))),
        ("data at the end of the world", chunk(0, chunk::OFFSET_DATA, 1, &data(u64::MAX, 512))),
        ("data twice", twice),
        ("an empty hole", chunk(0, chunk::OFFSET_HOLE, 1, &hole(4096, 0))),
        ("a hole that is too long", chunk(0, chunk::OFFSET_HOLE, 1, &hole(4096, 1025))),
        ("data for a flush", chunk(0, chunk::OFFSET_DATA, 2, &data(0, 512))),
        ("extents for a read", chunk(0, chunk::BLOCK_STATUS, 1, &[0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0])),
        (
            "extents of another context",
            chunk(0, chunk::BLOCK_STATUS, 3, &[0, 0, 0, 9, 0, 0, 1, 0, 0, 0, 0, 0]),
        ),
        ("an empty extent", chunk(0, chunk::BLOCK_STATUS, 3, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])),
        ("a status without extents", simple(0, 3)),
        ("an error with a message too long", chunk(1, chunk::ERROR, 1, &[0, 0, 0, 5, 0, 1])),
        ("an error that is too short", chunk(1, chunk::ERROR, 1, &[0, 0, 0, 5, 0])),
        ("an ending that is none", chunk(0, chunk::NONE, 1, &[])),
        ("an unknown chunk", chunk(1, 77, 1, &[])),
    ];
    for (what, bytes) in table {
        let exports = [offer("a")];
        let (mut client, _) = negotiate(&exports, wish("a", ReplyStyle::Structured)).unwrap();
        let mut output = BytesMut::new();
        client.ask(Ask::Read { offset: 4096, buffer: Buffer::zeroed(1024) }, &mut output).unwrap();
        client.ask(Ask::Flush, &mut output).unwrap();
        let status = Ask::BlockStatus { range: range(0, 4096), extents: ExtentsWanted::Many };
        client.ask(status, &mut output).unwrap();
        let answer = client.next(&mut BytesMut::from(&bytes[..]));
        assert!(answer.is_err(), "{what}: {answer:?}");
    }
}

#[test]
fn chunks_of_several_reads_may_be_mixed() {
    let (mut client, _) = negotiate(&[offer("a")], wish("a", ReplyStyle::Structured)).unwrap();
    let mut output = BytesMut::new();
    let mut reads = BTreeMap::new();
    for offset in [0, 4096] {
        let read = Ask::Read { offset, buffer: Buffer::copy_of(&[9; 1024]) };
        reads.insert(client.ask(read, &mut output).unwrap(), offset);
    }
    let chunk = |flags: u16, kind: u16, cookie: u64, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let magic = 0x668e_33ef_u32.to_be_bytes();
        [&magic[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes(), &len, payload].concat()
    };
    let data = |offset: u64| [offset.to_be_bytes().to_vec(), vec![1; 512]].concat();
    let hole = |offset: u64| [offset.to_be_bytes().to_vec(), vec![0, 0, 2, 0]].concat();
    let stream = [
        chunk(0, 1, 1, &data(512)),
        chunk(0, 2, 2, &hole(4096)),
        chunk(1, 2, 1, &hole(0)),
        chunk(0, 0x8002, 2, &[&[0, 0, 0, 5, 0, 3][..], b"bad", &4608_u64.to_be_bytes()].concat()),
        chunk(1, 0, 2, &[]),
    ];
    let mut input = BytesMut::from(&stream.concat()[..]);
    let Answer { cookie, outcome } = client.next(&mut input).unwrap().unwrap();
    assert_eq!(cookie, Cookie(1));
    let Ok(Answered::Data(buffer)) = outcome else { panic!("no data") };
    assert_eq!(&buffer[..], [vec![0; 512], vec![1; 512]].concat());
    let Answer { cookie, outcome } = client.next(&mut input).unwrap().unwrap();
    let failure = outcome.unwrap_err();
    assert_eq!((cookie, failure.errno, &failure.message[..]), (Cookie(2), Errno::Io, "bad"));
}
