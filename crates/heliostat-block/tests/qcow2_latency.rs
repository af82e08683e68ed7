//! Allocating writes wait for the storage as often as writes in place do, and not for each other: counted in the time
//! of a storage each of whose calls takes 2 ms, however many there are at once.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::future::join_all;
use heliostat_block::buffer::Buffer;
use heliostat_block::clock::{Clock, LocalFuture, Moment};
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::create::{CreateOptions, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{
    Durability, Extent, ExtentStatus, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace,
};

/// The writes, and the length of each.
const WRITES: u64 = 64;
const LEN: u64 = 64 << 10;

/// A storage in memory, each of whose calls ends one tick after it began.
#[derive(Default)]
struct SlowStorage {
    bytes: Mutex<Vec<u8>>,
    now: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl SlowStorage {
    fn after_a_tick<'a, T: 'a>(&'a self, act: impl FnOnce(&mut Vec<u8>) -> T + 'a) -> IoFuture<'a, T> {
        let end = self.now.load(Ordering::SeqCst) + 1;
        IoFuture::pending(async move {
            poll_fn(|cx| {
                if self.now.load(Ordering::SeqCst) >= end {
                    return Poll::Ready(());
                }
                self.waiting.lock().unwrap().push(cx.waker().clone());
                Poll::Pending
            })
            .await;
            Ok(act(&mut self.bytes.lock().unwrap()))
        })
    }

    fn tick(&self) {
        self.now.fetch_add(1, Ordering::SeqCst);
        self.waiting.lock().unwrap().drain(..).for_each(Waker::wake);
    }
}

impl Storage for SlowStorage {
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
        u64_from(self.bytes.lock().unwrap().len())
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        self.after_a_tick(move |bytes| bytes.resize(usize_from(size), 0))
    }

    fn allocated_size(&self) -> Option<u64> {
        None
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        self.after_a_tick(move |bytes| {
            let start = usize_from(offset);
            let end = start + buffer.len();
            buffer.copy_from_slice(&bytes[start..end]);
            buffer
        })
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> IoFuture<'_, ()> {
        self.after_a_tick(move |bytes| {
            let start = usize_from(offset);
            bytes[start..start + data.len()].copy_from_slice(&data);
        })
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroSpace, _: ZeroEffort, _: Durability) -> IoFuture<'_, ()> {
        self.after_a_tick(move |bytes| bytes[usize_from(range.offset())..usize_from(range.end())].fill(0))
    }

    fn discard(&self, _: ByteRange) -> IoFuture<'_, ()> {
        self.after_a_tick(|_| ())
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.after_a_tick(|_| ())
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        IoFuture::ready(Ok::<_, io::Error>(vec![Extent { range, status: ExtentStatus::Data }]))
    }
}

/// A clock that stands.
struct StandingClock;

impl Clock for StandingClock {
    fn now(&self) -> Moment {
        Moment::START
    }

    fn sleep_until(&self, _: Moment) -> LocalFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Runs `work` to its end; says how many ticks that took.
fn ticks<T>(storage: &SlowStorage, work: impl Future<Output = T>) -> (u64, T) {
    let mut work = pin!(work);
    let count = Cell::new(0);
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return (count.get(), done);
        }
        count.set(count.get() + 1);
        assert!(count.get() < 10_000, "it comes to no end");
        storage.tick();
    }
}

async fn write_all(node: &Arc<Node>, from: u64) {
    let writes = (0..WRITES).map(|index| async move {
        let data = Bytes::from(vec![1; usize_from(LEN)]);
        node.enter().await.write(from + index * LEN, data, Durability::Cached).await.unwrap();
    });
    join_all(writes).await;
}

#[test]
fn writes_that_allocate_take_at_most_three_times_the_time_of_writes_in_place() {
    let storage = Arc::new(SlowStorage::default());
    let as_storage = || -> Arc<dyn Storage> { Arc::<SlowStorage>::clone(&storage) };
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    ticks(&storage, create(&ImageFile::new(as_storage()), None, &options)).1.unwrap();
    let image = ticks(&storage, Qcow2::open(as_storage(), OpenOptions::default())).1.unwrap();
    let node = Node::new(
        NodeName::generated(0),
        Driver::Qcow2(image),
        NodeOptions::default(),
        Arc::new(StandingClock),
    );
    let (first, ()) = ticks(&storage, write_all(&node, 0));
    let (in_place, ()) = ticks(&storage, write_all(&node, 0));
    let (allocating, ()) = ticks(&storage, write_all(&node, WRITES * LEN));
    assert_eq!(in_place, 1, "all at once");
    assert!(allocating <= 3, "{allocating} ticks, with the tables in memory");
    // The very first also loads counts, makes a table and lets the file grow.
    assert!(first <= 5, "{first} ticks, from nothing");
}
