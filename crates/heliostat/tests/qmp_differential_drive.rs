//! As `qmp_differential.rs`, for `drive-mirror`: what its arguments mean, and how its target comes and goes.

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::transcript::Step::{self, Await, Differs, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

/// The images of both folders, and the paths of targets that are made, which go before each mirror.
fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        for name in ["s.raw", "e.raw", "busy.raw", "b.raw"] {
            peer.image(name, SIZE);
        }
        peer.image("small.raw", SIZE / 2);
        let create = |arguments: &[&str]| {
            qemu_img(peer.folder(), &[&["create", "-q", "-f", "qcow2"], arguments].concat());
        };
        create(&["-b", "b.raw", "-F", "raw", "c.qcow2"]);
        create(&["-b", "b.raw", "-F", "raw", "eb.qcow2"]);
        create(&["e.qcow2", "1M"]);
        create(&["-u", "-b", "none.raw", "-F", "raw", "en.qcow2", "1M"]);
    });
}

fn add(node: &str, driver: &str, image: &str) -> Step {
    let file = json!({ "driver": "file", "filename": format!("DIR/{image}") });
    Do("blockdev-add", json!({ "driver": driver, "node-name": node, "file": file }))
}

fn start() -> Script {
    vec![
        add("s", "raw", "s.raw"),
        add("c", "qcow2", "c.qcow2"),
        Do("blockdev-add", json!({ "driver": "file", "node-name": "f", "filename": "DIR/busy.raw" })),
        Do("blockdev-add", json!({ "driver": "raw", "node-name": "above", "file": "f" })),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        export("s"),
        export("c"),
    ]
}

fn export(node: &str) -> Step {
    Do(
        "block-export-add",
        json!({ "type": "nbd", "id": format!("of-{node}"), "node-name": node, "name": node, "writable": true }),
    )
}

/// A mirror of `s` to a new file, with some arguments changed.
fn arguments(changes: &Value) -> Value {
    let mut arguments = json!({ "job-id": "j", "device": "s", "target": "DIR/t", "sync": "full" });
    for (key, value) in changes.as_object().into_iter().flatten() {
        arguments[key] = value.clone();
    }
    arguments
}

/// A mirror of the chain.
fn of_chain(changes: &Value) -> Value {
    let mut arguments = arguments(changes);
    arguments["device"] = json!("c");
    arguments
}

/// QEMU leaves what it has made when it finds the next argument wrong.
fn clean() -> Step {
    Meanwhile(Box::new(|peer| {
        // There is none where nothing was made.
        let _ = std::fs::remove_file(peer.folder().join("t"));
    }))
}

fn cancelled() -> [Step; 3] {
    [Await("BLOCK_JOB_READY", "j"), Do("job-cancel", json!({ "id": "j" })), Await("null", "j")]
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn exports() -> Step {
    Do("query-block-exports", json!({}))
}

fn wrong() -> Vec<Value> {
    vec![
        json!({ "device": "zz" }),
        json!({ "device": "f" }),
        json!({ "sync": "bitmap" }),
        json!({ "sync": "none", "format": "raw" }),
        json!({ "format": "nofmt" }),
        json!({ "format": "null-co" }),
        json!({ "target": "DIR/none/t" }),
        json!({ "target": "DIR/s.raw/t" }),
        json!({ "target": "DIR" }),
        json!({ "target": "" }),
        json!({ "target": "json:{}" }),
        json!({ "target": "null-co://" }),
        json!({ "target": "blkdebug::DIR/t" }),
        json!({ "target": "zork:x" }),
        json!({ "replaces": "s" }),
        json!({ "replaces": "zz", "node-name": "tt" }),
        json!({ "replaces": "c", "node-name": "tt" }),
        json!({ "node-name": "s" }),
        json!({ "node-name": "#x" }),
        json!({ "node-name": "x2345678901234567890123456789012" }),
        json!({ "granularity": 100 }),
        json!({ "granularity": 1000 }),
        json!({ "buf-size": -1 }),
        json!({ "speed": -1 }),
        json!({ "job-id": "1j" }),
        json!({ "job-id": "" }),
    ]
}

#[test]
fn every_wrong_argument_is_refused_alike_and_of_two_the_same() {
    let mut script = start();
    let wrong = wrong();
    for (index, one) in wrong.iter().enumerate() {
        for other in &wrong[index..] {
            let mut both = one.clone();
            for (key, value) in other.as_object().into_iter().flatten() {
                if both.get(key).is_none() {
                    both[key] = value.clone();
                }
            }
            // Replacing a node that exists, with the name of the target given, is no mistake.
            let is_right = both["replaces"] == "s" && both["node-name"] == "tt";
            if !is_right {
                script.extend([clean(), Do("drive-mirror", arguments(&both))]);
            }
        }
    }
    compare(&script);
}

#[test]
fn wrong_types_and_targets_that_exist_are_refused_alike() {
    let existing = |changes: Value| {
        let mut arguments = arguments(&json!({ "mode": "existing" }));
        for (key, value) in changes.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        Do("drive-mirror", arguments)
    };
    let mut script = start();
    for wrong in [
        json!({ "mode": "zz" }),
        json!({ "unmap": 5 }),
        json!({ "format": 5 }),
        json!({ "node-name": 5 }),
        json!({ "filter-node-name": "x" }),
        json!({ "bitmap": "x" }),
        json!({ "target-is-zero": true }),
        json!({ "target": 5 }),
    ] {
        script.push(Do("drive-mirror", arguments(&wrong)));
    }
    script.extend([
        existing(json!({ "target": "DIR/none" })),
        existing(json!({ "target": "DIR/none", "sync": "bitmap" })),
        existing(json!({ "target": "DIR/e.raw", "format": "nofmt" })),
        existing(json!({ "target": "DIR/e.raw", "format": "qcow2" })),
        existing(json!({ "target": "DIR/e.raw", "sync": "bitmap" })),
        existing(json!({ "target": "json:{" })),
        existing(json!({ "target": "json:[]" })),
        existing(json!({ "target": "json:{\"driver\":\"zz\"}" })),
        existing(json!({ "target": "zork://x" })),
        existing(json!({ "target": "DIR/small.raw" })),
        Await("null", "j"),
        existing(json!({ "target": "null-co://" })),
        Await("null", "j"),
    ]);
    compare(&script);
}

#[test]
fn a_new_target_comes_and_goes_alike() {
    let mut script = start();
    for changes in [
        json!({}),
        json!({ "format": "qcow2" }),
        json!({ "format": "file" }),
        json!({ "format": "qcow2", "node-name": "tt", "sync": "none" }),
        json!({ "sync": "top" }),
        json!({ "device": "c", "sync": "top", "node-name": "tt" }),
        json!({ "device": "c", "sync": "full", "format": "raw" }),
        json!({ "target": "file:DIR/t" }),
        json!({ "replaces": "s", "node-name": "tt" }),
    ] {
        script.extend([clean(), Do("drive-mirror", arguments(&changes))]);
        script.extend(cancelled());
        script.push(list());
    }
    compare(&script);
}

#[test]
fn an_existing_target_comes_and_goes_alike() {
    let mut script = start();
    for changes in [
        json!({ "target": "DIR/e.raw" }),
        json!({ "target": "DIR/e.qcow2" }),
        json!({ "target": "DIR/e.raw", "format": "raw", "node-name": "tt" }),
        json!({ "target": "DIR/e.qcow2", "format": "qcow2" }),
        json!({ "target": "blkdebug::DIR/e.raw" }),
        json!({ "target": "blkdebug::DIR/e.qcow2", "format": "qcow2" }),
        json!({ "target": "json:{\"driver\":\"file\",\"filename\":\"DIR/e.raw\"}" }),
        json!({ "target": "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"DIR/e.raw\"}}" }),
        json!({ "target": "json:{\"driver\":\"qcow2\",\"file.driver\":\"file\",\"file.filename\":\"DIR/e.qcow2\"}" }),
    ] {
        let mut arguments = arguments(&changes);
        arguments["mode"] = json!("existing");
        script.push(Do("drive-mirror", arguments));
        script.extend(cancelled());
    }
    script.push(list());
    compare(&script);
}

#[test]
fn what_the_target_stands_on_after_the_pivot_is_listed_alike() {
    let complete = || Do("block-job-complete", json!({ "device": "j" }));
    for (changes, mode) in [
        (json!({ "sync": "top", "node-name": "tt" }), "absolute-paths"),
        (json!({ "sync": "none", "node-name": "tt" }), "absolute-paths"),
        (json!({ "sync": "full", "node-name": "tt" }), "absolute-paths"),
        (
            json!({ "sync": "top", "node-name": "tt", "format": "qcow2", "target": "DIR/eb.qcow2" }),
            "existing",
        ),
    ] {
        let mut arguments = of_chain(&changes);
        arguments["mode"] = json!(mode);
        let mut script = start();
        script.extend([
            Do("drive-mirror", arguments),
            Await("BLOCK_JOB_READY", "j"),
            complete(),
            Await("null", "j"),
            exports(),
            Do("blockdev-del", json!({ "node-name": "tt" })),
            Do("block-export-del", json!({ "id": "of-c" })),
            Await("BLOCK_EXPORT_DELETED", "of-c"),
            exports(),
            Do("blockdev-del", json!({ "node-name": "tt" })),
            list(),
            Do("blockdev-del", json!({ "node-name": "c" })),
            list(),
        ]);
        compare(&script);
    }
}

#[test]
fn a_target_can_be_the_source_of_the_next_mirror_alike() {
    let mut script = start();
    for (device, target) in [("c", "t"), ("t1", "t2"), ("t2", "t3")] {
        let node = if target == "t" { "t1" } else { target };
        let arguments = json!({
            "job-id": "j", "device": device, "target": format!("DIR/{target}"), "node-name": node, "sync": "top",
        });
        script.extend([
            Do("drive-mirror", arguments),
            Await("BLOCK_JOB_READY", "j"),
            Do("block-job-complete", json!({ "device": "j" })),
            Await("null", "j"),
            exports(),
        ]);
    }
    script.push(Do("blockdev-del", json!({ "node-name": "c" })));
    compare(&script);
}

#[test]
fn where_ours_does_otherwise_it_does_so_on_purpose() {
    let existing =
        |target: &str| arguments(&json!({ "mode": "existing", "target": target, "format": "qcow2" }));
    let mut script = start();
    script.extend([
        Differs(
            "drive-mirror",
            json!({ "device": "of-s", "job-id": "1", "target": "DIR/t", "sync": "full" }),
            "an export's id names what it offers",
        ),
        Do("drive-mirror", existing("DIR/en.qcow2")),
        Await("BLOCK_JOB_READY", "j"),
        // Last: QEMU's job fails then, which it says in its log.
        Differs(
            "block-job-complete",
            json!({ "device": "j" }),
            "a completion for which something cannot be opened is refused, and the job stays ready",
        ),
    ]);
    let Some(qemu) = qmp::Peer::qemu() else { return };
    drop(qemu);
    compare_replies(&script);
}

/// The replies alone: what follows is not meant to be the same.
fn compare_replies(script: &Script) {
    let Some(qemu) = qmp::Peer::qemu() else { return };
    let [theirs, ours] = [qemu, qmp::Peer::ours()].map(|peer| {
        peer.image("s.raw", SIZE);
        peer.image("busy.raw", SIZE);
        peer.image("b.raw", SIZE);
        qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "-b", "b.raw", "-F", "raw", "c.qcow2"]);
        let options = ["create", "-q", "-f", "qcow2", "-u", "-b", "none.raw", "-F", "raw", "en.qcow2", "1M"];
        qemu_img(peer.folder(), &options);
        qmp::transcript::run(&peer, script)
    });
    let steps = script.iter().filter(|step| matches!(step, Do(..) | Differs(..)));
    for ((step, theirs), ours) in steps.zip(&theirs.replies).zip(&ours.replies) {
        assert_eq!(theirs != ours, matches!(step, Differs(..)), "qemu: {theirs:?}\nours: {ours:?}");
    }
}
