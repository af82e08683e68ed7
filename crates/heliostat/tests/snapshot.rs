//! Snapshots under guests that write, judged by `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use serde_json::json;

use common::qcow2::{assert_same, assert_sound, qemu_io};
use common::scene::Scene;
use common::tool;

#[test]
fn what_is_written_after_a_snapshot_is_in_the_overlay_and_what_was_before_in_the_node() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["convert", "-O", "qcow2", "top.qcow2", "then.qcow2"]);
    scene.add("s", "top.qcow2", json!({}));
    let uri = scene.export("s");
    let snapshot = json!({ "device": "e", "snapshot-file": "DIR/overlay.qcow2" });
    scene.guest(&uri, &["write -P 8 3M 4k"]);
    scene.execute("blockdev-snapshot-sync", snapshot);
    scene.guest(&uri, &["read -P 8 3M 4k", "write -P 9 3M 2k", "write -P 10 9M 100", "write -z 1M 128k"]);
    let folder = scene.end();
    for image in ["top.qcow2", "overlay.qcow2"] {
        assert_sound(folder.path(), image);
    }
    qemu_io(folder.path(), "then.qcow2", &["write -P 8 3M 4k"]);
    assert_same(folder.path(), ("then.qcow2", "qcow2"), ("top.qcow2", "qcow2"));
    qemu_io(folder.path(), "then.qcow2", &["write -P 9 3M 2k", "write -P 10 9M 100", "write -z 1M 128k"]);
    assert_same(folder.path(), ("then.qcow2", "qcow2"), ("overlay.qcow2", "qcow2"));
}

#[test]
fn snapshots_one_after_the_other_lose_nothing_of_what_a_guest_writes_meanwhile() {
    let Some(mut scene) = Scene::new() else { return };
    scene.img(&["create", "-q", "-f", "qcow2", "top.qcow2", "16M"]);
    scene.img(&["create", "-q", "-f", "raw", "model.raw", "16M"]);
    scene.add("s", "top.qcow2", json!({}));
    let uri = scene.export("s");
    let writes: Vec<String> = (0..2000)
        .map(|n: u64| format!("write -P {} {} {}", n % 250 + 1, n * 7919 % 16000 * 1024, 1000))
        .collect();
    let mut guest = std::process::Command::new(tool("qemu-io").unwrap());
    guest.args(["-f", "raw", &uri]).stdout(std::process::Stdio::null());
    guest.args(writes.iter().flat_map(|write| ["-c", write]));
    let mut guest = guest.spawn().unwrap();
    for n in 0..8 {
        let file = format!("DIR/overlay{n}.qcow2");
        scene.execute("blockdev-snapshot-sync", json!({ "device": "e", "snapshot-file": file }));
    }
    assert!(guest.wait().unwrap().success());
    let folder = scene.end();
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    qemu_io(folder.path(), "model.raw", &writes);
    for n in 0..8 {
        assert_sound(folder.path(), &format!("overlay{n}.qcow2"));
    }
    assert_same(folder.path(), ("model.raw", "raw"), ("overlay7.qcow2", "qcow2"));
}

#[test]
fn a_mirrors_target_reads_right_whenever_it_is_given_what_it_stands_on() {
    for give in ["blockdev-snapshot", "blockdev-reopen"] {
        let Some(mut scene) = Scene::new() else { return };
        scene.chain();
        scene.img(&["convert", "-O", "qcow2", "mid.qcow2", "copy.qcow2"]);
        scene.img(&["create", "-q", "-f", "qcow2", "-b", "copy.qcow2", "-F", "qcow2", "t.qcow2"]);
        scene.add("s", "top.qcow2", json!({}));
        scene.add("copy", "copy.qcow2", json!({ "read-only": true }));
        scene.execute(
            "blockdev-add",
            json!({ "driver": "file", "node-name": "tf", "filename": "DIR/t.qcow2" }),
        );
        let target =
            |backing| json!({ "driver": "qcow2", "node-name": "t", "file": "tf", "backing": backing });
        scene.execute("blockdev-add", target(json!(null)));
        let uri = scene.export("s");
        scene.mirror(json!({ "sync": "top", "copy-mode": "write-blocking" }));
        scene.qmp.wait_event("BLOCK_JOB_READY", common::wait::LIMIT).unwrap();
        scene.guest(&uri, &["write -P 8 5632k 4k", "write -z 7M 12k", "write -P 9 100k 100"]);
        match give {
            "blockdev-snapshot" => scene.execute(give, json!({ "node": "copy", "overlay": "t" })),
            _ => scene.execute(give, json!({ "options": [target(json!("copy"))] })),
        };
        scene.guest(&uri, &["write -P 10 9M 100k", "write -z 1M 70k", "write -P 11 3000k 100"]);
        scene.complete_now();
        scene.guest(&uri, &["read -P 10 9M 100k", "read -P 1 512k 64k", "read -P 3 1200k 100k"]);
        let folder = scene.end();
        assert_sound(folder.path(), "t.qcow2");
        assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t.qcow2", "qcow2"));
    }
}

#[test]
fn what_would_stand_on_itself_is_refused() {
    let Some(mut scene) = Scene::new() else { return };
    scene.img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    scene.img(&["create", "-q", "-f", "qcow2", "b.qcow2", "1M"]);
    for name in ["a", "b"] {
        let (file, path) = (format!("{name}f"), format!("DIR/{name}.qcow2"));
        scene.execute(
            "blockdev-add",
            json!({ "driver": "file", "node-name": file.clone(), "filename": path }),
        );
        scene.execute("blockdev-add", json!({ "driver": "qcow2", "node-name": name, "file": file }));
    }
    scene.execute("blockdev-add", json!({ "driver": "blkdebug", "node-name": "over", "image": "a" }));
    let on = |name: &str, backing: &str| json!({ "driver": "qcow2", "node-name": name, "file": format!("{name}f"), "backing": backing });
    for options in [json!([on("a", "over")]), json!([on("a", "b"), on("b", "a")]), json!([on("a", "a")])] {
        let refused = scene.qmp.execute("blockdev-reopen", json!({ "options": options })).unwrap_err();
        assert!(refused.to_string().contains("would create a cycle"), "{refused}");
    }
    scene.end();
}

#[test]
fn a_target_that_names_no_backing_file_gets_none_in_the_middle() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "qcow2", "t.qcow2", &(16_u64 << 20).to_string()]);
    scene.img(&["convert", "-O", "qcow2", "mid.qcow2", "copy.qcow2"]);
    let size: serde_json::Value =
        serde_json::from_str(&scene.img(&["info", "--output=json", "top.qcow2"])).unwrap();
    scene.img(&["resize", "-q", "t.qcow2", &size["virtual-size"].to_string()]);
    scene.add("s", "top.qcow2", json!({}));
    scene.add("copy", "copy.qcow2", json!({ "read-only": true }));
    scene.add("t", "t.qcow2", json!({}));
    scene.mirror(json!({ "sync": "top" }));
    scene.qmp.wait_event("BLOCK_JOB_READY", common::wait::LIMIT).unwrap();
    let give = json!({ "node": "copy", "overlay": "t" });
    let refused = scene.qmp.execute("blockdev-snapshot", give).unwrap_err();
    assert!(refused.to_string().contains("names no backing file"), "{refused}");
    scene.end();
}

#[test]
fn a_file_is_not_mirrored_onto_itself_under_two_names() {
    let Some(mut scene) = Scene::new() else { return };
    scene.img(&["create", "-q", "-f", "raw", "one.raw", "1M"]);
    std::fs::hard_link(scene.path().join("one.raw"), scene.path().join("two.raw")).unwrap();
    for (node, name) in [("s", "one"), ("t", "two")] {
        let path = format!("DIR/{name}.raw");
        let file = json!({ "driver": "file", "node-name": node, "filename": path, "locking": "off" });
        scene.execute("blockdev-add", file);
    }
    let job = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
    let refused = scene.qmp.execute("blockdev-mirror", job).unwrap_err();
    assert!(refused.to_string().contains("Can't mirror node into itself"), "{refused}");
    scene.end();
}
