//! A mirror's target over NBD that refuses what it is sent: on-target-error decides, and a full one is no dead one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/nbd_target.rs"]
mod nbd_target;

use serde_json::json;

use nbd_target::{Mode, Stage};

/// Refuses every write while the file `trouble` is there.
fn refusing<'a>(errno: &'a str, rate: &'a str) -> Vec<&'a str> {
    vec!["--filter=error", "file", "DIR/copy", errno, rate, "error-file=DIR/trouble"]
}

#[test]
fn with_report_the_job_fails_and_says_why() {
    let Some(mut stage) = Stage::new() else { return };
    stage.start_target(&refusing("error-pwrite=EIO", "error-pwrite-rate=100%"));
    std::fs::write(stage.path("trouble"), "").unwrap();
    stage.add_target(30);
    stage.mirror(Mode::Background, &json!({}));
    let ended = stage.event("BLOCK_JOB_COMPLETED");
    assert!(ended["data"]["error"].as_str().unwrap().contains("node \"target\""), "{ended}");
    stage.quit();
}

#[test]
fn with_enospc_the_job_stops_while_the_target_is_full_and_goes_on_when_resumed() {
    for mode in [Mode::Background, Mode::WriteBlocking] {
        let Some(mut stage) = Stage::new() else { return };
        stage.start_target(&refusing("error-pwrite=ENOSPC", "error-pwrite-rate=100%"));
        stage.add_target(30);
        stage.mirror(mode, &json!({ "on-target-error": "enospc" }));
        stage.ready();
        std::fs::write(stage.path("trouble"), "").unwrap();
        let guest = stage.guest();
        let error = stage.event("BLOCK_JOB_ERROR");
        assert_eq!(error["data"]["action"], "stop", "{error}");
        assert_eq!(stage.job()["io-status"], "nospace");
        std::fs::remove_file(stage.path("trouble")).unwrap();
        guest.stop();
        stage.execute("block-job-resume", json!({ "device": "job" }));
        stage.ends_with_a_copy();
    }
}
