//! Random operations on qcow2 images of every kind, made by `qemu-img` and by ours, beside a plain vector of bytes; at the end
//! QEMU's tools judge the image.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod common;
mod images;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{disk_directory, memory_directory, pattern, run, skipped};
use futures_util::future::join_all;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::driver::{Driver, Preallocation};
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ExtentStatus, ZeroEffort, ZeroSpace};
use heliostat_host::open::Access;
use heliostat_host::runtime::block_on;
use images::scene::{Scene, node, random_range, storage, text};
use images::{CLUSTER_BITS, Maker, PREALLOCATIONS, REFCOUNT_BITS, Random, Wish, map};

#[derive(Clone, Debug)]
enum Operation {
    Write(ByteRange, u64),
    Zero(ByteRange, ZeroSpace),
    Discard(ByteRange),
    Read(ByteRange),
}

impl Operation {
    fn range(&self) -> ByteRange {
        match self {
            Self::Write(range, _) | Self::Zero(range, _) | Self::Discard(range) | Self::Read(range) => *range,
        }
    }
}

/// Operations that share no byte, but perhaps clusters.
fn batch(random: &mut Random, size: u64) -> Vec<Operation> {
    let mut batch: Vec<Operation> = Vec::new();
    let near = random_range(random, size).offset();
    for _ in 0..1 + random.below(8) {
        let mut range = random_range(random, size);
        if random.chance(50) {
            // Close to the others, so that they meet in a cluster.
            let at = (near + random.below(64 << 10)).min(size - 1);
            range = ByteRange::from_bounds(at, (at + 1 + random.below(8192)).min(size));
        }
        if batch.iter().any(|other| other.range().overlaps(range)) {
            continue;
        }
        let space = if random.chance(50) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
        batch.push(match random.below(10) {
            0..=4 => Operation::Write(range, random.next()),
            5 => Operation::Zero(range, space),
            6 => Operation::Discard(range),
            _ => Operation::Read(range),
        });
    }
    batch
}

async fn carry_out(node: &Arc<Node>, operation: Operation, model: &[u8]) {
    let tracked = node.enter().await;
    match operation {
        Operation::Write(range, seed) => {
            tracked.write(range.offset(), pattern(seed, range.len(), 0), Durability::Cached).await.unwrap();
        }
        Operation::Zero(range, space) => {
            tracked.write_zeroes(range, space, ZeroEffort::Any, Durability::Cached).await.unwrap();
        }
        Operation::Discard(range) => tracked.discard(range).await.unwrap(),
        Operation::Read(range) => {
            let buffer = Buffer::copy_of(&vec![0xee; usize_from(range.len())]);
            let read = tracked.read(range.offset(), buffer).await.unwrap();
            let expected = &model[usize_from(range.offset())..usize_from(range.end())];
            assert!(
                read[..] == *expected,
                "{range} reads wrong: first at {:?}",
                first_difference(&read, expected)
            );
        }
    }
}

fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    one.iter().zip(other).position(|(a, b)| a != b)
}

/// What a discard has left: old bytes or zeroes; never anything else.
async fn settle_discard(node: &Arc<Node>, range: ByteRange, model: &mut [u8]) {
    let place = usize_from(range.offset())..usize_from(range.end());
    let buffer = Buffer::zeroed(usize_from(range.len()));
    let read = node.enter().await.read(range.offset(), buffer).await.unwrap();
    for (now, was) in read.iter().zip(&model[place.clone()]) {
        assert!(*now == 0 || now == was, "a discard of {range} left what was never there");
    }
    model[place].copy_from_slice(&read);
}

async fn play(random: &mut Random, scene: &mut Scene) {
    let node = scene.open(false).await;
    for _ in 0..random.below(40) {
        if scene.wish.may_grow() && random.chance(7) {
            resize(random, &node, scene).await;
        }
        let size = node.size();
        let batch = batch(random, size);
        let model = &scene.model;
        join_all(batch.iter().map(|operation| carry_out(&node, operation.clone(), model))).await;
        for operation in batch {
            let range = operation.range();
            let place = usize_from(range.offset())..usize_from(range.end());
            match operation {
                Operation::Write(_, seed) => {
                    scene.model[place].copy_from_slice(&pattern(seed, range.len(), 0))
                }
                Operation::Zero(..) => scene.model[place].fill(0),
                Operation::Discard(_) => settle_discard(&node, range, &mut scene.model).await,
                Operation::Read(_) => {}
            }
        }
        if random.chance(15) {
            node.enter().await.flush().await.unwrap();
        }
    }
    verify(&node, &scene.model).await;
    node.close().await.unwrap();
}

/// Makes the disk longer, or sometimes shorter.
async fn resize(random: &mut Random, node: &Arc<Node>, scene: &mut Scene) {
    let old = node.size() & !511;
    let new = match random.below(3) {
        0 if scene.wish.may_shrink() => 512 * (1 + random.below(old / 512)),
        1 => old + 512 * random.below(1000),
        _ => old + (1 + random.below(6)) * (1 << 20),
    };
    let how = random.pick(&[
        Preallocation::Off,
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ]);
    node.resize(new, how).await.unwrap();
    assert_eq!(node.size(), new);
    scene.model.resize(usize_from(new), 0);
}

async fn verify(node: &Arc<Node>, model: &[u8]) {
    for piece in node.range().pieces(1 << 20) {
        carry_out(node, Operation::Read(piece), model).await;
    }
}

fn judge(scene: &Scene) {
    let check = run("qemu-img", &["check", "-f", "qcow2", text(&scene.path)]);
    assert!(check.is_ok(), "{check:?}");
    let raw = scene.folder.path().join("model");
    std::fs::write(&raw, &scene.model).unwrap();
    let compared = run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&scene.path), text(&raw)]);
    assert!(compared.is_ok(), "{compared:?}");
    if let Some(snapshot) = &scene.snapshot {
        let old = scene.folder.path().join("snapshot");
        let arguments = ["convert", "-l", "before", "-O", "raw", text(&scene.path), text(&old)];
        run("qemu-img", &arguments).unwrap();
        // It is as long as the disk is now.
        let old = std::fs::read(&old).unwrap();
        assert!(old.starts_with(snapshot), "the snapshot has changed");
    }
}

/// Both say the same of where the bytes are.
async fn compare_maps(scene: &Scene) {
    let mut difference = None;
    // What a file system says of holes beside fresh data changes when it writes that back.
    for _ in 0..3 {
        std::fs::File::open(&scene.path).unwrap().sync_all().unwrap();
        let node = scene.open(true).await;
        let (mut ours, mut theirs) = (map::ours(&node).await, map::qemu(&scene.path));
        if !scene.direct {
            // A file in memory has pages that are neither data nor a hole; ours does not look for them.
            [&mut ours, &mut theirs].into_iter().for_each(map::forget_holes);
        }
        difference = map::difference(&ours, &theirs);
        if difference.is_none() {
            return;
        }
    }
    panic!("the maps differ {}", difference.unwrap_or_default());
}

fn case(seed: u64, direct: bool) {
    let wish = Wish::draw(seed);
    eprintln!("seed {seed}: {wish:?}");
    let mut random = Random(seed ^ 0x5eed);
    let folder = if direct { disk_directory() } else { memory_directory().unwrap() };
    let mut scene = Scene::make(wish, folder, direct);
    block_on(async {
        compare_maps(&scene).await;
        play(&mut random, &mut scene).await;
        verify(&scene.open(true).await, &scene.model).await;
        compare_maps(&scene).await;
    })
    .unwrap();
    judge(&scene);
}

fn has_tools() -> bool {
    let found = run("qemu-img", &["--version"]).and_then(|_| run("qemu-io", &["--version"]));
    if let Err(error) = &found {
        skipped(&format!("qemu's tools are not installed: {error}"));
    }
    found.is_ok()
}

/// How many images each test makes; `HELIOSTAT_CASES` makes it more.
fn cases() -> u64 {
    std::env::var("HELIOSTAT_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(78)
}

/// The first seed; `HELIOSTAT_SEED` makes it another.
fn first_seed() -> u64 {
    std::env::var("HELIOSTAT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[test]
fn every_option_is_drawn_for_images_of_both() {
    let mut wanted: BTreeSet<String> = [
        "version 2",
        "version 3",
        "lazy refcounts",
        "extended L2",
        "compressed with deflate",
        "compressed with zstd",
        "external data file",
        "raw external data file",
        "snapshot",
        "bitmaps",
        "resized with preallocation",
        "resized with bitmaps",
        "resized with a backing file",
        "resized with an external data file",
        "chain of three",
        "shorter raw below",
        "longer raw below",
        "shorter qcow2 below",
        "longer qcow2 below",
    ]
    .map(str::to_owned)
    .into();
    wanted.extend(CLUSTER_BITS.map(|bits| format!("cluster size {}", 1 << bits)));
    wanted.extend(REFCOUNT_BITS.map(|bits| format!("refcount bits {bits}")));
    wanted.extend(PREALLOCATIONS.map(|how| format!("preallocation {how}")));
    for maker in [Maker::Ours, Maker::Qemu] {
        let drawn = (1..=78).map(Wish::draw).filter(|wish| wish.maker == maker);
        let drawn: BTreeSet<String> = drawn.flat_map(|wish| wish.features()).collect();
        assert_eq!(wanted.difference(&drawn).collect::<Vec<_>>(), Vec::<&String>::new(), "by {maker:?}");
    }
}

#[test]
fn images_of_every_kind_are_written_as_a_guest_expects_and_qemu_finds_no_fault() {
    if has_tools() {
        (first_seed()..first_seed() + cases()).for_each(|seed| case(seed, false));
    }
}

#[test]
fn images_past_the_page_cache_are_written_alike() {
    if has_tools() {
        (first_seed()..first_seed() + cases() / 4).for_each(|seed| case(seed, true));
    }
}

#[test]
fn an_external_data_file_that_is_a_raw_image_stays_as_long_as_the_disk() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let [path, data] = ["image.qcow2", "data"].map(|name| folder.path().join(name));
    let size = (1 << 20) + 512;
    // Its last cluster is new, and reaches beyond the disk.
    let longer = size + (100 << 10);
    let options = format!("data_file={},data_file_raw=on", data.display());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &size.to_string()])
        .unwrap();
    block_on(async {
        let access = Access::ReadWrite;
        let data_file = Some(storage(&data, false, access));
        let image = ImageOptions { data_file, ..ImageOptions::default() };
        let image = Qcow2::open(storage(&path, false, access), image).await.unwrap();
        let node = node(Driver::Qcow2(image), false);
        node.resize(longer, Preallocation::Off).await.unwrap();
        node.enter().await.write(longer - 512, pattern(1, 512, 0), Durability::Cached).await.unwrap();
        node.close().await.unwrap();
    })
    .unwrap();
    assert_eq!(data.metadata().unwrap().len(), longer);
}

#[test]
fn clusters_that_were_set_aside_and_never_written_are_zeroes_to_a_mirror() {
    if !has_tools() {
        return;
    }
    let folder = memory_directory().unwrap();
    let path = folder.path().join("image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", text(&path), "64G"])
        .unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 5G 1M", text(&path)]).unwrap();
    block_on(async {
        let image = ImageOptions { read_only: true, ..ImageOptions::default() };
        let image = Qcow2::open(storage(&path, false, Access::ReadOnly), image).await.unwrap();
        let tracked = node(Driver::Qcow2(image), true).enter().await;
        let (mut at, size) = (0, 64 << 30);
        let mut data = Vec::new();
        while at < size {
            for extent in tracked.extents(ByteRange::from_bounds(at, size)).await.unwrap() {
                at = extent.range.end();
                if extent.status == ExtentStatus::Data {
                    data.push(extent.range);
                }
            }
        }
        assert_eq!(data, [ByteRange::from_bounds(5 << 30, (5 << 30) + (1 << 20))]);
    })
    .unwrap();
}
