//! `blockdev-snapshot` and `blockdev-snapshot-sync`.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use crate::daemon::{Action, Daemon, SnapshotSpec, TargetMode};

pub(super) fn take(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.snapshot(arguments.required_text("node"), arguments.required_text("overlay"))?;
    Ok(json!({}))
}

pub(super) fn take_to_file(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    daemon.snapshot_to_file(&to_file(arguments))?;
    Ok(json!({}))
}

/// The action of a transaction that is the command of that name; none where it is not one of these.
pub(super) fn action(name: &str, arguments: Arguments<'_>) -> Option<Action> {
    match name {
        "blockdev-snapshot" => Some(Action::Snapshot {
            node: arguments.required_text("node").to_owned(),
            overlay: arguments.required_text("overlay").to_owned(),
        }),
        "blockdev-snapshot-sync" => Some(Action::SnapshotToFile(to_file(arguments))),
        _ => None,
    }
}

fn to_file(arguments: Arguments<'_>) -> SnapshotSpec {
    let text = |name: &str| arguments.text(name).map(str::to_owned);
    SnapshotSpec {
        device: text("device"),
        node_name: text("node-name"),
        file: PathBuf::from(arguments.required_text("snapshot-file")),
        overlay_name: text("snapshot-node-name"),
        format: text("format").unwrap_or_else(|| "qcow2".to_owned()),
        mode: match arguments.text("mode") {
            Some("existing") => TargetMode::Existing,
            _ => TargetMode::AbsolutePaths,
        },
    }
}
