//! Mirrors that use a dirty bitmap of their source: what they copy, and what the bitmap says afterwards.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::scene::Scene;
use common::wait;
use serde_json::{Value, json};

const GRANULE: u64 = 64 << 10;

/// A source with 16 MiB of data and the bitmap `b`, exported; and an image `t` of the same size. Says where guests are.
fn scene() -> Option<(Scene, String)> {
    let mut scene = Scene::new()?;
    scene.img(&["create", "-q", "-f", "qcow2", "s.qcow2", "16M"]);
    scene.img(&["create", "-q", "-f", "qcow2", "t.qcow2", "16M"]);
    scene.io("s.qcow2", &["write -P 1 0 16M"]);
    scene.add("s", "s.qcow2", json!({}));
    scene.add("t", "t.qcow2", json!({}));
    scene.execute(
        "block-dirty-bitmap-add",
        json!({ "node": "s", "name": "b", "granularity": GRANULE, "persistent": true }),
    );
    let uri = scene.export("s");
    Some((scene, uri))
}

/// What is said of the bitmap `b` of a node.
fn bitmap(scene: &mut Scene, node: &str) -> Option<Value> {
    let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
    let node = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap().clone();
    let bitmaps = node.get("dirty-bitmaps")?.as_array().unwrap().clone();
    bitmaps.into_iter().find(|bitmap| bitmap["name"] == "b")
}

fn count(scene: &mut Scene, node: &str) -> u64 {
    bitmap(scene, node).unwrap()["count"].as_u64().unwrap()
}

fn mirror(scene: &mut Scene, more: Value) {
    scene.mirror(more);
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
}

/// Leaves a consistent copy. Says how much was copied.
fn leave_copy(scene: &mut Scene) -> u64 {
    scene.execute("block-job-cancel", json!({ "device": "j" }));
    let event = scene.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    assert!(event["data"].get("error").is_none(), "{event}");
    event["data"]["len"].as_u64().unwrap()
}

fn cancel(scene: &mut Scene) {
    scene.execute("block-job-cancel", json!({ "device": "j", "force": true }));
    scene.qmp.wait_event("BLOCK_JOB_CANCELLED", wait::LIMIT).unwrap();
}

/// Ends the daemon; both images are the same, and sound.
fn same(scene: Scene) {
    let folder = scene.end();
    common::qcow2::qemu_img(folder.path(), &["compare", "-q", "s.qcow2", "t.qcow2"]);
    common::qcow2::qemu_img(folder.path(), &["check", "-q", "s.qcow2"]);
    common::qcow2::qemu_img(folder.path(), &["check", "-q", "t.qcow2"]);
}

#[test]
fn a_copy_is_brought_up_to_date_by_what_the_bitmap_has_and_no_more() {
    let Some((mut scene, uri)) = scene() else { return };
    mirror(&mut scene, json!({ "bitmap": "b", "bitmap-mode": "on-success" }));
    assert_eq!(bitmap(&mut scene, "s").unwrap()["busy"], true);
    assert_eq!(leave_copy(&mut scene), 16 << 20);
    assert_eq!((count(&mut scene, "s"), bitmap(&mut scene, "s").unwrap()["busy"].clone()), (0, json!(false)));
    scene.guest(&uri, &["write -P 2 1M 4k", "write -P 3 5M 128k"]);
    assert_eq!(count(&mut scene, "s"), 3 * GRANULE);
    mirror(&mut scene, json!({ "sync": "incremental", "bitmap": "b" }));
    scene.guest(&uri, &["write -P 4 9M 4k"]);
    assert_eq!(leave_copy(&mut scene), 4 * GRANULE);
    assert_eq!(count(&mut scene, "s"), 0);
    same(scene);
}

#[test]
fn a_job_that_is_cancelled_loses_nothing_of_the_bitmap() {
    let Some((mut scene, uri)) = scene() else { return };
    mirror(&mut scene, json!({ "bitmap": "b", "bitmap-mode": "on-success" }));
    leave_copy(&mut scene);
    scene.guest(&uri, &["write -P 2 1M 4k"]);
    for (mode, left) in [("never", 2), ("on-success", 3), ("always", 0)] {
        mirror(&mut scene, json!({ "sync": "bitmap", "bitmap": "b", "bitmap-mode": mode }));
        scene.guest(&uri, &[&format!("write -P 3 {}M 4k", left + 1)]);
        // Copied by then, and not flushed: with `always` it may still be there.
        cancel(&mut scene);
        if left > 0 {
            assert_eq!(count(&mut scene, "s"), left * GRANULE, "{mode}");
        } else {
            assert!(count(&mut scene, "s") <= 2 * GRANULE, "what was copied and flushed is off");
        }
    }
    mirror(&mut scene, json!({ "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never" }));
    leave_copy(&mut scene);
    same(scene);
}

#[test]
fn a_bitmap_follows_to_the_target_and_is_kept_there() {
    let Some((mut scene, uri)) = scene() else { return };
    mirror(&mut scene, json!({}));
    scene.guest(&uri, &["write -P 2 1M 4k"]);
    scene.complete_now();
    scene.guest(&uri, &["write -P 3 2M 4k"]);
    assert!(bitmap(&mut scene, "s").is_none());
    let followed = bitmap(&mut scene, "t").unwrap();
    assert_eq!((followed["persistent"].clone(), followed["recording"].clone()), (json!(true), json!(true)));
    assert_eq!(count(&mut scene, "t"), 2 * GRANULE);
    scene.execute("block-dirty-bitmap-clear", json!({ "node": "t", "name": "b" }));
    let folder = scene.end();
    let info = common::qcow2::qemu_img(folder.path(), &["info", "t.qcow2"]);
    assert!(info.contains("name: b"), "{info}");
    let info = common::qcow2::qemu_img(folder.path(), &["info", "s.qcow2"]);
    assert!(!info.contains("name: b"), "{info}");
    common::qcow2::qemu_img(folder.path(), &["check", "-q", "s.qcow2"]);
    common::qcow2::qemu_img(folder.path(), &["check", "-q", "t.qcow2"]);
}

#[test]
fn the_operator_is_told_of_a_bitmap_that_the_target_cannot_keep() {
    let Some((mut scene, _)) = scene() else { return };
    scene.img(&["create", "-q", "-f", "raw", "r.raw", "16M"]);
    scene.add("r", "r.raw", json!({}));
    mirror(&mut scene, json!({ "target": "r" }));
    scene.execute("block-job-complete", json!({ "device": "j" }));
    let event = scene.qmp.wait_event("BLOCK_DIRTY_BITMAP_NOT_STORED", wait::LIMIT).unwrap();
    assert_eq!(event["data"], json!({ "node-name": "r", "name": "b" }));
    scene.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    assert_eq!(bitmap(&mut scene, "r").unwrap()["persistent"], false);
}

#[test]
fn arguments_that_do_not_go_together_are_refused_in_the_words_of_qemus_backup() {
    let Some((mut scene, _)) = scene() else { return };
    let table = [
        (json!({ "sync": "bitmap" }), "Sync mode 'bitmap' not supported"),
        (json!({ "sync": "incremental" }), "Sync mode 'incremental' not supported"),
        (json!({ "bitmap-mode": "always" }), "Cannot specify bitmap sync mode without a bitmap"),
        (json!({ "bitmap": "b" }), "Bitmap sync mode must be given when providing a bitmap"),
        (
            json!({ "bitmap": "b", "bitmap-mode": "never" }),
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
        ),
        (
            json!({ "sync": "none", "bitmap": "b", "bitmap-mode": "always" }),
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (json!({ "sync": "incremental", "bitmap": "x" }), "Bitmap 'x' could not be found"),
        (
            json!({ "sync": "incremental", "bitmap": "b", "bitmap-mode": "always" }),
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
        (json!({ "bitmap-mode": "zork" }), "Parameter 'bitmap-mode' does not accept value 'zork'"),
    ];
    for (more, text) in table {
        let mut spec = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
        more.as_object().unwrap().iter().for_each(|(key, value)| spec[key] = value.clone());
        let refusal = scene.qmp.execute("blockdev-mirror", spec).unwrap_err();
        assert!(refusal.to_string().contains(text), "{refusal}");
    }
    mirror(&mut scene, json!({ "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never" }));
    let named = json!({ "node": "s", "name": "b" });
    let verbs = ["clear", "remove", "enable", "disable"];
    for command in verbs.map(|verb| format!("block-dirty-bitmap-{verb}")) {
        let refusal = scene.qmp.execute(&command, named.clone()).unwrap_err();
        let text = "Bitmap 'b' is currently in use by another operation and cannot be used";
        assert!(refusal.to_string().contains(text), "{refusal}");
    }
    leave_copy(&mut scene);
}

#[test]
fn mirrors_start_in_a_transaction_with_changes_of_bitmaps_or_not_at_all() {
    let Some((mut scene, uri)) = scene() else { return };
    let spec = |id: &str, target: &str| {
        json!({ "type": "blockdev-mirror", "data": {
            "job-id": id, "device": "s", "target": target, "sync": "full", "bitmap": "b", "bitmap-mode": "always",
        } })
    };
    let clear = json!({ "type": "block-dirty-bitmap-clear", "data": { "node": "s", "name": "b" } });
    scene.guest(&uri, &["write -P 2 1M 4k"]);
    let refused = [
        (json!([clear, spec("j", "t"), clear]), "currently in use by another operation"),
        (json!([spec("j", "t"), spec("k", "t")]), "Need a root block node"),
        (json!([clear, spec("j", "nobody")]), "Cannot find device='nobody'"),
        (json!([clear, spec("j", "t"), { "type": "abort", "data": {} }]), "Transaction aborted"),
        (
            json!([{ "type": "block-dirty-bitmap-enable", "data": { "node": "s", "name": "x" } }]),
            "Dirty bitmap 'x' not found",
        ),
    ];
    for (actions, text) in refused {
        let refusal = scene.qmp.execute("transaction", json!({ "actions": actions })).unwrap_err();
        assert!(refusal.to_string().contains(text), "{refusal}");
        assert_eq!(count(&mut scene, "s"), GRANULE, "nothing has changed");
        assert_eq!(scene.execute("query-jobs", json!({})), json!([]));
    }
    scene.execute("transaction", json!({ "actions": [clear, spec("j", "t")] }));
    scene.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    leave_copy(&mut scene);
    same(scene);
}
