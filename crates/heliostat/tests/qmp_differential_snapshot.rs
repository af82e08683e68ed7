//! As `qmp_differential.rs`, for `blockdev-snapshot` and `blockdev-snapshot-sync`. Nodes are not listed while there are
//! files that were made here: a new image of ours is a little longer while it is in use.

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::transcript::Step::{self, Await, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        peer.image("r.raw", SIZE);
        peer.image("t.raw", SIZE);
        let create = |arguments: &[&str]| {
            qemu_img(peer.folder(), &[&["create", "-q", "-f", "qcow2"], arguments].concat());
        };
        for name in ["s.qcow2", "o.qcow2", "p.qcow2", "used.qcow2", "x.qcow2"] {
            create(&[name, "1M"]);
        }
        create(&["-b", "s.qcow2", "-F", "qcow2", "ob.qcow2"]);
        create(&["small.qcow2", "512k"]);
    });
}

fn add(node: &str, image: &str, more: Value) -> Step {
    let file = json!({ "driver": "file", "filename": format!("DIR/{image}") });
    let mut options = json!({ "driver": "qcow2", "node-name": node, "file": file });
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    Do("blockdev-add", options)
}

fn export(id: &str, node: &str) -> Step {
    let arguments = json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": true });
    Do("block-export-add", arguments)
}

fn start() -> Script {
    vec![
        add("s", "s.qcow2", json!({})),
        add("o", "o.qcow2", json!({})),
        add("ob", "ob.qcow2", json!({ "backing": null })),
        Do("blockdev-add", json!({ "driver": "file", "node-name": "r", "filename": "DIR/r.raw" })),
        Do("blockdev-add", json!({ "driver": "file", "node-name": "t", "filename": "DIR/t.raw" })),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        export("e", "s"),
    ]
}

fn take(node: &str, overlay: &str) -> Step {
    Do("blockdev-snapshot", json!({ "node": node, "overlay": overlay }))
}

fn take_to(changes: Value) -> Step {
    Do("blockdev-snapshot-sync", to(&changes))
}

fn to(changes: &Value) -> Value {
    let mut arguments = json!({ "node-name": "s", "snapshot-file": "DIR/n", "snapshot-node-name": "n" });
    for (key, value) in changes.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    arguments
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn exports() -> Step {
    Do("query-block-exports", json!({}))
}

fn delete(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

#[test]
fn an_overlay_that_is_open_takes_the_place_of_a_node_alike() {
    let mut script = start();
    script.extend([
        take("zz", "o"),
        take("s", "zz"),
        Do("blockdev-snapshot", json!({ "node": "s" })),
        take("o", "o"),
        take("s", "s"),
        take("s", "r"),
        add("used", "used.qcow2", json!({})),
        export("f", "used"),
        take("s", "used"),
        Do("block-export-del", json!({ "id": "f" })),
        take("s", "ob"),
        list(),
        exports(),
        take("s", "o"),
        take("ob", "s"),
        delete("s"),
        delete("ob"),
        export("late", "s"),
        take("ob", "o"),
        exports(),
        list(),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "r", "target": "used", "sync": "none" })),
        Await("BLOCK_JOB_READY", "j"),
        take("r", "ob"),
        take("o", "used"),
        Do("job-cancel", json!({ "id": "j" })),
        Await("null", "j"),
        Do("block-export-del", json!({ "id": "e" })),
        delete("o"),
        delete("ob"),
        delete("s"),
    ]);
    compare(&script);
}

#[test]
fn an_overlay_is_made_and_takes_the_place_of_a_node_alike() {
    let mut script = start();
    script.extend([
        take_to(json!({ "node-name": "zz" })),
        Do("blockdev-snapshot-sync", json!({ "device": "zz", "snapshot-file": "DIR/n" })),
        Do("blockdev-snapshot-sync", json!({ "snapshot-file": "DIR/n" })),
        Do("blockdev-snapshot-sync", json!({ "node-name": "s" })),
        Do("blockdev-snapshot-sync", json!({ "node-name": "s", "snapshot-file": "DIR/n" })),
        take_to(json!({ "snapshot-node-name": "s" })),
        take_to(json!({ "snapshot-node-name": "#x" })),
        take_to(json!({ "snapshot-file": "DIR/none/n" })),
        take_to(json!({ "snapshot-file": "DIR" })),
        take_to(json!({ "format": "raw" })),
        take_to(json!({ "format": "zork" })),
        take_to(json!({ "mode": "zork" })),
        take_to(json!({ "mode": "existing", "snapshot-file": "DIR/none" })),
        take_to(json!({ "mode": "existing", "snapshot-file": "DIR/o.qcow2", "format": "zork" })),
        take_to(json!({})),
        exports(),
        take_to(json!({ "snapshot-node-name": "n2" })),
        take_to(json!({ "node-name": "n", "snapshot-node-name": "n2" })),
        take_to(json!({ "node-name": "n", "snapshot-node-name": "n2", "snapshot-file": "DIR/n2" })),
        take_to(json!({
            "node-name": "n2", "snapshot-node-name": "n3", "snapshot-file": "DIR/x.qcow2", "mode": "existing",
        })),
        exports(),
        delete("n3"),
        // Of nobody's use it goes at once.
        take_to(json!({ "node-name": "r", "snapshot-node-name": "n4", "snapshot-file": "DIR/n4" })),
        delete("n4"),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "n3", "target": "t", "sync": "none" })),
        Await("BLOCK_JOB_READY", "j"),
        take_to(json!({ "node-name": "n3", "snapshot-node-name": "n5", "snapshot-file": "DIR/n5" })),
        take_to(json!({ "node-name": "t", "snapshot-node-name": "n5", "snapshot-file": "DIR/n5" })),
        Do("job-cancel", json!({ "id": "j" })),
        Await("null", "j"),
        Do("block-export-del", json!({ "id": "e" })),
        Await("BLOCK_EXPORT_DELETED", "e"),
        list(),
    ]);
    compare(&script);
}

#[test]
fn where_ours_is_stricter_it_is_so_on_purpose() {
    let smaller = "clients go on with the size that they know: the overlay must not be smaller";
    let mut script = start();
    script.extend([
        add("small", "small.qcow2", json!({})),
        Differs("blockdev-snapshot", json!({ "node": "s", "overlay": "small" }), smaller),
    ]);
    compare(&script);
}
