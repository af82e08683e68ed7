//! [`Way`]: whether requests for a file that is in use pass the page cache by, and how that changes.
//!
//! The other way is the same file opened once more, or its first descriptor, with the same locks, length and idea of
//! what is allocated. What was told to users stays: where direct I/O takes whole blocks, the other way makes them of
//! smaller requests. Both ways are never used at once: the page cache would write back pages that are out of date.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use heliostat_block::any_alignment::AnyAlignment;
use heliostat_block::buffer::BufferPool;
use heliostat_block::storage::Storage;

use super::{BOUNCE_LEN, BOUNCES_KEPT, FileStorage};
use crate::lock::OpenFile;
use crate::open::{Cache, OpenError, reopen_direct};
use crate::pace::Pace;
use crate::probe::{Shape, direct_alignment};
use crate::writeback::Writeback;

/// A way to the medium, see [`FileStorage::take`].
pub struct Way(Option<Arc<dyn Storage>>);

/// The way that is not the one a file was opened for, while it is taken.
#[derive(Default)]
pub(super) struct Other {
    /// Looked at by every request.
    is_taken: AtomicBool,
    /// Held to look and to change, never across I/O.
    storage: RwLock<Option<Arc<dyn Storage>>>,
}

impl Other {
    pub(super) fn get(&self) -> Option<Arc<dyn Storage>> {
        if !self.is_taken() {
            return None;
        }
        self.storage.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn is_taken(&self) -> bool {
        self.is_taken.load(Ordering::Acquire)
    }
}

impl FileStorage {
    /// Makes ready to use the page cache as `cache` says. Nothing changes yet.
    ///
    /// # Errors
    /// [`OpenError::NoDirect`] where the file system has no direct I/O; else the host's.
    pub fn prepare(&self, cache: Cache) -> Result<Way, OpenError> {
        let is_direct = cache == Cache::Direct && !self.shape.in_memory;
        if is_direct == self.opened_direct() {
            return Ok(Way(None));
        }
        if let Some(taken) = self.other.get() {
            return Ok(Way(Some(taken)));
        }
        let (main, block_size, memory_alignment) = if is_direct {
            let file = reopen_direct(&self.path, self.cached.as_fd(), self.shape.is_writable)?;
            let alignment = direct_alignment(file.as_fd());
            let (block, memory) = alignment.map_err(|error| OpenError::io(&self.path, "probe", error))?;
            (OpenFile::beside(&self.cached, file), block, memory)
        } else {
            (Arc::clone(&self.cached), 1, 1)
        };
        let shape = Shape { block_size, memory_alignment, ..self.shape };
        Ok(Way(Some(Arc::new(AnyAlignment::new(Arc::new(self.beside(main, shape)))))))
    }

    /// Lets all requests go that way from now on. The caller sees to it that nothing is in flight, and that what has
    /// been written is flushed.
    pub fn take(&self, Way(other): Way) {
        let is_taken = other.is_some();
        *self.other.storage.write().unwrap_or_else(PoisonError::into_inner) = other;
        self.other.is_taken.store(is_taken, Ordering::Release);
        self.layout.forget();
    }

    /// The same file with requests that go to `main`.
    fn beside(&self, main: Arc<OpenFile>, shape: Shape) -> Self {
        let is_direct = !Arc::ptr_eq(&main, &self.cached);
        let for_writeback = self.cached.for_writeback().filter(|_| shape.is_writable && !is_direct);
        Self {
            path: self.path.clone(),
            main,
            cached: Arc::clone(&self.cached),
            shape,
            length: Arc::new(self.length.seen_as(shape)),
            ignores_flush: Arc::clone(&self.ignores_flush),
            ignores_discard: self.ignores_discard,
            can_try_reading: AtomicBool::new(!is_direct),
            pace: Pace::new(),
            bounces: BufferPool::new(BOUNCE_LEN, BOUNCES_KEPT),
            space: Arc::clone(&self.space),
            layout: Arc::clone(&self.layout),
            writeback: for_writeback.map(|file| Arc::new(Writeback::new(file))),
            other: Other::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use heliostat_block::buffer::Buffer;
    use heliostat_block::convert::{u64_from, usize_from};
    use heliostat_block::range::ByteRange;
    use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};

    use super::*;
    use crate::open::{Existing, OpenOptions};
    use crate::runtime::block_on;

    const LEN: u64 = (1 << 20) + 700;

    /// Writes, zeroes and discards of every alignment, and what is there then.
    async fn change(storage: &FileStorage, model: &mut [u8], seed: u8) {
        for step in 0..40_u64 {
            let offset = (step * 26_321 + u64::from(seed) * 517) % (LEN - 9000);
            let len = usize_from(1 + (step * 1_237 + u64::from(seed)) % 8999);
            let range = ByteRange::from_bounds(offset, offset + u64_from(len));
            let byte = if step % 5 == 0 { 0 } else { seed };
            if byte == 0 {
                let (space, effort) = (ZeroSpace::MayUnmap, ZeroEffort::Any);
                storage.write_zeroes(range, space, effort, Durability::Cached).await.unwrap();
            } else {
                storage.write(offset, vec![byte; len].into(), Durability::Cached).await.unwrap();
            }
            model[usize_from(offset)..][..len].fill(byte);
        }
        let tail = LEN - 100;
        storage.write(tail, vec![seed; 100].into(), Durability::Cached).await.unwrap();
        model[usize_from(tail)..][..100].fill(seed);
    }

    #[test]
    fn a_file_goes_past_the_page_cache_and_back_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        for opened in [Cache::Page, Cache::Direct] {
            let path = folder.path().join(format!("{opened:?}"));
            let options = OpenOptions { cache: opened, ..OpenOptions::default() };
            let storage = FileStorage::create(&path, 700, Existing::Refuse, &options).unwrap();
            if storage.shape.in_memory {
                return;
            }
            let block_size = storage.traits().block_size;
            let mut model = vec![0; usize_from(LEN)];
            block_on(async {
                storage.set_size(LEN).await.unwrap();
                for (round, cache) in
                    [Cache::Direct, Cache::Page, Cache::Page, Cache::Direct, Cache::Direct, Cache::Page]
                        .into_iter()
                        .enumerate()
                {
                    storage.flush().await.unwrap();
                    storage.take(storage.prepare(cache).unwrap());
                    assert_eq!(storage.is_direct(), cache == Cache::Direct);
                    assert_eq!(storage.traits().block_size, block_size, "users were told");
                    let seed = u8::try_from(round + 1).unwrap();
                    // One that takes whole blocks is used with blocks.
                    if block_size == 1 {
                        change(&storage, &mut model, seed).await;
                    } else {
                        storage.write(0, vec![seed; 8192].into(), Durability::Cached).await.unwrap();
                        model[..8192].fill(seed);
                    }
                    let found = storage.read(0, Buffer::zeroed(model.len())).await.unwrap();
                    assert!(*found == *model, "{opened:?}, then {cache:?} in round {round}");
                    // What is cut off is gone whichever way is taken next.
                    storage.set_size(LEN - 4096).await.unwrap();
                    model.truncate(usize_from(LEN - 4096));
                    // And what it gains is there.
                    model.resize(model.len() + (round + 2) * 4096, 0);
                    storage.set_size(u64_from(model.len())).await.unwrap();
                }
                storage.flush().await.unwrap();
            })
            .unwrap();
            assert!(std::fs::read(&path).unwrap() == model);
        }
    }
}
