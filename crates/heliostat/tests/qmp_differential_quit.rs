//! `quit` while there are jobs, wherever they are: the reply, and what is said until the connection ends, as
//! `qemu-storage-daemon` does it.
//!
//! Each status alone in a daemon of its own, with ends that come by themselves and ends that wait; and all of them at
//! once in one daemon, with an export whose client is connected. When an event of a job comes between others is a
//! matter of threads, so each job's are compared alone. What may differ is what may in `qmp_differential_verbs`: how
//! far a job has come that is held on its way.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
mod qmp;

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use heliostat_block::nbd::ReplyStyle;
use qmp::Peer;
use qmp::transcript::Step::{Await, Do, HangUp, Meanwhile, Until};
use qmp::transcript::{Script, Transcript, run};
use qmp::verbs::{At, Model, ORDERS, differences, named, order, wait};
use serde_json::{Value, json};

/// One granule.
const SIZE: usize = 65536;

/// Where a job is when the end comes: the job's name, what it is made with, where that leads, and what is asked then.
type Case = (&'static str, Value, At, &'static [usize]);

fn cases() -> Vec<Case> {
    let held = || json!({ "sync": "full", "speed": 1, "granularity": 512, "buf-size": 512 });
    let idle = || json!({ "sync": "none" });
    let doubled = || json!({ "sync": "none", "copy-mode": "write-blocking" });
    vec![
        ("held", held(), At::Running, &[]),
        ("held-paused", held(), At::Running, &[1]),
        ("ready", idle(), At::Ready, &[]),
        ("ready-doubled", doubled(), At::Ready, &[]),
        ("standby", idle(), At::Ready, &[1]),
        ("standby-ending", idle(), At::Ready, &[1, 8]),
        ("ended", idle(), At::Ready, &[8]),
        ("ended-copy", idle(), At::Ready, &[4]),
        ("cancelled", idle(), At::Ready, &[6]),
        ("failed", json!({ "sync": "full", "target": "larger" }), At::Concluded, &[]),
    ]
}

const WAYS: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

/// Brings a job with disks of its own to where the end finds it.
fn before(id: &str, (_, with, at, orders): &Case, (finalizes, dismisses): (bool, bool)) -> Script {
    let mut arguments = json!({
        "job-id": id, "device": format!("{id}-s"), "target": format!("{id}-t"),
        "auto-finalize": finalizes, "auto-dismiss": dismisses,
    });
    for (key, value) in with.as_object().into_iter().flatten().filter(|(key, _)| *key != "target") {
        arguments[key] = value.clone();
    }
    let target_size = if with.get("target").is_some() { 2 * SIZE } else { SIZE };
    let disk = |side: &str, size: usize| {
        let node = format!("{id}-{side}");
        let image = node.clone();
        [
            Meanwhile(Box::new(move |peer: &Peer| drop(peer.image(&image, size)))),
            Do(
                "blockdev-add",
                json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{node}") }),
            ),
        ]
    };
    let mut script: Script = disk("s", SIZE).into_iter().chain(disk("t", target_size)).collect();
    let is_gone = *at == At::Concluded && dismisses;
    let mut model =
        Model { at: if is_gone { At::Null } else { *at }, ends: None, fails: false, finalizes, dismisses };
    script.extend([Do("blockdev-mirror", arguments), wait(id, model.at)]);
    if model.at == At::Ready {
        script.push(Await("BLOCK_JOB_READY", named(id)));
    }
    for which in *orders {
        script.push(order(id, ORDERS[*which]));
        script.extend(model.take(ORDERS[*which].1).into_iter().map(|at| wait(id, at)));
    }
    if model.at == At::Pending {
        // It is the next that is said.
        script.push(Await("BLOCK_JOB_PENDING", named(id)));
    }
    script
}

fn end() -> [qmp::transcript::Step; 2] {
    [Do("quit", json!({})), HangUp]
}

/// What `peer` says to the end, which must be a good one.
fn talk(peer: Peer, script: &Script) -> Transcript {
    let transcript = run(&peer, script);
    assert!(peer.ends_well());
    transcript
}

fn both(script: &Script) -> Option<[Transcript; 2]> {
    Some([Peer::qemu()?, Peer::ours()].map(|peer| talk(peer, script)))
}

/// Takes away pauses that are over at once: QEMU says so of all jobs when any of them ends.
fn without_pauses(said: &mut Vec<String>) {
    let is = |event: &str, status: &str| event.contains(&format!(r#""status":"{status}""#));
    let pair = |pair: &[String]| {
        (is(&pair[0], "standby") && is(&pair[1], "ready"))
            || (is(&pair[0], "paused") && is(&pair[1], "running"))
    };
    while let Some(at) = said.windows(2).position(pair) {
        said.drain(at..at + 2);
    }
}

#[test]
fn a_job_wherever_it_is_ends_with_the_daemon_alike() {
    for case in cases() {
        for ways in WAYS {
            let mut script = before(case.0, &case, ways);
            script.extend(end());
            let Some([theirs, ours]) = both(&script) else { return };
            let wrong = differences(&ours, &theirs);
            assert!(wrong.is_empty(), "{} {ways:?}:\n{}", case.0, wrong.join("\n"));
        }
    }
}

#[test]
fn jobs_in_every_status_and_an_export_end_with_the_daemon_alike() {
    // A client that stays as long as it is let.
    thread_local!(static GUEST: RefCell<Option<nbd::Guest>> = const { RefCell::new(None) });
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    let mut script = vec![Do("nbd-server-start", address)];
    for case in cases() {
        for (index, ways) in WAYS.into_iter().enumerate() {
            script.extend(before(&format!("{}-{index}", case.0), &case, ways));
        }
    }
    let export = json!({ "type": "nbd", "id": "e", "node-name": "ready-0-s", "name": "n", "writable": true });
    script.push(Do("block-export-add", export));
    script.push(Meanwhile(Box::new(|peer| {
        let stream = UnixStream::connect(peer.folder().join("nbd")).expect("the server listens");
        let guest = nbd::Guest::new(stream, "n", ReplyStyle::Simple).expect("the export is there");
        GUEST.set(Some(guest));
    })));
    script.push(Until("query-block-jobs", |jobs| {
        jobs["return"].as_array().is_some_and(|jobs| jobs.len() > 20)
    }));
    script.extend(end());
    let Some(mut said) = both(&script) else { return };
    said.iter_mut().flat_map(|said| said.events.values_mut()).for_each(without_pauses);
    let [theirs, ours] = said;
    let wrong = differences(&ours, &theirs);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
