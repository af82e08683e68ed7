//! `BLOCK_IMAGE_CORRUPTED`: said once of an image that contradicts itself, with QEMU's fields; the words of `msg` are ours,
//! and so is where it is noticed: before a table is overwritten, QEMU's and ours see different things first.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::qcow2::{qemu_img, qemu_io, try_qemu_img};
use common::qmp::Qmp;
use common::{tool, wait};
use qmp::Peer;
use serde_json::{Value, json};

fn number(bytes: &[u8], at: usize) -> usize {
    let word = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    usize::try_from(word & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Damages an image.
type Bend = fn(&mut [u8]);

/// The first L1 entry leads into the middle of a cluster.
fn bend_l1(bytes: &mut [u8]) {
    let l1 = number(bytes, 40);
    bytes[l1 + 6] |= 2;
}

/// So does the first L2 entry.
fn bend_l2(bytes: &mut [u8]) {
    let l2 = number(bytes, number(bytes, 40));
    bytes[l2 + 6] |= 2;
}

/// What one daemon says of an image that is read, written and written once more by an NBD client.
fn said(peer: &Peer, bend: Bend, options: &str, read_only: bool) -> Vec<Value> {
    let folder = peer.folder();
    qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, "image", "1M"]);
    qemu_io(folder, "image", &["write -P 3 0 64k"]);
    let mut bytes = fs::read(folder.join("image")).unwrap();
    bend(&mut bytes);
    fs::write(folder.join("image"), bytes).unwrap();
    let mut qmp = Qmp::connect(&peer.socket()).unwrap();
    let file = json!({ "driver": "file", "filename": folder.join("image") });
    let node = json!({ "driver": "qcow2", "node-name": "n", "read-only": read_only, "file": file });
    qmp.execute("blockdev-add", node).unwrap();
    let address = json!({ "type": "unix", "data": { "path": folder.join("nbd") } });
    qmp.execute("nbd-server-start", json!({ "addr": address })).unwrap();
    let export = json!({ "type": "nbd", "id": "e", "name": "e", "node-name": "n", "writable": !read_only });
    qmp.execute("block-export-add", export).unwrap();
    guest(folder, read_only);
    guest(folder, read_only);
    qmp.execute("nbd-server-stop", json!({})).unwrap();
    // Said after everything else.
    let mut events = qmp.events_until("BLOCK_EXPORT_DELETED", wait::LIMIT).unwrap();
    events.retain(|event| event["event"] == "BLOCK_IMAGE_CORRUPTED");
    events
}

/// A client that reads, and writes where it may, and gets errors.
fn guest(folder: &Path, read_only: bool) {
    let mut command = Command::new(tool("qemu-io").unwrap());
    command.args(["-f", "raw", "-c", "read 0 4k", "-c"]);
    command.args(if read_only { &["read 0 4k", "-r"][..] } else { &["write 0 4k"] });
    let uri = format!("nbd+unix:///e?socket={}", folder.join("nbd").display());
    let output = command.arg(uri).output().unwrap();
    let text = format!("{output:?}");
    assert!(text.contains("failed"), "{text}");
}

/// The fields that QEMU's event has too, with what they say but for the words.
fn fields(event: &Value) -> Value {
    let mut data = event["data"].clone();
    assert!(data["msg"].as_str().is_some_and(|text| !text.is_empty()), "{event}");
    data["msg"] = json!("");
    data
}

fn has_tools() -> bool {
    try_qemu_img(&std::env::temp_dir(), &["--version"]).is_some()
}

#[test]
fn a_corruption_is_told_of_once_with_the_fields_that_qemu_has() {
    if !has_tools() {
        return;
    }
    let table: [(Bend, &str, bool); 5] = [
        (bend_l1, "compat=1.1", true),
        (bend_l2, "compat=1.1", true),
        (bend_l1, "compat=1.1", false),
        (bend_l2, "compat=1.1", false),
        (bend_l2, "compat=0.10", false),
    ];
    for (bend, options, read_only) in table {
        let Some(qemu) = Peer::qemu() else { return };
        let theirs = said(&qemu, bend, options, read_only);
        let ours = said(&Peer::ours(), bend, options, read_only);
        assert_eq!(ours.len(), 1, "{ours:?}");
        let [ours, theirs] = [ours, theirs].map(|events| events.iter().map(fields).collect::<Vec<_>>());
        assert_eq!(ours, theirs, "{options} {read_only}: left: ours, right: qemu");
    }
}

/// The first L2 entry leads to the L1 table, so that a write in place would destroy it.
fn bend_onto_l1(bytes: &mut [u8]) {
    let l1 = number(bytes, 40);
    let l2 = number(bytes, l1);
    let entry = u64::try_from(l1).unwrap() | 1 << 63;
    bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
}

#[test]
fn a_write_that_would_destroy_a_table_is_told_of_with_its_place() {
    if !has_tools() {
        return;
    }
    let ours = said(&Peer::ours(), bend_onto_l1, "compat=1.1", false);
    let [event] = &ours[..] else { panic!("one event, not {ours:?}") };
    let data = &event["data"];
    assert_eq!(
        (&data["fatal"], &data["device"], &data["node-name"]),
        (&json!(true), &json!(""), &json!("n"))
    );
    assert!(data["msg"].as_str().unwrap().starts_with("Preventing invalid write on metadata"), "{event}");
    let place = data["offset"].as_u64().unwrap();
    assert!(place <= 0x30000 && place + data["size"].as_u64().unwrap() > 0x30000, "{event}");
}
