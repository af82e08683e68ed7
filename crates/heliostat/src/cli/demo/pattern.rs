//! [`Pattern`]: what the demo's guest writes, made so that any mix-up shows.
//!
//! Each 4 KiB block begins with a mark, its own number, and the number of the request that wrote it; the rest
//! follows from those three and the seed. A block at the wrong place, of the wrong age, torn in the middle, or
//! with one bit changed is told from the right one, and mostly recognised for what it is. Pure.

use std::fmt;

use heliostat_block::buffer::is_zero;
use heliostat_block::convert::usize_from;

use super::random::Random;

/// Bytes in a block, the unit in which the guest writes.
pub const BLOCK: u64 = 4096;

/// Says that a block is the demo's: "heliodem" in ASCII.
const MARK: u64 = u64::from_be_bytes(*b"heliodem");

/// What a block is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes: never written, zeroed, or trimmed.
    Zeroes,
    /// What the request of this number wrote; 0 is what was there at the start.
    Written(u64),
}

/// What a block was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeroes.
    Zeroes,
    /// Byte for byte what request `request` wrote to block `block`.
    Written {
        /// Where that was.
        block: u64,
        /// Which request it was.
        request: u64,
    },
    /// It begins as a block of the guest's, but is torn or changed further on.
    Torn {
        /// Where it says that it belongs.
        block: u64,
        /// Which request it says it is from.
        request: u64,
    },
    /// Nothing that the guest ever wrote.
    Foreign,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Written { block, request } => write!(f, "request {request}'s data of block {block}"),
            Self::Torn { block, request } => {
                write!(f, "damaged data of request {request} for block {block}")
            }
            Self::Foreign => f.write_str("bytes that nobody wrote"),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Written(0) => f.write_str("what was there from the start"),
            Self::Written(request) => write!(f, "what request {request} wrote"),
        }
    }
}

/// The rule by which a run's blocks are filled.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
}

impl Pattern {
    /// The rule of the run with this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The words of a block, in order.
    fn words(self, block: u64, request: u64) -> impl Iterator<Item = u64> {
        let mut random = Random::new(self.seed ^ block.rotate_left(40) ^ request.rotate_left(20));
        let first = [MARK, block, request];
        let rest = usize_from(BLOCK) / 8 - first.len();
        first.into_iter().chain((0..rest).map(move |_| random.next()))
    }

    /// Fills `bytes`, one block, with what `request` writes to block number `block`.
    pub fn fill(self, block: u64, request: u64, bytes: &mut [u8]) {
        debug_assert_eq!(bytes.len(), usize_from(BLOCK));
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        for (chunk, word) in chunks.iter_mut().zip(self.words(block, request)) {
            *chunk = word.to_le_bytes();
        }
    }

    /// Says whether `bytes`, one block, hold what they should at block number `block`.
    #[must_use]
    pub fn holds(self, block: u64, content: Content, bytes: &[u8]) -> bool {
        match content {
            Content::Zeroes => is_zero(bytes),
            Content::Written(request) => self.equals(block, request, bytes),
        }
    }

    fn equals(self, block: u64, request: u64, bytes: &[u8]) -> bool {
        let (chunks, _) = bytes.as_chunks::<8>();
        chunks.iter().zip(self.words(block, request)).all(|(chunk, word)| u64::from_le_bytes(*chunk) == word)
    }

    /// Finds out what `bytes`, one block, are.
    #[must_use]
    pub fn recognise(self, bytes: &[u8]) -> Found {
        if is_zero(bytes) {
            return Found::Zeroes;
        }
        let word = |index: usize| {
            let (chunks, _) = bytes.as_chunks::<8>();
            chunks.get(index).map_or(0, |chunk| u64::from_le_bytes(*chunk))
        };
        let (block, request) = (word(1), word(2));
        match word(0) == MARK {
            true if self.equals(block, request, bytes) => Found::Written { block, request },
            true => Found::Torn { block, request },
            false => Found::Foreign,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pattern: Pattern, number: u64, request: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        pattern.fill(number, request, &mut bytes);
        bytes
    }

    #[test]
    fn a_block_is_told_from_every_other() {
        let pattern = Pattern::new(1);
        let bytes = block(pattern, 5, 9);
        assert!(pattern.holds(5, Content::Written(9), &bytes));
        for (number, request) in [(5, 8), (5, 10), (4, 9), (9, 5)] {
            assert!(!pattern.holds(number, Content::Written(request), &bytes), "{number} {request}");
        }
        assert!(!pattern.holds(5, Content::Zeroes, &bytes));
        assert!(!Pattern::new(2).holds(5, Content::Written(9), &bytes), "a block of another run");
        assert_eq!(pattern.recognise(&bytes), Found::Written { block: 5, request: 9 });
    }

    #[test]
    fn one_changed_bit_anywhere_shows() {
        let pattern = Pattern::new(3);
        for at in [0, 8, 16, 24, 2000, 4095] {
            let mut bytes = block(pattern, 5, 9);
            bytes[at] ^= 0x10;
            assert!(!pattern.holds(5, Content::Written(9), &bytes), "byte {at}");
            assert!(matches!(pattern.recognise(&bytes), Found::Torn { .. } | Found::Foreign), "byte {at}");
        }
    }

    #[test]
    fn half_of_one_write_and_half_of_another_show() {
        let pattern = Pattern::new(3);
        let mut bytes = block(pattern, 5, 9);
        bytes[2048..].copy_from_slice(&block(pattern, 5, 8)[2048..]);
        assert_eq!(pattern.recognise(&bytes), Found::Torn { block: 5, request: 9 });
        assert_eq!(pattern.recognise(&[0; 4096]), Found::Zeroes);
        assert_eq!(pattern.recognise(&[7; 4096]), Found::Foreign);
    }
}
