//! [`Ask`]: what a client may ask of an NBD server, checked against what the server offered, and its bytes.
//!
//! Called by [`super::client_reply::Conversation`] only; keeps nothing.

use bytes::{BufMut, BytesMut};

use super::request::ExtentsWanted;
use super::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, cmd, cmd_flag, transmission_flag};
use super::{Access, Cookie, ReplyStyle, Terms};
use crate::buffer::Buffer;
use crate::convert::u64_from;
use crate::range::ByteRange;
use crate::storage::{Durability, ZeroEffort, ZeroSpace};

/// What a client may ask.
#[derive(Debug)]
pub enum Ask {
    /// Fill `buffer` from `offset` on.
    Read {
        /// Where.
        offset: u64,
        /// What is to be filled.
        buffer: Buffer,
    },
    /// Write the payload that the caller sends right after the header.
    Write {
        /// Where, and how long the payload is.
        range: ByteRange,
        /// Whether it must be durable when answered.
        durability: Durability,
    },
    /// Make durable what was answered.
    Flush,
    /// The contents are no longer needed.
    Trim {
        /// Where.
        range: ByteRange,
    },
    /// Make it read as zeroes.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// Whether space must stay allocated.
        space: ZeroSpace,
        /// Whether to fail rather than be slow.
        effort: ZeroEffort,
        /// Whether it must be durable when answered.
        durability: Durability,
    },
    /// Say how a range is laid out.
    BlockStatus {
        /// Where.
        range: ByteRange,
        /// How much of it.
        extents: ExtentsWanted,
    },
}

/// Why a request was not sent: the server never offered it, or it breaks what was agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The server does not do this.
    #[error("the server does not offer this request")]
    NotOffered,
    /// Outside the export, misaligned, or longer than one request may be.
    #[error("the request is outside what was agreed with the server")]
    OutsideTerms,
}

/// A request as it stands on the wire, but for its cookie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    flags: u16,
    kind: u16,
    offset: u64,
    len: u64,
    is_extended: bool,
}

impl Ask {
    /// The request's line, if the server offered such a request.
    pub(super) fn line(&self, terms: &Terms, offered: u16) -> Result<Line, AskError> {
        use transmission_flag as flag;
        let none = ByteRange::from_bounds(0, 0);
        let (kind, mut needs, mut flags, range) = match self {
            Self::Read { offset, buffer } => {
                let range =
                    ByteRange::new(*offset, u64_from(buffer.len())).map_err(|_| AskError::OutsideTerms)?;
                (cmd::READ, 0, 0, range)
            }
            Self::Write { range, .. } => (cmd::WRITE, 0, 0, *range),
            Self::Flush => (cmd::FLUSH, flag::SEND_FLUSH, 0, none),
            Self::Trim { range } => (cmd::TRIM, flag::SEND_TRIM, 0, *range),
            Self::WriteZeroes { range, .. } => (cmd::WRITE_ZEROES, flag::SEND_WRITE_ZEROES, 0, *range),
            Self::BlockStatus { range, extents: ExtentsWanted::Many } => (cmd::BLOCK_STATUS, 0, 0, *range),
            Self::BlockStatus { range, extents: ExtentsWanted::One } => {
                (cmd::BLOCK_STATUS, 0, cmd_flag::REQ_ONE, *range)
            }
        };
        if let Self::Write { durability, .. } | Self::WriteZeroes { durability, .. } = self
            && *durability == Durability::Fua
        {
            needs |= flag::SEND_FUA;
            flags |= cmd_flag::FUA;
        }
        if let Self::WriteZeroes { space: ZeroSpace::Keep, .. } = self {
            flags |= cmd_flag::NO_HOLE;
        }
        if let Self::WriteZeroes { effort: ZeroEffort::FastOnly, .. } = self {
            needs |= flag::SEND_FAST_ZERO;
            flags |= cmd_flag::FAST_ZERO;
        }
        let writes = matches!(kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if offered & needs != needs
            || (writes && terms.access == Access::ReadOnly)
            || (kind == cmd::BLOCK_STATUS && terms.allocation.is_none())
        {
            return Err(AskError::NotOffered);
        }
        let has_payload = matches!(kind, cmd::READ | cmd::WRITE);
        if !fits(range, has_payload, terms) {
            return Err(AskError::OutsideTerms);
        }
        let is_extended = terms.replies == ReplyStyle::Extended;
        if !is_extended && u32::try_from(range.len()).is_err() {
            return Err(AskError::OutsideTerms);
        }
        if is_extended && kind == cmd::WRITE {
            flags |= cmd_flag::PAYLOAD_LEN;
        }
        Ok(Line { flags, kind, offset: range.offset(), len: range.len(), is_extended })
    }
}

/// Says whether a request keeps to the size and the size constraints of the export.
fn fits(range: ByteRange, has_payload: bool, terms: &Terms) -> bool {
    let unit = u64::from(terms.block_sizes.minimum());
    let aligned = range.offset().is_multiple_of(unit)
        && (range.len().is_multiple_of(unit) || range.end() == terms.size);
    let payload_fits = !has_payload || range.len() <= u64::from(terms.block_sizes.payload_max());
    aligned && payload_fits && range.end() <= terms.size
}

impl Line {
    /// The goodbye.
    pub(super) fn disconnect(terms: &Terms) -> Self {
        let is_extended = terms.replies == ReplyStyle::Extended;
        Self { flags: 0, kind: cmd::DISC, offset: 0, len: 0, is_extended }
    }

    /// Appends it to `output`.
    pub(super) fn put(self, cookie: Cookie, output: &mut BytesMut) {
        output.put_u32(if self.is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC });
        output.put_u16(self.flags);
        output.put_u16(self.kind);
        output.put_u64(cookie.0);
        output.put_u64(self.offset);
        if self.is_extended {
            output.put_u64(self.len);
        } else {
            output.put_u32(u32::try_from(self.len).expect("checked where the line was made"));
        }
    }
}
