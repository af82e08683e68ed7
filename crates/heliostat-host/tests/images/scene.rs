//! [`Scene`]: an image that was made as wished, and what a guest must see in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use heliostat_block::convert::usize_from;
use heliostat_block::driver::qcow2::create::{CreateOptions, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::header::Compression;
use heliostat_block::driver::qcow2::{OpenOptions as ImageOptions, Qcow2};
use heliostat_block::driver::{Driver, Preallocation, Raw};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;
use heliostat_host::clock::RealClock;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{self, Access, Cache, OpenOptions};
use heliostat_host::runtime::block_on;

use super::{Below, DataFile, Maker, Random, Wish};
use crate::common::run;

/// An image and what a guest must see in it.
pub struct Scene {
    pub folder: tempfile::TempDir,
    pub path: PathBuf,
    /// What it stands on, the lowest first.
    pub chain: Vec<(PathBuf, &'static str)>,
    pub data_file: Option<PathBuf>,
    pub model: Vec<u8>,
    pub snapshot: Option<Vec<u8>>,
    pub wish: Wish,
    pub direct: bool,
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn random_range(random: &mut Random, size: u64) -> ByteRange {
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

/// The whole sectors around a range of a disk.
pub fn sectors(range: ByteRange, size: u64) -> ByteRange {
    let start = range.offset() & !511;
    ByteRange::from_bounds(start, range.end().next_multiple_of(512).min(size & !511).max(start))
}

/// Lets `qemu-io` carry out commands on an image.
pub fn qemu_io(path: &Path, commands: &[String]) {
    let arguments = ["-f", "qcow2", "-d", "unmap"].map(str::to_owned).into_iter();
    let commands = commands.iter().flat_map(|command| ["-c".to_owned(), command.clone()]);
    let arguments: Vec<_> = arguments.chain(commands).chain([text(path).to_owned()]).collect();
    run("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
}

/// Lets `qemu-io` change an image, and does the same to `model`. Whole sectors only, as it asks for.
fn prefill(random: &mut Random, path: &Path, model: &mut [u8], cluster_size: Option<u64>) {
    let size = u64::try_from(model.len()).unwrap();
    let mut commands = Vec::new();
    // Compressed clusters go where nothing is yet.
    for at in (0..size).step_by(usize_from(cluster_size.unwrap_or(u64::MAX))) {
        let Some(len) = cluster_size.filter(|len| at + len <= size) else { break };
        if commands.len() < 64 && random.chance(if len > 65_536 { 50 } else { 5 }) {
            let byte = u8::try_from(1 + random.below(250)).unwrap();
            model[usize_from(at)..usize_from(at + len)].fill(byte);
            commands.push(format!("write -c -P {byte} {at} {len}"));
        }
    }
    for _ in 0..random.below(12) {
        let range = sectors(random_range(random, size), size);
        if range.is_empty() {
            continue;
        }
        let place = usize_from(range.offset())..usize_from(range.end());
        let what = format!("{} {}", range.offset(), range.len());
        commands.push(if random.chance(30) {
            model[place].fill(0);
            format!("write -z {}{what}", if random.chance(50) { "-u " } else { "" })
        } else {
            let byte = u8::try_from(1 + random.below(250)).unwrap();
            model[place].fill(byte);
            format!("write -P {byte} {what}")
        });
    }
    qemu_io(path, &commands);
}

impl Scene {
    /// Makes the image that is wished for.
    pub fn make(wish: Wish, folder: tempfile::TempDir, direct: bool) -> Self {
        let mut random = Random(!wish.seed);
        let random = &mut random;
        let path = folder.path().join("image.qcow2");
        let data_file = (wish.data_file != DataFile::No).then(|| folder.path().join("data"));
        let mut scene = Self {
            path,
            chain: Vec::new(),
            data_file,
            model: Vec::new(),
            snapshot: None,
            direct,
            folder,
            wish,
        };
        for (depth, below) in scene.wish.chain.clone().into_iter().enumerate() {
            scene.put_below(random, depth, below);
        }
        scene.model.resize(usize_from(scene.wish.size), 0);
        match scene.wish.maker {
            Maker::Ours => scene.create(),
            Maker::Qemu => scene.create_by_qemu(),
        }
        let compressed = scene.wish.compressed.then(|| scene.wish.cluster_size());
        prefill(random, &scene.path, &mut scene.model, compressed);
        if scene.wish.snapshot {
            run("qemu-img", &["snapshot", "-c", "before", text(&scene.path)]).unwrap();
            scene.snapshot = Some(scene.model.clone());
        }
        if scene.wish.bitmaps {
            for arguments in [&["one"][..], &["--disable", "-g", "4k", "two"]] {
                let [options @ .., name] = arguments else { unreachable!() };
                run("qemu-img", &[&["bitmap", "--add"], options, &[text(&scene.path), name]].concat())
                    .unwrap();
            }
        }
        if random.chance(50) {
            prefill(random, &scene.path, &mut scene.model, None);
        }
        scene
    }

    fn put_below(&mut self, random: &mut Random, depth: usize, below: Below) {
        let path = self.folder.path().join(format!("base{depth}"));
        let options = format!(
            "cluster_size={}{}",
            1_u64 << below.cluster_bits,
            if below.extended_l2 { ",extended_l2=on" } else { "" }
        );
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((lower, format)) = self.chain.last() {
            arguments.extend(["-b", text(lower), "-F", format]);
        }
        let size = below.size.to_string();
        arguments.extend([text(&path), &size]);
        run("qemu-img", &arguments).unwrap();
        self.model.resize(usize_from(below.size), 0);
        prefill(random, &path, &mut self.model, None);
        if below.format == "raw" {
            std::fs::write(&path, &self.model).unwrap();
        }
        self.chain.push((path, below.format));
    }

    fn create_by_qemu(&self) {
        let mut options = self.wish.options();
        if let Some(data) = &self.data_file {
            options += &format!(",data_file={}", data.display());
        }
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((below, format)) = self.chain.last() {
            arguments.extend(["-b", text(below), "-F", format]);
        }
        let size = self.wish.size.to_string();
        arguments.extend([text(&self.path), &size]);
        run("qemu-img", &arguments).unwrap();
    }

    fn create(&self) {
        let new = |path: &PathBuf| {
            std::fs::write(path, []).unwrap();
            ImageFile::new(storage(path, false, Access::ReadWrite))
        };
        let name = |path: &PathBuf| text(path).as_bytes().to_vec();
        let below = self.chain.last();
        let options = CreateOptions {
            size: self.wish.size,
            cluster_bits: self.wish.cluster_bits,
            version: self.wish.version,
            refcount_order: self.wish.refcount_bits.trailing_zeros(),
            backing_file: below.map(|(path, _)| name(path)),
            backing_format: below.map(|(_, format)| format.as_bytes().to_vec()),
            preallocation: match self.wish.preallocation {
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => Preallocation::Off,
            },
            lazy_refcounts: self.wish.lazy_refcounts,
            compression: if self.wish.zstd { Compression::Zstd } else { Compression::Deflate },
            extended_l2: self.wish.extended_l2,
            data_file: self.data_file.as_ref().map(name),
            data_file_raw: self.wish.data_file == DataFile::Raw,
        };
        block_on(async {
            let data = self.data_file.as_ref().map(new);
            create(&new(&self.path), data.as_ref(), &options).await.unwrap();
        })
        .unwrap();
    }

    /// The image, opened by ours.
    pub async fn open(&self, read_only: bool) -> Arc<Node> {
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let mut backing = None;
        for (path, format) in &self.chain {
            let storage = storage(path, false, Access::ReadOnly);
            let driver = if *format == "raw" {
                Driver::Raw(Raw::whole(storage))
            } else {
                let options = ImageOptions { read_only: true, backing, ..ImageOptions::default() };
                Driver::Qcow2(Qcow2::open(storage, options).await.unwrap())
            };
            backing = Some(node(driver, true));
        }
        let data_file = self.data_file.as_ref().map(|path| storage(path, false, access));
        let options = ImageOptions { read_only, backing, data_file, cache: Some(0) };
        let image = Qcow2::open(storage(&self.path, self.direct, access), options).await.unwrap();
        node(Driver::Qcow2(image), read_only)
    }
}

pub fn storage(path: &Path, direct: bool, access: Access) -> Arc<dyn Storage> {
    let options = OpenOptions {
        access,
        cache: if direct { Cache::Direct } else { Cache::Page },
        discard: open::Discard::Unmap,
        ..OpenOptions::default()
    };
    Arc::new(FileStorage::open(path, &options).unwrap())
}

pub fn node(driver: Driver, read_only: bool) -> Arc<Node> {
    let options = NodeOptions { read_only, discard: Discard::Unmap, ..NodeOptions::default() };
    Node::new(NodeName::generated(0), driver, options, Arc::new(RealClock::new()))
}
