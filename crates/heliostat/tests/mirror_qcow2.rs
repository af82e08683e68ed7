//! Mirrors from and to qcow2, over QMP, judged by `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;

use serde_json::{Value, json};

use common::qcow2::{assert_same, assert_sound, qemu_img, qemu_io};
use common::scene::Scene;
use common::wait;

fn allocated_in_top(folder: &Path, image: &str) -> u64 {
    let map: Value = serde_json::from_str(&qemu_img(folder, &["map", "--output=json", image])).unwrap();
    let extents = map.as_array().unwrap().iter();
    let top = extents.filter(|extent| extent["depth"] == 0 && extent["present"] == true);
    top.map(|extent| extent["length"].as_u64().unwrap()).sum()
}

#[test]
fn a_chain_becomes_one_image_with_nothing_below() {
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k", "extended_l2=on", "cluster_size=2M"] {
        let Some(mut scene) = Scene::new() else { return };
        scene.chain();
        scene.img(&["create", "-q", "-f", "qcow2", "-o", options, "t.qcow2", "16M"]);
        scene.add("s", "top.qcow2", json!({}));
        scene.add("t", "t.qcow2", json!({ "discard": "unmap" }));
        scene.mirror(json!({}));
        scene.complete();
        let folder = scene.end();
        assert_sound(folder.path(), "t.qcow2");
        assert_sound(folder.path(), "top.qcow2");
        assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
    }
}

#[test]
fn a_raw_disk_becomes_an_image_and_an_image_a_raw_disk() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "raw", "flat.raw", "16M"]);
    scene.add("s", "top.qcow2", json!({}));
    scene.add("t", "flat.raw", json!({}));
    scene.mirror(json!({}));
    scene.complete();
    scene.img(&["create", "-q", "-f", "qcow2", "back.qcow2", "16M"]);
    scene.add("back", "back.qcow2", json!({}));
    scene.mirror(json!({ "device": "t", "target": "back" }));
    scene.complete();
    let folder = scene.end();
    assert_sound(folder.path(), "back.qcow2");
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("flat.raw", "raw"));
    assert_same(folder.path(), ("flat.raw", "raw"), ("back.qcow2", "qcow2"));
}

#[test]
fn only_the_top_is_copied_onto_a_target_on_the_same_chain() {
    for copy_mode in ["background", "write-blocking"] {
        let Some(mut scene) = Scene::new() else { return };
        scene.chain();
        scene.img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "t.qcow2"]);
        scene.add("s", "top.qcow2", json!({}));
        scene.add("t", "t.qcow2", json!({}));
        scene.mirror(json!({ "sync": "top", "copy-mode": copy_mode }));
        scene.complete();
        let folder = scene.end();
        assert_sound(folder.path(), "t.qcow2");
        assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
        let [source, target] = ["top.qcow2", "t.qcow2"].map(|image| allocated_in_top(folder.path(), image));
        assert_eq!(target, source, "the target holds what the source's top holds, and no more");
    }
}

/// A target whose backing is attached later: what is copied must be right for that, whole clusters and zeroes
/// included.
#[test]
fn a_target_that_gets_its_backing_later_reads_the_same_then() {
    for (options, copy_mode) in [
        ("cluster_size=64k", "background"),
        ("cluster_size=2M", "background"),
        ("cluster_size=2M", "write-blocking"),
        ("cluster_size=64k,compat=0.10", "background"),
    ] {
        let Some(mut scene) = Scene::new() else { return };
        scene.chain();
        scene.img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-b",
            "mid.qcow2",
            "-F",
            "qcow2",
            "t.qcow2",
        ]);
        scene.add("s", "top.qcow2", json!({}));
        scene.add("t", "t.qcow2", json!({ "backing": null }));
        let uri = scene.export("s");
        scene.mirror(json!({ "sync": "top", "copy-mode": copy_mode }));
        scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
        scene.guest(
            &uri,
            &["write -P 8 5632k 4k", "write -z 7M 12k", "write -P 9 11M 2M", "write -z -u 12M 1M"],
        );
        scene.execute("block-job-cancel", json!({ "device": "j" }));
        scene.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
        let folder = scene.end();
        assert_sound(folder.path(), "t.qcow2");
        assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
    }
}

#[test]
fn nothing_but_what_guests_write_is_copied_onto_a_target_on_the_source() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    // The new target stands on what the source is now, as a snapshot would.
    scene.img(&["convert", "-O", "raw", "top.qcow2", "then.raw"]);
    scene.img(&["create", "-q", "-f", "qcow2", "-b", "then.raw", "-F", "raw", "t.qcow2"]);
    scene.add("s", "top.qcow2", json!({ "discard": "unmap" }));
    scene.add("t", "t.qcow2", json!({ "discard": "unmap" }));
    let uri = scene.export("s");
    scene.mirror(json!({ "sync": "none" }));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    scene.guest(&uri, &["write -P 8 3M 4k", "write -z 7M 12k", "discard 2M 128k", "write -P 9 15M 1M"]);
    scene.complete_now();
    // They are on the target now.
    scene.guest(&uri, &["write -P 10 5M 64k", "read -P 8 3M 4k"]);
    let folder = scene.end();
    for image in ["t.qcow2", "top.qcow2"] {
        assert_sound(folder.path(), image);
    }
    qemu_io(folder.path(), "top.qcow2", &["write -P 10 5M 64k"]);
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
    assert!(allocated_in_top(folder.path(), "t.qcow2") <= 2 << 20, "what nobody wrote was not copied");
}

#[test]
fn what_is_zero_in_the_source_becomes_zero_on_a_target_that_held_something() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "qcow2", "t.qcow2", "16M"]);
    scene.io("t.qcow2", &["write -P 77 0 16M"]);
    scene.add("s", "top.qcow2", json!({}));
    scene.add("t", "t.qcow2", json!({ "discard": "unmap" }));
    scene.mirror(json!({}));
    scene.complete();
    let folder = scene.end();
    assert_sound(folder.path(), "t.qcow2");
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
}

#[test]
fn the_work_that_is_counted_is_the_work_that_there_is() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "t.qcow2"]);
    scene.add("s", "top.qcow2", json!({}));
    scene.add("t", "t.qcow2", json!({}));
    scene.mirror(json!({ "sync": "top" }));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    let jobs = scene.execute("query-block-jobs", json!({}));
    let len = jobs[0]["len"].as_u64().unwrap();
    // 1 MiB and 4 KiB of data, 1 MiB and 64 KiB of zeroes, in granules of 64 KiB.
    assert_eq!((len, jobs[0]["offset"].as_u64().unwrap()), (2 * (1 << 20) + 2 * (64 << 10), len));
    scene.complete_now();
    scene.end();
}

#[test]
fn that_a_target_reads_as_zero_is_not_believed_where_something_is_below_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "qcow2", "s.qcow2", "16M"]);
    scene.io("s.qcow2", &["write -P 1 1M 1M"]);
    scene.img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "t.qcow2"]);
    scene.add("s", "s.qcow2", json!({}));
    scene.add("t", "t.qcow2", json!({}));
    scene.mirror(json!({ "target-is-zero": true }));
    scene.complete();
    let folder = scene.end();
    assert_same(folder.path(), ("s.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
}

#[test]
fn an_image_whose_node_is_removed_is_left_in_order() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.add("n", "top.qcow2", json!({}));
    let uri = scene.export("n");
    scene.guest(&uri, &["write -P 8 3M 200k"]);
    scene.execute("nbd-server-stop", json!({}));
    scene.execute("blockdev-del", json!({ "node-name": "n" }));
    // The daemon still runs.
    assert_sound(scene.folder.path(), "top.qcow2");
    let len = std::fs::metadata(scene.path().join("top.qcow2")).unwrap().len();
    assert!(len < 4 << 20, "what it was made longer ahead of need is cut off: {len}");
    scene.end();
}
