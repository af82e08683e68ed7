//! `block_resize`.

use std::sync::Arc;

use heliostat_block::driver::Preallocation;
use serde_json::{Value, json};

use super::super::arguments::Arguments;
use super::super::refusal::Refusal;
use crate::daemon::{Daemon, DaemonError};

pub(super) fn resize(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Result<Value, Refusal> {
    let Some(node) = arguments.text("node-name") else {
        // There are no devices here, and a node's name is none, as in QEMU.
        let device = arguments.text("device").unwrap_or_default().to_owned();
        return Err(DaemonError::NoDeviceNorNode { device, node: String::new() }.into());
    };
    daemon.resize_node(node, arguments.int("size").unwrap_or(-1), Preallocation::Off)?;
    Ok(json!({}))
}
