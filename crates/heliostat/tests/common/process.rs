//! [`Daemon`]: a program that runs beside a test or a benchmark and surely ends with it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

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

    /// As [`Daemon::start`], with `input` as its standard input: descriptor 0.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_on(command: &mut Command, input: OwnedFd) -> io::Result<Self> {
        let child = command.stdin(input).stdout(Stdio::null()).spawn()?;
        Ok(Self { child })
    }

    /// Starts a `qemu-storage-daemon` whose control socket is in `folder`, and waits until it can be spoken to.
    /// Returns it with its socket.
    ///
    /// It listens before its monitor is there: of clients that connect at once, one in a hundred is never
    /// answered, and one that hangs up at once may crash it (seen with 10.0.2). It writes its process id when
    /// it is done with all that; so nobody connects before.
    ///
    /// A write beyond its limit for files fails and does not kill it (SIGXFSZ is ignored), as with ours.
    ///
    /// # Errors
    /// When the program cannot be started, has ended, or is not there within [`wait::LIMIT`].
    pub fn start_qemu(program: &Path, folder: &Path) -> io::Result<(Self, PathBuf)> {
        let [socket, ready] = ["control", "control.pid"].map(|name| folder.join(name));
        for left_behind in [&socket, &ready] {
            // One that was killed leaves them in a folder that is used again.
            let _ = std::fs::remove_file(left_behind);
        }
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(program);
        command.arg("--chardev").arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()));
        command.args(["--monitor", "chardev=c"]).arg("--pidfile").arg(&ready);
        let mut daemon = Self::start(&mut command)?;
        wait::until("qemu-storage-daemon", wait::LIMIT, || match daemon.child.try_wait() {
            Ok(None) => ready.exists().then_some(Ok(())),
            Ok(Some(status)) => Some(Err(ended_first(status))),
            Err(error) => Some(Err(error)),
        })??;
        Ok((daemon, socket))
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
            (Err(_), Ok(Some(status))) => Some(Err(ended_first(status))),
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
        self.status_bytes("VmHWM:")
    }

    /// The memory that it holds now, in bytes (`VmRSS`).
    ///
    /// # Errors
    /// When the process has ended.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, field: &str) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib =
            line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
        kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("no memory: the process has ended"))
    }

    /// The processor time that all its threads have had so far, to 10 ms.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        /// What the kernel counts in for programs (`USER_HZ`), on every architecture that we build for.
        const TICK: Duration = Duration::from_millis(10);
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // proc_pid_stat(5): the second field, the name, may hold anything, and ends with the last parenthesis.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u32>);
        let (Some(Ok(user)), Some(Ok(system))) = (ticks.next(), ticks.next()) else {
            return Err(io::Error::other("a strange /proc/PID/stat"));
        };
        Ok(TICK * (user + system))
    }
}

fn ended_first(status: ExitStatus) -> io::Error {
    io::Error::other(format!("it ended first: {status}"))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
