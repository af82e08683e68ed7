//! [`Wanted`]: what somebody wants of a link; [`Request`]: the same while it has no answer, ready to be sent again.

use std::fmt;

use crate::buffer::Buffer;
use crate::convert::u64_from;
use crate::nbd::client_reply::Failure;
use crate::nbd::client_request::{Ask, AskError};
use crate::nbd::outbox::Payload;
use crate::nbd::request::ExtentsWanted;
use crate::range::ByteRange;
use crate::storage::{Durability, ZeroEffort, ZeroSpace};

/// A request of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(super) u64);

/// What somebody wants of a link. Ranges keep to what was negotiated; the caller sees to it.
#[derive(Debug)]
pub enum Wanted {
    /// Fill `buffer` from `offset` on.
    Read {
        /// Where.
        offset: u64,
        /// What is to be filled.
        buffer: Buffer,
    },
    /// Write all of `data` at `offset`.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Payload,
        /// Whether it must be durable when answered.
        durability: Durability,
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
    /// The contents are no longer needed.
    Trim {
        /// Where.
        range: ByteRange,
    },
    /// Make durable what was answered.
    Flush,
    /// Say how a range is laid out.
    BlockStatus {
        /// Where.
        range: ByteRange,
    },
}

/// Why a request got no answer, or a bad one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkError {
    /// The server says that it failed.
    Server(Failure),
    /// The server does not do this; nothing was sent.
    NotOffered,
    /// It is outside of what was negotiated; nothing was sent.
    OutsideTerms,
    /// The server is not reached, for the reason, and was not for as long as requests wait.
    Lost(String),
    /// What answers there is not the export that it was.
    Changed(String),
    /// The link was closed.
    Closed,
}

impl fmt::Display for LinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(failure) if failure.message.is_empty() => {
                write!(f, "the NBD server answered {:?}", failure.errno)
            }
            Self::Server(failure) => {
                write!(f, "the NBD server answered {:?}: {}", failure.errno, failure.message)
            }
            Self::NotOffered => write!(f, "the NBD server does not offer this"),
            Self::OutsideTerms => write!(f, "the request is outside what was agreed with the NBD server"),
            Self::Lost(reason) => write!(f, "the NBD server is not reached: {reason}"),
            Self::Changed(reason) => write!(f, "the NBD server is not what it was: {reason}"),
            Self::Closed => write!(f, "the connection to the NBD server was closed"),
        }
    }
}

impl std::error::Error for LinkError {}

impl From<AskError> for LinkError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::NotOffered => Self::NotOffered,
            AskError::OutsideTerms => Self::OutsideTerms,
        }
    }
}

/// What an answer means for what must be flushed.
pub(super) enum Standing {
    /// Something that only a flush makes durable.
    Change,
    /// A flush, of so many changes.
    Flush {
        /// The changes that had been answered when it was asked for.
        covers: u64,
    },
    /// Nothing.
    Neither,
}

/// A request that was not answered.
#[derive(Debug)]
pub(super) struct Request {
    /// The buffer of a read is empty while a connection has it.
    wanted: Wanted,
    /// Of a read.
    len: usize,
    /// Connections that were lost with it.
    cuts: u32,
    /// Changes that had been answered before it was asked for.
    changes_before: u64,
}

impl Request {
    pub(super) fn new(wanted: Wanted, changes_before: u64) -> Self {
        let len = match &wanted {
            Wanted::Read { buffer, .. } => buffer.len(),
            _ => 0,
        };
        Self { wanted, len, cuts: 0, changes_before }
    }

    /// What is to be said on the wire, and the payload after it.
    pub(super) fn ask(&mut self) -> (Ask, Option<Payload>) {
        match &mut self.wanted {
            Wanted::Read { offset, buffer } => {
                let buffer = std::mem::replace(buffer, Buffer::zeroed(0));
                (Ask::Read { offset: *offset, buffer }, None)
            }
            Wanted::Write { offset, data, durability } => {
                let end = offset.saturating_add(u64_from(data.len()));
                let range = ByteRange::from_bounds(*offset, end);
                (Ask::Write { range, durability: *durability }, Some(data.clone()))
            }
            Wanted::WriteZeroes { range, space, effort, durability } => {
                let (range, space, effort, durability) = (*range, *space, *effort, *durability);
                (Ask::WriteZeroes { range, space, effort, durability }, None)
            }
            Wanted::Trim { range } => (Ask::Trim { range: *range }, None),
            Wanted::Flush => (Ask::Flush, None),
            Wanted::BlockStatus { range } => {
                (Ask::BlockStatus { range: *range, extents: ExtentsWanted::Many }, None)
            }
        }
    }

    /// Takes it back from a connection that was lost. Says how many were.
    pub(super) fn take_back(&mut self, found: Option<Buffer>) -> u32 {
        if let Wanted::Read { buffer, .. } = &mut self.wanted {
            *buffer = found.unwrap_or_else(|| Buffer::zeroed(self.len));
        }
        self.cuts += 1;
        self.cuts
    }

    /// Whether it changes what is stored.
    pub(super) const fn changes_something(&self) -> bool {
        matches!(self.wanted, Wanted::Write { .. } | Wanted::WriteZeroes { .. } | Wanted::Trim { .. })
    }

    pub(super) const fn standing(&self) -> Standing {
        match self.wanted {
            Wanted::Write { durability: Durability::Cached, .. }
            | Wanted::WriteZeroes { durability: Durability::Cached, .. }
            | Wanted::Trim { .. } => Standing::Change,
            Wanted::Flush => Standing::Flush { covers: self.changes_before },
            _ => Standing::Neither,
        }
    }
}
