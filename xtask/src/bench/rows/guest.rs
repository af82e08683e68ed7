//! A guest that writes steadily while its disk is mirrored: what it feels, and how long the mirror takes.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Row;
use super::mirror::{start_mirror, wait_for};
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions};
use crate::bench::daemon::Daemon;
use crate::bench::fio::{Load, now_ms};
use crate::bench::report::{Figure, Goal, Medians, Sample};
use crate::bench::scene::{GIB, Scene, empty_disk};

use Contender::{Ours, QemuStorageDaemon};

const P99_BEFORE: Figure = "p99 before ms";
const P99: Figure = "p99 ms";
const LONGEST: Figure = "longest ms";
const READY: Figure = "ready s";
const COMPLETE: Figure = "complete s";
const LONGEST_AT_PIVOT: Figure = "longest at pivot ms";
const PAUSE: Figure = "pause ms";

/// Where our daemon says how long the guest was held at the pivot: in the event that ends the job.
const PAUSE_FIELD: &str = "pause-us";

/// Requests a second that the guest asks for.
const RATE: u32 = 5000;
/// Steady load before the mirror starts, to know what it costs.
const BEFORE: Duration = Duration::from_secs(2);
/// Steady load between READY and completion, and after it.
const HOLD: Duration = Duration::from_secs(1);
/// A completion that has not come by then is taken for one that never comes; it counts with this time.
const COMPLETE_LIMIT: Duration = Duration::from_secs(20);
/// The guest is stopped when everything is done; this is only its limit.
const GUEST_LIMIT: Duration = Duration::from_secs(300);

pub const QUIET: Row = Row {
    name: "guest",
    work: "guest at 5,000 4 KiB writes a second while 2 GiB are mirrored on tmpfs",
    contenders: &[Ours, QemuStorageDaemon],
    measure: |scene, contender| measure(scene, contender),
    goals: |medians| {
        vec![
            Goal::at_most("p99 at most half of its", over_its(medians, P99), 0.5),
            Goal::at_most("longest request at most a quarter of its", over_its(medians, LONGEST), 0.25),
            Goal::at_most("READY no later than it", over_its(medians, READY), 1.0),
            Goal::at_most("pause at the pivot at most 10 ms", medians.get(Ours, PAUSE), 10.0),
        ]
    },
};

pub const BUSY: Row = Row {
    name: "guest-busy",
    work: "the same with two busy loops on the processors besides",
    contenders: &[Ours, QemuStorageDaemon],
    measure: |scene, contender| {
        let _loops = [busy_loop()?, busy_loop()?];
        measure(scene, contender)
    },
    goals: |medians| vec![Goal::at_most("p99 at most a fifth of its", over_its(medians, P99), 0.2)],
};

fn over_its(medians: &Medians, figure: Figure) -> Option<f64> {
    medians.ours_over(QemuStorageDaemon, figure)
}

fn busy_loop() -> Result<Daemon> {
    Daemon::start(Command::new("sh").args(["-c", "while :; do :; done"])).context("starting a busy loop")
}

fn measure(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (folder, size) = (scene.memory(), scene.size(2 * GIB));
    let source = scene.full_disk(folder, size)?;
    let target = folder.join("target");
    empty_disk(&target, size)?;
    let mut daemon = ControlledDaemon::start(contender, folder)?;
    daemon.add_disk("source", &source, DiskOptions::default())?;
    daemon.add_disk("target", &target, DiskOptions::default())?;
    let socket = folder.join("nbd");
    daemon.export("source", &socket)?;
    let load = Load {
        socket: &socket,
        export: "source",
        pattern: "randwrite",
        depth: 16,
        connections: 1,
        size,
        time: GUEST_LIMIT,
        rate: Some(RATE),
    };
    let guest = load.start(folder)?;
    thread::sleep(BEFORE);
    let (mirror_from, start) = (now_ms(), Instant::now());
    start_mirror(&mut daemon)?;
    wait_for(&mut daemon, "BLOCK_JOB_READY")?;
    let (ready_s, ready_at) = (start.elapsed().as_secs_f64(), now_ms());
    thread::sleep(HOLD);
    let (pivot_from, start) = (now_ms(), Instant::now());
    let ended = complete_in_time(&mut daemon)?;
    let (complete_s, pivot_to) = (start.elapsed().as_secs_f64(), now_ms());
    thread::sleep(HOLD);
    let latencies = guest.stop()?;
    daemon.quit()?;
    std::fs::remove_file(&target)?;

    // The first half second is fio's own start.
    let before = latencies.between(mirror_from - 1500, mirror_from - 1)?;
    let during = latencies.between(mirror_from, ready_at)?;
    // A request held at the pivot ends a moment after the event.
    let at_pivot = latencies.between(pivot_from, pivot_to + 100)?;
    let sample = Sample::default()
        .with(P99_BEFORE, before.p99_ms)
        .with(P99, during.p99_ms)
        .with(LONGEST, during.longest_ms)
        .with(READY, ready_s)
        .with(COMPLETE, complete_s)
        .with(LONGEST_AT_PIVOT, at_pivot.longest_ms);
    let pause_us = ended.as_ref().and_then(|data| data[PAUSE_FIELD].as_f64());
    Ok(match pause_us {
        Some(us) => sample.with(PAUSE, us / 1000.0),
        None => sample,
    })
}

/// Completes; gives the data of the last event, or `None` when the job has not ended within the limit.
fn complete_in_time(daemon: &mut ControlledDaemon) -> Result<Option<Value>> {
    daemon.qmp.execute("block-job-complete", json!({ "device": "mirror" })).context("completing")?;
    match daemon.qmp.wait_event("BLOCK_JOB_COMPLETED", COMPLETE_LIMIT) {
        Ok(mut event) => Ok(Some(event["data"].take())),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => Ok(None),
        Err(error) => Err(error.into()),
    }
}
