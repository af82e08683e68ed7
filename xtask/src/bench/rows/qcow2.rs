//! qcow2: mirrors of it, a guest that allocates and one that does not, and a large image that is mostly nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Row;
use super::mirror::{complete, plainly, read_and_write_at_once, start_mirror, wait_for};
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions, Format, our_program};
use crate::bench::fio::Load;
use crate::bench::report::{Figure, Goal, Medians, Sample};
use crate::bench::scene::{GIB, Scene, copy_with_two_threads, mib, occupied, write_with_one_thread};

use Contender::{FioReadWrite, OneWriter, Ours, QemuImg, QemuStorageDaemon, TwoThreads};

const THROUGHPUT: Figure = "MiB/s";
const READY: Figure = "ready s";
const OCCUPIED: Figure = "target MiB";
const WRITES: Figure = "writes/s depth 16";
const READS: Figure = "reads/s depth 16";
const FIRST_READ: Figure = "open and first read ms";
const EXTENTS: Figure = "extents of all s";
const TIME: Figure = "s";

const BOTH: &[Contender] = &[Ours, QemuStorageDaemon];

pub const IN_MEMORY: Row = Row {
    name: "qcow2-mirror-tmpfs",
    work: "idle mirror, qcow2 to a new qcow2, 2 GiB of data on tmpfs, page-cached, to READY",
    contenders: &[Ours, QemuStorageDaemon, TwoThreads, OneWriter],
    measure: |scene, contender| mirror(scene, contender, scene.memory(), false),
    goals: |medians| {
        let over_threads = medians.ours_over(TwoThreads, THROUGHPUT);
        let over_writer = medians.ours_over(OneWriter, THROUGHPUT);
        vec![
            Goal::at_least("at least 2 times its throughput", over(medians, THROUGHPUT), 2.0),
            Goal::at_least("or 85 % of what two plain threads copy", over_threads, 0.85),
            Goal::at_least("or 85 % of what one writes that reads nothing", over_writer, 0.85),
        ]
    },
};

pub const DIRECT: Row = Row {
    name: "qcow2-mirror-direct",
    work: "the same on the disk, direct I/O",
    contenders: &[Ours, QemuStorageDaemon, FioReadWrite],
    measure: |scene, contender| mirror(scene, contender, scene.disk(), true),
    goals: |medians| {
        let over_fio = medians.ours_over(FioReadWrite, THROUGHPUT);
        vec![
            Goal::at_least("at least 1.5 times its throughput", over(medians, THROUGHPUT), 1.5),
            Goal::at_least("or within 10 % of what fio reads and writes at once", over_fio, 0.9),
        ]
    },
};

pub const ALLOCATING: Row = Row {
    name: "qcow2-allocating",
    work: "guest 4 KiB random writes into an empty 64 GiB image over NBD on tmpfs, depth 16",
    contenders: BOTH,
    measure: allocating,
    goals: |medians| vec![Goal::at_least("at least 1.5 times its writes", over(medians, WRITES), 1.5)],
};

pub const FULL: Row = Row {
    name: "qcow2-full",
    work: "guest 4 KiB random reads and overwrites of a full 8 GiB image over NBD on tmpfs, depth 16",
    contenders: BOTH,
    measure: full,
    goals: |medians| {
        vec![
            Goal::at_least("at least 1.3 times its reads", over(medians, READS), 1.3),
            Goal::at_least("at least 1.3 times its overwrites", over(medians, WRITES), 1.3),
        ]
    },
};

pub const SPARSE: Row = Row {
    name: "qcow2-sparse",
    work: "a sparse image of 16 TiB with 64 pieces of data: open and first read; extents of all of it",
    contenders: BOTH,
    measure: sparse,
    goals: |medians| {
        vec![
            Goal::at_most("open and first read in at most its time", over(medians, FIRST_READ), 1.0),
            Goal::at_most("extents in at most its time", over(medians, EXTENTS), 1.0),
        ]
    },
};

pub const CHECKED: Row = Row {
    name: "qcow2-check",
    work: "check of a sound image of 1 TiB on tmpfs, all of it mapped, on the command line",
    contenders: &[Ours, QemuImg],
    measure: checked,
    goals: |medians| vec![Goal::at_most("at most its time", medians.ours_over(QemuImg, TIME), 1.0)],
};

fn over(medians: &Medians, figure: Figure) -> Option<f64> {
    medians.ours_over(QemuStorageDaemon, figure)
}

fn qemu_img<const N: usize>(arguments: [&str; N]) -> Result<()> {
    let output = Command::new("qemu-img").args(arguments).output().context("starting qemu-img")?;
    ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// An image made anew.
fn empty_image(path: &Path, size: u64, options: &str) -> Result<()> {
    let _ = std::fs::remove_file(path);
    qemu_img(["create", "-q", "-f", "qcow2", "-o", options, text(path)?, &size.to_string()])
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the folder's name is text")
}

/// An image full of data, made at the first call.
fn full_image(scene: &Scene, folder: &Path, size: u64) -> Result<PathBuf> {
    let image = folder.join("source.qcow2");
    if !image.exists() {
        let raw = scene.full_disk(folder, size)?;
        qemu_img(["convert", "-f", "raw", "-O", "qcow2", text(&raw)?, text(&image)?])?;
        std::fs::remove_file(&raw)?;
    }
    Ok(image)
}

fn mirror(scene: &Scene, contender: Contender, folder: &Path, direct: bool) -> Result<Sample> {
    let size = scene.size(2 * GIB);
    let source = full_image(scene, folder, size)?;
    match contender {
        // The image's own bytes, as a plain file.
        TwoThreads => {
            let len = source.metadata()?.len();
            return plainly(folder, len, |target| copy_with_two_threads(&source, target));
        }
        OneWriter => return plainly(folder, size, |target| write_with_one_thread(target, size)),
        FioReadWrite => return read_and_write_at_once(folder, &source, size),
        _ => {}
    }
    let target = folder.join("target.qcow2");
    empty_image(&target, size, "compat=1.1")?;
    let disk = DiskOptions { direct, thin: false, format: Format::Qcow2 };
    let mut daemon = ControlledDaemon::start(contender, folder)?;
    daemon.add_disk("source", &source, disk)?;
    daemon.add_disk("target", &target, disk)?;
    let start = Instant::now();
    start_mirror(&mut daemon)?;
    wait_for(&mut daemon, "BLOCK_JOB_READY")?;
    let took = start.elapsed().as_secs_f64();
    complete(&mut daemon)?;
    daemon.quit()?;
    let occupied = occupied(&target)?;
    qemu_img(["compare", "-f", "qcow2", "-F", "qcow2", text(&source)?, text(&target)?])?;
    qemu_img(["check", "-q", "-f", "qcow2", text(&target)?])?;
    std::fs::remove_file(&target)?;
    let sample = Sample::default().with(READY, took).with(THROUGHPUT, mib(size) / took);
    Ok(sample.with(OCCUPIED, mib(occupied)))
}

/// Serves an image and lets a guest work on it; the image must be without a fault afterwards.
fn serve(
    scene: &Scene,
    contender: Contender,
    image: &Path,
    work: impl FnOnce(&Path) -> Result<Sample>,
) -> Result<Sample> {
    let socket = scene.memory().join("nbd");
    let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
    daemon.add_disk("disk", image, DiskOptions { format: Format::Qcow2, ..DiskOptions::default() })?;
    daemon.export("disk", &socket)?;
    let sample = work(&socket)?;
    daemon.quit()?;
    qemu_img(["check", "-q", "-f", "qcow2", text(image)?])?;
    Ok(sample)
}

fn load(scene: &Scene, socket: &Path, pattern: &str, size: u64) -> Result<f64> {
    let time = Duration::from_secs(if scene.is_quick() { 1 } else { 3 });
    Load { socket, export: "disk", pattern, depth: 16, connections: 1, size, time, rate: None }
        .requests_a_second(scene.memory())
}

fn allocating(scene: &Scene, contender: Contender) -> Result<Sample> {
    let image = scene.memory().join("empty.qcow2");
    let size = 64 * GIB;
    empty_image(&image, size, "compat=1.1")?;
    let sample = serve(scene, contender, &image, |socket| {
        Ok(Sample::default().with(WRITES, load(scene, socket, "randwrite", size)?))
    });
    std::fs::remove_file(&image)?;
    sample
}

fn full(scene: &Scene, contender: Contender) -> Result<Sample> {
    let size = scene.size(8 * GIB);
    let image = scene.memory().join("full.qcow2");
    if !image.exists() {
        empty_image(&image, size, "compat=1.1,preallocation=full")?;
    }
    serve(scene, contender, &image, |socket| {
        let reads = load(scene, socket, "randread", size)?;
        let writes = load(scene, socket, "randwrite", size)?;
        Ok(Sample::default().with(READS, reads).with(WRITES, writes))
    })
}

fn sparse(scene: &Scene, contender: Contender) -> Result<Sample> {
    let size = 16 * 1024 * GIB;
    let image = scene.memory().join("sparse.qcow2");
    if !image.exists() {
        empty_image(&image, size, "compat=1.1")?;
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        for piece in 0..64 {
            command.arg("-c").arg(format!("write -P 7 {} 64k", piece * (size / 64)));
        }
        ensure!(command.arg(&image).output().context("starting qemu-io")?.status.success(), "qemu-io failed");
    }
    let socket = scene.memory().join("nbd");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
    let start = Instant::now();
    daemon.add_disk("disk", &image, DiskOptions { format: Format::Qcow2, ..DiskOptions::default() })?;
    daemon.export("disk", &socket)?;
    run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 7 0 4k", &uri]))?;
    let first = start.elapsed().as_secs_f64() * 1000.0;
    let start = Instant::now();
    run(Command::new("nbdinfo").args(["--map", "--totals", &uri]))?;
    let extents = start.elapsed().as_secs_f64();
    daemon.qmp.execute("block-export-del", json!({ "id": "export", "mode": "hard" }))?;
    daemon.quit()?;
    Ok(Sample::default().with(FIRST_READ, first).with(EXTENTS, extents))
}

fn checked(scene: &Scene, contender: Contender) -> Result<Sample> {
    let image = scene.memory().join("mapped.qcow2");
    if !image.exists() {
        empty_image(&image, scene.size(1024 * GIB), "compat=1.1,preallocation=metadata")?;
    }
    let mut command = match contender {
        QemuImg => Command::new("qemu-img"),
        _ => Command::new(our_program()),
    };
    let start = Instant::now();
    run(command.arg("check").arg(&image))?;
    Ok(Sample::default().with(TIME, start.elapsed().as_secs_f64()))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
