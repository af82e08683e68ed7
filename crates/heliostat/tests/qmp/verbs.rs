//! Jobs and what is asked of them: every verb in both families, [`Model`] of what they lead to, and what of two daemons'
//! answers is compared.
//!
//! The model tells a generated conversation what to wait for, so that it goes on when the job has come to rest.

use serde_json::{Value, json};

use super::Peer;
use super::transcript::Step::{self, Await, Do};
use super::transcript::{Script, Transcript};

/// Where a job is at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
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
pub enum Verb {
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
pub type Order = (&'static str, Verb, &'static str);

pub const ORDERS: [Order; 18] = [
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
pub const FEW: [usize; 9] = [0, 3, 4, 6, 7, 10, 11, 14, 16];

pub fn order(id: &str, (command, _, form): Order) -> Step {
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
pub struct Model {
    pub at: At,
    /// It has been told to end, and how.
    pub ends: Option<Verb>,
    /// It fails as soon as nothing holds it.
    pub fails: bool,
    pub finalizes: bool,
    pub dismisses: bool,
}

impl Model {
    /// Goes to where `verb` leads. Says what is heard on the way that has to be waited for.
    pub fn take(&mut self, verb: Verb) -> Vec<At> {
        use At::{Concluded, Null, Paused, Pending, Ready, Running, Standby};
        match (self.at, verb) {
            (Running, Verb::Pause) => self.go(Paused),
            (Ready, Verb::Pause) => self.go(Standby),
            (Paused | Standby, Verb::Resume) => {
                let mut heard = self.go(if self.at == Paused { Running } else { Ready });
                if self.fails {
                    heard.extend(self.conclude());
                } else if self.ends.is_some() {
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

    pub fn conclude(&mut self) -> Vec<At> {
        self.go(if self.dismisses { At::Null } else { At::Concluded })
    }
}

pub fn named(id: &str) -> &'static str {
    Box::leak(id.to_owned().into_boxed_str())
}

pub fn wait(id: &str, at: At) -> Step {
    Await(at.word(), named(id))
}

/// Says whether `block-job-change` is among what the job of that id hears.
fn is_told_to_double(id: &str) -> bool {
    id.split('-').any(|part| part == "16")
}

/// Says whether a guest writes while the job of that id is held and does not double: ours counts that at once, QEMU's
/// when it goes on.
fn is_left_behind(id: &str) -> bool {
    id.starts_with("standby") && !id.contains("doubled")
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
            if is_left_behind(&id) {
                job.remove("len");
                job.remove("total-progress");
            }
            if is_told_to_double(&id) || id.contains("doubled") {
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
            if let Some(data) = event["data"].as_object_mut() {
                if of.starts_with("held") {
                    data.remove("offset");
                }
                if of.starts_with("held") || is_left_behind(of) {
                    data.remove("len");
                }
            }
            event.to_string()
        });
        (of.clone(), said.collect::<Vec<_>>().join("\n"))
    });
    replies.chain(events).collect()
}

/// Talks to QEMU's daemon and to ours, and fails where they differ.
pub fn compare(script: &Script, talk: impl Fn(&Peer, &Script) -> Transcript) {
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, ours] = [qemu, Peer::ours()].map(|peer| talk(&peer, script));
    let wrong = differences(&ours, &theirs);
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong[..wrong.len().min(20)].join("\n"));
}

/// Where they differ.
pub fn differences(ours: &Transcript, theirs: &Transcript) -> Vec<String> {
    let (ours, theirs) = (comparable(ours), comparable(theirs));
    assert_eq!(ours.len(), theirs.len(), "everything asked was answered, of every job something was said");
    let pairs = ours.into_iter().zip(theirs);
    let wrong = pairs.filter(|(ours, theirs)| ours != theirs);
    wrong.map(|((asked, ours), (_, theirs))| format!("{asked}\n  qemu: {theirs}\n  ours: {ours}")).collect()
}
