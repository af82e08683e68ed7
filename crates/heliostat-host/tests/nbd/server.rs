//! [`Server`]: an NBD server of somebody else, beside a test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use heliostat_host::nbd::{NbdOptions, NbdStorage, ServerAddress};
use heliostat_host::runtime::Driver;
use heliostat_host::socket::Address;

/// How long tests wait for a server to listen: its failure is a failure, a loaded machine is none.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running server at a Unix socket; killed when dropped.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// `nbdkit` with these arguments.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(socket).args(arguments);
        Self::start(command, socket)
    }

    /// `qemu-nbd` that serves a raw file.
    pub fn qemu(socket: &Path, file: &Path, arguments: &[&str]) -> Self {
        Self::qemu_of("raw", socket, file, arguments)
    }

    /// `qemu-nbd` that serves an image.
    pub fn qemu_of(format: &str, socket: &Path, file: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--discard=unmap"]).arg(format!("--format={format}"));
        command.arg(format!("--socket={}", socket.display())).args(arguments).arg(file);
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self { child, socket: socket.to_owned() }
    }

    /// How to reach it, with patience until it listens.
    pub fn options(&self) -> NbdOptions {
        options(&self.socket)
    }

    pub fn open(&self, driver: Driver) -> NbdStorage {
        NbdStorage::open_with(driver, self.options()).unwrap()
    }

    /// Kills it at once. Returns its socket.
    pub fn kill(mut self) -> PathBuf {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.socket.clone()
    }
}

pub fn options(socket: &Path) -> NbdOptions {
    let address = ServerAddress::Socket(Address::Unix(socket.to_owned()));
    NbdOptions { open_timeout: PATIENCE, ..NbdOptions::new(address, String::new()) }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
