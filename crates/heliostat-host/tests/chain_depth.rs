//! How much stack requests take that go down a long chain of images.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::create::{CreateOptions, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, OpenOptions};
use heliostat_host::runtime::{STACK, block_on};

const SIZE: u64 = 1 << 20;

fn storage(path: &Path) -> Arc<dyn Storage> {
    let options = OpenOptions { access: Access::ReadWrite, ..OpenOptions::default() };
    Arc::new(FileStorage::open(path, &options).unwrap())
}

/// A chain of so many images; the lowest is full of sevens.
async fn chain(folder: &Path, images: usize) -> Arc<Node> {
    let mut below: Option<Arc<Node>> = None;
    for number in 0..images {
        let path = folder.join(number.to_string());
        std::fs::write(&path, []).unwrap();
        let storage = storage(&path);
        let backing_file = below.is_some().then(|| b"below".to_vec());
        let backing_format = below.is_some().then(|| b"qcow2".to_vec());
        let options = CreateOptions { size: SIZE, backing_file, backing_format, ..CreateOptions::default() };
        create(&ImageFile::new(Arc::clone(&storage)), None, &options).await.unwrap();
        let options = ImageOptions { backing: below.take(), ..ImageOptions::default() };
        let driver = Driver::Qcow2(Qcow2::open(storage, options).await.unwrap());
        let options = NodeOptions { discard: Discard::Unmap, ..NodeOptions::default() };
        let node = Node::new(NodeName::generated(0), driver, options, Arc::new(RealClock::new()));
        if number == 0 {
            let data = Bytes::from(vec![7; usize_from(SIZE)]);
            node.enter().await.write(0, data, Durability::Cached).await.unwrap();
        }
        below = Some(node);
    }
    below.unwrap()
}

/// Every kind of request, on ranges that nothing but the lowest image holds.
async fn requests(node: &Arc<Node>) {
    let tracked = node.enter().await;
    let read = tracked.read(5, Buffer::zeroed(100_000)).await.unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
    let whole = ByteRange::from_bounds(0, SIZE);
    assert!(!tracked.extents(whole).await.unwrap().is_empty());
    assert!(!node.map(whole).await.unwrap().is_empty());
    // Both copy what is around them.
    tracked.write(70_000, Bytes::from_static(&[1; 100]), Durability::Fua).await.unwrap();
    let part = ByteRange::from_bounds(140_000, 140_100);
    let (space, effort) = (ZeroSpace::MayUnmap, ZeroEffort::Any);
    tracked.write_zeroes(part, space, effort, Durability::Cached).await.unwrap();
    tracked.discard(ByteRange::from_bounds(1 << 19, SIZE)).await.unwrap();
    tracked.flush().await.unwrap();
}

#[test]
fn requests_through_the_longest_chain_fit_into_a_thread() {
    let Some(folder) = common::memory_directory() else { return };
    // To measure what they need: so many bytes.
    let stack = std::env::var("HELIOSTAT_STACK").ok().and_then(|text| text.parse().ok()).unwrap_or(STACK / 2);
    let thread = std::thread::Builder::new().stack_size(stack).spawn(move || {
        block_on(async {
            let node = chain(folder.path(), 200).await;
            requests(&node).await;
        })
        .unwrap();
    });
    thread.unwrap().join().unwrap();
}
