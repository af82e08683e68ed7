//! An NBD server inside TLS, seen from `nbdcopy`: whole disks, and small requests of a fixed depth over one connection.
//!
//! fio's NBD engine takes no folder of certificates from its address, so it is not used here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Row;
use crate::bench::contender::{Contender, ControlledDaemon, DiskOptions};
use crate::bench::daemon::Daemon;
use crate::bench::report::{Figure, Goal, Sample};
use crate::bench::scene::{GIB, Scene, empty_disk, ensure_equal, mib};

use Contender::{Ours, QemuNbd};

const FROM: Figure = "to null MiB/s";
const INTO: Figure = "from a file MiB/s";
const SMALL: Figure = "4 KiB reads/s 16x1";
const SMALL_COST: Figure = "read CPU us 16x1";

pub const TLS: Row = Row {
    name: "nbd-tls",
    work: "inside TLS, on tmpfs: nbdcopy of 1 GiB to null and from a file, and 4 KiB reads in order at depth 16",
    contenders: &[Ours, QemuNbd],
    measure,
    goals: |medians| {
        let over = |figure| medians.ours_over(QemuNbd, figure);
        vec![
            Goal::at_least("to null: 1.3 times qemu-nbd", over(FROM), 1.3),
            Goal::at_least("from a file: 1.3 times qemu-nbd", over(INTO), 1.3),
            Goal::at_least("4 KiB reads: 1.3 times qemu-nbd", over(SMALL), 1.3),
        ]
    },
};

/// A server of one disk.
enum Server {
    Ours(Box<ControlledDaemon>),
    QemuNbd(Daemon),
}

impl Server {
    fn start(contender: Contender, folder: &Path, disk: &Path, certificates: &Path) -> Result<Self> {
        let socket = folder.join("nbd");
        let _ = std::fs::remove_file(&socket);
        if contender == Ours {
            let mut daemon = ControlledDaemon::start(contender, folder)?;
            let options = json!({
                "qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "dir": certificates,
            });
            daemon.qmp.execute("object-add", options)?;
            daemon.add_disk("disk", disk, DiskOptions::default())?;
            let address = json!({ "type": "unix", "data": { "path": socket } });
            daemon.qmp.execute("nbd-server-start", json!({ "addr": address, "tls-creds": "tls" }))?;
            let export = json!({ "type": "nbd", "id": "export", "node-name": "disk", "writable": true });
            daemon.qmp.execute("block-export-add", export)?;
            daemon.process.listens(&socket)?;
            return Ok(Self::Ours(Box::new(daemon)));
        }
        let mut command = Command::new("qemu-nbd");
        command.args([
            "--format",
            "raw",
            "--persistent",
            "--shared",
            "0",
            "--export-name",
            "disk",
            "--object",
        ]);
        command.arg(format!("tls-creds-x509,id=tls,endpoint=server,dir={}", certificates.display()));
        command.args(["--tls-creds", "tls", "--socket"]).arg(&socket).arg(disk);
        // It complains there about the connection that only looks whether it listens.
        command.stderr(std::process::Stdio::null());
        let mut daemon = Daemon::start(&mut command).context("starting qemu-nbd")?;
        daemon.listens(&socket)?;
        Ok(Self::QemuNbd(daemon))
    }

    fn process(&self) -> &Daemon {
        match self {
            Self::Ours(daemon) => &daemon.process,
            Self::QemuNbd(daemon) => daemon,
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Ours(daemon) => daemon.quit(),
            Self::QemuNbd(_) => Ok(()),
        }
    }
}

fn measure(scene: &Scene, contender: Contender) -> Result<Sample> {
    let (folder, size) = (scene.memory(), scene.size(GIB));
    let certificates = certificates(folder)?;
    let source = scene.full_disk(folder, size)?;
    let socket = folder.join("nbd");
    let uri = format!(
        "nbds+unix://localhost/disk?socket={}&tls-certificates={}",
        socket.display(),
        certificates.display()
    );
    let server = Server::start(contender, folder, &source, &certificates)?;
    let from = nbdcopy(&[&uri, "null:"])?;
    let before = server.process().cpu_time()?;
    let small = nbdcopy(&["--request-size=4096", "--requests=16", "--connections=1", &uri, "null:"])?;
    let cost = server.process().cpu_time()?.saturating_sub(before);
    server.end()?;
    let requests = mib(size) * 256.0;

    let target = folder.join("target");
    empty_disk(&target, size)?;
    let server = Server::start(contender, folder, &target, &certificates)?;
    let into = nbdcopy(&[&source.to_string_lossy(), &uri])?;
    server.end()?;
    ensure_equal(&source, &target, [(0, size)].into_iter())?;
    std::fs::remove_file(&target)?;
    Ok(Sample::default()
        .with(FROM, mib(size) / from)
        .with(INTO, mib(size) / into)
        .with(SMALL, requests / small)
        .with(SMALL_COST, cost.as_secs_f64() * 1e6 / requests))
}

/// Seconds that it takes.
fn nbdcopy(arguments: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let output = Command::new("nbdcopy").args(arguments).output().context("starting nbdcopy")?;
    let took = start.elapsed().as_secs_f64();
    ensure!(output.status.success(), "nbdcopy: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(took)
}

/// A folder with certificates of both sides, in the layout of QEMU and libnbd.
fn certificates(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("certificates");
    if path.join("client-cert.pem").exists() {
        return Ok(path);
    }
    std::fs::create_dir_all(&path)?;
    let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let authority = ["-subj", "/CN=benchmark", "-addext", "keyUsage=critical,keyCertSign"];
    let out = ["-x509", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"];
    openssl(&path, &[&["req"][..], &new_key, &out, &authority].concat())?;
    for (side, usage) in [("server", "serverAuth"), ("client", "clientAuth")] {
        let [key, request, certificate] =
            ["key.pem", "request.pem", "cert.pem"].map(|end| format!("{side}-{end}"));
        let subject = format!("/CN={side}");
        let out = ["-keyout", &key, "-out", &request, "-subj", &subject];
        openssl(&path, &[&["req"][..], &new_key, &out].concat())?;
        let extensions = format!(
            "subjectAltName=DNS:localhost\nkeyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage={usage}\n"
        );
        std::fs::write(path.join("extensions"), extensions)?;
        let signer = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial"];
        let files = ["-in", &request, "-out", &certificate, "-extfile", "extensions"];
        openssl(&path, &[&["x509", "-req"][..], &signer, &files].concat())?;
    }
    Ok(path)
}

fn openssl(folder: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").current_dir(folder).args(arguments).output();
    let output = output.context("starting openssl")?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
