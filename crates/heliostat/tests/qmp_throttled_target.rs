//! A mirror onto a target, or of a source, with a limit: a forced cancel does not wait for that.

mod common;
mod qmp;

use qmp::Peer;
use qmp::steps::{add, file, mirror};
use qmp::transcript::Step::{Await, Do, Until};
use qmp::transcript::run;
use serde_json::json;

/// Mirrors `s` to `t`, one of which has a limit with which it would take hours.
fn cancel(limited: &str, limit: &str) {
    let peer = Peer::ours();
    for name in ["s", "t"] {
        peer.image(name, 16 << 20);
    }
    let other = if limited == "s" { "t" } else { "s" };
    let group = json!({ "qom-type": "throttle-group", "id": "g", "limits": { limit: 1024 } });
    let throttle =
        json!({ "driver": "throttle", "node-name": limited, "throttle-group": "g", "file": "below" });
    let script = vec![
        file(other, other),
        file("below", limited),
        Do("object-add", group),
        add(throttle),
        mirror(json!({ "auto-dismiss": false })),
        // Some of it has passed, as the limit allows a first request; the rest waits.
        Until("query-block-jobs", |jobs| jobs["return"][0]["len"] == json!(16 << 20)),
        Do("block-job-cancel", json!({ "device": "j", "force": true })),
        Await("concluded", "j"),
        Do("job-dismiss", json!({ "id": "j" })),
        Do("blockdev-del", json!({ "node-name": limited })),
        Do("blockdev-del", json!({ "node-name": "below" })),
    ];
    let said = run(&peer, &script);
    assert!(said.replies.iter().all(|(_, reply)| !reply.contains("error\":{")), "{:?}", said.replies);
    assert!(said.events["j"].iter().any(|event| event.contains("BLOCK_JOB_CANCELLED")), "{:?}", said.events);
}

#[test]
fn a_forced_cancel_does_not_wait_for_the_limit_of_the_target() {
    cancel("t", "bps-write");
}

#[test]
fn a_forced_cancel_does_not_wait_for_the_limit_of_the_source() {
    cancel("s", "bps-read");
}
