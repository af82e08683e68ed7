//! Holes, zeroes, discards and full disks: what is said about space, and what it costs.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{DRIVERS, LoopDevice, SmallFileSystem, contents, disk_directory, memory_directory, pattern};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Extent, ExtentStatus, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Cache, Discard, Existing, OpenOptions};
use heliostat_host::runtime::{block_on, block_on_with};

const MIB: u64 = 1 << 20;

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn create(path: &Path, size: u64, options: &OpenOptions) -> FileStorage {
    FileStorage::create(path, size, Existing::Replace, options).unwrap()
}

async fn write(storage: &FileStorage, offset: u64, len: u64) {
    storage.write(offset, pattern(offset, len, 0), Durability::Cached).await.unwrap();
}

async fn all_extents(storage: &FileStorage) -> Vec<Extent> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < storage.size() {
        all.extend(storage.extents(ByteRange::from_bounds(at, storage.size())).await.unwrap());
        at = all.last().unwrap().range.end();
    }
    all
}

fn both_directories() -> Vec<tempfile::TempDir> {
    [Some(disk_directory()), memory_directory()].into_iter().flatten().collect()
}

#[test]
fn data_and_holes_are_told_apart() {
    for directory in both_directories() {
        let storage = create(&directory.path().join("disk"), 8 * MIB, &OpenOptions::default());
        block_on(async {
            write(&storage, MIB, MIB).await;
            write(&storage, 5 * MIB, 3 * MIB).await;
            let (data, hole) = (ExtentStatus::Data, ExtentStatus::Hole);
            let expected = [(0, 1, hole), (1, 1, data), (2, 3, hole), (5, 3, data)]
                .map(|(at, len, status)| Extent { range: range(at * MIB, len * MIB), status });
            assert_eq!(all_extents(&storage).await, expected);
            let part = storage.extents(range(MIB + 5, 10)).await.unwrap();
            assert_eq!(part, [Extent { range: range(MIB + 5, 10), status: data }]);
            // It remembers this, and must not for longer than it is true.
            storage.extents(range(5 * MIB, 3 * MIB)).await.unwrap();
            storage
                .write_zeroes(range(5 * MIB, MIB), ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Cached)
                .await
                .unwrap();
            let part = storage.extents(range(5 * MIB, 3 * MIB)).await.unwrap();
            assert_eq!(part[0], Extent { range: range(5 * MIB, MIB), status: hole }, "a new hole is seen");
        })
        .unwrap();
    }
}

#[test]
fn a_huge_sparse_file_is_told_in_a_few_calls_and_little_time() {
    for directory in both_directories() {
        let storage = create(&directory.path().join("disk"), 1 << 40, &OpenOptions::default());
        block_on(async {
            for n in 0..256 {
                write(&storage, n * (1 << 32), 64 << 10).await;
            }
            let began = Instant::now();
            let extents = all_extents(&storage).await;
            assert_eq!(extents.len(), 512);
            // Some milliseconds in truth; a bound that only a walk over the holes would break.
            assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        })
        .unwrap();
    }
}

#[test]
fn asking_for_a_dense_file_in_small_steps_walks_it_once() {
    let Some(directory) = memory_directory() else { return };
    let storage = create(&directory.path().join("disk"), 64 * MIB, &OpenOptions::default());
    block_on(async {
        for piece in range(0, 64 * MIB).pieces(MIB) {
            write(&storage, piece.offset(), piece.len()).await;
        }
        let first = storage.extents(range(0, 4096)).await.unwrap();
        for piece in range(0, 64 * MIB).pieces(4096) {
            let mut asked = storage.extents(piece);
            let answer = futures_util::poll!(&mut asked);
            let std::task::Poll::Ready(Ok(extents)) = answer else { panic!("asked the kernel again") };
            assert_eq!(extents, [Extent { range: piece, status: first[0].status }]);
        }
    })
    .unwrap();
}

#[test]
fn zeroing_gives_space_back_only_where_it_may() {
    for directory in both_directories() {
        for cache in [Cache::Page, Cache::Direct] {
            let options = OpenOptions { cache, ..OpenOptions::default() };
            let storage = create(&directory.path().join("disk"), 8 * MIB, &options);
            assert!(storage.traits().can_zero_fast);
            block_on(async {
                write(&storage, 0, 8 * MIB).await;
                storage.flush().await.unwrap();
                let full = storage.allocated_size().unwrap();
                assert!(full >= 8 * MIB);
                let whole = range(0, 4 * MIB);
                storage.write_zeroes(whole, ZeroSpace::Keep, ZeroEffort::Any, Durability::Fua).await.unwrap();
                assert!(storage.allocated_size().unwrap() >= full);
                storage
                    .write_zeroes(whole, ZeroSpace::MayUnmap, ZeroEffort::FastOnly, Durability::Cached)
                    .await
                    .unwrap();
                assert!(storage.allocated_size().unwrap() <= full - 4 * MIB);
                assert!(contents(&storage).await[..4 << 20].iter().all(|byte| *byte == 0));
            })
            .unwrap();
        }
    }
}

#[test]
fn a_discard_gives_space_back_when_it_was_asked_to() {
    for directory in both_directories() {
        for discard in [Discard::Ignore, Discard::Unmap] {
            let options = OpenOptions { discard, ..OpenOptions::default() };
            let storage = create(&directory.path().join("disk"), 4 * MIB, &options);
            assert_eq!(storage.traits().can_discard, discard == Discard::Unmap);
            block_on(async {
                write(&storage, 0, 4 * MIB).await;
                storage.flush().await.unwrap();
                let full = storage.allocated_size().unwrap();
                storage.discard(range(0, 4 * MIB)).await.unwrap();
                let now = storage.allocated_size().unwrap();
                if discard == Discard::Unmap { assert_eq!(now, 0) } else { assert_eq!(now, full) }
            })
            .unwrap();
        }
    }
}

#[test]
fn zeroing_and_discarding_a_device_reach_what_lies_below() {
    let directory = disk_directory();
    for block in [512, 4096] {
        let Some(device) = LoopDevice::new(directory.path(), 4 * MIB, block) else { return };
        let options = OpenOptions { discard: Discard::Unmap, ..OpenOptions::default() };
        let storage = FileStorage::open(&device.path, &options).unwrap();
        assert!(storage.is_device() && storage.traits().can_discard && storage.traits().can_zero_fast);
        assert_eq!(storage.allocated_size(), None);
        let below = || {
            let metadata = std::fs::metadata(directory.path().join(format!("backing-{block}"))).unwrap();
            std::os::linux::fs::MetadataExt::st_blocks(&metadata) * 512
        };
        block_on(async {
            write(&storage, 0, 4 * MIB).await;
            storage.flush().await.unwrap();
            assert!(below() >= 4 * MIB);
            // Neither end on a block.
            let zeroed = range(777, 2 * MIB);
            storage
                .write_zeroes(zeroed, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Fua)
                .await
                .unwrap();
            assert!(below() <= 2 * MIB + 8192, "{}", below());
            storage.discard(range(2 * MIB + 8192, MIB)).await.unwrap();
            assert!(below() <= MIB + 16384, "{}", below());
            let now = contents(&storage).await;
            assert!(now[777..(2 << 20) + 777].iter().all(|byte| *byte == 0));
            assert!(now[..777].iter().all(|byte| *byte != 0));
        })
        .unwrap();
    }
}

#[test]
fn a_full_disk_is_said_as_such_and_loses_nothing_written_before() {
    for place in [SmallFileSystem::tmpfs(), SmallFileSystem::ext4()].into_iter().flatten() {
        for driver in DRIVERS {
            for cache in [Cache::Page, Cache::Direct] {
                // Inline and by the ring.
                for len in [64 << 10, MIB] {
                    let options = OpenOptions { cache, ..OpenOptions::default() };
                    let storage = create(&place.path.join("disk"), 64 * MIB, &options);
                    block_on_with(driver, fill(&storage, len)).unwrap();
                    drop(storage);
                    std::fs::remove_file(place.path.join("disk")).unwrap();
                }
            }
        }
    }
}

async fn fill(storage: &FileStorage, len: u64) {
    let mut written = 0;
    let error = loop {
        match storage.write(written, pattern(written, len, 0), Durability::Cached).await {
            Ok(()) => written += len,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    assert!(written > 0);
    for piece in range(0, written).pieces(len) {
        let buffer = heliostat_block::buffer::Buffer::zeroed(usize::try_from(len).unwrap());
        assert!(*storage.read(piece.offset(), buffer).await.unwrap() == *pattern(piece.offset(), len, 0));
    }
    // Space that was given back can be used again.
    let first = range(0, len);
    storage.write_zeroes(first, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Fua).await.unwrap();
    write(storage, 0, len / 2).await;
}

#[test]
fn writing_past_the_largest_file_is_an_error_of_its_own() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    limit.current = Some(MIB);
    // In a process of its own, since the limit is the process's.
    if std::env::var_os("HELIOSTAT_TEST_FSIZE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writing_past_the_largest_file_is_an_error_of_its_own"])
            .env("HELIOSTAT_TEST_FSIZE", "1")
            .output()
            .unwrap();
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
        return;
    }
    let directory = disk_directory();
    let path = directory.path().join("disk");
    let storage = create(&path, 4 * MIB, &OpenOptions::default());
    let _signals = heliostat_host::signal::Signals::install().unwrap();
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    block_on(async {
        let error = storage.write(2 * MIB, pattern(1, 512, 0), Durability::Cached).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
    })
    .unwrap();
}

/// Bytes of a file that are in the page cache.
fn cached(path: &Path) -> Option<u64> {
    let arguments = ["--bytes", "--noheadings", "--output", "RES", path.to_str().unwrap()];
    match common::run("fincore", &arguments) {
        Ok(text) => text.trim().parse().ok(),
        Err(error) => {
            common::skipped(&error);
            None
        }
    }
}

#[test]
fn writeback_drops_from_the_cache_what_lies_behind() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    let storage = create(&path, 96 * MIB, &OpenOptions::default());
    let data = pattern(1, MIB, 0);
    block_on(async {
        for piece in range(0, 96 * MIB).pieces(MIB) {
            storage.write(piece.offset(), data.clone(), Durability::Cached).await.unwrap();
            storage.start_writeback(piece);
        }
    })
    .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Some(bytes) = cached(&path) {
        // 64 MiB may be under way, in pieces of 8.
        if bytes <= 72 * MIB {
            return;
        }
        assert!(Instant::now() < deadline, "{bytes} bytes are still there");
        std::thread::yield_now();
    }
}
