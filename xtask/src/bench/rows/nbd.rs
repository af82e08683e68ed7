//! An NBD server seen from its clients: whole disks through `nbdcopy`, small requests at several depths over one
//! and four connections, and connections that say nothing.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Row;
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions, serve_disk};
use crate::bench::daemon::Daemon;
use crate::bench::fio::Load;
use crate::bench::report::{Figure, Goal, Medians, Sample};
use crate::bench::scene::{GIB, Scene, empty_disk, ensure_equal, mib};

use Contender::{NbdkitFile, Ours, QemuNbd, QemuStorageDaemon};

const FROM: Figure = "to null MiB/s";
const INTO: Figure = "from a file MiB/s";
const IDLE: Figure = "KiB a connection";

pub const COPY: Row = Row {
    name: "nbd-copy",
    work: "nbdcopy of 2 GiB on tmpfs: from the server to null, and from a file to the server",
    contenders: &[Ours, QemuStorageDaemon, QemuNbd, NbdkitFile],
    measure: copy,
    goals: |medians| {
        let over = |other, figure| medians.ours_over(other, figure);
        vec![
            Goal::at_least("to null: 1.2 times nbdkit file", over(NbdkitFile, FROM), 1.2),
            Goal::at_least("to null: 1.2 times qemu-nbd", over(QemuNbd, FROM), 1.2),
            Goal::at_least("from a file: 1.2 times nbdkit file", over(NbdkitFile, INTO), 1.2),
            Goal::at_least("from a file: 1.2 times qemu-nbd", over(QemuNbd, INTO), 1.2),
        ]
    },
};

pub const CACHED: Row = Row {
    name: "nbd-cached",
    work: "guest 4 KiB random requests on tmpfs, page-cached, depths 1, 16 and 64, one and four connections",
    contenders: &[Ours, QemuStorageDaemon, NbdkitFile],
    measure: |scene, contender| requests(scene, contender, scene.memory(), DiskOptions::default()),
    goals: past_nbdkit,
};

pub const DIRECT: Row = Row {
    name: "nbd-direct",
    work: "the same on the disk, direct I/O, which nbdkit file does not know",
    contenders: &[Ours, QemuStorageDaemon],
    measure: |scene, contender| {
        let disk = DiskOptions { direct: true, ..DiskOptions::default() };
        requests(scene, contender, scene.disk(), disk)
    },
    goals: past_its,
};

pub const CONNECTED: Row = Row {
    name: "nbd-idle",
    work: "1,000 connections that have chosen their export and say nothing",
    contenders: &[Ours, QemuStorageDaemon, NbdkitFile],
    measure: idle,
    goals: |medians| vec![Goal::at_most("under 32 KiB each", medians.get(Ours, IDLE), 32.0)],
};

/// A load of [`CACHED`] and [`DIRECT`]: the requests, and what processor time each takes the server.
struct Kind {
    requests: Figure,
    cost: Figure,
    pattern: &'static str,
    depth: u32,
    connections: u32,
}

macro_rules! kinds {
    ($($pattern:literal $short:literal $depth:literal $connections:literal;)*) => {
        &[$(Kind {
            requests: concat!($short, "/s ", $depth, "x", $connections),
            cost: concat!($short, " CPU us ", $depth, "x", $connections),
            pattern: $pattern,
            depth: $depth,
            connections: $connections,
        },)*]
    };
}

const KINDS: &[Kind] = kinds! {
    "randread" "read" 1 1;
    "randread" "read" 16 1;
    "randread" "read" 64 1;
    "randread" "read" 1 4;
    "randread" "read" 16 4;
    "randread" "read" 64 4;
    "randwrite" "write" 1 1;
    "randwrite" "write" 16 1;
    "randwrite" "write" 64 1;
    "randwrite" "write" 1 4;
    "randwrite" "write" 16 4;
    "randwrite" "write" 64 4;
};

fn past_nbdkit(medians: &Medians) -> Vec<Goal> {
    past(medians, NbdkitFile, ["at least nbdkit file in each", "less CPU a request than it, depth 16 and 64"])
}

fn past_its(medians: &Medians) -> Vec<Goal> {
    past(medians, QemuStorageDaemon, ["at least its requests in each", "less CPU a request, depth 16 and 64"])
}

/// The worst of all kinds of load decides.
fn past(medians: &Medians, other: Contender, texts: [&'static str; 2]) -> Vec<Goal> {
    let worst = |figures: Vec<Figure>, pick: fn(f64, f64) -> f64| {
        let ratios: Option<Vec<f64>> =
            figures.into_iter().map(|figure| medians.ours_over(other, figure)).collect();
        ratios.and_then(|ratios| ratios.into_iter().reduce(pick))
    };
    let deep = KINDS.iter().filter(|kind| kind.depth > 1).map(|kind| kind.cost).collect();
    vec![
        Goal::at_least(texts[0], worst(KINDS.iter().map(|kind| kind.requests).collect(), f64::min), 1.0),
        Goal::at_most(texts[1], worst(deep, f64::max), 1.0),
    ]
}

/// A server of one disk, whoever it is.
enum Server {
    Controlled(Box<ControlledDaemon>),
    Plain(Daemon),
}

impl Server {
    fn start(scene: &Scene, contender: Contender, disk: &Path, options: DiskOptions) -> Result<Self> {
        let socket = scene.memory().join("nbd");
        if !matches!(contender, Ours | QemuStorageDaemon) {
            return Ok(Self::Plain(serve_disk(contender, disk, &socket)?));
        }
        let mut daemon = ControlledDaemon::start(contender, scene.memory())?;
        daemon.add_disk("disk", disk, options)?;
        daemon.export("disk", &socket)?;
        Ok(Self::Controlled(Box::new(daemon)))
    }

    fn process(&self) -> &Daemon {
        match self {
            Self::Controlled(daemon) => &daemon.process,
            Self::Plain(daemon) => daemon,
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Controlled(daemon) => daemon.quit(),
            Self::Plain(_) => Ok(()),
        }
    }
}

fn copy(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (folder, size) = (scene.memory(), scene.size(2 * GIB));
    let source = scene.full_disk(folder, size)?;
    let server = Server::start(scene, contender, &source, DiskOptions::default())?;
    let uri = format!("nbd+unix:///disk?socket={}", folder.join("nbd").display());
    let from = nbdcopy(&uri, "null:")?;
    server.end()?;

    let target = folder.join("target");
    empty_disk(&target, size)?;
    let server = Server::start(scene, contender, &target, DiskOptions::default())?;
    let into = nbdcopy(&source.to_string_lossy(), &uri)?;
    server.end()?;
    ensure_equal(&source, &target, [(0, size)].into_iter())?;
    std::fs::remove_file(&target)?;
    Ok(Sample::default().with(FROM, mib(size) / from).with(INTO, mib(size) / into))
}

/// Seconds that it takes.
fn nbdcopy(from: &str, to: &str) -> Result<f64> {
    let start = Instant::now();
    let output = Command::new("nbdcopy").args(["--", from, to]).output().context("starting nbdcopy")?;
    let took = start.elapsed().as_secs_f64();
    ensure!(output.status.success(), "nbdcopy: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(took)
}

fn requests(scene: &Scene, contender: Contender, folder: &Path, options: DiskOptions) -> Result<Sample> {
    let disk = scene.full_disk(folder, scene.size(GIB))?;
    let server = Server::start(scene, contender, &disk, options)?;
    let mut sample = Sample::default();
    for kind in KINDS {
        let load = Load {
            socket: &scene.memory().join("nbd"),
            export: "disk",
            pattern: kind.pattern,
            depth: kind.depth,
            connections: kind.connections,
            size: scene.size(GIB),
            time: Duration::from_millis(if scene.is_quick() { 500 } else { 1500 }),
            rate: None,
        };
        let before = server.process().cpu_time()?;
        let done = load.requests(scene.memory())?;
        let took = server.process().cpu_time()?.saturating_sub(before);
        sample = sample.with(kind.requests, done.a_second);
        sample = sample.with(kind.cost, took.as_secs_f64() * 1e6 / done.count.max(1.0));
    }
    server.end()?;
    Ok(sample)
}

fn idle(scene: &Scene, contender: Contender) -> Result<Sample> {
    const CONNECTIONS: u32 = 1000;
    let folder = scene.memory();
    let (disk, socket) = (folder.join("small"), folder.join("nbd"));
    empty_disk(&disk, 1 << 20)?;
    let server = if matches!(contender, Ours | QemuStorageDaemon) {
        let mut daemon = ControlledDaemon::start(contender, folder)?;
        daemon.add_disk("disk", &disk, DiskOptions::default())?;
        let address = json!({ "type": "unix", "data": { "path": socket } });
        daemon.qmp.execute("nbd-server-start", json!({ "addr": address, "max-connections": 0 }))?;
        let export = json!({ "type": "nbd", "id": "export", "node-name": "disk", "writable": true });
        daemon.qmp.execute("block-export-add", export)?;
        daemon.process.listens(&socket)?;
        Server::Controlled(Box::new(daemon))
    } else {
        Server::Plain(serve_disk(contender, &disk, &socket)?)
    };
    let connect = |count: u32| -> Result<Vec<UnixStream>> {
        (0..count).map(|_| choose_export(&socket, "disk").context("a connection")).collect()
    };
    // The first ones make the server allocate what it needs once.
    let first = connect(10)?;
    let before = server.process().resident_bytes()?;
    let all = connect(CONNECTIONS)?;
    let after = server.process().resident_bytes()?;
    drop((first, all));
    server.end()?;
    std::fs::remove_file(&disk)?;
    let kib = mib(after.saturating_sub(before)) * 1024.0 / f64::from(CONNECTIONS);
    Ok(Sample::default().with(IDLE, kib))
}

/// Connects and chooses an export, as the NBD document's "newstyle negotiation" has it.
fn choose_export(socket: &Path, name: &str) -> io::Result<UnixStream> {
    const OPTION: u64 = 0x4948_4156_454f_5054;
    const GO: u32 = 7;
    const ACK: u32 = 1;
    let mut stream = UnixStream::connect(socket)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let len = u32::try_from(name.len()).map_err(io::Error::other)?;
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend(OPTION.to_be_bytes());
    hello.extend(GO.to_be_bytes());
    hello.extend((len + 6).to_be_bytes());
    hello.extend(len.to_be_bytes());
    hello.extend(name.as_bytes());
    hello.extend(0_u16.to_be_bytes());
    stream.write_all(&hello)?;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut data = vec![0; usize::try_from(word(16)).map_err(io::Error::other)?];
        stream.read_exact(&mut data)?;
        match word(12) {
            ACK => return Ok(stream),
            kind if kind >= 1 << 31 => return Err(io::Error::other("the server refused the export")),
            _ => {}
        }
    }
}
