//! Random operations on qcow2 images of every kind that `qemu-img` makes, beside a plain vector of bytes; at the end
//! QEMU's tools judge the image.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{memory_directory, pattern, run, skipped};
use futures_util::future::join_all;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::driver::{Driver, Preallocation, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage, ZeroEffort, ZeroSpace};
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{self, Access, Cache, OpenOptions};
use heliostat_host::runtime::block_on;

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize_from(self.below(u64_from(of.len())))]
    }
}

/// An image and what a guest must see in it.
struct Scene {
    folder: tempfile::TempDir,
    path: PathBuf,
    options: String,
    backing: Option<(PathBuf, &'static str)>,
    data_file: Option<PathBuf>,
    model: Vec<u8>,
    snapshot: Option<Vec<u8>>,
    version: u32,
    direct: bool,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn random_range(random: &mut Random, size: u64) -> ByteRange {
    let len = match random.below(4) {
        0 => 512 * (1 + random.below(16)),
        1 => 1 + random.below(100_000),
        2 => 4096 * (1 + random.below(32)),
        _ => 1 + random.below(1 << 20),
    };
    let at = random.below(size);
    let at = if random.chance(50) { at & !4095 } else { at };
    ByteRange::from_bounds(at, (at + len).min(size))
}

/// Lets `qemu-io` change an image, and does the same to `model`. Whole sectors only, as it asks for.
fn prefill(random: &mut Random, path: &Path, size: u64, model: &mut [u8]) {
    let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
    for _ in 0..random.below(12) {
        let range = random_range(random, size);
        let start = range.offset() & !511;
        let end = range.end().next_multiple_of(512).min(size & !511);
        if start >= end {
            continue;
        }
        let place = usize_from(start)..usize_from(end);
        let len = end - start;
        let command = if random.chance(25) {
            model[place].fill(0);
            format!("write -z {start} {len}")
        } else {
            let byte = u8::try_from(1 + random.below(250)).unwrap();
            model[place].fill(byte);
            format!("write -P {byte} {start} {len}")
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.push(text(path).to_owned());
    run("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
}

fn scene(random: &mut Random, direct: bool) -> Scene {
    let folder = if direct { common::disk_directory() } else { memory_directory().unwrap() };
    let path = folder.path().join("image.qcow2");
    let version = if random.chance(25) { 2 } else { 3 };
    let cluster = random.pick(&[512_u64, 1024, 4096, 16 << 10, 64 << 10, 64 << 10, 64 << 10, 2 << 20]);
    let size =
        (1 + random.below(8)) * (1 << 20) + if random.chance(50) { 512 * random.below(300) } else { 0 };
    let mut options = format!("cluster_size={cluster},compat={}", if version == 2 { "0.10" } else { "1.1" });
    let mut data_file = None;
    let mut backing = None;
    let mut model = vec![0; usize_from(size)];
    if random.chance(40) {
        let format = random.pick(&["raw", "qcow2"]);
        let base = folder.path().join("base");
        let base_size = (size / 2 + random.below(size)) & !511;
        let mut base_model = vec![0; usize_from(base_size)];
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), &base_size.to_string()]).unwrap();
        prefill(random, &base, base_size, &mut base_model);
        if format == "raw" {
            std::fs::write(&base, &base_model).unwrap();
        }
        let common = base_model.len().min(model.len());
        model[..common].copy_from_slice(&base_model[..common]);
        backing = Some((base, format));
    }
    if version == 3 {
        if cluster >= 16 << 10 && random.chance(40) {
            options += ",extended_l2=on";
        }
        options += &format!(",refcount_bits={}", random.pick(&[1, 2, 4, 8, 16, 16, 32, 64]));
        if random.chance(20) {
            options += ",lazy_refcounts=on";
        }
        if random.chance(15) && !direct {
            let data = folder.path().join("data");
            options += &format!(",data_file={}", data.display());
            if backing.is_none() && random.chance(50) {
                options += ",data_file_raw=on";
            }
            data_file = Some(data);
        }
    }
    if backing.is_none() && random.chance(20) && size > 2 << 20 {
        options += &format!(",preallocation={}", random.pick(&["metadata", "falloc", "full"]));
    }
    let size_text = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some((base, format)) = &backing {
        arguments.extend(["-b", text(base), "-F", format]);
    }
    arguments.extend([text(&path), &size_text]);
    run("qemu-img", &arguments).unwrap();
    let mut scene =
        Scene { folder, path, options, backing, data_file, model, snapshot: None, version, direct };
    prefill(random, &scene.path, size, &mut scene.model);
    if scene.data_file.is_none() && !scene.options.contains("refcount_bits=1,") && random.chance(30) {
        let has_room = !scene.options.ends_with("refcount_bits=1");
        if has_room {
            run("qemu-img", &["snapshot", "-c", "before", text(&scene.path)]).unwrap();
            scene.snapshot = Some(scene.model.clone());
            if random.chance(50) {
                prefill(random, &scene.path, size, &mut scene.model);
            }
        }
    }
    if scene.data_file.is_none() && scene.snapshot.is_none() && random.chance(25) {
        compress(random, &mut scene);
    }
    scene
}

/// Makes the image anew with compressed clusters.
fn compress(random: &mut Random, scene: &mut Scene) {
    let packed = scene.folder.path().join("packed.qcow2");
    let mut options = format!("compat={}", if scene.version == 2 { "0.10" } else { "1.1" });
    if scene.version == 3 && random.chance(50) {
        options += ",compression_type=zstd";
    }
    run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &options, text(&scene.path), text(&packed)])
        .unwrap();
    scene.path = packed;
    scene.backing = None;
    scene.options = options + " compressed";
}

fn storage(path: &Path, direct: bool, access: Access) -> Arc<dyn Storage> {
    let options = OpenOptions {
        access,
        cache: if direct { Cache::Direct } else { Cache::Page },
        discard: open::Discard::Unmap,
        ..OpenOptions::default()
    };
    Arc::new(FileStorage::open(path, &options).unwrap())
}

fn node(driver: Driver, read_only: bool) -> Arc<Node> {
    let options = NodeOptions { read_only, discard: Discard::Unmap, ..NodeOptions::default() };
    Node::new(NodeName::generated(0), driver, options, Arc::new(RealClock::new()))
}

async fn open_image(scene: &Scene, read_only: bool) -> Arc<Node> {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    let backing = match &scene.backing {
        None => None,
        Some((path, "raw")) => {
            Some(node(Driver::Raw(Raw::whole(storage(path, false, Access::ReadOnly))), true))
        }
        Some((path, _)) => {
            let options = ImageOptions { read_only: true, ..ImageOptions::default() };
            let image = Qcow2::open(storage(path, false, Access::ReadOnly), options).await.unwrap();
            Some(node(Driver::Qcow2(image), true))
        }
    };
    let data_file = scene.data_file.as_ref().map(|path| storage(path, false, access));
    let options = ImageOptions { read_only, backing, data_file, cache: Some(0) };
    let image = Qcow2::open(storage(&scene.path, scene.direct, access), options).await.unwrap();
    node(Driver::Qcow2(image), read_only)
}

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
    let node = open_image(scene, false).await;
    let may_resize = scene.snapshot.is_none() && scene.data_file.is_none();
    for _ in 0..random.below(40) {
        if may_resize && random.chance(5) {
            resize(random, &node, &mut scene.model).await;
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
async fn resize(random: &mut Random, node: &Arc<Node>, model: &mut Vec<u8>) {
    let old = node.size() & !511;
    let new = match random.below(3) {
        0 => 512 * (1 + random.below(old / 512)),
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
    model.resize(usize_from(new), 0);
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
        assert!(std::fs::read(&old).unwrap() == *snapshot, "the snapshot has changed");
    }
}

fn case(seed: u64, direct: bool) {
    let mut random = Random(seed);
    let mut scene = scene(&mut random, direct);
    eprintln!("seed {seed}: {} {:?}", scene.options, scene.backing);
    block_on(async {
        play(&mut random, &mut scene).await;
        let again = open_image(&scene, true).await;
        verify(&again, &scene.model).await;
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
    std::env::var("HELIOSTAT_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

/// The first seed; `HELIOSTAT_SEED` makes it another.
fn first_seed() -> u64 {
    std::env::var("HELIOSTAT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
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
