//! The fault injector beside QEMU's: the same rules, the same requests of a guest, the same errors.
//!
//! The guest is `qemu-io` on an NBD export of each daemon; what it prints is compared but for times. QEMU's server
//! hangs up after a read that has failed, so such a read is a guest's last request here.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use common::qcow2::qemu_img;
use qmp::Peer;
use qmp::guest::is_told;
use qmp::wire::Wire;
use serde_json::{Value, json};

/// What to tell both injectors, and what a guest does then.
struct Case {
    name: &'static str,
    rules: Value,
    requests: &'static [&'static str],
}

const fn case(name: &'static str, rules: Value, requests: &'static [&'static str]) -> Case {
    Case { name, rules, requests }
}

fn on(event: &str, more: Value) -> Value {
    let mut rule = json!({ "event": event });
    for (key, value) in more.as_object().into_iter().flatten() {
        rule[key] = value.clone();
    }
    rule
}

fn inject(rules: &[Value]) -> Value {
    json!({ "inject-error": rules })
}

/// What one daemon's guests are told of each case. `node` makes the node `n` over an injector with the rules.
fn answers(peer: &Peer, cases: &[Case], node: impl Fn(&Peer, &Value) -> Value) -> Vec<String> {
    let mut wire = Wire::negotiated(&peer.socket());
    let execute = |wire: &mut Wire, command: &str, arguments: &Value| {
        let text = arguments.to_string().replace("DIR", &peer.folder().to_string_lossy());
        let reply = wire.execute(command, &serde_json::from_str(&text).unwrap());
        assert_eq!(reply, json!({ "return": {} }), "{command} {arguments}");
    };
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    execute(&mut wire, "nbd-server-start", &address);
    let export = json!({ "type": "nbd", "id": "e", "node-name": "n", "name": "n", "writable": true });
    let told = cases.iter().map(|case| {
        let node = node(peer, &case.rules);
        execute(&mut wire, "blockdev-add", &node);
        execute(&mut wire, "block-export-add", &export);
        let told = is_told(peer, case.requests);
        // An error of the last flush would be the next case's.
        execute(&mut wire, "block-export-del", &json!({ "id": "e", "mode": "hard" }));
        until_deleted(&mut wire);
        execute(&mut wire, "blockdev-del", &json!({ "node-name": "n" }));
        told
    });
    told.collect()
}

/// Waits until the export is gone.
fn until_deleted(wire: &mut Wire) {
    let none = json!({ "return": [] });
    common::wait::until("the export's end", common::wait::LIMIT, || {
        (wire.execute("query-block-exports", &json!({})) == none).then_some(())
    })
    .unwrap();
}

fn compare(cases: &[Case], node: impl Fn(&Peer, &Value) -> Value) {
    if common::tool("qemu-io").is_none() || common::tool("qemu-img").is_none() {
        return;
    }
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, ours] = [qemu, Peer::ours()].map(|peer| answers(&peer, cases, &node));
    let wrong: Vec<_> = cases
        .iter()
        .zip(theirs.iter().zip(&ours))
        .filter(|(_, (theirs, ours))| theirs != ours)
        .map(|(case, (theirs, ours))| format!("{}\n  qemu: {theirs}\n  ours: {ours}", case.name))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// An injector over a file of a mebibyte of data.
fn injector(peer: &Peer, rules: &Value) -> Value {
    peer.image("a", 1 << 20);
    let file = json!({ "driver": "file", "filename": "DIR/a", "discard": "unmap" });
    let mut options = json!({ "driver": "blkdebug", "image": file, "discard": "unmap" });
    for (key, value) in rules.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    options
}

fn raw(peer: &Peer, rules: &Value) -> Value {
    json!({ "driver": "raw", "node-name": "n", "file": injector(peer, rules), "discard": "unmap" })
}

#[test]
fn rules_over_a_raw_disk_let_the_same_requests_fail() {
    let write = |more: Value| on("write_aio", more);
    let next = |state: i64, new: i64| json!({ "event": "write_aio", "state": state, "new_state": new });
    let in_state_three = json!({
        "inject-error": [write(json!({ "state": 3 }))], "set-state": [next(1, 2), next(2, 3), next(3, 4)],
    });
    let first_wins = json!({
        "inject-error": [write(json!({ "state": 2, "errno": 5 })), write(json!({ "state": 3, "errno": 28 }))],
        "set-state": [next(1, 2), next(1, 3)],
    });
    let once = json!({ "once": true });
    let two = &["write 0 512", "write 0 512", "write 0 512"];
    let cases = [
        case("first rule first", inject(&[write(json!({})), write(json!({ "errno": 28 }))]), two),
        case(
            "one after the other",
            inject(&[write(once.clone()), write(json!({ "errno": 28, "once": true }))]),
            two,
        ),
        case(
            "it stays active",
            inject(&[write(json!({}))]),
            &["read 0 512", "write 0 512", "discard 0 4k", "flush", "read 0 512"],
        ),
        case(
            "another event takes over",
            inject(&[write(json!({})), on("flush_to_os", json!({ "iotype": "write", "errno": 28 }))]),
            &["write 0 512", "flush", "write -z 0 512", "write 0 512"],
        ),
        case("states", in_state_three, &["write 0 512", "write 0 512", "write 0 512", "write 0 512"]),
        case("the first state wins", first_wins, two),
        case("no number", inject(&[write(json!({ "errno": 0 })), write(json!({}))]), two),
        case("from the start", inject(&[on("none", json!({ "iotype": "write" }))]), two),
        case(
            "a sector",
            inject(&[on("none", json!({ "sector": 1 }))]),
            &["read 0 512", "write 0 1k", "write 1k 1k", "read 512 512"],
        ),
        case(
            "zeroes",
            inject(&[on("none", json!({ "iotype": "write-zeroes" }))]),
            &["write 0 512", "write -z 0 4k", "write -zu 0 4k", "discard 0 4k", "read 0 512"],
        ),
        case(
            "discards",
            inject(&[on("none", json!({ "iotype": "discard" }))]),
            &["discard 0 4k", "write 0 512"],
        ),
        case("at once", inject(&[write(json!({ "immediately": true, "errno": 1 }))]), two),
        case("a write of its own", inject(&[on("pwritev", once.clone())]), two),
        case("after a write", inject(&[on("pwritev_done", once.clone())]), two),
        case(
            "zeroes of its own",
            inject(&[on("pwritev_zero", once.clone())]),
            &["write 0 512", "write -z 0 4k"],
        ),
        case(
            "a flush begins",
            inject(&[on("flush_to_os", once.clone())]),
            &["write 0 512", "flush", "flush"],
        ),
        case("a flush", inject(&[on("flush_to_disk", once)]), &["write 0 512", "flush", "flush"]),
    ];
    compare(&cases, raw);
}

#[test]
fn limits_cut_requests_alike() {
    let with = |mut rules: Value, more: Value| {
        for (key, value) in more.as_object().into_iter().flatten() {
            rules[key] = value.clone();
        }
        rules
    };
    let at = |io: &str| inject(&[on("none", json!({ "sector": 8, "iotype": io }))]);
    let cases = [
        case(
            "max-transfer",
            with(at("write"), json!({ "max-transfer": 4096 })),
            &["write -P 9 0 16k", "read -P 9 0 4k", "read -P 9 8k 4k"],
        ),
        case(
            "max-transfer of reads",
            with(at("read"), json!({ "max-transfer": 4096 })),
            &["read 0 4k", "read 0 8k"],
        ),
        case(
            "max-write-zero",
            with(at("write-zeroes"), json!({ "max-write-zero": 4096 })),
            &["write -z 0 16k", "read -P 0 0 4k"],
        ),
        case(
            "opt-write-zero",
            with(at("write-zeroes"), json!({ "opt-write-zero": 8192 })),
            &["write -z 4k 4k", "write -z 0 16k"],
        ),
        case(
            "opt-discard",
            with(at("discard"), json!({ "opt-discard": 8192 })),
            &["discard 4k 4k", "discard 0 16k"],
        ),
    ];
    compare(&cases, raw);
}

/// A new image of a mebibyte over an injector.
fn image(peer: &Peer, rules: &Value) -> Value {
    let _ = std::fs::remove_file(peer.folder().join("q"));
    qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "q", "1M"]);
    on_image(rules, &Value::Null)
}

/// The same over a raw disk.
fn overlay(peer: &Peer, rules: &Value) -> Value {
    let _ = std::fs::remove_file(peer.folder().join("q"));
    peer.image("base", 1 << 20);
    qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "q"]);
    let base = json!({ "driver": "file", "filename": "DIR/base", "read-only": true });
    on_image(rules, &json!({ "driver": "raw", "file": base, "read-only": true }))
}

fn on_image(rules: &Value, backing: &Value) -> Value {
    let mut file = json!({ "driver": "blkdebug", "image": { "driver": "file", "filename": "DIR/q" } });
    for (key, value) in rules.as_object().into_iter().flatten() {
        file[key] = value.clone();
    }
    json!({ "driver": "qcow2", "node-name": "n", "file": file, "backing": backing })
}

#[test]
fn events_of_an_image_let_the_same_requests_fail() {
    let once = |event: &str| inject(&[on(event, json!({ "once": true }))]);
    let cases = [
        case("write_aio", once("write_aio"), &["write 0 64k", "write 0 64k", "read 0 64k"]),
        case("write_aio in place", once("write_aio"), &["write 0 64k", "write 0 64k", "write 0 4k"]),
        case("read_aio", once("read_aio"), &["read 0 4k", "write 0 64k", "read 0 4k"]),
        case("cluster_alloc", once("cluster_alloc"), &["write 0 64k", "write 0 64k", "write 0 64k"]),
        case("l2_update", once("l2_update"), &["write 0 64k", "flush", "write 64k 64k"]),
        case("refblock_alloc", once("refblock_alloc"), &["write 0 64k", "write 64k 64k"]),
    ];
    compare(&cases, image);
    let cases = [
        case("cow_read", once("cow_read"), &["write 4k 4k", "write 64k 64k"]),
        case("cow_write", once("cow_write"), &["write 4k 4k", "write 4k 4k", "read 0 4k"]),
        case("read_backing_aio", once("read_backing_aio"), &["read 0 4k"]),
    ];
    compare(&cases, overlay);
}
