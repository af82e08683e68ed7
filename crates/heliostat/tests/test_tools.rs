//! The tests' own tools, shown to work on a peer: a control client that waits wrongly would make every other
//! test doubtful.

mod common;

use std::process::Command;
use std::time::Duration;

use serde_json::json;

use common::process::Daemon;
use common::qmp::{Qmp, QmpError};
use common::{folder, tool, wait};

#[test]
fn a_control_client_gets_answers_refusals_and_events_in_order() {
    let Some(program) = tool("qemu-storage-daemon") else { return };
    let folder = folder();
    let (daemon, socket) = Daemon::start_qemu(&program, folder.path()).unwrap();

    let mut qmp = Qmp::connect(&socket).unwrap();
    assert!(qmp.greeting()["QMP"]["version"].is_object());
    assert!(qmp.execute("query-version", json!({})).unwrap()["qemu"].is_object());
    let refused = qmp.execute("no-such-command", json!({})).unwrap_err();
    assert!(matches!(refused, QmpError::Refused { class, .. } if class == "CommandNotFound"));

    for name in ["source", "target"] {
        let node = json!({ "driver": "null-co", "size": 1 << 20, "node-name": name, "read-zeroes": true });
        qmp.execute("blockdev-add", node).unwrap();
    }
    let job = json!({ "job-id": "j", "device": "source", "target": "target", "sync": "full" });
    qmp.execute("blockdev-mirror", job).unwrap();
    let events = qmp.events_until("BLOCK_JOB_READY", wait::LIMIT).unwrap();
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE", "BLOCK_JOB_READY"]);

    let silent = qmp.wait_event("NO_SUCH_EVENT", Duration::from_millis(20)).unwrap_err();
    assert_eq!(silent.kind(), std::io::ErrorKind::TimedOut);
    assert!(daemon.resident_bytes_max().unwrap() > 1 << 20);
    assert!(daemon.stop().unwrap().success());
}

#[test]
fn a_daemon_that_ends_before_it_listens_is_told_apart_from_a_slow_one() {
    let folder = folder();
    let mut command = Command::new("sh");
    let mut daemon = Daemon::start(command.args(["-c", "exit 7"])).unwrap();
    let error = daemon.listens(&folder.path().join("never")).unwrap_err();
    assert!(error.to_string().contains("exit status: 7"), "{error}");
}

#[test]
fn a_wait_has_an_end() {
    let error = wait::until("nothing", Duration::from_millis(5), || None::<()>).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("nothing"));
}
