//! As `qmp_differential.rs`, for `block_resize`; and what clients of an export see of it, which QEMU refuses.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
mod qmp;

use std::path::Path;
use std::sync::Arc;

use common::qcow2::{assert_sound, qemu_img, try_qemu_img};
use heliostat_block::buffer::Buffer;
use heliostat_block::driver::Preallocation;
use heliostat_block::nbd::Errno;
use heliostat_block::nbd::client_request::Ask;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Durability;
use heliostat_host::open::Cache;
use heliostat_host::runtime::block_on;
use nbd::Served;
use qmp::transcript::Step::{self, Await, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn add(options: Value) -> Step {
    Do("blockdev-add", options)
}

fn file(node: &str, image: &str) -> Step {
    add(json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{image}") }))
}

fn delete(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn resize(node: &str, size: i64) -> Step {
    Do("block_resize", json!({ "node-name": node, "size": size }))
}

const MIB: i64 = 1 << 20;

/// Compares, with images in both folders.
fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        let make =
            |arguments: &[&str]| qemu_img(peer.folder(), &[&["create", "-q", "-f"], arguments].concat());
        peer.image("a", 1 << 20);
        peer.image("b", 1 << 20);
        make(&["qcow2", "q.qcow2", "1M"]);
        make(&["qcow2", "r.qcow2", "1M"]);
        make(&["qcow2", "-b", "a", "-F", "raw", "over.qcow2"]);
        make(&["qcow2", "snap.qcow2", "1M"]);
        qemu_img(peer.folder(), &["snapshot", "-c", "first", "snap.qcow2"]);
    });
}

#[test]
fn files_and_raw_nodes_are_resized_and_refused_alike() {
    let with = |arguments: Value| Do("block_resize", arguments);
    let follows = "a node above that has its size from below would not hear of it";
    let mut script = vec![
        file("a", "a"),
        resize("a", 2 * MIB),
        list(),
        resize("a", 1000),
        list(),
        resize("a", 0),
        resize("a", -1),
        resize("zz", -1),
        resize("zz", MIB),
        resize("a", i64::MAX),
        with(json!({ "size": MIB })),
        with(json!({ "device": "a", "size": MIB })),
        with(json!({ "device": "zz", "node-name": "a", "size": MIB })),
        with(json!({ "node-name": "a" })),
        with(json!({ "node-name": "a", "size": "1M" })),
        with(json!({ "node-name": "a", "size": MIB, "zork": 1 })),
        list(),
    ];
    script.extend([
        add(json!({ "driver": "raw", "node-name": "r", "file": "a" })),
        resize("r", 2 * MIB),
        list(),
        Differs("block_resize", json!({ "node-name": "a", "size": 2 * MIB }), follows),
        delete("r"),
        add(json!({ "driver": "raw", "node-name": "r", "file": "a", "offset": 512, "size": MIB })),
        resize("r", 2 * MIB),
        resize("r", MIB / 2),
        resize("a", 5 * MIB),
        delete("r"),
        add(json!({ "driver": "raw", "node-name": "r", "file": "a", "offset": 512 })),
        resize("r", 3 * MIB),
        resize("r", 512),
        delete("r"),
        add(json!({ "driver": "raw", "node-name": "r", "file": "a", "size": 1024 })),
        resize("r", 2 * MIB),
        delete("r"),
        add(json!({ "driver": "file", "node-name": "ro", "read-only": true, "filename": "DIR/b" })),
        resize("ro", 2 * MIB),
        add(json!({ "driver": "null-co", "node-name": "n", "size": MIB })),
        resize("n", 2 * MIB),
    ]);
    compare(&script);
}

#[test]
fn images_are_resized_and_refused_alike() {
    let image = |node: &str, name: &str| {
        let file =
            json!({ "driver": "file", "node-name": format!("{node}f"), "filename": format!("DIR/{name}") });
        add(json!({ "driver": "qcow2", "node-name": node, "file": file }))
    };
    let script = vec![
        image("q", "q.qcow2"),
        resize("q", 2 * MIB),
        list(),
        resize("q", MIB / 2),
        resize("q", 1000),
        resize("q", 2 << 60),
        resize("qf", MIB),
        image("s", "snap.qcow2"),
        resize("s", 2 * MIB),
        Differs(
            "block_resize",
            json!({ "node-name": "s", "size": MIB }),
            "an image with snapshots is not made shorter yet",
        ),
        file("a", "a"),
        add(json!({
            "driver": "qcow2", "node-name": "o", "backing": "a",
            "file": { "driver": "file", "filename": "DIR/over.qcow2" },
        })),
        resize("a", 2 * MIB),
        resize("o", 2 * MIB),
        delete("o"),
        resize("a", 2 * MIB),
        add(json!({
            "driver": "qcow2", "node-name": "ro", "read-only": true,
            "file": { "driver": "file", "filename": "DIR/r.qcow2" },
        })),
        resize("ro", 2 * MIB),
    ];
    compare(&script);
}

#[test]
fn nodes_of_a_mirror_are_not_resized_in_the_same_words() {
    let script = vec![
        file("s", "a"),
        file("t", "b"),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" })),
        Await("BLOCK_JOB_READY", "j"),
        resize("s", 2 * MIB),
        resize("t", 2 * MIB),
        resize("s", -1),
        Do("job-cancel", json!({ "id": "j" })),
        Await("null", "j"),
        resize("s", 2 * MIB),
        resize("t", 2 * MIB),
        list(),
    ];
    compare(&script);
}

fn export(id: &str, node: &str, writable: bool) -> Step {
    let options = json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable });
    Do("block-export-add", options)
}

/// An export is gone when its event is there.
fn unexport(id: &'static str) -> [Step; 2] {
    [Do("block-export-del", json!({ "id": id })), Await("BLOCK_EXPORT_DELETED", id)]
}

#[test]
fn exported_nodes_are_not_made_shorter_in_the_same_words_and_may_grow_where_qemu_refuses() {
    let why = "clients go on, and see the new size when they connect again";
    let grow =
        |node: &str, size: i64| Differs("block_resize", json!({ "node-name": node, "size": size }), why);
    let mut script = vec![
        file("a", "a"),
        add(json!({
            "driver": "qcow2", "node-name": "q",
            "file": { "driver": "file", "filename": "DIR/q.qcow2" },
        })),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
    ];
    for writable in [true, false] {
        for node in ["a", "q"] {
            script.extend([
                export("e", node, writable),
                resize(node, MIB / 2),
                resize(node, MIB),
                resize(node, 1000),
                resize(node, -1),
            ]);
            script.extend(unexport("e"));
        }
    }
    script.extend([
        add(json!({ "driver": "raw", "node-name": "r", "file": "a" })),
        export("e", "a", false),
        resize("r", MIB / 2),
        grow("r", 2 * MIB),
    ]);
    script.extend(unexport("e"));
    script.extend([
        resize("r", 3 * MIB),
        delete("r"),
        export("e", "a", true),
        export("f", "q", true),
        grow("a", 4 * MIB),
        grow("q", 4 * MIB),
    ]);
    compare(&script);
}

fn resized(node: &Arc<Node>, size: u64) {
    block_on(node.resize(size, Preallocation::Off)).unwrap().unwrap();
}

#[test]
fn a_client_of_a_node_that_has_become_shorter_is_refused_what_is_beyond() {
    let folder = common::folder();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let served = Served::with_file(&path, Cache::Page);
    let mut old = served.guest("disk");
    assert_eq!(old.found.terms.size, 1 << 20);
    let node = served.graph.node("disk").unwrap();
    resized(&node, 1 << 16);
    assert_eq!(old.read(0, 1 << 16), vec![7; 1 << 16]);
    for range in [
        ByteRange::new(1 << 16, 512),
        ByteRange::new((1 << 16) - 512, 1024),
        ByteRange::new((1 << 20) - 1, 1),
    ] {
        let range = range.unwrap();
        let len = usize::try_from(range.len()).unwrap();
        let read = Ask::Read { offset: range.offset(), buffer: Buffer::zeroed(len) };
        assert_eq!(old.ask(read, &[]).unwrap_err().errno, Errno::Invalid, "{range}");
        let write = Ask::Write { range, durability: Durability::Cached };
        assert_eq!(old.ask(write, &vec![1; len]).unwrap_err().errno, Errno::Invalid, "{range}");
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 16);
    assert_eq!(served.guest("disk").found.terms.size, 1 << 16);
    resized(&node, 2 << 20);
    assert_eq!(served.guest("disk").found.terms.size, 2 << 20, "who connects now is told the size of now");
    assert_eq!(old.read((1 << 20) - 512, 512), vec![0; 512], "what came back is zero");
}

#[test]
fn an_image_that_is_resized_by_a_daemon_is_sound_afterwards() {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "q.qcow2", "1M"]).is_none() {
        return;
    }
    let daemon = heliostat::daemon::Daemon::new();
    let spec = heliostat::daemon::NodeSpec::file("f", folder.path().join("q.qcow2"));
    let child = heliostat::daemon::Child::New(Box::new(heliostat::daemon::NodeSpec { name: None, ..spec }));
    let image = heliostat::daemon::Qcow2Spec::new(child);
    let driver = heliostat::daemon::DriverSpec::Qcow2(Box::new(image));
    daemon.add_node(&heliostat::daemon::NodeSpec::new(Some("q".to_owned()), driver)).unwrap();
    for size in [5 << 30, 3 << 20, 1 << 40, 512] {
        daemon.resize_node("q", size, Preallocation::Off).unwrap();
    }
    daemon.shutdown().unwrap();
    assert_sound(folder.path(), "q.qcow2");
    let said: Value =
        serde_json::from_str(&qemu_img(Path::new(folder.path()), &["info", "--output=json", "q.qcow2"]))
            .unwrap();
    assert_eq!(said["virtual-size"], 512);
}
