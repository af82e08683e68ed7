//! [`Block`]: the memory through which a TLS stream's records pass, lent by the thread.
//!
//! A stream that has nothing on its way keeps none. Called by the stream; knows nothing of records.

use std::cell::RefCell;

/// Bytes of a block: the longest handshake message (64 KiB) and a record of 16 KiB beside it; seven full records go
/// out in one call.
pub(super) const BLOCK_LEN: usize = 128 << 10;

/// Blocks that a thread keeps for later. Few streams are in the middle of a record while their thread sleeps.
const SPARES_MAX: usize = 16;

thread_local! {
    static SPARES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes in the order in which they came, in memory that it has only while there are any.
#[derive(Debug, Default)]
pub(super) struct Block {
    memory: Vec<u8>,
    start: usize,
    end: usize,
}

impl Block {
    /// The bytes that are in it.
    pub(super) fn filled(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.end]
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    #[cfg(test)]
    pub(super) const fn has_no_memory(&self) -> bool {
        self.memory.is_empty()
    }

    /// Where the next bytes go. As much as there is when what is in it is moved to the front.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.memory.is_empty() {
            let spare = SPARES.with_borrow_mut(Vec::pop);
            self.memory = spare.unwrap_or_else(|| vec![0; BLOCK_LEN]);
        }
        if self.start > 0 {
            self.memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.memory[self.end..]
    }

    /// As [`Block::room`], without moving anything.
    pub(super) fn tail(&mut self) -> &mut [u8] {
        if self.memory.is_empty() { self.room() } else { &mut self.memory[self.end..] }
    }

    /// Makes room for so many bytes, whatever that takes.
    pub(super) fn reserve(&mut self, len: usize) {
        if self.room().len() < len {
            self.memory.resize(self.end + len, 0);
        }
    }

    /// Says that so many bytes were put into the room.
    pub(super) const fn fill(&mut self, len: usize) {
        self.end += len;
    }

    /// Takes bytes off the front.
    pub(super) const fn discard(&mut self, len: usize) {
        self.start += len;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Gives the memory back, if nothing is in it.
    pub(super) fn release(&mut self) {
        if !self.is_empty() || self.memory.is_empty() {
            return;
        }
        let memory = std::mem::take(&mut self.memory);
        if memory.len() == BLOCK_LEN {
            SPARES.with_borrow_mut(|spares| {
                if spares.len() < SPARES_MAX {
                    spares.push(memory);
                }
            });
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.discard(self.end - self.start);
        // A thread that is ending has no list any more.
        let _ = SPARES.try_with(|_| ()).map(|()| self.release());
    }
}
