//! As `qmp_differential.rs`, for what NBD clients may ask of an export's ranges: bitmaps and the depth of layers, offered
//! in the same words, and answered with the same maps.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
mod qmp;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::qcow2::{qemu_img, qemu_io};
use qmp::Peer;
use qmp::transcript::Step::{self, Await, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

/// A chain of three layers, each with some data and a bitmap; and a raw file.
fn make_images(folder: &Path) {
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    qemu_img(folder, &["bitmap", "--add", "-g", "64k", "base.qcow2", "inbase"]);
    qemu_io(folder, "base.qcow2", &["write -P 1 0 256k", "write -z 256k 64k"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "2M"]);
    qemu_io(folder, "mid.qcow2", &["write -P 2 128k 64k", "write -z 64k 64k"]);
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "2M"]);
    qemu_img(folder, &["bitmap", "--add", "-g", "64k", "top.qcow2", "saved"]);
    qemu_img(folder, &["bitmap", "--add", "--disable", "-g", "64k", "top.qcow2", "off"]);
    qemu_io(folder, "top.qcow2", &["write -P 3 0 64k", "write -P 3 1M 128k", "discard 512k 64k"]);
    qemu_img(folder, &["create", "-q", "-f", "raw", "r.raw", "1M"]);
    qemu_io(folder, "r.raw", &["write -P 3 64k 64k"]);
}

fn compare(script: Script) {
    compare_on(&script, |peer| make_images(peer.folder()));
}

fn open(node: &str, more: Value) -> Step {
    let file = json!({ "driver": "file", "filename": format!("DIR/{node}.qcow2") });
    let mut spec = json!({ "driver": "qcow2", "node-name": node, "file": file });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    Do("blockdev-add", spec)
}

fn bitmap(node: &str, name: &str, disabled: bool) -> Step {
    let arguments = json!({ "node": node, "name": name, "granularity": 65536, "disabled": disabled });
    Do("block-dirty-bitmap-add", arguments)
}

fn on(verb: &'static str, node: &str, name: &str) -> Step {
    Do(verb, json!({ "node": node, "name": name }))
}

fn serve() -> Step {
    Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } }))
}

fn export(node: &str, more: Value) -> Step {
    let mut arguments = json!({ "type": "nbd", "id": "e", "node-name": node });
    for (key, value) in more.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    Do("block-export-add", arguments)
}

fn unexport() -> [Step; 2] {
    [Do("block-export-del", json!({ "id": "e", "mode": "hard" })), Await("BLOCK_EXPORT_DELETED", "e")]
}

#[test]
fn bitmaps_are_offered_and_refused_in_the_same_words() {
    let mut script = Script::new();
    script.extend([
        open("top", json!({})),
        bitmap("top", "live", false),
        export("top", json!({ "bitmaps": ["nope"] })),
        serve(),
        export("top", json!({ "bitmaps": ["nope"] })),
        export("top", json!({ "bitmaps": ["live"] })),
        export("top", json!({ "bitmaps": ["off", "nope"] })),
        export("top", json!({ "bitmaps": [{ "node": "none", "name": "off" }] })),
        export("top", json!({ "bitmaps": [{ "node": "top", "name": "nope" }] })),
        export("top", json!({ "bitmaps": [""] })),
        export("top", json!({ "bitmaps": ["off"], "name": "n".repeat(4097) })),
        export("top", json!({ "bitmaps": ["off"], "description": "n".repeat(4097) })),
        export("top", json!({ "bitmaps": ["live", "saved", "live"], "writable": true })),
    ]);
    script.extend(unexport());
    // One in the chain below, of an image that is only read.
    script.push(export("top", json!({ "bitmaps": ["inbase"], "allocation-depth": true })));
    script.push(Do("query-block-exports", json!({})));
    script.extend(unexport());
    script.extend([export("top", json!({ "bitmaps": [], "allocation-depth": false }))]);
    script.extend(unexport());
    compare(script);
}

#[test]
fn a_bitmap_is_nobody_elses_while_it_is_offered() {
    let mut script = Script::new();
    script.extend([
        open("top", json!({})),
        bitmap("top", "b", true),
        serve(),
        export("top", json!({ "bitmaps": ["b"] })),
        Do("query-named-block-nodes", json!({ "flat": true })),
        on("block-dirty-bitmap-remove", "top", "b"),
        on("block-dirty-bitmap-clear", "top", "b"),
        on("block-dirty-bitmap-enable", "top", "b"),
        Do("block-dirty-bitmap-merge", json!({ "node": "top", "target": "b", "bitmaps": ["off"] })),
        Do("block-dirty-bitmap-merge", json!({ "node": "top", "target": "off", "bitmaps": ["b"] })),
        Do(
            "block-export-add",
            json!({
                "type": "nbd", "id": "f", "node-name": "top", "name": "second", "bitmaps": ["b"],
            }),
        ),
    ]);
    script.extend(unexport());
    script.extend([
        on("block-dirty-bitmap-enable", "top", "b"),
        on("block-dirty-bitmap-clear", "top", "b"),
        export("top", json!({ "bitmaps": ["b"], "writable": true })),
        Do("nbd-server-stop", json!({})),
        on("block-dirty-bitmap-remove", "top", "b"),
    ]);
    compare(script);
}

#[test]
fn an_export_of_a_node_that_is_only_read_takes_bitmaps_that_are_on() {
    let mut script = Script::new();
    script.extend([
        open("top", json!({ "read-only": true })),
        bitmap("top", "live", false),
        serve(),
        export("top", json!({ "bitmaps": ["live"], "writable": true })),
        export("top", json!({ "bitmaps": ["live"] })),
    ]);
    script.extend(unexport());
    compare(script);
}

/// What the tools see, of the one and then of the other.
type Seen = Arc<Mutex<Vec<Vec<Value>>>>;

/// What `tool` prints, of each extent what matters.
fn output_of(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asks each context with `nbdinfo`, and a bitmap also with `qemu-img`.
fn look(seen: &Seen, contexts: &'static [&'static str]) -> Step {
    let seen = Arc::clone(seen);
    Meanwhile(Box::new(move |peer: &Peer| {
        let socket = peer.folder().join("nbd");
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let mut maps =
            vec![output_of(Command::new("nbdinfo").args(["--json", &uri]))["exports"][0]["contexts"].clone()];
        for context in contexts {
            maps.push(output_of(Command::new("nbdinfo").args(["--json", &format!("--map={context}"), &uri])));
            let server = format!("driver=nbd,export=disk,server.type=unix,server.path={}", socket.display());
            let of_bitmap = format!(",x-dirty-bitmap={context}");
            let image = format!("{server}{}", if context.starts_with("base:") { "" } else { &of_bitmap });
            maps.push(output_of(Command::new("qemu-img").args([
                "map",
                "--output=json",
                "--image-opts",
                &image,
            ])));
        }
        seen.lock().unwrap().push(maps);
    }))
}

/// Of an answer about `base:allocation`, what reads as zeroes. Whether a zero of an image takes space is left out: QEMU
/// says that it does, ours that it does where it does.
fn zeroes(map: &Value) -> Option<Vec<(u64, u64, bool)>> {
    let mut ranges: Vec<(u64, u64, bool)> = Vec::new();
    for extent in map.as_array()? {
        let description = extent.get("description").or(extent.get("zero"))?;
        let is_zero = match description.as_str() {
            Some("data") => false,
            Some("zero" | "hole,zero") => true,
            Some(_) => return None,
            None => description.as_bool()?,
        };
        let start = extent.get("offset").or(extent.get("start"))?.as_u64()?;
        let end = start + extent["length"].as_u64()?;
        match ranges.last_mut() {
            Some((_, last, same)) if *same == is_zero && *last == start => *last = end,
            _ => ranges.push((start, end, is_zero)),
        }
    }
    Some(ranges)
}

fn equal(seen: &Seen) {
    let seen = seen.lock().unwrap();
    let [ours, theirs] = &seen[..] else { panic!("{} looks", seen.len()) };
    for (ours, theirs) in ours.iter().zip(theirs) {
        match (zeroes(ours), zeroes(theirs)) {
            (Some(ours), Some(theirs)) => assert_eq!(ours, theirs),
            _ => assert_eq!(ours, theirs),
        }
    }
}

#[test]
fn every_context_of_a_chain_has_the_same_map() {
    if common::tool("nbdinfo").is_none() {
        return;
    }
    let seen = Seen::default();
    let mut script = Script::new();
    script.extend([
        open("top", json!({})),
        bitmap("top", "live", false),
        serve(),
        export(
            "top",
            json!({
                "name": "disk", "writable": true, "allocation-depth": true,
                "bitmaps": ["live", "saved", "off", "inbase"],
            }),
        ),
        Meanwhile(Box::new(|peer: &Peer| {
            let uri = format!("nbd+unix:///disk?socket={}", peer.folder().join("nbd").display());
            let steps = ["-c", "write -P 9 192k 64k", "-c", "write -z 1600k 64k", "-c", "discard 1088k 64k"];
            let output = Command::new("qemu-io")
                .args(["-d", "unmap", "-f", "raw", &uri])
                .args(steps)
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
        })),
        look(
            &seen,
            &[
                "base:allocation",
                "qemu:allocation-depth",
                "qemu:dirty-bitmap:live",
                "qemu:dirty-bitmap:saved",
                "qemu:dirty-bitmap:off",
                "qemu:dirty-bitmap:inbase",
            ],
        ),
    ]);
    compare(script);
    equal(&seen);
}

#[test]
fn a_raw_file_and_what_stands_on_it_has_the_same_map() {
    if common::tool("nbdinfo").is_none() {
        return;
    }
    for filter in [json!(null), json!({ "driver": "copy-on-read", "node-name": "c", "file": "r" })] {
        let seen = Seen::default();
        let mut script = Script::new();
        let file = json!({ "driver": "file", "filename": "DIR/r.raw" });
        script.push(Do("blockdev-add", json!({ "driver": "raw", "node-name": "r", "file": file })));
        let node = if filter.is_null() {
            "r"
        } else {
            script.push(Do("blockdev-add", filter));
            "c"
        };
        script.extend([
            serve(),
            export(node, json!({ "name": "disk", "allocation-depth": true })),
            look(&seen, &["base:allocation", "qemu:allocation-depth"]),
        ]);
        compare(script);
        equal(&seen);
    }
}

#[test]
fn the_older_commands_of_exports_go_alike() {
    let add = |arguments: Value| Do("nbd-server-add", arguments);
    let remove = |arguments: Value| Do("nbd-server-remove", arguments);
    let exports = || Do("query-block-exports", json!({}));
    let mut script = Script::new();
    script.extend([
        add(json!({ "device": "top" })),
        open("top", json!({})),
        open("mid", json!({ "read-only": true, "backing": null })),
        add(json!({ "device": "top" })),
        serve(),
        add(json!({ "device": "none" })),
        add(json!({ "device": "mid", "writable": true, "description": "d" })),
        add(json!({ "device": "mid" })),
        add(json!({ "device": "top", "name": "x", "bitmap": "none" })),
        add(json!({ "device": "top", "name": "two words" })),
        add(json!({ "device": "top", "name": "x", "bitmap": "off", "writable": true })),
        export("top", json!({ "id": "e", "name": "disk" })),
        exports(),
        remove(json!({ "name": "none" })),
        remove(json!({ "name": "disk" })),
        remove(json!({ "name": "mid" })),
        Await("BLOCK_EXPORT_DELETED", "mid"),
        remove(json!({ "name": "x", "mode": "hard" })),
        Await("BLOCK_EXPORT_DELETED", "x"),
        remove(json!({ "name": "e" })),
        Await("BLOCK_EXPORT_DELETED", "e"),
        exports(),
    ]);
    compare(script);
}

/// QEMU shows what is dirty as a hole of which nothing is known, ours the same: nobody may take it for zeroes.
#[test]
fn an_export_of_a_node_that_shows_a_bitmap_has_the_bytes_and_the_bitmap() {
    let (Some(qemu_nbd), Some(_)) = (common::tool("qemu-nbd"), common::tool("nbdinfo")) else { return };
    let seen = Seen::default();
    let servers = Mutex::new(Vec::new());
    let mut script = Script::new();
    script.extend([
        Do(
            "blockdev-add",
            json!({
                "driver": "nbd", "node-name": "n", "server": { "type": "unix", "path": "DIR/theirs" },
                "read-only": true, "x-dirty-bitmap": "qemu:dirty-bitmap:saved",
            }),
        ),
        serve(),
        export("n", json!({ "name": "disk" })),
        look(&seen, &["base:allocation"]),
        Meanwhile(Box::new(|peer: &Peer| {
            let uri = format!("nbd+unix:///disk?socket={}", peer.folder().join("nbd").display());
            let reads = ["-c", "read -P 3 0 64k", "-c", "read -P 2 128k 64k", "-c", "read -P 3 1M 128k"];
            // One that asks for pieces of which holes are left out, in one read of all of it.
            let copy = peer.folder().join("copy");
            let copied =
                Command::new("nbdcopy").args(["--request-size=2097152", &uri]).arg(&copy).output().unwrap();
            assert!(copied.status.success(), "{copied:?}");
            for disk in [uri.as_str(), copy.to_str().unwrap()] {
                let output =
                    Command::new("qemu-io").args(["-r", "-f", "raw", disk]).args(reads).output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout);
                assert!(output.status.success() && !text.contains("failed"), "{disk}: {text}");
            }
        })),
    ]);
    compare_on(&script, |peer| {
        make_images(peer.folder());
        let socket = peer.folder().join("theirs");
        let mut command = Command::new(&qemu_nbd);
        command.args(["-t", "-r", "-e", "0", "-f", "qcow2", "-B", "saved", "-k"]).arg(&socket);
        let mut server =
            common::process::Daemon::start(command.arg(peer.folder().join("top.qcow2"))).unwrap();
        server.listens(&socket).unwrap();
        servers.lock().unwrap().push(server);
    });
    let maps = seen.lock().unwrap();
    let [ours, theirs] = &maps[..] else { panic!("{} looks", maps.len()) };
    assert_eq!(ours, theirs);
    assert!(ours[1].to_string().contains(r#""description":"hole""#), "{ours:?}");
}
