//! Every verb in every status, in both families of commands, with ends that come by themselves and ends that wait:
//! hundreds of small conversations with `qemu-storage-daemon` and ours, generated and compared.
//!
//! What a verb leads to is told by [`Model`], so that each conversation goes on when the job has come to rest; nothing
//! sleeps. What may differ, and nothing else:
//!
//! - How far a job has come that is held on its way: how much is copied at once is each one's own business. Offsets and
//!   lengths of such jobs are not compared.
//! - `busy`, for the same reason, and `paused` of a pending job: ours holds no guest there (MIRROR.md section 5).
//! - `actively-synced` of a job that has been told to double writes: QEMU's finds out in the next tenth of a second.
//! - A job of ours goes back from write-blocking to background; there is no conversation about that here.

mod common;
mod qmp;

use qmp::transcript::Step::{self, Await, Do};
use qmp::transcript::{Script, Transcript, run};
use qmp::{Peer, Whose};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

/// Where a job is at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Running,
    Paused,
    Ready,
    Standby,
    Pending,
    Concluded,
    Null,
}

impl At {
    fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Pending => "pending",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// What is asked, without the family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Pause,
    Resume,
    SoftCancel,
    Cancel,
    Complete,
    Finalize,
    Dismiss,
    Other,
}

/// A command, what it asks, and its arguments but the job's id.
type Order = (&'static str, Verb, &'static str);

const ORDERS: [Order; 18] = [
    ("block-job-pause", Verb::Pause, "device"),
    ("job-pause", Verb::Pause, "id"),
    ("block-job-resume", Verb::Resume, "device"),
    ("job-resume", Verb::Resume, "id"),
    ("block-job-cancel", Verb::SoftCancel, "device"),
    ("block-job-cancel", Verb::Cancel, "device force"),
    ("job-cancel", Verb::Cancel, "id"),
    ("block-job-complete", Verb::Complete, "device"),
    ("job-complete", Verb::Complete, "id"),
    ("block-job-finalize", Verb::Finalize, "id"),
    ("job-finalize", Verb::Finalize, "id"),
    ("block-job-dismiss", Verb::Dismiss, "id"),
    ("job-dismiss", Verb::Dismiss, "id"),
    ("block-job-set-speed", Verb::Other, "device speed"),
    ("block-job-set-speed", Verb::Other, "device slow"),
    ("block-job-set-speed", Verb::Other, "device backwards"),
    ("block-job-change", Verb::Other, "id mirror"),
    ("block-job-change", Verb::Other, "id backup"),
];

/// One of each kind, the families taking turns.
const FEW: [usize; 9] = [0, 3, 4, 6, 7, 10, 11, 14, 16];

fn order(id: &str, (command, _, form): Order) -> Step {
    let mut words = form.split(' ');
    let mut arguments = json!({ words.next().expect("the id's name"): id });
    match words.next() {
        Some("force") => arguments["force"] = json!(true),
        Some("speed") => arguments["speed"] = json!(1),
        Some("slow") => arguments["speed"] = json!(2),
        Some("backwards") => arguments["speed"] = json!(-1),
        Some("mirror") => {
            arguments["type"] = json!("mirror");
            arguments["copy-mode"] = json!("write-blocking");
        }
        Some("backup") => arguments["type"] = json!("backup"),
        _ => {}
    }
    Do(command, arguments)
}

/// What a job does, as the tables of QMP.md 1.2 and 1.3 have it.
#[derive(Clone, Copy, Debug)]
struct Model {
    at: At,
    /// It has been told to end, and how.
    ends: Option<Verb>,
    finalizes: bool,
    dismisses: bool,
}

impl Model {
    /// Goes to where `verb` leads. Says what is heard on the way that has to be waited for.
    fn take(&mut self, verb: Verb) -> Vec<At> {
        use At::{Concluded, Null, Paused, Pending, Ready, Running, Standby};
        match (self.at, verb) {
            (Running, Verb::Pause) => self.go(Paused),
            (Ready, Verb::Pause) => self.go(Standby),
            (Paused, Verb::Resume) => self.go(Running),
            (Standby, Verb::Resume) => {
                let mut heard = self.go(Ready);
                if self.ends.is_some() {
                    heard.extend(self.end());
                }
                heard
            }
            (Ready, Verb::SoftCancel | Verb::Complete) => {
                self.ends = Some(verb);
                self.end()
            }
            (Standby, Verb::Complete) => {
                self.ends = Some(verb);
                Vec::new()
            }
            // Refused while it is paused.
            (Paused | Standby, Verb::SoftCancel) => Vec::new(),
            (Running | Paused | Ready | Standby | Pending, Verb::Cancel | Verb::SoftCancel)
            | (Pending, Verb::Finalize) => self.conclude(),
            (Concluded, Verb::Dismiss) => self.go(Null),
            _ => Vec::new(),
        }
    }

    fn go(&mut self, at: At) -> Vec<At> {
        self.at = at;
        vec![at]
    }

    fn end(&mut self) -> Vec<At> {
        if self.finalizes { self.conclude() } else { self.go(At::Pending) }
    }

    fn conclude(&mut self) -> Vec<At> {
        self.go(if self.dismisses { At::Null } else { At::Concluded })
    }
}

/// How a conversation begins: the job's name begins so, its arguments, and what is asked of it until it is where the
/// verb is to find it.
struct Beginning {
    name: &'static str,
    at: At,
    arguments: Value,
    orders: &'static [usize],
}

fn beginnings() -> Vec<Beginning> {
    let begin = |name, at, arguments, orders| Beginning { name, at, arguments, orders };
    let held = || json!({ "sync": "full", "speed": 1, "buf-size": 65536, "granularity": 65536 });
    let idle = || json!({ "sync": "none" });
    let larger = || json!({ "sync": "full", "target": "larger" });
    vec![
        begin("held", At::Running, held(), &[]),
        begin("held-paused", At::Running, held(), &[0]),
        begin("ready", At::Ready, idle(), &[]),
        begin("standby", At::Ready, idle(), &[0]),
        begin("standby-ending", At::Ready, idle(), &[1, 8]),
        begin("ended", At::Ready, idle(), &[7]),
        begin("ended-copy", At::Ready, idle(), &[4]),
        begin("cancelled", At::Ready, idle(), &[6]),
        begin("held-cancelled", At::Running, held(), &[4]),
        begin("failed", At::Concluded, larger(), &[]),
    ]
}

/// One conversation: a job of its own is brought somewhere, hears `orders`, and is brought to its end.
fn conversation(
    id: &str,
    beginning: &Beginning,
    (finalizes, dismisses): (bool, bool),
    orders: &[usize],
) -> Script {
    let mut arguments = json!({
        "job-id": id, "device": "s", "target": "t", "auto-finalize": finalizes, "auto-dismiss": dismisses,
    });
    for (key, value) in beginning.arguments.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    let mut model = Model { at: beginning.at, ends: None, finalizes, dismisses };
    if model.at == At::Concluded && dismisses {
        model.at = At::Null;
    }
    let mut script = vec![Do("blockdev-mirror", arguments), wait(id, model.at)];
    if model.at == At::Ready {
        script.push(Await("BLOCK_JOB_READY", named(id)));
    }
    let mut ask = |order_of: usize, model: &mut Model| {
        let asked = ORDERS[order_of];
        script.push(order(id, asked));
        let heard = model.take(asked.1);
        script.extend(heard.into_iter().map(|at| wait(id, at)));
        if model.at == At::Pending && !beginning.name.starts_with("held") {
            script.push(Do("query-jobs", json!({})));
        } else {
            script.push(Do("query-block-jobs", json!({})));
        }
    };
    beginning.orders.iter().chain(orders).for_each(|order| ask(*order, &mut model));
    // Whatever it is up to, it ends.
    ask(6, &mut model);
    if model.at == At::Concluded {
        ask(12, &mut model);
    }
    assert_eq!(model.at, At::Null, "{}: {orders:?}", beginning.name);
    script
}

fn named(id: &str) -> &'static str {
    Box::leak(id.to_owned().into_boxed_str())
}

fn wait(id: &str, at: At) -> Step {
    Await(at.word(), named(id))
}

fn nodes() -> Script {
    let file = |node: &str| {
        Do("blockdev-add", json!({ "driver": "file", "node-name": node, "filename": format!("DIR/{node}") }))
    };
    ["s", "t", "larger"].map(file).into()
}

/// Each order alone, wherever a job can be, with every way to end.
fn one_order_each() -> Script {
    let mut script = nodes();
    for beginning in &beginnings() {
        for (index, ways) in
            [(true, true), (true, false), (false, true), (false, false)].into_iter().enumerate()
        {
            for which in 0..ORDERS.len() {
                let id = format!("{}-{index}-{which}", beginning.name);
                script.extend(conversation(&id, beginning, ways, &[which]));
            }
        }
    }
    script
}

/// Each order after each other, where a job goes on after one.
fn two_orders_each() -> Script {
    let mut script = nodes();
    let all = beginnings();
    for beginning in all.iter().filter(|beginning| !beginning.name.contains("cancelled")) {
        for first in FEW {
            for second in FEW {
                let id = format!("{}-{first}-{second}", beginning.name);
                script.extend(conversation(&id, beginning, (false, false), &[first, second]));
            }
        }
    }
    script
}

/// Says whether `block-job-change` is among what the job of that id hears.
fn is_told_to_double(id: &str) -> bool {
    id.split('-').any(|part| part == "16")
}

/// What was said, without what may differ.
fn comparable(transcript: &Transcript) -> Vec<(String, String)> {
    let replies = transcript.replies.iter().map(|(asked, reply)| {
        let mut reply: Value = serde_json::from_str(reply).expect("a reply");
        for job in reply["return"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            job.remove("busy");
            let id = job.get("id").or(job.get("device")).and_then(Value::as_str).unwrap_or_default();
            let id = id.to_owned();
            if id.starts_with("held") {
                for progress in ["offset", "len", "current-progress", "total-progress"] {
                    job.remove(progress);
                }
            }
            if is_told_to_double(&id) {
                job.remove("actively-synced");
            }
            if job.get("status").is_some_and(|status| status == "pending") {
                job.remove("paused");
            }
        }
        (asked.clone(), reply.to_string())
    });
    let events = transcript.events.iter().map(|(of, said)| {
        let said = said.iter().map(|event| {
            let mut event: Value = serde_json::from_str(event).expect("an event");
            if of.starts_with("held")
                && let Some(data) = event["data"].as_object_mut()
            {
                data.remove("offset");
                data.remove("len");
            }
            event.to_string()
        });
        (of.clone(), said.collect::<Vec<_>>().join("\n"))
    });
    replies.chain(events).collect()
}

/// Where they differ.
fn differences(ours: &Transcript, theirs: &Transcript) -> Vec<String> {
    let (ours, theirs) = (comparable(ours), comparable(theirs));
    assert_eq!(ours.len(), theirs.len(), "everything asked was answered, of every job something was said");
    let pairs = ours.into_iter().zip(theirs);
    let wrong = pairs.filter(|(ours, theirs)| ours != theirs);
    wrong.map(|((asked, ours), (_, theirs))| format!("{asked}\n  qemu: {theirs}\n  ours: {ours}")).collect()
}

fn talk(peer: &Peer, script: &Script) -> Transcript {
    for (name, size) in [("s", SIZE), ("t", SIZE), ("larger", 2 * SIZE)] {
        peer.image(name, size);
    }
    run(peer, script)
}

fn compare(script: &Script) {
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, ours] = [qemu, Peer::ours()].map(|peer| talk(&peer, script));
    let wrong = differences(&ours, &theirs);
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}

#[test]
fn every_verb_in_every_status_does_the_same() {
    compare(&one_order_each());
}

#[test]
fn every_verb_after_every_other_does_the_same() {
    compare(&two_orders_each());
}

#[test]
fn a_planted_difference_is_found() {
    let all = beginnings();
    let ready = all.iter().find(|beginning| beginning.name == "ready").expect("it is in the list");
    let whole = |ways, orders: &[usize]| {
        let mut script = nodes();
        script.extend(conversation("ready-1", ready, ways, orders));
        talk(&Peer::ours(), &script)
    };
    let plain = whole((true, true), &[7]);
    assert_eq!(differences(&plain, &whole((true, true), &[7])), Vec::<String>::new());
    // As a daemon would look that does not pass through PENDING, or that cancels where it should complete.
    let mut skips = whole((true, true), &[7]);
    skips.events.values_mut().for_each(|said| said.retain(|event| !event.contains("pending")));
    assert_eq!(differences(&plain, &skips).len(), 1);
    let mut accepts = whole((true, true), &[7]);
    accepts.replies.last_mut().expect("something was asked").1 = json!({ "return": {} }).to_string();
    assert_eq!(differences(&plain, &accepts).len(), 1);
    assert_eq!(Peer::ours().whose(), Whose::Ours);
}
