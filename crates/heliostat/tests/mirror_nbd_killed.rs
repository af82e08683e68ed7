//! A mirror's target over NBD whose server is killed and comes back with what it had: the copy is right in the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use nbd_target::{Mode, PROMPT, Stage};

fn is_killed(mode: Mode) {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(30);
    stage.mirror(mode, &json!({}));
    stage.ready();
    let guest = stage.guest();
    stage.kill_target();
    stage.degraded(true);
    let link = stage.link();
    assert_eq!(link["state"], "waiting", "{link}");
    assert!(link["reason"].is_string(), "{link}");
    stage.start_file_target();
    stage.degraded(false);
    let link = stage.link();
    assert_eq!(link["state"], "up", "{link}");
    assert_eq!(link["reconnects"], 1, "{link}");
    let longest = guest.stop();
    assert!(longest < PROMPT * 2, "{longest:?}");
    stage.ends_with_a_copy();
}

#[test]
fn in_background_mode_the_job_catches_up_by_itself() {
    is_killed(Mode::Background);
}

#[test]
fn in_write_blocking_mode_the_job_catches_up_by_itself() {
    is_killed(Mode::WriteBlocking);
}
