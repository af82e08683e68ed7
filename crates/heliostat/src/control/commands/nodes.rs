//! `blockdev-add` and `blockdev-del`.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::node::{DetectZeroes, Discard};
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::{filters, nbd, not_there};
use crate::daemon::{
    BackingSpec, CacheUse, Child, Daemon, DriverSpec, FileSpec, NodeSpec, Qcow2Spec, Sharing, TableCache,
};

/// How long a node over nothing is when nothing is said, as in QEMU.
pub(super) const NULL_SIZE_DEFAULT: u64 = 1 << 30;

/// What a node that is made for another takes over from it, where nothing is said.
#[derive(Clone, Copy, Default)]
pub(super) struct Inherited {
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

pub(super) fn reopen(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let specs = arguments.objects("options").map(|options| node_spec(options, Inherited::default()));
    daemon.reopen_nodes(&specs.collect::<Result<Vec<_>, _>>()?)?;
    Ok(json!({}))
}

pub(super) fn delete(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.remove_node(arguments.required_text("node-name"))?;
    Ok(json!({}))
}

pub(super) fn node_spec(arguments: Arguments<'_>, above: Inherited) -> Result<NodeSpec, Refusal> {
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
        "nbd" => Ok(DriverSpec::Nbd(Box::new(nbd::client(arguments)?))),
        "null-co" => filters::null(arguments, "null-co"),
        "null-aio" => filters::null(arguments, "null-aio"),
        "blkdebug" => filters::faults(arguments, own.passed_on()),
        "throttle" => filters::throttle(arguments, own.passed_on()),
        "copy-on-read" => filters::copy_on_read(arguments, own.passed_on()),
        "preallocate" => filters::preallocate(arguments, own.passed_on()),
        "qcow2" => Ok(DriverSpec::Qcow2(Box::new(qcow2_spec(arguments, own)?))),
        _ => {
            let file = child(arguments, "file", own.passed_on())?;
            let offset = bytes(arguments, "offset")?;
            Ok(DriverSpec::Raw {
                file: file.ok_or_else(file_is_missing)?,
                offset,
                size: bytes(arguments, "size")?,
                is_guess: false,
            })
        }
    }
}

pub(super) fn file_is_missing() -> Refusal {
    Refusal::new("Parameter 'file' is missing")
}

impl Inherited {
    /// What a mirror's target takes over from its source.
    pub(super) fn from_above(discard: Discard, cache: CacheUse) -> Self {
        let discard = if discard == Discard::Unmap { discard } else { Discard::default() };
        Self { discard, cache, ..Self::default() }
    }

    /// For a node that holds another's bytes. What the node above lets through, it need not filter again.
    fn passed_on(self) -> Self {
        Self { discard: Discard::Unmap, ..self }
    }

    /// For a node that another stands on, which is not to be written.
    fn stood_on(self) -> Self {
        Self { read_only: true, auto_read_only: false, discard: Discard::default(), ..self }
    }
}

/// A node by its name, or as one that is to be made.
pub(super) fn child(
    arguments: Arguments<'_>,
    name: &str,
    above: Inherited,
) -> Result<Option<Child>, Refusal> {
    match (arguments.text(name), arguments.object(name)) {
        (Some(name), _) => Ok(Some(Child::Named(name.to_owned()))),
        (None, Some(object)) => Ok(Some(Child::New(Box::new(node_spec(object, above)?)))),
        (None, None) => Ok(None),
    }
}

fn qcow2_spec(arguments: Arguments<'_>, own: Inherited) -> Result<Qcow2Spec, Refusal> {
    if let Some(format) = arguments.object("encrypt").and_then(|encrypt| encrypt.text("format")) {
        // An image that is encrypted is refused as such.
        return Err(Refusal::new(format!(
            "No encryption in image header, but options specified format '{format}'"
        )));
    }
    let file = child(arguments, "file", own.passed_on())?.ok_or_else(file_is_missing)?;
    let backing = match child(arguments, "backing", own.stood_on())? {
        Some(child) => BackingSpec::Given(child),
        None if arguments.has("backing") => BackingSpec::Nothing,
        None => BackingSpec::FromImage,
    };
    if arguments.int("cache-clean-interval").is_some_and(|seconds| u32::try_from(seconds).is_err()) {
        return Err(Refusal::new("Cache clean interval too big"));
    }
    Ok(Qcow2Spec {
        backing,
        data_file: child(arguments, "data-file", own.passed_on())?,
        cache: TableCache {
            total: bytes(arguments, "cache-size")?,
            maps: bytes(arguments, "l2-cache-size")?,
            counts: bytes(arguments, "refcount-cache-size")?,
            piece: bytes(arguments, "l2-cache-entry-size")?,
        },
        lazy_refcounts: arguments.flag("lazy-refcounts").unwrap_or(false),
        sharing: if own.force_share { Sharing::Anything } else { Sharing::Locked },
        ..Qcow2Spec::new(file)
    })
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
    Ok(FileSpec { path: PathBuf::from(arguments.required_text("filename")), now_at: None, sharing })
}

pub(super) fn bytes(arguments: Arguments<'_>, name: &str) -> Result<Option<u64>, Refusal> {
    let Some(number) = arguments.int(name) else { return Ok(None) };
    let bytes = u64::try_from(number);
    bytes
        .map(Some)
        .map_err(|_| Refusal::new(format!("Value '{number}' is out of range for parameter '{name}'")))
}
