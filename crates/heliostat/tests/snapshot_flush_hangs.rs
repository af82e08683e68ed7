//! A disk whose flush does not end, in the middle of a snapshot: guests go on without it, and it comes later.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use heliostat_block::nbd::{Cookie, ReplyStyle};
use serde_json::{Value, json};

use common::qcow2::{assert_sound, qemu_io};
use common::qmp::Qmp;
use common::scene::Scene;
use common::wait;
use nbd::Guest;

/// Longer than a write takes at an open gate. Shorter than the gates may be closed.
const HELD: Duration = Duration::from_secs(2);

/// Longer than the gates may be closed.
const REFUSED: Duration = Duration::from_secs(60);

fn guest(scene: &Path, disk: &str) -> Guest {
    let stream = UnixStream::connect(scene.join("nbd")).unwrap();
    stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    Guest::new(stream, disk, ReplyStyle::Structured).unwrap()
}

/// Says whether a write is answered soon. If not, it is on its way.
fn is_answered(guest: &mut Guest, byte: u8) -> Result<(), Cookie> {
    let cookie = guest.send_write(0, &[byte; 512]);
    guest.stream.set_read_timeout(Some(HELD)).unwrap();
    let answered = guest.next();
    guest.stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    answered.map(|answer| assert_eq!(answer.cookie, cookie)).map_err(|_| cookie)
}

fn qemu_io_of(qmp: &mut Qmp, step: &str) {
    let said =
        qmp.execute("human-monitor-command", json!({ "command-line": format!("qemu-io a \"{step}\"") }));
    assert_eq!(said.unwrap(), "");
}

#[test]
fn a_flush_that_hangs_behind_closed_gates_refuses_the_transaction_and_guests_go_on() {
    let Some(mut scene) = Scene::new() else { return };
    let address = json!({ "type": "unix", "data": { "path": "DIR/nbd" } });
    scene.execute("nbd-server-start", json!({ "addr": address }));
    for disk in ["a", "b"] {
        let image = format!("{disk}.qcow2");
        scene.img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
        // What the guest writes has its place already: no table waits for the flush.
        scene.io(&image, &["write -P 1 0 64k"]);
        let file = json!({ "driver": "file", "filename": format!("DIR/{image}") });
        let file = match disk {
            "a" => json!({ "driver": "blkdebug", "image": file }),
            _ => file,
        };
        scene.execute("blockdev-add", json!({ "driver": "qcow2", "node-name": disk, "file": file }));
        let export = json!({ "type": "nbd", "id": disk, "node-name": disk, "name": disk, "writable": true });
        scene.execute("block-export-add", export);
    }
    std::fs::write(scene.path().join("a1.qcow2"), [7; 100_000]).unwrap();
    let (mut a, mut b) = (guest(&scene.path(), "a"), guest(&scene.path(), "b"));
    let mut other = Qmp::connect(&scene.path().join("control")).unwrap();
    let actions: Vec<Value> = ["a", "b"]
        .map(|disk| {
            let file = scene.path().join(format!("{disk}1.qcow2"));
            let data =
                json!({ "device": disk, "snapshot-file": file, "snapshot-node-name": format!("{disk}1") });
            json!({ "type": "blockdev-snapshot-sync", "data": data })
        })
        .into();
    let snapshots = json!({ "actions": actions });

    // One flush after the other is held up, until it is the one behind the gates.
    let mut tag = 0;
    qemu_io_of(&mut other, "break flush_to_disk f0");
    let command = json!({ "execute": "transaction", "arguments": snapshots });
    scene.qmp.send(&format!("{command}\n")).unwrap();
    let held = loop {
        qemu_io_of(&mut other, &format!("wait_break f{tag}"));
        if let Err(cookie) = is_answered(&mut a, 2) {
            break cookie;
        }
        qemu_io_of(&mut other, &format!("break flush_to_disk f{}", tag + 1));
        qemu_io_of(&mut other, &format!("resume f{tag}"));
        tag += 1;
    };
    let refused = scene.qmp.read_message(REFUSED).unwrap();
    let said = refused["error"]["desc"].as_str().unwrap();
    assert!(said.starts_with("a flush of 'a' has not ended within 20 s"), "{refused}");
    a.wait(held).unwrap();
    for (guest, byte) in [(&mut a, 3), (&mut b, 4)] {
        guest.write(0, &[byte; 512]);
        assert_eq!(guest.read(0, 512), [byte; 512]);
    }
    let mut files: Vec<_> =
        std::fs::read_dir(scene.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["a.qcow2", "a1.qcow2", "b.qcow2", "control", "nbd"]);
    assert_eq!(std::fs::read(scene.path().join("a1.qcow2")).unwrap(), [7; 100_000], "the text says so");
    qemu_io_of(&mut other, &format!("resume f{tag}"));
    scene.execute("transaction", snapshots);
    for (guest, byte) in [(&mut a, 5), (&mut b, 6)] {
        guest.write(512, &[byte; 512]);
    }
    drop((a, b));
    let folder = scene.end();
    for (disk, before, after) in [("a", 3, 5), ("b", 4, 6)] {
        let (base, overlay) = (format!("{disk}.qcow2"), format!("{disk}1.qcow2"));
        let (first, second) = (format!("read -P {before} 0 512"), format!("read -P {after} 512 512"));
        qemu_io(folder.path(), &base, &[&first, "read -P 1 512 512"]);
        qemu_io(folder.path(), &overlay, &[&first, &second]);
        assert_sound(folder.path(), &base);
        assert_sound(folder.path(), &overlay);
    }
}
