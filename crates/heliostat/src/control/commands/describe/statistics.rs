//! `query-blockstats`: what was counted of requests, for each export and for each node.

use std::sync::Arc;

use heliostat_block::graph::Role;
use heliostat_block::statistics::{Kind, Statistics};
use serde_json::{Map, Value, json};

use super::super::super::arguments::Arguments;
use super::{backing, find};
use crate::daemon::{Daemon, NodeEntry};

/// How much is said of what a node stands on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    /// Only what holds its bytes.
    File,
    /// What holds what it does not, too.
    Chain,
}

pub(in super::super) fn query(daemon: &Arc<Daemon>, arguments: Arguments<'_>) -> Value {
    let nodes = daemon.nodes();
    if arguments.flag("query-nodes") == Some(true) {
        return nodes.iter().rev().map(|entry| of_node(daemon, &nodes, entry, Below::File)).collect();
    }
    let exports = daemon.exports();
    let described = exports.iter().rev().map(|export| {
        let mut said = Map::new();
        said.insert("device".to_owned(), json!(""));
        let below = find(&nodes, export.node().name().as_str())
            .map(|entry| of_node(daemon, &nodes, entry, Below::Chain));
        if let Some(Value::Object(below)) = below {
            said.extend(below);
        }
        // Where the highest write ended is the node's.
        let end = export.node().statistics().written_end();
        said.insert("stats".to_owned(), counted(&export.seat.statistics, end));
        said.insert("export".to_owned(), json!(export.id));
        Value::Object(said)
    });
    described.collect()
}

fn of_node(daemon: &Arc<Daemon>, nodes: &[NodeEntry], entry: &NodeEntry, below: Below) -> Value {
    let mut said = Map::new();
    if let Some(child) = primary(daemon, nodes, entry) {
        said.insert("parent".to_owned(), of_node(daemon, nodes, child, below));
    }
    let statistics = entry.node.statistics();
    said.insert("stats".to_owned(), counted(statistics, written_end(daemon, nodes, entry)));
    if let (Below::Chain, Some(backing)) = (below, backing(nodes, entry)) {
        said.insert("backing".to_owned(), of_node(daemon, nodes, backing, below));
    }
    said.insert("node-name".to_owned(), json!(entry.node.name().as_str()));
    if matches!(entry.driver, "file" | "host_device") {
        let discards = discards(daemon, nodes, entry);
        let specific = json!({
            "discard-bytes-ok": discards.bytes,
            "discard-nb-ok": discards.done,
            "driver": entry.driver,
            "discard-nb-failed": discards.failed,
        });
        said.insert("driver-specific".to_owned(), specific);
    }
    Value::Object(said)
}

/// The node that holds a node's bytes: of an image with a data file that, else the file.
fn primary<'a>(daemon: &Daemon, nodes: &'a [NodeEntry], entry: &NodeEntry) -> Option<&'a NodeEntry> {
    let file = find(nodes, entry.child.as_ref()?.as_str())?;
    let is_of_this = |role: &Role| matches!(role, Role::Child { of, .. } if of == entry.node.name());
    let is_data = |other: &&NodeEntry| {
        !Arc::ptr_eq(&other.node, &file.node) && daemon.graph().roles(&other.node).iter().any(is_of_this)
    };
    let has_data_file = entry.node.image().is_some_and(|image| image.data_file_written_end().is_some());
    let data = if has_data_file { nodes.iter().find(is_data) } else { None };
    Some(data.unwrap_or(file))
}

/// The nodes whose bytes go through this one.
fn above<'a>(daemon: &Daemon, nodes: &'a [NodeEntry], entry: &NodeEntry) -> Vec<&'a NodeEntry> {
    let roles = daemon.graph().roles(&entry.node);
    let names = roles.into_iter().filter_map(|role| match role {
        Role::Child { of, .. } => Some(of),
        _ => None,
    });
    names.filter_map(|name| find(nodes, name.as_str())).collect()
}

/// Where the highest write to a node ended. Those of the nodes above pass it by, and count all the same.
fn written_end(daemon: &Daemon, nodes: &[NodeEntry], entry: &NodeEntry) -> u64 {
    let own = entry.node.statistics().written_end();
    let from_above = above(daemon, nodes, entry).into_iter().map(|above| {
        let is_file = above.child.as_ref() == Some(entry.node.name());
        match above.node.image() {
            Some(image) if is_file => image.file_written_end(),
            Some(image) => image.data_file_written_end().unwrap_or(0),
            None => match written_end(daemon, nodes, above) {
                0 => 0,
                end => end + above.window_start,
            },
        }
    });
    from_above.fold(own, u64::max)
}

/// Discards that came down to a file.
#[derive(Clone, Copy, Default)]
struct Discards {
    done: u64,
    bytes: u64,
    failed: u64,
}

/// Those of nodes above that hand them on. What an image gives back of its own accord is not counted.
fn discards(daemon: &Daemon, nodes: &[NodeEntry], entry: &NodeEntry) -> Discards {
    let counts = entry.node.statistics().of(Kind::Discard);
    let own = Discards { done: counts.operations, bytes: counts.bytes, failed: counts.failed };
    above(daemon, nodes, entry).into_iter().filter(|above| above.node.image().is_none()).fold(
        own,
        |sum, above| {
            let more = discards(daemon, nodes, above);
            Discards {
                done: sum.done + more.done,
                bytes: sum.bytes + more.bytes,
                failed: sum.failed + more.failed,
            }
        },
    )
}

/// QEMU's fields in QEMU's order. Nothing is merged and nothing appended to zones here.
fn counted(statistics: &Statistics, written_end: u64) -> Value {
    let [read, write, discard, flush] =
        [Kind::Read, Kind::Write, Kind::Discard, Kind::Flush].map(|kind| statistics.of(kind));
    json!({
        "unmap_operations": discard.operations,
        "unmap_merged": 0,
        "failed_zone_append_operations": 0,
        "flush_total_time_ns": flush.nanoseconds,
        "wr_highest_offset": written_end,
        "wr_total_time_ns": write.nanoseconds,
        "failed_wr_operations": write.failed,
        "failed_rd_operations": read.failed,
        "wr_merged": 0,
        "wr_bytes": write.bytes,
        "timed_stats": [],
        "failed_unmap_operations": discard.failed,
        "zone_append_merged": 0,
        "failed_flush_operations": flush.failed,
        "account_invalid": false,
        "rd_total_time_ns": read.nanoseconds,
        "invalid_unmap_operations": discard.invalid,
        "flush_operations": flush.operations,
        "wr_operations": write.operations,
        "unmap_bytes": discard.bytes,
        "rd_merged": 0,
        "rd_bytes": read.bytes,
        "unmap_total_time_ns": discard.nanoseconds,
        "invalid_flush_operations": flush.invalid,
        "account_failed": false,
        "zone_append_total_time_ns": 0,
        "zone_append_operations": 0,
        "rd_operations": read.operations,
        "zone_append_bytes": 0,
        "invalid_zone_append_operations": 0,
        "invalid_wr_operations": write.invalid,
        "invalid_rd_operations": read.invalid,
    })
}
