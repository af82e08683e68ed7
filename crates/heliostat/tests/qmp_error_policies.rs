//! Error policies of a mirror: what is said, what becomes of the job, and how it goes on, beside QEMU's daemon
//! that meets the same fault of the host.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::fs::File;
use std::path::Path;
use std::process::Command;

use qmp::Peer;
use qmp::faults::{Disk, SmallMemory, limit_files};
use qmp::transcript::Step::{self, Await, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use qmp::wire::Wire;
use serde_json::{Value, json};

/// One granule: a fault is met once in each attempt.
const SIZE: usize = 64 << 10;
const SIZE_IN_FILE: u64 = 64 << 10;

fn look() -> Step {
    Do("query-block-jobs", json!({}))
}

fn of_job(command: &'static str, key: &str) -> Step {
    Do(command, json!({ key: "j" }))
}

fn mirror(policies: &Value) -> Step {
    let mut arguments = json!({
        "job-id": "j", "device": "s", "target": "t", "sync": "full", "auto-dismiss": false,
    });
    for (key, value) in policies.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    Do("blockdev-mirror", arguments)
}

fn meanwhile(happens: impl Fn(&Peer) + 'static) -> Step {
    Meanwhile(Box::new(happens))
}

fn file(node: &str, image: &str) -> Step {
    let filename = format!("DIR/{image}");
    let options = json!({ "driver": "file", "node-name": node, "filename": filename, "discard": "unmap" });
    Do("blockdev-add", options)
}

/// The job has failed.
fn it_fails() -> Script {
    vec![Await("concluded", "j"), look(), Do("query-jobs", json!({})), of_job("job-dismiss", "id")]
}

/// The job has stopped: what it takes then, that it stops again while nothing is mended, and that it goes on
/// when it is.
fn it_stops(mended: Step) -> Script {
    vec![
        Await("BLOCK_JOB_ERROR", "j"),
        Await("paused", "j"),
        look(),
        of_job("job-pause", "id"),
        of_job("job-complete", "id"),
        of_job("job-resume", "id"),
        Await("BLOCK_JOB_ERROR", "j"),
        Await("paused", "j"),
        look(),
        mended,
        of_job("block-job-resume", "device"),
        Await("BLOCK_JOB_READY", "j"),
        look(),
        of_job("job-complete", "id"),
        Await("concluded", "j"),
        look(),
        of_job("job-dismiss", "id"),
    ]
}

fn it_is_ignored(mended: Step) -> Script {
    vec![
        Await("BLOCK_JOB_ERROR", "j"),
        Await("BLOCK_JOB_ERROR", "j"),
        mended,
        Await("BLOCK_JOB_READY", "j"),
        look(),
        of_job("job-cancel", "id"),
        Await("concluded", "j"),
        look(),
        of_job("job-dismiss", "id"),
    ]
}

/// A source with data, a target that is all hole on a file system that is full.
fn full(peer: &Peer) -> SmallMemory {
    peer.image("s", SIZE);
    let memory = SmallMemory::mount(&peer.folder().join("small"));
    memory.hole("t", SIZE_IN_FILE);
    SmallMemory::fill(&peer.folder().join("small"));
    memory
}

fn with_room() -> Step {
    meanwhile(|peer| SmallMemory::empty(&peer.folder().join("small")))
}

fn on_a_full_disk(policy: &str, rest: Script) {
    if !SmallMemory::is_possible() {
        return;
    }
    let policies = json!({ "on-target-error": policy });
    let mut script = vec![file("s", "s"), file("t", "small/t"), mirror(&policies)];
    script.extend(rest);
    compare_on(&script, full);
}

#[test]
fn a_full_target_fails_the_job_where_errors_are_reported() {
    on_a_full_disk("report", it_fails());
}

#[test]
fn a_full_target_stops_the_job_where_errors_stop_it() {
    on_a_full_disk("stop", it_stops(with_room()));
}

#[test]
fn a_full_target_stops_the_job_where_lack_of_space_does() {
    on_a_full_disk("enospc", it_stops(with_room()));
    on_a_full_disk("auto", it_stops(with_room()));
}

#[test]
fn a_full_target_is_tried_again_where_errors_are_ignored() {
    on_a_full_disk("ignore", it_is_ignored(with_room()));
}

/// A source with data, a target that is all hole, and a daemon that may write no more than half of it.
fn limited(peer: &Peer) {
    peer.image("s", SIZE);
    File::create(peer.folder().join("t")).unwrap().set_len(SIZE_IN_FILE).unwrap();
    limit_files(peer, Some(SIZE_IN_FILE / 2));
}

fn without_limit() -> Step {
    meanwhile(|peer| limit_files(peer, None))
}

fn beyond_a_limit(policy: &str, rest: Script) {
    if common::tool("prlimit").is_none() {
        return;
    }
    let policies = json!({ "on-target-error": policy });
    let mut script = vec![file("s", "s"), file("t", "t"), mirror(&policies)];
    script.extend(rest);
    compare_on(&script, limited);
}

#[test]
fn any_other_error_of_the_target_fails_the_job_unless_it_is_to_stop_or_go_on() {
    for policy in ["report", "enospc", "auto"] {
        beyond_a_limit(policy, it_fails());
    }
}

#[test]
fn any_other_error_of_the_target_stops_the_job_where_errors_stop_it() {
    beyond_a_limit("stop", it_stops(without_limit()));
}

#[test]
fn any_other_error_of_the_target_is_tried_again_where_errors_are_ignored() {
    beyond_a_limit("ignore", it_is_ignored(without_limit()));
}

/// A source whose medium is gone, a target that is all hole.
fn unreadable(peer: &Peer) -> Disk {
    let medium = peer.folder().join("medium");
    let disk = Disk::make(&medium, SIZE, &peer.folder().join("s"));
    Disk::take_away(&medium);
    File::create(peer.folder().join("t")).unwrap().set_len(SIZE_IN_FILE).unwrap();
    disk
}

fn with_a_medium() -> Step {
    meanwhile(|peer| Disk::bring_back(&peer.folder().join("medium"), SIZE))
}

fn of_an_unreadable_disk(policy: &str, rest: Script) {
    if !Disk::is_possible() {
        return;
    }
    let source = json!({ "driver": "host_device", "node-name": "s", "filename": "DIR/s" });
    let policies = json!({ "on-source-error": policy });
    let mut script = vec![Do("blockdev-add", source), file("t", "t"), mirror(&policies)];
    script.extend(rest);
    compare_on(&script, unreadable);
}

#[test]
fn a_source_that_cannot_be_read_fails_the_job_unless_it_is_to_stop_or_go_on() {
    for policy in ["report", "enospc", "auto"] {
        of_an_unreadable_disk(policy, it_fails());
    }
}

#[test]
fn a_source_that_cannot_be_read_stops_the_job_where_errors_stop_it() {
    of_an_unreadable_disk("stop", it_stops(with_a_medium()));
}

#[test]
fn a_source_that_cannot_be_read_is_tried_again_where_errors_are_ignored() {
    of_an_unreadable_disk("ignore", it_is_ignored(with_a_medium()));
}

/// A guest of the export `n` writes all over the disk.
fn a_guest_writes(pattern: &'static str) -> Step {
    meanwhile(move |peer| {
        let uri = format!("nbd+unix:///n?socket={}/nbd", peer.folder().display());
        let written = Command::new("qemu-io").args(["-f", "raw", "-c", pattern, &uri]).output().unwrap();
        let said = String::from_utf8_lossy(&written.stdout);
        assert!(said.contains("wrote"), "the target's fault is not the guest's error: {said}");
    })
}

fn served(target: Step, policies: &Value) -> Script {
    let export = json!({ "type": "nbd", "id": "e", "node-name": "s", "name": "n", "writable": true });
    vec![
        file("s", "s"),
        target,
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do("block-export-add", export),
        mirror(policies),
        Await("BLOCK_JOB_READY", "j"),
    ]
}

#[test]
fn a_job_that_is_ready_stands_by_at_an_error_and_is_ready_again_when_resumed() {
    if common::tool("prlimit").is_none() || common::tool("qemu-io").is_none() {
        return;
    }
    // The limit is the source's too, so a guest writes before it is there, while the job is paused.
    let mut script = served(file("t", "t"), &json!({ "on-target-error": "stop" }));
    script.extend([
        of_job("job-pause", "id"),
        Await("standby", "j"),
        a_guest_writes("write -P 1 0 64k"),
        meanwhile(|peer| limit_files(peer, Some(SIZE_IN_FILE / 2))),
        of_job("job-resume", "id"),
        Await("BLOCK_JOB_ERROR", "j"),
        Await("standby", "j"),
        look(),
        of_job("block-job-cancel", "device"),
        of_job("block-job-pause", "device"),
        // Taken while it stands by; the error comes again, and what was asked for stays asked for.
        of_job("job-complete", "id"),
        of_job("job-resume", "id"),
        Await("BLOCK_JOB_ERROR", "j"),
        Await("standby", "j"),
        look(),
        without_limit(),
        of_job("job-resume", "id"),
        Await("concluded", "j"),
        look(),
        Do("query-block-exports", json!({})),
    ]);
    let copied = |peer: &Peer| {
        peer.image("s", SIZE);
        peer.image("t", SIZE);
    };
    compare_on(&script, copied);
}

#[test]
fn a_doubled_write_that_fails_on_the_target_is_the_jobs_error_and_not_the_guests() {
    if common::tool("prlimit").is_none() || common::tool("qemu-io").is_none() {
        return;
    }
    // The target begins behind the source's length in its file, so that a limit can be the target's alone.
    let target = json!({
        "driver": "raw", "node-name": "t", "offset": SIZE, "size": SIZE, "discard": "unmap",
        "file": { "driver": "file", "filename": "DIR/t", "discard": "unmap" },
    });
    let policies = json!({ "on-target-error": "stop", "copy-mode": "write-blocking" });
    let mut script = served(Do("blockdev-add", target), &policies);
    script.extend([
        meanwhile(|peer| limit_files(peer, Some(SIZE_IN_FILE + SIZE_IN_FILE / 2))),
        a_guest_writes("write -P 1 0 64k"),
        Await("BLOCK_JOB_ERROR", "j"),
        Await("standby", "j"),
        look(),
        without_limit(),
        of_job("job-resume", "id"),
        Await("ready", "j"),
        of_job("job-complete", "id"),
        Await("concluded", "j"),
        look(),
    ]);
    let furnished = |peer: &Peer| {
        peer.image("s", SIZE);
        peer.image("t", 2 * SIZE);
    };
    compare_on(&script, furnished);
}

#[test]
fn a_job_that_an_error_has_stopped_can_be_cancelled_by_force() {
    let cancelled = vec![
        Await("BLOCK_JOB_ERROR", "j"),
        Await("paused", "j"),
        of_job("block-job-cancel", "device"),
        Do("block-job-cancel", json!({ "device": "j", "force": true })),
        Await("concluded", "j"),
        look(),
        of_job("job-dismiss", "id"),
    ];
    beyond_a_limit("stop", cancelled);
}

/// A source with data, and a target that takes all that it is given and has no room for it when it is to be
/// durable: a block device over a file that is all hole on a file system that is full.
fn without_room_below(peer: &Peer) -> (SmallMemory, Disk) {
    peer.image("s", SIZE);
    let folder = peer.folder().join("small");
    let memory = SmallMemory::mount(&folder);
    memory.hole("medium", SIZE_IN_FILE);
    let disk = Disk::over(&folder.join("medium"), &peer.folder().join("t"));
    SmallMemory::fill(&folder);
    (memory, disk)
}

fn device(node: &str) -> Value {
    json!({
        "driver": "host_device", "node-name": node, "filename": format!("DIR/{node}"), "discard": "unmap",
    })
}

#[test]
fn a_flush_that_fails_is_an_error_of_writing_the_target() {
    if !SmallMemory::is_possible() || !Disk::is_possible() {
        return;
    }
    let mut script = vec![file("s", "s"), Do("blockdev-add", device("t")), mirror(&json!({}))];
    script.extend(it_fails());
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, mut ours] = [qemu, Peer::ours()].map(|peer| {
        let _furniture = without_room_below(&peer);
        qmp::transcript::run(&peer, &script)
    });
    // Ours counts what the failed flush has made dirty again: nobody knows that it is on the medium.
    let replies = ours.replies.iter_mut().map(|(_, reply)| reply);
    let again = |text: &mut String| {
        let counted = text.replace(r#""len":131072"#, r#""len":65536"#);
        *text = counted.replace(r#""total-progress":131072"#, r#""total-progress":65536"#);
    };
    replies.chain(ours.events.values_mut().flatten()).for_each(again);
    assert_eq!(ours, theirs);
}

/// Reads up to an event of that name.
fn event(wire: &mut Wire, name: &str) -> Value {
    loop {
        let message = wire.next();
        if message["event"] == name {
            return message["data"].clone();
        }
    }
}

fn start(wire: &mut Wire, peer: &Peer, commands: &[(&str, Value)]) {
    for (command, arguments) in commands {
        let text = arguments.to_string().replace("DIR", &peer.folder().to_string_lossy());
        let arguments = serde_json::from_str(&text).unwrap();
        assert_eq!(wire.execute(command, &arguments), json!({ "return": {} }), "{command}");
    }
}

fn in_file(node: &str) -> Value {
    json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{node}"), "discard": "unmap" })
}

fn arguments(policy: &str) -> Value {
    json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full", "on-target-error": policy })
}

#[test]
fn after_a_flush_that_failed_everything_is_written_again() {
    if !SmallMemory::is_possible() || !Disk::is_possible() {
        return;
    }
    let peer = Peer::ours();
    let _furniture = without_room_below(&peer);
    let mut wire = Wire::negotiated(&peer.socket());
    let mirror = ("blockdev-mirror", arguments("stop"));
    start(&mut wire, &peer, &[("blockdev-add", in_file("s")), ("blockdev-add", device("t")), mirror]);
    let error = event(&mut wire, "BLOCK_JOB_ERROR");
    assert_eq!((&error["node-name"], &error["offset"]), (&json!("t"), &Value::Null), "a flush has no place");
    assert_eq!(wire.execute("query-block-jobs", &json!({}))["return"][0]["io-status"], "failed");
    SmallMemory::empty(&peer.folder().join("small"));
    wire.execute("job-resume", &json!({ "id": "j" }));
    event(&mut wire, "BLOCK_JOB_READY");
    wire.execute("job-complete", &json!({ "id": "j" }));
    assert_eq!(event(&mut wire, "BLOCK_JOB_COMPLETED")["error"], Value::Null);
    let read = |path: &Path| std::fs::read(path).unwrap();
    let medium = read(&peer.folder().join("small/medium"));
    assert!(medium == read(&peer.folder().join("s")), "it is on the medium, not in the cache alone");
}

#[test]
fn an_error_is_told_with_its_place_and_its_number() {
    if common::tool("prlimit").is_none() {
        return;
    }
    let peer = Peer::ours();
    limited(&peer);
    let mut wire = Wire::negotiated(&peer.socket());
    let mirror = ("blockdev-mirror", arguments("report"));
    start(&mut wire, &peer, &[("blockdev-add", in_file("s")), ("blockdev-add", in_file("t")), mirror]);
    let error = event(&mut wire, "BLOCK_JOB_ERROR");
    // QEMU's fields first.
    assert_eq!(
        error.to_string(),
        r#"{"device":"j","operation":"write","action":"report","node-name":"t","offset":0,"length":65536,"errno":27}"#
    );
    let ended = event(&mut wire, "BLOCK_JOB_COMPLETED");
    assert_eq!(ended["error"], "node \"t\": I/O error at 0x0+0x10000: File too large (os error 27)");
}
