//! Error policies of a mirror under injected faults: each policy, with an error that is lack of space and one that is
//! not, on each side, while the job is running and when it is ready, beside QEMU's daemon.
//!
//! The same rules in the same `blkdebug` nodes on both sides; each fault is met once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::process::Command;

use qmp::Peer;
use qmp::transcript::Step::{self, Await, Do, Meanwhile};
use qmp::transcript::{Script, compare_on, run};
use serde_json::json;

/// One granule: a fault is met by one copy.
const SIZE: usize = 64 << 10;

const POLICIES: [&str; 5] = ["report", "ignore", "enospc", "stop", "auto"];
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Which side meets the fault, and in doing what.
#[derive(Clone, Copy)]
struct Fault {
    side: &'static str,
    io: &'static str,
    errno: i32,
}

/// What becomes of a job.
fn stops(policy: &str, errno: i32) -> bool {
    match policy {
        "stop" => true,
        "enospc" | "auto" => errno == ENOSPC,
        _ => false,
    }
}

fn job(command: &'static str, key: &str, id: &str) -> Step {
    Do(command, json!({ key: id }))
}

fn look() -> Step {
    Do("query-block-jobs", json!({}))
}

/// A node over an image of one granule, which meets the fault if it is that side's.
fn node(side: &str, fault: Fault) -> Step {
    let image = json!({ "driver": "file", "filename": format!("DIR/{side}"), "discard": "unmap" });
    let mut options = json!({ "driver": "blkdebug", "node-name": side, "image": image, "discard": "unmap" });
    if side == fault.side {
        let rule = json!({ "event": "none", "iotype": fault.io, "errno": fault.errno, "once": true });
        options["inject-error"] = json!([rule]);
    }
    Do("blockdev-add", options)
}

fn mirror(id: &str, sync: &str, policy: &str, fault: Fault) -> Step {
    let mut arguments = json!({
        "job-id": id, "device": "source", "target": "target", "sync": sync, "auto-dismiss": false,
    });
    arguments[format!("on-{}-error", fault.side)] = json!(policy);
    Do("blockdev-mirror", arguments)
}

/// What is asked once the fault has been met.
fn rest(id: &'static str, policy: &str, fault: Fault, stopped: &'static str) -> Script {
    let mut script = vec![Await("BLOCK_JOB_ERROR", id)];
    if policy == "report" || (policy != "ignore" && !stops(policy, fault.errno)) {
        script.extend([Await("concluded", id), look(), Do("query-jobs", json!({}))]);
    } else {
        if policy != "ignore" {
            script.extend([Await(stopped, id), look(), job("job-resume", "id", id)]);
            if stopped == "standby" {
                script.push(Await("ready", id));
            }
        }
        if stopped == "paused" {
            script.push(Await("BLOCK_JOB_READY", id));
        }
        script.extend([job("job-complete", "id", id), Await("concluded", id)]);
    }
    script.push(job("job-dismiss", "id", id));
    script
}

fn nodes_go() -> [Step; 2] {
    ["source", "target"].map(|node| Do("blockdev-del", json!({ "node-name": node })))
}

/// An id that no other job has.
fn id_of(index: usize) -> &'static str {
    format!("j{index}").leak()
}

/// A job that meets the fault in its first pass.
fn while_running(index: usize, policy: &str, fault: Fault) -> Script {
    let id = id_of(index);
    let mut script = vec![node("source", fault), node("target", fault), mirror(id, "full", policy, fault)];
    script.extend(rest(id, policy, fault, "paused"));
    script.extend(nodes_go());
    script
}

fn furnish(peer: &Peer) {
    peer.image("source", SIZE);
    std::fs::File::create(peer.folder().join("target")).unwrap().set_len(64 << 10).unwrap();
}

fn every(faults: &[Fault], script: impl Fn(usize, &str, Fault) -> Script) -> Script {
    let cases = faults.iter().flat_map(|fault| POLICIES.map(|policy| (*fault, policy)));
    cases.enumerate().flat_map(|(index, (fault, policy))| script(index, policy, fault)).collect()
}

fn reads_and_writes() -> [Fault; 4] {
    let read = |errno| Fault { side: "source", io: "read", errno };
    let write = |errno| Fault { side: "target", io: "write", errno };
    [read(EIO), read(ENOSPC), write(EIO), write(ENOSPC)]
}

#[test]
fn a_fault_in_the_first_pass_is_met_as_the_policy_says() {
    compare_on(&every(&reads_and_writes(), while_running), furnish);
}

/// A guest of the export writes all over the disk, and is told that it has.
fn a_guest_writes() -> Step {
    Meanwhile(Box::new(|peer| {
        let uri = format!("nbd+unix:///n?socket={}/nbd", peer.folder().display());
        let written = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 1 0 64k", &uri]).output();
        let said = written.unwrap().stdout;
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("wrote"), "the job's fault is not the guest's error: {said}");
    }))
}

/// A job that meets the fault when a guest writes, being ready.
fn when_ready(index: usize, policy: &str, fault: Fault) -> Script {
    let id = id_of(index);
    let export = json!({ "type": "nbd", "id": id, "node-name": "source", "name": "n", "writable": true });
    let mut script = vec![
        node("source", fault),
        node("target", fault),
        Do("block-export-add", export),
        mirror(id, "none", policy, fault),
        Await("BLOCK_JOB_READY", id),
        a_guest_writes(),
    ];
    script.extend(rest(id, policy, fault, "standby"));
    script.extend([
        Do("block-export-del", json!({ "id": id, "mode": "hard" })),
        Await("BLOCK_EXPORT_DELETED", id),
    ]);
    script.extend(nodes_go());
    script
}

#[test]
fn a_fault_when_the_job_is_ready_is_met_as_the_policy_says() {
    if common::tool("qemu-io").is_none() {
        return;
    }
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    let mut script = vec![Do("nbd-server-start", address)];
    script.extend(every(&reads_and_writes(), when_ready));
    compare_on(&script, furnish);
}

#[test]
fn a_flush_of_the_target_that_fails_is_met_as_the_policy_says() {
    let flush = |errno| Fault { side: "target", io: "flush", errno };
    let script = every(&[flush(EIO), flush(ENOSPC)], while_running);
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, mut ours] = [qemu, Peer::ours()].map(|peer| {
        furnish(&peer);
        run(&peer, &script)
    });
    // Ours writes again what the failed flush may have lost, and counts that.
    let again = |text: &mut String| {
        for field in ["len", "offset", "total-progress", "current-progress"] {
            *text = text.replace(&format!(r#""{field}":131072"#), &format!(r#""{field}":65536"#));
        }
    };
    let replies = ours.replies.iter_mut().map(|(_, reply)| reply);
    replies.chain(ours.events.values_mut().flatten()).for_each(again);
    assert_eq!(ours, theirs);
}

#[test]
fn errors_that_are_ignored_are_tried_again_at_a_pace() {
    let peer = Peer::ours();
    furnish(&peer);
    let always = json!([{ "event": "none", "iotype": "write", "errno": EIO }]);
    let fault = Fault { side: "target", io: "write", errno: EIO };
    let image = json!({ "driver": "file", "filename": "DIR/target" });
    let target =
        json!({ "driver": "blkdebug", "node-name": "target", "image": image, "inject-error": always });
    let mut script = vec![
        node("source", Fault { side: "nobody", ..fault }),
        Do("blockdev-add", target),
        mirror("j", "full", "ignore", fault),
    ];
    script.extend((0..4).map(|_| Await("BLOCK_JOB_ERROR", "j")));
    script.extend([
        Do("block-job-cancel", json!({ "device": "j", "force": true })),
        Await("concluded", "j"),
        job("job-dismiss", "id", "j"),
    ]);
    let begun = std::time::Instant::now();
    let said = run(&peer, &script);
    // Rests of 100, 200 and 400 ms lie between the four.
    assert!(begun.elapsed() >= std::time::Duration::from_millis(700), "{:?}", begun.elapsed());
    assert!(said.replies.iter().all(|(_, reply): &(String, String)| !reply.contains("GenericError")));
}
