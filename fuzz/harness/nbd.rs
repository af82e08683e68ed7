//! What the NBD fuzz targets do with their bytes. Also built into a test of `heliostat-block`, which replays
//! the committed corpus.
#![allow(dead_code, reason = "each target uses one of the two")]

use bytes::{Bytes, BytesMut};
use heliostat_block::buffer::{Buffer, BufferPool};
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, Wish};
use heliostat_block::nbd::client_reply::Conversation;
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::nbd::context::{Context, Described};
use heliostat_block::nbd::handshake::{Handshake, Offers, Step, TlsPolicy};
use heliostat_block::nbd::reply::Replies;
use heliostat_block::nbd::request::{Command, ExtentsWanted, INPUT_MAX, Parsed, Request, Requests};
use heliostat_block::nbd::{Access, BlockSizes, Offer, ReplyStyle, Terms};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Extent, ExtentStatus};

const SIZE: u64 = 1 << 16;

fn offer(name: &str, access: Access) -> Offer {
    Offer {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: SIZE,
        access,
        block_sizes: BlockSizes::DEFAULT,
        is_default: name == "b",
        contexts: vec![Context::Allocation, Context::Depth, Context::Bitmap("m".to_owned())],
    }
}

/// The bytes as they arrive: in pieces of `step` bytes, or all at once for 0.
fn pieces(step: u8, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(if step == 0 { usize::MAX } else { usize::from(step) })
}

/// Any bytes as either side of a handshake. The first one says in pieces of what length the rest arrives.
pub fn handshake(data: &[u8]) {
    let Some((&step, data)) = data.split_first() else { return };
    serve_handshake(step, data);
    let wish =
        Wish { export: "a".to_owned(), replies: ReplyStyle::Structured, allocation: Allocation::Wanted };
    let (mut client, mut input, mut output) = (Negotiation::new(wish), BytesMut::new(), BytesMut::new());
    for piece in pieces(step, data) {
        input.extend_from_slice(piece);
        if !matches!(client.step(&mut input, &mut output), Ok(None)) {
            break;
        }
    }
    assert!(output.len() < 4096, "a client says little");
}

fn serve_handshake(step: u8, data: &[u8]) {
    let exports = [offer("a", Access::Writable), offer("b", Access::ReadOnly)];
    let (mut input, mut output) = (Bytes::new(), BytesMut::new());
    let policy = [TlsPolicy::None, TlsPolicy::Optional, TlsPolicy::Required][usize::from(step % 3)];
    let mut handshake = Handshake::new(&mut output).with_tls(policy);
    for (index, piece) in pieces(step, data).enumerate() {
        let offers = Offers { exports: &exports, shutting_down: index > 200 };
        input = [&input[..], piece].concat().into();
        loop {
            output.clear();
            let before = input.len();
            match handshake.step(&mut input, offers, &mut output) {
                Ok(Step::Answered) => assert!(input.len() < before, "an answer to nothing"),
                // As if it went on inside.
                Ok(Step::StartTls) => assert!(input.is_empty() && policy != TlsPolicy::None),
                Ok(Step::Incomplete) => break,
                Ok(Step::Agreed(agreed)) => {
                    assert_eq!(agreed.terms.size, SIZE);
                    assert!(agreed.contexts.is_empty() || agreed.terms.replies.has_chunks());
                    assert_eq!(agreed.terms.allocation.is_some(), agreed.contexts.contains(&1));
                    return;
                }
                Ok(Step::Aborted) => return,
                Err(_) => {
                    assert!(output.is_empty(), "something was said after a violation");
                    return;
                }
            }
        }
    }
}

/// Any bytes as either side of the transmission phase. The first one says in pieces of what length the rest
/// arrives, the second under which terms.
pub fn request(data: &[u8]) {
    let Some((&[step, style], data)) = data.split_first_chunk() else { return };
    let replies = match style & 9 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    };
    let terms = Terms {
        size: SIZE,
        access: if style & 2 == 0 { Access::Writable } else { Access::ReadOnly },
        block_sizes: if style & 4 == 0 { BlockSizes::DEFAULT } else { BlockSizes::new(512, 4096, 1 << 20) },
        replies,
        allocation: replies.has_chunks().then_some(1),
    };
    serve_requests(step, data, terms);
    converse(step, data, terms);
}

fn serve_requests(step: u8, data: &[u8], terms: Terms) {
    let replies = Replies::new(&terms);
    let contexts: &[u32] = if terms.allocation.is_some() { &[1, 2, 3] } else { &[] };
    let mut requests = Requests::new(terms, contexts, BufferPool::new(1 << 20, 4), replies.clone());
    let mut input = Bytes::new();
    for mut piece in pieces(step, data) {
        while input.is_empty() && !piece.is_empty() {
            let Some(room) = requests.payload_room() else { break };
            let now = room.len().min(piece.len());
            room[..now].copy_from_slice(&piece[..now]);
            requests.payload_received(now);
            piece = &piece[now..];
        }
        input = [&input[..], piece].concat().into();
        loop {
            let before = replies.len();
            match requests.next(&mut input, u64::MAX) {
                Ok(Parsed::Request(request)) => carry_out(request, terms),
                Ok(Parsed::Refused(_)) => {}
                Ok(Parsed::Incomplete) => break,
                Ok(Parsed::Disconnect) => return,
                Ok(Parsed::NoRoom) => panic!("there is room without end"),
                Err(_) => return,
            }
            assert!(replies.len() > before, "a request was not answered");
        }
        assert!(input.len() < INPUT_MAX, "too much is kept");
        replies.clear();
    }
}

fn carry_out(request: Request, terms: Terms) {
    let Request { command, reply } = request;
    let check = |range: ByteRange| assert!(range.end() <= terms.size, "beyond the end");
    match command {
        Command::Read { range, .. } => {
            check(range);
            reply.data(range.offset(), Buffer::zeroed(range.len().try_into().expect("64 bits")));
        }
        Command::Write { offset, data, .. } => {
            check(ByteRange::new(offset, data.len().try_into().expect("64 bits")).expect("checked"));
            assert_eq!(terms.access, Access::Writable);
            reply.done();
        }
        Command::WriteZeroes { range, .. } | Command::Trim { range, .. } => {
            check(range);
            assert_eq!(terms.access, Access::Writable);
            reply.done();
        }
        Command::Flush => reply.done(),
        Command::Cache { range } => {
            check(range);
            reply.done();
        }
        Command::BlockStatus { range, extents, contexts } => {
            check(range);
            assert!(!contexts.is_empty() && contexts.len() <= 3);
            let hole = Described::allocation(Extent { range, status: ExtentStatus::Hole });
            let said: Vec<_> = contexts.iter().map(|id| (*id, vec![hole])).collect();
            reply.status(range, extents, &said);
        }
    }
}

fn converse(step: u8, data: &[u8], terms: Terms) {
    let mut client = Conversation::new(&Found { terms, flags: !2, description: String::new() });
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let range = ByteRange::from_bounds(0, 4096);
    let asks = [
        Ask::Read { offset: 0, buffer: Buffer::zeroed(4096) },
        Ask::Flush,
        Ask::BlockStatus { range, extents: ExtentsWanted::Many },
        Ask::Read { offset: 8192, buffer: Buffer::zeroed(512) },
    ];
    for ask in asks {
        let _ = client.ask(ask, &mut output);
    }
    for piece in pieces(step, data) {
        input.extend_from_slice(piece);
        while let Ok(answer) = client.next(&mut input) {
            if answer.is_none() {
                break;
            }
        }
    }
}
