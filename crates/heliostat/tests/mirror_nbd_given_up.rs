//! A mirror's target or source over NBD that never answers again: a forced cancel ends the job all the same, and at
//! once; nothing waits for the server after that.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use std::time::{Duration, Instant};

use nbd_target::{Mode, SIZE, Stage};

/// What a person calls at once.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Cancels a job whose target is made unable to answer while it is copied to.
fn is_cancelled(mode: Mode, silence: impl FnOnce(&mut Stage)) {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(3600);
    stage.mirror(mode, &json!({}));
    stage.ready();
    let guest = stage.guest();
    silence(&mut stage);
    stage.degraded(true);
    let before = Instant::now();
    stage.execute("block-job-cancel", json!({ "device": "job", "force": true }));
    stage.event("BLOCK_JOB_CANCELLED");
    assert!(before.elapsed() < AT_ONCE, "{:?}", before.elapsed());
    guest.stop();
    let before = Instant::now();
    stage.execute("blockdev-del", json!({ "node-name": "target" }));
    assert!(before.elapsed() < AT_ONCE, "{:?}", before.elapsed());
    stage.quit();
}

#[test]
fn a_forced_cancel_does_not_wait_for_a_server_that_is_gone() {
    for mode in [Mode::Background, Mode::WriteBlocking] {
        is_cancelled(mode, Stage::kill_target);
    }
}

#[test]
fn a_forced_cancel_does_not_wait_for_a_server_that_hangs() {
    for mode in [Mode::Background, Mode::WriteBlocking] {
        is_cancelled(mode, |stage| stage.signal_target("STOP"));
    }
}

#[test]
fn the_daemons_end_does_not_wait_for_a_server_that_is_gone() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(3600);
    stage.mirror(Mode::WriteBlocking, &json!({}));
    stage.ready();
    let guest = stage.guest();
    stage.kill_target();
    stage.degraded(true);
    guest.stop();
    stage.quit();
}

#[test]
fn a_server_that_is_well_keeps_its_connection_when_a_job_is_cancelled() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(0);
    stage.mirror(Mode::Background, &json!({ "speed": 1 << 20 }));
    stage.execute("block-job-cancel", json!({ "device": "job", "force": true }));
    stage.event("BLOCK_JOB_CANCELLED");
    let link = stage.link();
    assert_eq!((link["state"].as_str(), link["reconnects"].as_u64()), (Some("up"), Some(0)), "{link}");
    assert_eq!(link["losses"], 0, "{link}");
    stage.quit();
}

#[test]
fn a_forced_cancel_does_not_wait_for_a_source_that_hangs_and_neither_does_the_end() {
    for is_cancelled in [true, false] {
        let Some(mut stage) = Stage::new() else { return };
        std::fs::copy(stage.path("source"), stage.path("copy")).unwrap();
        stage.start_file_target();
        let server = json!({ "type": "unix", "path": stage.path("target") });
        // Read-only: what may be written is flushed at the end, which may take its time.
        stage.add_target_at(server, 3600, &json!({ "read-only": true, "discard": "ignore" }));
        let other = stage.path("other");
        std::fs::File::create(&other).unwrap().set_len(SIZE.try_into().unwrap()).unwrap();
        stage.execute("blockdev-add", json!({ "driver": "file", "node-name": "other", "filename": other }));
        stage.signal_target("STOP");
        let job = json!({ "job-id": "job", "device": "target", "target": "other", "sync": "full" });
        stage.execute("blockdev-mirror", job);
        if is_cancelled {
            let before = Instant::now();
            stage.execute("block-job-cancel", json!({ "device": "job", "force": true }));
            stage.event("BLOCK_JOB_CANCELLED");
            assert!(before.elapsed() < AT_ONCE, "{:?}", before.elapsed());
        }
        stage.quit();
    }
}
