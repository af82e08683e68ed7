//! Tests of the NBD wire format: tables for each option and command, conversations of our client with our
//! server, and any bytes cut at any place.

mod cuts;
mod endless;
mod extended;
mod handshake;
mod replies;
mod requests;
mod round_trip;
mod spans;
mod start_tls;

pub(in crate::nbd) use round_trip::Disk;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::context::Context;
use super::handshake::{Agreed, Handshake, Offers, Step};
use super::reply::Replies;
use super::request::{Command, Parsed, Requests};
use super::wire::{OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC};
use super::{Access, BlockSizes, Offer, ReplyStyle, Terms, Violation};
use crate::buffer::BufferPool;

pub(super) const SIZE: u64 = 64 << 20;

pub(in crate::nbd) fn offer(name: &str) -> Offer {
    Offer {
        name: name.to_owned(),
        description: format!("disk {name}"),
        size: SIZE,
        access: Access::Writable,
        block_sizes: BlockSizes::DEFAULT,
        is_default: false,
        contexts: vec![Context::Allocation, Context::Depth, Context::Bitmap("b0".to_owned())],
    }
}

pub(in crate::nbd) fn terms(replies: ReplyStyle) -> Terms {
    Terms {
        size: SIZE,
        access: Access::Writable,
        block_sizes: BlockSizes::DEFAULT,
        replies,
        allocation: replies.has_chunks().then_some(1),
    }
}

/// The bytes of an option.
pub(in crate::nbd) fn option_bytes(option: u32, data: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u64(OPTION_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(data.len().try_into().unwrap());
    bytes.put_slice(data);
    bytes
}

/// A length and a string.
pub(in crate::nbd) fn string_bytes(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The data of `INFO` and `GO`.
pub(in crate::nbd) fn query_bytes(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut bytes = string_bytes(name);
    bytes.put_u16(infos.len().try_into().unwrap());
    infos.iter().for_each(|info| bytes.put_u16(*info));
    bytes
}

/// The data of the context options.
pub(in crate::nbd) fn context_bytes(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = string_bytes(name);
    bytes.put_u32(queries.len().try_into().unwrap());
    queries.iter().for_each(|query| bytes.extend(string_bytes(query)));
    bytes
}

/// The bytes of a request; a payload is the caller's.
pub(in crate::nbd) fn request_bytes(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u32(REQUEST_MAGIC);
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u64(offset);
    bytes.put_u32(len);
    bytes
}

/// A handshake that is past the greeting, and what it has said since.
pub(super) struct Server<'a> {
    pub(super) handshake: Handshake,
    pub(super) offers: Offers<'a>,
    pub(super) output: BytesMut,
}

impl<'a> Server<'a> {
    pub(in crate::nbd) fn new(exports: &'a [Offer]) -> Self {
        let mut output = BytesMut::new();
        let mut handshake = Handshake::new(&mut output);
        output.clear();
        let offers = Offers { exports, shutting_down: false };
        let mut flags = Bytes::copy_from_slice(&3_u32.to_be_bytes());
        assert_eq!(handshake.step(&mut flags, offers, &mut output), Ok(Step::Answered));
        Self { handshake, offers, output }
    }

    pub(in crate::nbd) fn send(&mut self, option: u32, data: &[u8]) -> Result<Step, Violation> {
        self.handshake.step(&mut option_bytes(option, data).freeze(), self.offers, &mut self.output)
    }

    /// Sends an option; answers the types and data of the replies.
    pub(in crate::nbd) fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(option, data).unwrap();
        self.replies(option)
    }

    pub(in crate::nbd) fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        while !self.output.is_empty() {
            assert_eq!(self.output.get_u64(), OPTION_REPLY_MAGIC);
            assert_eq!(self.output.get_u32(), option);
            let kind = self.output.get_u32();
            let len = self.output.get_u32().try_into().unwrap();
            replies.push((kind, self.output.split_to(len).to_vec()));
        }
        replies
    }

    pub(in crate::nbd) fn go(&mut self, name: &str) -> Agreed {
        match self.send(super::wire::opt::GO, &query_bytes(name, &[])) {
            Ok(Step::Agreed(agreed)) => agreed,
            other => panic!("no agreement but {other:?}"),
        }
    }
}

/// A parser and its replies.
pub(in crate::nbd) fn requests(terms: Terms) -> (Requests, Replies) {
    let replies = Replies::new(&terms);
    let contexts = terms.allocation.as_slice();
    (Requests::new(terms, contexts, BufferPool::new(1 << 20, 2), replies.clone()), replies)
}

/// All that waits to be sent.
pub(in crate::nbd) fn drain(replies: &Replies) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !replies.is_empty() {
        let count = replies.show(|slices| {
            slices.iter().for_each(|slice| bytes.extend_from_slice(slice));
            slices.iter().map(|slice| slice.len()).sum()
        });
        replies.sent(count);
    }
    bytes
}

/// Appends what was received.
pub(in crate::nbd) fn receive(input: &mut Bytes, piece: &[u8]) {
    *input = [&input[..], piece].concat().into();
}

/// The one request in `bytes`, paid with success.
pub(in crate::nbd) fn parse_one(terms: Terms, bytes: &[u8]) -> Command {
    let (mut requests, replies) = requests(terms);
    let mut input = Bytes::copy_from_slice(bytes);
    match requests.next(&mut input, u64::MAX) {
        Ok(Parsed::Request(request)) => {
            request.reply.done();
            replies.clear();
            request.command
        }
        other => panic!("no request but {other:?}"),
    }
}
