//! A mirror's target over NBD that is slow: in background mode guests do not notice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use common::wait;
use nbd_target::{Mode, PROMPT, Stage};

#[test]
fn no_guest_waits_for_a_slow_target_in_background_mode() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_target(&["--filter=delay", "file", "DIR/copy", "wdelay=1500ms"]);
    stage.add_target(30);
    stage.mirror(Mode::Background, &json!({}));
    let guest = stage.guest();
    wait::until("some copies", wait::LIMIT, || {
        stage.job()["data-copied"].as_u64().filter(|copied| *copied >= 4 << 20)
    })
    .unwrap();
    let longest = guest.stop();
    assert!(longest < PROMPT, "{longest:?}");
    stage.ready();
    stage.ends_with_a_copy();
}
