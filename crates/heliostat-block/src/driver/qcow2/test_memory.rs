//! [`Memory`]: a file in memory, for the tests of this driver. Remembers what it is asked for; fails, loses and delays
//! as it is told.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;
use crate::storage::{Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};

/// What a file was asked for.
#[derive(Clone, Debug)]
pub(in crate::driver) enum Change {
    Write(u64, Bytes),
    Size(u64),
    Flush,
}

impl Change {
    pub(in crate::driver) fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => {
                let at = usize_from(*offset);
                bytes.resize(bytes.len().max(at + data.len()), 0);
                bytes[at..at + data.len()].copy_from_slice(data);
            }
            Self::Size(size) => bytes.resize(usize_from(*size), 0),
            Self::Flush => {}
        }
    }
}

/// The changes of all files of an image, in order, each with the number of its file.
pub(in crate::driver) type Journal = Arc<Mutex<Vec<(usize, Change)>>>;

/// A file in memory.
pub(in crate::driver) struct Memory {
    pub(in crate::driver) bytes: Mutex<Vec<u8>>,
    /// As a block device where not: its length stays.
    pub(in crate::driver) can_resize: bool,
    /// It becomes no longer than this.
    pub(in crate::driver) size_max: AtomicU64,
    /// After so many writes and changes of the length the power is gone.
    pub(in crate::driver) writes_left: AtomicU64,
    /// The next flush fails, and what was written since the last good one is gone.
    pub(in crate::driver) loses: AtomicBool,
    /// As many of the next flushes find that what was written since the last good one is gone, and succeed. Counted.
    pub(in crate::driver) silent_losses_ahead: AtomicU64,
    pub(in crate::driver) losses: AtomicU64,
    /// Writes end when they are polled a second time; until then they are on their way.
    pub(in crate::driver) is_slow: AtomicBool,
    pub(in crate::driver) on_their_way: Mutex<Vec<(u64, Bytes)>>,
    /// What stood where something was written since the last good flush.
    pub(in crate::driver) undurable: Mutex<Vec<(u64, Vec<u8>)>>,
    pub(in crate::driver) number: usize,
    pub(in crate::driver) journal: Journal,
}

pub(in crate::driver) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl Memory {
    pub(in crate::driver) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            can_resize: true,
            size_max: AtomicU64::new(u64::MAX),
            writes_left: AtomicU64::new(u64::MAX),
            loses: AtomicBool::new(false),
            silent_losses_ahead: AtomicU64::new(0),
            losses: AtomicU64::new(0),
            is_slow: AtomicBool::new(false),
            on_their_way: Mutex::default(),
            undurable: Mutex::default(),
            number: 0,
            journal: Journal::default(),
        }
    }

    /// One that several share.
    pub(in crate::driver) fn of(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self::new(bytes))
    }

    /// One whose power is gone after so many writes.
    pub(in crate::driver) fn until(writes: u64, bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { writes_left: AtomicU64::new(writes), ..Self::new(bytes) })
    }

    /// What it holds.
    pub(in crate::driver) fn content(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// What was dropped on its way arrives.
    #[cfg_attr(loom, expect(dead_code, reason = "the tests that want it are left out of loom's models"))]
    pub(in crate::driver) fn land(&self) {
        for (offset, data) in std::mem::take(&mut *lock(&self.on_their_way)) {
            self.change(Change::Write(offset, data)).unwrap();
        }
    }

    /// What was written since the last good flush is gone, and only the count tells.
    pub(in crate::driver) fn lose_silently(&self) {
        self.losses.fetch_add(1, Ordering::SeqCst);
        self.lose();
    }

    fn lose(&self) {
        for (offset, old) in std::mem::take(&mut *lock(&self.undurable)).into_iter().rev() {
            let at = usize_from(offset);
            lock(&self.bytes)[at..at + old.len()].copy_from_slice(&old);
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        if !matches!(change, Change::Flush) {
            let take = |left: u64| left.checked_sub(1);
            let taken = self.writes_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
            taken.map_err(|_| io::Error::other("the power is gone"))?;
        }
        let mut bytes = lock(&self.bytes);
        if let Change::Write(offset, data) = &change {
            let at = usize_from(*offset);
            lock(&self.undurable).push((*offset, bytes[at..at + data.len()].to_vec()));
        }
        change.apply(&mut bytes);
        lock(&self.journal).push((self.number, change));
        Ok(())
    }
}

impl Storage for Memory {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: false,
            can_zero_fast: true,
            can_resize: self.can_resize,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        u64_from(lock(&self.bytes).len())
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        IoFuture::ready(if !self.can_resize {
            Err(io::ErrorKind::Unsupported.into())
        } else if size > self.size_max.load(Ordering::SeqCst) {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            self.change(Change::Size(size))
        })
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        let at = usize_from(offset);
        let len = buffer.len();
        buffer.copy_from_slice(&lock(&self.bytes)[at..at + len]);
        IoFuture::ready(Ok(buffer))
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> IoFuture<'_, ()> {
        if !self.is_slow.load(Ordering::SeqCst) {
            return IoFuture::ready(self.change(Change::Write(offset, data)));
        }
        let mut has_begun = false;
        IoFuture::pending(std::future::poll_fn(move |_| {
            if has_begun {
                lock(&self.on_their_way).retain(|(other, _)| *other != offset);
                return Poll::Ready(self.change(Change::Write(offset, data.clone())));
            }
            has_begun = true;
            lock(&self.on_their_way).push((offset, data.clone()));
            Poll::Pending
        }))
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroSpace, _: ZeroEffort, _: Durability) -> IoFuture<'_, ()> {
        let zeroes = vec![0; usize_from(range.len())];
        IoFuture::ready(self.change(Change::Write(range.offset(), zeroes.into())))
    }

    fn discard(&self, _: ByteRange) -> IoFuture<'_, ()> {
        IoFuture::ready(Ok(()))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let take = |left: u64| left.checked_sub(1);
        if self.silent_losses_ahead.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
            self.lose_silently();
        }
        if !self.loses.swap(false, Ordering::SeqCst) {
            lock(&self.undurable).clear();
            return IoFuture::ready(self.change(Change::Flush));
        }
        self.lose();
        IoFuture::ready(Err(io::Error::other("lost")))
    }

    fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::ready(Ok(vec![Extent { range, status: ExtentStatus::Data }]))
    }
}

/// Polls until it ends: nothing here waits for anybody.
pub(in crate::driver) fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    for _ in 0..1000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return output;
        }
    }
    panic!("it waits for ever");
}
