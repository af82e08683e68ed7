//! As `qmp_differential.rs`, for mirrors that replace a node below the source: what may be replaced, who stands where
//! afterwards, and what may be done with the nodes meanwhile and then.
//!
//! Ours is stricter where two could write the same bytes and the mirror would hear of one of them only; and bitmaps of a
//! replaced node follow to the target.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::steps::{add, delete, file, list_nodes, mirror, of_job};
use qmp::transcript::Step::{self, Await, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        for name in ["a", "t", "t2", "new", "b"] {
            peer.image(name, 1 << 20);
        }
        let large = std::fs::File::create(peer.folder().join("large")).unwrap();
        large.set_len(2 << 20).unwrap();
        let make = |arguments: &[&str]| {
            qemu_img(peer.folder(), &[&["create", "-q", "-f", "qcow2"], arguments].concat())
        };
        make(&["-b", "b", "-F", "raw", "over"]);
    });
}

fn throttle(name: &str, below: &str) -> Value {
    json!({ "driver": "throttle", "node-name": name, "file": below, "throttle-group": "g" })
}

fn export(id: &str, node: &str, writable: bool) -> Step {
    Do(
        "block-export-add",
        json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable }),
    )
}

/// A disk `low`, `upper` on it, of which the top is `s`; a target `t`; a guest's export of `s`.
fn start(upper: &[Value]) -> Script {
    let mut script = vec![
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do("object-add", json!({ "qom-type": "throttle-group", "id": "g" })),
        file("low", "a"),
        file("t", "t"),
    ];
    script.extend(upper.iter().cloned().map(add));
    script.push(export("e", "s", true));
    script
}

/// The mirror goes to its end, and everything is looked at.
fn finish() -> Script {
    vec![
        Await("BLOCK_JOB_READY", "j"),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        list_nodes(),
        Do("query-block-exports", json!({})),
    ]
}

fn replaces(node: &str) -> Step {
    mirror(json!({ "replaces": node }))
}

#[test]
fn a_node_below_filters_is_replaced_alike() {
    let stacks = [
        vec![throttle("s", "low")],
        vec![json!({ "driver": "copy-on-read", "node-name": "s", "file": "low" })],
        vec![json!({ "driver": "blkdebug", "node-name": "s", "image": "low" })],
        vec![throttle("m", "low"), throttle("s", "m")],
        vec![
            json!({ "driver": "blkdebug", "node-name": "m", "image": "low" }),
            json!({ "driver": "copy-on-read", "node-name": "s", "file": "m" }),
        ],
        vec![json!({ "driver": "raw", "node-name": "m", "file": "low" }), throttle("s", "m")],
        vec![json!({ "driver": "raw", "node-name": "s", "file": "low" })],
    ];
    for upper in stacks {
        for replaced in ["s", "m", "low", "t", "zz"] {
            let mut script = start(&upper);
            script.push(replaces(replaced));
            let is_filter = |node: &Value| !matches!(node["driver"].as_str(), Some("raw"));
            let is_there = replaced == "s" || (replaced == "m" && upper.len() > 1);
            if is_there || (replaced == "low" && upper.iter().all(is_filter)) {
                script.extend(finish());
            }
            script.extend(["low", "m", "t", "s"].map(delete));
            compare(&script);
        }
    }
}

#[test]
fn a_disk_moves_twice_below_its_filter_alike() {
    let mut script = start(&[throttle("s", "low")]);
    let by_hand = json!({ "replaces": "low", "auto-finalize": false, "auto-dismiss": false });
    script.extend([
        file("t2", "t2"),
        mirror(by_hand),
        Await("BLOCK_JOB_READY", "j"),
        of_job("block-job-complete", "device"),
        Await("pending", "j"),
        of_job("job-finalize", "id"),
        Await("concluded", "j"),
        list_nodes(),
        of_job("job-dismiss", "id"),
        delete("low"),
        mirror(json!({ "replaces": "t", "target": "t2", "sync": "none" })),
    ]);
    script.extend(finish());
    script.extend(["t", "t2", "s"].map(delete));
    compare(&script);
}

#[test]
fn what_was_made_for_a_filter_goes_when_it_is_replaced_alike() {
    let inner = json!({ "driver": "qcow2", "node-name": "inner", "file": {
        "driver": "file", "filename": "DIR/over", "node-name": "innermost",
    } });
    let upper = json!({ "driver": "throttle", "node-name": "s", "file": inner, "throttle-group": "g" });
    let mut script = start(&[upper]);
    script.push(replaces("innermost"));
    script.push(replaces("inner"));
    script.extend(finish());
    script.extend(["inner", "t", "s"].map(delete));
    compare(&script);
}

#[test]
fn a_cancelled_replacement_leaves_everything_where_it_was_alike() {
    for (command, key) in [("block-job-cancel", "device"), ("job-cancel", "id")] {
        let mut script = start(&[throttle("s", "low")]);
        script.extend([
            replaces("low"),
            Await("BLOCK_JOB_READY", "j"),
            of_job(command, key),
            Await("null", "j"),
            list_nodes(),
        ]);
        script.extend(["t", "low"].map(delete));
        compare(&script);
    }
    let mut script = start(&[throttle("s", "low")]);
    script.push(file("large", "large"));
    script.push(mirror(json!({ "replaces": "low", "target": "large" })));
    script.push(Await("null", "j"));
    script.push(list_nodes());
    compare(&script);
}

#[test]
fn a_node_that_is_to_be_replaced_is_used_and_refused_alike() {
    let mut script = start(&[throttle("s", "low")]);
    let second = |device: &str, target: &str| {
        let arguments = json!({ "job-id": "k", "device": device, "target": target, "sync": "full" });
        Do("blockdev-mirror", arguments)
    };
    let reopen = |more: Value| {
        let mut options = json!({ "driver": "file", "node-name": "low", "filename": "DIR/a" });
        for (key, value) in more.as_object().into_iter().flatten() {
            options[key] = value.clone();
        }
        Do("blockdev-reopen", json!({ "options": [options] }))
    };
    let writer = json!({ "type": "nbd", "id": "w", "name": "w", "node-name": "low", "writable": true });
    let deaf = "the mirror would not hear of it";
    script.extend([
        file("t2", "t2"),
        export("r", "low", false),
        replaces("low"),
        Await("BLOCK_JOB_READY", "j"),
        delete("low"),
        Do("block_resize", json!({ "node-name": "low", "size": 2 << 20 })),
        second("low", "t2"),
        second("s", "t2"),
        Differs("block-export-add", writer, deaf),
        Differs("blockdev-add", json!({ "driver": "raw", "node-name": "p", "file": "low" }), deaf),
        reopen(json!({ "read-only": true })),
        reopen(json!({ "discard": "unmap" })),
        Do("block-dirty-bitmap-add", json!({ "node": "s", "name": "above" })),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        Do("query-block-exports", json!({})),
        delete("low"),
        delete("s"),
        Do("block-export-del", json!({ "id": "e" })),
        Await("BLOCK_EXPORT_DELETED", "e"),
        Do("block-export-del", json!({ "id": "r" })),
        Await("BLOCK_EXPORT_DELETED", "r"),
        delete("t"),
        delete("s"),
        delete("t"),
        Do("query-named-block-nodes", json!({})),
    ]);
    // The second user is not there with ours.
    script.retain(|step| !matches!(step, Differs(..)));
    compare(&script);
}

#[test]
fn ours_lets_nobody_write_past_a_mirror_that_replaces() {
    let mut script = start(&[throttle("s", "low")]);
    let writer = json!({ "type": "nbd", "id": "w", "name": "w", "node-name": "low", "writable": true });
    let deaf = "the mirror would not hear of it";
    script.extend([
        replaces("low"),
        Await("BLOCK_JOB_READY", "j"),
        Differs("block-export-add", writer, deaf),
        Differs("blockdev-add", json!({ "driver": "raw", "node-name": "p", "file": "low" }), deaf),
    ]);
    compare(&script);
}

fn drive(more: Value) -> Step {
    let mut arguments = json!({
        "job-id": "j", "device": "s", "target": "DIR/new", "sync": "full", "node-name": "nt", "replaces": "low",
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    Do("drive-mirror", arguments)
}

#[test]
fn a_target_that_is_made_takes_the_place_below_a_filter_alike() {
    for more in [
        json!({}),
        json!({ "format": "throttle" }),
        json!({ "format": "copy-on-read" }),
        json!({ "format": "raw" }),
        json!({ "format": "qcow2" }),
        json!({ "format": "qcow2", "sync": "top" }),
        json!({ "mode": "existing" }),
        json!({ "mode": "existing", "format": "raw" }),
        json!({ "replaces": "t", "format": "raw" }),
    ] {
        let mut script = start(&[throttle("s", "low")]);
        let is_right = more.get("replaces").is_none()
            && (more["mode"] == "existing" || matches!(more["format"].as_str(), Some("raw" | "qcow2")));
        script.push(drive(more));
        if is_right {
            script.extend(finish());
            script.extend(["nt", "low"].map(delete));
        }
        compare(&script);
    }
}

#[test]
fn an_overlay_below_a_filter_is_replaced_by_one_on_the_same_chain_alike() {
    let below = json!({ "driver": "raw", "node-name": "base", "read-only": true, "file": {
        "driver": "file", "filename": "DIR/b", "read-only": true,
    } });
    let over = json!({
        "driver": "qcow2", "node-name": "o", "backing": "base", "file": { "driver": "file", "filename": "DIR/over" },
    });
    for sync in ["top", "full"] {
        let mut script = start(&[below.clone(), over.clone(), throttle("s", "o")]);
        script.push(drive(json!({ "replaces": "o", "sync": sync, "format": "qcow2" })));
        script.extend(finish());
        script.extend(["nt", "o", "base"].map(delete));
        script.push(Do("query-named-block-nodes", json!({ "flat": true })));
        compare(&script);
    }
}

#[test]
fn where_qemu_forgets_the_copy_ours_stands_on_what_it_replaces() {
    let mut script = start(&[throttle("s", "low")]);
    script.push(drive(json!({ "sync": "none", "format": "qcow2" })));
    script.extend([
        Await("BLOCK_JOB_READY", "j"),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        Differs(
            "query-named-block-nodes",
            json!({ "flat": true }),
            "a target that would stand on what stands on it is thrown away, and nobody is told",
        ),
    ]);
    compare(&script);
}
