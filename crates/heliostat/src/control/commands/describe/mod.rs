//! `query-named-block-nodes`: what nodes are, in QEMU's words; and what images say of themselves.
//!
//! What was counted and who uses what stand beside this. Looks at what is known already and opens nothing. `heliostat info` shows the same of an image.

mod connection;
pub(super) mod graph;
pub(super) mod human;
pub(super) mod statistics;

use std::path::Path;
use std::sync::Arc;

use heliostat_block::driver::Qcow2;
use heliostat_block::driver::qcow2::bitmap_directory::{AUTO, BitmapEntry, IN_USE};
use heliostat_block::driver::qcow2::header::{Compression, Header, compatible, incompatible};
use heliostat_block::driver::qcow2::snapshot::Snapshot;
use heliostat_block::node::DetectZeroes;
use serde_json::{Map, Value, json};

use super::super::arguments::Arguments;
use super::filters;
use crate::daemon::{Daemon, NodeEntry, resolved};

/// How much is said of what an image stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The image alone.
    Flat,
    /// All of its chain.
    Chain,
}

pub(super) fn nodes(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Value {
    let depth = if arguments.flag("flat") == Some(true) { Depth::Flat } else { Depth::Chain };
    let nodes = daemon.nodes();
    nodes.iter().map(|entry| described(&nodes, entry, depth)).collect()
}

fn described(nodes: &[NodeEntry], entry: &NodeEntry, depth: Depth) -> Value {
    let NodeEntry { node, driver, cache, .. } = entry;
    let detect_zeroes = match node.options().detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    let below = match depth {
        Depth::Flat => 0,
        Depth::Chain => std::iter::successors(backing(nodes, entry), |entry| backing(nodes, entry)).count(),
    };
    let mut described = json!({
        "iops_rd": 0,
        "detect_zeroes": detect_zeroes,
        "active": true,
        "image": image_info(nodes, entry, depth),
        "iops_wr": 0,
        "ro": node.options().read_only,
        "node-name": node.name().as_str(),
        "backing_file_depth": below,
        "drv": driver,
        "iops": 0,
        "bps_wr": 0,
        "write_threshold": 0,
        "encrypted": false,
        "bps": 0,
        "bps_rd": 0,
        "cache": { "no-flush": cache.no_flush, "direct": cache.direct, "writeback": true },
        "file": filename(nodes, entry),
    });
    let bitmaps = dirty_bitmaps(entry);
    if !bitmaps.is_empty() {
        described["dirty-bitmaps"] = json!(bitmaps);
    }
    if let Some(backing) = backing(nodes, entry) {
        described["backing_file"] = json!(filename(nodes, backing));
    }
    if let Some(nbd) = &entry.nbd {
        described["nbd"] = connection::described(&nbd.storage.status());
    }
    in_order(described, &NODE_KEYS)
}

/// The keys of a node in QEMU's order, which is that of a hash table; some clients compare texts.
const NODE_KEYS: [&str; 19] = [
    "iops_rd",
    "detect_zeroes",
    "active",
    "image",
    "iops_wr",
    "ro",
    "node-name",
    "backing_file_depth",
    "drv",
    "iops",
    "bps_wr",
    "write_threshold",
    "backing_file",
    "dirty-bitmaps",
    "encrypted",
    "bps",
    "bps_rd",
    "cache",
    "file",
];

/// The same of an image.
const IMAGE_KEYS: [&str; 12] = [
    "backing-image",
    "backing-filename-format",
    "snapshots",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "dirty-flag",
];

/// The same of what only qcow2 has.
const QCOW2_KEYS: [&str; 9] = [
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
];

/// The same object with its keys as `keys` has them, and others behind.
fn in_order(mut object: Value, keys: &[&str]) -> Value {
    let Some(map) = object.as_object_mut() else { return object };
    let first = keys.iter().filter_map(|key| map.remove_entry(*key));
    let mut ordered: Map<String, Value> = first.collect();
    ordered.append(map);
    Value::Object(ordered)
}

/// The named bitmaps, the last one first.
fn dirty_bitmaps(entry: &NodeEntry) -> Vec<Value> {
    let described = entry.node.named_bitmaps().into_iter().rev().map(|bitmap| {
        // Of the last granule QEMU counts what lies beyond the end, too.
        let granularity = u64::from(bitmap.granularity);
        let count = bitmap.bits.as_ref().map_or(0, |bits| bits.dirty_bytes().next_multiple_of(granularity));
        let mut described = json!({
            "name": bitmap.name,
            "recording": bitmap.recording,
            "persistent": bitmap.persistent,
            "busy": bitmap.busy,
            "granularity": granularity,
            "count": count,
        });
        if bitmap.bits.is_none() {
            described["inconsistent"] = json!(true);
        }
        described
    });
    described.collect()
}

/// The node among `nodes` that `entry` stands on.
fn backing<'a>(nodes: &'a [NodeEntry], entry: &NodeEntry) -> Option<&'a NodeEntry> {
    find(nodes, entry.backing.as_ref()?.as_str())
}

fn find<'a>(nodes: &'a [NodeEntry], name: &str) -> Option<&'a NodeEntry> {
    nodes.iter().find(|entry| entry.node.name().as_str() == name)
}

/// What QEMU says of an image (`ImageInfo`).
#[must_use]
pub fn image_info(nodes: &[NodeEntry], entry: &NodeEntry, depth: Depth) -> Value {
    let NodeEntry { node, driver, .. } = entry;
    let mut info = json!({
        "virtual-size": virtual_size(entry),
        "filename": filename(nodes, entry),
        "format": driver,
    });
    if let Some(allocated) = node.allocated_size() {
        info["actual-size"] = json!(allocated);
    }
    if matches!(*driver, "file" | "host_device") {
        info["format-specific"] = json!({ "type": "file", "data": {} });
    }
    if let Some(image) = node.image() {
        describe_image(&mut info, entry, image);
    }
    if let (Depth::Chain, Some(backing)) = (depth, backing(nodes, entry)) {
        info["backing-image"] = image_info(nodes, backing, depth);
    }
    if let (None, Some(size)) = (node.image(), node.cluster_size()) {
        info["cluster-size"] = json!(size);
    }
    if !matches!(*driver, "null-co" | "null-aio") && !is_over_nbd(nodes, entry) {
        let is_dirty =
            node.image().is_some_and(|image| image.header().incompatible & incompatible::DIRTY != 0);
        info["dirty-flag"] = json!(is_dirty);
    }
    in_order(info, &IMAGE_KEYS)
}

/// The size that is seen. A file that holds an image grows; QEMU counts it in sectors.
fn virtual_size(entry: &NodeEntry) -> u64 {
    match &entry.storage {
        Some(storage) if entry.driver == "file" => storage.size().next_multiple_of(512),
        _ => entry.node.size(),
    }
}

fn describe_image(info: &mut Value, entry: &NodeEntry, image: &Qcow2) {
    let header = image.header();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    info["cluster-size"] = json!(header.layout.cluster_size());
    if !entry.snapshots.is_empty() {
        info["snapshots"] = entry.snapshots.iter().map(snapshot_info).collect();
    }
    if let Some(name) = &header.backing_file {
        info["backing-filename"] = json!(text(name));
        info["full-backing-filename"] = json!(resolved(name, &entry.path));
    }
    if let Some(format) = &header.backing_format {
        info["backing-filename-format"] = json!(text(format));
    }
    info["format-specific"] = json!({ "type": "qcow2", "data": format_specific(&header, entry) });
}

fn snapshot_info(snapshot: &Snapshot) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let second = 1_000_000_000;
    let mut info = json!({
        "vm-clock-nsec": snapshot.guest_nanoseconds % second,
        "name": text(&snapshot.name),
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.guest_nanoseconds / second,
        "id": text(&snapshot.id),
        "vm-state-size": snapshot.vm_state_size,
    });
    if let Some(count) = snapshot.icount {
        info["icount"] = json!(count);
    }
    in_order(info, &["icount"])
}

fn format_specific(header: &Header, entry: &NodeEntry) -> Value {
    let mut data = Map::new();
    let mut put = |name: &str, value: Value| data.insert(name.to_owned(), value);
    let is_first_version = header.layout.version < 3;
    put("compat", json!(if is_first_version { "0.10" } else { "1.1" }));
    put(
        "compression-type",
        json!(match header.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        }),
    );
    put("refcount-bits", json!(header.layout.refcount_bits()));
    if !is_first_version {
        put("lazy-refcounts", json!(header.compatible & compatible::LAZY_REFCOUNTS != 0));
        put("corrupt", json!(header.incompatible & incompatible::CORRUPT != 0));
        put("extended-l2", json!(header.layout.extended_l2));
    }
    let named = entry.node.named_bitmaps();
    // Removed ones go when it is closed.
    let is_there = |bitmap: &&BitmapEntry| {
        entry.node.options().read_only || named.iter().any(|named| named.is_stored_as(&bitmap.name))
    };
    let stored: Vec<_> = entry.bitmaps.iter().filter(is_there).collect();
    if !stored.is_empty() {
        put("bitmaps", stored.into_iter().map(|bitmap| stored_bitmap(bitmap, entry)).collect());
    }
    if header.has_external_data() {
        if let Some(name) = &header.data_file {
            put("data-file", json!(String::from_utf8_lossy(name)));
        }
        put("data-file-raw", json!(header.is_data_file_raw()));
    }
    in_order(Value::Object(data), &QCOW2_KEYS)
}

/// A bitmap as the image has it. One that is open to be written is marked as in use there.
fn stored_bitmap(bitmap: &BitmapEntry, entry: &NodeEntry) -> Value {
    let is_open = !entry.node.options().read_only && bitmap.is_usable();
    let flags = [("in-use", is_open || bitmap.flags & IN_USE != 0), ("auto", bitmap.flags & AUTO != 0)];
    let flags: Vec<_> = flags.iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| *flag).collect();
    json!({
        "flags": flags,
        "name": String::from_utf8_lossy(&bitmap.name),
        "granularity": bitmap.granularity(),
    })
}

/// How QEMU names what a node shows: a path, unless the operator said what it stands on.
fn filename(nodes: &[NodeEntry], entry: &NodeEntry) -> String {
    if needs_definition(nodes, entry) {
        return format!("json:{}", definition(nodes, entry));
    }
    if let Some(nbd) = &entry.nbd {
        return nbd.spec.name().unwrap_or_else(|| format!("json:{}", connection::definition(&nbd.spec)));
    }
    let below = child(nodes, entry).map(|child| filename(nodes, child));
    let name = below.unwrap_or_else(|| entry.path.to_string_lossy().into_owned());
    entry.filter.as_ref().map_or(name.clone(), |filter| filters::name(filter, &name))
}

/// Whether a path alone does not say what the node is.
fn needs_definition(nodes: &[NodeEntry], entry: &NodeEntry) -> bool {
    entry.backing_is_given
        || entry.nbd.as_ref().is_some_and(|nbd| nbd.spec.name().is_none())
        || (entry.driver == "raw" && (entry.offset_is_said || entry.is_fixed))
        || entry.filter.as_ref().is_some_and(filters::needs_definition)
        || child(nodes, entry).is_some_and(|child| needs_definition(nodes, child))
}

/// Whether QEMU's driver below knows nothing of what an image is like.
fn is_over_nbd(nodes: &[NodeEntry], entry: &NodeEntry) -> bool {
    let is_raw = entry.node.image().is_none();
    is_raw && (entry.nbd.is_some() || child(nodes, entry).is_some_and(|child| is_over_nbd(nodes, child)))
}

/// The node among `nodes` through which the bytes of `entry` go.
fn child<'a>(nodes: &'a [NodeEntry], entry: &NodeEntry) -> Option<&'a NodeEntry> {
    find(nodes, entry.child.as_ref()?.as_str())
}

/// What would make the same node, with its keys in order, as QEMU writes it.
fn definition(nodes: &[NodeEntry], entry: &NodeEntry) -> String {
    let text = |path: &Path| Value::from(path.to_string_lossy()).to_string();
    let child = || {
        let child = child(nodes, entry);
        child.map_or_else(|| "null".to_owned(), |child| definition(nodes, child))
    };
    if let Some(filter) = &entry.filter {
        return filters::definition(filter, &child());
    }
    if let Some(nbd) = &entry.nbd {
        return connection::definition(&nbd.spec);
    }
    match entry.driver {
        "qcow2" => {
            let backing = match backing(nodes, entry) {
                _ if !entry.backing_is_given => String::new(),
                Some(backing) => format!("\"backing\": {}, ", definition(nodes, backing)),
                None => "\"backing\": null, ".to_owned(),
            };
            format!("{{{backing}\"driver\": \"qcow2\", \"file\": {}}}", child())
        }
        "raw" => {
            let said = |key: &str, value: Option<u64>| value.map(|value| format!("\"{key}\": {value}, "));
            let offset =
                said("offset", entry.offset_is_said.then_some(entry.window_start)).unwrap_or_default();
            let size = said("size", entry.is_fixed.then(|| entry.node.size())).unwrap_or_default();
            format!("{{{offset}\"driver\": \"raw\", {size}\"file\": {}}}", child())
        }
        driver => format!("{{\"driver\": \"{driver}\", \"filename\": {}}}", text(&entry.path)),
    }
}
