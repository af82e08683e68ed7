//! As `qmp_differential.rs`, for named dirty bitmaps: what they are told, what they record, and what an image keeps of
//! them.

mod common;
mod qmp;

use std::path::Path;
use std::process::Command;

use common::qcow2::{add_extension, assert_sound, qemu_img};
use qmp::Peer;
use qmp::transcript::Step::{self, Await, Differs, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn make_images(folder: &Path) {
    let create = |options: &str, name: &str, size: &str| {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, name, size]);
    };
    create("cluster_size=64k", "a.qcow2", "1M");
    create("cluster_size=4k", "b.qcow2", "1M");
    create("cluster_size=512", "c.qcow2", "100K");
    create("compat=0.10", "v2.qcow2", "1M");
    qemu_img(folder, &["create", "-q", "-f", "raw", "r.raw", "1M"]);
    create("cluster_size=64k", "made.qcow2", "1M");
    qemu_img(folder, &["bitmap", "--add", "made.qcow2", "one"]);
    qemu_img(folder, &["bitmap", "--add", "--disable", "-g", "4k", "made.qcow2", "two"]);
}

fn compare(script: Script) {
    compare_on(&script, |peer| make_images(peer.folder()));
}

fn open(node: &str, more: &Value) -> Step {
    let mut spec = json!({
        "driver": "qcow2",
        "node-name": node,
        "file": { "driver": "file", "filename": format!("DIR/{node}.qcow2") },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    Do("blockdev-add", spec)
}

fn raw(node: &str) -> Step {
    let file = json!({ "driver": "file", "filename": format!("DIR/{node}.raw") });
    Do("blockdev-add", json!({ "driver": "raw", "node-name": node, "file": file }))
}

fn close(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn add(node: &str, name: &str, more: &Value) -> Step {
    Do("block-dirty-bitmap-add", added(node, name, more))
}

fn added(node: &str, name: &str, more: &Value) -> Value {
    let mut arguments = json!({ "node": node, "name": name });
    for (key, value) in more.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    arguments
}

fn named(verb: &'static str, node: &str, name: &str) -> Step {
    Do(verb, json!({ "node": node, "name": name }))
}

fn remove(node: &str, name: &str) -> Step {
    named("block-dirty-bitmap-remove", node, name)
}

fn clear(node: &str, name: &str) -> Step {
    named("block-dirty-bitmap-clear", node, name)
}

fn enable(node: &str, name: &str) -> Step {
    named("block-dirty-bitmap-enable", node, name)
}

fn disable(node: &str, name: &str) -> Step {
    named("block-dirty-bitmap-disable", node, name)
}

fn merge(node: &str, target: &str, bitmaps: Value) -> Step {
    Do("block-dirty-bitmap-merge", json!({ "node": node, "target": target, "bitmaps": bitmaps }))
}

fn serve() -> Step {
    Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } }))
}

fn export(node: &str) -> Step {
    let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
    Do("block-export-add", export)
}

fn unexport(node: &str) -> [Step; 2] {
    let ended = Await("BLOCK_EXPORT_DELETED", leaked(node));
    [Do("block-export-del", json!({ "id": node, "mode": "hard" })), ended]
}

fn leaked(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

/// A guest of `node` does this.
fn guest(node: &'static str, steps: &'static [&'static str]) -> Step {
    Meanwhile(Box::new(move |peer: &Peer| {
        let uri = format!("nbd+unix:///{node}?socket={}", peer.folder().join("nbd").display());
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw", &uri]);
        for step in steps {
            command.args(["-c", step]);
        }
        let output = command.output().expect("qemu-io is installed with the daemon");
        assert!(output.status.success(), "{steps:?}: {output:?}");
    }))
}

/// The image that both have closed is sound.
fn sound(image: &'static str) -> Step {
    Meanwhile(Box::new(move |peer: &Peer| {
        assert_sound(peer.folder(), image);
    }))
}

#[test]
fn bitmaps_are_made_and_refused_in_the_same_words() {
    let long = "y".repeat(1024);
    let script: Script = vec![
        open("a", &json!({})),
        open("b", &json!({})),
        open("c", &json!({})),
        open("v2", &json!({})),
        raw("r"),
        add("zz", "", &json!({})),
        add("zz", "x", &json!({ "granularity": 3 })),
        add("a", "x", &json!({})),
        add("b", "x", &json!({})),
        add("c", "x", &json!({})),
        add("r", "x", &json!({})),
        add("a", "x", &json!({})),
        add("a", "x", &json!({ "granularity": 3 })),
        add("a", "x", &json!({ "persistent": true })),
        add("a", &long[..1023], &json!({})),
        add("a", &long, &json!({})),
        add("a", "g", &json!({ "granularity": 0 })),
        add("a", "g", &json!({ "granularity": 256 })),
        add("a", "g", &json!({ "granularity": 513 })),
        add("a", "g", &json!({ "granularity": 3_u64 << 30 })),
        add("a", "g", &json!({ "granularity": 1_u64 << 32 })),
        add("a", "g", &json!({ "granularity": -1 })),
        add("a", "g512", &json!({ "granularity": 512 })),
        add("a", "g2g", &json!({ "granularity": 1_u64 << 31, "disabled": true })),
        add("a", "p", &json!({ "persistent": true })),
        add("a", "d", &json!({ "persistent": true, "disabled": true, "granularity": 1 << 20 })),
        add("r", "p", &json!({ "persistent": true })),
        add("r", "p", &json!({ "persistent": true, "granularity": 3 })),
        add("v2", "p", &json!({ "persistent": true })),
        add("v2", "np", &json!({ "persistent": false })),
        add("a", "p", &json!({ "persistent": 1 })),
        Do("block-dirty-bitmap-add", json!({ "node": "a" })),
        Do("block-dirty-bitmap-add", json!({ "name": "a" })),
        Do("block-dirty-bitmap-add", json!({ "node": "a", "name": "b", "foo": 1 })),
        list(),
    ];
    compare(script);
}

#[test]
fn bitmaps_are_cleared_and_switched_and_removed_in_the_same_words() {
    let mut script: Script = vec![open("a", &json!({})), add("a", "x", &json!({}))];
    for verb in [remove, clear, enable, disable] {
        script.extend([verb("a", "nope"), verb("zz", "nope")]);
    }
    script.extend([
        disable("a", "x"),
        disable("a", "x"),
        list(),
        enable("a", "x"),
        enable("a", "x"),
        list(),
        clear("a", "x"),
        remove("a", "x"),
        remove("a", "x"),
        list(),
        Do("block-dirty-bitmap-remove", json!({ "node": "a" })),
        Do("block-dirty-bitmap-clear", json!({ "node": "a", "name": 1 })),
    ]);
    compare(script);
}

#[test]
fn bitmaps_record_what_guests_write_while_they_are_on() {
    let script: Script = vec![
        open("a", &json!({})),
        open("c", &json!({})),
        serve(),
        export("a"),
        export("c"),
        add("a", "coarse", &json!({})),
        add("a", "fine", &json!({ "granularity": 4096 })),
        add("a", "off", &json!({ "disabled": true })),
        add("c", "whole", &json!({ "granularity": 65536 })),
        add("c", "one", &json!({ "granularity": 1_u64 << 31 })),
        guest("a", &["write 0 4k", "write 200000 512", "write -z 500k 8k"]),
        guest("c", &["write 0 100k"]),
        list(),
        disable("a", "coarse"),
        enable("a", "off"),
        clear("a", "fine"),
        clear("c", "one"),
        guest("a", &["write 900k 1k", "read 0 512k"]),
        list(),
        enable("a", "coarse"),
        guest("a", &["write 700k 1k", "write 0 512"]),
        list(),
    ];
    compare(script);
}

#[test]
fn bitmaps_are_merged_across_nodes_and_granularities() {
    let script: Script = vec![
        open("a", &json!({})),
        open("b", &json!({})),
        open("c", &json!({})),
        serve(),
        export("a"),
        export("b"),
        add("a", "x", &json!({})),
        add("a", "fine", &json!({ "granularity": 512 })),
        add("a", "sum", &json!({ "granularity": 4096, "disabled": true })),
        add("b", "x", &json!({ "granularity": 1 << 20 })),
        add("b", "y", &json!({})),
        add("c", "x", &json!({})),
        guest("a", &["write 0 512", "write 64k 1k", "write 511k 2k"]),
        guest("b", &["write 700k 5k"]),
        merge("a", "sum", json!(["fine"])),
        list(),
        merge("a", "sum", json!(["fine", { "node": "b", "name": "y" }])),
        merge("b", "x", json!([{ "node": "a", "name": "fine" }])),
        list(),
        merge("a", "x", json!(["x"])),
        merge("a", "nope", json!(["x"])),
        merge("zz", "x", json!(["x"])),
        merge("a", "x", json!(["nope"])),
        merge("a", "x", json!([{ "node": "zz", "name": "x" }])),
        merge("a", "x", json!([{ "node": "c", "name": "x" }])),
        merge("a", "x", json!(["fine", { "node": "c", "name": "x" }])),
        merge("a", "x", json!([5])),
        merge("a", "x", json!([{ "node": "c" }])),
        merge("a", "x", json!("fine")),
        Do("block-dirty-bitmap-merge", json!({ "node": "a", "target": "x" })),
        list(),
        merge("a", "fine", json!(["x", { "node": "b", "name": "x" }])),
        list(),
    ];
    compare(script);
}

#[test]
fn what_an_image_keeps_is_what_qemus_keeps() {
    let mut script: Script = vec![
        open("made", &json!({})),
        list(),
        serve(),
        export("made"),
        add("made", "new", &json!({ "persistent": true, "granularity": 8192 })),
        add("made", "off", &json!({ "persistent": true, "disabled": true })),
        add("made", "passing", &json!({})),
        guest("made", &["write 0 4k", "write 300k 100k"]),
        merge("made", "two", json!(["new"])),
        disable("made", "one"),
        list(),
    ];
    script.extend(unexport("made"));
    script.extend([
        close("made"),
        sound("made.qcow2"),
        open("made", &json!({})),
        list(),
        remove("made", "one"),
        remove("made", "new"),
        list(),
        add("made", "one", &json!({ "persistent": true, "granularity": 1 << 20 })),
        clear("made", "two"),
        enable("made", "off"),
        close("made"),
        sound("made.qcow2"),
        open("made", &json!({})),
        list(),
        remove("made", "one"),
        remove("made", "two"),
        remove("made", "off"),
        list(),
        close("made"),
        sound("made.qcow2"),
        open("made", &json!({})),
        list(),
    ]);
    compare(script);
}

#[test]
fn bitmaps_come_and_go_in_headers_that_others_have_filled() {
    let images = |peer: &Peer| {
        let folder = peer.folder();
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "known.qcow2", "1M"]);
        qemu_img(folder, &["bitmap", "--add", "known.qcow2", "one"]);
        add_extension(&folder.join("known.qcow2"), 0x1234_5678, &[7; 40]);
        qemu_img(folder, &["create", "-q", "-f", "raw", "base.raw", "100K"]);
        // In clusters of 1 KiB this moves when bitmaps come, and takes more than a sector.
        let name = format!("{}base.raw", "./".repeat(216));
        let small = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=1k", "-F", "raw", "-b", &name];
        qemu_img(folder, &[&small[..], &["small.qcow2"]].concat());
    };
    for node in ["known", "small"] {
        let file = leaked(&format!("{node}.qcow2"));
        let node = leaked(node);
        let without_backing = if node == "small" { json!({ "backing": null }) } else { json!({}) };
        let mut script: Script = Vec::new();
        if node == "known" {
            script.extend([open(node, &without_backing), remove(node, "one"), close(node), sound(file)]);
        }
        let named_by_qemu = Meanwhile(Box::new(move |peer: &Peer| {
            qemu_img(peer.folder(), &["bitmap", "--add", file, "theirs"]);
        }));
        script.extend([
            open(node, &without_backing),
            list(),
            add(node, "again", &json!({ "persistent": true })),
            close(node),
            sound(file),
            open(node, &without_backing),
            list(),
            remove(node, "again"),
            close(node),
            sound(file),
        ]);
        if node == "known" {
            script.extend([named_by_qemu, sound(file)]);
        }
        script.extend([
            open(node, &without_backing),
            add(node, "ours", &json!({ "persistent": true })),
            close(node),
            sound(file),
            open(node, &without_backing),
            list(),
        ]);
        compare_on(&script, images);
    }
}

#[test]
fn bitmaps_of_an_image_that_is_only_read_are_looked_at_and_left_alone() {
    let script: Script = vec![
        open("made", &json!({ "read-only": true })),
        list(),
        clear("made", "one"),
        remove("made", "one"),
        disable("made", "one"),
        add("made", "passing", &json!({})),
        merge("made", "one", json!(["passing"])),
        merge("made", "passing", json!(["one"])),
        Differs(
            "block-dirty-bitmap-add",
            added("made", "p", &json!({ "persistent": true })),
            "QEMU takes one that it cannot keep, and loses it",
        ),
        clear("made", "passing"),
        remove("made", "passing"),
        close("made"),
        open("made", &json!({})),
        list(),
    ];
    compare(script);
}

#[test]
fn bitmaps_follow_a_nodes_size() {
    let resize = |size: u64| Do("block_resize", json!({ "node-name": "a", "size": size }));
    let script: Script = vec![
        open("a", &json!({})),
        add("a", "p", &json!({ "persistent": true })),
        add("a", "x", &json!({ "granularity": 4096 })),
        serve(),
        resize(3 << 20),
        list(),
        export("a"),
        guest("a", &["write 2M 64k", "write 0 4k"]),
        list(),
        close("a"),
    ];
    compare(script);
}
