//! [`Contender`]: who is measured, and how each of them is started.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::daemon::Daemon;
use super::qmp::Qmp;
use super::wait;
use crate::workspace;

/// Somebody or something that does the work of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// `heliostat serve`, or `heliostat mirror` where files are copied.
    Ours,
    QemuStorageDaemon,
    QemuNbd,
    NbdkitFile,
    QemuImg,
    Nbdcopy,
    Cp,
    /// Two threads that read and write, half of the disk each: what the machine can do without thinking.
    TwoThreads,
    /// One thread that writes and reads nothing: writes to one file take turns in the kernel.
    OneWriter,
    /// Ours, with guests on a mirror's target itself.
    TargetAlone,
    /// fio reading one disk and writing another at once.
    FioReadWrite,
}

impl Contender {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "heliostat",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdkitFile => "nbdkit file",
            Self::QemuImg => "qemu-img",
            Self::Nbdcopy => "nbdcopy",
            Self::Cp => "cp --sparse=auto",
            Self::TwoThreads => "two plain threads",
            Self::OneWriter => "a thread that only writes",
            Self::TargetAlone => "the target alone",
            Self::FioReadWrite => "fio read and write",
        }
    }

    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::TargetAlone)
    }
}

/// Our program, as the benchmark built it.
pub fn our_program() -> PathBuf {
    workspace::target().join("release/heliostat")
}

/// A daemon that is driven over QMP: ours or QEMU's, by the same code.
pub struct ControlledDaemon {
    contender: Contender,
    pub process: Daemon,
    pub qmp: Qmp,
}

impl ControlledDaemon {
    /// Starts an empty one with its control socket in `folder`.
    pub fn start(contender: Contender, folder: &Path) -> Result<Self> {
        let starting = || format!("starting {}", contender.name());
        let (process, socket) = if contender.is_ours() {
            let socket = folder.join("control");
            let mut command = Command::new(our_program());
            let mut process =
                Daemon::start(command.args(["serve", "--control"]).arg(&socket)).with_context(starting)?;
            process.listens(&socket).context("waiting for its control socket")?;
            (process, socket)
        } else {
            Daemon::start_qemu("qemu-storage-daemon".as_ref(), folder).with_context(starting)?
        };
        let qmp = Qmp::connect(&socket)?;
        Ok(Self { contender, process, qmp })
    }

    /// Says whether it is ours.
    pub fn is_ours(&self) -> bool {
        self.contender.is_ours()
    }

    /// Adds a node over a file.
    pub fn add_disk(&mut self, name: &str, file: &Path, disk: DiskOptions) -> Result<()> {
        let node = json!({
            "driver": disk.format.name(),
            "node-name": name,
            "discard": if disk.thin { "unmap" } else { "ignore" },
            "file": {
                "driver": "file",
                "filename": file,
                "cache": { "direct": disk.direct },
                "discard": if disk.thin { "unmap" } else { "ignore" },
            },
        });
        self.qmp.execute("blockdev-add", node).with_context(|| format!("adding the disk {name}"))?;
        Ok(())
    }

    /// Offers a node for reading and writing on a Unix socket; the export has the node's name.
    pub fn export(&mut self, node: &str, socket: &Path) -> Result<()> {
        let _ = std::fs::remove_file(socket);
        let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        self.qmp.execute("nbd-server-start", address)?;
        let export = json!({ "type": "nbd", "id": "export", "node-name": node, "writable": true });
        self.qmp.execute("block-export-add", export)?;
        self.process.listens(socket)?;
        Ok(())
    }

    /// Ends it in order, so that its files are whole.
    pub fn quit(mut self) -> Result<()> {
        let asked = self.qmp.execute("quit", json!({})).context("asking it to quit");
        if let (Err(error), false) = (&asked, self.contender.is_ours()) {
            // What was measured was measured. qemu-storage-daemon 10.0.2 is sometimes gone by then.
            println!("{}: {error:#}", self.contender.name());
        } else {
            asked?;
        }
        self.process.wait()?;
        Ok(())
    }
}

/// How a disk of a row is opened.
#[derive(Clone, Copy, Default)]
pub struct DiskOptions {
    /// Past the host's cache.
    pub direct: bool,
    /// Zeroes may become holes.
    pub thin: bool,
    /// How the file keeps the disk's bytes.
    pub format: Format,
}

/// How a file keeps a disk's bytes.
#[derive(Clone, Copy, Default)]
pub enum Format {
    /// One to one.
    #[default]
    Raw,
    /// As a qcow2 image.
    Qcow2,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A server of one raw disk on a Unix socket, without a control connection.
pub fn serve_disk(contender: Contender, file: &Path, socket: &Path) -> Result<Daemon> {
    let _ = std::fs::remove_file(socket);
    let mut command = match contender {
        Contender::QemuNbd => {
            let mut command = Command::new("qemu-nbd");
            command.args(["--format", "raw", "--persistent", "--export-name", "disk", "--socket"]);
            command.arg(socket);
            command.arg(file);
            command
        }
        _ => {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--exportname", "disk", "--unix"]).arg(socket);
            command.arg("file").arg(file);
            command
        }
    };
    // nbdkit complains there about the connection that only looks whether it listens.
    command.stderr(std::process::Stdio::null());
    let mut server = Daemon::start(&mut command).with_context(|| format!("starting {}", contender.name()))?;
    server.listens(socket)?;
    Ok(server)
}

/// The longest that a row waits for a job; a peer that has not ended by then never will.
pub const JOB_LIMIT: std::time::Duration = wait::LIMIT.saturating_mul(4);
