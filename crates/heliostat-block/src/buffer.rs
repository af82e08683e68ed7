//! [`Buffer`]: memory that a storage reads into, aligned so that direct I/O can use it, and given back to its
//! [`BufferPool`] when the last user lets go.
//!
//! What is written travels as [`bytes::Bytes`]: immutable, so that two sides may be written from it at once
//! and a client cannot change it meanwhile. [`Buffer::freeze`] turns the one into the other without a copy.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// What every buffer starts on a multiple of: a page, the strictest alignment that direct I/O asks for.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// A run of bytes that starts on a page. Zeroed when fresh; holds old bytes when it comes from a pool.
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    home: Option<Arc<Shelf>>,
}

impl Buffer {
    /// Makes a zeroed buffer of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        Self::from_memory(vec![0; len + BUFFER_ALIGNMENT - 1], len, None)
    }

    /// Makes a buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    fn from_memory(memory: Vec<u8>, len: usize, home: Option<Arc<Shelf>>) -> Self {
        let start = memory.as_ptr().align_offset(BUFFER_ALIGNMENT);
        debug_assert!(start + len <= memory.len());
        Self { memory, start, len, home }
    }

    /// Shortens it to `len` bytes; does nothing when it is shorter already.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Turns it into immutable, shareable bytes without copying. Its memory goes back to its pool when the
    /// last clone is dropped.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Says whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        is_zero(self)
    }
}

/// Says whether every byte is zero. Looks at words, not bytes: it stands in the path of every copy.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<64>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| *word == [0; 64])
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.put_back(std::mem::take(&mut self.memory));
        }
    }
}

/// Where a pool keeps what is not in use.
struct Shelf {
    /// Protects only the list; held for a push or a pop.
    free: Mutex<Vec<Vec<u8>>>,
    keep: usize,
}

impl Shelf {
    fn put_back(&self, memory: Vec<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.keep {
            free.push(memory);
        }
    }
}

/// Buffers of one length, kept for the next user: fresh large ones cost a page fault for every 4 KiB.
#[derive(Clone)]
pub struct BufferPool {
    shelf: Arc<Shelf>,
    len: usize,
}

impl BufferPool {
    /// Makes a pool of buffers of `len` bytes, which keeps at most `keep` that are not in use.
    #[must_use]
    pub fn new(len: usize, keep: usize) -> Self {
        Self { shelf: Arc::new(Shelf { free: Mutex::new(Vec::new()), keep }), len }
    }

    /// Takes a buffer of `len` bytes. Its contents are whatever its last user left; one longer than the
    /// pool's own length is made fresh and not kept.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        if len > self.len {
            return Buffer::zeroed(len);
        }
        let kept = self.shelf.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = kept.unwrap_or_else(|| vec![0; self.len + BUFFER_ALIGNMENT - 1]);
        Buffer::from_memory(memory, len, Some(Arc::clone(&self.shelf)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_on_a_page() {
        for len in [0, 1, 4096, 70_000] {
            let buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().align_offset(BUFFER_ALIGNMENT), 0);
        }
    }

    #[test]
    fn memory_returns_to_its_pool_when_the_last_clone_is_dropped() {
        let pool = BufferPool::new(8192, 4);
        let mut buffer = pool.take(4096);
        buffer[0] = 7;
        let bytes = buffer.freeze();
        let clone = bytes.slice(..10);
        drop(bytes);
        assert_eq!(pool.take(1)[0], 0, "still in use by the clone");
        let fresh = pool.take(1);
        drop(fresh);
        drop(clone);
        assert_eq!(pool.take(8192)[0], 7, "the last one back is the first one out");
    }

    #[test]
    fn zero_is_seen_whatever_the_length() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut buffer = Buffer::zeroed(len);
            assert!(buffer.is_zero());
            if let Some(last) = buffer.last_mut() {
                *last = 1;
                assert!(!buffer.is_zero());
            }
        }
    }
}
