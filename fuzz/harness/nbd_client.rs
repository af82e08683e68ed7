//! What the fuzz targets of the NBD client do with their bytes. Also built into a test of `heliostat-block`, which
//! replays the committed corpus.
#![allow(dead_code, reason = "each target uses one of the two")]

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use heliostat_block::buffer::Buffer;
use heliostat_block::clock::Moment;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, Wish};
use heliostat_block::nbd::client_reply::Answered;
use heliostat_block::nbd::link::{Link, LinkSettings, Ticket, Wanted};
use heliostat_block::nbd::{Access, BlockSizes, ReplyStyle, Terms};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};

const SIZE: u64 = 1 << 16;
const STATUS: ByteRange = ByteRange::from_bounds(512, 8192);

fn style(number: u8) -> ReplyStyle {
    match number % 3 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    }
}

/// The bytes as they arrive: in pieces of `step` bytes, or all at once for 0.
fn pieces(step: u8, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(if step == 0 { usize::MAX } else { usize::from(step) })
}

/// Any bytes as a server's part of the handshake. The first one says in pieces of what length the rest arrives, the
/// second what the client wants.
pub fn handshake(data: &[u8]) {
    let Some((&[step, wishes], data)) = data.split_first_chunk() else { return };
    let allocation = match (wishes >> 2) % 3 {
        0 => Allocation::Wanted,
        1 => Allocation::Unwanted,
        _ => Allocation::Context("qemu:dirty-bitmap:b0".to_owned()),
    };
    let client = Negotiation::new(Wish { export: "a".to_owned(), replies: style(wishes), allocation });
    let wants_tls = wishes & 0x80 != 0;
    let mut client = if wants_tls { client.with_tls() } else { client };
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    for piece in pieces(step, data) {
        input.extend_from_slice(piece);
        match client.step(&mut input, &mut output) {
            Ok(None) => {}
            Ok(Some(found)) => {
                assert!(!client.awaits_tls(), "it agreed before it was private");
                assert!(found.terms.allocation.is_none() || found.terms.replies.has_chunks());
                break;
            }
            Err(_) => break,
        }
        if client.awaits_tls() {
            assert!(wants_tls && input.is_empty());
            assert!(!output.windows(1).any(|byte| byte == b"a"), "the export's name was said in plain text");
            client.tls_reached(&mut output);
        }
        assert!(input.len() <= 128 << 10, "too much is kept");
    }
    assert!(output.len() < 4096, "a client says little");
}

/// Any bytes as a server's answers, on one connection after the other. The first one says in pieces of what length the
/// rest arrives, the second in which style.
pub fn reply(data: &[u8]) {
    let Some((&[step, flags], data)) = data.split_first_chunk() else { return };
    let mut now = Moment::START;
    let settings = LinkSettings {
        reconnect_delay: Duration::from_secs(1),
        connections: 1,
        reads_bitmap: flags & 0x40 != 0,
    };
    let mut link = Link::new(settings, now);
    let mut open = submit(&mut link);
    let mut input = Vec::new();
    connect(&mut link, flags, &mut now);
    for mut piece in pieces(step, data) {
        while input.is_empty() && !piece.is_empty() {
            let Some(room) = link.payload_room(0) else { break };
            let count = room.len().min(piece.len());
            room[..count].copy_from_slice(&piece[..count]);
            link.payload_received(0, count);
            piece = &piece[count..];
        }
        input.extend_from_slice(piece);
        let mut rest = &input[..];
        let understood = link.receive(0, &mut rest);
        let eaten = input.len() - rest.len();
        input.drain(..eaten);
        check_ended(&mut link, &mut open);
        assert!(input.len() <= 128 << 10, "too much is kept");
        if understood.is_err() {
            input.clear();
            link.cut(0, "a violation", now, 0);
            connect(&mut link, flags, &mut now);
            check_ended(&mut link, &mut open);
        }
    }
    // What the server does not offer has ended without a word of it.
    check_ended(&mut link, &mut open);
    assert_eq!(link.in_flight(), open.len(), "a request was forgotten");
}

fn connect(link: &mut Link, flags: u8, now: &mut Moment) {
    let replies = style(flags);
    let terms = Terms {
        size: SIZE,
        access: Access::Writable,
        block_sizes: BlockSizes::DEFAULT,
        replies,
        allocation: replies.has_chunks().then_some(1),
    };
    let line = loop {
        match link.next_to_connect(*now) {
            Some(line) => break line,
            None => *now = link.wakes_at().expect("it will try again"),
        }
        link.hand_out(*now);
    };
    let found = Found { terms, flags: !2, description: String::new() };
    link.connected(line, found, *now, 0).expect("it is the same as before");
    link.hand_out(*now);
    let outbox = link.outbox(line).expect("it is up");
    outbox.sent(outbox.len());
}

fn submit(link: &mut Link) -> BTreeSet<Ticket> {
    let (space, effort, durability) = (ZeroSpace::Keep, ZeroEffort::Any, Durability::Cached);
    let range = ByteRange::from_bounds(0, 4096);
    let all = [
        Wanted::Read { offset: 0, buffer: Buffer::zeroed(4096) },
        Wanted::Flush,
        Wanted::BlockStatus { range: STATUS },
        Wanted::Read { offset: 8192, buffer: Buffer::zeroed(512) },
        Wanted::Write { offset: 5, data: Bytes::from_static(b"hello").into(), durability: Durability::Fua },
        Wanted::WriteZeroes { range, space, effort, durability },
        Wanted::Trim { range },
    ];
    all.into_iter().map(|wanted| link.submit(wanted)).collect()
}

fn check_ended(link: &mut Link, open: &mut BTreeSet<Ticket>) {
    while let Some((ticket, outcome)) = link.next_ended() {
        assert!(open.remove(&ticket), "answered twice");
        match outcome {
            Ok(Answered::Data(buffer)) => assert!([4096, 512].contains(&buffer.len())),
            Ok(Answered::Extents(extents)) => {
                assert!(extents.first().is_some_and(|first| first.range.offset() == STATUS.offset()));
                assert!(extents.windows(2).all(|pair| pair[0].range.end() == pair[1].range.offset()));
                assert!(extents.iter().all(|extent| STATUS.contains(extent.range)));
            }
            _ => {}
        }
    }
}
