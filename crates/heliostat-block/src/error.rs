//! [`BlockError`]: what went wrong on a node, where, and why. [`InvalidGranularity`]: why a bitmap cannot be made.

use std::fmt;
use std::io;

use crate::limits::{BITMAP_GRANULARITY_MAX, GRANULARITY_MIN};
use crate::range::ByteRange;

/// What a failure means to whoever must act on it. Small on purpose: each kind changes somebody's behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong: outside the node, misaligned, too long. Trying again is pointless.
    InvalidRequest,
    /// The node may not be written.
    ReadOnly,
    /// The host has no space left. May pass; the error policy `enospc` stops for it.
    NoSpace,
    /// The storage cannot do this (only for requests that allow such an answer).
    Unsupported,
    /// The node is going away; no request is taken any more.
    Closed,
    /// Any other failure of the host.
    Io,
}

/// What went wrong. Prints as `node "disk0": no space at 0x7f0000+0x10000: No space left on device`.
#[derive(Debug)]
pub struct BlockError {
    kind: ErrorKind,
    node: String,
    range: Option<ByteRange>,
    source: Option<io::Error>,
}

impl BlockError {
    /// Makes an error without a cause below it.
    #[must_use]
    pub fn new(kind: ErrorKind, node: &str, range: Option<ByteRange>) -> Self {
        Self { kind, node: node.to_owned(), range, source: None }
    }

    /// Makes an error from what a storage said.
    #[must_use]
    pub fn from_io(node: &str, range: Option<ByteRange>, source: io::Error) -> Self {
        Self { kind: kind_of(&source), node: node.to_owned(), range, source: Some(source) }
    }

    /// What it means.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where; `None` for a flush.
    #[must_use]
    pub const fn range(&self) -> Option<ByteRange> {
        self.range
    }

    /// Why, in the words of what is below; without the node and the place.
    #[must_use]
    pub fn cause(&self) -> String {
        self.source.as_ref().map_or_else(|| self.to_string(), ToString::to_string)
    }

    /// The host's error number, where one is known.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => ErrorKind::ReadOnly,
        io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::InvalidRequest => "invalid request",
            ErrorKind::ReadOnly => "read-only",
            ErrorKind::NoSpace => "no space",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Closed => "closed",
            ErrorKind::Io => "I/O error",
        };
        write!(f, "node \"{}\": {what}", self.node)?;
        if let Some(range) = self.range {
            write!(f, " at {range}")?;
        }
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for BlockError {
    // The message above already holds the cause, so that one line says everything.
}

/// For a driver that stands on another node: what failed below fails here, with the same number.
impl From<BlockError> for io::Error {
    fn from(error: BlockError) -> Self {
        if let Some(errno) = error.errno() {
            return Self::from_raw_os_error(errno);
        }
        let kind = match error.kind {
            ErrorKind::InvalidRequest => io::ErrorKind::InvalidInput,
            ErrorKind::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            ErrorKind::NoSpace => io::ErrorKind::StorageFull,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::Closed | ErrorKind::Io => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Why a granularity cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGranularity {
    /// Not a power of two, or out of bounds.
    #[error("granularity {0} is not a power of two from {GRANULARITY_MIN} to {BITMAP_GRANULARITY_MAX}")]
    NotAllowed(u32),
    /// There is no memory for so many bits.
    #[error("granularity {granularity} is too fine for {size} bytes: no memory for so large a bitmap")]
    TooFine {
        /// The granularity asked for.
        granularity: u32,
        /// The size of the disk.
        size: u64,
    },
}
