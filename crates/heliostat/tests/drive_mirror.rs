//! `drive-mirror`: targets that are made or opened for a mirror, judged by `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use serde_json::{Value, json};

use common::qcow2::{assert_same, assert_sound, qemu_img, qemu_io};
use common::scene::Scene;
use common::{tool, wait};

/// Mirrors the export `e` of `s` to a file.
fn drive_mirror(scene: &mut Scene, more: Value) {
    let mut spec = json!({ "job-id": "j", "device": "s", "target": "DIR/t", "sync": "full" });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    scene.execute("drive-mirror", spec);
}

/// What a guest writes while it is mirrored: over data, zeroes and holes of each layer; whole clusters and parts.
const MEANWHILE: [&str; 5] = [
    "write -P 8 3M 4k",
    "write -z 7M 12k",
    "write -P 7 2100k 100",
    "write -z -u 12M 1M",
    "write -P 9 15M 1M",
];

/// What it reads right after the pivot, and writes then.
const AFTER: [&str; 6] = [
    "read -P 8 3M 4k",
    "read -P 0 7M 12k",
    "read -P 1 512k 64k",
    "read -P 4 14M 64k",
    "write -P 10 5M 64k",
    "write -P 11 3M 100",
];

#[test]
fn a_new_target_reads_as_the_source_does_whatever_it_stands_on() {
    for (sync, format, copy_mode) in [
        ("full", "qcow2", "background"),
        ("full", "raw", "write-blocking"),
        ("top", "qcow2", "background"),
        ("top", "qcow2", "write-blocking"),
        ("none", "qcow2", "background"),
        ("none", "qcow2", "write-blocking"),
    ] {
        let Some(mut scene) = Scene::new() else { return };
        scene.chain();
        scene.add("s", "top.qcow2", json!({ "discard": "unmap" }));
        let uri = scene.export("s");
        drive_mirror(&mut scene, json!({ "sync": sync, "format": format, "copy-mode": copy_mode }));
        scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
        scene.guest(&uri, &MEANWHILE);
        scene.complete_now();
        scene.guest(&uri, &AFTER);
        let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
        assert!(nodes.as_array().unwrap().iter().any(|node| node["file"].as_str().unwrap().ends_with("/t")));
        scene.execute("block-export-del", json!({ "id": "e" }));
        // It goes with its last user, and is left in order.
        let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
        assert!(!nodes.as_array().unwrap().iter().any(|node| node["file"].as_str().unwrap().ends_with("/t")));
        scene.execute("blockdev-del", json!({ "node-name": "s" }));
        let folder = scene.path();
        assert_sound(&folder, "top.qcow2");
        if format == "qcow2" {
            assert_sound(&folder, "t");
        }
        qemu_io(&folder, "top.qcow2", &AFTER[4..]);
        assert_same(&folder, ("top.qcow2", "qcow2"), ("t", format));
        let info: Value = serde_json::from_str(&qemu_img(&folder, &["info", "--output=json", "t"])).unwrap();
        let below = match sync {
            "top" => json!(std::fs::canonicalize(folder.join("mid.qcow2")).unwrap()),
            "none" => json!(std::fs::canonicalize(folder.join("top.qcow2")).unwrap()),
            _ => Value::Null,
        };
        assert_eq!(info["backing-filename"], below);
        scene.end();
    }
}

#[test]
fn what_an_existing_target_stands_on_is_opened_when_the_job_completes_and_not_before() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.img(&["create", "-q", "-f", "qcow2", "-b", "copy.qcow2", "-F", "qcow2", "-u", "t", "16M"]);
    scene.add("s", "top.qcow2", json!({}));
    let uri = scene.export("s");
    drive_mirror(&mut scene, json!({ "sync": "top", "format": "qcow2", "mode": "existing" }));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    scene.guest(&uri, &MEANWHILE);
    let refused = scene.qmp.execute("block-job-complete", json!({ "device": "j" })).unwrap_err().to_string();
    assert!(refused.contains("Could not open backing file"), "{refused}");
    let jobs = scene.execute("query-block-jobs", json!({}));
    assert_eq!(jobs[0]["status"], "ready", "a completion that is refused leaves the job as it was");
    // Somebody else has brought the rest of the chain over meanwhile.
    scene.img(&["convert", "-O", "qcow2", "mid.qcow2", "copy.qcow2"]);
    scene.complete_now();
    scene.guest(&uri, &AFTER);
    let folder = scene.end();
    assert_sound(folder.path(), "t");
    qemu_io(folder.path(), "top.qcow2", &AFTER[4..]);
    assert_same(folder.path(), ("top.qcow2", "qcow2"), ("t", "qcow2"));
}

#[test]
fn no_argument_that_is_wrong_touches_a_file() {
    let Some(mut scene) = Scene::new() else { return };
    scene.chain();
    scene.add("s", "top.qcow2", json!({}));
    scene.add("o", "base.raw", json!({ "read-only": true }));
    std::fs::write(scene.path().join("there"), b"precious").unwrap();
    let wrong = [
        json!({ "sync": "bitmap" }),
        json!({ "granularity": 1000 }),
        json!({ "buf-size": -1 }),
        json!({ "speed": -1 }),
        json!({ "job-id": "1" }),
        json!({ "node-name": "s" }),
        json!({ "node-name": "#x" }),
        json!({ "replaces": "zz", "node-name": "tt" }),
        json!({ "format": "zork" }),
        json!({ "format": "raw", "sync": "top" }),
        json!({ "target": "DIR/top.qcow2" }),
        json!({ "target": "DIR/mid.qcow2" }),
        json!({ "target": "DIR/base.raw" }),
    ];
    let before = std::fs::read(scene.path().join("base.raw")).unwrap();
    for name in ["t", "there"] {
        for wrong in &wrong {
            let mut spec =
                json!({ "job-id": "j", "device": "s", "target": format!("DIR/{name}"), "sync": "full" });
            for (key, value) in wrong.as_object().unwrap() {
                spec[key] = value.clone();
            }
            let spec = spec.to_string().replace("DIR", scene.path().to_str().unwrap());
            let refused = scene.qmp.execute("drive-mirror", serde_json::from_str(&spec).unwrap());
            assert!(refused.is_err(), "{wrong}");
        }
    }
    assert!(!scene.path().join("t").exists());
    assert_eq!(std::fs::read(scene.path().join("there")).unwrap(), b"precious");
    assert_eq!(std::fs::read(scene.path().join("base.raw")).unwrap(), before);
    for image in ["top.qcow2", "mid.qcow2"] {
        scene.img(&["check", "-q", "-U", image]);
    }
    scene.end();
}

#[test]
fn a_target_that_was_guessed_to_be_raw_never_becomes_an_image() {
    let Some(mut scene) = Scene::new() else { return };
    let Some(_) = tool("qemu-io") else { return };
    scene.img(&["create", "-q", "-f", "raw", "s.raw", "1M"]);
    scene.img(&["create", "-q", "-f", "raw", "t", "1M"]);
    scene.img(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    scene.add("s", "s.raw", json!({}));
    let uri = scene.export("s");
    drive_mirror(&mut scene, json!({ "mode": "existing" }));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    let header = scene.path().join("header");
    std::fs::write(&header, &std::fs::read(scene.path().join("image")).unwrap()[..512]).unwrap();
    scene.guest(&uri, &[&format!("write -s {} 0 512", header.display())]);
    let event = scene.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    let error = event["data"]["error"].as_str().unwrap();
    assert!(error.contains("Operation not permitted"), "{error}");
    let target = std::fs::read(scene.path().join("t")).unwrap();
    assert!(target[..4] != *b"QFI\xfb");
    scene.end();
}
