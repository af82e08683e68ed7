//! A mirror without a guest: in memory, past the cache on the disk, and of a disk that is mostly hole.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Row;
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions, JOB_LIMIT};
use crate::bench::fio;
use crate::bench::report::{Goal, Medians, Sample};
use crate::bench::scene::{GIB, MIB, Scene, copy_with_two_threads, empty_disk, ensure_equal, mib, occupied};

use Contender::{FioReadWrite, Ours, QemuStorageDaemon, TwoThreads};

const THROUGHPUT: &str = "MiB/s";
const READY: &str = "ready s";
const RESIDENT: &str = "peak RSS MiB";
const OCCUPIED: &str = "target MiB";

pub const IN_MEMORY: Row = Row {
    name: "mirror-tmpfs",
    work: "idle mirror, raw to raw, 2 GiB of data on tmpfs, page-cached, to READY",
    contenders: &[Ours, QemuStorageDaemon, TwoThreads],
    measure: in_memory,
    goals: |medians| {
        let over_threads = medians.ours_over(TwoThreads, THROUGHPUT);
        vec![
            Goal::at_least("at least 2 times its throughput", over_its_throughput(medians), 2.0),
            Goal::at_least("or 85 % of what two plain threads copy", over_threads, 0.85),
            Goal::at_most("at most 64 MiB of memory for it", medians.get(Ours, RESIDENT), 64.0),
        ]
    },
};

pub const DIRECT: Row = Row {
    name: "mirror-direct",
    work: "idle mirror, raw to raw, 4 GiB of data on the disk, direct I/O, to READY",
    contenders: &[Ours, QemuStorageDaemon, FioReadWrite],
    measure: direct,
    goals: |medians| {
        let over_fio = medians.ours_over(FioReadWrite, THROUGHPUT);
        vec![
            Goal::at_least("at least 1.5 times its throughput", over_its_throughput(medians), 1.5),
            Goal::at_least("or within 10 % of what fio reads and writes at once", over_fio, 0.9),
        ]
    },
};

pub const SPARSE: Row = Row {
    name: "mirror-sparse",
    work: "idle mirror of a sparse raw disk, 1 TiB with 256 MiB in 256 places, on tmpfs, to READY",
    contenders: &[Ours, QemuStorageDaemon],
    measure: sparse,
    goals: |medians| {
        vec![
            Goal::at_most("at most a fifth of its time", medians.ours_over(QemuStorageDaemon, READY), 0.2),
            Goal::at_most("the target occupies what the source does", medians.get(Ours, OCCUPIED), 257.0),
        ]
    },
};

fn over_its_throughput(medians: &Medians) -> Option<f64> {
    medians.ours_over(QemuStorageDaemon, THROUGHPUT)
}

fn in_memory(scene: &Scene, contender: Contender) -> Result<Sample> {
    let size = scene.size(2 * GIB);
    let source = scene.full_disk(scene.memory(), size)?;
    if contender == TwoThreads {
        return plainly(scene.memory(), size, |target| copy_with_two_threads(&source, target));
    }
    let run =
        Mirror { contender, folder: scene.memory(), source: &source, size, disk: DiskOptions::default() };
    run.to_the_end([(0, size)].into_iter())
}

fn direct(scene: &Scene, contender: Contender) -> Result<Sample> {
    let size = scene.size(4 * GIB);
    let source = scene.full_disk(scene.disk(), size)?;
    if contender == FioReadWrite {
        return read_and_write_at_once(scene.disk(), &source, size);
    }
    let disk = DiskOptions { direct: true, ..DiskOptions::default() };
    let run = Mirror { contender, folder: scene.disk(), source: &source, size, disk };
    run.to_the_end([(0, size)].into_iter())
}

/// What plain threads do that fill a file of `size` bytes with `work`.
pub fn plainly(folder: &Path, size: u64, work: impl FnOnce(&Path) -> Result<()>) -> Result<Sample> {
    let target = folder.join("target");
    empty_disk(&target, size)?;
    let start = Instant::now();
    work(&target)?;
    let took = start.elapsed().as_secs_f64();
    std::fs::remove_file(&target)?;
    Ok(Sample::default().with(READY, took).with(THROUGHPUT, mib(size) / took))
}

/// What the disk does when one file is read and another written, with nothing between them.
pub fn read_and_write_at_once(folder: &Path, source: &Path, size: u64) -> Result<Sample> {
    let target = folder.join("target");
    empty_disk(&target, size)?;
    let report = folder.join("fio.json");
    let mut command = Command::new("fio");
    command.args(["--ioengine=io_uring", "--direct=1", "--bs=1M", "--iodepth=8", "--fallocate=none"]);
    command.args(["--output-format=json", &format!("--size={size}")]).arg("--output").arg(&report);
    command.args(["--name=read", "--rw=read"]).arg(format!("--filename={}", source.display()));
    command.args(["--name=write", "--rw=write", "--overwrite=0"]);
    command.arg(format!("--filename={}", target.display()));
    fio::run(&mut command)?;
    let report = fio::read_report(&report)?;
    let time = |job: usize, side: &str| report["jobs"][job][side]["runtime"].as_f64();
    let read = time(0, "read").context("fio's report has no runtime")?;
    let written = time(1, "write").context("fio's report has no runtime")?;
    let took = read.max(written) / 1000.0;
    std::fs::remove_file(&target)?;
    Ok(Sample::default().with(READY, took).with(THROUGHPUT, mib(size) / took))
}

fn sparse(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (size, places) = (1024 * scene.size(GIB), 256);
    let source = scene.sparse_disk(scene.memory(), size, places, MIB)?;
    let disk = DiskOptions { thin: true, ..DiskOptions::default() };
    let run = Mirror { contender, folder: scene.memory(), source: &source, size, disk };
    run.to_the_end((0..places).map(|place| (place * (size / places), 2 * MIB)))
}

/// One mirror over QMP.
struct Mirror<'a> {
    contender: Contender,
    folder: &'a Path,
    source: &'a Path,
    size: u64,
    disk: DiskOptions,
}

impl Mirror<'_> {
    /// Mirrors, measures until READY, completes, and compares the two in `places`.
    fn to_the_end(&self, places: impl Iterator<Item = (u64, u64)>) -> Result<Sample> {
        let target = self.folder.join("target");
        empty_disk(&target, self.size)?;
        let mut daemon = ControlledDaemon::start(self.contender, self.folder)?;
        daemon.add_disk("source", self.source, self.disk)?;
        daemon.add_disk("target", &target, self.disk)?;
        let start = Instant::now();
        start_mirror(&mut daemon)?;
        wait_for(&mut daemon, "BLOCK_JOB_READY")?;
        let took = start.elapsed().as_secs_f64();
        let resident = daemon.process.resident_bytes_max()?;
        let occupied = occupied(&target)?;
        complete(&mut daemon)?;
        daemon.quit()?;
        ensure_equal(self.source, &target, places)?;
        std::fs::remove_file(&target)?;
        let sample =
            Sample::default().with(READY, took).with(RESIDENT, mib(resident)).with(OCCUPIED, mib(occupied));
        // Of a disk that is mostly hole, bytes a second say nothing.
        Ok(if self.disk.thin { sample } else { sample.with(THROUGHPUT, mib(self.size) / took) })
    }
}

/// Starts the job `mirror` from the node `source` to the node `target`.
pub fn start_mirror(daemon: &mut ControlledDaemon) -> Result<()> {
    let job = json!({ "job-id": "mirror", "device": "source", "target": "target", "sync": "full" });
    daemon.qmp.execute("blockdev-mirror", job).context("starting the mirror")?;
    Ok(())
}

/// Waits for an event of the job, or for the job's end with an error; gives the event's data.
pub fn wait_for(daemon: &mut ControlledDaemon, event: &str) -> Result<Value> {
    let mut seen = daemon.qmp.wait_any_event(&[event, "BLOCK_JOB_COMPLETED"], JOB_LIMIT)?;
    let data = seen["data"].take();
    ensure!(data.get("error").is_none() && seen["event"] == event, "the job ended: {data}");
    Ok(data)
}

/// Lets the target take the source's place; gives the data of the last event.
pub fn complete(daemon: &mut ControlledDaemon) -> Result<Value> {
    daemon.qmp.execute("block-job-complete", json!({ "device": "mirror" })).context("completing")?;
    wait_for(daemon, "BLOCK_JOB_COMPLETED")
}
