//! Transactions under guests that write: what they leave is of one moment, or as it was.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use heliostat_block::nbd::ReplyStyle;
use serde_json::{Value, json};

use common::qcow2::{assert_sound, qemu_img};
use common::scene::Scene;
use common::wait;
use nbd::Guest;

const CLUSTER: u64 = 64 << 10;

/// A scene with disks, offered to guests under their names.
fn with_disks(disks: &[&str], size: &str) -> Option<Scene> {
    let mut scene = Scene::new()?;
    let address = json!({ "type": "unix", "data": { "path": "DIR/nbd" } });
    scene.execute("nbd-server-start", json!({ "addr": address }));
    for disk in disks {
        scene.img(&["create", "-q", "-f", "qcow2", &format!("{disk}.qcow2"), size]);
        scene.add(disk, &format!("{disk}.qcow2"), json!({}));
        let id = format!("e{disk}");
        let export = json!({ "type": "nbd", "id": id, "node-name": disk, "name": disk, "writable": true });
        scene.execute("block-export-add", export);
    }
    Some(scene)
}

fn guest(scene: &Path, disk: &str) -> Guest {
    let stream = UnixStream::connect(scene.join("nbd")).unwrap();
    stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    Guest::new(stream, disk, ReplyStyle::Structured).unwrap()
}

fn snapshot_to(disk: &str, file: &str) -> Value {
    json!({
        "type": "blockdev-snapshot-sync",
        "data": { "device": format!("e{disk}"), "snapshot-file": format!("DIR/{file}"), "snapshot-node-name": file },
    })
}

/// The number that a guest has written to the beginning of a disk.
fn number(folder: &Path, image: &str) -> u64 {
    qemu_img(folder, &["dd", "-U", "-O", "raw", "bs=512", "count=1", &format!("if={image}"), "of=number"]);
    let bytes = fs::read(folder.join("number")).unwrap();
    fs::remove_file(folder.join("number")).unwrap();
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn snapshots_of_several_disks_are_of_one_moment() {
    const ROUNDS: usize = 16;
    // Enough that a guest gets round while they are taken one after the other.
    const DISKS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let Some(mut scene) = with_disks(&DISKS, "1M") else { return };
    let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let folder = scene.path();
        let (is_over, written) = (&is_over, &written);
        // Each number to one disk after the other.
        scope.spawn(move || {
            let mut disks = DISKS.map(|disk| guest(&folder, disk));
            let mut sector = [0; 512];
            let mut number = 0_u64;
            while !is_over.load(Ordering::SeqCst) {
                number += 1;
                sector[..8].copy_from_slice(&number.to_le_bytes());
                disks.iter_mut().for_each(|disk| disk.write(0, &sector));
                written.store(number, Ordering::SeqCst);
            }
        });
        for round in 0..ROUNDS {
            let before = written.load(Ordering::SeqCst);
            let goes_on = || (written.load(Ordering::SeqCst) > before + 3).then_some(());
            wait::until("the guest writes", wait::LIMIT, goes_on).unwrap();
            // In either order: what is named first is not first in time.
            let mut actions = DISKS.map(|disk| snapshot_to(disk, &format!("{disk}{round}")));
            if round % 2 == 0 {
                actions.reverse();
            }
            scene.execute("transaction", json!({ "actions": actions }));
        }
        is_over.store(true, Ordering::SeqCst);
    });
    let folder = scene.end();
    let mut last = 0;
    for layer in 0..=ROUNDS {
        let image = |disk: &str| match layer {
            0 => format!("{disk}.qcow2"),
            layer => format!("{disk}{}", layer - 1),
        };
        let numbers = DISKS.map(|disk| number(folder.path(), &image(disk)));
        // Those that come first in a guest's round may have its number, and the others the one before.
        let (first, end) = (numbers[0], numbers[DISKS.len() - 1]);
        assert!(numbers.is_sorted_by(|a, b| a >= b) && first - end <= 1, "layer {layer}: {numbers:?}");
        assert!(end >= last, "layer {layer}: {numbers:?} after {last}");
        last = end;
        assert_sound(folder.path(), &image("f"));
    }
    assert_eq!(last, written.load(Ordering::SeqCst), "what was written last is on top");
}

#[test]
fn a_bitmap_that_comes_with_a_snapshot_has_what_the_overlay_holds_also_after_the_next() {
    const CLUSTERS: u64 = 1 << 16;
    const IN_FLIGHT: u64 = 8;
    const ROUNDS: usize = 12;
    let Some(mut scene) = with_disks(&["a", "b"], "4G") else { return };
    let (is_over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for disk in ["a", "b"] {
            let folder = scene.path();
            let (is_over, written) = (&is_over, &written);
            scope.spawn(move || {
                let mut disk = guest(&folder, disk);
                // Each cluster once, some at once.
                for first in (0..CLUSTERS).step_by(usize::try_from(IN_FLIGHT).unwrap()) {
                    let sent = (first..first + IN_FLIGHT).map(|at| disk.send_write(at * CLUSTER, &[1; 512]));
                    let sent: Vec<_> = sent.collect();
                    sent.into_iter().for_each(|cookie| assert!(disk.wait(cookie).is_ok()));
                    written.fetch_add(IN_FLIGHT, Ordering::SeqCst);
                    if is_over.load(Ordering::SeqCst) {
                        return;
                    }
                }
                panic!("it has run out of clusters");
            });
        }
        let more = || {
            let before = written.load(Ordering::SeqCst);
            let goes_on = || (written.load(Ordering::SeqCst) > before + 40).then_some(());
            wait::until("guests write", wait::LIMIT, goes_on).unwrap();
        };
        let bitmap = |verb: &str, node: &str, round: usize, more: Value| {
            let mut data = json!({ "node": node, "name": format!("since{round}") });
            data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({ "type": format!("block-dirty-bitmap-{verb}"), "data": data })
        };
        for round in 0..ROUNDS {
            more();
            let mut actions = Vec::new();
            for disk in ["a", "b"] {
                actions.push(snapshot_to(disk, &format!("{disk}{round}")));
                actions.push(bitmap(
                    "add",
                    &format!("{disk}{round}"),
                    round,
                    json!({ "granularity": CLUSTER }),
                ));
            }
            scene.execute("transaction", json!({ "actions": actions }));
        }
        more();
        is_over.store(true, Ordering::SeqCst);
    });
    let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
    let mut dirty = Vec::new();
    for disk in ["a", "b"] {
        for round in 0..ROUNDS {
            let overlay = format!("{disk}{round}");
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == *overlay).unwrap();
            let bitmap = &node["dirty-bitmaps"][0];
            assert_eq!(bitmap["name"], format!("since{round}"));
            dirty.push((overlay, bitmap["count"].as_u64().unwrap()));
        }
    }
    assert_eq!(dirty.len(), 2 * ROUNDS);
    let folder = scene.end();
    for (overlay, dirty) in dirty {
        let map: Value =
            serde_json::from_str(&qemu_img(folder.path(), &["map", "--output=json", &overlay])).unwrap();
        let held = map.as_array().unwrap().iter().filter(|extent| extent["depth"] == 0);
        let held: u64 = held.map(|extent| extent["length"].as_u64().unwrap()).sum();
        assert_eq!(dirty, held, "{overlay}");
    }
}

#[test]
fn a_refused_transaction_leaves_no_file_and_cuts_none() {
    let Some(mut scene) = with_disks(&["a", "b"], "16M") else { return };
    fs::write(scene.path().join("there"), [7; 100_000]).unwrap();
    let bitmap =
        |node: &str| json!({ "type": "block-dirty-bitmap-clear", "data": { "node": node, "name": "no" } });
    let abort = || json!({ "type": "abort", "data": {} });
    let refused = [
        (vec![snapshot_to("a", "new"), snapshot_to("b", "there"), abort()], "aborted"),
        (vec![snapshot_to("a", "there"), snapshot_to("b", "none/new")], "No such file"),
        (vec![snapshot_to("a", "there"), bitmap("b")], "Dirty bitmap 'no' not found"),
        (vec![snapshot_to("a", "new"), bitmap("new")], "Dirty bitmap 'no' not found"),
        (vec![snapshot_to("a", "there"), bitmap("there")], "would be lost"),
        (vec![snapshot_to("a", "there"), snapshot_to("a", "new")], "would be lost"),
        (vec![snapshot_to("a", "new"), snapshot_to("b", "new")], "already in use"),
    ];
    for (actions, why) in refused {
        let said = format!("{actions:?}");
        let arguments =
            json!({ "actions": actions }).to_string().replace("DIR", scene.path().to_str().unwrap());
        let refused = scene.qmp.execute("transaction", serde_json::from_str(&arguments).unwrap());
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(why), "{said}: {refused}");
        assert!(!scene.path().join("new").exists(), "{said}");
        assert_eq!(fs::read(scene.path().join("there")).unwrap(), [7; 100_000], "{said}");
    }
    let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(nodes.as_array().unwrap().len(), 4, "the disks and their files: {nodes}");
    let mut a = guest(&scene.path(), "a");
    a.write(0, &[1; 512]);
    assert_eq!(a.read(0, 512), [1; 512]);
    drop(a);
    // One that is made in another's place, and one that is opened.
    scene.img(&["create", "-q", "-f", "qcow2", "new", "16M"]);
    let mut opened = snapshot_to("b", "new");
    opened["data"]["mode"] = json!("existing");
    scene.execute("transaction", json!({ "actions": [snapshot_to("a", "there"), opened] }));
    let exports = scene.execute("query-block-exports", json!({}));
    let nodes: Vec<_> =
        exports.as_array().unwrap().iter().map(|export| export["node-name"].clone()).collect();
    assert_eq!(nodes, ["new", "there"]);
    let folder = scene.end();
    assert_sound(folder.path(), "there");
    assert_sound(folder.path(), "new");
}

#[test]
fn a_mirror_beside_a_snapshot_of_its_disk_copies_what_the_export_shows_then() {
    let Some(mut scene) = with_disks(&["a", "b"], "16M") else { return };
    scene.img(&["create", "-q", "-f", "raw", "t.raw", "16M"]);
    scene.add("t", "t.raw", json!({}));
    let mut a = guest(&scene.path(), "a");
    a.write(0, &[1; 4096]);
    let mirror = |device: &str, target: &str| {
        let data = json!({ "job-id": "j", "device": device, "target": target, "sync": "full" });
        json!({ "type": "blockdev-mirror", "data": data })
    };
    // What is left, and what guests go to, is nobody's to be written over, or to be copied by its old name.
    for (device, target) in [("a", "t"), ("b", "oa"), ("b", "a"), ("oa", "a")] {
        let actions = json!({ "actions": [snapshot_to("a", "oa"), mirror(device, target)] });
        let actions = actions.to_string().replace("DIR", scene.path().to_str().unwrap());
        let refused = scene.qmp.execute("transaction", serde_json::from_str(&actions).unwrap());
        assert!(refused.is_err(), "{device} to {target}");
        assert!(!scene.path().join("oa").exists());
    }
    let actions = [snapshot_to("a", "oa"), mirror("ea", "t")];
    scene.execute("transaction", json!({ "actions": actions }));
    a.write(8192, &[2; 4096]);
    scene.complete();
    a.write(16384, &[3; 4096]);
    drop(a);
    let folder = scene.end();
    let target = fs::read(folder.path().join("t.raw")).unwrap();
    for (at, byte) in [(0, 1), (8192, 2), (16384, 3)] {
        assert_eq!(target[at..at + 4096], [byte; 4096]);
    }
}

#[test]
fn a_kept_bitmap_stays_in_the_image_that_guests_leave() {
    let Some(mut scene) = with_disks(&["a"], "1M") else { return };
    scene.execute("block-dirty-bitmap-add", json!({ "node": "a", "name": "kept", "persistent": true }));
    let mut a = guest(&scene.path(), "a");
    a.write(0, &[1; 512]);
    let kept = json!({ "node": "new", "name": "kept", "persistent": true });
    let kept = json!({ "type": "block-dirty-bitmap-add", "data": kept });
    scene.execute("transaction", json!({ "actions": [snapshot_to("a", "new"), kept] }));
    a.write(128 << 10, &[2; 512]);
    drop(a);
    let folder = scene.end();
    // What was written before in the one, what came afterwards in the other; both are believed.
    for image in ["a.qcow2", "new"] {
        assert_sound(folder.path(), image);
        let info = qemu_img(folder.path(), &["info", "--output=json", image]);
        let info: Value = serde_json::from_str(&info).unwrap();
        let bitmaps = &info["format-specific"]["data"]["bitmaps"];
        assert_eq!(
            *bitmaps,
            json!([{ "flags": ["auto"], "name": "kept", "granularity": CLUSTER }]),
            "{image}"
        );
        let mut scene = Scene::new().unwrap();
        let file = json!({ "driver": "file", "filename": folder.path().join(image) });
        let node =
            json!({ "driver": "qcow2", "node-name": "n", "file": file, "backing": null, "read-only": true });
        scene.execute("blockdev-add", node);
        let nodes = scene.execute("query-named-block-nodes", json!({ "flat": true }));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "n").unwrap();
        assert_eq!(node["dirty-bitmaps"][0]["count"], CLUSTER, "{image}");
        scene.end();
    }
}
