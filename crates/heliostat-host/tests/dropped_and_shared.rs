//! Futures that are dropped half way, and a storage that several threads use at once.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;

use common::{DRIVERS, contents, disk_directory, memory_directory, pattern};
use futures_util::stream::{self, StreamExt};
use heliostat_block::buffer::Buffer;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Cache, Existing, OpenOptions};
use heliostat_host::runtime::{Thread, block_on_with};

const BLOCK: u64 = 16 << 10;
const BLOCKS: u64 = 128;
const ALL: ByteRange = ByteRange::from_bounds(0, BLOCK * BLOCKS);

#[test]
fn operations_whose_futures_are_dropped_do_no_harm() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    for driver in DRIVERS {
        for cache in [Cache::Page, Cache::Direct] {
            let options = OpenOptions { cache, ..OpenOptions::default() };
            let storage = FileStorage::create(&path, BLOCK * BLOCKS, Existing::Replace, &options).unwrap();
            block_on_with(driver, drop_many(&storage)).unwrap();
            block_on_with(driver, async {
                for (n, block) in (0..BLOCKS).zip(contents(&storage).await.chunks(1 << 14)) {
                    // Any part of it may have been written, and no byte is anything else.
                    let new = pattern(n, BLOCK, 0);
                    let mut bytes = block.iter().zip(&new);
                    assert!(bytes.all(|(byte, new)| byte == new || *byte == 0), "block {n} is neither");
                }
                // What the kernel did not do before the thread ended, it never does.
                storage.write_zeroes(ALL, ZeroSpace::Keep, ZeroEffort::Any, Durability::Fua).await.unwrap();
                assert!(contents(&storage).await.iter().all(|byte| *byte == 0));
            })
            .unwrap();
        }
    }
}

async fn drop_many(storage: &FileStorage) {
    for n in 0..BLOCKS {
        // Durable ones, which are never done at once.
        let mut write = storage.write(n * BLOCK, pattern(n, BLOCK, 0), Durability::Fua);
        let mut flush = storage.flush();
        let _ = futures_util::poll!(&mut write);
        let _ = futures_util::poll!(&mut flush);
        if n % 8 == 0 {
            heliostat_host::runtime::yield_now().await;
        }
        if n % 3 == 0 {
            let mut read = storage.read((n + 1) % BLOCKS * BLOCK, Buffer::zeroed(1 << 14));
            let _ = futures_util::poll!(&mut read);
        }
        if n % 3 == 1 {
            let range = ByteRange::from_bounds(n * BLOCK, n * BLOCK + BLOCK);
            let mut extents = storage.extents(range);
            let _ = futures_util::poll!(&mut extents);
        }
    }
    // What the kernel still does is waited for when this ends.
}

#[test]
fn threads_that_share_a_storage_do_not_get_into_each_others_way() {
    for directory in [Some(disk_directory()), memory_directory()].into_iter().flatten() {
        let path = directory.path().join("disk");
        for cache in [Cache::Page, Cache::Direct] {
            let options = OpenOptions { cache, ..OpenOptions::default() };
            let size = BLOCK * BLOCKS + 777;
            let storage = Arc::new(FileStorage::create(&path, size, Existing::Replace, &options).unwrap());
            let threads = DRIVERS.map(|driver| [0, 1].map(|half| (driver, half))).into_iter().flatten();
            let threads: Vec<_> = threads
                .zip(0..)
                .map(|((driver, _), part)| {
                    let storage = Arc::clone(&storage);
                    Thread::spawn_with(driver, "test", move || write_and_check(storage, part)).unwrap()
                })
                .collect();
            threads.into_iter().for_each(Thread::join);
        }
    }
}

/// Works on every fourth block, so that neighbours belong to others, and on the tail if it is the first.
async fn write_and_check(storage: Arc<FileStorage>, part: u64) {
    let storage = &*storage;
    for round in 0..4_u64 {
        stream::iter((0..BLOCKS).filter(|n| n % 4 == part))
            .map(|n| async move {
                let offset = n * BLOCK;
                let data = pattern(n + round, BLOCK, usize::try_from(n % 2).unwrap());
                storage.write(offset, data.clone(), Durability::Cached).await.unwrap();
                let read = storage.read(offset, Buffer::zeroed(1 << 14)).await.unwrap();
                assert!(*read == *data);
                if n % 8 == part {
                    let range = ByteRange::from_bounds(offset, offset + BLOCK);
                    storage
                        .write_zeroes(range, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Cached)
                        .await
                        .unwrap();
                    let read = storage.read(offset, Buffer::zeroed(1 << 14)).await.unwrap();
                    assert!(read.is_zero());
                }
            })
            .buffer_unordered(16)
            .for_each(|()| async {})
            .await;
        if part == 0 {
            let tail = pattern(round, 777, 1);
            storage.write(BLOCKS * BLOCK, tail.clone(), Durability::Cached).await.unwrap();
            assert!(*storage.read(BLOCKS * BLOCK, Buffer::zeroed(777)).await.unwrap() == *tail);
        }
    }
}

#[test]
fn a_future_that_outlives_its_thread_does_not_hold_it_up() {
    let directory = disk_directory();
    let options = OpenOptions { cache: Cache::Direct, ..OpenOptions::default() };
    let path = directory.path().join("disk");
    for driver in DRIVERS {
        let storage = FileStorage::create(&path, BLOCK, Existing::Replace, &options).unwrap();
        let mut write = storage.write(0, pattern(1, BLOCK, 0), Durability::Fua);
        block_on_with(driver, async {
            assert!(futures_util::poll!(&mut write).is_pending());
        })
        .unwrap();
    }
}
