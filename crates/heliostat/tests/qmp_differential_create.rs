//! As `qmp_differential.rs`, for `blockdev-create`: the job, what it says, and the images that both make.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::Whose;
use qmp::transcript::Step::{self, Await, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn changed(mut object: Value, changes: &Value) -> Value {
    for (key, value) in changes.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}

fn file(node: &str, image: &str) -> Step {
    Do("blockdev-add", json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{image}") }))
}

fn query() -> Step {
    Do("query-jobs", json!({}))
}

/// A job `j` that is waited for, looked at and dismissed.
fn job(options: &Value) -> Vec<Step> {
    vec![
        Do("blockdev-create", json!({ "job-id": "j", "options": options })),
        Await("concluded", "j"),
        query(),
        Do("job-dismiss", json!({ "id": "j" })),
        Await("null", "j"),
    ]
}

/// An image in the node `f`.
fn image(changes: &Value) -> Value {
    changed(json!({ "driver": "qcow2", "file": "f", "size": MIB }), changes)
}

fn refused(options: Value) -> Step {
    Do("blockdev-create", json!({ "job-id": "j", "options": options }))
}

fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        for name in ["f", "d", "other"] {
            fs::write(peer.folder().join(name), []).unwrap();
        }
        peer.image("base", 1 << 20);
    });
}

#[test]
fn files_are_made_and_refused_alike() {
    let make =
        |changes: Value| changed(json!({ "driver": "file", "filename": "DIR/new", "size": MIB }), &changes);
    let mut script = Vec::new();
    for changes in [
        json!({}),
        json!({ "size": 1000, "nocow": true }),
        json!({ "preallocation": "falloc" }),
        json!({ "preallocation": "full" }),
        json!({ "preallocation": "metadata" }),
        json!({ "filename": "DIR/none/new" }),
        json!({ "size": -1 }),
    ] {
        script.extend(job(&make(changes)));
    }
    script.extend([
        refused(json!({ "driver": "file", "size": 5 })),
        refused(json!({ "driver": "file", "filename": "DIR/new" })),
        refused(make(json!({ "zork": 5 }))),
        refused(make(json!({ "size": "5" }))),
        refused(make(json!({ "preallocation": "zork" }))),
        refused(json!({ "driver": "raw" })),
        refused(json!({ "driver": "raw", "filename": "x" })),
        refused(json!({ "driver": "null-co" })),
        refused(json!({ "driver": "zork" })),
        refused(json!({})),
        refused(json!(5)),
        Do("blockdev-create", json!({ "job-id": "j" })),
        Do("blockdev-create", json!({ "options": make(json!({})) })),
        Do("blockdev-create", json!({ "job-id": "1", "options": make(json!({})) })),
        Do("blockdev-create", json!({ "job-id": "", "options": make(json!({})) })),
        Do("blockdev-create", json!({ "job-id": "j", "zork": 1, "options": make(json!({})) })),
        query(),
    ]);
    compare(&script);
}

#[test]
fn a_job_that_creates_takes_the_verbs_that_qemus_takes() {
    let make = json!({ "driver": "file", "filename": "DIR/new", "size": 1 });
    let mut script = vec![refused(make.clone()), Await("concluded", "j")];
    for verb in ["job-cancel", "job-complete", "job-finalize", "job-pause", "job-resume"] {
        script.push(Do(verb, json!({ "id": "j" })));
    }
    script.extend([
        Do("block-job-dismiss", json!({ "id": "j" })),
        Do("block-job-cancel", json!({ "device": "j" })),
        Do("block-job-set-speed", json!({ "device": "j", "speed": 0 })),
        Do("block-job-change", json!({ "id": "j", "type": "mirror", "copy-mode": "background" })),
        Do("query-block-jobs", json!({})),
        refused(make),
        query(),
        Do("job-dismiss", json!({ "id": "j" })),
        Await("null", "j"),
        Do("job-dismiss", json!({ "id": "j" })),
    ]);
    compare(&script);
}

#[test]
fn options_that_make_no_image_are_refused_alike() {
    let mut script = vec![file("f", "f"), file("d", "d")];
    for changes in [
        json!({ "file": "zz" }),
        json!({ "data-file": "zz" }),
        json!({ "file": { "driver": "file", "filename": "DIR/none" } }),
        json!({ "data-file": { "driver": "file", "filename": "DIR/none" } }),
        json!({ "size": -1 }),
        json!({ "size": 1000 }),
        json!({ "size": 1_u64 << 62 }),
        json!({ "size": 1_u64 << 57 }),
        json!({ "cluster-size": 1000 }),
        json!({ "cluster-size": 256 }),
        json!({ "cluster-size": 4 << 20 }),
        json!({ "cluster-size": 0 }),
        json!({ "cluster-size": -1 }),
        json!({ "refcount-bits": 3 }),
        json!({ "refcount-bits": 0 }),
        json!({ "refcount-bits": 128 }),
        json!({ "refcount-bits": -1 }),
        json!({ "version": "v2", "refcount-bits": 8 }),
        json!({ "version": "v2", "lazy-refcounts": true }),
        json!({ "version": "v2", "extended-l2": true }),
        json!({ "version": "v2", "compression-type": "zstd" }),
        json!({ "version": "v2", "data-file": "d" }),
        json!({ "extended-l2": true, "cluster-size": 4096 }),
        json!({ "backing-fmt": "raw" }),
        json!({ "backing-file": "base", "backing-fmt": "raw", "preallocation": "metadata" }),
        json!({ "data-file-raw": true }),
        json!({ "data-file": "d", "data-file-raw": true, "backing-file": "base", "backing-fmt": "raw" }),
    ] {
        script.extend(job(&image(&changes)));
    }
    for changes in [
        json!({ "file": 5 }),
        json!({ "size": "1M" }),
        json!({ "version": "v4" }),
        json!({ "preallocation": "zork" }),
        json!({ "compression-type": "zork" }),
        json!({ "backing-fmt": "zork" }),
        json!({ "encrypt": 5 }),
        json!({ "encrypt": {} }),
        json!({ "zork": 5 }),
        json!({ "refcount-bits": "16" }),
        json!({ "lazy-refcounts": 5 }),
    ] {
        script.push(refused(image(&changes)));
    }
    script.extend([
        refused(json!({ "driver": "qcow2", "size": 5 })),
        refused(json!({ "driver": "qcow2", "file": "f" })),
        query(),
    ]);
    compare(&script);
}

#[test]
fn nodes_that_somebody_uses_are_not_overwritten_in_the_same_words() {
    let export = |writable: bool| {
        Do(
            "block-export-add",
            json!({ "type": "nbd", "id": "e", "name": "e", "node-name": "f", "writable": writable }),
        )
    };
    let gone = || vec![Do("block-export-del", json!({ "id": "e" })), Await("BLOCK_EXPORT_DELETED", "e")];
    let mut script = vec![file("f", "f")];
    script.extend(job(&image(&json!({}))));
    script.push(Do("blockdev-add", json!({ "driver": "qcow2", "node-name": "i", "file": "f" })));
    script.extend(job(&image(&json!({}))));
    script.push(Do("blockdev-del", json!({ "node-name": "i" })));
    script.push(Do(
        "blockdev-add",
        json!({ "driver": "file", "node-name": "ro", "read-only": true, "filename": "DIR/base" }),
    ));
    script.extend(job(&image(&json!({ "file": "ro" }))));
    script.push(Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })));
    for writable in [false, true] {
        script.push(export(writable));
        script.extend(job(&image(&json!({}))));
        script.extend(gone());
    }
    script.push(Do("blockdev-add", json!({ "driver": "null-co", "node-name": "n", "size": MIB })));
    script.extend(job(&image(&json!({ "file": "n" }))));
    compare(&script);
}

/// Asks `qemu-img check`, which must find nothing, while the daemon has the file open.
fn sound(folder: &std::path::Path, image: &str) {
    qemu_img(folder, &["check", "-q", "-U", image]);
}

/// What `qemu-img info` says of an image, without what differs between any two files.
fn info(folder: &std::path::Path, image: &str) -> Value {
    let mut info: Value =
        serde_json::from_str(&qemu_img(folder, &["info", "-U", "--output=json", image])).unwrap();
    let fields = info.as_object_mut().unwrap();
    for key in ["children", "filename", "full-backing-filename", "actual-size"] {
        fields.remove(key);
    }
    serde_json::from_str(&info.to_string().replace(folder.to_str().unwrap(), "DIR")).unwrap()
}

#[test]
fn images_are_what_qemu_makes_of_the_same_options() {
    let made: Arc<Mutex<BTreeMap<String, Vec<Value>>>> = Arc::default();
    let mut script = vec![file("f", "f"), file("d", "d")];
    let all = [
        json!({}),
        json!({ "size": 0 }),
        json!({ "size": 1_u64 << 40 }),
        json!({ "version": "v2" }),
        json!({ "cluster-size": 512 }),
        json!({ "cluster-size": 2 << 20 }),
        json!({ "refcount-bits": 1 }),
        json!({ "refcount-bits": 64, "lazy-refcounts": true }),
        json!({ "extended-l2": true, "cluster-size": 131_072 }),
        json!({ "compression-type": "zstd" }),
        json!({ "preallocation": "metadata" }),
        json!({ "preallocation": "falloc" }),
        json!({ "preallocation": "full" }),
        json!({ "backing-file": "base" , "backing-fmt": "raw" }),
        json!({ "backing-file": "none", "backing-fmt": "qcow2" }),
        json!({ "backing-file": "", "backing-fmt": "raw" }),
        json!({ "data-file": "d" }),
        json!({ "data-file": "d", "data-file-raw": true }),
        json!({ "data-file": "d", "data-file-raw": true, "preallocation": "metadata" }),
    ];
    for (number, changes) in all.into_iter().enumerate() {
        // A file of its own: QEMU preallocates only where that makes the file longer.
        let name = format!("f{number}");
        script.push(Meanwhile(Box::new({
            let name = name.clone();
            move |peer| fs::write(peer.folder().join(&name), []).unwrap()
        })));
        script.push(file(&name, &name));
        script.extend(job(&image(&changed(changes.clone(), &json!({ "file": name })))));
        let (made, what) = (Arc::clone(&made), changes.to_string());
        script.push(Meanwhile(Box::new(move |peer| {
            if peer.whose() == Whose::Ours && !what.contains("none") {
                sound(peer.folder(), &name);
            }
            made.lock().unwrap().entry(what.clone()).or_default().push(info(peer.folder(), &name));
        })));
    }
    // A node that is made for this only.
    script.extend(job(&image(&json!({ "file": { "driver": "file", "filename": "DIR/other" } }))));
    script.push(Meanwhile(Box::new(|peer| sound(peer.folder(), "other"))));
    // What was made is used.
    script.extend(job(&image(&json!({}))));
    script.push(Do("blockdev-add", json!({ "driver": "qcow2", "node-name": "i", "file": "f" })));
    script.push(Do("block_resize", json!({ "node-name": "i", "size": 2 * MIB })));
    script.push(Do("blockdev-del", json!({ "node-name": "i" })));
    compare(&script);
    for (what, infos) in made.lock().unwrap().iter() {
        assert_eq!(infos.len(), 2, "{what}");
        assert_eq!(infos[0], infos[1], "{what}");
    }
}
