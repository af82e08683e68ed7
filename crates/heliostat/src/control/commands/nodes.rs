//! `blockdev-add`, `blockdev-del`, `query-named-block-nodes`.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::node::{DetectZeroes, Discard};
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::not_there;
use crate::daemon::{CacheUse, Child, Daemon, DriverSpec, FileSpec, NodeEntry, NodeSpec, Sharing};

/// How long a node over nothing is when nothing is said, as in QEMU.
const NULL_SIZE_DEFAULT: u64 = 1 << 30;

/// What a node that is made for another takes over from it, where nothing is said.
#[derive(Clone, Copy, Default)]
struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    force_share: bool,
    discard: Discard,
    cache: CacheUse,
}

pub(super) fn add(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    if arguments.text("node-name").is_none() {
        return Err(Refusal::new("'node-name' must be specified for the root node"));
    }
    let spec = node_spec(arguments, Inherited::default())?;
    daemon.add_node(&spec)?;
    Ok(json!({}))
}

pub(super) fn delete(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.remove_node(arguments.required_text("node-name"))?;
    Ok(json!({}))
}

fn node_spec(arguments: Arguments<'_>, above: Inherited) -> Result<NodeSpec, Refusal> {
    if arguments.flag("active") == Some(false) {
        return Err(not_there("active"));
    }
    let cache = arguments.object("cache");
    let cache_flag = |name: &str, above: bool| cache.and_then(|cache| cache.flag(name)).unwrap_or(above);
    let own = Inherited {
        read_only: arguments.flag("read-only").unwrap_or(above.read_only),
        auto_read_only: arguments.flag("auto-read-only").unwrap_or(above.auto_read_only),
        force_share: arguments.flag("force-share").unwrap_or(above.force_share),
        discard: match arguments.text("discard") {
            Some("unmap") => Discard::Unmap,
            Some(_) => Discard::Ignore,
            None => above.discard,
        },
        cache: CacheUse {
            direct: cache_flag("direct", above.cache.direct),
            no_flush: cache_flag("no-flush", above.cache.no_flush),
        },
    };
    if own.force_share && !own.read_only {
        return Err(Refusal::new("force-share=on can only be used with read-only images"));
    }
    Ok(NodeSpec {
        name: arguments.text("node-name").map(str::to_owned),
        driver: driver_spec(arguments, own)?,
        read_only: own.read_only,
        auto_read_only: own.auto_read_only,
        discard: own.discard,
        detect_zeroes: match arguments.text("detect-zeroes") {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        cache: own.cache,
    })
}

fn driver_spec(arguments: Arguments<'_>, own: Inherited) -> Result<DriverSpec, Refusal> {
    match arguments.required_text("driver") {
        "file" => Ok(DriverSpec::File(file_spec(arguments, own)?)),
        "host_device" => Ok(DriverSpec::HostDevice(file_spec(arguments, own)?)),
        "null-co" => {
            let size = bytes(arguments, "size")?.unwrap_or(NULL_SIZE_DEFAULT);
            Ok(DriverSpec::NullCo { size, read_zeroes: arguments.flag("read-zeroes").unwrap_or(false) })
        }
        _ => {
            let file = match (arguments.text("file"), arguments.object("file")) {
                (Some(name), _) => Child::Named(name.to_owned()),
                // What the node above lets through, the one below need not filter again.
                (None, Some(child)) => {
                    let above = Inherited { discard: Discard::Unmap, ..own };
                    Child::New(Box::new(node_spec(child, above)?))
                }
                (None, None) => return Err(Refusal::new("Parameter 'file' is missing")),
            };
            let offset = bytes(arguments, "offset")?.unwrap_or(0);
            Ok(DriverSpec::Raw { file, offset, size: bytes(arguments, "size")? })
        }
    }
}

fn file_spec(arguments: Arguments<'_>, own: Inherited) -> Result<FileSpec, Refusal> {
    if arguments.has("pr-manager") {
        return Err(not_there("pr-manager"));
    }
    if arguments.text("aio") == Some("native") && !own.cache.direct {
        return Err(Refusal::new(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    let shares = own.force_share || arguments.text("locking") == Some("off");
    let sharing = if shares { Sharing::Anything } else { Sharing::Locked };
    Ok(FileSpec { path: PathBuf::from(arguments.required_text("filename")), sharing })
}

fn bytes(arguments: Arguments<'_>, name: &str) -> Result<Option<u64>, Refusal> {
    let Some(number) = arguments.int(name) else { return Ok(None) };
    let bytes = u64::try_from(number);
    bytes
        .map(Some)
        .map_err(|_| Refusal::new(format!("Value '{number}' is out of range for parameter '{name}'")))
}

pub(super) fn query(daemon: &Arc<Daemon>) -> Value {
    daemon.nodes().iter().map(described).collect()
}

fn described(entry: &NodeEntry) -> Value {
    let NodeEntry { node, driver, path, cache, .. } = entry;
    let path = path.to_string_lossy();
    let mut image = json!({ "virtual-size": node.size(), "filename": path, "format": driver });
    if let Some(allocated) = node.allocated_size() {
        image["actual-size"] = json!(allocated);
    }
    if matches!(*driver, "file" | "host_device") {
        image["format-specific"] = json!({ "type": "file", "data": {} });
    }
    if *driver != "null-co" {
        image["dirty-flag"] = json!(false);
    }
    let detect_zeroes = match node.options().detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    json!({
        "iops_rd": 0,
        "detect_zeroes": detect_zeroes,
        "active": true,
        "image": image,
        "iops_wr": 0,
        "ro": node.options().read_only,
        "node-name": node.name().as_str(),
        "backing_file_depth": 0,
        "drv": driver,
        "iops": 0,
        "bps_wr": 0,
        "write_threshold": 0,
        "encrypted": false,
        "bps": 0,
        "bps_rd": 0,
        "cache": { "no-flush": cache.no_flush, "direct": cache.direct, "writeback": true },
        "file": path,
    })
}
