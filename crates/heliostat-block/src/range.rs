//! [`ByteRange`]: an offset and a length whose sum is known not to overflow.
//!
//! Checked once, where it is made; nobody checks again.

use std::fmt;

/// A range of bytes on a node or a storage. May be empty. `offset + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

/// An offset and a length whose sum does not fit in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("range {offset:#x}+{len:#x} overflows 64 bits")]
pub struct RangeOverflow {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// Makes a range.
    ///
    /// # Errors
    /// [`RangeOverflow`] when `offset + len` exceeds `u64::MAX`.
    pub fn new(offset: u64, len: u64) -> Result<Self, RangeOverflow> {
        match offset.checked_add(len) {
            Some(_) => Ok(Self { offset, len }),
            None => Err(RangeOverflow { offset, len }),
        }
    }

    /// Makes the range from `start` up to, not including, `end`. Empty when `end <= start`.
    #[must_use]
    pub const fn from_bounds(start: u64, end: u64) -> Self {
        Self { offset: start, len: end.saturating_sub(start) }
    }

    /// The first byte.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The byte after the last.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Says whether it holds no byte.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Says whether the two share a byte. An empty range shares none.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end() && self.len > 0 && other.len > 0
    }

    /// Says whether every byte of `other` is in `self`.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        other.len == 0 || (self.offset <= other.offset && other.end() <= self.end())
    }

    /// The bytes in both; `None` when there are none.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::from_bounds(start, end))
    }

    /// Widens both ends to multiples of `unit` (a power of two), but not beyond `limit`.
    #[must_use]
    pub fn widen(self, unit: u64, limit: u64) -> Self {
        debug_assert!(unit.is_power_of_two());
        let start = self.offset & !(unit - 1);
        let end = self.end().checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(limit.max(self.end()));
        Self::from_bounds(start, end)
    }

    /// Says whether both ends are multiples of `unit`.
    #[must_use]
    pub const fn is_aligned(self, unit: u64) -> bool {
        self.offset.is_multiple_of(unit) && self.len.is_multiple_of(unit)
    }

    /// Cuts it into pieces of at most `step` bytes, in order. `step` must not be zero.
    pub fn pieces(self, step: u64) -> impl Iterator<Item = Self> {
        debug_assert!(step > 0);
        let mut start = self.offset;
        let end = self.end();
        std::iter::from_fn(move || {
            (start < end).then(|| {
                let piece = Self::from_bounds(start, end.min(start.saturating_add(step)));
                start = piece.end();
                piece
            })
        })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.len)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    #[test]
    fn a_sum_past_64_bits_is_refused() {
        assert!(ByteRange::new(u64::MAX, 1).is_err());
        assert!(ByteRange::new(u64::MAX, 0).is_ok());
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!range(0, 4).overlaps(range(4, 4)));
        assert!(range(0, 5).overlaps(range(4, 4)));
        assert!(!range(2, 0).overlaps(range(0, 4)));
    }

    #[test]
    fn widening_stops_at_the_limit() {
        assert_eq!(range(5, 1).widen(4, 100), range(4, 4));
        assert_eq!(range(5, 4).widen(4, 10), range(4, 6));
        assert_eq!(range(0, 0).widen(4, 10), range(0, 0));
    }

    #[test]
    fn pieces_cover_the_range_in_order() {
        let pieces: Vec<_> = range(3, 10).pieces(4).collect();
        assert_eq!(pieces, [range(3, 4), range(7, 4), range(11, 2)]);
    }
}
