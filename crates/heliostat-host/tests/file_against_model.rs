//! Random operations on a file or a device, beside the same ones on a plain vector of bytes.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{DRIVERS, LoopDevice, contents, disk_directory, memory_directory, pattern};
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ExtentStatus, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Cache, Discard, Existing, OpenOptions};
use heliostat_host::runtime::{Driver, block_on_with};
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestRunner};

/// Not a multiple of anything, so that the end lies in the middle of a block; longer than what is done inline.
const SIZE: u64 = (1 << 20) + (300 << 10) + 777;

/// A device has whole blocks.
const DEVICE_SIZE: u64 = (1 << 20) + (300 << 10);

#[derive(Clone, Debug)]
enum Operation {
    Write { at: u64, len: u64, seed: u64, skew: usize, durability: Durability },
    Zero { at: u64, len: u64, space: ZeroSpace, effort: ZeroEffort, durability: Durability },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Extents { at: u64, len: u64 },
    Flush,
    Writeback { at: u64, len: u64 },
}

fn operation() -> impl Strategy<Value = Operation> {
    let at = || 0..SIZE;
    let len = || prop_oneof![4 => 0..20_000_u64, 1 => 0..SIZE];
    let durability = || prop_oneof![9 => Just(Durability::Cached), 1 => Just(Durability::Fua)];
    let space = prop_oneof![Just(ZeroSpace::MayUnmap), Just(ZeroSpace::Keep)];
    let effort = prop_oneof![Just(ZeroEffort::Any), Just(ZeroEffort::FastOnly)];
    let skew = prop_oneof![Just(0_usize), Just(1), Just(512)];
    prop_oneof![
        4 => (at(), len(), any::<u64>(), skew, durability()).prop_map(
            |(at, len, seed, skew, durability)| Operation::Write { at, len, seed, skew, durability }
        ),
        2 => (at(), len(), space, effort, durability()).prop_map(
            |(at, len, space, effort, durability)| Operation::Zero { at, len, space, effort, durability }
        ),
        1 => (at(), len()).prop_map(|(at, len)| Operation::Discard { at, len }),
        3 => (at(), len()).prop_map(|(at, len)| Operation::Read { at, len }),
        2 => (at(), len()).prop_map(|(at, len)| Operation::Extents { at, len }),
        1 => Just(Operation::Flush),
        1 => (at(), len()).prop_map(|(at, len)| Operation::Writeback { at, len }),
    ]
}

/// Cuts a range to what `storage` takes: inside of it, and of whole blocks unless it ends where that does.
fn fit(storage: &FileStorage, at: u64, len: u64) -> ByteRange {
    let (size, block) = (storage.size(), u64::from(storage.traits().block_size));
    let start = at.min(size) / block * block;
    let end = (start + len).min(size);
    let end = if end == size { end } else { end / block * block };
    ByteRange::from_bounds(start, end.max(start))
}

fn part(model: &mut [u8], range: ByteRange) -> &mut [u8] {
    &mut model[usize_from(range.offset())..usize_from(range.end())]
}

async fn read(storage: &FileStorage, range: ByteRange) -> Buffer {
    storage.read(range.offset(), Buffer::copy_of(&vec![0xee; usize_from(range.len())])).await.unwrap()
}

async fn step(storage: &FileStorage, model: &mut [u8], operation: Operation) {
    match operation {
        Operation::Write { at, len, seed, skew, durability } => {
            let range = fit(storage, at, len);
            let data = pattern(seed, range.len(), skew);
            part(model, range).copy_from_slice(&data);
            storage.write(range.offset(), data, durability).await.unwrap();
        }
        Operation::Zero { at, len, space, effort, durability } => {
            let range = fit(storage, at, len);
            match storage.write_zeroes(range, space, effort, durability).await {
                Ok(()) => part(model, range).fill(0),
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
                    assert_eq!(effort, ZeroEffort::FastOnly);
                    assert!(*read(storage, range).await == *part(model, range), "nothing has changed");
                }
            }
        }
        Operation::Discard { at, len } => {
            let range = fit(storage, at, len);
            storage.discard(range).await.unwrap();
            let now = read(storage, range).await;
            for (byte, old) in now.iter().zip(part(model, range)) {
                assert!(*byte == 0 || *byte == *old);
                *old = *byte;
            }
        }
        Operation::Read { at, len } => {
            let range = fit(storage, at, len);
            assert!(*read(storage, range).await == *part(model, range), "{range}");
        }
        Operation::Extents { at, len } => check_extents(storage, model, fit(storage, at, len)).await,
        Operation::Flush => storage.flush().await.unwrap(),
        Operation::Writeback { at, len } => storage.start_writeback(fit(storage, at, len)),
    }
}

/// Extents cover the range, in order, and what they call a hole reads as zeroes.
async fn check_extents(storage: &FileStorage, model: &mut [u8], range: ByteRange) {
    let mut at = range.offset();
    while at < range.end() {
        let extents = storage.extents(ByteRange::from_bounds(at, range.end())).await.unwrap();
        assert!(!extents.is_empty());
        for extent in extents {
            assert_eq!(extent.range.offset(), at);
            assert!(!extent.range.is_empty() && extent.range.end() <= range.end());
            if extent.status != ExtentStatus::Data {
                assert!(part(model, extent.range).iter().all(|byte| *byte == 0), "{}", extent.range);
            }
            at = extent.range.end();
        }
    }
}

fn check(driver: Driver, operations: Vec<Operation>, open: impl Fn() -> FileStorage) {
    block_on_with(driver, async {
        let storage = open();
        let mut model = contents(&storage).await;
        for operation in operations {
            step(&storage, &mut model, operation).await;
        }
        assert!(contents(&storage).await == model);
        check_extents(&storage, &mut model, ByteRange::from_bounds(0, storage.size())).await;
    })
    .unwrap();
}

fn options(cache: Cache, discard: Discard) -> OpenOptions {
    OpenOptions { cache, discard, ..OpenOptions::default() }
}

/// Seeds of cases that failed once; they are tried first.
const REGRESSIONS: &str = "tests/file_against_model.proptest-regressions";

fn run(cases: u32, test: impl Fn(Driver, Cache, Vec<Operation>)) {
    let operations = proptest::collection::vec(operation(), 1..40);
    for driver in DRIVERS {
        for cache in [Cache::Page, Cache::Direct] {
            let config = ProptestConfig {
                failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
                ..ProptestConfig::with_cases(cases)
            };
            let result = TestRunner::new(config).run(&operations, |operations| {
                test(driver, cache, operations);
                Ok(())
            });
            if let Err(error) = result {
                panic!("with {driver} and {cache:?}: {error}");
            }
        }
    }
}

fn check_files_in(directory: &std::path::Path, cases: u32) {
    let path = directory.join("disk");
    run(cases, |driver, cache, operations| {
        for discard in [Discard::Ignore, Discard::Unmap] {
            let options = options(cache, discard);
            check(driver, operations.clone(), || {
                FileStorage::create(&path, SIZE, Existing::Replace, &options).unwrap()
            });
            assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE, "its length never changes");
        }
    });
}

#[test]
fn a_file_in_memory_does_as_the_model() {
    if let Some(directory) = memory_directory() {
        check_files_in(directory.path(), 24);
    }
}

#[test]
fn a_file_on_disk_does_as_the_model() {
    check_files_in(disk_directory().path(), 12);
}

#[test]
fn a_block_device_does_as_the_model() {
    let directory = disk_directory();
    for block in [512, 4096] {
        let Some(device) = LoopDevice::new(directory.path(), DEVICE_SIZE, block) else { return };
        run(8, |driver, cache, operations| {
            let options = options(cache, Discard::Unmap);
            check(driver, operations, || {
                let storage = FileStorage::open(&device.path, &options).unwrap();
                assert_eq!(storage.traits().block_size, if cache == Cache::Direct { block } else { 1 });
                storage
            });
        });
    }
}
