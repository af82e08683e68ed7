//! As `qmp_differential.rs`, for qcow2: how images are opened, refused, listed and removed.

mod common;
mod qmp;

use std::path::Path;

use common::qcow2::{name_backing, qemu_img, qemu_io, try_qemu_img};
use qmp::transcript::Step::{self, Await, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn file(image: &str) -> Value {
    json!({ "driver": "file", "filename": format!("DIR/{image}") })
}

fn changed(mut object: Value, changes: &Value) -> Value {
    for (key, value) in changes.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}

fn image(name: &str, changes: &Value) -> Value {
    changed(json!({ "driver": "qcow2", "node-name": "n", "file": file(name) }), changes)
}

fn add(options: Value) -> Step {
    Do("blockdev-add", options)
}

fn delete(node: &str) -> Step {
    Do("blockdev-del", json!({ "node-name": node }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn list_chains() -> Step {
    Do("query-named-block-nodes", json!({}))
}

/// Images that both are given: a chain of three, one of each kind, and some that stand on what they should not.
fn make_images(folder: &Path) {
    let create = |arguments: &[&str]| {
        qemu_img(folder, &[&["create", "-q"], arguments].concat());
    };
    create(&["-f", "raw", "base.raw", "1M"]);
    create(&["-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
    create(&["-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    create(&["-f", "qcow2", "plain.qcow2", "1M"]);
    create(&["-f", "qcow2", "other.qcow2", "1M"]);
    create(&["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "old.qcow2", "1M"]);
    let options = "lazy_refcounts=on,extended_l2=on,compression_type=zstd,refcount_bits=8,cluster_size=128k";
    create(&["-f", "qcow2", "-o", options, "rich.qcow2", "3M"]);
    create(&["-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on", "ext.qcow2", "1M"]);
    create(&["-f", "raw", "t.raw", "1M"]);
    qemu_img(folder, &["snapshot", "-c", "first", "other.qcow2"]);
    create(&["-f", "qcow2", "marked.qcow2", "1M"]);
    qemu_img(folder, &["bitmap", "--add", "marked.qcow2", "one"]);
    qemu_img(folder, &["bitmap", "--add", "--disable", "-g", "128k", "marked.qcow2", "two"]);
    create(&["-f", "qcow2", "full.qcow2", "1M"]);
    qemu_io(folder, "full.qcow2", &["write -P 1 0 1M"]);
    create(&["-f", "qcow2", "-o", "cluster_size=4k", "target.qcow2", "1M"]);
    let bent = [
        ("no-format", "base.raw", None),
        ("bad-format", "base.raw", Some("zork")),
        ("wrong-format", "base.raw", Some("qcow2")),
        ("missing", "none.raw", Some("raw")),
        ("directory", "folder", Some("raw")),
        ("loop", "loop.qcow2", Some("qcow2")),
        ("outside", "/etc/passwd", Some("raw")),
        ("json", "json:{\"driver\":\"null-co\"}", Some("raw")),
    ];
    std::fs::create_dir(folder.join("folder")).expect("the folder is writable");
    for (name, backing, format) in bent {
        let path = folder.join(name).with_extension("qcow2");
        std::fs::copy(folder.join("plain.qcow2"), &path).expect("the folder is writable");
        name_backing(&path, backing, format);
    }
}

/// Compares with the same images in both folders.
fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    make_images(folder.path());
    let prepare = |peer: &qmp::Peer| {
        for entry in std::fs::read_dir(folder.path()).expect("it is there").map_while(Result::ok) {
            let to = peer.folder().join(entry.file_name());
            if entry.path().is_dir() {
                std::fs::create_dir(to).expect("the folder is writable");
            } else {
                std::fs::copy(entry.path(), to).expect("the folder is writable");
            }
        }
    };
    compare_on(script, prepare);
}

#[test]
fn images_are_opened_listed_and_removed_alike() {
    let script = vec![
        add(image("top.qcow2", &json!({}))),
        list(),
        list_chains(),
        delete("n"),
        list(),
        add(image("top.qcow2", &json!({ "read-only": true }))),
        list_chains(),
        delete("n"),
        add(image("top.qcow2", &json!({ "backing": null }))),
        list_chains(),
        delete("n"),
        add(image("old.qcow2", &json!({}))),
        list(),
        delete("n"),
        add(image("rich.qcow2", &json!({ "discard": "unmap", "detect-zeroes": "unmap" }))),
        list(),
        delete("n"),
        add(image("other.qcow2", &json!({ "read-only": true }))),
        list(),
        delete("n"),
        add(image("marked.qcow2", &json!({}))),
        list(),
        delete("n"),
        add(image("ext.qcow2", &json!({ "data-file": file("data.raw") }))),
        list(),
        delete("n"),
        list(),
    ];
    compare(&script);
}

#[test]
fn nodes_below_are_given_by_name_or_made_alike() {
    let named = |name: &str, node: &str| json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{name}") });
    let script = vec![
        add(named("plain.qcow2", "pf")),
        add(json!({ "driver": "qcow2", "node-name": "p", "file": "pf" })),
        list(),
        add(json!({ "driver": "qcow2", "node-name": "p2", "file": "pf" })),
        delete("pf"),
        add(image("other.qcow2", &json!({ "backing": "p" }))),
        list_chains(),
        delete("p"),
        delete("n"),
        add(image(
            "top.qcow2",
            &json!({ "backing": changed(image("mid.qcow2", &json!({})), &json!({ "node-name": "m" })) }),
        )),
        list_chains(),
        delete("m"),
        delete("n"),
        add(image(
            "top.qcow2",
            &json!({ "backing": { "driver": "raw", "node-name": "r", "file": file("t.raw") } }),
        )),
        list_chains(),
        delete("n"),
        add(named("t.raw", "t")),
        add(image("ext.qcow2", &json!({ "data-file": "t" }))),
        list(),
        delete("t"),
        delete("n"),
        delete("t"),
        delete("p"),
        delete("pf"),
        add(changed(named("plain.qcow2", "ro"), &json!({ "read-only": true }))),
        add(json!({ "driver": "qcow2", "node-name": "n", "file": "ro" })),
        add(json!({ "driver": "qcow2", "node-name": "n", "file": "ro", "read-only": true })),
        delete("ro"),
        delete("n"),
        delete("ro"),
        list(),
    ];
    compare(&script);
}

#[test]
fn a_node_that_another_stands_on_is_kept_from_change_alike() {
    let export = |id: &str, node: &str, writable: bool| {
        Do(
            "block-export-add",
            json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable }),
        )
    };
    let mirror = |device: &str, target: &str| {
        Do("blockdev-mirror", json!({ "job-id": "j", "device": device, "target": target, "sync": "full" }))
    };
    let script = vec![
        add(changed(image("plain.qcow2", &json!({})), &json!({ "node-name": "b" }))),
        add(image("other.qcow2", &json!({ "backing": "b" }))),
        add(json!({ "driver": "file", "node-name": "t", "filename": "DIR/t.raw" })),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        export("reader", "b", false),
        export("writer", "n", true),
        mirror("b", "t"),
        mirror("n", "b"),
        delete("b"),
        delete("n"),
        // A second overlay on the same node.
        add(changed(image("top.qcow2", &json!({ "backing": "b" })), &json!({ "node-name": "n2" }))),
        delete("n2"),
        Do("nbd-server-stop", json!({})),
        delete("n"),
        delete("b"),
    ];
    compare(&script);
}

#[test]
fn wrong_images_and_options_are_refused_alike() {
    let with = |changes: Value| add(image("plain.qcow2", &changes));
    let mut script = vec![
        add(json!({ "driver": "qcow2", "node-name": "n" })),
        add(json!({ "driver": "qcow2", "file": file("plain.qcow2") })),
        add(image("base.raw", &json!({}))),
        add(image("none", &json!({}))),
        add(image("missing.qcow2", &json!({}))),
        add(image("directory.qcow2", &json!({}))),
        add(image("bad-format.qcow2", &json!({}))),
        add(image("wrong-format.qcow2", &json!({}))),
        add(image("old.qcow2", &json!({ "lazy-refcounts": true }))),
        add(json!({ "driver": "qcow2", "node-name": "n", "file": "none" })),
    ];
    let wrong = [
        json!({ "file": 5 }),
        json!({ "file": {} }),
        json!({ "backing": "zz" }),
        json!({ "backing": 5 }),
        json!({ "backing": { "driver": "file" } }),
        json!({ "backing": { "driver": "qcow2" } }),
        json!({ "backing": file("none") }),
        json!({ "data-file": "zz" }),
        json!({ "data-file": null }),
        json!({ "data-file": file("t.raw") }),
        json!({ "zork": 1 }),
        json!({ "lazy-refcounts": 5 }),
        json!({ "pass-discard-request": "on" }),
        json!({ "cache-size": -1 }),
        json!({ "cache-size": "1M" }),
        json!({ "cache-size": 1024, "l2-cache-size": 2048 }),
        json!({ "cache-size": 1024, "refcount-cache-size": 2048 }),
        json!({ "cache-size": 1024, "l2-cache-size": 512, "refcount-cache-size": 512 }),
        json!({ "l2-cache-entry-size": 1000 }),
        json!({ "l2-cache-entry-size": 131_072 }),
        json!({ "cache-clean-interval": -1 }),
        json!({ "overlap-check": "zork" }),
        json!({ "overlap-check": 5 }),
        json!({ "overlap-check": { "template": "zork" } }),
        json!({ "overlap-check": { "main-header": 5 } }),
        json!({ "encrypt": 5 }),
        json!({ "encrypt": {} }),
        json!({ "encrypt": { "format": "luks" } }),
        json!({ "detect-zeroes": "unmap" }),
        json!({ "node-name": "1n" }),
    ];
    script.extend(wrong.into_iter().map(with));
    let right = [
        json!({ "cache-size": 5 }),
        json!({ "l2-cache-size": 1 << 20, "l2-cache-entry-size": 4096, "cache-clean-interval": 5 }),
        json!({ "lazy-refcounts": true, "pass-discard-request": true, "pass-discard-snapshot": true }),
        json!({ "pass-discard-other": true, "discard-no-unref": true, "overlap-check": "all" }),
        json!({ "overlap-check": { "template": "all", "main-header": false } }),
        json!({ "auto-read-only": true }),
        json!({ "cache": { "no-flush": true } }),
    ];
    for options in right {
        script.extend([with(options), delete("n")]);
    }
    script.push(list());
    compare(&script);
}

#[test]
fn where_an_image_names_what_it_may_not_open_ours_is_stricter_on_purpose() {
    let refuses = |name: &str, why| Differs("blockdev-add", image(name, &json!({})), why);
    let gone = |why| Differs("blockdev-del", json!({ "node-name": "n" }), why);
    let guessed = "a format that the image does not say is not guessed";
    let outside = "an image opens files only in the directories that the operator allows";
    let script = vec![
        refuses("no-format.qcow2", guessed),
        gone(guessed),
        refuses("outside.qcow2", outside),
        gone(outside),
        refuses("json.qcow2", "a name is a path, and nothing else"),
        // What the operator gives is the operator's: no gate.
        add(image("outside.qcow2", &json!({ "backing": { "driver": "raw", "file": file("base.raw") } }))),
        delete("n"),
        list(),
    ];
    compare(&script);
}

#[test]
fn a_mirror_of_images_says_the_same() {
    let named =
        |name: &str, image_name: &str| changed(image(image_name, &json!({})), &json!({ "node-name": name }));
    let mirror = |sync: &str, target: &str| {
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "s", "target": target, "sync": sync }))
    };
    let complete = || Do("block-job-complete", json!({ "device": "j" }));
    let script = vec![
        add(named("s", "full.qcow2")),
        add(named("t", "target.qcow2")),
        mirror("full", "t"),
        Await("BLOCK_JOB_READY", "j"),
        Do("query-block-jobs", json!({})),
        complete(),
        Await("null", "j"),
        delete("t"),
        add(named("t", "target.qcow2")),
        mirror("top", "t"),
        Await("BLOCK_JOB_READY", "j"),
        Do("query-block-jobs", json!({})),
        Do("block-job-cancel", json!({ "device": "j" })),
        Await("null", "j"),
        add(named("small", "rich.qcow2")),
        mirror("full", "small"),
        Await("null", "j"),
        delete("small"),
        delete("t"),
        delete("s"),
    ];
    compare(&script);
}
