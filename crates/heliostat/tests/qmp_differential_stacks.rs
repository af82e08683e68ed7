//! Nodes on nodes beside QEMU's: what a guest reads and writes through a stack, and what is in the images then; and
//! requests that are held up in the middle, which only ours can be told over QMP.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use common::qcow2::{assert_sound, qemu_img};
use qmp::Peer;
use qmp::guest::is_told;
use qmp::wire::Wire;
use serde_json::{Value, json};

/// Bytes in a cluster, where nothing is said.
const CLUSTER: u64 = 64 << 10;

fn execute(peer: &Peer, wire: &mut Wire, command: &str, arguments: &Value) -> Value {
    let text = arguments.to_string().replace("DIR", &peer.folder().to_string_lossy());
    let reply = wire.execute(command, &serde_json::from_str(&text).unwrap());
    assert!(reply.get("error").is_none(), "{command} {arguments}: {reply}");
    reply["return"].clone()
}

fn serve(peer: &Peer, wire: &mut Wire) {
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    execute(peer, wire, "nbd-server-start", &address);
    let export = json!({ "type": "nbd", "id": "e", "node-name": "n", "name": "n", "writable": true });
    execute(peer, wire, "block-export-add", &export);
}

/// What a guest is told; the daemon ends afterwards.
fn life(peer: &Peer, setup: &[(&str, Value)], requests: &[&str]) -> String {
    let mut wire = Wire::negotiated(&peer.socket());
    for (command, arguments) in setup {
        execute(peer, &mut wire, command, arguments);
    }
    serve(peer, &mut wire);
    let told = is_told(peer, requests);
    execute(peer, &mut wire, "quit", &json!({}));
    told
}

/// In which layer each cluster of the image `q` is, and its bytes.
fn layout(peer: &Peer) -> (Vec<u64>, Vec<u8>) {
    assert_sound(peer.folder(), "q");
    let map = qemu_img(peer.folder(), &["map", "--output=json", "-f", "qcow2", "q"]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let mut depths = Vec::new();
    for part in map.as_array().unwrap() {
        let number = |key: &str| part[key].as_u64().unwrap();
        let end = number("start") + number("length");
        while u64::try_from(depths.len()).unwrap() * CLUSTER < end {
            // What no layer has reads as zero, from wherever that is said.
            depths.push(if part["present"] == true { number("depth") } else { u64::MAX });
        }
    }
    qemu_img(peer.folder(), &["convert", "-f", "qcow2", "-O", "raw", "q", "flat"]);
    (depths, std::fs::read(peer.folder().join("flat")).unwrap())
}

fn compare(furnish: impl Fn(&Peer), setup: &[(&str, Value)], requests: &[&str]) {
    if common::tool("qemu-io").is_none() || common::tool("qemu-img").is_none() {
        return;
    }
    let Some(qemu) = Peer::qemu() else { return };
    let [theirs, ours] = [qemu, Peer::ours()].map(|mut peer| {
        furnish(&peer);
        let told = life(&peer, setup, requests);
        let ended = common::wait::until("the daemon's end", common::wait::LIMIT, || {
            (!peer.process().is_running().unwrap()).then_some(())
        });
        ended.unwrap();
        (told, layout(&peer))
    });
    assert_eq!((&ours.0, &ours.1.0), (&theirs.0, &theirs.1.0), "left: ours, right: qemu");
    assert!(ours.1.1 == theirs.1.1, "the bytes differ");
}

fn file(name: &str) -> Value {
    json!({ "driver": "file", "filename": format!("DIR/{name}"), "discard": "unmap" })
}

#[test]
fn a_window_of_a_throttled_image_on_an_injector_reads_as_it_is_written() {
    let below = json!({ "driver": "blkdebug", "image": file("q"), "align": 4096, "discard": "unmap" });
    let image = json!({ "driver": "qcow2", "file": below, "discard": "unmap" });
    let throttled = json!({ "driver": "throttle", "throttle-group": "g", "file": image, "discard": "unmap" });
    let window = json!({
        "driver": "raw", "node-name": "n", "file": throttled, "offset": 65536, "size": 524_288,
        "discard": "unmap",
    });
    let limits = json!({ "iops-total": 10_000, "bps-total": 1 << 30 });
    let group = json!({ "qom-type": "throttle-group", "id": "g", "limits": limits });
    compare(
        |peer| {
            qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "q", "1M"]);
        },
        &[("object-add", group), ("blockdev-add", window)],
        &[
            "length",
            "write -P 1 0 4k",
            "write -P 2 100k 200k",
            "write -P 3 500 1k",
            "read -P 1 0 500",
            "read -P 3 500 1k",
            "read -P 2 100k 200k",
            "write -zu 128k 64k",
            "read -P 0 128k 64k",
            "discard 192k 64k",
            "write -P 4 510k 2k",
            "write 511k 2k",
            "flush",
        ],
    );
}

/// A chain of three: `base` with data all over, `mid` with some, `q` with none.
fn chain(peer: &Peer) {
    peer.image("base", 1 << 20);
    let make = |image: &str, on: &str, format: &str| {
        qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "-b", on, "-F", format, image]);
    };
    make("mid", "base", "raw");
    common::qcow2::qemu_io(peer.folder(), "mid", &["write -P 5 256k 128k", "write -z 512k 64k"]);
    make("q", "mid", "qcow2");
}

fn copy_on_read(more: &Value) -> Value {
    let base = json!({ "driver": "raw", "read-only": true, "file": {
        "driver": "file", "filename": "DIR/base", "read-only": true,
    } });
    let mid = json!({
        "driver": "qcow2", "node-name": "mid", "read-only": true, "backing": base,
        "file": { "driver": "file", "filename": "DIR/mid", "read-only": true },
    });
    let top = json!({ "driver": "qcow2", "file": file("q"), "backing": mid });
    let mut options = json!({ "driver": "copy-on-read", "node-name": "n", "file": top });
    for (key, value) in more.as_object().into_iter().flatten() {
        options[key] = value.clone();
    }
    options
}

/// What reads as zero is not among them: QEMU's server asks for the layout first and does not read it.
const READS: &[&str] =
    &["read 0 4k", "read -P 5 300k 4k", "read 200k 100k", "write -P 9 128k 1k", "read 128k 64k"];

#[test]
fn what_is_read_from_below_is_kept_alike() {
    compare(chain, &[("blockdev-add", copy_on_read(&json!({})))], READS);
}

#[test]
fn what_is_below_the_bottom_is_not_kept() {
    compare(chain, &[("blockdev-add", copy_on_read(&json!({ "bottom": "mid" })))], READS);
}

fn by_hand(peer: &Peer, wire: &mut Wire, line: &str) -> String {
    let said = execute(peer, wire, "human-monitor-command", &json!({ "command-line": line }));
    said.as_str().unwrap().to_owned()
}

/// Waits until the list of jobs is as wanted.
fn until_jobs(wire: &mut Wire, are: fn(&Value) -> bool) {
    let asked = || are(&wire.execute("query-block-jobs", &json!({}))["return"]).then_some(());
    common::wait::until("the job", common::wait::LIMIT, asked).unwrap();
}

#[test]
fn a_guest_goes_on_while_a_request_is_held_up_and_a_copy_of_it_waits() {
    if common::tool("qemu-io").is_none() {
        return;
    }
    let peer = Peer::ours();
    peer.image("s", 128 << 10);
    std::fs::File::create(peer.folder().join("t")).unwrap().set_len(128 << 10).unwrap();
    let mut wire = Wire::negotiated(&peer.socket());
    let target = json!({ "driver": "blkdebug", "node-name": "t", "image": file("t"), "discard": "unmap" });
    let source = json!({ "driver": "raw", "node-name": "n", "file": file("s") });
    execute(&peer, &mut wire, "blockdev-add", &source);
    execute(&peer, &mut wire, "blockdev-add", &target);
    serve(&peer, &mut wire);
    assert_eq!(by_hand(&peer, &mut wire, r#"qemu-io t "break pwritev A""#), "");
    let job = json!({ "job-id": "j", "device": "n", "target": "t", "sync": "full" });
    execute(&peer, &mut wire, "blockdev-mirror", &job);
    assert_eq!(by_hand(&peer, &mut wire, r#"qemu-io t "wait_break A""#), "");
    let told = is_told(&peer, &["write -P 7 0 64k", "read -P 7 0 64k"]);
    assert_eq!(told, "wrote 65536/65536 bytes at offset 0|read 65536/65536 bytes at offset 0 true");
    assert_eq!(by_hand(&peer, &mut wire, r#"qemu-io t "resume A""#), "");
    // Asked, as an event may come before the reply to what led to it, which is passed over then.
    until_jobs(&mut wire, |jobs| jobs[0]["ready"] == true);
    execute(&peer, &mut wire, "job-complete", &json!({ "id": "j" }));
    until_jobs(&mut wire, |jobs| *jobs == json!([]));
    let read = |name: &str| std::fs::read(peer.folder().join(name)).unwrap();
    assert!(read("s") == read("t") && read("t")[0] == 7);
}

#[test]
fn a_command_of_the_human_monitor_answers_its_text() {
    let peer = Peer::ours();
    peer.image("s", 64 << 10);
    let mut wire = Wire::negotiated(&peer.socket());
    let mut node = file("s");
    node["node-name"] = json!("n");
    execute(&peer, &mut wire, "blockdev-add", &node);
    let mut said = |line: &str| by_hand(&peer, &mut wire, line);
    assert_eq!(said("zork 5"), "unknown command: 'zork'\r\n");
    assert_eq!(said("qemu-io zz \"length\""), "Error: Cannot find device='zz' nor node-name='zz'\r\n");
    assert_eq!(said("qemu-io n \"length\""), "64 KiB\r\n");
    assert!(
        said("qemu-io n \"write -P 7 0 4k\"")
            .starts_with("wrote 4096/4096 bytes at offset 0\r\n4 KiB, 1 ops; ")
    );
    assert_eq!(
        said("qemu-io n \"break write_aio A\""),
        "Could not set breakpoint: Operation not supported\r\n"
    );
    assert_eq!(std::fs::read(peer.folder().join("s")).unwrap()[..4096], [7; 4096]);
}

#[test]
fn a_write_beside_a_copy_of_what_is_read_is_not_overwritten_by_it() {
    if common::tool("qemu-img").is_none() {
        return;
    }
    let peer = Peer::ours();
    peer.image("base", 1 << 20);
    qemu_img(peer.folder(), &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "q"]);
    let base = json!({ "driver": "file", "filename": "DIR/base", "read-only": true });
    let image = json!({
        "driver": "qcow2", "file": file("q"), "backing": { "driver": "raw", "file": base, "read-only": true },
    });
    let below = json!({ "driver": "blkdebug", "image": image });
    let node = json!({ "driver": "copy-on-read", "node-name": "n", "file": below });
    let mut wire = Wire::negotiated(&peer.socket());
    execute(&peer, &mut wire, "blockdev-add", &node);
    let mut said = |line: &str| by_hand(&peer, &mut wire, &format!("qemu-io n \"{line}\""));
    said("break cor_write A");
    said("aio_read 0 4k");
    said("wait_break A");
    said("aio_write -P 9 4k 4k");
    said("resume A");
    let told = said("aio_flush");
    assert!(told.contains("wrote 4096/4096") && told.contains("read 4096/4096"), "{told}");
    assert!(!said("read -P 9 4k 4k").contains("failed"), "the copy came first, or the write did");
}
