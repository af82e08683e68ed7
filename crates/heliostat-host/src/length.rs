//! [`Length`]: how long a file is, and the one place that changes it.
//!
//! Changing it blocks: shortening gives back space, and either waits for the file system's journal and for whoever
//! writes to the file. [`crate::file`] sees to it that no data-plane thread waits, and asks here before each
//! request whether it still lies inside.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_lock::{Mutex, RwLock, RwLockReadGuard};
use rustix::io::Errno;

use crate::lock::OpenFile;
use crate::probe::Shape;

/// The length of one file or device.
#[derive(Debug)]
pub(crate) struct Length {
    file: Arc<OpenFile>,
    shape: Shape,
    size: Arc<AtomicU64>,
    /// Held by whoever changes the length, until the system call has ended.
    change: Arc<Mutex<()>>,
    /// Which of the two ways to the medium a page near the end takes follows from the length. Held for reading by
    /// requests that pass the page cache by, for writing by a change that makes some page take the other way.
    ways: Arc<RwLock<()>>,
}

impl Length {
    pub(crate) fn new(file: Arc<OpenFile>, shape: Shape, size: u64) -> Self {
        let size = Arc::new(AtomicU64::new(size));
        Self { file, shape, size, change: Arc::default(), ways: Arc::default() }
    }

    /// The same length for who sees the file in another shape. Only one of the two may be asked for a way at a time.
    pub(crate) fn seen_as(&self, shape: Shape) -> Self {
        let (file, size, change) = (Arc::clone(&self.file), Arc::clone(&self.size), Arc::clone(&self.change));
        Self { file, shape, size, change, ways: Arc::default() }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether it can be changed.
    pub(crate) const fn can_change(&self) -> bool {
        self.shape.is_writable && !self.shape.is_device
    }

    /// As long as this is held, no page changes its way to the medium.
    pub(crate) async fn hold_ways(&self) -> RwLockReadGuard<'_, ()> {
        self.ways.read().await
    }

    /// How much of a request of `len` bytes at `offset` may pass the page cache by, counted from its start. To be
    /// asked while [`Length::hold_ways`] is held.
    pub(crate) fn direct_len(&self, offset: u64, len: u64) -> u64 {
        // A request that ends inside a block was made for the end that the file had.
        let tail = self.shape.tail_of(offset + len).min(self.shape.tail_of(self.size()));
        tail.saturating_sub(offset).min(len)
    }

    /// Makes the file `size` bytes long.
    ///
    /// # Errors
    /// As [`heliostat_block::storage::Storage::set_size`].
    ///
    /// # Cancel safety
    /// Dropped, it has changed the length, will change it, or never will; what [`Length::size`] says is true all
    /// the same.
    pub(crate) async fn change(self: &Arc<Self>, size: u64) -> io::Result<()> {
        let turn = self.change.lock_arc().await;
        let has_tail = |size| self.shape.tail_of(size) != size;
        let ways = match has_tail(self.size()) || has_tail(size) {
            true => Some(self.ways.write_arc().await),
            false => None,
        };
        let this = Arc::clone(self);
        let work = move || {
            let _held = (turn, ways);
            this.change_now(size)
        };
        self.file.share().run(work).await
    }

    fn change_now(&self, size: u64) -> io::Result<()> {
        let before = self.size();
        // A file that gets shorter is said to be so first, one that gets longer afterwards: what lies inside of
        // what we say is there.
        self.size.store(size.min(before), Ordering::Release);
        let changed = set_len(&self.file, size);
        self.size.store(if changed.is_ok() { size } else { before }, Ordering::Release);
        changed
    }
}

fn set_len(file: &OpenFile, size: u64) -> io::Result<()> {
    loop {
        match rustix::fs::ftruncate(file, size) {
            Err(Errno::INTR) => {}
            // The kernel says EINVAL for what no file can have.
            Err(Errno::INVAL) => return Err(Errno::FBIG.into()),
            result => return Ok(result?),
        }
    }
}
