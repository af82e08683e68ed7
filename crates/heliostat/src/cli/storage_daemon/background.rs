//! The pid file, and the way into the background.
//!
//! A process cannot be forked safely once it has threads, so going into the background is starting the program once
//! more, in a session of its own: the first one waits until the second says that it is up, and ends.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::FlockOperation;

use super::Refused;
use super::options::IN_BACKGROUND;

/// What the second process says when it is up.
const UP: &[u8] = b"up\n";

/// A file with our process id, locked as long as we live, removed at the end.
pub(super) struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Writes it.
    ///
    /// # Errors
    /// [`Refused`] where it cannot be made, or another program holds it.
    pub(super) fn write(path: &Path) -> Result<Self, Refused> {
        let failed = |what: &str, error: &io::Error| {
            let shown = rustix::io::Errno::from_io_error(error).map_or_else(
                || error.to_string(),
                |errno| {
                    io::Error::from(errno).to_string().split(" (os").next().unwrap_or_default().to_owned()
                },
            );
            Refused(format!("cannot create PID file: {what}: {shown}"))
        };
        let create = |error: &io::Error| failed(&format!("Could not create '{}'", path.display()), error);
        let mut options = File::options();
        let opened = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let mut file = opened.map_err(|error| create(&error))?;
        rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| failed("Cannot lock pid file", &errno.into()))?;
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        written.map_err(|error| create(&error))?;
        // Found again from wherever we are at the end.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        Ok(Self { path, _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Starts the program once more, waits until that is up, and answers what to exit with.
///
/// # Errors
/// [`Refused`] where it cannot be started.
pub(super) fn start(before: &[String], arguments: &[String]) -> Result<ExitCode, Refused> {
    let failed = |error: io::Error| Refused(format!("cannot go into the background: {error}"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(before).arg(format!("--{IN_BACKGROUND}")).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(failed)?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        // It closes this when it is up, or ends.
        stdout.read_to_end(&mut said).map_err(failed)?;
    }
    if said == UP {
        return Ok(ExitCode::SUCCESS);
    }
    // It has said on standard error why.
    let status = child.wait().map_err(failed)?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code > 0);
    Ok(ExitCode::from(code.unwrap_or(1)))
}

/// Takes leave of the terminal and of whoever started us, and says that we are up.
///
/// # Errors
/// [`Refused`] where the host allows it not.
pub(super) fn settle() -> Result<(), Refused> {
    let failed = |error: io::Error| Refused(format!("cannot go into the background: {error}"));
    // Refused only to the leader of a group, which has no terminal of its own either way.
    let _ = rustix::process::setsid();
    std::env::set_current_dir("/").map_err(failed)?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    let mut stdout = io::stdout();
    stdout.write_all(UP).and_then(|()| stdout.flush()).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(|errno| failed(errno.into()))?;
    rustix::stdio::dup2_stderr(&null).map_err(|errno| failed(errno.into()))?;
    Ok(())
}
