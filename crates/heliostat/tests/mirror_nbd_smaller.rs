//! A mirror's target over NBD that comes back smaller: it is not what it was, and is not written to until it is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use std::fs::File;

use common::wait;
use nbd_target::{Mode, SIZE, Stage};

#[test]
fn a_target_that_comes_back_smaller_is_not_written_to_until_it_is_as_it_was() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_file_target();
    stage.add_target(600);
    stage.mirror(Mode::WriteBlocking, &json!({ "on-target-error": "ignore" }));
    stage.ready();
    let guest = stage.guest();
    stage.kill_target();
    stage.degraded(true);
    let small = stage.path("small");
    File::create(&small).unwrap().set_len(u64::try_from(SIZE / 2).unwrap()).unwrap();
    stage.start_target(&["file", "DIR/small"]);
    let link = wait::until("the change", wait::LIMIT, || {
        Some(stage.link()).filter(|link| link["state"] == "changed")
    });
    let link = link.unwrap();
    assert!(link["reason"].as_str().unwrap().contains("bytes now, not"), "{link}");
    stage.kill_target();
    assert!(std::fs::read(&small).unwrap().iter().all(|byte| *byte == 0), "nobody wrote it");
    stage.start_file_target();
    stage.degraded(false);
    guest.stop();
    stage.ends_with_a_copy();
}
