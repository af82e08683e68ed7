//! `blockdev-mirror`.

use std::sync::Arc;

use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{CopyMode, OnError};
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use crate::daemon::{Daemon, MirrorSpec};

pub(super) fn start(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let (sync, sync_not_there) = match arguments.required_text("sync") {
        "full" => (SyncMode::Full, None),
        "top" => (SyncMode::Top, None),
        "none" => (SyncMode::None, None),
        "bitmap" => (SyncMode::None, Some("bitmap")),
        _ => (SyncMode::None, Some("incremental")),
    };
    let device = arguments.required_text("device");
    // Without an id QEMU takes the device's name, and a node is no device: the id is empty, which is refused.
    let base = MirrorSpec::new(
        arguments.text("job-id").unwrap_or_default(),
        device,
        arguments.required_text("target"),
    );
    let spec = MirrorSpec {
        replaces: arguments.text("replaces").map(str::to_owned),
        filter_node_name: arguments.text("filter-node-name").map(str::to_owned),
        sync,
        sync_not_there,
        speed: arguments.int("speed").unwrap_or(0),
        granularity: arguments.uint32("granularity"),
        buf_size: arguments.int("buf-size"),
        on_source_error: on_error(arguments, "on-source-error"),
        on_target_error: on_error(arguments, "on-target-error"),
        copy_mode: copy_mode(arguments).unwrap_or(base.copy_mode),
        unmap: arguments.flag("unmap").unwrap_or(base.unmap),
        target_is_zero: arguments.flag("target-is-zero").unwrap_or(base.target_is_zero),
        auto_finalize: arguments.flag("auto-finalize").unwrap_or(base.auto_finalize),
        auto_dismiss: arguments.flag("auto-dismiss").unwrap_or(base.auto_dismiss),
        ..base
    };
    daemon.start_mirror(&spec)?;
    Ok(json!({}))
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
