//! A mirror's target over NBD that stops answering and goes on later: no guest waits for it longer than agreed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use std::time::Duration;

use nbd_target::{Mode, PROMPT, Stage};

/// What the guest may wait for the target in these tests.
const DEADLINE: Duration = Duration::from_millis(300);

/// The target is stopped until the job has noticed, and a while longer; then everything is as it should be.
fn hangs(mode: Mode) -> Option<Duration> {
    let mut stage = Stage::new()?;
    stage.start_file_target();
    stage.add_target(30);
    stage.mirror(mode, &json!({ "target-deadline-ms": 300 }));
    stage.ready();
    let guest = stage.guest();
    stage.signal_target("STOP");
    let reason = stage.degraded(true);
    assert_eq!(reason, "the target has not answered within 300 ms");
    assert_eq!(stage.job()["degraded"]["reason"], reason);
    stage.signal_target("CONT");
    stage.degraded(false);
    assert_eq!(stage.job().get("degraded"), None);
    let longest = guest.stop();
    stage.ends_with_a_copy();
    Some(longest)
}

#[test]
fn in_background_mode_no_request_waits_for_a_target_that_hangs() {
    let Some(longest) = hangs(Mode::Background) else { return };
    assert!(longest < PROMPT, "{longest:?}");
}

#[test]
fn in_write_blocking_mode_a_request_waits_until_the_deadline_and_the_copy_is_right_in_the_end() {
    let Some(longest) = hangs(Mode::WriteBlocking) else { return };
    assert!(longest < DEADLINE + PROMPT, "{longest:?}");
}

#[test]
fn the_deadline_is_changed_while_the_job_runs() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(30);
    stage.mirror(Mode::WriteBlocking, &json!({ "target-deadline-ms": 3_600_000 }));
    stage.ready();
    let change = json!({
        "id": "job", "type": "mirror", "copy-mode": "write-blocking", "target-deadline-ms": 200,
    });
    stage.execute("block-job-change", change);
    let guest = stage.guest();
    stage.signal_target("STOP");
    assert_eq!(stage.degraded(true), "the target has not answered within 200 ms");
    stage.signal_target("CONT");
    stage.degraded(false);
    guest.stop();
    stage.ends_with_a_copy();
}
