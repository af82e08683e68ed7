//! [`Span`]: bytes that can be sent from where they lie, without being read first.
//!
//! Where that is, only the host knows that lends them. Made by a storage ([`crate::storage::Storage::span`]), used up by
//! whoever sends it.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use crate::convert::u64_from;

/// A run of bytes of something that the host can send from, such as a file.
///
/// It is what lies there when it is sent, or a little later: a kernel lends the receiver its pages. So whoever has asked
/// for a read may be given what was written before the last byte has reached him, as with any read that a write runs
/// beside.
#[derive(Clone)]
pub struct Span {
    place: Arc<dyn Any + Send + Sync>,
    offset: u64,
    len: usize,
}

impl Span {
    /// The `len` bytes of `place` from `offset` on.
    #[must_use]
    pub fn new(place: Arc<dyn Any + Send + Sync>, offset: u64, len: usize) -> Self {
        Self { place, offset, len }
    }

    /// What it is a run of, for the host that has lent it.
    #[must_use]
    pub fn place<T: 'static>(&self) -> Option<&T> {
        self.place.downcast_ref()
    }

    /// Where it begins there.
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

    /// The `len` bytes of it from `from` on, or as many as there are.
    #[must_use]
    pub fn slice(&self, from: usize, len: usize) -> Self {
        let mut part = self.clone();
        part.advance(from);
        part.len = part.len.min(len);
        part
    }

    /// Takes its first `count` bytes off, all of them if it has no more.
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.len);
        self.offset += u64_from(count);
        self.len -= count;
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({} bytes at {})", self.len, self.offset)
    }
}
