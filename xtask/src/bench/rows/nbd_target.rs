//! A mirror whose target is behind an NBD server: near, far, slow, and gone for a while.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Row;
use super::mirror::{complete, wait_for};
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions};
use crate::bench::daemon::Daemon;
use crate::bench::fio::{Load, now_ms};
use crate::bench::report::{Figure, Goal, Sample};
use crate::bench::scene::{GIB, MIB, Scene, empty_disk, ensure_equal, mib};
use crate::process;

use Contender::{Ours, QemuStorageDaemon, TargetAlone};

const READY: Figure = "ready s";
const THROUGHPUT: Figure = "MiB/s";
const MEAN: Figure = "mean ms";
const P99: Figure = "p99 ms";
const LONGEST: Figure = "longest ms";
const CAUGHT_UP: Figure = "caught up s";

/// How long a guest writes before what is measured begins: fio's own start.
const SETTLED: Duration = Duration::from_millis(500);
/// The guest is stopped when everything is done; this is only its limit.
const GUEST_LIMIT: Duration = Duration::from_secs(300);
/// What ours waits for a target before it answers its guest without it.
const DEADLINE: Duration = Duration::from_secs(1);
/// How long the target stays away.
const AWAY: Duration = Duration::from_secs(3);

pub const NEAR: Row = Row {
    name: "nbd-target",
    work: "idle mirror of 2 GiB on tmpfs to `nbdkit memory` over a Unix socket, to READY",
    contenders: &[Ours, QemuStorageDaemon],
    measure: |scene, contender| {
        let size = scene.size(2 * GIB);
        let socket = scene.memory().join("target-nbd");
        let _target =
            Target::start(None, &Place::Unix(socket.clone()), &["memory".into(), size.to_string()])?;
        to_ready(scene, contender, size, json!({ "type": "unix", "path": socket }))
    },
    goals: |medians| {
        let over = medians.ours_over(QemuStorageDaemon, THROUGHPUT);
        vec![Goal::at_least("at least 1.5 times its throughput", over, 1.5)]
    },
};

pub const FAR: Row = Row {
    name: "nbd-target-far",
    work: "the same over TCP to another network namespace, 5 ms there and back",
    contenders: &[Ours, QemuStorageDaemon],
    measure: |scene, contender| {
        let size = scene.size(2 * GIB);
        let link = Link::make("2.5")?;
        let port = 10809;
        let place = Place::Tcp(link.there.clone(), port);
        let _target = Target::start(Some(&link), &place, &["memory".into(), size.to_string()])?;
        let server = json!({ "type": "inet", "host": link.there, "port": port.to_string() });
        to_ready(scene, contender, size, server)
    },
    goals: NEAR.goals,
};

pub const SLOW: Row = Row {
    name: "nbd-write-blocking",
    work: "guest at 1,024 4 KiB writes a second, doubled onto a target that takes 2 ms for a write",
    contenders: &[Ours, QemuStorageDaemon, TargetAlone],
    measure: write_blocking,
    goals: |medians| {
        let over = medians.ours_over(TargetAlone, MEAN);
        vec![Goal::at_most("guest latency within 10 % of the slower side alone", over, 1.1)]
    },
};

pub const GONE: Row = Row {
    name: "nbd-target-killed",
    work: "guest at 5,000 4 KiB writes a second, doubled onto a target that is killed and comes back after 3 s",
    contenders: &[Ours, QemuStorageDaemon],
    measure: killed,
    goals: |medians| {
        let longest = medians.get(Ours, LONGEST);
        let bound = DEADLINE.as_secs_f64() * 1000.0 + 50.0;
        vec![Goal::at_most("no request longer than the deadline and 50 ms", longest, bound)]
    },
};

/// The line and the host at its end: the tests' own.
const FAR_HOST: &str = "crates/heliostat/tests/common/far_host.py";

/// Where a target listens.
enum Place {
    Unix(PathBuf),
    /// An address and a port in another network namespace.
    Tcp(String, u16),
}

/// An NBD server that a mirror writes to.
struct Target {
    _process: Daemon,
}

impl Target {
    /// Starts `nbdkit` with these arguments behind where it listens.
    fn start(link: Option<&Link>, place: &Place, arguments: &[String]) -> Result<Self> {
        let mut command = link.map_or_else(|| Command::new("nbdkit"), |link| link.inside("nbdkit"));
        command.arg("--foreground").stderr(Stdio::null());
        match place {
            Place::Unix(socket) => {
                let _ = std::fs::remove_file(socket);
                command.arg("--unix").arg(socket)
            }
            Place::Tcp(_, port) => command.arg("--port").arg(port.to_string()),
        };
        let mut process = Daemon::start(command.args(arguments)).context("starting nbdkit")?;
        match place {
            Place::Unix(socket) => process.listens(socket)?,
            Place::Tcp(there, port) => listens(there, *port)?,
        }
        Ok(Self { _process: process })
    }
}

/// Waits until something listens on a port of the other namespace.
fn listens(there: &str, port: u16) -> Result<()> {
    let address = format!("{there}:{port}");
    let since = Instant::now();
    while std::net::TcpStream::connect(&address).is_err() {
        ensure!(since.elapsed() < Duration::from_secs(30), "nothing listens on {address}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A host at the other end of a slow line, as the tests have it: gone when dropped.
struct Link {
    /// The other host.
    there: String,
    line: Child,
    answers: BufReader<ChildStdout>,
}

impl Link {
    /// Every packet takes so many milliseconds, each way.
    fn make(delay_ms: &str) -> Result<Self> {
        // Each has addresses of its own: those of the last one may go a moment after it.
        static MADE: AtomicU8 = AtomicU8::new(0);
        let net = format!("10.213.{}", MADE.fetch_add(1, Ordering::Relaxed));
        let (here, there) = (format!("{net}.1"), format!("{net}.2"));
        // Packets as large as there are, so that the line's own work is small beside that of who uses it.
        let mut command = process::command("python3", &[FAR_HOST, &here, &there, "65520"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut line = command.spawn().context("starting the line")?;
        let answers = BufReader::new(line.stdout.take().context("its output was asked for as a pipe")?);
        let mut link = Self { there, line, answers };
        link.hears("ready").context("there is no line to another host: it takes root and /dev/net/tun")?;
        let orders = link.line.stdin.as_mut().context("its input was asked for as a pipe")?;
        writeln!(orders, "delay {delay_ms}")?;
        link.hears("done")?;
        Ok(link)
    }

    fn hears(&mut self, wanted: &str) -> Result<()> {
        let mut heard = String::new();
        self.answers.read_line(&mut heard)?;
        ensure!(heard.trim() == wanted, "the line said {heard:?}");
        Ok(())
    }

    /// A command that runs there.
    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.line.id().to_string(), "--net", program]);
        command
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.line.kill();
        let _ = self.line.wait();
    }
}

/// Adds the node `target` over an NBD server.
fn add_target(daemon: &mut ControlledDaemon, server: Value) -> Result<()> {
    // So long, QEMU's daemon holds requests for a server that is gone. Ours holds nobody for longer than the deadline.
    let node = json!({ "driver": "nbd", "node-name": "target", "server": server, "reconnect-delay": 10 });
    daemon.qmp.execute("blockdev-add", node).context("adding the target")?;
    Ok(())
}

fn to_ready(scene: &Scene, contender: Contender, size: u64, server: Value) -> Result<Sample> {
    let source = scene.full_disk(scene.memory(), size)?;
    let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
    daemon.add_disk("source", &source, DiskOptions::default())?;
    add_target(&mut daemon, server)?;
    let start = Instant::now();
    super::mirror::start_mirror(&mut daemon)?;
    wait_for(&mut daemon, "BLOCK_JOB_READY")?;
    let took = start.elapsed().as_secs_f64();
    daemon.qmp.execute("block-job-cancel", json!({ "device": "mirror" }))?;
    wait_for(&mut daemon, "BLOCK_JOB_COMPLETED")?;
    daemon.quit()?;
    Ok(Sample::default().with(READY, took).with(THROUGHPUT, mib(size) / took))
}

/// Starts the job `mirror` in write-blocking mode, and waits until it is READY.
fn double_writes(daemon: &mut ControlledDaemon) -> Result<()> {
    let mut job = json!({
        "job-id": "mirror", "device": "source", "target": "target", "sync": "full", "copy-mode": "write-blocking",
    });
    if daemon.is_ours() {
        job["target-deadline-ms"] = json!(u64::try_from(DEADLINE.as_millis())?);
    }
    daemon.qmp.execute("blockdev-mirror", job).context("starting the mirror")?;
    wait_for(daemon, "BLOCK_JOB_READY")?;
    Ok(())
}

fn write_blocking(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (folder, size) = (scene.memory(), scene.size(256 * MIB));
    let source = scene.full_disk(folder, size)?;
    let socket = folder.join("target-nbd");
    let arguments = ["--filter=delay", "memory", &size.to_string(), "wdelay=2ms"].map(str::to_owned);
    let _target = Target::start(None, &Place::Unix(socket.clone()), &arguments)?;
    let mut daemon = ControlledDaemon::start(contender, folder)?;
    daemon.add_disk("source", &source, DiskOptions::default())?;
    add_target(&mut daemon, json!({ "type": "unix", "path": socket }))?;
    let guests = folder.join("nbd");
    let disk = if contender == TargetAlone { "target" } else { "source" };
    daemon.export(disk, &guests)?;
    if contender != TargetAlone {
        double_writes(&mut daemon)?;
    }
    let guest = guest(&guests, disk, size, 1024).start(folder)?;
    thread::sleep(SETTLED);
    let from = now_ms();
    thread::sleep(Duration::from_secs(if scene.is_quick() { 1 } else { 5 }));
    let to = now_ms();
    let latencies = guest.stop()?;
    if contender != TargetAlone {
        daemon.qmp.execute("block-job-cancel", json!({ "device": "mirror", "force": true }))?;
        daemon.qmp.wait_event("BLOCK_JOB_CANCELLED", GUEST_LIMIT)?;
    }
    daemon.quit()?;
    let spread = latencies.between(from, to)?;
    Ok(Sample::default().with(MEAN, spread.mean_ms).with(P99, spread.p99_ms))
}

fn guest<'a>(socket: &'a Path, export: &'a str, size: u64, rate: u32) -> Load<'a> {
    Load {
        socket,
        export,
        pattern: "randwrite",
        depth: 16,
        connections: 1,
        size,
        time: GUEST_LIMIT,
        rate: Some(rate),
    }
}

fn killed(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (folder, size) = (scene.memory(), scene.size(256 * MIB));
    let source = scene.full_disk(folder, size)?;
    let copy = folder.join("target");
    empty_disk(&copy, size)?;
    let place = Place::Unix(folder.join("target-nbd"));
    let arguments = ["file".to_owned(), copy.display().to_string()];
    let target = Target::start(None, &place, &arguments)?;
    let mut daemon = ControlledDaemon::start(contender, folder)?;
    daemon.add_disk("source", &source, DiskOptions::default())?;
    add_target(&mut daemon, json!({ "type": "unix", "path": folder.join("target-nbd") }))?;
    let guests = folder.join("nbd");
    daemon.export("source", &guests)?;
    double_writes(&mut daemon)?;
    let guest = guest(&guests, "source", size, 5000).start(folder)?;
    thread::sleep(SETTLED);
    let from = now_ms();
    drop(target);
    thread::sleep(AWAY);
    let _again = Target::start(None, &place, &arguments)?;
    let back = Instant::now();
    caught_up(&mut daemon)?;
    let caught_up = back.elapsed().as_secs_f64();
    // Requests that were held have ended by then, also with who tries again after 1, 2 and 4 seconds.
    thread::sleep(Duration::from_secs(if scene.is_quick() { 5 } else { 8 }));
    let to = now_ms();
    let latencies = guest.stop()?;
    complete(&mut daemon)?;
    daemon.quit()?;
    ensure_equal(&source, &copy, [(0, size)].into_iter())?;
    let spread = latencies.between(from, to)?;
    Ok(Sample::default().with(LONGEST, spread.longest_ms).with(CAUGHT_UP, caught_up))
}

/// Waits until the job has nothing more to copy than what a guest writes in a moment.
fn caught_up(daemon: &mut ControlledDaemon) -> Result<()> {
    let since = Instant::now();
    loop {
        let jobs = daemon.qmp.execute("query-block-jobs", json!({}))?;
        let job = &jobs[0];
        let (len, offset) = (job["len"].as_u64(), job["offset"].as_u64());
        let left = len.zip(offset).map(|(len, offset)| len.saturating_sub(offset));
        if left.context("the job is gone")? <= 4 * MIB && job["io-status"] == "ok" {
            return Ok(());
        }
        ensure!(since.elapsed() < Duration::from_secs(60), "it does not catch up: {job}");
        thread::sleep(Duration::from_millis(20));
    }
}
