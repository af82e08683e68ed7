//! Any bytes, cut at any place.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::round_trip::Disk;
use super::*;
use crate::buffer::Buffer;
use crate::limits::NBD_OWN_BUFFER_MIN;
use crate::nbd::client::{Allocation, Found, Negotiation, Wish};
use crate::nbd::client_reply::Conversation;
use crate::nbd::client_request::Ask;
use crate::nbd::request::{ExtentsWanted, INPUT_MAX};
use crate::nbd::wire::{cmd, info, opt};
use crate::range::ByteRange;

/// What a server says to a client that sends `pieces` one after the other, up to the end.
fn handshake_of(pieces: &[&[u8]]) -> (Vec<u8>, Result<Step, Violation>) {
    let exports = [offer("a"), Offer { is_default: true, ..offer("b") }];
    let offers = Offers { exports: &exports, shutting_down: false };
    let mut output = BytesMut::new();
    let mut handshake = Handshake::new(&mut output);
    let mut input = Bytes::new();
    let mut last = Ok(Step::Incomplete);
    for piece in pieces {
        receive(&mut input, piece);
        loop {
            last = handshake.step(&mut input, offers, &mut output);
            match last {
                Ok(Step::Answered) => {}
                Ok(Step::Incomplete) => break,
                _ => return (output.to_vec(), last),
            }
        }
    }
    (output.to_vec(), last)
}

/// What a server answers to a client that sends `pieces`; with `direct`, long payloads go straight into their
/// buffers. `None` for what comes after a violation.
fn transmission_of(terms: Terms, pieces: &[&[u8]], direct: bool) -> (Vec<u8>, Option<Violation>, Vec<u8>) {
    let (mut requests, replies) = requests(terms);
    let mut disk = Disk(vec![0; terms.size.try_into().unwrap()]);
    let mut input = Bytes::new();
    let mut sent = Vec::new();
    for piece in pieces {
        let mut piece = *piece;
        while direct && input.is_empty() && !piece.is_empty() {
            let Some(room) = requests.payload_room() else { break };
            let now = room.len().min(piece.len());
            room[..now].copy_from_slice(&piece[..now]);
            requests.payload_received(now);
            piece = &piece[now..];
        }
        receive(&mut input, piece);
        loop {
            match requests.next(&mut input, u64::MAX) {
                Ok(Parsed::Request(request)) => disk.carry_out(request),
                Ok(Parsed::Refused(_)) => {}
                Ok(Parsed::Incomplete) => break,
                Ok(Parsed::Disconnect) => {
                    sent.extend(drain(&replies));
                    return (sent, None, disk.0);
                }
                Ok(Parsed::NoRoom) => panic!("there is room without end"),
                Err(violation) => return (drain(&replies), Some(violation), disk.0),
            }
        }
        assert!(input.len() < INPUT_MAX);
        sent.extend(drain(&replies));
    }
    (sent, None, disk.0)
}

fn valid_handshake() -> Vec<u8> {
    let parts = [
        BytesMut::from(&3_u32.to_be_bytes()[..]),
        option_bytes(opt::LIST, &[]),
        option_bytes(99, b"what"),
        option_bytes(opt::STRUCTURED_REPLY, &[]),
        option_bytes(opt::SET_META_CONTEXT, &context_bytes("a", &["base:allocation"])),
        option_bytes(opt::INFO, &query_bytes("c", &[])),
        option_bytes(opt::GO, &query_bytes("a", &[info::BLOCK_SIZE])),
    ];
    parts.concat()
}

fn valid_transmission() -> Vec<u8> {
    let long = u32::try_from(NBD_OWN_BUFFER_MIN).unwrap() + 100;
    let mut parts = vec![
        request_bytes(cmd::WRITE, 0, 1, 0, 1000),
        BytesMut::from(&[7; 1000][..]),
        request_bytes(cmd::READ, 0, 2, 500, 1000),
        request_bytes(cmd::WRITE, 0, 3, 1 << 16, 300),
        BytesMut::from(&[8; 300][..]),
        request_bytes(cmd::WRITE, 0, 4, 100, long),
    ];
    parts.push((0..long).map(|i| u8::try_from(i % 253).unwrap()).collect());
    parts.push(request_bytes(77, 0, 5, 0, 0));
    parts.push(request_bytes(cmd::FLUSH, 0, 6, 0, 0));
    parts.push(request_bytes(cmd::BLOCK_STATUS, 0, 7, 0, 4096));
    parts.push(request_bytes(cmd::WRITE_ZEROES, 0, 8, 50, 100));
    parts.push(request_bytes(cmd::DISC, 0, 9, 0, 0));
    parts.concat()
}

#[test]
fn a_handshake_cut_at_any_byte_is_the_same() {
    let bytes = valid_handshake();
    let whole = handshake_of(&[&bytes]);
    assert!(matches!(whole.1, Ok(Step::Agreed(_))), "{:?}", whole.1);
    for at in 0..=bytes.len() {
        assert_eq!(handshake_of(&[&bytes[..at], &bytes[at..]]), whole, "cut at {at}");
    }
    let bytewise: Vec<_> = bytes.chunks(1).collect();
    assert_eq!(handshake_of(&bytewise), whole);
}

#[test]
fn a_transmission_cut_at_any_byte_is_the_same() {
    let small = Terms { size: 1 << 16, ..terms(ReplyStyle::Structured) };
    let bytes = valid_transmission();
    let whole = transmission_of(small, &[&bytes], false);
    assert_eq!(whole.1, None);
    for at in (0..=bytes.len()).filter(|at| *at < 2600 || *at % 97 == 0 || *at + 300 > bytes.len()) {
        let cut = transmission_of(small, &[&bytes[..at], &bytes[at..]], at % 2 == 0);
        assert!(cut == whole, "cut at {at}");
    }
    let bytewise: Vec<_> = bytes.chunks(1).collect();
    assert!(transmission_of(small, &bytewise, true) == whole);
}

fn cut<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

/// Bytes that look like the protocol more often than chance would have it.
fn likely(words: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        4 => prop::sample::select(words).prop_map(<[u8]>::to_vec),
        2 => prop::collection::vec(any::<u8>(), 0..12),
        1 => prop::collection::vec(Just(0_u8), 0..40),
    ];
    prop::collection::vec(word, 0..20).prop_map(|words| words.concat())
}

const HANDSHAKE_WORDS: &[&[u8]] = &[
    &[0, 0, 0, 3],
    b"IHAVEOPT\0\0\0\x01\0\0\0\x01a",
    b"IHAVEOPT\0\0\0\x03\0\0\0\0",
    b"IHAVEOPT\0\0\0\x06\0\0\0\x07\0\0\0\x01a\0\0",
    b"IHAVEOPT\0\0\0\x07",
    b"IHAVEOPT\0\0\0\x08\0\0\0\0",
    b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation",
    b"IHAVEOPT\0\0\0\x0b\0\0\0\0",
    b"IHAVEOPT\0\0\0\x63\0\x01\0\x01",
];

const REQUEST_WORDS: &[&[u8]] = &[
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 64],
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 8],
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xf0, 8],
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 20],
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 9, 0],
    &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0],
    &[0x25, 0x60, 0x95, 0x13],
    &extended(0, 0, 64),
    &extended(0x20, 1, 8),
    &extended(0, 1, 8),
    &extended(0x20, 7, 12),
    &extended(0, 7, 12),
    &extended(0x20, 6, 40),
    &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    &[0x21, 0xe4, 0x1c, 0x71],
];

/// The header of an extended request for a little at 512.
const fn extended(flags: u8, kind: u8, len: u8) -> [u8; 32] {
    [
        0x21, 0xe4, 0x1c, 0x71, 0, flags, 0, kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0,
        0, 0, 0, 0, len,
    ]
}

const ANSWER_WORDS: &[&[u8]] = &[
    &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 2],
    &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 72, 0, 0, 0, 0, 0, 0, 0, 0],
    &[0x66, 0x8e, 0x33, 0xef, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0],
    &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 12, 0, 0, 0, 1],
    &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 0, 2],
    &[0, 0, 0, 64],
];

const OFFER_WORDS: &[&[u8]] = &[
    b"NBDMAGICIHAVEOPT\0\x03",
    b"NBDMAGICIHAVEOPT\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x05base:allocation",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x01\0\0\0\x01",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0e\0\x03",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
];

fn found(replies: ReplyStyle) -> Found {
    Found { terms: terms(replies), flags: !2, description: String::new() }
}

proptest! {
    #[test]
    fn no_bytes_bring_the_handshake_down(
        bytes in likely(HANDSHAKE_WORDS),
        flags in prop::bool::weighted(0.9),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let bytes = if flags { [vec![0, 0, 0, 3], bytes].concat() } else { bytes };
        let whole = handshake_of(&[&bytes]);
        prop_assert_eq!(handshake_of(&cut(&bytes, &cuts)), whole);
    }

    #[test]
    fn no_bytes_bring_the_transmission_down(
        bytes in likely(REQUEST_WORDS),
        style in 0..3_usize,
        direct in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let style = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended][style];
        let small = Terms { size: 1 << 16, ..terms(style) };
        let whole = transmission_of(small, &[&bytes], false);
        let pieces = transmission_of(small, &cut(&bytes, &cuts), direct);
        prop_assert_eq!(&pieces.1, &whole.1);
        // After a violation, what was answered before may have been sent or not.
        prop_assert!(whole.1.is_some() || pieces == whole);
    }

    #[test]
    fn no_bytes_bring_the_clients_negotiation_down(
        bytes in likely(OFFER_WORDS),
        greeted in prop::bool::weighted(0.9),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let greeting = if greeted { OFFER_WORDS[0].to_vec() } else { Vec::new() };
        let bytes = [greeting, bytes].concat();
        let talk = |pieces: &[&[u8]]| {
            let allocation = Allocation::Wanted;
            let wish = Wish { export: "a".to_owned(), replies: ReplyStyle::Structured, allocation };
            let (mut client, mut input, mut output) = (Negotiation::new(wish), BytesMut::new(), BytesMut::new());
            for piece in pieces {
                input.extend_from_slice(piece);
                match client.step(&mut input, &mut output) {
                    Ok(None) => {}
                    other => return (other, output),
                }
            }
            (Ok(None), output)
        };
        prop_assert_eq!(talk(&cut(&bytes, &cuts)), talk(&[&bytes]));
    }

    #[test]
    fn no_bytes_bring_the_clients_conversation_down(
        bytes in likely(ANSWER_WORDS),
        structured in any::<bool>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let style = if structured { ReplyStyle::Structured } else { ReplyStyle::Simple };
        let talk = |pieces: &[&[u8]]| {
            let mut client = Conversation::new(&found(style));
            let mut output = BytesMut::new();
            client.ask(Ask::Read { offset: 0, buffer: Buffer::zeroed(64) }, &mut output).unwrap();
            client.ask(Ask::Flush, &mut output).unwrap();
            let range = ByteRange::from_bounds(0, 4096);
            let _ = client.ask(Ask::BlockStatus { range, extents: ExtentsWanted::Many }, &mut output);
            let (mut input, mut answers) = (BytesMut::new(), Vec::new());
            for piece in pieces {
                let mut piece = *piece;
                while let Some(room) = client.payload_room().filter(|_| input.is_empty() && !piece.is_empty()) {
                    let now = room.len().min(piece.len());
                    room[..now].copy_from_slice(&piece[..now]);
                    client.payload_received(now);
                    piece = &piece[now..];
                }
                input.extend_from_slice(piece);
                loop {
                    match client.next(&mut input) {
                        Ok(Some(answer)) => answers.push(format!("{answer:?}")),
                        Ok(None) => break,
                        Err(violation) => {
                            answers.push(violation.to_string());
                            return answers;
                        }
                    }
                }
            }
            answers
        };
        prop_assert_eq!(talk(&cut(&bytes, &cuts)), talk(&[&bytes]));
    }
}
