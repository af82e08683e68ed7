//! Orders: many jobs in one daemon, and many commands over one connection.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::Row;
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions, JOB_LIMIT};
use crate::bench::report::{Goal, Sample};
use crate::bench::scene::{MIB, Scene, empty_disk, ensure_equal, mib};

use Contender::{Ours, QemuStorageDaemon};

const READY: &str = "all ready s";
const RESIDENT: &str = "peak RSS MiB a job";
const ONE_BY_ONE: &str = "commands/s one by one";
const PIPELINED: &str = "commands/s pipelined";

/// Jobs in one daemon.
const JOBS: u32 = 200;

pub const JOBS_AT_ONCE: Row = Row {
    name: "jobs",
    work: "200 mirrors of 200 raw disks of 1 MiB on tmpfs in one daemon, from the first order to READY of all",
    contenders: &[Ours, QemuStorageDaemon],
    measure: jobs,
    goals: |medians| {
        vec![
            Goal::at_most("at most 1.5 times its time", medians.ours_over(QemuStorageDaemon, READY), 1.5),
            Goal::at_most(
                "at most 1.5 MiB of memory a job beyond the first",
                medians.get(Ours, RESIDENT),
                1.5,
            ),
        ]
    },
};

pub const COMMANDS: Row = Row {
    name: "commands",
    work: "query-version over one connection, each after the answer to the last, and without waiting",
    contenders: &[Ours, QemuStorageDaemon],
    measure: commands,
    goals: |medians| {
        vec![
            Goal::at_least("one by one: at least 10,000 a second", medians.get(Ours, ONE_BY_ONE), 10_000.0),
            Goal::at_least("pipelined: at least 10,000 a second", medians.get(Ours, PIPELINED), 10_000.0),
        ]
    },
};

fn jobs(scene: &Scene, contender: Contender) -> Result<Sample> {
    let jobs = if scene.is_quick() { JOBS / 8 } else { JOBS };
    let folder = scene.memory();
    let source = scene.full_disk(folder, MIB)?;
    let name = |kind: &str, job: u32| format!("{kind}{job}");
    let mut daemon = ControlledDaemon::start(contender, folder)?;
    for job in 0..jobs {
        let [from, to] = ["from", "to"].map(|kind| name(kind, job));
        std::fs::copy(&source, folder.join(&from)).context("making a disk")?;
        empty_disk(&folder.join(&to), MIB)?;
        for disk in [from, to] {
            daemon.add_disk(&disk, &folder.join(&disk), DiskOptions::default())?;
        }
    }
    start(&mut daemon, 0)?;
    ready(&mut daemon, 1)?;
    let first = daemon.process.resident_bytes_max()?;
    let began = Instant::now();
    for job in 1..jobs {
        start(&mut daemon, job)?;
    }
    ready(&mut daemon, jobs - 1)?;
    let time = began.elapsed();
    let all = daemon.process.resident_bytes_max()?;
    daemon.quit()?;
    for job in 0..jobs {
        let whole = [(0, MIB)];
        ensure_equal(&folder.join(name("from", job)), &folder.join(name("to", job)), whole.into_iter())?;
    }
    let a_job = mib(all.saturating_sub(first)) / f64::from(jobs - 1);
    Ok(Sample::default().with(READY, time.as_secs_f64()).with(RESIDENT, a_job))
}

fn start(daemon: &mut ControlledDaemon, job: u32) -> Result<()> {
    let mirror = json!({
        "job-id": format!("job{job}"),
        "device": format!("from{job}"),
        "target": format!("to{job}"),
        "sync": "full",
    });
    daemon.qmp.execute("blockdev-mirror", mirror).context("starting a mirror")?;
    Ok(())
}

fn ready(daemon: &mut ControlledDaemon, jobs: u32) -> Result<()> {
    for _ in 0..jobs {
        daemon.qmp.wait_event("BLOCK_JOB_READY", JOB_LIMIT)?;
    }
    Ok(())
}

fn commands(scene: &Scene, contender: Contender) -> Result<Sample> {
    let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
    // As many as fit into a while, so that who takes long over each does not take for ever.
    let time = Duration::from_millis(if scene.is_quick() { 200 } else { 2000 });
    let began = Instant::now();
    let mut count = 0_u32;
    while began.elapsed() < time {
        for _ in 0..10 {
            daemon.qmp.execute("query-version", json!({}))?;
        }
        count += 10;
    }
    let one_by_one = f64::from(count) / began.elapsed().as_secs_f64();
    let count = if scene.is_quick() { 2000 } else { 20_000 };
    let began = Instant::now();
    daemon.qmp.pipeline("query-version", count, JOB_LIMIT)?;
    let pipelined = f64::from(count) / began.elapsed().as_secs_f64();
    daemon.quit()?;
    Ok(Sample::default().with(ONE_BY_ONE, one_by_one).with(PIPELINED, pipelined))
}
