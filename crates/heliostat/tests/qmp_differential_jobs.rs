//! The same conversations with `qemu-storage-daemon` and ours about what becomes of a job: how it completes, and what
//! each verb does to it in each status.

mod common;
mod qmp;

use qmp::steps::{SIZE, file, look, mirror, of_job};
use qmp::transcript::Step::{Await, Differs, Do};
use qmp::transcript::compare;
use serde_json::json;

#[test]
fn a_mirror_that_completes_by_itself_says_the_same() {
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        mirror(json!({})),
        Await("BLOCK_JOB_READY", "j"),
        look(),
        Do("query-jobs", json!({})),
        Do("block-job-set-speed", json!({ "device": "j", "speed": -1 })),
        Do("block-job-set-speed", json!({ "device": "j", "speed": "x" })),
        Do("block-job-set-speed", json!({ "device": "j", "speed": 1000 })),
        Do("block-job-set-speed", json!({ "device": "zz", "speed": -1 })),
        look(),
        of_job("block-job-finalize", "id"),
        of_job("job-dismiss", "id"),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        look(),
        of_job("block-job-complete", "device"),
        of_job("job-complete", "id"),
        Do("blockdev-del", json!({ "node-name": "s" })),
        Do("blockdev-del", json!({ "node-name": "t" })),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn a_mirror_that_waits_for_finalize_and_dismiss_says_the_same() {
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        mirror(json!({ "auto-finalize": false, "auto-dismiss": false })),
        Await("BLOCK_JOB_READY", "j"),
        of_job("job-complete", "id"),
        Await("BLOCK_JOB_PENDING", "j"),
        Differs("query-block-jobs", json!({}), "a pending job of ours holds no guest, so it is not paused"),
        Do("query-jobs", json!({})),
        of_job("block-job-pause", "device"),
        of_job("job-resume", "id"),
        of_job("job-complete", "id"),
        Do("block-job-set-speed", json!({ "device": "j", "speed": 1 })),
        Do("block-job-change", json!({ "id": "j", "type": "mirror", "copy-mode": "background" })),
        of_job("block-job-dismiss", "id"),
        of_job("block-job-finalize", "id"),
        Await("concluded", "j"),
        look(),
        Do("query-jobs", json!({})),
        of_job("block-job-cancel", "device"),
        of_job("job-cancel", "id"),
        Do("block-job-set-speed", json!({ "device": "j", "speed": -1 })),
        Do("block-job-change", json!({ "id": "j", "type": "backup" })),
        mirror(json!({ "device": "t", "target": "s" })),
        of_job("job-dismiss", "id"),
        look(),
        of_job("job-dismiss", "id"),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn the_three_cancels_say_the_same() {
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        // Soft, ready: a consistent copy.
        mirror(json!({ "auto-dismiss": false, "copy-mode": "write-blocking" })),
        Await("BLOCK_JOB_READY", "j"),
        of_job("block-job-cancel", "device"),
        Await("concluded", "j"),
        look(),
        of_job("block-job-complete", "device"),
        of_job("block-job-dismiss", "id"),
        // Forced, ready.
        mirror(json!({ "auto-dismiss": false })),
        Await("BLOCK_JOB_READY", "j"),
        Do("block-job-cancel", json!({ "device": "j", "force": true })),
        Await("concluded", "j"),
        look(),
        of_job("job-dismiss", "id"),
        // By the newer command, ready.
        mirror(json!({})),
        Await("BLOCK_JOB_READY", "j"),
        of_job("job-cancel", "id"),
        Await("null", "j"),
        // Pending.
        mirror(json!({ "auto-finalize": false, "auto-dismiss": false })),
        Await("BLOCK_JOB_READY", "j"),
        of_job("block-job-complete", "device"),
        Await("BLOCK_JOB_PENDING", "j"),
        of_job("block-job-cancel", "device"),
        Await("concluded", "j"),
        Do("query-jobs", json!({})),
        of_job("job-dismiss", "id"),
        Do("block-job-cancel", json!({ "device": "j", "force": 1 })),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn pausing_and_resuming_says_the_same() {
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        mirror(json!({ "sync": "none", "auto-dismiss": false })),
        Await("BLOCK_JOB_READY", "j"),
        of_job("job-resume", "id"),
        of_job("block-job-pause", "device"),
        Await("standby", "j"),
        look(),
        of_job("job-pause", "id"),
        of_job("block-job-cancel", "device"),
        of_job("block-job-finalize", "id"),
        Do("block-job-change", json!({ "id": "zz", "type": "mirror", "copy-mode": "background" })),
        Do("block-job-change", json!({ "id": "j", "type": "mirror" })),
        Do("block-job-change", json!({ "id": "j", "type": "backup", "copy-mode": "background" })),
        Do("block-job-change", json!({ "id": "j", "type": "mirror", "copy-mode": "background" })),
        Do("block-job-change", json!({ "id": "j", "type": "mirror", "copy-mode": "write-blocking" })),
        Differs(
            "block-job-change",
            json!({ "id": "j", "type": "mirror", "copy-mode": "background" }),
            "ours goes back to background too",
        ),
        of_job("job-resume", "id"),
        Await("ready", "j"),
        of_job("block-job-resume", "device"),
        of_job("block-job-pause", "device"),
        Await("standby", "j"),
        // Taken while paused, done when resumed.
        of_job("block-job-complete", "device"),
        of_job("block-job-resume", "device"),
        Await("concluded", "j"),
        of_job("block-job-resume", "device"),
        of_job("job-dismiss", "id"),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn unknown_jobs_are_refused_alike() {
    let script = ["pause", "resume", "cancel", "complete", "finalize", "dismiss"].iter().flat_map(|verb| {
        let key = if matches!(*verb, "finalize" | "dismiss") { "id" } else { "device" };
        let old: &'static str = Box::leak(format!("block-job-{verb}").into_boxed_str());
        let new: &'static str = Box::leak(format!("job-{verb}").into_boxed_str());
        [of_job(old, key), of_job(new, "id"), Do(old, json!({})), Do(new, json!({ "device": "j" }))]
    });
    compare(&[], &script.collect());
}
