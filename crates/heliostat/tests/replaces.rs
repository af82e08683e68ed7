//! A disk that moves below its filters while a guest writes to it: nothing that the guest was told is lost, nobody is
//! disconnected, and nothing is written to a disk that has been left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;
mod qmp;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::wait;
use heliostat_block::nbd::ReplyStyle;
use nbd::Guest;
use qmp::Peer;
use qmp::wire::Wire;
use serde_json::{Value, json};

const BLOCK: usize = 4096;
const BLOCKS: usize = 1024;

fn execute(peer: &Peer, wire: &mut Wire, command: &str, arguments: &Value) {
    let text = arguments.to_string().replace("DIR", &peer.folder().to_string_lossy());
    let reply = wire.execute(command, &serde_json::from_str(&text).unwrap());
    assert!(reply.get("error").is_none(), "{command} {arguments}: {reply}");
}

fn await_event(wire: &mut Wire, name: &str) -> Value {
    loop {
        let message = wire.next();
        if message["event"] == name {
            return message;
        }
    }
}

fn connect(peer: &Peer) -> Guest {
    let stream = UnixStream::connect(peer.folder().join("nbd")).unwrap();
    stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    Guest::new(stream, "s", ReplyStyle::Simple).unwrap()
}

/// Writes rounds of blocks, each with the number of its write in it, until it is told to stop. Answers what was last
/// acknowledged of each.
fn write_on(guest: &mut Guest, stop: &AtomicBool, written: &AtomicU64) -> Vec<u64> {
    let mut acknowledged = vec![0; BLOCKS];
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let round: Vec<_> = (0..16_usize)
            .map(|_| {
                number += 1;
                // Scattered, each block once a round, and some again and again.
                let block = usize::try_from(number * 769 % 1021).unwrap();
                (block, number, guest.send_write((block * BLOCK).try_into().unwrap(), &of(number)))
            })
            .collect();
        for (block, number, cookie) in round {
            guest.wait(cookie).unwrap();
            acknowledged[block] = number;
        }
        written.store(number, Ordering::Relaxed);
    }
    acknowledged
}

fn of(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

fn filters(peer: &Peer, wire: &mut Wire) {
    let group = json!({ "qom-type": "throttle-group", "id": "g" });
    execute(peer, wire, "object-add", &group);
    for options in [
        json!({ "driver": "file", "node-name": "low", "filename": "DIR/low" }),
        json!({ "driver": "blkdebug", "node-name": "m", "image": "low" }),
        json!({ "driver": "throttle", "node-name": "s", "file": "m", "throttle-group": "g" }),
    ] {
        execute(peer, wire, "blockdev-add", &options);
    }
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    execute(peer, wire, "nbd-server-start", &address);
    let export = json!({ "type": "nbd", "id": "e", "name": "s", "node-name": "s", "writable": true });
    execute(peer, wire, "block-export-add", &export);
}

#[test]
fn a_guest_writes_on_while_its_disk_moves_five_times_below_its_filters() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    peer.image("low", BLOCK * BLOCKS);
    filters(&peer, &mut wire);
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut guest = connect(&peer);
    let acknowledged = thread::scope(|scope| {
        let writer = scope.spawn(|| write_on(&mut guest, &stop, &written));
        let mut at = "low".to_owned();
        for (turn, mode) in ["background", "write-blocking"].into_iter().cycle().take(5).enumerate() {
            let name = format!("t{turn}");
            std::fs::File::create(peer.folder().join(&name))
                .unwrap()
                .set_len(u64::try_from(BLOCK * BLOCKS).unwrap())
                .unwrap();
            let target = json!({ "driver": "file", "node-name": name, "filename": format!("DIR/{name}") });
            execute(&peer, &mut wire, "blockdev-add", &target);
            let job = json!({
                "job-id": "j", "device": "s", "target": name, "sync": "full", "replaces": at, "copy-mode": mode,
            });
            execute(&peer, &mut wire, "blockdev-mirror", &job);
            await_event(&mut wire, "BLOCK_JOB_READY");
            execute(&peer, &mut wire, "job-complete", &json!({ "id": "j" }));
            let end = await_event(&mut wire, "BLOCK_JOB_COMPLETED");
            assert!(end["data"].get("error").is_none(), "{end}");
            execute(&peer, &mut wire, "blockdev-del", &json!({ "node-name": at }));
            // Nothing comes there any more.
            let left = peer.folder().join(&at);
            let before = std::fs::read(&left).unwrap();
            let so_far = written.load(Ordering::Relaxed);
            let goes_on = wait::until("the guest to go on", wait::LIMIT, || {
                (written.load(Ordering::Relaxed) > so_far + 100).then_some(())
            });
            goes_on.unwrap();
            assert!(before == std::fs::read(&left).unwrap(), "{at} is written to after it was left");
            at = name;
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    let disk = std::fs::read(peer.folder().join("t4")).unwrap();
    for (block, number) in acknowledged.iter().enumerate().filter(|(_, number)| **number > 0) {
        assert!(disk[block * BLOCK..(block + 1) * BLOCK] == of(*number), "block {block}, write {number}");
    }
    assert!(guest.read(0, BLOCK) == disk[..BLOCK]);
}

/// Both only read, else they could not stand on one node.
#[test]
fn a_mirror_of_another_filter_on_a_node_that_is_replaced_meanwhile_copies_the_same_bytes() {
    let peer = Peer::ours();
    let mut wire = Wire::negotiated(&peer.socket());
    peer.image("low", BLOCK * BLOCKS);
    let len = u64::try_from(BLOCK * BLOCKS).unwrap();
    for target in ["t", "u"] {
        std::fs::File::create(peer.folder().join(target)).unwrap().set_len(len).unwrap();
    }
    let mut run = |command: &str, arguments: Value| execute(&peer, &mut wire, command, &arguments);
    run("object-add", json!({ "qom-type": "throttle-group", "id": "g" }));
    let file = |name: &str, read_only: bool| {
        let path = format!("DIR/{name}");
        json!({ "driver": "file", "node-name": name, "filename": path, "read-only": read_only })
    };
    for node in [
        file("low", true),
        file("t", false),
        file("u", false),
        json!({ "driver": "throttle", "node-name": "s", "file": "low", "throttle-group": "g", "read-only": true }),
    ] {
        run("blockdev-add", node);
    }
    let mirror =
        |job: &str, of: &str, to: &str| json!({ "job-id": job, "device": of, "target": to, "sync": "full" });
    let mut replacing = mirror("j", "s", "t");
    replacing["replaces"] = json!("low");
    run("blockdev-mirror", replacing.clone());
    await_event(&mut wire, "BLOCK_JOB_READY");
    let mut run = |command: &str, arguments: Value| execute(&peer, &mut wire, command, &arguments);
    // It would take hours.
    run("object-add", json!({ "qom-type": "throttle-group", "id": "h", "limits": { "bps-read": 1024 } }));
    run(
        "blockdev-add",
        json!({ "driver": "throttle", "node-name": "b", "file": "low", "throttle-group": "h", "read-only": true }),
    );
    // One that would be replaced twice is refused, this one is not.
    let twice = json!({ "job-id": "k", "device": "b", "target": "u", "sync": "full", "replaces": "low" });
    let refused = wire.execute("blockdev-mirror", &twice);
    let said = refused["error"]["desc"].as_str().unwrap_or_default();
    assert!(said.starts_with("Node 'low' is busy"), "{refused}");
    let mut run = |command: &str, arguments: Value| execute(&peer, &mut wire, command, &arguments);
    run("blockdev-mirror", mirror("k", "b", "u"));
    run("job-complete", json!({ "id": "j" }));
    let end = await_event(&mut wire, "BLOCK_JOB_COMPLETED");
    assert!(end["data"]["device"] == "j" && end["data"].get("error").is_none(), "{end}");
    let mut run = |command: &str, arguments: Value| execute(&peer, &mut wire, command, &arguments);
    // Nobody reads it any more.
    run("blockdev-del", json!({ "node-name": "low" }));
    run("qom-set", json!({ "path": "h", "property": "limits", "value": { "bps-read": 0 } }));
    await_event(&mut wire, "BLOCK_JOB_READY");
    // What both read now is nobody's to write.
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    execute(&peer, &mut wire, "nbd-server-start", &address);
    let export = json!({ "type": "nbd", "id": "e", "node-name": "t", "writable": true });
    assert!(wire.execute("block-export-add", &export).get("error").is_some());
    execute(&peer, &mut wire, "job-complete", &json!({ "id": "k" }));
    let end = await_event(&mut wire, "BLOCK_JOB_COMPLETED");
    assert!(end["data"]["device"] == "k" && end["data"].get("error").is_none(), "{end}");
    let bytes = |name: &str| std::fs::read(peer.folder().join(name)).unwrap();
    assert!(bytes("t") == bytes("low") && bytes("u") == bytes("low"));
}
