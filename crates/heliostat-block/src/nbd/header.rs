//! [`Header`]: a request as it stands on the wire, of either length. Called by [`super::request`] only.

use bytes::{Buf, Bytes};

use super::wire::{EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC, REQUEST_LEN, REQUEST_MAGIC, cmd, cmd_flag};
use super::{Cookie, ReplyStyle, Violation};
use crate::convert::{u64_from, usize_from};
use crate::storage::Durability;

/// A request as it stands on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: Cookie,
    pub(super) offset: u64,
    /// How many bytes of the export it is about. With a payload that says so itself, the payload's length.
    pub(super) len: u64,
    /// How many bytes of payload follow it.
    pub(super) payload: u64,
    /// Its own length.
    pub(super) header_len: usize,
}

impl Header {
    /// Reads the header at the front of `input`, once it is all there. Consumes nothing.
    pub(super) fn peek(input: &Bytes, style: ReplyStyle) -> Result<Option<Self>, Violation> {
        let is_extended = style == ReplyStyle::Extended;
        let (header_len, expected) = match is_extended {
            true => (EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC),
            false => (REQUEST_LEN, REQUEST_MAGIC),
        };
        let Some(mut bytes) = input.get(..header_len) else { return Ok(None) };
        let found = bytes.get_u32();
        if found != expected {
            return Err(Violation::Magic { expected: u64::from(expected), found: u64::from(found) });
        }
        let flags = bytes.get_u16();
        let kind = bytes.get_u16();
        let cookie = Cookie(bytes.get_u64());
        let offset = bytes.get_u64();
        let len = if is_extended { bytes.get_u64() } else { u64::from(bytes.get_u32()) };
        // With extended headers every message with a payload is to have the flag. QEMU's client (10.0) sends writes
        // without it, and their data all the same; there is nothing else that such a write could mean.
        let has_payload = kind == cmd::WRITE || is_extended && flags & cmd_flag::PAYLOAD_LEN != 0;
        let payload = if has_payload { len } else { 0 };
        Ok(Some(Self { flags, kind, cookie, offset, len, payload, header_len }))
    }

    pub(super) const fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub(super) const fn durability(self) -> Durability {
        if self.has(cmd_flag::FUA) { Durability::Fua } else { Durability::Cached }
    }

    /// The payload, once all of it is in `input`.
    pub(super) fn payload_in(self, input: &Bytes) -> Option<Bytes> {
        // Compared as 64 bits: a length that nobody could hold is simply not there.
        if u64_from(input.len() - self.header_len) < self.payload {
            return None;
        }
        Some(input.slice(self.header_len..self.header_len + usize_from(self.payload)))
    }
}
