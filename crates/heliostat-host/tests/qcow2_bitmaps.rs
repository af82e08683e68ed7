//! Persistent dirty bitmaps that QEMU's tools made, followed by us, and read by them again.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use common::{memory_directory, run, skipped};
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::driver::{Driver, Preallocation};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Durability;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, OpenOptions};
use heliostat_host::runtime::block_on;

const SIZE: u64 = 64 << 20;

/// An image with an enabled bitmap `one`, a disabled one `two`, and something written since.
fn image(folder: &Path, cluster_size: u32) -> PathBuf {
    let path = folder.join("image.qcow2");
    let text = path.to_str().unwrap();
    let options = format!("cluster_size={cluster_size}");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text, "64M"]).unwrap();
    run("qemu-img", &["bitmap", "--add", "-g", "64k", text, "one"]).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 128k", text]).unwrap();
    run("qemu-img", &["bitmap", "--add", "-g", "512", "--disable", text, "two"]).unwrap();
    run("qemu-img", &["bitmap", "--merge", "one", text, "two"]).unwrap();
    path
}

async fn open(path: &Path) -> (Arc<Qcow2>, Arc<Node>) {
    let storage =
        FileStorage::open(path, &OpenOptions { access: Access::ReadWrite, ..OpenOptions::default() });
    let qcow2 = Qcow2::open(Arc::new(storage.unwrap()), ImageOptions::default()).await.unwrap();
    let driver = Driver::Qcow2(Arc::clone(&qcow2));
    let node = Node::new(NodeName::generated(0), driver, NodeOptions::default(), Arc::new(RealClock::new()));
    (qcow2, node)
}

async fn write(node: &Arc<Node>, at: u64, len: usize) {
    node.enter().await.write(at, Bytes::from(vec![1; len]), Durability::Cached).await.unwrap();
}

/// What ours says is dirty in the bitmap of that name.
fn dirty(qcow2: &Qcow2, name: &str) -> Option<Vec<ByteRange>> {
    let bitmap = qcow2.bitmaps().into_iter().find(|bitmap| bitmap.entry.name == name.as_bytes()).unwrap();
    let bits = bitmap.bits?;
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(range) = bits.next_dirty(from, u64::MAX) {
        from = range.end();
        found.push(range);
    }
    Some(found)
}

/// What QEMU says is dirty in it: `qemu-nbd` shows it, `nbdinfo` starts that, lists what it shows and ends it.
fn dirty_by_qemu(path: &Path, name: &str) -> Vec<ByteRange> {
    let map = format!("--map=qemu:dirty-bitmap:{name}");
    let server = ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path.to_str().unwrap(), "]"];
    let arguments: Vec<_> = [map.as_str(), "--"].into_iter().chain(server).collect();
    let listed = run("nbdinfo", &arguments).unwrap();
    let dirty = listed.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let number = |at: usize| fields[at].parse::<u64>().unwrap();
        (number(2) == 1).then(|| ByteRange::new(number(0), number(1)).unwrap())
    });
    dirty.collect()
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn has_tools() -> bool {
    let missing = ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"]
        .into_iter()
        .find_map(|tool| run(tool, &["--version"]).err());
    if let Some(error) = &missing {
        skipped(error);
    }
    missing.is_none()
}

#[test]
fn bitmaps_follow_writes_and_qemu_reads_what_we_wrote() {
    if !has_tools() {
        return;
    }
    for cluster_size in [512, 4096, 65_536] {
        let folder = memory_directory().unwrap();
        let path = image(folder.path(), cluster_size);
        let before = range(1 << 20, 128 << 10);
        block_on(async {
            let (qcow2, node) = open(&path).await;
            assert_eq!(dirty(&qcow2, "one"), Some(vec![before]));
            assert_eq!(dirty(&qcow2, "two"), Some(vec![before]));
            write(&node, (10 << 20) + 5, 70_000).await;
            write(&node, SIZE - 512, 512).await;
            node.close().await.unwrap();
        })
        .unwrap();
        let since = vec![before, range(10 << 20, 128 << 10), range(SIZE - (64 << 10), 64 << 10)];
        assert_eq!(dirty_by_qemu(&path, "one"), since);
        assert_eq!(dirty_by_qemu(&path, "two"), [before], "a disabled one stays as it is");
        run("qemu-img", &["check", path.to_str().unwrap()]).unwrap();
        block_on(async {
            let (qcow2, node) = open(&path).await;
            assert_eq!(dirty(&qcow2, "one"), Some(since));
            node.close().await.unwrap();
        })
        .unwrap();
        run("qemu-img", &["check", path.to_str().unwrap()]).unwrap();
    }
}

#[test]
fn after_a_crash_nobody_believes_a_bitmap_that_was_in_use() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let path = image(folder.path(), 65_536);
    let in_use = || {
        let info = run("qemu-img", &["info", path.to_str().unwrap()]).unwrap();
        info.matches("in-use").count()
    };
    block_on(async {
        let (_, node) = open(&path).await;
        write(&node, 0, 512).await;
        node.enter().await.flush().await.unwrap();
        // Never closed.
    })
    .unwrap();
    assert_eq!(in_use(), 2);
    block_on(async {
        let (qcow2, node) = open(&path).await;
        assert_eq!((dirty(&qcow2, "one"), dirty(&qcow2, "two")), (None, None));
        node.close().await.unwrap();
    })
    .unwrap();
    assert_eq!(in_use(), 2, "they stay what they are");
    run("qemu-img", &["check", path.to_str().unwrap()]).unwrap();
}

#[test]
fn bitmaps_of_a_resized_image_are_what_qemu_makes_of_them() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let path = image(folder.path(), 65_536);
    let text = path.to_str().unwrap();
    let theirs = folder.path().join("theirs.qcow2");
    let last = (SIZE - 1024, "1024");
    run("qemu-io", &["-f", "qcow2", "-c", &format!("write {} {}", last.0, last.1), text]).unwrap();
    // Within a granule, to its end, far beyond; and back into the middle of one that is dirty.
    for size in [SIZE + 512, SIZE + (64 << 10), 5 << 30, (10 << 20) + 512, (1 << 20) + 1024, 512, 1 << 36] {
        std::fs::copy(&path, &theirs).unwrap();
        let arguments = ["resize", "-q", "--shrink", "-f", "qcow2", theirs.to_str().unwrap()];
        run("qemu-img", &[&arguments[..], &[&size.to_string()]].concat()).unwrap();
        block_on(async {
            let (_, node) = open(&path).await;
            node.resize(size, Preallocation::Off).await.unwrap();
            node.close().await.unwrap();
        })
        .unwrap();
        for name in ["one", "two"] {
            assert_eq!(dirty_by_qemu(&path, name), dirty_by_qemu(&theirs, name), "{name} at {size}");
        }
        run("qemu-img", &["check", text]).unwrap();
    }
}

#[test]
fn a_bitmap_follows_writes_to_what_a_disk_has_gained() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let path = image(folder.path(), 65_536);
    block_on(async {
        let (qcow2, node) = open(&path).await;
        node.resize(2 * SIZE, Preallocation::Off).await.unwrap();
        write(&node, SIZE + 5, 100).await;
        let before = range(1 << 20, 128 << 10);
        assert_eq!(dirty(&qcow2, "one"), Some(vec![before, range(SIZE, 64 << 10)]));
        assert_eq!(dirty(&qcow2, "two"), Some(vec![before]));
        node.close().await.unwrap();
    })
    .unwrap();
    assert_eq!(dirty_by_qemu(&path, "one")[1], range(SIZE, 64 << 10));
}

#[test]
fn an_image_whose_bitmaps_were_not_saved_is_not_resized_in_the_same_words() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let path = image(folder.path(), 65_536);
    block_on(async {
        // Never closed.
        drop(open(&path).await);
        let (_, node) = open(&path).await;
        let refused = node.resize(2 * SIZE, Preallocation::Off).await.unwrap_err();
        assert!(
            refused.to_string().ends_with("Bitmap 'one' is inconsistent and cannot be used"),
            "{refused}"
        );
        assert_eq!(node.size(), SIZE);
        node.close().await.unwrap();
    })
    .unwrap();
    let theirs = run("qemu-img", &["resize", "-f", "qcow2", path.to_str().unwrap(), "128M"]).unwrap_err();
    assert!(theirs.contains("Bitmap 'one' is inconsistent and cannot be used"), "{theirs}");
}
