//! Allocating writes wait for the storage as often as writes in place do, and not for each other: counted in the time
//! of a storage each of whose calls takes 2 ms, however many there are at once.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::qcow2::check::{CheckOptions, check};
use heliostat_block::driver::qcow2::create::{CreateOptions, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::driver::{Driver, Preallocation};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::storage::{Durability, Storage};

#[path = "../../../fuzz/harness/memory.rs"]
mod memory;

use memory::{MemoryStorage, StandingClock};

/// The writes, and the length of each.
const WRITES: u64 = 64;
const LEN: u64 = 64 << 10;

async fn write_all(node: &Arc<Node>, from: u64) {
    let writes = (0..WRITES).map(|index| async move {
        let data = Bytes::from(vec![1; usize_from(LEN)]);
        node.enter().await.write(from + index * LEN, data, Durability::Cached).await.unwrap();
    });
    join_all(writes).await;
}

#[test]
fn writes_that_allocate_take_at_most_three_times_the_time_of_writes_in_place() {
    let storage = MemoryStorage::slow();
    let as_storage = || -> Arc<dyn Storage> { Arc::<MemoryStorage>::clone(&storage) };
    let options = CreateOptions { size: 1 << 30, ..CreateOptions::default() };
    storage.ticks(create(&ImageFile::new(as_storage()), None, &options)).1.unwrap();
    let image = storage.ticks(Qcow2::open(as_storage(), OpenOptions::default())).1.unwrap();
    let node = Node::new(
        NodeName::generated(0),
        Driver::Qcow2(image),
        NodeOptions::default(),
        Arc::new(StandingClock),
    );
    let (first, ()) = storage.ticks(write_all(&node, 0));
    let (in_place, ()) = storage.ticks(write_all(&node, 0));
    let (allocating, ()) = storage.ticks(write_all(&node, WRITES * LEN));
    assert_eq!(in_place, 1, "all at once");
    assert!(allocating <= 3, "{allocating} ticks, with the tables in memory");
    // The very first also loads counts, makes a table and lets the file grow.
    assert!(first <= 5, "{first} ticks, from nothing");
}

#[test]
fn a_check_reads_many_tables_at_once() {
    let storage = MemoryStorage::slow();
    let as_storage = || -> Arc<dyn Storage> { Arc::<MemoryStorage>::clone(&storage) };
    // 256 tables, whose 16,384 clusters are counted in 67 blocks.
    let (size, preallocation) = (8 << 20, Preallocation::Metadata);
    let options = CreateOptions { size, cluster_bits: 9, preallocation, ..CreateOptions::default() };
    storage.ticks(create(&ImageFile::new(as_storage()), None, &options)).1.unwrap();
    let (took, report) = storage.ticks(async {
        let file = ImageFile::new(as_storage());
        check(&file, CheckOptions::default()).await
    });
    let report = report.unwrap();
    assert!(report.is_clean());
    assert_eq!(report.allocated_clusters, 16_384);
    // The blocks are read once for flags, one by one, and once for counts.
    assert!(took <= 150, "{took} ticks");
}
