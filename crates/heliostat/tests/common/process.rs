//! [`Daemon`]: a program that runs beside a test or a benchmark and surely ends with it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use super::wait;

/// A running program. Dropping it kills it; [`Daemon::stop`] asks it to end in order.
///
/// What it prints on standard error goes to the test's own, where the runner shows it for tests that fail.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts `command` without standard input; its standard output is not read.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        Ok(Self { child })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Connects to a socket of its, as soon as it listens there.
    ///
    /// # Errors
    /// When the program has ended, or does not listen within [`wait::LIMIT`].
    pub fn connect(&mut self, socket: &Path) -> io::Result<UnixStream> {
        let what = format!("a server at {}", socket.display());
        wait::until(&what, wait::LIMIT, || match (UnixStream::connect(socket), self.child.try_wait()) {
            (Ok(stream), _) => Some(Ok(stream)),
            (Err(_), Ok(Some(status))) => Some(Err(io::Error::other(format!("it ended first: {status}")))),
            _ => None,
        })?
    }

    /// Waits until it listens on a socket.
    ///
    /// # Errors
    /// As [`Daemon::connect`].
    pub fn listens(&mut self, socket: &Path) -> io::Result<()> {
        self.connect(socket).map(drop)
    }

    /// Says whether it still runs.
    ///
    /// # Errors
    /// The host's.
    pub fn is_running(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends it a signal by its name, `TERM` or `INT` or `STOP`.
    ///
    /// # Errors
    /// When there is no such process any more.
    pub fn signal(&self, name: &str) -> io::Result<()> {
        // The shell's own kill: std has none, and a program of that name is not on every machine.
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.id())]).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("kill -{name}: {status}"))) }
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// `TimedOut` after [`wait::LIMIT`]; it is killed then.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        wait::until("the program's end", wait::LIMIT, || self.child.try_wait().transpose())?
    }

    /// Asks it to end with SIGTERM and waits for that.
    ///
    /// # Errors
    /// As [`Daemon::signal`] and [`Daemon::wait`].
    pub fn stop(self) -> io::Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait()
    }

    /// Kills it with SIGKILL, as a crash would, and waits for that.
    ///
    /// # Errors
    /// The host's.
    pub fn kill(mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    /// The most memory that it has held so far, in bytes (`VmHWM`).
    ///
    /// # Errors
    /// When the process has ended.
    pub fn resident_bytes_max(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib =
            line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
        kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no VmHWM: the process has ended"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
