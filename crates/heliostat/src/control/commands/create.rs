//! `blockdev-create`.

use std::path::PathBuf;
use std::sync::Arc;

use heliostat_block::driver::Preallocation;
use heliostat_block::driver::qcow2::create::CreateOptions;
use heliostat_block::driver::qcow2::header::Compression;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::nodes::{Inherited, child};
use super::not_there;
use crate::daemon::{Daemon, ImageSpec};

pub(super) fn start(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let Some(options) = arguments.object("options") else {
        return Err(Refusal::new("Parameter 'options' is missing"));
    };
    let spec = match options.required_text("driver") {
        "file" => ImageSpec::File {
            path: PathBuf::from(options.required_text("filename")),
            size: options.uint64("size").unwrap_or(0),
            preallocation: preallocation(options),
        },
        "qcow2" => qcow2(options)?,
        _ => return Err(Refusal::new("Driver does not support blockdev-create")),
    };
    daemon.start_create(arguments.required_text("job-id"), &spec)?;
    Ok(json!({}))
}

fn qcow2(options: Arguments<'_>) -> Result<ImageSpec, Refusal> {
    if options.has("encrypt") {
        return Err(not_there("options.encrypt"));
    }
    let base = CreateOptions::default();
    let bytes =
        |name: &str| options.text(name).filter(|text| !text.is_empty()).map(|text| text.as_bytes().to_vec());
    // What no power of two can be said of is none that is allowed, and refused with all the others.
    let power = |value: Option<u64>, default: u32| match value {
        None => default,
        Some(value) if value.is_power_of_two() => value.ilog2(),
        Some(_) => u32::MAX,
    };
    let is_unnamed = options.text("backing-file") == Some("");
    let image = CreateOptions {
        size: options.uint64("size").unwrap_or(0),
        cluster_bits: power(options.uint64("cluster-size"), base.cluster_bits),
        version: if options.text("version") == Some("v2") { 2 } else { 3 },
        refcount_order: power(options.uint64("refcount-bits"), base.refcount_order),
        backing_file: bytes("backing-file"),
        backing_format: bytes("backing-fmt").filter(|_| !is_unnamed),
        preallocation: preallocation(options),
        lazy_refcounts: options.flag("lazy-refcounts").unwrap_or(false),
        compression: match options.text("compression-type") {
            Some("zstd") => Compression::Zstd,
            _ => Compression::Deflate,
        },
        extended_l2: options.flag("extended-l2").unwrap_or(false),
        data_file: None,
        data_file_raw: options.flag("data-file-raw").unwrap_or(false),
    };
    let above = Inherited::default();
    let file = child(options, "file", above)?;
    let file = file.ok_or_else(|| Refusal::new("Parameter 'options.file' is missing"))?;
    let data_file = child(options, "data-file", above)?;
    Ok(ImageSpec::Qcow2 { file, data_file, options: Box::new(image) })
}

fn preallocation(options: Arguments<'_>) -> Preallocation {
    match options.text("preallocation") {
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        _ => Preallocation::Off,
    }
}
