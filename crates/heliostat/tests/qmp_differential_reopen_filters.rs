//! As `qmp_differential.rs`, for `blockdev-reopen` of nodes that pass requests on: on what they stand, whose limits they
//! keep, and what is said of the cache above a file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use qmp::Peer;
use qmp::guest::is_told;
use qmp::steps::{add, delete, file, list_nodes};
use qmp::transcript::Step::{self, Differs, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

fn compare(script: &Script) {
    compare_on(script, |peer| {
        for name in ["a", "b", "c"] {
            peer.image(name, 1 << 20);
        }
        std::fs::File::create(peer.folder().join("large")).unwrap().set_len(2 << 20).unwrap();
    });
}

fn group(id: &str) -> Step {
    Do("object-add", json!({ "qom-type": "throttle-group", "id": id }))
}

fn throttle(name: &str, group: &str, below: Value) -> Value {
    json!({ "driver": "throttle", "node-name": name, "throttle-group": group, "file": below })
}

fn with(mut options: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    options
}

fn reopen(options: &[Value]) -> Step {
    Do("blockdev-reopen", json!({ "options": options }))
}

fn differs(options: &[Value], why: &'static str) -> Step {
    Differs("blockdev-reopen", json!({ "options": options }), why)
}

fn start() -> Script {
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    let read_only = json!({ "driver": "file", "node-name": "ro", "filename": "DIR/c", "read-only": true });
    vec![
        Do("nbd-server-start", address),
        group("g"),
        group("h"),
        file("a", "a"),
        file("b", "b"),
        file("large", "large"),
        add(read_only),
        add(throttle("n", "g", json!("a"))),
    ]
}

fn guest(requests: &'static [&'static str]) -> Step {
    Meanwhile(Box::new(move |peer: &Peer| {
        if common::tool("qemu-io").is_some() {
            let told = is_told(peer, requests);
            assert!(told.ends_with("true") && !told.contains("failed"), "{told}");
        }
    }))
}

fn is_full_of(name: &'static str, byte: u8) -> Step {
    Meanwhile(Box::new(move |peer: &Peer| {
        if common::tool("qemu-io").is_some() {
            let bytes = std::fs::read(peer.folder().join(name)).unwrap();
            assert!(bytes[..4096] == [byte; 4096], "{name} of {:?}", peer.whose());
        }
    }))
}

#[test]
fn throttling_goes_from_one_node_to_another_under_a_guest_alike() {
    let export = json!({ "type": "nbd", "id": "e", "node-name": "n", "name": "n", "writable": true });
    let mut script = start();
    script.extend([
        Do("block-export-add", export),
        guest(&["write -P 7 0 4k", "flush"]),
        reopen(&[throttle("n", "g", json!("b"))]),
        list_nodes(),
        Do("query-block-exports", json!({})),
        guest(&["write -P 8 0 4k", "read -P 8 0 4k", "flush"]),
        is_full_of("a", 7),
        is_full_of("b", 8),
        delete("a"),
        delete("b"),
        file("a", "a"),
        reopen(&[throttle("n", "h", json!("a"))]),
        guest(&["read -P 7 0 4k"]),
        delete("b"),
        delete("a"),
        list_nodes(),
    ]);
    compare(&script);
}

#[test]
fn what_throttling_may_stand_on_is_refused_alike() {
    let mut script = start();
    script.extend([
        add(throttle("m", "g", json!("n"))),
        reopen(&[throttle("n", "g", json!("n"))]),
        reopen(&[throttle("n", "g", json!("m"))]),
        reopen(&[throttle("n", "g", json!("zz"))]),
        reopen(&[throttle("n", "g", json!({ "driver": "null-co" }))]),
        reopen(&[throttle("n", "g", json!({ "driver": "file", "filename": "DIR/b" }))]),
        reopen(&[throttle("n", "g", json!(null))]),
        reopen(&[json!({ "driver": "throttle", "node-name": "n", "throttle-group": "g" })]),
        reopen(&[throttle("n", "g", json!("b")), throttle("m", "zz", json!("n"))]),
        list_nodes(),
        Do("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "m", "writable": true })),
        reopen(&[throttle("n", "g", json!("ro"))]),
        Do("block-export-del", json!({ "id": "e" })),
        Step::Await("BLOCK_EXPORT_DELETED", "e"),
        delete("m"),
        reopen(&[with(throttle("n", "g", json!("ro")), &json!({ "read-only": true }))]),
        list_nodes(),
        reopen(&[throttle("n", "g", json!("a"))]),
        list_nodes(),
    ]);
    compare(&script);
}

#[test]
fn two_throttled_nodes_change_places_alike() {
    let mut script = start();
    script.extend([
        add(throttle("m", "g", json!("b"))),
        reopen(&[throttle("n", "g", json!("b")), throttle("m", "g", json!("a"))]),
        list_nodes(),
        reopen(&[throttle("n", "g", json!("a")), throttle("m", "g", json!("zz"))]),
        list_nodes(),
        delete("a"),
        delete("m"),
        delete("a"),
        delete("b"),
    ]);
    compare(&script);
}

#[test]
fn limits_are_those_of_another_group_alike() {
    let mut script = start();
    let delete_group = |id: &str| Do("object-del", json!({ "id": id }));
    script.extend([
        delete_group("g"),
        reopen(&[throttle("n", "zz", json!("a"))]),
        reopen(&[throttle("n", "h", json!("a"))]),
        list_nodes(),
        delete_group("h"),
        delete_group("g"),
        reopen(&[json!({ "driver": "throttle", "node-name": "n", "file": "a" })]),
        delete("n"),
        delete_group("h"),
    ]);
    compare(&script);
}

#[test]
fn what_was_made_for_throttling_goes_when_that_leaves_it_alike() {
    let mut script = start();
    let inner = json!({ "driver": "file", "node-name": "inner", "filename": "DIR/c" });
    script.extend([
        delete("ro"),
        add(throttle("m", "g", inner)),
        reopen(&[throttle("m", "g", json!("b"))]),
        list_nodes(),
    ]);
    compare(&script);
}

#[test]
fn other_filters_stay_where_they_are_alike() {
    let injector = |below: Value| json!({ "driver": "blkdebug", "node-name": "i", "image": below });
    let copier = |below: Value| json!({ "driver": "copy-on-read", "node-name": "k", "file": below });
    let mut script = start();
    script.extend([
        file("c", "c"),
        add(injector(json!("b"))),
        reopen(&[injector(json!("large"))]),
        reopen(&[injector(json!({ "driver": "null-co" }))]),
        reopen(&[injector(json!({ "driver": "file", "filename": "DIR/b" }))]),
        reopen(&[injector(json!("b"))]),
        reopen(&[with(injector(json!("b")), &json!({ "discard": "unmap", "cache": { "no-flush": true } }))]),
        list_nodes(),
        delete("ro"),
        add(copier(json!("c"))),
        reopen(&[copier(json!("large"))]),
        reopen(&[copier(json!("c"))]),
        reopen(&[with(throttle("n", "g", json!("a")), &json!({ "cache": { "direct": true } }))]),
        list_nodes(),
        reopen(&[throttle("n", "g", json!("a"))]),
        list_nodes(),
    ]);
    compare(&script);
}

#[test]
fn ours_keeps_guests_sizes_and_mirrors_bytes() {
    let size = "who uses a node relies on its size";
    let heard = "what a mirror copies would change without a mark";
    let writable = "what may be written stands on what may be";
    let mut script = start();
    script.push(differs(&[throttle("n", "g", json!("ro"))], writable));
    compare(&script);
    let mut script = start();
    script.push(differs(&[throttle("n", "g", json!("large"))], size));
    compare(&script);
    let mut script = start();
    script.extend([
        file("t", "c"),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "n", "target": "t", "sync": "none" })),
        Step::Await("BLOCK_JOB_READY", "j"),
        differs(&[throttle("n", "g", json!("b"))], heard),
        Do("job-cancel", json!({ "id": "j" })),
        Step::Await("null", "j"),
    ]);
    script.retain(|step| !matches!(step, Do("blockdev-add", options) if options["node-name"] == "ro"));
    compare(&script);
}
