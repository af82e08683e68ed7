//! [`MemoryStorage`]: a file in memory, for tests that need no host: it answers at once, or each call takes one tick
//! of a time that only the test lets pass. Also the clock and the executor for those.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::clock::{Clock, LocalFuture, Moment};
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};

/// Turns that a future gets before it is said to wait for something that never comes.
const TURNS_MAX: u64 = 1_000_000;

/// A file in memory.
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
    /// It does not grow beyond this.
    size_max: u64,
    /// Ticks that each call takes.
    latency: u64,
    now: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl MemoryStorage {
    /// A file that holds `bytes`, answers at once, and does not grow beyond `size_max`.
    pub fn new(bytes: Vec<u8>, size_max: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            size_max,
            latency: 0,
            now: AtomicU64::new(0),
            waiting: Mutex::new(Vec::new()),
        })
    }

    /// An empty file, each of whose calls ends one tick after it began, however many there are at once.
    pub fn slow() -> Arc<Self> {
        let mut storage = Self::new(Vec::new(), u64::MAX);
        Arc::get_mut(&mut storage).expect("nobody else has it yet").latency = 1;
        storage
    }

    /// Runs `work` to its end; says how many ticks that took.
    pub fn ticks<T>(&self, work: impl Future<Output = T>) -> (u64, T) {
        let mut work = pin!(work);
        for count in 0..TURNS_MAX {
            if let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return (count, done);
            }
            self.now.fetch_add(1, Ordering::SeqCst);
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(Waker::wake);
        }
        panic!("it waits for something that never comes");
    }

    /// What it holds now.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer<'a, T: 'a>(&'a self, act: impl FnOnce(&mut Vec<u8>) -> io::Result<T> + 'a) -> IoFuture<'a, T> {
        if self.latency == 0 {
            return IoFuture::ready(act(&mut self.lock()));
        }
        let end = self.now.load(Ordering::SeqCst) + self.latency;
        IoFuture::pending(async move {
            poll_fn(|cx| {
                if self.now.load(Ordering::SeqCst) >= end {
                    return Poll::Ready(());
                }
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(cx.waker().clone());
                Poll::Pending
            })
            .await;
            act(&mut self.lock())
        })
    }
}

fn place(bytes: &[u8], offset: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
    let end = offset.checked_add(len).filter(|end| *end <= u64_from(bytes.len()));
    let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(usize_from(offset)..usize_from(end))
}

impl Storage for MemoryStorage {
    fn traits(&self) -> Traits {
        Traits {
            block_size: 1,
            preferred_size: 4096,
            read_only: false,
            can_discard: true,
            can_zero_fast: true,
            can_resize: true,
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        u64_from(self.lock().len())
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.answer(move |bytes| {
            if size > self.size_max {
                return Err(io::ErrorKind::StorageFull.into());
            }
            bytes.resize(usize_from(size), 0);
            Ok(())
        })
    }

    fn allocated_size(&self) -> Option<u64> {
        Some(self.size())
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.answer(move |bytes| {
            let place = place(bytes, offset, u64_from(buffer.len()))?;
            buffer.copy_from_slice(&bytes[place]);
            Ok(buffer)
        })
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> IoFuture<'_, ()> {
        self.answer(move |bytes| {
            let place = place(bytes, offset, u64_from(data.len()))?;
            bytes[place].copy_from_slice(&data);
            Ok(())
        })
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroSpace, _: ZeroEffort, _: Durability) -> IoFuture<'_, ()> {
        self.answer(move |bytes| {
            let place = place(bytes, range.offset(), range.len())?;
            bytes[place].fill(0);
            Ok(())
        })
    }

    fn discard(&self, _: ByteRange) -> IoFuture<'_, ()> {
        self.answer(|_| Ok(()))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.answer(|_| Ok(()))
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::ready(Ok(vec![Extent { range, status: ExtentStatus::Data }]))
    }
}

/// A clock that stands.
pub struct StandingClock;

impl Clock for StandingClock {
    fn now(&self) -> Moment {
        Moment::START
    }

    fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Runs to its end what never has to wait for anybody.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..TURNS_MAX {
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return done;
        }
    }
    panic!("it waits for something that never comes");
}
