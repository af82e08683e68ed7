//! What a client's options hold, and how replies to options look. Called by the handshake only; keeps nothing.

use std::collections::BTreeSet;

use bytes::{Buf, BufMut, BytesMut};

use super::context::Context;
use super::wire::{OPTION_REPLY_MAGIC, STRING_MAX, info, rep, transmission_flag};
use super::{Access, BlockSizes, Offer, ReplyStyle};

/// The data of an option do not have the form that the document gives it. Answered with `ERR_INVALID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The data of `INFO` and `GO`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ExportQuery {
    pub(super) name: String,
    pub(super) wants_name: bool,
    pub(super) wants_description: bool,
    pub(super) wants_block_size: bool,
}

impl ExportQuery {
    pub(super) fn parse(mut data: &[u8]) -> Result<Self, Malformed> {
        let mut query = Self { name: take_string(&mut data)?, ..Self::default() };
        let count = data.try_get_u16().map_err(|_| Malformed)?;
        for _ in 0..count {
            match data.try_get_u16().map_err(|_| Malformed)? {
                info::NAME => query.wants_name = true,
                info::DESCRIPTION => query.wants_description = true,
                info::BLOCK_SIZE => query.wants_block_size = true,
                // What we do not know must be ignored; INFO_EXPORT is sent anyway.
                _ => {}
            }
        }
        if data.is_empty() { Ok(query) } else { Err(Malformed) }
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ContextQuery {
    pub(super) name: String,
    /// Each once: a client may repeat one as often as an option is long.
    pub(super) queries: BTreeSet<String>,
}

impl ContextQuery {
    pub(super) fn parse(mut data: &[u8]) -> Result<Self, Malformed> {
        let name = take_string(&mut data)?;
        let count = data.try_get_u32().map_err(|_| Malformed)?;
        let mut queries = BTreeSet::new();
        for _ in 0..count {
            queries.insert(take_string(&mut data)?);
        }
        if data.is_empty() { Ok(Self { name, queries }) } else { Err(Malformed) }
    }
}

/// Takes a length and a string of that length off the front.
fn take_string(data: &mut &[u8]) -> Result<String, Malformed> {
    let len = data.try_get_u32().map_err(|_| Malformed)?;
    let len = usize::try_from(len).map_err(|_| Malformed)?;
    let (text, rest) = data.split_at_checked(len).ok_or(Malformed)?;
    *data = rest;
    string(text)
}

/// The string that `bytes` hold under the document's rules: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn string(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > STRING_MAX || bytes.contains(&0) {
        return Err(Malformed);
    }
    str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed)
}

/// Writes one reply to an option: its header, then the parts of its data.
pub(super) fn put_reply(output: &mut BytesMut, option: u32, reply: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    output.put_u64(OPTION_REPLY_MAGIC);
    output.put_u32(option);
    output.put_u32(reply);
    output.put_u32(u32::try_from(len).expect("replies are made of strings of at most 4096 bytes"));
    for part in parts {
        output.put_slice(part);
    }
}

/// Writes an error reply that a person can read.
pub(super) fn put_error(output: &mut BytesMut, option: u32, reply: u32, message: &str) {
    put_reply(output, option, reply, &[message.as_bytes()]);
}

/// Writes the line of a listing for one export.
pub(super) fn put_server(output: &mut BytesMut, option: u32, offer: &Offer) {
    let name_len = u32::try_from(offer.name.len()).expect("a name has at most 4096 bytes");
    let parts = [&name_len.to_be_bytes()[..], offer.name.as_bytes(), offer.description.as_bytes()];
    put_reply(output, option, rep::SERVER, &parts);
}

/// Writes the information about an export that `query` asks for, and what the document wants said unasked.
pub(super) fn put_export(output: &mut BytesMut, option: u32, offer: &Offer, flags: u16, query: &ExportQuery) {
    let (size, flags) = (offer.size.to_be_bytes(), flags.to_be_bytes());
    put_reply(output, option, rep::INFO, &[&info::EXPORT.to_be_bytes(), &size, &flags]);
    if query.wants_name {
        put_reply(output, option, rep::INFO, &[&info::NAME.to_be_bytes(), offer.name.as_bytes()]);
    }
    if query.wants_description && !offer.description.is_empty() {
        let kind = info::DESCRIPTION.to_be_bytes();
        put_reply(output, option, rep::INFO, &[&kind, offer.description.as_bytes()]);
    }
    // Constraints that a client could break unknowingly are said even to one that did not ask. It is not
    // turned away: the document advises against that, and its misaligned requests get EINVAL.
    if query.wants_block_size || offer.block_sizes.is_stricter_than_default() {
        put_block_sizes(output, option, offer.block_sizes);
    }
}

fn put_block_sizes(output: &mut BytesMut, option: u32, sizes: BlockSizes) {
    let kind = info::BLOCK_SIZE.to_be_bytes();
    let [minimum, preferred, payload_max] =
        [sizes.minimum(), sizes.preferred(), sizes.payload_max()].map(u32::to_be_bytes);
    put_reply(output, option, rep::INFO, &[&kind, &minimum, &preferred, &payload_max]);
}

/// Writes one context of a listing, or one that was selected.
pub(super) fn put_context(output: &mut BytesMut, option: u32, id: u32, context: &Context) {
    put_reply(output, option, rep::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()]);
}

/// What this server can do with an export of that kind, of which these contexts were selected.
pub(super) fn transmission_flags(access: Access, replies: ReplyStyle, contexts: &[u32]) -> u16 {
    use transmission_flag as flag;
    // One node stands behind all connections, so a flush on one covers what was answered on any.
    let mut flags =
        flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    flags |= match access {
        Access::ReadOnly => flag::READ_ONLY,
        Access::Writable => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
    };
    if replies.has_chunks() {
        flags |= flag::SEND_DF;
    }
    if replies == ReplyStyle::Extended && !contexts.is_empty() {
        flags |= flag::BLOCK_STATUS_PAYLOAD;
    }
    flags
}
