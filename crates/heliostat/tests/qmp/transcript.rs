//! [`Script`]: what is said to both daemons; [`Transcript`]: what one of them answered, made comparable.
//!
//! Made comparable means: the folder's name, timestamps and generated names are replaced; our further fields are
//! taken away (and looked at elsewhere); pairs of status changes that QEMU says when it drains a node inside
//! another command are dropped, as MIRROR.md section 7 has it. Replies and events are compared as two
//! sequences, each in order: when an event of a job comes between two replies is a matter of threads.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use serde_json::{Map, Value, json};

use super::wire::Wire;
use super::{Peer, Whose};
use crate::common::wait;

/// One thing to do.
pub enum Step {
    /// Execute a command. `DIR` in its arguments is the daemon's folder.
    Do(&'static str, Value),
    /// As `Do`, where both are known to answer differently, and why.
    Differs(&'static str, Value, &'static str),
    /// Wait for an event: its name, and where it is a status change, the status; and of whom.
    Await(&'static str, &'static str),
    /// Ask again and again, until the answer is as wanted. The answers are not compared.
    Until(&'static str, fn(&Value) -> bool),
    /// Listen until the daemon hangs up.
    HangUp,
    /// Something happens to the host, or a guest does something.
    Meanwhile(Box<dyn Fn(&Peer)>),
}

/// What is said to both.
pub type Script = Vec<Step>;

/// What one answered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// Each command with its reply.
    pub replies: Vec<(String, String)>,
    /// What was said of each job and export, in order.
    pub events: BTreeMap<String, Vec<String>>,
}

/// Fields of a job that QEMU has, in its order.
const JOB_FIELDS: [&str; 14] = [
    "auto-finalize",
    "io-status",
    "device",
    "auto-dismiss",
    "busy",
    "len",
    "offset",
    "status",
    "paused",
    "speed",
    "ready",
    "type",
    "actively-synced",
    "error",
];

/// Fields of `BLOCK_JOB_ERROR` that QEMU has.
const ERROR_FIELDS: [&str; 3] = ["device", "operation", "action"];

/// How many answers are shown when something does not come.
const ANSWERS_KEPT: usize = 8;

/// Goes through `script` with one daemon.
pub fn run(peer: &Peer, script: &Script) -> Transcript {
    let mut reader = Reader {
        wire: Wire::negotiated(&peer.socket()),
        whose: peer.whose(),
        folder: peer.folder().to_string_lossy().into_owned(),
        events: Vec::new(),
        awaited: 0,
        answered: VecDeque::new(),
    };
    let mut replies = Vec::new();
    for step in script {
        match step {
            Step::Do(command, arguments) | Step::Differs(command, arguments, _) => {
                let said = format!("{command} {arguments}");
                replies.push((said, reader.execute(command, arguments)));
            }
            Step::Await(name, of) => reader.wait(name, of),
            Step::Until(command, is_wanted) => reader.ask_until(command, *is_wanted),
            Step::HangUp => reader.listen_to_the_end(),
            Step::Meanwhile(happens) => happens(peer),
        }
    }
    let mut events = BTreeMap::<_, Vec<_>>::new();
    for event in &reader.events {
        let data = &event["data"];
        let of = data["id"].as_str().or(data["device"].as_str()).unwrap_or_default();
        let said = events.entry(of.to_owned()).or_default();
        let event = reader.plain(&sorted(&event["event"], data));
        // How often an error that is ignored comes again is a matter of time.
        let is_again = said.last() == Some(&event) && data["action"] == "ignore";
        if !is_again {
            said.push(event);
        }
    }
    Transcript { replies, events }
}

/// Goes through `script` with both daemons and fails where they differ, unless that is intended; and where they
/// do not differ although that is said.
pub fn compare(images: &[(&str, usize)], script: &Script) {
    compare_on(script, |peer| {
        for (name, size) in images {
            peer.image(name, *size);
        }
    });
}

/// As [`compare`], with daemons whose folders `prepare` has furnished. What it gives lives as long as they do.
pub fn compare_on<T>(script: &Script, prepare: impl Fn(&Peer) -> T) {
    let Some(qemu) = Peer::qemu() else { return };
    let ours = Peer::ours();
    let [theirs, ours] = [qemu, ours].map(|peer| {
        let _furniture = prepare(&peer);
        run(&peer, script)
    });
    let steps = script.iter().filter(|step| matches!(step, Step::Do(..) | Step::Differs(..)));
    let mut wrong = Vec::new();
    for ((step, theirs), ours) in steps.zip(&theirs.replies).zip(&ours.replies) {
        let is_intended = matches!(step, Step::Differs(..));
        if (theirs == ours) == is_intended {
            let what = if is_intended { "no difference" } else { "a difference" };
            wrong.push(format!("{what} at {}\n  qemu: {}\n  ours: {}", ours.0, theirs.1, ours.1));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(ours.events, theirs.events, "left: ours, right: qemu");
}

struct Reader {
    wire: Wire,
    whose: Whose,
    folder: String,
    events: Vec<Value>,
    /// Events before this have been waited for.
    awaited: usize,
    /// The last answers, for whoever wonders why nothing comes.
    answered: VecDeque<String>,
}

impl Reader {
    fn execute(&mut self, command: &str, arguments: &Value) -> String {
        let arguments = arguments.to_string().replace("DIR", &self.folder);
        self.wire.send(format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}\n").as_bytes());
        let mut before = Vec::new();
        let reply = loop {
            let message = self.wire.next();
            if message.get("event").is_none() {
                break message;
            }
            before.push(message);
        };
        if self.whose == Whose::Qemu {
            drop_drains(&mut before);
        }
        self.events.append(&mut before);
        let reply = self.plain(&comparable(command, reply));
        self.answered.push_back(format!("{command}: {reply}"));
        if self.answered.len() > ANSWERS_KEPT {
            self.answered.pop_front();
        }
        reply
    }

    fn listen_to_the_end(&mut self) {
        loop {
            match self.wire.line(wait::LIMIT) {
                Ok(line) => self.events.push(serde_json::from_str(&line).expect("JSON")),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => panic!("{:?} stays", self.whose),
                // A reset is an end too.
                Err(_) => return,
            }
        }
    }

    fn ask_until(&mut self, command: &str, is_wanted: fn(&Value) -> bool) {
        let wanted = wait::until(command, wait::LIMIT, || {
            let reply = serde_json::from_str(&self.execute(command, &json!({}))).expect("JSON");
            is_wanted(&reply).then_some(())
        });
        wanted.expect("the answer comes");
    }

    fn wait(&mut self, name: &str, of: &str) {
        loop {
            while self.awaited < self.events.len() {
                self.awaited += 1;
                if is_it(&self.events[self.awaited - 1], name, of) {
                    return;
                }
            }
            let line = self.wire.line(wait::LIMIT);
            let line = line.unwrap_or_else(|error| {
                panic!(
                    "{:?} does not say {name} of {of}: {error}; it answered {:?}",
                    self.whose, self.answered
                )
            });
            let message: Value = serde_json::from_str(&line).expect("JSON");
            assert!(message.get("event").is_some(), "a reply to nothing: {message}");
            self.events.push(message);
        }
    }

    fn plain(&self, value: &Value) -> String {
        let text = value.to_string().replace(&self.folder, "DIR");
        // Generated names differ from run to run.
        let mut parts = text.split("#block");
        let first = parts.next().unwrap_or_default().to_owned();
        parts
            .fold(first, |text, part| text + "#block" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
    }
}

fn is_it(event: &Value, name: &str, of: &str) -> bool {
    let data = &event["data"];
    let is_of = data["id"] == *of || data["device"] == *of;
    is_of && (event["event"] == *name || data["status"] == *name)
}

/// Takes away what an image takes of its host, and what those take that it stands on.
fn forget_space(image: &mut Value) {
    if let Some(image) = image.as_object_mut() {
        image.remove("actual-size");
        if let Some(below) = image.get_mut("backing-image") {
            forget_space(below);
        }
    }
}

/// The same with the keys of all objects in order.
fn in_order(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let map: BTreeMap<_, _> = map.iter().map(|(key, value)| (key.clone(), in_order(value))).collect();
            Value::Object(map.into_iter().collect())
        }
        Value::Array(list) => list.iter().map(in_order).collect(),
        other => other.clone(),
    }
}

/// Drops pairs of a pause and a going-on of one job that QEMU says around the drains inside another command.
fn drop_drains(events: &mut Vec<Value>) {
    let status = |event: &Value| event["data"]["status"].as_str().unwrap_or_default().to_owned();
    let mut at = 0;
    while at < events.len() {
        let of = &events[at]["data"]["id"];
        let next = (at + 1..events.len()).find(|next| events[*next]["data"]["id"] == *of);
        let pair = next.map(|next| (status(&events[at]), status(&events[next]), next));
        match pair.as_ref().map(|(first, second, next)| (first.as_str(), second.as_str(), *next)) {
            Some(("standby", "ready", next) | ("paused", "running", next)) => {
                events.remove(next);
                events.remove(at);
            }
            _ => at += 1,
        }
    }
}

/// A message with its keys in one order.
fn sorted(name: &Value, data: &Value) -> Value {
    let data: BTreeMap<_, _> = data.as_object().into_iter().flatten().collect();
    // How long guests were held, and where an error was met, is ours to say.
    let is_ours = |key: &str| match name.as_str() {
        Some("BLOCK_JOB_ERROR") => !ERROR_FIELDS.contains(&key),
        _ => key == "pause-us",
    };
    let data = data.into_iter().filter(|(key, _)| !is_ours(key));
    let data: Map<String, Value> =
        data.map(|(key, value)| (key.clone(), without_place(key, value))).collect();
    json!({ "event": name, "data": data })
}

/// A field's value; of an error's text only the cause, as ours names node and range before it.
fn without_place(key: &str, value: &Value) -> Value {
    match value.as_str().filter(|text| key == "error" && text.starts_with("node \"")) {
        Some(text) => {
            let cause = text.rsplit_once(": ").expect("node, place: cause").1;
            json!(cause.split(" (os error").next())
        }
        None => value.clone(),
    }
}

/// Takes away what may differ.
fn comparable(command: &str, mut reply: Value) -> Value {
    let keep = |item: &mut Value, keys: &[&str]| {
        if let Value::Object(map) = item {
            map.retain(|key, _| keys.contains(&key.as_str()));
        }
    };
    for item in reply["return"].as_array_mut().into_iter().flatten() {
        if let Some(error) = item.get_mut("error") {
            *error = without_place("error", error);
        }
        match command {
            "query-block-jobs" => keep(item, &JOB_FIELDS),
            "query-block-exports" => keep(item, &["node-name", "shutting-down", "type", "id"]),
            // Depends on the file system and the moment.
            "query-named-block-nodes" => {
                forget_space(&mut item["image"]);
                // Ours.
                item.as_object_mut().map(|item| item.remove("nbd"));
                // The file of an image that is written: ours is made longer ahead of need.
                let is_below = item["node-name"].as_str().is_some_and(|name| name.starts_with("#block"));
                if let Some(image) = item["image"].as_object_mut().filter(|_| is_below) {
                    image.remove("virtual-size");
                }
                *item = in_order(item);
            }
            _ => {}
        }
    }
    if command == "query-version" {
        reply["return"]["package"] = json!("");
    }
    // An absent value would otherwise have been put there by looking.
    if let Value::Object(map) = &mut reply {
        map.retain(|_, value| !value.is_null());
    }
    reply
}
