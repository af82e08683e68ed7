//! As `qmp_differential.rs`, for `blockdev-reopen`. An empty list is not among what is said, nor the same node twice:
//! QEMU's daemon aborts, or hangs later.

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::Peer;
use qmp::transcript::Step::{self, Await, Differs, Do, Meanwhile};
use qmp::transcript::{Script, compare_on};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn compare(script: &Script) {
    let folder = common::folder();
    if try_qemu_img(folder.path(), &["--version"]).is_none() {
        return;
    }
    compare_on(script, |peer| {
        for name in ["r", "r2", "r3"] {
            peer.image(name, SIZE);
        }
        let create = |arguments: &[&str]| {
            qemu_img(peer.folder(), &[&["create", "-q", "-f", "qcow2"], arguments].concat());
        };
        for name in ["b", "b2"] {
            create(&[name, "1M"]);
        }
        create(&["-b", "b", "-F", "qcow2", "s"]);
        create(&["-b", "b2", "-F", "qcow2", "t"]);
    });
}

fn with(mut options: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    options
}

fn file(name: &str, more: Value) -> Value {
    with(json!({ "driver": "file", "node-name": name, "filename": format!("DIR/{name}") }), &more)
}

fn image(more: Value) -> Value {
    with(json!({ "driver": "qcow2", "node-name": "i", "file": "s" }), &more)
}

fn add(options: Value) -> Step {
    Do("blockdev-add", options)
}

fn reopen(options: &[Value]) -> Step {
    Do("blockdev-reopen", json!({ "options": options }))
}

fn list() -> Step {
    Do("query-named-block-nodes", json!({ "flat": true }))
}

fn start() -> Script {
    let below = |name: &str, file_name: &str| {
        json!({
            "driver": "qcow2", "node-name": name, "read-only": true,
            "file": { "driver": "file", "filename": format!("DIR/{file_name}"), "node-name": format!("{name}-f") },
        })
    };
    vec![
        add(file("r", json!({}))),
        add(file("r2", json!({}))),
        add(file("s", json!({}))),
        add(below("below", "b")),
        add(below("below2", "b2")),
        add(image(json!({ "backing": "below" }))),
    ]
}

#[test]
fn options_of_files_are_changed_and_refused_alike() {
    let mut script = start();
    script.extend([
        Do("blockdev-reopen", json!({})),
        Do("blockdev-reopen", json!({ "options": {} })),
        Do("blockdev-reopen", json!({ "options": [5] })),
        reopen(&[json!({ "driver": "file" })]),
        reopen(&[file("zz", json!({}))]),
        reopen(&[json!({ "driver": "file", "filename": "DIR/r" })]),
        reopen(&[file("r", json!({ "zork": 1 }))]),
        reopen(&[file("r", json!({ "filename": "DIR/r2" }))]),
        reopen(&[file("r", json!({}))]),
        reopen(&[file("r", json!({ "read-only": true }))]),
        list(),
        reopen(&[file("r", json!({}))]),
        reopen(&[file("r", json!({ "discard": "unmap" }))]),
        reopen(&[file("r", json!({ "discard": "unmap", "detect-zeroes": "unmap" }))]),
        list(),
        reopen(&[file("r", json!({ "detect-zeroes": "on" })), file("r2", json!({ "read-only": true }))]),
        list(),
        reopen(&[file("r", json!({})), file("zz", json!({}))]),
        list(),
        reopen(&[file("r", json!({})), file("r2", json!({}))]),
        reopen(&[file("r", json!({ "cache": { "no-flush": true } }))]),
        list(),
        reopen(&[image(json!({ "backing": "below", "cache": { "no-flush": true, "direct": true } }))]),
        list(),
        reopen(&[file("r", json!({})), image(json!({ "backing": "below" }))]),
        list(),
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        Do("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "r", "writable": true })),
        reopen(&[file("r", json!({ "read-only": true }))]),
        reopen(&[file("r", json!({ "discard": "unmap" }))]),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "r", "target": "r2", "sync": "none" })),
        Await("BLOCK_JOB_READY", "j"),
        reopen(&[file("r2", json!({ "read-only": true }))]),
        reopen(&[file("r2", json!({ "discard": "unmap" }))]),
        Do("job-cancel", json!({ "id": "j" })),
        Await("null", "j"),
    ]);
    compare(&script);
}

#[test]
fn the_page_cache_is_passed_by_and_used_again_under_a_guest_alike() {
    let guest = |command: &'static str| {
        Meanwhile(Box::new(move |peer: &Peer| {
            let uri = format!("nbd+unix:///w?socket={}", peer.folder().join("nbd").display());
            let mut command_line = std::process::Command::new("qemu-io");
            let output =
                command_line.args(["-f", "raw", "-c", command, &uri]).output().expect("qemu-io is there");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && !said.contains("failed"), "{command}: {output:?}");
        }))
    };
    let direct = |direct: bool| json!({ "cache": { "direct": direct } });
    let window = json!({ "driver": "raw", "node-name": "w", "file": "r" });
    let mut script = start();
    script.extend([
        Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
        add(window),
        Do("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "w", "writable": true })),
        guest("write -P 5 1000 5000"),
        reopen(&[file("r", direct(true))]),
        list(),
        guest("read -P 5 1000 5000"),
        guest("write -P 6 3000 70000"),
        reopen(&[file("s", direct(true)), file("r", direct(true))]),
        reopen(&[file("zz", direct(false)), file("s", direct(false))]),
        reopen(&[file("s", direct(false)), file("r", json!({ "cache": { "direct": 1 } }))]),
        list(),
        reopen(&[file("s", json!({ "cache": { "no-flush": true } }))]),
        list(),
        guest("read -P 6 3000 70000"),
        reopen(&[file("s", json!({})), file("r", json!({}))]),
    ]);
    compare(&script);
}

#[test]
fn what_an_image_stands_on_is_changed_and_refused_alike() {
    let mut script = start();
    script.extend([
        reopen(&[image(json!({}))]),
        reopen(&[image(json!({ "backing": "below" }))]),
        reopen(&[image(json!({ "backing": null }))]),
        list(),
        Do("blockdev-del", json!({ "node-name": "below" })),
        reopen(&[image(json!({}))]),
        reopen(&[image(json!({ "backing": "below2" }))]),
        list(),
        Do("blockdev-del", json!({ "node-name": "below2" })),
        reopen(&[image(json!({ "backing": "i" }))]),
        reopen(&[image(json!({ "backing": "zz" }))]),
        reopen(&[image(json!({ "backing": { "driver": "null-co" } }))]),
        reopen(&[image(json!({ "backing": "below2", "read-only": true }))]),
        list(),
        reopen(&[image(json!({ "backing": "below2", "l2-cache-size": 1 << 20 }))]),
        reopen(&[json!({ "driver": "qcow2", "node-name": "i" })]),
        reopen(&[image(json!({ "backing": "below2", "file": { "driver": "file", "filename": "DIR/s" } }))]),
    ]);
    compare(&script);
}

#[test]
fn a_mirrors_target_is_given_what_it_stands_on_before_the_pivot_alike() {
    let target =
        |backing: Value| json!({ "driver": "qcow2", "node-name": "t", "file": "tf", "backing": backing });
    let snapshot = Do("blockdev-snapshot", json!({ "node": "below2", "overlay": "t" }));
    for give in [reopen(&[target(json!("below2"))]), snapshot] {
        let mut script = start();
        script.extend([
            add(json!({ "driver": "file", "node-name": "tf", "filename": "DIR/t" })),
            add(target(json!(null))),
            Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } })),
            Do("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "i", "writable": true })),
            Do("blockdev-mirror", json!({ "job-id": "j", "device": "i", "target": "t", "sync": "top" })),
            Await("BLOCK_JOB_READY", "j"),
            give,
            Do("blockdev-del", json!({ "node-name": "below2" })),
            Do("block-job-complete", json!({ "device": "j" })),
            Await("null", "j"),
            Do("query-block-exports", json!({})),
            Do("blockdev-del", json!({ "node-name": "below2" })),
            Do("blockdev-del", json!({ "node-name": "i" })),
            Do("blockdev-del", json!({ "node-name": "below" })),
        ]);
        compare(&script);
    }
}

#[test]
fn where_ours_is_stricter_it_is_so_on_purpose() {
    let mut script = start();
    let differs = |options: Value, why| Differs("blockdev-reopen", json!({ "options": [options] }), why);
    script.extend([
        differs(image(json!({ "backing": "below", "file": "r" })), "the bytes of an image are its file's"),
        Do("blockdev-mirror", json!({ "job-id": "j", "device": "i", "target": "r2", "sync": "none" })),
        Await("BLOCK_JOB_READY", "j"),
        differs(image(json!({ "backing": null })), "what a mirror copies would change without a mark"),
    ]);
    compare_replies(&script);
}

/// The replies alone: what is answered otherwise leads elsewhere.
fn compare_replies(script: &Script) {
    let Some(qemu) = qmp::Peer::qemu() else { return };
    let [theirs, ours] = [qemu, qmp::Peer::ours()].map(|peer| {
        peer.image("r", SIZE);
        peer.image("r2", SIZE);
        for name in ["b", "b2", "s"] {
            qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", name, "1M"]);
        }
        qmp::transcript::run(&peer, script)
    });
    let steps = script.iter().filter(|step| matches!(step, Do(..) | Differs(..)));
    for ((step, theirs), ours) in steps.zip(&theirs.replies).zip(&ours.replies) {
        assert_eq!(theirs != ours, matches!(step, Differs(..)), "qemu: {theirs:?}\nours: {ours:?}");
    }
}
