//! A job that fails, wherever it can be when it does: conversations with `qemu-storage-daemon` and ours, generated and
//! compared.
//!
//! The faults are `blkdebug`'s, each met once, on either side; the policy is `report`. A running job meets its fault
//! when its speed is let go, a ready one when a guest writes. One that is paused or in standby meets it when it goes
//! on, or, where writes are doubled, at once when a guest writes: then it says so, keeps its failure, and fails when it
//! is let go. Verbs come before the fault and after it.
//!
//! What may differ is what may in `qmp_differential_verbs`. There is no conversation about a pending job: nothing of
//! QEMU's can fail there, as it holds guests; what ours does then is shown alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
mod qmp;

use std::os::unix::net::UnixStream;

use heliostat_block::nbd::ReplyStyle;
use qmp::Peer;
use qmp::transcript::Step::{self, Await, Do, Meanwhile, Until};
use qmp::transcript::{Script, run};
use qmp::verbs::{At, FEW, Model, ORDERS, Verb, compare, named, order, wait};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

/// Bytes of a granule, and of what a guest writes.
const GRANULE: usize = 65536;

/// How a conversation begins, and how the fault is met in it.
struct Case {
    name: &'static str,
    /// Whose fault, and in doing what.
    side: &'static str,
    io: &'static str,
    /// Where the job is before the fault.
    at: At,
    doubles: bool,
    /// The fault is met before the verbs, in being paused.
    first: bool,
}

fn cases() -> Vec<Case> {
    let (write, read) = (("t", "write"), ("s", "read"));
    let case = |name, (side, io), at, doubles, first| Case { name, side, io, at, doubles, first };
    vec![
        case("held-target", write, At::Running, false, false),
        case("held-source", read, At::Running, false, false),
        case("held-paused-target", write, At::Paused, false, true),
        case("held-paused-source", read, At::Paused, false, true),
        case("held-paused-doubled", write, At::Paused, true, true),
        case("ready-target", write, At::Ready, false, false),
        case("ready-source", read, At::Ready, false, false),
        case("ready-doubled", write, At::Ready, true, false),
        case("standby-target", write, At::Standby, false, true),
        case("standby-source", read, At::Standby, false, true),
        case("standby-doubled", write, At::Standby, true, true),
    ]
}

const WAYS: [(bool, bool); 2] = [(true, true), (false, false)];

impl Case {
    /// It is on its way and held there by its speed.
    fn is_held(&self) -> bool {
        matches!(self.at, At::Running | At::Paused)
    }

    /// Says whether it is a conversation that both can have.
    fn is_apt(&self, (finalizes, _): (bool, bool), which: usize) -> bool {
        match (ORDERS[which].1, ORDERS[which].2) {
            // A write that is doubled is not read.
            (_, "id mirror") => self.name != "ready-source",
            // Ours is pending with little left to copy, and meets the fault there.
            (Verb::Complete, _) => finalizes || self.at != At::Standby || self.doubles,
            _ => true,
        }
    }

    /// The granule in which the fault is: the last one, so that a job that is held has not come so far.
    fn place(&self) -> usize {
        if self.is_held() { SIZE - GRANULE } else { 0 }
    }

    fn node(&self, side: &str) -> Step {
        let image = json!({ "driver": "file", "filename": format!("DIR/{side}"), "discard": "unmap" });
        let mut options =
            json!({ "driver": "blkdebug", "node-name": side, "image": image, "discard": "unmap" });
        if side == self.side {
            let sector = (self.place() + GRANULE - 1) / 512;
            let rule =
                json!({ "event": "none", "iotype": self.io, "errno": 5, "sector": sector, "once": true });
            options["inject-error"] = json!([rule]);
        }
        Do("blockdev-add", options)
    }

    /// The nodes, a guest's export, and the job, which comes to where the verbs are to find it.
    fn beginning(&self, id: &str, (finalizes, dismisses): (bool, bool)) -> Script {
        let export = json!({ "type": "nbd", "id": id, "node-name": "s", "name": "n", "writable": true });
        let mut mirror = json!({
            "job-id": id, "device": "s", "target": "t", "auto-finalize": finalizes, "auto-dismiss": dismisses,
            "sync": if self.is_held() { "full" } else { "none" }, "granularity": GRANULE,
        });
        if self.is_held() {
            mirror["speed"] = json!(1);
            mirror["buf-size"] = json!(GRANULE);
        }
        if self.doubles {
            mirror["copy-mode"] = json!("write-blocking");
        }
        let mut script = vec![
            self.node("s"),
            self.node("t"),
            Do("block-export-add", export),
            Do("blockdev-mirror", mirror),
            wait(id, At::Running),
        ];
        script.push(if self.is_held() { is_on_its_way() } else { Await("BLOCK_JOB_READY", named(id)) });
        if matches!(self.at, At::Paused | At::Standby) {
            script.extend([order(id, ORDERS[1]), wait(id, self.at)]);
        }
        script
    }

    /// Lets the job meet its fault, or find it when it goes on.
    fn meet(&self, id: &str, model: &mut Model) -> Script {
        let is_paused = matches!(model.at, At::Paused | At::Standby);
        let mut script = Script::new();
        if !matches!(model.at, At::Running | At::Ready) && !is_paused {
            return script;
        }
        model.fails = true;
        if !self.is_held() || self.doubles {
            script.push(a_guest_writes(self.place()));
        }
        if self.is_held() {
            script.push(full_speed(id));
        }
        if !is_paused || self.doubles {
            script.push(Await("BLOCK_JOB_ERROR", named(id)));
        }
        if !is_paused {
            script.extend(model.conclude().into_iter().map(|at| wait(id, at)));
        }
        script.push(look());
        script
    }

    /// A whole conversation with these verbs in it.
    fn conversation(&self, id: &str, ways: (bool, bool), orders: &[usize]) -> Script {
        let (finalizes, dismisses) = ways;
        let mut model = Model { at: self.at, ends: None, fails: false, finalizes, dismisses };
        let mut script = self.beginning(id, ways);
        if self.first {
            script.extend(self.meet(id, &mut model));
        }
        let ask = |script: &mut Script, which: usize, model: &mut Model| {
            script.push(order(id, ORDERS[which]));
            script.extend(model.take(ORDERS[which].1).into_iter().map(|at| wait(id, at)));
            // A pending job of ours holds no guest, so it is not paused; the other list says nothing of that.
            script.push(if model.at == At::Pending { Do("query-jobs", json!({})) } else { look() });
        };
        orders.iter().for_each(|which| ask(&mut script, *which, &mut model));
        if !self.first {
            script.extend(self.meet(id, &mut model));
        }
        script.push(full_speed(id));
        // Whatever it is up to, it ends: resumed, cancelled, dismissed.
        for (which, at) in
            [(3, &[At::Paused, At::Standby][..]), (6, &[At::Running, At::Pending]), (12, &[At::Concluded])]
        {
            if at.contains(&model.at) {
                ask(&mut script, which, &mut model);
            }
        }
        assert_eq!(model.at, At::Null, "{id}");
        script.extend([
            Do("block-export-del", json!({ "id": id, "mode": "hard" })),
            Await("BLOCK_EXPORT_DELETED", named(id)),
            Do("blockdev-del", json!({ "node-name": "s" })),
            Do("blockdev-del", json!({ "node-name": "t" })),
        ]);
        script
    }
}

fn look() -> Step {
    Do("query-block-jobs", json!({}))
}

/// Waits until the job knows what there is to copy: before that, QEMU's doubles nothing.
fn is_on_its_way() -> Step {
    Until("query-block-jobs", |jobs| jobs["return"][0]["len"].as_u64().is_some_and(|len| len > 0))
}

fn full_speed(id: &str) -> Step {
    Do("block-job-set-speed", json!({ "device": id, "speed": 0 }))
}

/// A guest of the export writes a granule, and is told that it has: the job's fault is not its error.
fn a_guest_writes(offset: usize) -> Step {
    Meanwhile(Box::new(move |peer| {
        let stream = UnixStream::connect(peer.folder().join("nbd")).expect("the server listens");
        let mut guest = nbd::Guest::new(stream, "n", ReplyStyle::Simple).expect("the export is there");
        guest.write(offset.try_into().expect("it fits"), &[9; GRANULE]);
    }))
}

fn serving() -> Script {
    vec![Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } }))]
}

/// Each verb alone, with every way to end.
fn one_verb_each() -> Script {
    let mut script = serving();
    for case in &cases() {
        for (index, ways) in WAYS.into_iter().enumerate() {
            for which in FEW {
                if !case.is_apt(ways, which) {
                    continue;
                }
                let id = format!("{}-{index}-{which}", case.name);
                script.extend(case.conversation(&id, ways, &[which]));
            }
        }
    }
    script
}

/// Each verb after each other, to a job that has met its fault and is held.
fn two_verbs_each() -> Script {
    let mut script = serving();
    for case in cases().iter().filter(|case| case.first && case.side == "t") {
        for first in FEW {
            // A job that goes on at a crawl meets its fault some other day.
            let is_slow = case.is_held() && ORDERS[first].2 == "device slow";
            let is_apt = |which: &usize| case.is_apt((false, false), *which);
            for second in FEW.into_iter().filter(|second| !(is_slow && ORDERS[*second].1 == Verb::Resume)) {
                if ![first, second].iter().all(is_apt) {
                    continue;
                }
                let id = format!("{}-{first}-{second}", case.name);
                script.extend(case.conversation(&id, (false, false), &[first, second]));
            }
        }
    }
    script
}

fn talk(peer: &Peer, script: &Script) -> qmp::transcript::Transcript {
    peer.image("s", SIZE);
    peer.image("t", SIZE);
    run(peer, script)
}

#[test]
fn a_job_that_fails_in_any_status_does_the_same() {
    compare(&one_verb_each(), talk);
}

#[test]
fn a_job_that_has_failed_while_it_is_held_takes_the_same_verbs() {
    compare(&two_verbs_each(), talk);
}

/// Ours alone: a pending job carries over what guests write, so it can fail.
#[test]
fn a_pending_job_that_cannot_carry_a_write_over_fails() {
    let peer = Peer::ours();
    let case = Case { name: "", side: "t", io: "write", at: At::Ready, doubles: false, first: false };
    let mut script = serving();
    script.extend(case.beginning("j", (false, false)));
    script.extend([order("j", ORDERS[8]), Await("BLOCK_JOB_PENDING", "j"), a_guest_writes(0)]);
    script.extend([Await("BLOCK_JOB_ERROR", "j"), wait("j", At::Concluded), look()]);
    let said = talk(&peer, &script);
    let words: Vec<_> = said.events["j"].iter().map(|event| word(event)).collect();
    let end =
        ["pending", "BLOCK_JOB_PENDING", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded"];
    assert!(words.ends_with(&end.map(str::to_owned)), "{words:?}");
    assert!(said.replies.last().expect("it was looked at").1.contains("Input/output error"));
}

/// The event's name, or the status that it says.
fn word(event: &str) -> String {
    let event: Value = serde_json::from_str(event).expect("an event");
    event["data"]["status"].as_str().or(event["event"].as_str()).unwrap_or_default().to_owned()
}
