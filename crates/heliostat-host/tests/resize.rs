//! Files that are made longer and shorter while they are open.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use common::{DRIVERS, LoopDevice, contents, disk_directory, memory_directory, pattern};
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::{Driver, Raw};
use heliostat_block::error::ErrorKind as BlockErrorKind;
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ExtentStatus, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Cache, Existing, OpenOptions};
use heliostat_host::runtime::{block_on, block_on_with};

const MIB: u64 = 1 << 20;

fn create(path: &Path, size: u64, cache: Cache) -> FileStorage {
    let options = OpenOptions { cache, ..OpenOptions::default() };
    FileStorage::create(path, size, Existing::Replace, &options).unwrap()
}

async fn write(storage: &FileStorage, offset: u64, len: u64) {
    storage.write(offset, pattern(offset, len, 0), Durability::Cached).await.unwrap();
}

async fn read(storage: &FileStorage, offset: u64, len: u64) -> Buffer {
    storage.read(offset, Buffer::copy_of(&vec![0xee; usize_from(len)])).await.unwrap()
}

/// Runs `test` with a fresh file of `size` bytes on every kind of file system, in both ways, with both drivers.
fn everywhere(size: u64, test: impl AsyncFn(&FileStorage, &Path)) {
    for directory in [Some(disk_directory()), memory_directory()].into_iter().flatten() {
        let path = directory.path().join("disk");
        for cache in [Cache::Page, Cache::Direct] {
            for driver in DRIVERS {
                let storage = create(&path, size, cache);
                assert!(storage.traits().can_resize);
                block_on_with(driver, test(&storage, &path)).unwrap();
            }
        }
    }
}

#[test]
fn what_a_file_grows_by_reads_as_zeroes_and_can_be_written() {
    everywhere(MIB, async |storage, path| {
        write(storage, 0, MIB).await;
        storage.set_size(3 * MIB).await.unwrap();
        assert_eq!(storage.size(), 3 * MIB);
        assert_eq!(std::fs::metadata(path).unwrap().len(), 3 * MIB);
        assert!(*read(storage, 0, MIB).await == *pattern(0, MIB, 0));
        assert!(read(storage, MIB, 2 * MIB).await.is_zero());
        let grown = ByteRange::from_bounds(MIB, 3 * MIB);
        let extents = storage.extents(grown).await.unwrap();
        assert_eq!(extents[0].status, ExtentStatus::Hole);
        write(storage, 2 * MIB, MIB).await;
        storage.flush().await.unwrap();
        assert!(read(storage, MIB, MIB).await.is_zero());
        assert!(*read(storage, 2 * MIB, MIB).await == *pattern(2 * MIB, MIB, 0));
        let all = ByteRange::from_bounds(0, 3 * MIB);
        storage.write_zeroes(all, ZeroSpace::MayUnmap, ZeroEffort::Any, Durability::Fua).await.unwrap();
        assert!(contents(storage).await.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_file_that_shrinks_gives_space_back_and_what_was_there_does_not_return() {
    everywhere(4 * MIB, async |storage, path| {
        write(storage, 0, 4 * MIB).await;
        storage.flush().await.unwrap();
        let full = storage.allocated_size().unwrap();
        // In the middle of a block.
        storage.set_size(MIB + 777).await.unwrap();
        assert_eq!((storage.size(), std::fs::metadata(path).unwrap().len()), (MIB + 777, MIB + 777));
        assert!(storage.allocated_size().unwrap() <= full - 3 * MIB + 8192);
        let error = storage.read(MIB + 776, Buffer::zeroed(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "beyond the new end");
        assert!(storage.write(2 * MIB, pattern(1, 4096, 0), Durability::Cached).await.is_err());
        storage.set_size(4 * MIB).await.unwrap();
        let now = contents(storage).await;
        assert!(now[..usize_from(MIB + 777)] == pattern(0, 4 * MIB, 0)[..usize_from(MIB + 777)]);
        assert!(now[usize_from(MIB + 777)..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn lengths_in_the_middle_of_a_block_come_and_go() {
    everywhere(0, async |storage, _| {
        let mut model = Vec::new();
        for (round, size) in (0_u64..).zip([777, 5000, 4096, 70_000, 69_632, 70_001, 4097, 300_000, 0, 512]) {
            storage.set_size(size).await.unwrap();
            model.resize(usize_from(size), 0);
            let block = u64::from(storage.traits().block_size);
            // The last blocks, to the very end; and all of it.
            for start in [size.saturating_sub(9000) / block * block, 0] {
                let data = pattern(round + start, size - start, 1);
                model[usize_from(start)..].copy_from_slice(&data);
                storage.write(start, data, Durability::Cached).await.unwrap();
                assert!(*read(storage, start, size - start).await == model[usize_from(start)..]);
            }
            assert!(contents(storage).await == model, "round {round}");
        }
    });
}

#[test]
fn requests_go_on_while_a_file_grows_over_its_tail() {
    everywhere(4096 + 777, async |storage, _| {
        let sizes = [8192, 8192 + 1, 12_288, 65_536 + 9, 131_072];
        let grow = async {
            for size in sizes {
                storage.set_size(size).await.unwrap();
            }
        };
        let others = async {
            for seed in 0..40 {
                storage.write(0, pattern(seed, 4096, 0), Durability::Cached).await.unwrap();
                assert!(*read(storage, 0, 4096).await == *pattern(seed, 4096, 0));
                // Made for the end that it had; the file may be longer now.
                assert!(read(storage, 4096, 777).await.is_zero());
            }
        };
        futures_util::future::join(grow, others).await;
        assert_eq!(storage.size(), 131_072);
        assert!(read(storage, 4096, 131_072 - 4096).await.is_zero());
    });
}

#[test]
fn changes_of_length_take_turns() {
    everywhere(0, async |storage, path| {
        let changes = (1..=32_u64).map(|n| storage.set_size(n * 1000));
        for result in futures_util::future::join_all(changes).await {
            result.unwrap();
        }
        assert_eq!(storage.size(), std::fs::metadata(path).unwrap().len());
    });
}

#[test]
fn a_change_whose_future_is_dropped_leaves_a_size_that_is_true() {
    everywhere(MIB, async |storage, path| {
        for size in [2 * MIB, 777, 4096] {
            let mut change = storage.set_size(size);
            let _ = futures_util::poll!(&mut change);
            drop(change);
            // Waits for its turn, and so for the one that nobody awaits.
            storage.set_size(size + 512).await.unwrap();
            assert_eq!(storage.size(), size + 512);
            assert_eq!(std::fs::metadata(path).unwrap().len(), size + 512);
        }
    });
}

#[test]
fn a_length_that_cannot_be_is_refused_and_changes_nothing() {
    everywhere(5000, async |storage, path| {
        write(storage, 0, 5000).await;
        let error = storage.set_size(u64::MAX).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        assert_eq!((storage.size(), std::fs::metadata(path).unwrap().len()), (5000, 5000));
        assert!(*contents(storage).await == *pattern(0, 5000, 0));
    });
}

#[test]
fn what_may_not_be_written_keeps_its_length() {
    let directory = disk_directory();
    let path = directory.path().join("disk");
    std::fs::write(&path, [1; 1000]).unwrap();
    let options = OpenOptions { access: Access::ReadOnly, ..OpenOptions::default() };
    let storage = FileStorage::open(&path, &options).unwrap();
    assert!(!storage.traits().can_resize);
    let error = block_on(async { storage.set_size(2000).await.unwrap_err() }).unwrap();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!((storage.size(), std::fs::metadata(&path).unwrap().len()), (1000, 1000));
}

#[test]
fn a_block_device_keeps_its_length() {
    let directory = disk_directory();
    let Some(device) = LoopDevice::new(directory.path(), MIB, 512) else { return };
    let storage = FileStorage::open(&device.path, &OpenOptions::default()).unwrap();
    assert!(!storage.traits().can_resize);
    for size in [0, 2 * MIB] {
        let error = block_on(async { storage.set_size(size).await.unwrap_err() }).unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    assert_eq!(storage.size(), MIB);
}

#[test]
fn a_node_keeps_the_size_that_it_was_made_with() {
    let directory = disk_directory();
    for cache in [Cache::Page, Cache::Direct] {
        let storage = Arc::new(create(&directory.path().join("disk"), MIB + 777, cache));
        let below: Arc<dyn Storage> = storage.clone();
        let driver = Driver::Raw(Raw::whole(below));
        let name = NodeName::new("disk0").unwrap();
        let node = Node::new(name, driver, NodeOptions::default(), Arc::new(RealClock::new()));
        block_on(async {
            storage.set_size(2 * MIB).await.unwrap();
            assert_eq!(node.size(), MIB + 777);
            let tracked = node.enter().await;
            let error = tracked.write(MIB + 776, pattern(1, 2, 0), Durability::Cached).await.unwrap_err();
            assert_eq!(error.kind(), BlockErrorKind::InvalidRequest);
            assert!(tracked.read(MIB + 777, Buffer::zeroed(1)).await.is_err());
            tracked.write(MIB + 770, pattern(1, 7, 0), Durability::Cached).await.unwrap();
            assert!(*tracked.read(MIB + 770, Buffer::zeroed(7)).await.unwrap() == *pattern(1, 7, 0));
            assert!(read(&storage, MIB + 4096, MIB - 4096).await.is_zero());
        })
        .unwrap();
    }
}
