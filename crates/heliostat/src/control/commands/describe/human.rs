//! `info block`, `info named-block-nodes` and `info block-jobs` of the human monitor: what queries answer, as text.
//!
//! Laid out as QEMU's monitor does it, so that eyes and scripts find what they look for. Made from the answers of the
//! queries alone.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Depth, described, find};
use crate::control::commands::jobs;
use crate::daemon::Daemon;

/// Carries out `info` with these words behind it. `None` where there is nothing of that kind.
pub(in super::super) fn info(daemon: &Arc<Daemon>, words: &str) -> Option<String> {
    let mut words = words.split_whitespace();
    match words.next()? {
        "block" => {
            let (mut of_nodes, mut is_verbose, mut wanted) = (false, false, None);
            for word in words {
                match word {
                    "-n" => of_nodes = true,
                    "-v" => is_verbose = true,
                    "-nv" | "-vn" => (of_nodes, is_verbose) = (true, true),
                    name => wanted = Some(name),
                }
            }
            Some(if of_nodes {
                nodes(daemon, wanted, is_verbose)
            } else {
                exports(daemon, wanted, is_verbose)
            })
        }
        "named-block-nodes" => Some(nodes(daemon, words.next(), false)),
        "block-jobs" => Some(block_jobs(&jobs::query_block_jobs(daemon))),
        _ => None,
    }
}

fn nodes(daemon: &Daemon, wanted: Option<&str>, is_verbose: bool) -> String {
    let nodes = daemon.nodes();
    let listed = nodes.iter().filter(|entry| wanted.is_none_or(|name| entry.node.name().as_str() == name));
    let texts: Vec<_> = listed
        .map(|entry| {
            let node = described(&nodes, entry, Depth::Chain);
            block(entry.node.name().as_str(), &node, None, is_verbose)
        })
        .collect();
    texts.join("\n")
}

/// What QEMU says of devices is said of exports: they are what clients see.
fn exports(daemon: &Daemon, wanted: Option<&str>, is_verbose: bool) -> String {
    let (nodes, exports) = (daemon.nodes(), daemon.exports());
    let listed = exports.iter().rev().filter(|export| wanted.is_none_or(|id| export.id == id));
    let texts: Vec<_> = listed
        .filter_map(|export| {
            let name = export.node().name().to_string();
            let node = described(&nodes, find(&nodes, &name)?, Depth::Chain);
            let attached = format!("NBD export {}", export.name);
            Some(block(&format!("{} ({name})", export.id), &node, Some(&attached), is_verbose))
        })
        .collect();
    texts.join("\n")
}

/// The text about one node, as `query-named-block-nodes` describes it.
fn block(name: &str, node: &Value, attached: Option<&str>, is_verbose: bool) -> String {
    let text = |key: &str| node[key].as_str().unwrap_or_default();
    let is = |value: &Value| value.as_bool() == Some(true);
    let mut said = String::new();
    let read_only = if is(&node["ro"]) { ", read-only" } else { "" };
    // Writing to a text does not fail, here and below.
    let _ = writeln!(said, "{name}: {} ({}{read_only})", text("file"), text("drv"));
    if let Some(attached) = attached {
        let _ = writeln!(said, "    Attached to:      {attached}");
    }
    let direct = if is(&node["cache"]["direct"]) { ", direct" } else { "" };
    let flushes = if is(&node["cache"]["no-flush"]) { ", ignore flushes" } else { "" };
    let _ = writeln!(said, "    Cache mode:       writeback{direct}{flushes}");
    if node.get("backing_file").is_some() {
        let depth = &node["backing_file_depth"];
        let _ = writeln!(said, "    Backing file:     {} (chain depth: {depth})", text("backing_file"));
    }
    if text("detect_zeroes") != "off" {
        let _ = writeln!(said, "    Detect zeroes:    {}", text("detect_zeroes"));
    }
    if is_verbose {
        said.push_str("\nImages:\n");
        let mut next = node.get("image");
        while let Some(image) = next {
            said.push_str(&dump(image));
            next = image.get("backing-image");
        }
    }
    said
}

/// An image, as `qemu-img info` shows it, but for its snapshots.
fn dump(image: &Value) -> String {
    let text = |key: &str| image[key].as_str().unwrap_or_default();
    let bytes = |key: &str| image[key].as_u64().unwrap_or(0);
    let virtual_size = bytes("virtual-size");
    let mut said = String::new();
    let _ = writeln!(said, "image: {}", text("filename"));
    let _ = writeln!(said, "file format: {}", text("format"));
    let _ = writeln!(said, "virtual size: {} ({virtual_size} bytes)", size(virtual_size));
    if image.get("actual-size").is_some() {
        let _ = writeln!(said, "disk size: {}", size(bytes("actual-size")));
    }
    if image.get("cluster-size").is_some() {
        let _ = writeln!(said, "cluster_size: {}", bytes("cluster-size"));
    }
    if image["dirty-flag"].as_bool() == Some(true) {
        said.push_str("cleanly shut down: no\n");
    }
    if image.get("backing-filename").is_some() {
        let _ = write!(said, "backing file: {}", text("backing-filename"));
        if text("full-backing-filename") != text("backing-filename") {
            let _ = write!(said, " (actual path: {})", text("full-backing-filename"));
        }
        said.push('\n');
    }
    if image.get("backing-filename-format").is_some() {
        let _ = writeln!(said, "backing file format: {}", text("backing-filename-format"));
    }
    if let Some(data) = image["format-specific"]["data"].as_object().filter(|data| !data.is_empty()) {
        said.push_str("Format specific information:\n");
        dump_object(&mut said, data, 1);
    }
    said
}

fn dump_object(said: &mut String, object: &Map<String, Value>, depth: usize) {
    for (key, value) in object {
        dump_value(said, &key.replace('-', " "), value, depth);
    }
}

fn dump_value(said: &mut String, name: &str, value: &Value, depth: usize) {
    let _ = write!(said, "{:1$}{name}:", "", depth * 4);
    match value {
        Value::Object(object) => {
            said.push('\n');
            dump_object(said, object, depth + 1);
        }
        Value::Array(list) => {
            said.push('\n');
            for (index, value) in list.iter().enumerate() {
                dump_value(said, &format!("[{index}]"), value, depth + 1);
            }
        }
        Value::String(text) => {
            let _ = writeln!(said, " {text}");
        }
        other => {
            let _ = writeln!(said, " {other}");
        }
    }
}

/// Bytes with three digits that count, in a unit in which there are fewer than a thousand.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    // In millionths, without fractions: the largest number of bytes fits.
    let mut millionths = u128::from(bytes) * 1_000_000;
    while millionths >= 1_000_000_000 && unit + 1 < UNITS.len() {
        millionths /= 1024;
        unit += 1;
    }
    let rounded = |step: u128| (millionths + step / 2) / step;
    let number = match millionths / 1_000_000 {
        100.. => rounded(1_000_000).to_string(),
        10.. => format!("{}.{}", rounded(100_000) / 10, rounded(100_000) % 10),
        1.. => format!("{}.{:02}", rounded(10_000) / 100, rounded(10_000) % 100),
        0 => format!("0.{:03}", rounded(1_000)),
    };
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {}B", UNITS[unit])
}

fn block_jobs(jobs: &Value) -> String {
    let jobs = jobs.as_array().map_or(&[][..], Vec::as_slice);
    if jobs.is_empty() {
        return "No active jobs\n".to_owned();
    }
    let mut said = String::new();
    for job in jobs {
        let text = |key: &str| job[key].as_str().unwrap_or_default();
        let _ = writeln!(
            said,
            "Type {}, device {}: Completed {} of {} bytes, speed limit {} bytes/s",
            text("type"),
            text("device"),
            job["offset"],
            job["len"],
            job["speed"],
        );
    }
    said
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::daemon::{DriverSpec, NodeSpec};

    #[test]
    fn sizes_have_three_digits_that_count() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (65536, "64 KiB"),
            (233_472, "228 KiB"),
            (1 << 20, "1 MiB"),
            (1_600_000, "1.53 MiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn an_image_is_shown_as_qemu_img_shows_it() {
        let image = json!({
            "virtual-size": 1_048_576, "filename": "/d/top", "cluster-size": 65536, "format": "qcow2",
            "actual-size": 233_472, "backing-filename": "base", "full-backing-filename": "/d/base",
            "backing-filename-format": "qcow2",
            "format-specific": {
                "type": "qcow2",
                "data": { "compat": "1.1", "lazy-refcounts": false, "bitmaps": [{ "flags": ["auto"], "name": "b" }] },
            },
        });
        let text = "image: /d/top\nfile format: qcow2\nvirtual size: 1 MiB (1048576 bytes)\ndisk size: 228 KiB\n\
                    cluster_size: 65536\nbacking file: base (actual path: /d/base)\nbacking file format: qcow2\n\
                    Format specific information:\n    compat: 1.1\n    lazy refcounts: false\n    bitmaps:\n        \
                    [0]:\n            flags:\n                [0]: auto\n            name: b\n";
        assert_eq!(dump(&image), text);
    }

    #[test]
    fn nodes_and_jobs_are_shown() {
        let daemon = Daemon::new();
        assert_eq!(info(&daemon, "block").as_deref(), Some(""));
        assert_eq!(info(&daemon, "block-jobs").as_deref(), Some("No active jobs\n"));
        assert_eq!(info(&daemon, "zork"), None);
        for (name, read_only) in [("a", false), ("b", true)] {
            let driver = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
            daemon.add_node(&NodeSpec { read_only, ..NodeSpec::new(Some(name.to_owned()), driver) }).unwrap();
        }
        let file = "json:{\"read-zeroes\": true, \"driver\": \"null-co\", \"size\": 1048576}";
        let a = format!("a: {file} (null-co)\n    Cache mode:       writeback\n");
        let b = format!("b: {file} (null-co, read-only)\n    Cache mode:       writeback\n");
        assert_eq!(info(&daemon, "block -n"), Some(format!("{b}\n{a}")));
        assert_eq!(info(&daemon, "named-block-nodes").as_deref(), Some(format!("{b}\n{a}").as_str()));
        let images =
            format!("\nImages:\nimage: {file}\nfile format: null-co\nvirtual size: 1 MiB (1048576 bytes)\n");
        let verbose = info(&daemon, "block -n -v a").unwrap();
        assert!(verbose.starts_with(&format!("{a}{images}")), "{verbose}");
        let job = json!([{ "type": "mirror", "device": "j", "offset": 5, "len": 7, "speed": 0 }]);
        let text = "Type mirror, device j: Completed 5 of 7 bytes, speed limit 0 bytes/s\n";
        assert_eq!(block_jobs(&job), text);
    }
}
