//! The same conversations with `qemu-storage-daemon` and ours: replies and events compared.
//!
//! Where ours answers differently on purpose, the step says why ([`Step::Differs`]); a difference that is gone
//! fails the test too.

mod common;
mod qmp;

use qmp::steps::{SIZE, add, changed, delete, file, list_nodes, look, mirror, of_job};
use qmp::transcript::Step::{Await, Differs, Do};
use qmp::transcript::{Script, compare};
use serde_json::{Value, json};

#[test]
fn file_nodes_are_added_and_refused_alike() {
    let options =
        |changes| changed(json!({ "driver": "file", "node-name": "x", "filename": "DIR/a" }), changes);
    let with = |changes| add(options(changes));
    let locks = "files are locked when they are opened, not when they are first used";
    let script = vec![
        add(json!({ "driver": "file", "filename": "DIR/a" })),
        add(json!({ "node-name": "x", "filename": "DIR/a" })),
        add(json!({ "driver": "file", "node-name": "x" })),
        with(json!({ "driver": "foo" })),
        with(json!({ "driver": 5 })),
        with(json!({ "node-name": 5 })),
        with(json!({ "node-name": "1x" })),
        with(json!({ "node-name": "" })),
        with(json!({ "node-name": "x2345678901234567890123456789012" })),
        with(json!({ "filename": 5 })),
        with(json!({ "filename": "DIR/none" })),
        with(json!({ "filename": "DIR" })),
        with(json!({ "filename": "/dev/null" })),
        with(json!({ "driver": "host_device" })),
        with(json!({ "zork": 1 })),
        with(json!({ "cache.direct": true })),
        with(json!({ "read-only": "on" })),
        with(json!({ "cache": 5 })),
        with(json!({ "cache": { "zork": 5 } })),
        with(json!({ "cache": { "direct": 5 } })),
        with(json!({ "discard": "on" })),
        with(json!({ "detect-zeroes": "unmap" })),
        with(json!({ "aio": "native" })),
        with(json!({ "aio": "zork" })),
        with(json!({ "locking": "no" })),
        with(json!({ "pr-manager": null })),
        with(json!({ "force-share": true })),
        list_nodes(),
        with(json!({ "aio": "threads", "locking": "on", "discard": "unmap", "detect-zeroes": "unmap" })),
        list_nodes(),
        with(json!({ "filename": "DIR/b" })),
        Differs("blockdev-add", options(json!({ "node-name": "y" })), locks),
        Differs("blockdev-del", json!({ "node-name": "y" }), locks),
        with(json!({ "node-name": "y", "filename": "DIR/b", "read-only": true, "force-share": true })),
        list_nodes(),
        delete("y"),
        delete("x"),
        delete("x"),
        Do("blockdev-del", json!({})),
    ];
    compare(&[("a", SIZE), ("b", SIZE)], &script);
}

#[test]
fn raw_nodes_are_added_and_refused_alike() {
    let raw = |changes| add(changed(json!({ "driver": "raw", "node-name": "r", "file": "x" }), changes));
    let script = vec![
        file("x", "a"),
        raw(json!({ "offset": 512, "size": 100 })),
        raw(json!({ "offset": 512, "size": SIZE })),
        raw(json!({ "offset": SIZE + 1 })),
        raw(json!({ "size": SIZE + 1 })),
        raw(json!({ "offset": -1 })),
        raw(json!({ "offset": "1" })),
        raw(json!({ "file": "zz" })),
        raw(json!({ "file": 5 })),
        raw(json!({ "file": { "driver": "file" } })),
        raw(json!({ "file": { "driver": "file", "filename": "DIR/none" } })),
        raw(json!({ "file": { "driver": "file", "filename": "DIR/c", "node-name": "x" } })),
        raw(json!({ "file": { "driver": "file", "filename": "DIR/c", "node-name": "r" } })),
        add(json!({ "driver": "raw", "node-name": "r" })),
        raw(json!({})),
        delete("x"),
        list_nodes(),
        delete("r"),
        raw(json!({
            "file": { "driver": "file", "filename": "DIR/c", "node-name": "rf" }, "read-only": true,
        })),
        list_nodes(),
        delete("rf"),
        delete("r"),
        raw(json!({ "file": { "driver": "file", "filename": "DIR/c" } })),
        list_nodes(),
        delete("r"),
        list_nodes(),
        delete("zz"),
    ];
    compare(&[("a", SIZE), ("c", SIZE)], &script);
}

#[test]
fn nodes_over_nothing_and_queries_answer_alike() {
    let null = |changes| add(changed(json!({ "driver": "null-co", "node-name": "n" }), changes));
    let script = vec![
        null(json!({ "size": "5" })),
        null(json!({ "size": u64::MAX / 2 })),
        null(json!({ "latency-ns": "5" })),
        null(json!({})),
        list_nodes(),
        Do("query-block", json!({})),
        Do("query-named-block-nodes", json!({ "flat": 1 })),
        Do("query-named-block-nodes", json!({ "x": 1 })),
        Do("query-version", json!({})),
        Do("query-version", json!({ "x": 1 })),
        Do("query-zork", json!({})),
    ];
    compare(&[], &script);
}

#[test]
fn the_nbd_server_starts_and_stops_alike() {
    let start = |arguments: Value| Do("nbd-server-start", arguments);
    let at = |path: &str| json!({ "addr": { "type": "unix", "data": { "path": path } } });
    let inet = |data: Value| start(json!({ "addr": { "type": "inet", "data": data } }));
    let with = |changes| start(changed(at("DIR/nbd"), changes));
    let script = vec![
        Do("nbd-server-stop", json!({})),
        start(json!({})),
        start(json!({ "addr": 5 })),
        start(json!({ "addr": { "type": "foo" } })),
        start(json!({ "addr": { "type": "unix" } })),
        start(json!({ "addr": { "type": "unix", "data": {} } })),
        start(json!({ "addr": { "type": "unix", "data": { "path": 5 } } })),
        start(at("DIR/none/nbd")),
        start(json!({ "addr": { "type": "fd", "data": { "str": "5" } } })),
        inet(json!({ "host": "127.0.0.1" })),
        inet(json!({ "host": "127.0.0.1", "port": 5 })),
        inet(json!({ "host": "127.0.0.1", "port": "bogus" })),
        // An address of nobody's (RFC 5737).
        inet(json!({ "host": "192.0.2.1", "port": "0" })),
        with(json!({ "tls-creds": "zz" })),
        with(json!({ "max-connections": -1 })),
        with(json!({ "max-connections": "5" })),
        with(json!({ "handshake-max-seconds": 3 })),
        start(at("DIR/nbd2")),
        Do("nbd-server-stop", json!({})),
        inet(json!({ "host": "127.0.0.1", "port": "0" })),
        Do("nbd-server-stop", json!({})),
        Do("nbd-server-stop", json!({})),
    ];
    compare(&[], &script);
}

#[test]
fn exports_come_and_go_alike() {
    let options = json!({ "type": "nbd", "id": "e", "node-name": "s" });
    let export = |changes| Do("block-export-add", changed(options.clone(), changes));
    let list = || Do("query-block-exports", json!({}));
    let remove = |id: &str| Do("block-export-del", json!({ "id": id }));
    let script = vec![
        file("s", "s"),
        add(json!({ "driver": "file", "node-name": "ro", "filename": "DIR/t", "read-only": true })),
        export(json!({})),
        remove("e"),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        export(json!({ "type": "vhost" })),
        Do("block-export-add", json!({ "id": "e", "node-name": "s" })),
        Do("block-export-add", json!({ "type": "nbd", "node-name": "s" })),
        Do("block-export-add", json!({ "type": "nbd", "id": "e" })),
        export(json!({ "id": "1e" })),
        export(json!({ "id": "" })),
        export(json!({ "node-name": "zz" })),
        export(json!({ "zork": 1 })),
        export(json!({ "name": 5 })),
        export(json!({ "writable": 5 })),
        export(json!({ "iothread": "z" })),
        export(json!({ "bitmaps": ["b"] })),
        export(json!({ "node-name": "ro", "writable": true })),
        export(json!({ "writable": true, "description": "a disk" })),
        export(json!({})),
        export(json!({ "id": "e2" })),
        export(json!({ "id": "e2", "name": "other" })),
        export(json!({ "id": "e3", "node-name": "ro" })),
        list(),
        delete("s"),
        remove("zz"),
        Do("block-export-del", json!({ "id": "e2", "mode": "foo" })),
        remove("e2"),
        list(),
        Do("nbd-server-stop", json!({})),
        list(),
        export(json!({})),
        delete("s"),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

/// What can be wrong with a mirror, each with the arguments that make it so.
fn wrong_arguments() -> Vec<Value> {
    vec![
        json!({ "device": "zz" }),
        json!({ "device": "below" }),
        json!({ "device": "busy-source" }),
        json!({ "target": "zz" }),
        json!({ "target": "busy-target" }),
        json!({ "target": "busy-source" }),
        json!({ "target": "s" }),
        json!({ "target": "ro" }),
        json!({ "target": "exported" }),
        json!({ "granularity": 1000 }),
        json!({ "granularity": 100 }),
        json!({ "granularity": 134_217_728 }),
        json!({ "sync": "bitmap" }),
        json!({ "sync": "incremental" }),
        json!({ "replaces": "zz" }),
        json!({ "replaces": "ro" }),
        json!({ "buf-size": -1 }),
        json!({ "filter-node-name": "t" }),
        json!({ "filter-node-name": "#x" }),
        json!({ "filter-node-name": "filter" }),
        json!({ "filter-node-name": "x2345678901234567890123456789012" }),
        json!({ "job-id": "1j" }),
        json!({ "job-id": "" }),
        json!({ "job-id": "running" }),
        json!({ "speed": -1 }),
    ]
}

/// Nodes to do wrong things with, and a mirror that runs.
fn among_others() -> Script {
    vec![
        file("s", "s"),
        file("t", "t"),
        add(json!({ "driver": "file", "node-name": "ro", "filename": "DIR/ro", "read-only": true })),
        file("below", "below"),
        add(json!({ "driver": "raw", "node-name": "above", "file": "below" })),
        file("exported", "exported"),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do(
            "block-export-add",
            json!({ "type": "nbd", "id": "e", "node-name": "exported", "writable": true }),
        ),
        file("busy-source", "1"),
        file("busy-target", "2"),
        mirror(json!({
            "job-id": "running", "device": "busy-source", "target": "busy-target", "filter-node-name": "filter",
        })),
        Await("BLOCK_JOB_READY", "running"),
    ]
}

const OTHERS: [(&str, usize); 7] =
    [("s", SIZE), ("t", SIZE), ("ro", SIZE), ("below", SIZE), ("exported", SIZE), ("1", SIZE), ("2", SIZE)];

#[test]
fn every_wrong_argument_of_a_mirror_is_refused_alike() {
    let mut script = among_others();
    script.extend(wrong_arguments().into_iter().map(mirror));
    let wrong_types = [
        json!({ "job-id": 5 }),
        json!({ "device": null }),
        json!({ "target": [] }),
        json!({ "sync": "half" }),
        json!({ "sync": 5 }),
        json!({ "granularity": -1 }),
        json!({ "granularity": 4_294_967_296_u64 }),
        json!({ "granularity": 1e20 }),
        json!({ "granularity": "5" }),
        json!({ "granularity": 1.5 }),
        json!({ "granularity": 65536.0 }),
        json!({ "speed": "1" }),
        json!({ "speed": 1.5 }),
        json!({ "speed": 9_223_372_036_854_775_808_u64 }),
        json!({ "buf-size": "x" }),
        json!({ "on-source-error": "zz" }),
        json!({ "on-target-error": 5 }),
        json!({ "copy-mode": "zz" }),
        json!({ "copy-mode": true }),
        json!({ "auto-finalize": "yes" }),
        json!({ "auto-dismiss": 0 }),
        json!({ "filter-node-name": 1 }),
        json!({ "replaces": {} }),
        json!({ "mode": "existing" }),
    ];
    script.extend(wrong_types.into_iter().map(mirror));
    for missing in ["device", "target", "sync"] {
        let mut arguments = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
        arguments.as_object_mut().unwrap().remove(missing);
        script.push(Do("blockdev-mirror", arguments));
    }
    script.push(Do("blockdev-mirror", json!({ "device": "s", "target": "t", "sync": "full" })));
    script.push(Differs(
        "blockdev-mirror",
        json!({ "job-id": "1", "device": "s", "target": "t", "sync": "full", "unmap": true }),
        "unmap is an argument of ours here",
    ));
    script.push(Differs(
        "blockdev-mirror",
        json!({ "job-id": "1", "device": "s", "target": "t", "sync": "full", "bitmap": "b" }),
        "bitmap is an argument of ours",
    ));
    script.push(Differs(
        "blockdev-mirror",
        json!({ "job-id": "1", "device": "s", "target": "t", "sync": "full", "target-is-zero": true }),
        "target-is-zero has come with QEMU 10.1",
    ));
    compare(&OTHERS, &script);
}

#[test]
fn of_two_wrong_arguments_the_same_one_is_named() {
    let mut script = among_others();
    let wrong = wrong_arguments();
    for (index, one) in wrong.iter().enumerate() {
        for other in &wrong[index + 1..] {
            let mut both = one.clone();
            let key = other.as_object().unwrap().keys().next().unwrap();
            if both.get(key).is_none() {
                both[key] = other[key].clone();
                script.push(mirror(both));
            }
        }
    }
    compare(&OTHERS, &script);
}

#[test]
fn a_target_of_another_size_fails_the_job_alike() {
    let script = vec![
        file("s", "s"),
        file("larger", "larger"),
        mirror(json!({ "target": "larger" })),
        Await("null", "j"),
        mirror(json!({ "target": "larger", "auto-dismiss": false })),
        Await("concluded", "j"),
        look(),
        Do("query-jobs", json!({})),
        of_job("job-dismiss", "id"),
    ];
    compare(&[("s", SIZE), ("larger", 2 * SIZE)], &script);
}

#[test]
fn a_pivot_moves_exports_and_frees_the_source_alike() {
    let export = |id: &str, node: &str, writable: bool| {
        let arguments =
            json!({ "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable });
        Do("block-export-add", arguments)
    };
    let exports = || Do("query-block-exports", json!({}));
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        export("e", "s", true),
        mirror(json!({})),
        Await("BLOCK_JOB_READY", "j"),
        export("late", "t", false),
        export("late", "t", true),
        delete("s"),
        export("beside", "s", true),
        delete("s"),
        delete("t"),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        exports(),
        delete("t"),
        delete("s"),
        Do("block-export-del", json!({ "id": "e" })),
        Do("nbd-server-stop", json!({})),
        delete("t"),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn where_ours_is_stricter_it_is_so_on_purpose() {
    let pair = "two nodes never show the same bytes where one may be written: a mirror of one would miss it";
    let below = "bytes that a node shows to another are written through that one only";
    let writable = json!({ "type": "nbd", "id": "e", "node-name": "x", "writable": true });
    let script = vec![
        file("x", "s"),
        file("t", "t"),
        add(json!({ "driver": "raw", "node-name": "r", "file": "x" })),
        Differs("blockdev-add", json!({ "driver": "raw", "node-name": "r2", "file": "x" }), pair),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Differs("block-export-add", writable, below),
    ];
    compare(&[("s", SIZE), ("t", SIZE)], &script);
}

#[test]
fn quitting_cancels_jobs_and_ends_the_process_alike() {
    let Some(qemu) = qmp::Peer::qemu() else { return };
    let script = vec![
        file("s", "s"),
        file("t", "t"),
        mirror(json!({})),
        Await("BLOCK_JOB_READY", "j"),
        Do("quit", json!({})),
        Await("null", "j"),
    ];
    let [theirs, ours] = [qemu, qmp::Peer::ours()].map(|peer| {
        peer.image("s", SIZE);
        peer.image("t", SIZE);
        let transcript = qmp::transcript::run(&peer, &script);
        assert!(peer.ends_well());
        transcript
    });
    assert_eq!(ours, theirs);
}

/// A client of an export that has written once and stays connected until it is dropped.
struct Guest(std::process::Child);

impl Guest {
    fn of(peer: &qmp::Peer, qemu_io: &std::path::Path) -> Self {
        use std::io::{BufRead, BufReader, Write};
        let uri = format!("nbd+unix:///n?socket={}/nbd", peer.folder().display());
        let mut command = std::process::Command::new(qemu_io);
        command.args(["-f", "raw", &uri]).stdin(std::process::Stdio::piped());
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("it was found");
        let stdin = child.stdin.as_mut().expect("it is a pipe");
        stdin.write_all(b"write 0 4k\n").expect("the guest listens");
        let said = BufReader::new(child.stdout.as_mut().expect("it is a pipe")).lines();
        assert!(said.map_while(Result::ok).any(|line| line.contains("wrote 4096")), "the guest has written");
        Self(child)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_export_with_a_client_is_removed_by_force_only_alike() {
    let Some(qemu_io) = common::tool("qemu-io") else { return };
    let Some(qemu) = qmp::Peer::qemu() else { return };
    let export = json!({ "type": "nbd", "id": "e", "node-name": "s", "name": "n", "writable": true });
    let before = vec![
        file("s", "s"),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do("block-export-add", export),
    ];
    let after = vec![
        Do("block-export-del", json!({ "id": "e" })),
        Do("block-export-del", json!({ "id": "e", "mode": "safe" })),
        Do("query-block-exports", json!({})),
        Do("block-export-del", json!({ "id": "e", "mode": "hard" })),
        Await("BLOCK_EXPORT_DELETED", "e"),
        Do("query-block-exports", json!({})),
        delete("s"),
    ];
    let [theirs, ours] = [qemu, qmp::Peer::ours()].map(|peer| {
        peer.image("s", SIZE);
        qmp::transcript::run(&peer, &before);
        let _guest = Guest::of(&peer, &qemu_io);
        qmp::transcript::run(&peer, &after)
    });
    assert_eq!(ours, theirs);
}
