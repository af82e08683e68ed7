//! [`FileSpan`]: bytes that can be sent from where they lie, in a file of this host, without being read first.
//!
//! Does no I/O itself. Made by a storage ([`crate::storage::Storage::span`]), used up by whoever sends it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A run of bytes of a host's file.
///
/// It is what the file holds when it is sent, or a little later: a kernel lends the receiver its pages. So whoever has
/// asked for a read may be given what was written before the last byte has reached him, as with any read that a write
/// runs beside.
#[derive(Clone)]
pub struct FileSpan {
    file: Arc<dyn AsFd + Send + Sync>,
    offset: u64,
    len: usize,
}

impl FileSpan {
    /// The `len` bytes of `file` from `offset` on.
    #[must_use]
    pub fn new(file: Arc<dyn AsFd + Send + Sync>, offset: u64, len: usize) -> Self {
        Self { file, offset, len }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where in the file it begins.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes its first `count` bytes off, all of them if it has no more.
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.len);
        self.offset += crate::convert::u64_from(count);
        self.len -= count;
    }
}

impl fmt::Debug for FileSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileSpan({} bytes at {})", self.len, self.offset)
    }
}
