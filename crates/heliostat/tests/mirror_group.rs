//! Mirrors of several disks that end at one moment, beside a guest that writes them in turn.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use common::scene::Scene;
use common::wait;
use heliostat_block::nbd::ReplyStyle;
use nbd::Guest;
use serde_json::{Value, json};

const DISKS: [&str; 3] = ["a", "b", "c"];

/// Three disks with 4 MiB of data each, exported, and their targets.
fn scene() -> Option<Scene> {
    let mut scene = Scene::new()?;
    let address = json!({ "addr": { "type": "unix", "data": { "path": "DIR/nbd" } } });
    scene.execute("nbd-server-start", address);
    let limits = json!({ "bps-total": 8 << 20 });
    scene.execute("object-add", json!({ "qom-type": "throttle-group", "id": "slow", "limits": limits }));
    for disk in DISKS {
        for image in [format!("{disk}.qcow2"), format!("{disk}-copy.qcow2")] {
            scene.img(&["create", "-q", "-f", "qcow2", &image, "16M"]);
        }
        scene.io(&format!("{disk}.qcow2"), &["write -P 1 1M 4M"]);
        scene.add(disk, &format!("{disk}.qcow2"), json!({}));
        let file = json!({ "driver": "file", "filename": format!("DIR/{disk}-copy.qcow2") });
        let slow = json!({ "driver": "throttle", "throttle-group": "slow", "file": file });
        // The last is slower than the others by far.
        let file = if disk == "c" { slow } else { file };
        let node = json!({ "driver": "qcow2", "node-name": format!("{disk}-copy"), "file": file });
        scene.execute("blockdev-add", node);
        let export = json!({ "type": "nbd", "id": disk, "node-name": disk, "writable": true });
        scene.execute("block-export-add", export);
    }
    Some(scene)
}

fn mirror(disk: &str, more: &Value) -> Value {
    let mut data = json!({
        "job-id": format!("job-{disk}"), "device": disk, "target": format!("{disk}-copy"), "sync": "full"
    });
    for (key, value) in more.as_object().unwrap() {
        data[key] = value.clone();
    }
    json!({ "type": "blockdev-mirror", "data": data })
}

/// Mirrors all disks, as a group.
fn start(scene: &mut Scene, more: &Value) {
    let actions: Vec<_> = DISKS.iter().map(|disk| mirror(disk, more)).collect();
    scene.execute(
        "transaction",
        json!({ "actions": actions, "properties": { "completion-mode": "grouped" } }),
    );
}

/// Waits for an event of each job. Says whether all jobs say that nothing went wrong.
fn each(scene: &mut Scene, event: &str) -> Vec<Value> {
    DISKS.map(|_| scene.qmp.wait_event(event, wait::LIMIT).unwrap()["data"].clone()).to_vec()
}

/// A guest that writes a number to each disk in turn, and then the next one, until it is told to stop.
struct Writer {
    thread: JoinHandle<u64>,
    stops: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
}

impl Writer {
    fn start(folder: &Path) -> Self {
        let connect = |disk| {
            let stream = UnixStream::connect(folder.join("nbd")).unwrap();
            Guest::new(stream, disk, ReplyStyle::Structured).unwrap()
        };
        let mut guests = DISKS.map(connect);
        let (stops, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, tells) = (Arc::clone(&stops), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            let mut number = 0;
            while !told.load(Ordering::Relaxed) {
                number += 1;
                for guest in &mut guests {
                    guest.write(0, &u64::to_be_bytes(number).repeat(64));
                }
                tells.store(number, Ordering::Relaxed);
            }
            number
        });
        Self { thread, stops, written }
    }

    /// Waits until it has written a few numbers more.
    fn goes_on(&self) {
        let goal = self.written.load(Ordering::Relaxed) + 20;
        let has_reached = || (self.written.load(Ordering::Relaxed) >= goal).then_some(());
        wait::until("the guest goes on", wait::LIMIT, has_reached).unwrap();
    }

    /// The last number that all disks have.
    fn stop(self) -> u64 {
        self.stops.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// The numbers that images hold.
fn numbers(folder: &Path, suffix: &str) -> Vec<u64> {
    let number = |disk: &&str| {
        let (image, raw) = (format!("{disk}{suffix}.qcow2"), format!("{disk}{suffix}.raw"));
        common::qcow2::qemu_img(folder, &["check", "-q", &image]);
        common::qcow2::qemu_img(folder, &["convert", "-O", "raw", &image, &raw]);
        let bytes = std::fs::read(folder.join(raw)).unwrap();
        assert!(bytes[1 << 20..5 << 20].iter().all(|byte| *byte == 1), "{image}");
        u64::from_be_bytes(bytes[..8].try_into().unwrap())
    };
    DISKS.iter().map(number).collect()
}

#[test]
fn copies_that_a_group_leaves_behind_are_of_one_moment() {
    let Some(mut scene) = scene() else { return };
    let writer = Writer::start(&scene.path());
    start(&mut scene, &json!({}));
    each(&mut scene, "BLOCK_JOB_READY");
    let jobs = scene.execute("query-block-jobs", json!({}));
    for job in jobs.as_array().unwrap() {
        assert_eq!(job["group"], json!(["job-a", "job-b", "job-c"]));
    }
    writer.goes_on();
    // Now it has more to do than the others, while a guest goes on.
    let uri = format!("nbd+unix:///c?socket={}", scene.path().join("nbd").display());
    scene.guest(&uri, &["write -P 1 1M 4M"]);
    scene.execute("block-job-cancel", json!({ "device": "job-b" }));
    let ends = each(&mut scene, "BLOCK_JOB_COMPLETED");
    assert!(ends.iter().all(|end| end.get("error").is_none()), "{ends:?}");
    writer.goes_on();
    let last = writer.stop();
    let folder = scene.end();
    let copies = numbers(folder.path(), "-copy");
    assert!(copies.windows(2).all(|pair| pair[0] == pair[1] || pair[0] == pair[1] + 1), "{copies:?}");
    assert!(copies[0] <= copies[2] + 1 && copies[0] > 0, "{copies:?}");
    assert_eq!(numbers(folder.path(), ""), [last; 3], "guests stay on the source");
}

#[test]
fn a_group_moves_all_its_guests_or_none() {
    let Some(mut scene) = scene() else { return };
    let writer = Writer::start(&scene.path());
    // The first try is cancelled by one of them, in PENDING.
    start(&mut scene, &json!({ "auto-finalize": false }));
    each(&mut scene, "BLOCK_JOB_READY");
    scene.execute("job-complete", json!({ "id": "job-c" }));
    each(&mut scene, "BLOCK_JOB_PENDING");
    writer.goes_on();
    scene.execute("job-cancel", json!({ "id": "job-a" }));
    each(&mut scene, "BLOCK_JOB_CANCELLED");
    writer.goes_on();
    let nodes = |scene: &mut Scene| {
        let exports = scene.execute("query-block-exports", json!({}));
        let node = |export: &Value| export["node-name"].as_str().unwrap().to_owned();
        exports.as_array().unwrap().iter().map(node).collect::<Vec<_>>()
    };
    let mut stand = nodes(&mut scene);
    stand.sort();
    assert_eq!(stand, DISKS);
    // The second is not; one of them must not end by itself, so none does.
    let mut actions: Vec<_> = DISKS.iter().map(|disk| mirror(disk, &json!({}))).collect();
    actions[1]["data"]["auto-finalize"] = json!(false);
    scene.execute(
        "transaction",
        json!({ "actions": actions, "properties": { "completion-mode": "grouped" } }),
    );
    each(&mut scene, "BLOCK_JOB_READY");
    scene.execute("job-complete", json!({ "id": "job-a" }));
    each(&mut scene, "BLOCK_JOB_PENDING");
    scene.execute("job-finalize", json!({ "id": "job-c" }));
    let ends = each(&mut scene, "BLOCK_JOB_COMPLETED");
    assert!(ends.iter().all(|end| end.get("error").is_none()), "{ends:?}");
    writer.goes_on();
    let mut stand = nodes(&mut scene);
    stand.sort();
    assert_eq!(stand, DISKS.map(|disk| format!("{disk}-copy")));
    let last = writer.stop();
    let folder = scene.end();
    assert_eq!(numbers(folder.path(), "-copy"), [last; 3]);
}

#[test]
fn what_one_of_a_group_refuses_is_refused_for_all() {
    let Some(mut scene) = scene() else { return };
    start(&mut scene, &json!({}));
    each(&mut scene, "BLOCK_JOB_READY");
    scene.execute("block-job-pause", json!({ "device": "job-b" }));
    let refused = scene.qmp.execute("block-job-cancel", json!({ "device": "job-a" })).unwrap_err();
    let text = "Job 'job-a' ends together with others: The block job for device 'job-b' is currently paused";
    assert!(refused.to_string().contains(text), "{refused}");
    scene.execute("block-job-cancel", json!({ "device": "job-c", "force": true }));
    each(&mut scene, "BLOCK_JOB_CANCELLED");
    scene.end();
}
