//! [`DirtyBitmap`]: which granules of a disk were written since they were last copied.
//!
//! A node marks it after each write, from any thread; a copier takes dirty granules from it and copies them.
//! It must never lose a mark: a granule that is dirty too often costs a copy, one that is clean too early
//! costs the guest's data. It does no I/O, waits for nothing but its own short lock, and never makes a mark
//! wait for anything.
//!
//! # Layout
//!
//! One bit a granule in the leaves, and above them summaries: one bit for each word below that may be other
//! than zero, up to a single word. The summaries add 1/63 to the leaves' memory. All of it is allocated as
//! zeroes that the system provides at the first touch, so a new bitmap of any size costs next to nothing.
//!
//! # A mark and a copy that run at once
//!
//! A writer writes the disk, then calls `mark`. A copier calls `clear`, then reads the disk. Promised: the
//! copier's read sees the written bytes, or the granule is dirty after both.
//!
//! - Where `mark` sets the bit by `fetch_or`, it and the `fetch_and` of `clear` stand in one order, that of
//!   their word. If the mark comes second, the bit stays set. If it comes first, the clear acquires what it
//!   released: the write happens before the read.
//! - Where `mark` finds the bit set and leaves the word alone, so that writing again to a dirty granule takes
//!   no cache line from other threads, the two threads do this:
//!
//!   ```text
//!   writer:  write the disk    fence    load the bit: set
//!   copier:  clear the bit     fence    read the disk
//!   ```
//!
//!   This is the pattern in which, without fences, each side's load may overtake its own store, on x86 too.
//!   Both fences are `SeqCst` and thus stand in one order. If the writer's comes first, the copier's read
//!   sees the write. If the copier's comes first, the writer's load sees the clear or what came after it: a
//!   bit that it still finds set was set anew, and stays. It does not matter which thread or device wrote,
//!   or read, as long as the write had ended before `mark` and the read starts after `clear`.
//! - `clear` leaves a word alone in which it finds nothing to clear, but fences all the same: another copier
//!   may have cleared the bit, and the promise is for each of them.
//!
//! # The summaries
//!
//! Promised: a granule whose `mark` has returned, and that was not cleared, is found by a scan that starts
//! afterwards, whatever else runs.
//!
//! - `mark` sets the leaf first and then sees to the summaries, from below to the top: it sets each bit that
//!   it does not find set. It does so even where the leaf was set already, because the mark that set the leaf
//!   may not have come to the summaries yet. Those are loads of a few words that seldom change.
//! - `clear` leaves the summaries alone. A set bit above a zero word is harmless; the next scan that comes by
//!   takes it away. Only scans clear summary bits, and they take turns by a lock, so none ever sees another
//!   halfway.
//! - A scan takes a bit away first and looks at the word below afterwards, by a read-modify-write. If the
//!   word is not zero, it puts the bit back. If it is zero, every later mark of that word acquires what this
//!   look released (words are changed by read-modify-writes only, so the chain from one to the next never
//!   breaks): that mark sees the bit gone and sets it. A mark that found the leaf set by another one acquires
//!   the same through it.
//!
//! # The count
//!
//! `mark` adds to the count before it sets bits, and takes back what was set already; `clear` subtracts after
//! it has cleared. So the count is never below the truth, and zero means clean, whatever else runs.
//!
//! All of this is checked by loom in `loom_tests`, with words of two bits, so that a handful of granules has
//! summaries of summaries: a writer beside a copier in all interleavings, larger cases up to a bound.

#[cfg(loom)]
pub(crate) mod loom_atomic;
#[cfg(test)]
#[cfg(loom)]
mod loom_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

use std::fmt;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, fence};
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};
use std::sync::{PoisonError, atomic::Ordering};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard, atomic::fence};

#[cfg(loom)]
use self::loom_atomic::AtomicU64;

use crate::convert::{u64_from, usize_from};
pub use crate::error::InvalidGranularity;
use crate::limits::{BITMAP_GRANULARITY_MAX, GRANULARITY_MIN};
use crate::range::ByteRange;

/// Two to this are the bits of a word in use: all 64, or two where loom walks through every interleaving.
const WORD_SHIFT: u32 = if cfg!(loom) { 1 } else { 6 };
/// The bits of a word in use.
const WORD_BITS: usize = 1 << WORD_SHIFT;
/// A word with every bit in use set.
const WORD_FULL: u64 = u64::MAX >> (64 - WORD_BITS);

/// Up to this many words, looking at each is quicker than taking the lock and going by the summaries: what one
/// summary word stands for.
const WALK_WORDS_MAX: usize = WORD_BITS;

/// Which granules of a disk are dirty. Shared by threads; what runs at once is settled in the head of this
/// file.
pub struct DirtyBitmap {
    size: u64,
    granule_shift: u32,
    /// The number of granules; the last may be partial.
    granules: usize,
    /// The bytes by which the last granule reaches beyond the size.
    excess: u64,
    /// `levels[0]` are the leaves, a bit a granule; a bit of `levels[n + 1]` stands for a word of `levels[n]`.
    /// The last level is one word; there is no level at all for a disk without a byte.
    levels: Vec<Vec<AtomicU64>>,
    /// Held by a [`Scan`]. Protects the summaries from being cleared by two, or while one looks.
    scan: Mutex<()>,
    dirty_bytes: OwnLine,
}

/// A counter on cache lines of its own (two: processors fetch them in pairs). Every mark of a clean granule
/// writes it, and every mark reads what stands beside it.
#[repr(align(128))]
struct OwnLine(AtomicU64);

impl DirtyBitmap {
    /// Makes a bitmap with nothing dirty, for a disk of `size` bytes. The last granule may be partial; a size
    /// of 0 is fine. Memory is `size / granularity / 8` bytes and 1/63 of that on top, taken from the system
    /// as it is touched.
    ///
    /// # Errors
    /// [`InvalidGranularity`] when `granularity` is not a power of two from 512 to 2 GiB, or when there is
    /// no memory for so many bits.
    pub fn new(size: u64, granularity: u32) -> Result<Self, InvalidGranularity> {
        if !granularity.is_power_of_two()
            || !(GRANULARITY_MIN..=BITMAP_GRANULARITY_MAX).contains(&granularity)
        {
            return Err(InvalidGranularity::NotAllowed(granularity));
        }
        let granule_shift = granularity.trailing_zeros();
        let granules = size.div_ceil(u64::from(granularity));
        let excess = size.wrapping_neg() & (u64::from(granularity) - 1);
        let granules = usize_from(granules);
        let levels = zeroed_levels(granules).ok_or(InvalidGranularity::TooFine { granularity, size })?;
        Ok(Self {
            size,
            granule_shift,
            granules,
            excess,
            levels,
            scan: Mutex::new(()),
            dirty_bytes: OwnLine(AtomicU64::new(0)),
        })
    }

    /// The size of the disk in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The bytes of a granule.
    #[must_use]
    pub const fn granularity(&self) -> u32 {
        1 << self.granule_shift
    }

    /// Makes every granule that `range` touches dirty. What lies beyond the size is ignored; an empty range
    /// touches nothing.
    ///
    /// Called when a write has ended. From any thread; never waits. On a granule that is dirty already it
    /// writes nothing.
    pub fn mark(&self, range: ByteRange) {
        let Some(span) = self.span(range) else { return };
        for (word, mask) in span.words() {
            self.mark_leaf(word, mask);
        }
        self.mark_summaries(span.above());
    }

    /// Makes every granule that `range` touches clean, also where it touches only a part. Clipped as for
    /// [`DirtyBitmap::mark`]. What is read from the disk after this call is new enough: a write that it
    /// misses leaves its granules dirty.
    pub fn clear(&self, range: ByteRange) {
        self.take(range);
    }

    /// Does what [`DirtyBitmap::clear`] does, and says how many bytes became clean by it. Of two that run at
    /// once, one is told of each granule.
    pub fn take(&self, range: ByteRange) -> u64 {
        let mut taken = 0;
        if let Some(span) = self.span(range) {
            self.for_each_dirty_word(span, |word, mask| taken += self.take_leaf(word, mask));
        }
        // The copier's half of the promise in the head of this file; `mark_leaf` has the writer's.
        fence(Ordering::SeqCst);
        taken
    }

    /// Says whether any granule that `range` touches is dirty.
    #[must_use]
    pub fn is_dirty(&self, range: ByteRange) -> bool {
        let Some(span) = self.span(range) else { return false };
        if span.is_short() {
            return span.words().any(|(word, mask)| self.levels[0][word].load(Ordering::Acquire) & mask != 0);
        }
        self.scan().find(span.first).is_some_and(|granule| granule <= span.last)
    }

    /// Says whether nothing is dirty. Exact when nothing runs beside it; otherwise it may still say no for a
    /// moment after the last granule became clean, but never yes while a granule is dirty whose `mark` has
    /// returned.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dirty_bytes.0.load(Ordering::Relaxed) == 0
    }

    /// The bytes that are dirty, counting of the last granule only what the disk has. Costs one load. Exact
    /// when nothing runs beside it; otherwise it may be more than the truth for a moment, never less than
    /// what marks that have returned made dirty.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes.0.load(Ordering::Relaxed).min(self.size)
    }

    /// Finds the first run of dirty granules at or after `from`, which is rounded down to its granule. The
    /// answer is at most `max_len` bytes long (rounded down to granules, but at least one granule), starts at
    /// a granule, and ends at one or at the size. `None` when nothing is dirty from there on.
    ///
    /// Finds every granule whose `mark` had returned before the call, unless it was cleared.
    #[must_use]
    pub fn next_dirty(&self, from: u64, max_len: u64) -> Option<ByteRange> {
        if from >= self.size {
            return None;
        }
        let first = self.scan().find(usize_from(from >> self.granule_shift))?;
        let len_max = usize_from(max_len >> self.granule_shift).max(1);
        let end = self.run_end(first, first.saturating_add(len_max).min(self.granules));
        Some(ByteRange::from_bounds(self.offset_of(first), self.offset_of(end)))
    }

    /// Makes every granule dirty.
    pub fn mark_all(&self) {
        self.mark(ByteRange::from_bounds(0, self.size));
    }

    /// Makes every granule dirty that touches a dirty granule of `other`, which may have another granularity.
    /// Of a larger `other`, what lies beyond the size is ignored. `other` stays as it is. Marks and clears of
    /// `other` that run at once are taken in or not.
    pub fn merge(&self, other: &Self) {
        if self.granule_shift == other.granule_shift && self.size == other.size {
            if let Some(span) = other.span(ByteRange::from_bounds(0, other.size)) {
                other.for_each_dirty_word(span, |word, _| self.merge_leaf(word, other));
            }
            return;
        }
        let mut from = 0;
        while let Some(run) = other.next_dirty(from, u64::MAX) {
            self.mark(run);
            from = run.end();
        }
    }

    /// The granules that `range` touches, as bits of the leaves; `None` when there are none.
    fn span(&self, range: ByteRange) -> Option<Span> {
        let end = range.end().min(self.size);
        (range.offset() < end).then(|| Span {
            first: usize_from(range.offset() >> self.granule_shift),
            last: usize_from((end - 1) >> self.granule_shift),
        })
    }

    /// Where granule `granule` starts, or the size for one that lies beyond it.
    fn offset_of(&self, granule: usize) -> u64 {
        u64_from(granule).saturating_mul(u64::from(self.granularity())).min(self.size)
    }

    /// The bytes that the granules `bits` of leaf `word` stand for.
    fn bytes_of(&self, word: usize, bits: u64) -> u64 {
        let bytes = u64::from(bits.count_ones()) << self.granule_shift;
        let last = self.granules - 1;
        let has_last = word == last >> WORD_SHIFT && bits >> (last % WORD_BITS) & 1 == 1;
        if has_last { bytes - self.excess } else { bytes }
    }

    fn mark_leaf(&self, word: usize, mask: u64) {
        let leaf = &self.levels[0][word];
        if leaf.load(Ordering::Relaxed) & mask == mask {
            // The writer's half of the promise in the head of this file: the load that decides must not
            // overtake the write that is being marked.
            fence(Ordering::SeqCst);
            if leaf.load(Ordering::Acquire) & mask == mask {
                return;
            }
        }
        let count = &self.dirty_bytes.0;
        count.fetch_add(self.bytes_of(word, mask), Ordering::Relaxed);
        let was_set = leaf.fetch_or(mask, Ordering::AcqRel) & mask;
        if was_set != 0 {
            count.fetch_sub(self.bytes_of(word, was_set), Ordering::Relaxed);
        }
    }

    /// Sets the bits `span` of the first level above the leaves, and what stands above them.
    fn mark_summaries(&self, mut span: Span) {
        for level in self.levels.iter().skip(1) {
            for (word, mask) in span.words() {
                if level[word].load(Ordering::Acquire) & mask != mask {
                    level[word].fetch_or(mask, Ordering::AcqRel);
                }
            }
            span = span.above();
        }
    }

    /// Clears the bits `mask` of leaf `word`; says how many bytes became clean.
    fn take_leaf(&self, word: usize, mask: u64) -> u64 {
        let leaf = &self.levels[0][word];
        if leaf.load(Ordering::Acquire) & mask == 0 {
            return 0;
        }
        let taken = self.bytes_of(word, leaf.fetch_and(!mask, Ordering::AcqRel) & mask);
        self.dirty_bytes.0.fetch_sub(taken, Ordering::Relaxed);
        taken
    }

    /// Marks what is dirty in leaf `word` of `other`, a bitmap of the same shape.
    fn merge_leaf(&self, word: usize, other: &Self) {
        let dirty = other.levels[0][word].load(Ordering::Acquire);
        if dirty != 0 {
            self.mark_leaf(word, dirty);
            self.mark_summaries(Span { first: word, last: word });
        }
    }

    /// Calls `visit` with each word that `span` touches, and the part of it that lies in `span`. May leave
    /// out words that are zero.
    fn for_each_dirty_word(&self, span: Span, mut visit: impl FnMut(usize, u64)) {
        if span.is_short() {
            span.words().for_each(|(word, mask)| visit(word, mask));
            return;
        }
        let mut from = span.first;
        // The lock is taken for each word, so that no other scan waits for the whole of a long one.
        while let Some(granule) = self.scan().find(from).filter(|granule| *granule <= span.last) {
            let word = granule >> WORD_SHIFT;
            visit(word, span.mask(word));
            from = (word + 1) << WORD_SHIFT;
        }
    }

    /// The end of the run of dirty granules that starts at `first`, but not beyond `limit`.
    fn run_end(&self, first: usize, limit: usize) -> usize {
        // `first` was found dirty; if it was cleared since, it is still the answer that was true when asked.
        let mut granule = first + 1;
        while granule < limit {
            let word = granule >> WORD_SHIFT;
            let clean = !self.levels[0][word].load(Ordering::Acquire) & bits_from(granule % WORD_BITS);
            if clean != 0 {
                return ((word << WORD_SHIFT) + first_bit(clean)).min(limit);
            }
            granule = (word + 1) << WORD_SHIFT;
        }
        limit
    }

    fn scan(&self) -> Scan<'_> {
        Scan { levels: &self.levels, _turn: self.scan.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("size", &self.size)
            .field("granularity", &self.granularity())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish_non_exhaustive()
    }
}

/// The right to go by the summaries, and to clear what is stale in them. One at a time.
struct Scan<'a> {
    levels: &'a [Vec<AtomicU64>],
    _turn: MutexGuard<'a, ()>,
}

impl Scan<'_> {
    /// Finds the first dirty granule at or after `from`.
    fn find(&self, from: usize) -> Option<usize> {
        let mut depth = 0;
        let mut bit = from;
        loop {
            // Ends at the latest above the top, or behind the last word of a level.
            let word = bit >> WORD_SHIFT;
            let value = self.levels.get(depth)?.get(word)?.load(Ordering::Acquire);
            let ahead = value & bits_from(bit % WORD_BITS);
            if ahead == 0 {
                if value == 0 {
                    self.prune(depth, word);
                }
                depth += 1;
                bit = word + 1;
                continue;
            }
            bit = (word << WORD_SHIFT) + first_bit(ahead);
            if depth == 0 {
                return Some(bit);
            }
            depth -= 1;
            bit <<= WORD_SHIFT;
        }
    }

    /// Clears the bit that stands for `word`, which was found to be zero, unless it no longer is.
    fn prune(&self, depth: usize, word: usize) {
        let Some(above) = self.levels.get(depth + 1) else { return };
        let (above, bit) = (&above[word >> WORD_SHIFT], 1 << (word % WORD_BITS));
        if above.load(Ordering::Relaxed) & bit == 0 {
            return;
        }
        above.fetch_and(!bit, Ordering::AcqRel);
        // Not a load: see "The summaries" in the head of this file.
        if self.levels[depth][word].fetch_or(0, Ordering::AcqRel) != 0 {
            above.fetch_or(bit, Ordering::AcqRel);
        }
    }
}

/// Neighbouring bits of a level. Never empty.
#[derive(Clone, Copy)]
struct Span {
    first: usize,
    last: usize,
}

impl Span {
    /// The words that it touches, each with the bits that lie in it.
    fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let words = self.above();
        (words.first..words.last + 1).map(move |word| (word, self.mask(word)))
    }

    /// The bits of `word`, one that it touches, that lie in it.
    fn mask(self, word: usize) -> u64 {
        let start = word << WORD_SHIFT;
        let low = self.first.saturating_sub(start);
        let high = (self.last - start).min(WORD_BITS - 1);
        bits_from(low) & (u64::MAX >> (63 - high))
    }

    /// The bits that stand for its words in the level above.
    const fn above(self) -> Self {
        Self { first: self.first >> WORD_SHIFT, last: self.last >> WORD_SHIFT }
    }

    const fn is_short(self) -> bool {
        let words = self.above();
        words.last - words.first < WALK_WORDS_MAX
    }
}

/// The bits of a word from `bit` on.
const fn bits_from(bit: usize) -> u64 {
    WORD_FULL << bit & WORD_FULL
}

/// The lowest bit of a word that is not zero.
fn first_bit(word: u64) -> usize {
    usize_from(u64::from(word.trailing_zeros()))
}

/// Makes the levels for `granules` granules, all zero; `None` when there is no memory.
fn zeroed_levels(granules: usize) -> Option<Vec<Vec<AtomicU64>>> {
    let mut levels = Vec::new();
    let mut bits = granules;
    while bits > 0 {
        let words = bits.div_ceil(WORD_BITS);
        levels.push(zeroed_words(words)?);
        bits = if words > 1 { words } else { 0 };
    }
    Some(levels)
}

/// Makes `len` words of zero without touching them.
#[cfg(not(loom))]
fn zeroed_words(len: usize) -> Option<Vec<AtomicU64>> {
    zerocopy::FromZeros::new_vec_zeroed(len).ok()
}

#[cfg(loom)]
fn zeroed_words(len: usize) -> Option<Vec<AtomicU64>> {
    Some((0..len).map(|_| AtomicU64::new(0)).collect())
}
