//! As `qmp_differential.rs`, for nodes in exports of NBD servers, and for mirrors to them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::process::Command;
use std::sync::Mutex;

use common::process::Daemon;
use qmp::steps::{SIZE, add, changed, delete, file, list_nodes, mirror, of_job};
use qmp::transcript::Step::{self, Await, Differs, Do};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

/// Beside each daemon, servers of QEMU's at the sockets `full`, `other`, `small` and `ro`, each with an export `disk`.
fn compare(script: &Script) {
    let Some(qemu_nbd) = common::tool("qemu-nbd") else { return };
    let servers = Mutex::new(Vec::new());
    compare_on(script, |peer| {
        peer.image("source", SIZE);
        for (name, size) in [("full", SIZE), ("other", SIZE), ("small", SIZE / 2), ("ro", SIZE)] {
            let image = peer.image(&format!("{name}.img"), size);
            let socket = peer.folder().join(name);
            let mut command = Command::new(&qemu_nbd);
            // As many clients as like.
            command.args(["-t", "-e", "0", "-f", "raw", "-x", "disk", "-k"]).arg(&socket);
            command.args((name == "ro").then_some("-r")).arg(image);
            let mut server = Daemon::start(&mut command).unwrap();
            server.listens(&socket).unwrap();
            servers.lock().unwrap().push(server);
        }
    });
}

fn unix(socket: &str) -> Value {
    json!({ "type": "unix", "path": format!("DIR/{socket}") })
}

fn node(name: &str, socket: &str) -> Value {
    json!({ "driver": "nbd", "node-name": name, "server": unix(socket), "export": "disk" })
}

fn added(changes: Value) -> Step {
    add(changed(node("n", "full"), changes))
}

#[test]
fn exports_are_taken_and_refused_alike() {
    let mut script = vec![add(json!({ "driver": "nbd", "node-name": "n" }))];
    for refused in [
        json!({ "export": "none" }),
        json!({ "server": unix("none") }),
        json!({ "server": { "type": "inet", "host": "127.0.0.1" } }),
        json!({ "server": { "type": "unix" } }),
        json!({ "server": { "type": "zork" } }),
        json!({ "server": { "type": "inet", "host": "127.0.0.1", "port": "1" } }),
        json!({ "server": { "type": "inet", "host": "nohost.invalid", "port": "1" } }),
        json!({ "server": { "type": "inet", "host": "127.0.0.1", "port": "zork" } }),
        json!({ "server": { "type": "unix", "path": "p".repeat(200) } }),
        json!({ "export": "x".repeat(5000) }),
        json!({ "tls-creds": "none" }),
        json!({ "open-timeout": 1_u64 << 32 }),
        json!({ "reconnect-delay": -1 }),
        json!({ "x-dirty-bitmap": "qemu:dirty-bitmap:none" }),
        json!({ "server": unix("ro") }),
        json!({ "path": "DIR/full" }),
    ] {
        script.push(added(refused));
    }
    let fd = json!({ "type": "fd", "str": "zork" });
    script.push(Differs(
        "blockdev-add",
        changed(node("n", "full"), json!({ "server": fd })),
        "QEMU's daemon takes no descriptors, ours takes those that it was started with",
    ));
    let vsock = json!({ "type": "vsock", "cid": "3", "port": "1" });
    script.push(Differs(
        "blockdev-add",
        changed(node("n", "full"), json!({ "server": vsock })),
        "there is no vsock here",
    ));
    script.extend([added(json!({})), list_nodes(), delete("n")]);
    compare(&script);
}

#[test]
fn nodes_are_named_alike_and_change_alike() {
    let reopen = |changes: Value| {
        let options = changed(node("n", "full"), json!({ "reconnect-delay": 5 }));
        Do("blockdev-reopen", json!({ "options": [changed(options, changes)] }))
    };
    let resize = |size: usize| Do("block_resize", json!({ "node-name": "n", "size": size }));
    compare(&vec![
        added(json!({ "reconnect-delay": 5 })),
        add(json!({ "driver": "raw", "node-name": "r", "file": "n" })),
        add(changed(node("ro", "ro"), json!({ "read-only": true }))),
        add(changed(node("aro", "ro"), json!({ "auto-read-only": true }))),
        add(json!({ "driver": "raw", "node-name": "below", "file": node("o", "other") })),
        add(json!({ "driver": "raw", "node-name": "part", "file": "ro", "size": 512, "read-only": true })),
        list_nodes(),
        Do("query-block", json!({})),
        reopen(json!({ "reconnect-delay": 7 })),
        reopen(json!({ "export": "other" })),
        reopen(json!({ "server": unix("other") })),
        delete("n"),
        delete("r"),
        reopen(json!({ "read-only": true })),
        resize(SIZE * 2),
        resize(SIZE / 2),
        list_nodes(),
        delete("n"),
    ]);
}

#[test]
fn mirrors_to_exports_go_alike() {
    compare(&vec![
        file("s", "source"),
        add(node("t", "full")),
        add(node("small", "small")),
        add(changed(node("ro", "ro"), json!({ "read-only": true }))),
        mirror(json!({ "target": "small" })),
        Await("null", "j"),
        mirror(json!({ "target": "ro" })),
        mirror(json!({})),
        Await("BLOCK_JOB_READY", "j"),
        delete("t"),
        of_job("block-job-complete", "device"),
        Await("null", "j"),
        list_nodes(),
        delete("t"),
    ]);
}

#[test]
fn names_of_exports_are_targets_alike() {
    let mirrored = |target: &str, more: Value| {
        let arguments =
            json!({ "job-id": "j", "device": "s", "target": target, "sync": "full", "mode": "existing" });
        Do("drive-mirror", changed(arguments, more))
    };
    let mut script = vec![add(json!({
        "driver": "raw", "node-name": "s", "file": { "driver": "file", "filename": "DIR/source" },
    }))];
    let raw = || json!({ "format": "raw" });
    for (target, more) in [
        ("nbd:unix:DIR/full:exportname=disk", raw()),
        ("nbd+unix:///disk?socket=DIR/full", raw()),
        ("nbd+unix:///disk?socket=DIR/full", json!({})),
        (
            "json:{\"driver\":\"nbd\",\"server.type\":\"unix\",\"server.path\":\"DIR/full\",\"export\":\"disk\"}",
            json!({}),
        ),
        ("nbd+unix:///disk?socket=DIR/full", json!({ "format": "raw", "mode": "absolute-paths" })),
    ] {
        script.extend([
            mirrored(target, more),
            Await("BLOCK_JOB_READY", "j"),
            Differs(
                "query-named-block-nodes",
                json!({ "flat": true }),
                "QEMU has a filter node there, which is not here",
            ),
            of_job("block-job-cancel", "device"),
            Await("null", "j"),
        ]);
    }
    for target in [
        "nbd:",
        "nbd:x",
        "nbd://",
        "nbd+unix:///disk",
        "nbd+zork://x",
        "nbd:unix:DIR/full",
        "nbd:unix:DIR/none",
    ] {
        for mode in ["existing", "absolute-paths"] {
            script.push(mirrored(target, json!({ "format": "raw", "mode": mode })));
        }
    }
    let small = "nbd:unix:DIR/small:exportname=disk";
    script.push(mirrored(small, json!({ "format": "raw", "mode": "absolute-paths" })));
    script.extend([mirrored(small, raw()), Await("null", "j")]);
    compare(&script);
}
