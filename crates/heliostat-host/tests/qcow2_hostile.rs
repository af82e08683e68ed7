//! Images that were made to do harm, byte by byte: each is refused, or stops being written as soon as it shows.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use common::{memory_directory, run, skipped};
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::error::FormatError;
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::error::BlockError;
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::storage::Durability;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, OpenOptions};
use heliostat_host::runtime::block_on;

/// Clusters of 64 KiB as `qemu-img create` lays them out for 64 MiB: header, refcount table, refcount block, L1, and
/// here an L2 table and the first data.
const REFCOUNT_TABLE: u64 = 0x1_0000;
const REFCOUNT_BLOCK: u64 = 0x2_0000;
const L1: u64 = 0x3_0000;
const L2: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What becomes of an image.
enum Outcome {
    /// It cannot be opened to be written, and the text says why.
    Refused(&'static str),
    /// Writing all of it fails, and it says "corrupt" of itself from then on.
    MarkedCorrupt,
    /// Writing all of it fails, for want of space or of something to read.
    Fails,
    /// It is written; what is wrong with it does no harm.
    Written,
}

struct Hostile {
    what: &'static str,
    /// Where, what.
    bytes: Vec<(u64, Vec<u8>)>,
    outcome: Outcome,
}

fn hostile(what: &'static str, words: &[(u64, u64)], outcome: Outcome) -> Hostile {
    let bytes = words.iter().map(|(at, word)| (*at, word.to_be_bytes().to_vec())).collect();
    Hostile { what, bytes, outcome }
}

fn refused(what: &'static str, at: u64, bytes: &[u8], text: &'static str) -> Hostile {
    Hostile { what, bytes: vec![(at, bytes.to_vec())], outcome: Outcome::Refused(text) }
}

/// Headers that ask for too much.
fn headers() -> Vec<Hostile> {
    let huge = [0, 0x40, 0, 1];
    vec![
        refused("an L1 table of 32 MiB and more", 36, &huge, "Active L1 table too large"),
        refused("a refcount table of terabytes", 56, &huge, "Reference count table too large"),
        refused("a million snapshots", 60, &huge, "Snapshot table too large"),
        refused("a disk of exabytes", 24, &[0x7f; 8], "Image is too big"),
        refused("encryption", 32, &[0, 0, 0, 2], "LUKS"),
        refused("a feature that nobody knows", 72, &[1 << 7; 1], "Unsupported qcow2 feature(s)"),
        Hostile {
            what: "snapshots where the file has long ended",
            bytes: vec![(60, vec![0, 0, 0, 3]), (64, 0x4000_0000_u64.to_be_bytes().to_vec())],
            outcome: Outcome::Written,
        },
        Hostile {
            what: "a snapshot whose L1 table is nowhere",
            bytes: vec![
                (60, vec![0, 0, 0, 1]),
                (64, DATA.to_be_bytes().to_vec()),
                (DATA, [&0x123_u64.to_be_bytes()[..], &[0; 32]].concat()),
            ],
            outcome: Outcome::Refused("Snapshot L1 table offset invalid"),
        },
    ]
}

/// Tables that point to each other, to themselves, and out of the world.
fn tables() -> Vec<Hostile> {
    use Outcome::{Fails, MarkedCorrupt, Written};
    vec![
        hostile("an L1 entry that says no more than: nobody else's", &[(L1, COPIED)], Written),
        hostile("an L1 entry that points to the L1 table", &[(L1, COPIED | L1)], MarkedCorrupt),
        hostile(
            "an L1 entry that points to the refcount table",
            &[(L1, COPIED | REFCOUNT_TABLE)],
            MarkedCorrupt,
        ),
        hostile(
            "an L1 entry that points to a refcount block",
            &[(L1, COPIED | REFCOUNT_BLOCK)],
            MarkedCorrupt,
        ),
        hostile("an L1 entry between two clusters", &[(L1, COPIED | (L2 + 512))], MarkedCorrupt),
        hostile("an L1 entry far beyond the file", &[(L1, COPIED | 1 << 54)], MarkedCorrupt),
        hostile("an L2 entry that says no more than: nobody else's", &[(L2, COPIED)], Written),
        hostile("an L2 entry that points to the L2 table", &[(L2, COPIED | L2)], MarkedCorrupt),
        hostile("an L2 entry that points to the L1 table", &[(L2, COPIED | L1)], MarkedCorrupt),
        hostile(
            "an L2 entry that points to a refcount block",
            &[(L2, COPIED | REFCOUNT_BLOCK)],
            MarkedCorrupt,
        ),
        hostile("an L2 entry between two clusters", &[(L2, COPIED | (DATA + 512))], MarkedCorrupt),
        hostile("an L2 entry far beyond the file", &[(L2, COPIED | 1 << 54)], MarkedCorrupt),
        hostile("a compressed cluster of nonsense", &[(L2, COMPRESSED | L1 | 1 << 54)], Fails),
        hostile("a compressed cluster beyond the file", &[(L2, COMPRESSED | 1 << 50)], Fails),
        hostile("a refcount table that points to itself", &[(REFCOUNT_TABLE, REFCOUNT_TABLE)], MarkedCorrupt),
        hostile(
            "a refcount table that points between clusters",
            &[(REFCOUNT_TABLE, 0x2_0200)],
            MarkedCorrupt,
        ),
        hostile(
            "a refcount table that points to the end of time",
            &[(REFCOUNT_TABLE, u64::MAX << 16)],
            MarkedCorrupt,
        ),
        hostile("no reference counts at all", &[(REFCOUNT_TABLE, 0)], MarkedCorrupt),
        // Everything is free, the tables too: the first cluster that is taken is the header.
        hostile("reference counts of zero", &[(REFCOUNT_BLOCK, 0), (REFCOUNT_BLOCK + 8, 0)], MarkedCorrupt),
    ]
}

fn image(path: &Path) {
    let text = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text, "64M"]).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 64k", text]).unwrap();
}

/// Writes a little into every cluster, discards, reads, and closes.
async fn use_all(path: &Path) -> Result<io::Result<()>, FormatError> {
    let storage =
        FileStorage::open(path, &OpenOptions { access: Access::ReadWrite, ..OpenOptions::default() });
    let qcow2 = Qcow2::open(Arc::new(storage.unwrap()), ImageOptions::default()).await?;
    let options = NodeOptions { discard: Discard::Unmap, ..NodeOptions::default() };
    let node = Node::new(NodeName::generated(0), Driver::Qcow2(qcow2), options, Arc::new(RealClock::new()));
    let mut all = Ok(());
    for piece in node.range().pieces(64 << 10).take(64) {
        let tracked = node.enter().await;
        let written =
            tracked.write(piece.offset() + 512, Bytes::from(vec![2; 4096]), Durability::Cached).await;
        let read = tracked.read(piece.offset(), Buffer::zeroed(usize_from(piece.len()))).await;
        let failed = written.and(read.map(drop)).map_err(io::Error::from);
        all = all.and(failed);
    }
    let discarded = node.enter().await.discard(node.range()).await.map_err(io::Error::from);
    let closed = node.close().await.map_err(io::Error::from);
    Ok(all.and(discarded).and(closed))
}

fn is_marked(path: &Path) -> bool {
    run("qemu-img", &["info", path.to_str().unwrap()]).unwrap().contains("corrupt: true")
}

fn judge(path: &Path, case: &Hostile) {
    image(path);
    let file = File::options().write(true).open(path).unwrap();
    for (at, bytes) in &case.bytes {
        file.write_all_at(bytes, *at).unwrap();
    }
    drop(file);
    let used = block_on(use_all(path)).unwrap();
    let what = case.what;
    match (&case.outcome, used) {
        (Outcome::Refused(text), Err(error)) => {
            assert!(error.to_string().contains(text), "{what}: {error}");
        }
        (Outcome::MarkedCorrupt, Ok(Err(_))) => assert!(is_marked(path), "{what}: not marked"),
        (Outcome::Fails, Ok(Err(_))) => assert!(!is_marked(path) || what.contains("compressed"), "{what}"),
        (Outcome::Written, Ok(Ok(()))) => {}
        (_, outcome) => panic!("{what}: {outcome:?}"),
    }
    let taken = path.metadata().unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&taken) * 512 < 32 << 20, "{what}: it has grown");
    assert!(taken.len() < 1 << 30, "{what}: it has become long");
}

#[test]
fn an_image_that_was_made_to_do_harm_is_refused_or_stops() {
    if let Err(error) = run("qemu-img", &["--version"]) {
        skipped(&error);
        return;
    }
    let folder = memory_directory().unwrap();
    for (index, case) in headers().into_iter().chain(tables()).enumerate() {
        judge(&folder.path().join(format!("{index}.qcow2")), &case);
    }
}

#[test]
fn a_cluster_that_unpacks_to_more_than_a_cluster_is_cut_off() {
    if let Err(error) = run("qemu-img", &["--version"]) {
        skipped(&error);
        return;
    }
    let folder = memory_directory().unwrap();
    let path = folder.path().join("bomb.qcow2");
    image(&path);
    // Deflate of an endless run of zeroes, as large as one cluster's data can be.
    let mut bomb = vec![0xec, 0xc1, 0x01, 0x01, 0x00, 0x00, 0x00, 0x80, 0x90, 0xfe, 0xaf, 0xee, 0x08, 0x0a];
    bomb.resize(64 << 10, 0);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&bomb, DATA).unwrap();
    file.write_all_at(&(COMPRESSED | 127 << 54 | DATA).to_be_bytes(), L2).unwrap();
    assert!(read_start(&path, 512).is_err());
}

/// The first `len` bytes of the disk in the image at `path`.
fn read_start(path: &Path, len: usize) -> Result<Buffer, BlockError> {
    block_on(async {
        let storage = FileStorage::open(path, &OpenOptions::default()).unwrap();
        let options = ImageOptions { read_only: true, ..ImageOptions::default() };
        let qcow2 = Qcow2::open(Arc::new(storage), options).await.unwrap();
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        let node =
            Node::new(NodeName::generated(0), Driver::Qcow2(qcow2), options, Arc::new(RealClock::new()));
        node.enter().await.read(0, Buffer::zeroed(len)).await
    })
    .unwrap()
}

/// Reading over the border of two such entries took both for one long cluster, and came to an end past it.
#[test]
fn two_entries_for_one_compressed_cluster_are_read_as_two() {
    if let Err(error) = run("qemu-img", &["--version"]) {
        skipped(&error);
        return;
    }
    let folder = memory_directory().unwrap();
    let path = folder.path().join("twice.qcow2");
    image(&path);
    let name = path.to_str().unwrap();
    run("qemu-io", &["-c", "write -c -P 7 64k 64k", name]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, L2 + 8).unwrap();
    assert_ne!(u64::from_be_bytes(entry) & COMPRESSED, 0, "the cluster is compressed");
    file.write_all_at(&entry, L2).unwrap();
    let read = read_start(&path, 128 << 10).unwrap();
    assert!(read.iter().all(|&byte| byte == 7));
}
