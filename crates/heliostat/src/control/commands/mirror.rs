//! `blockdev-mirror` and `drive-mirror`.

use std::sync::Arc;
use std::time::Duration;

use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{BitmapMode, CopyMode, OnError};
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use super::file_name::target_name;
use super::nodes::Inherited;
use crate::daemon::{BitmapUse, Daemon, DriveMirrorSpec, MirrorSpec, TargetMode};

pub(super) fn start(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.start_mirror(&of(daemon, arguments))?;
    Ok(json!({}))
}

/// The mirror that is asked for.
pub(super) fn of(daemon: &Daemon, arguments: Arguments<'_>) -> MirrorSpec {
    MirrorSpec { target: arguments.required_text("target").to_owned(), ..spec(daemon, arguments) }
}

pub(super) fn start_drive(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let mirror = spec(daemon, arguments);
    let above = inherited_from(daemon, &mirror.source)?;
    daemon.start_drive_mirror(&DriveMirrorSpec {
        target: target_name(arguments.required_text("target"), above),
        format: arguments.text("format").map(str::to_owned),
        node_name: arguments.text("node-name").map(str::to_owned),
        mode: match arguments.text("mode") {
            Some("existing") => TargetMode::Existing,
            _ => TargetMode::AbsolutePaths,
        },
        mirror,
    })?;
    Ok(json!({}))
}

/// What a node that is made for a mirror of `device` takes over from that.
fn inherited_from(daemon: &Daemon, device: &str) -> Result<Inherited, Refusal> {
    let source = daemon.source_of(device)?;
    let nodes = daemon.nodes();
    let entry = nodes.iter().find(|entry| Arc::ptr_eq(&entry.node, &source));
    Ok(entry.map_or_else(Inherited::default, |entry| {
        Inherited::from_above(entry.node.options().discard, entry.cache)
    }))
}

/// What both commands have in common.
fn spec(daemon: &Daemon, arguments: Arguments<'_>) -> MirrorSpec {
    let word = arguments.required_text("sync");
    let bitmap = BitmapUse {
        name: arguments.text("bitmap").map(str::to_owned),
        mode: arguments.text("bitmap-mode").map(|word| match word {
            "never" => BitmapMode::Never,
            "always" => BitmapMode::Always,
            _ => BitmapMode::OnSuccess,
        }),
        is_incremental: word == "incremental",
    };
    // Without a bitmap it is what QEMU's mirror refuses.
    let not_there = |name| if bitmap.name.is_none() { Some(name) } else { None };
    let (sync, sync_not_there) = match word {
        "full" => (SyncMode::Full, None),
        "top" => (SyncMode::Top, None),
        "none" => (SyncMode::None, None),
        "bitmap" => (SyncMode::Bitmap, not_there("bitmap")),
        _ => (SyncMode::Bitmap, not_there("incremental")),
    };
    let device = arguments.required_text("device");
    // Without an id QEMU takes the device's name, and a node is no device: the id is empty, which is refused. An
    // export is what comes closest to one.
    let is_export = daemon.node(device).is_err();
    let job_id = arguments.text("job-id").unwrap_or(if is_export { device } else { "" });
    let base = MirrorSpec::new(job_id, device, "");
    MirrorSpec {
        replaces: arguments.text("replaces").map(str::to_owned),
        filter_node_name: arguments.text("filter-node-name").map(str::to_owned),
        sync,
        sync_not_there,
        bitmap,
        speed: arguments.int("speed").unwrap_or(0),
        granularity: arguments.uint32("granularity"),
        buf_size: arguments.int("buf-size"),
        on_source_error: on_error(arguments, "on-source-error"),
        on_target_error: on_error(arguments, "on-target-error"),
        copy_mode: copy_mode(arguments).unwrap_or(base.copy_mode),
        unmap: arguments.flag("unmap").unwrap_or(base.unmap),
        target_is_zero: arguments.flag("target-is-zero").unwrap_or(base.target_is_zero),
        target_deadline: target_deadline(arguments).unwrap_or(base.target_deadline),
        auto_finalize: arguments.flag("auto-finalize").unwrap_or(base.auto_finalize),
        auto_dismiss: arguments.flag("auto-dismiss").unwrap_or(base.auto_dismiss),
        ..base
    }
}

/// The argument `target-deadline-ms`.
pub(super) fn target_deadline(arguments: Arguments<'_>) -> Option<Duration> {
    arguments.uint32("target-deadline-ms").map(|millis| Duration::from_millis(u64::from(millis)))
}

/// The argument `copy-mode`.
pub(super) fn copy_mode(arguments: Arguments<'_>) -> Option<CopyMode> {
    arguments.text("copy-mode").map(|word| match word {
        "write-blocking" => CopyMode::WriteBlocking,
        _ => CopyMode::Background,
    })
}

fn on_error(arguments: Arguments<'_>, name: &str) -> OnError {
    match arguments.text(name) {
        Some("ignore") => OnError::Ignore,
        Some("enospc") => OnError::Enospc,
        Some("stop") => OnError::Stop,
        Some("auto") => OnError::Auto,
        _ => OnError::Report,
    }
}
