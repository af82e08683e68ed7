//! `query-qmp-schema`, ours and `qemu-storage-daemon`'s side by side: whatever both have, a client that reads the one
//! schema can rely on with the other. Ours may be a part of QEMU's; what is more has the feature `heliostat`. And what
//! ours answers is held against what its schema says.

mod common;
mod qmp;

use std::collections::{BTreeMap, BTreeSet};

use qmp::Peer;
use qmp::wire::Wire;
use serde_json::{Value, json};

/// Members that QEMU takes and we do not know: they are refused as unexpected.
const NOT_TAKEN: &[&str] = &[];

/// Members that may be missing, and always are in what we answer.
const NEVER_ANSWERED: &[&str] = &[
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
    "group",
    "encrypted",
    "compressed",
    "encrypt",
    "qdev",
    "rd_latency_histogram",
    "wr_latency_histogram",
    "zone_append_latency_histogram",
    "flush_latency_histogram",
];

/// Types of which we answer only empty lists.
const ALWAYS_EMPTY: &[&str] = &["timed_stats"];

/// Members that only a later QEMU has.
const LATER: &[&str] = &["target-is-zero"];

struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn of(peer: &Peer) -> Self {
        let reply = Wire::negotiated(&peer.socket()).execute("query-qmp-schema", &json!({}));
        let entries = reply["return"].as_array().expect("a list of types").iter();
        Self(entries.map(|entry| (text(&entry["name"]), entry.clone())).collect())
    }

    fn entry(&self, name: &Value) -> &Value {
        &self.0[name.as_str().expect("a type's name")]
    }

    /// The entries of a kind that clients ask for by name.
    fn named(&self, meta_type: &str) -> BTreeMap<&String, &Value> {
        self.0.iter().filter(|(_, entry)| entry["meta-type"] == meta_type).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

fn list<'a>(entry: &'a Value, key: &str) -> Vec<&'a Value> {
    entry[key].as_array().into_iter().flatten().collect()
}

fn is_ours(entry: &Value) -> bool {
    list(entry, "features").contains(&&json!("heliostat"))
}

/// Which way a value goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Taken,
    Answered,
}

struct Comparison<'a> {
    ours: &'a Schema,
    theirs: &'a Schema,
    seen: BTreeSet<(String, String)>,
    wrong: Vec<String>,
}

impl Comparison<'_> {
    fn say(&mut self, at: &str, what: &str) {
        self.wrong.push(format!("{at}: {what}"));
    }

    fn types(&mut self, at: &str, ours: &Value, theirs: &Value, way: Way) {
        if !self.seen.insert((text(ours), text(theirs))) {
            return;
        }
        let (ours, theirs) = (self.ours.entry(ours), self.theirs.entry(theirs));
        if ours["meta-type"] != theirs["meta-type"] {
            return self.say(at, &format!("ours {}, theirs {}", ours["meta-type"], theirs["meta-type"]));
        }
        match ours["meta-type"].as_str() {
            Some("builtin") if ours["name"] != theirs["name"] => {
                self.say(at, &format!("ours {}, theirs {}", ours["name"], theirs["name"]));
            }
            Some("enum") => {
                for word in list(ours, "values") {
                    if !list(theirs, "values").contains(&word) {
                        self.say(at, &format!("QEMU has no {word}"));
                    }
                }
            }
            Some("array") => {
                self.types(&format!("{at}[]"), &ours["element-type"], &theirs["element-type"], way);
            }
            Some("object") => self.objects(at, ours, theirs, way),
            Some("alternate") => {
                for member in list(ours, "members") {
                    let kind = |schema: &Schema, member: &Value| {
                        let entry = schema.entry(&member["type"]);
                        [entry["meta-type"].clone(), entry["json-type"].clone()]
                    };
                    let same = |other: &&&Value| kind(self.theirs, other) == kind(self.ours, member);
                    match list(theirs, "members").iter().find(same) {
                        Some(other) => self.types(&format!("{at}|"), &member["type"], &other["type"], way),
                        None => self.say(at, &format!("QEMU has no choice like {member}")),
                    }
                }
            }
            _ => {}
        }
    }

    fn objects(&mut self, at: &str, ours: &Value, theirs: &Value, way: Way) {
        for member in list(ours, "members") {
            let name = text(&member["name"]);
            let at = format!("{at}.{name}");
            let other = list(theirs, "members").into_iter().find(|other| other["name"] == member["name"]);
            match other {
                Some(_) if is_ours(member) => self.say(&at, "is QEMU's, too"),
                Some(other) => {
                    if member.get("default").is_some() != other.get("default").is_some() {
                        self.say(&at, "may it be missing?");
                    }
                    if !ALWAYS_EMPTY.contains(&name.as_str()) {
                        self.types(&at, &member["type"], &other["type"], way);
                    }
                }
                None if is_ours(member) || LATER.contains(&name.as_str()) => {}
                None => self.say(&at, "QEMU has no such member"),
            }
        }
        for other in list(theirs, "members") {
            let name = text(&other["name"]);
            let is_there = list(ours, "members").iter().any(|member| member["name"] == other["name"]);
            let may_be_missing = match way {
                Way::Taken => NOT_TAKEN.contains(&name.as_str()),
                Way::Answered => other.get("default").is_some() && NEVER_ANSWERED.contains(&name.as_str()),
            };
            if !is_there && !may_be_missing {
                self.say(at, &format!("{name} is missing"));
            }
        }
        if ours.get("tag") != theirs.get("tag") {
            self.say(at, &format!("told by {:?}, and QEMU's by {:?}", ours.get("tag"), theirs.get("tag")));
        }
        for variant in list(ours, "variants") {
            let at = format!("{at}<{}>", variant["case"]);
            match list(theirs, "variants").into_iter().find(|other| other["case"] == variant["case"]) {
                Some(other) => self.types(&at, &variant["type"], &other["type"], way),
                None => self.say(&at, "QEMU has no such case"),
            }
        }
    }
}

/// But for mirrors in a transaction, which are ours.
#[test]
fn what_both_schemas_have_is_the_same() {
    let Some(qemu) = Peer::qemu() else { return };
    let (theirs, ours) = (Schema::of(&qemu), Schema::of(&Peer::ours()));
    let mut comparison =
        Comparison { ours: &ours, theirs: &theirs, seen: BTreeSet::new(), wrong: Vec::new() };
    let mut compared = 0;
    for meta_type in ["command", "event"] {
        for (name, entry) in ours.named(meta_type) {
            let Some(other) = theirs.0.get(name) else { continue };
            compared += 1;
            let said = if meta_type == "command" { Way::Taken } else { Way::Answered };
            comparison.types(name, &entry["arg-type"], &other["arg-type"], said);
            if meta_type == "command" {
                comparison.types(&format!("{name}()"), &entry["ret-type"], &other["ret-type"], Way::Answered);
            }
        }
    }
    comparison.wrong.retain(|said| !said.contains("blockdev-mirror") || !said.starts_with("transaction."));
    assert!(compared > 40, "only {compared} were compared");
    assert!(comparison.wrong.is_empty(), "{}", comparison.wrong.join("\n"));
}

#[test]
fn the_schema_has_every_command_and_nothing_that_is_none() {
    let peer = Peer::ours();
    let schema = Schema::of(&peer);
    let reply = Wire::negotiated(&peer.socket()).execute("query-commands", &json!({}));
    let listed: BTreeSet<String> = list(&reply, "return").iter().map(|entry| text(&entry["name"])).collect();
    let known = schema.named("command").into_keys().cloned().collect();
    assert_eq!(listed, known);
}

/// Says where `value` is not what `kind` says.
fn misfit(schema: &Schema, kind: &Value, value: &Value) -> Option<String> {
    let entry = schema.entry(kind);
    let fits = match (entry["meta-type"].as_str(), entry["json-type"].as_str()) {
        (_, Some("string")) => value.is_string(),
        (_, Some("int")) => value.is_i64() || value.is_u64(),
        (_, Some("boolean")) => value.is_boolean(),
        (_, Some("null")) => value.is_null(),
        (_, Some(_)) => true,
        (Some("enum"), _) => list(entry, "values").contains(&value),
        (Some("array"), _) => {
            let elements = value.as_array().map(|list| list.iter());
            return match elements {
                Some(mut elements) => {
                    elements.find_map(|value| misfit(schema, &entry["element-type"], value))
                }
                None => Some(format!("no list: {value}")),
            };
        }
        (Some("object"), _) => return misfit_object(schema, entry, value),
        _ => false,
    };
    (!fits).then(|| format!("{value} does not fit {entry}"))
}

fn misfit_object(schema: &Schema, entry: &Value, value: &Value) -> Option<String> {
    let Some(object) = value.as_object() else { return Some(format!("no object: {value}")) };
    let mut members = list(entry, "members");
    if let Some(tag) = entry["tag"].as_str() {
        let variant = list(entry, "variants").into_iter().find(|variant| variant["case"] == object[tag]);
        members.extend(
            variant.map(|variant| list(schema.entry(&variant["type"]), "members")).unwrap_or_default(),
        );
    }
    for member in &members {
        match object.get(member["name"].as_str().expect("a name")) {
            Some(value) => {
                if let Some(misfit) = misfit(schema, &member["type"], value) {
                    return Some(format!("{}: {misfit}", member["name"]));
                }
            }
            None if member.get("default").is_none() => return Some(format!("{} is missing", member["name"])),
            None => {}
        }
    }
    let unknown = object.keys().find(|key| members.iter().all(|member| member["name"] != key.as_str()));
    unknown.map(|key| format!("{key} is not in the schema"))
}

#[test]
fn what_is_answered_and_said_is_what_the_schema_says() {
    let peer = Peer::ours();
    let schema = Schema::of(&peer);
    let mut wire = Wire::negotiated(&peer.socket());
    if common::qcow2::try_qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "base", "1M"]).is_none() {
        return;
    }
    peer.image("raw", 1 << 20);
    let path = |name: &str| peer.folder().join(name);
    let file = |name: &str| json!({ "driver": "file", "filename": path(name) });
    let nbd = json!({ "addr": { "type": "unix", "data": { "path": path("nbd") } } });
    for (command, arguments) in [
        ("blockdev-add", json!({ "driver": "qcow2", "node-name": "image", "file": file("base") })),
        ("blockdev-add", json!({ "driver": "raw", "node-name": "raw", "file": file("raw") })),
        ("nbd-server-start", nbd),
        ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "raw", "writable": true })),
        ("blockdev-mirror", json!({ "job-id": "j", "device": "raw", "target": "image", "sync": "full" })),
    ] {
        assert_eq!(wire.execute(command, &arguments), json!({ "return": {} }), "{command}");
    }
    for (command, arguments) in [
        ("query-version", json!({})),
        ("query-commands", json!({})),
        ("query-qmp-schema", json!({})),
        ("query-named-block-nodes", json!({})),
        ("query-block", json!({})),
        ("query-blockstats", json!({})),
        ("query-blockstats", json!({ "query-nodes": true })),
        ("x-debug-query-block-graph", json!({})),
        ("query-block-exports", json!({})),
        ("query-jobs", json!({})),
        ("query-block-jobs", json!({})),
        ("qom-list", json!({ "path": "/" })),
        ("human-monitor-command", json!({ "command-line": "info block" })),
    ] {
        let reply = wire.execute(command, &arguments);
        let misfit = misfit(&schema, &schema.0[command]["ret-type"], &reply["return"]);
        assert_eq!(misfit, None, "{command} {arguments}: {reply}");
    }
    wire.send(b"{'execute':'quit'}");
    let mut events = 0;
    while let Ok(line) = wire.line(common::wait::LIMIT) {
        let message: Value = serde_json::from_str(&line).expect("JSON");
        let Some(name) = message["event"].as_str() else { continue };
        events += 1;
        let misfit = misfit(&schema, &schema.0[name]["arg-type"], &message["data"]);
        assert_eq!(misfit, None, "{message}");
    }
    assert!(events > 2, "the job's end and the export's, at least");
}
