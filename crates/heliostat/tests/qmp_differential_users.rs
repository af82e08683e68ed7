//! Who may use a node beside whom: each use of a node, and what is asked of it then, beside `qemu-storage-daemon`.
//!
//! Where QEMU refuses, ours refuses in the same words, but for one thing: a disk that clients are connected to may be
//! made longer (`resize.rs` says what that means for them). Where QEMU allows, ours may refuse, for one reason: two nodes
//! never show the same bytes where one of them may be written, because a mirror or a bitmap of the one would not hear
//! of what comes by the other.

mod common;
mod qmp;

use common::qcow2::{qemu_img, try_qemu_img};
use qmp::Peer;
use qmp::transcript::Step::{self, Do};
use qmp::transcript::{Script, run};
use serde_json::{Value, json};

/// What somebody does with the node, `N` its name, `P` a name for itself.
const USES: [(&str, &[(&str, &str)]); 9] = [
    ("nobody", &[]),
    ("a reader", &[("block-export-add", r#"{"type":"nbd","id":"P","name":"P","node-name":"N"}"#)]),
    (
        "a writer",
        &[("block-export-add", r#"{"type":"nbd","id":"P","name":"P","node-name":"N","writable":true}"#)],
    ),
    (
        "a mirror of it",
        &[("blockdev-mirror", r#"{"job-id":"P","device":"N","target":"N-t1","sync":"none"}"#)],
    ),
    (
        "a mirror to it",
        &[("blockdev-mirror", r#"{"job-id":"P","device":"N-t1","target":"N","sync":"none"}"#)],
    ),
    ("a window", &[("blockdev-add", r#"{"driver":"raw","node-name":"P","file":"N"}"#)]),
    (
        "a reader's window",
        &[("blockdev-add", r#"{"driver":"raw","node-name":"P","file":"N","read-only":true}"#)],
    ),
    (
        "an overlay",
        &[(
            "blockdev-add",
            r#"{"driver":"qcow2","node-name":"P","file":{"driver":"file","filename":"DIR/N-o1"},"backing":"N"}"#,
        )],
    ),
    (
        "a writer and a mirror of it",
        &[
            ("block-export-add", r#"{"type":"nbd","id":"P","name":"P","node-name":"N","writable":true}"#),
            ("blockdev-mirror", r#"{"job-id":"P","device":"N","target":"N-t1","sync":"none"}"#),
        ],
    ),
];

/// What is asked then, `Q` a name for that.
const QUESTIONS: [(&str, &str); 11] = [
    ("blockdev-del", r#"{"node-name":"N"}"#),
    ("block_resize", r#"{"node-name":"N","size":2097152}"#),
    ("block-export-add", r#"{"type":"nbd","id":"Q","name":"Q","node-name":"N"}"#),
    ("block-export-add", r#"{"type":"nbd","id":"Q","name":"Q","node-name":"N","writable":true}"#),
    ("blockdev-mirror", r#"{"job-id":"Q","device":"N","target":"N-t2","sync":"none"}"#),
    ("blockdev-mirror", r#"{"job-id":"Q","device":"N-t2","target":"N","sync":"none"}"#),
    ("blockdev-add", r#"{"driver":"raw","node-name":"Q","file":"N"}"#),
    (
        "blockdev-add",
        r#"{"driver":"qcow2","node-name":"Q","file":{"driver":"file","filename":"DIR/N-o2"},"backing":"N"}"#,
    ),
    ("blockdev-snapshot", r#"{"node":"N","overlay":"N-ov"}"#),
    ("blockdev-snapshot-sync", r#"{"node-name":"N","snapshot-file":"DIR/N-new","snapshot-node-name":"Q"}"#),
    ("drive-mirror", r#"{"job-id":"Q","device":"N","target":"DIR/N-new","sync":"full"}"#),
];

fn case(node: &str, command: &'static str, arguments: &str) -> Step {
    let text = arguments
        .replace("\"N\"", &format!("\"{node}\""))
        .replace("\"P\"", &format!("\"{node}-p\""))
        .replace("\"Q\"", &format!("\"{node}-q\""))
        .replace("N-", &format!("{node}-"));
    Do(command, serde_json::from_str(&text).expect("JSON"))
}

fn script(driver: &str, (_, uses): (&str, &[(&'static str, &str)])) -> Script {
    let mut script =
        vec![Do("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } }))];
    for (index, (command, arguments)) in QUESTIONS.iter().enumerate() {
        let node = format!("n{index}");
        let file = |name: &str| json!({ "driver": "file", "filename": format!("DIR/{name}") });
        let mut add = |name: &str, driver: &str| {
            let mut options = file(name);
            if driver != "file" {
                options = json!({ "driver": driver, "file": options });
            }
            options["node-name"] = json!(name);
            script.push(Do("blockdev-add", options));
        };
        add(&node, driver);
        add(&format!("{node}-t1"), "file");
        add(&format!("{node}-t2"), "file");
        add(&format!("{node}-ov"), "qcow2");
        script.extend(uses.iter().map(|(command, arguments)| case(&node, command, arguments)));
        script.push(case(&node, command, arguments));
    }
    script
}

fn furnish(peer: &Peer, driver: &str) {
    let template = |name: &str| qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", name, "1M"]);
    template("image");
    let image = std::fs::read(peer.folder().join("image")).expect("it was made");
    for index in 0..QUESTIONS.len() {
        for (name, is_image) in [
            ("", driver == "qcow2"),
            ("-t1", false),
            ("-t2", false),
            ("-ov", true),
            ("-o1", true),
            ("-o2", true),
        ] {
            let path = peer.folder().join(format!("n{index}{name}"));
            if is_image {
                std::fs::write(path, &image).expect("the folder is writable");
            } else {
                std::fs::write(path, vec![7; 1 << 20]).expect("the folder is writable");
            }
        }
    }
}

/// Says why ours may answer otherwise; `None` where it may not.
fn excuse(theirs: &Value, ours: &Value) -> Option<&'static str> {
    let refusal = |reply: &Value| reply["error"]["desc"].as_str().map(str::to_owned);
    match (refusal(theirs), refusal(ours)) {
        (Some(theirs), None) if theirs.contains("permissions 'resize' are both required") => {
            Some("clients' disks may grow")
        }
        (None, Some(ours)) => {
            let same_bytes =
                ["is in use", "is used as backing hd of", "is not all of a file", "Permission conflict"];
            same_bytes.iter().any(|text| ours.contains(text)).then_some("two ways to the same bytes")
        }
        _ => None,
    }
}

#[test]
fn whoever_uses_a_node_keeps_others_from_it_in_the_same_words() {
    if try_qemu_img(std::path::Path::new("."), &["--version"]).is_none() {
        return;
    }
    let mut wrong = Vec::new();
    for driver in ["file", "qcow2"] {
        for uses in USES {
            // A window of an image is not there at all.
            if driver == "qcow2" && uses.0.contains("window") {
                continue;
            }
            let script = script(driver, uses);
            let Some(qemu) = Peer::qemu() else { return };
            let [theirs, ours] = [qemu, Peer::ours()].map(|peer| {
                furnish(&peer, driver);
                run(&peer, &script).replies
            });
            for ((asked, theirs), (_, ours)) in theirs.iter().zip(&ours) {
                let parsed = |reply: &str| serde_json::from_str::<Value>(reply).expect("a reply");
                if theirs != ours && excuse(&parsed(theirs), &parsed(ours)).is_none() {
                    wrong.push(format!("{} of {driver}: {asked}\n  qemu: {theirs}\n  ours: {ours}", uses.0));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
