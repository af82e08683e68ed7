//! What faults and dropped futures leave of an image, on a storage in memory that fails, loses and delays as it is
//! told.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::Ordering;

use futures_util::FutureExt;

use super::create::{CreateOptions, create};
use super::test_memory::{Memory, lock};
use super::*;
use crate::storage::{Durability, Storage};

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("it waits for nothing")
}

fn image(cluster_bits: u32, refcount_order: u32, size: u64) -> Arc<Memory> {
    let memory = Memory::of(Vec::new());
    let options = CreateOptions { size, cluster_bits, refcount_order, ..CreateOptions::default() };
    let file = ImageFile::new(Arc::<Memory>::clone(&memory));
    now(create(&file, None, &options)).unwrap();
    memory
}

fn open(memory: &Arc<Memory>) -> Arc<Qcow2> {
    now(Qcow2::open(Arc::<Memory>::clone(memory), OpenOptions::default())).unwrap()
}

fn write(image: &Qcow2, offset: u64, data: Vec<u8>) -> io::Result<()> {
    now(image.write(offset, Bytes::from(data), Durability::Cached))
}

fn read(image: &Qcow2, offset: u64, len: usize) -> Vec<u8> {
    now(image.read(offset, Buffer::zeroed(len))).unwrap().to_vec()
}

#[test]
fn a_file_that_cannot_grow_fails_the_write_and_no_flush() {
    let memory = image(9, 6, 1 << 20);
    let image = open(&memory);
    // The next cluster after the last that there is room for would be a refcount block.
    let room = (memory.size() + (100 << 10)).next_multiple_of(64 << 9);
    memory.size_max.store(room, Ordering::SeqCst);
    let failed = (0..1 << 11).find(|cluster| write(&image, cluster << 9, vec![7; 512]).is_err());
    let failed = failed.expect("there is less room than the disk has");
    now(image.flush()).unwrap();
    now(image.close()).unwrap();
    let again = open(&memory);
    assert_eq!(read(&again, 0, usize_from(failed << 9)), vec![7; usize_from(failed << 9)]);
}

#[test]
fn a_new_table_that_a_failed_flush_has_lost_is_written_again() {
    let cluster = 16_u64 << 10;
    let memory = image(14, 4, 64 << 20);
    let image = open(&memory);
    // A cluster full of what is no table becomes free.
    write(&image, 0, vec![0xa5; usize_from(cluster)]).unwrap();
    now(image.flush()).unwrap();
    now(image.discard(ByteRange::from_bounds(0, cluster))).unwrap();
    now(image.flush()).unwrap();
    now(image.flush()).unwrap();
    // The first table of the other half of the disk comes there.
    write(&image, 32 << 20, vec![1; usize_from(cluster)]).unwrap();
    memory.loses.store(true, Ordering::SeqCst);
    assert!(now(image.flush()).is_err());
    now(image.flush()).unwrap();
    let again = open(&memory);
    assert_eq!(read(&again, 48 << 20, 4096), vec![0; 4096]);
}

#[test]
fn tables_that_were_lost_before_a_flush_that_succeeds_are_written_again() {
    let cluster = 64_u64 << 10;
    for losses in 1..5 {
        let memory = image(16, 4, 1 << 30);
        let image = open(&memory);
        for at in [0, 600 << 20] {
            write(&image, at, vec![1; usize_from(cluster)]).unwrap();
        }
        memory.silent_losses_ahead.store(losses, Ordering::SeqCst);
        now(image.flush()).unwrap();
        // As a mirror does it: what was not flushed, once more; in place, so no table changes.
        for at in [0, 600 << 20] {
            write(&image, at, vec![1; usize_from(cluster)]).unwrap();
        }
        now(image.flush()).unwrap();
        memory.lose_silently();
        let again = open(&memory);
        for at in [0, 600 << 20] {
            assert!(
                read(&again, at, usize_from(cluster)) == vec![1; usize_from(cluster)],
                "{losses} at {at}"
            );
        }
    }
}

#[test]
fn a_storage_that_loses_at_each_flush_fails_the_flush_in_the_end() {
    let memory = image(16, 4, 1 << 20);
    let image = open(&memory);
    write(&image, 0, vec![1; 1 << 16]).unwrap();
    memory.silent_losses_ahead.store(u64::MAX, Ordering::SeqCst);
    let error = now(image.flush()).unwrap_err();
    assert!(error.to_string().contains("lost"), "{error}");
    memory.silent_losses_ahead.store(0, Ordering::SeqCst);
    write(&image, 0, vec![1; 1 << 16]).unwrap();
    now(image.flush()).unwrap();
    assert_eq!(read(&open(&memory), 0, 1 << 16), vec![1; 1 << 16]);
}

#[test]
fn a_loss_between_two_commits_changes_nothing_but_where_older_data_was_copied() {
    for is_adrift in [false, true] {
        let memory = image(16, 4, 1 << 20);
        let image = open(&memory);
        // As where what is written shares a block of the file with older data.
        image.lock().has_blocks = is_adrift;
        memory.lose_silently();
        write(&image, 0, vec![1; 1 << 16]).unwrap();
        now(image.flush()).unwrap();
        write(&image, 1 << 16, vec![1; 1 << 16]).unwrap();
        memory.lose_silently();
        assert_eq!(now(image.flush()).is_err(), is_adrift);
    }
}

#[test]
fn a_durable_write_that_was_lost_before_its_flush_fails() {
    let memory = image(16, 4, 1 << 20);
    let image = open(&memory);
    let durably = || now(image.write(0, Bytes::from(vec![1; 1 << 16]), Durability::Fua));
    memory.silent_losses_ahead.store(1, Ordering::SeqCst);
    assert!(durably().is_err());
    durably().unwrap();
    assert_eq!(read(&open(&memory), 0, 1 << 16), vec![1; 1 << 16]);
}

#[test]
fn after_a_commit_that_was_dropped_while_it_wrote_tables_there_is_no_other() {
    let memory = image(16, 4, 1 << 20);
    let image = open(&memory);
    write(&image, 0, vec![1; 512]).unwrap();
    memory.is_slow.store(true, Ordering::SeqCst);
    let mut flush = Box::pin(image.flush());
    assert!(flush.as_mut().now_or_never().is_none());
    drop(flush);
    memory.is_slow.store(false, Ordering::SeqCst);
    let refused = now(image.flush()).unwrap_err();
    assert!(refused.to_string().contains("has to be opened again"), "{refused}");
    assert_eq!(read(&image, 0, 512), vec![1; 512]);
}

#[test]
fn a_commit_that_was_dropped_before_it_wrote_leaves_it_to_the_next() {
    let memory = image(16, 4, 1 << 20);
    let image = open(&memory);
    write(&image, 0, vec![1; 512]).unwrap();
    drop(image.flush());
    now(image.flush()).unwrap();
    assert_eq!(read(&open(&memory), 0, 512), vec![1; 512]);
}

#[test]
fn where_a_dropped_write_may_land_nobody_else_writes() {
    let cluster = 1_u64 << 16;
    let memory = image(16, 4, 16 * cluster);
    let image = open(&memory);
    write(&image, 0, vec![1; usize_from(cluster)]).unwrap();
    now(image.flush()).unwrap();
    memory.is_slow.store(true, Ordering::SeqCst);
    let mut dropped = image.write(0, Bytes::from(vec![9; 512]), Durability::Cached);
    assert!((&mut dropped).now_or_never().is_none());
    drop(dropped);
    memory.is_slow.store(false, Ordering::SeqCst);
    now(image.discard(ByteRange::from_bounds(0, cluster))).unwrap();
    now(image.flush()).unwrap();
    now(image.flush()).unwrap();
    for other in 1..4 {
        write(&image, other * cluster, vec![2; usize_from(cluster)]).unwrap();
    }
    memory.land();
    assert_eq!(read(&image, cluster, usize_from(3 * cluster)), vec![2; usize_from(3 * cluster)]);
}

#[test]
fn counts_behind_the_files_end_are_passed_over_when_the_refcount_table_grows() {
    let memory = image(9, 6, 4 << 20);
    let first = open(&memory);
    // The table that the image was made with counts 2 MiB.
    let full = (0..4096).find(|cluster| {
        write(&first, cluster << 9, vec![3; 512]).unwrap();
        first.lock().used_end == 4096
    });
    let full = full.expect("it is full before the disk is");
    now(first.close()).unwrap();
    drop(first);
    lock(&memory.bytes).truncate(4090 << 9);
    let again = open(&memory);
    for cluster in full + 1..full + 200 {
        write(&again, cluster << 9, vec![4; 512]).unwrap();
    }
    now(again.close()).unwrap();
    assert!(memory.size() > 2 << 20);
    assert_eq!(again.corruption(), None);
}
