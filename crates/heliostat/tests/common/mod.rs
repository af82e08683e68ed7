//! What end to end tests share: tools that may be missing, folders, the daemon, control clients, waiting.
//!
//! Each test file says `mod common;`. Never decides what is right; that is the test's own business.

#![allow(dead_code, reason = "each test file is a program of its own and uses only its part of this")]

pub mod certificates;
pub mod process;
pub mod qcow2;
pub mod qmp;
pub mod scene;
pub mod wait;

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use self::process::Daemon;

/// Says that this test cannot run here, and why. The test then returns; `cargo xtask test` counts it as
/// skipped, and in continuous integration as failed.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let mut stderr = std::io::stderr();
    let _ = writeln!(stderr, "SKIPPED: {test}: {reason}");
    if let Some(log) = std::env::var_os("HELIOSTAT_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(log);
        // One write: tests of several processes append at once.
        let line = format!("{test}: {reason}\n");
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .expect("the log of skipped tests is writable");
    }
}

/// Finds a program in the path. `None`, having said so with [`skip`], where it is missing.
///
/// `let Some(qemu_io) = tool("qemu-io") else { return };`
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// A command that runs libnbd's shell. `None`, having said so, where it is missing.
pub fn nbdsh() -> Option<Command> {
    let mut command = Command::new(tool("nbdsh")?);
    // Its module belongs to the distribution's interpreter, which need not be the first in the path.
    command.env("PATH", "/usr/bin:/bin");
    Some(command)
}

/// Finds the Python interpreter that has the package `qemu.qmp`. `None`, having said so, where there is none.
pub fn python_with_qmp() -> Option<PathBuf> {
    let beside_the_build = || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("python/bin/python");
    let python = std::env::var_os("HELIOSTAT_PYTHON").map_or_else(beside_the_build, PathBuf::from);
    let works = run_quietly(Command::new(&python).args(["-c", "import qemu.qmp"]));
    if works {
        return Some(python);
    }
    skip("the Python package qemu.qmp is not installed; cargo xtask test does it");
    None
}

fn run_quietly(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
}

/// Makes a folder for one test, in memory where the machine has such a place; it goes with its value.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new().prefix("heliostat-").tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir()).expect("a temporary folder can be made")
}

/// Makes a folder for one test on the file system of the build, for what memory cannot do (direct I/O, say).
pub fn folder_on_disk() -> tempfile::TempDir {
    let place = env!("CARGO_TARGET_TMPDIR");
    tempfile::Builder::new().prefix("heliostat-").tempdir_in(place).expect("cargo made the folder for tests")
}

/// The program under test.
pub const HELIOSTAT: &str = env!("CARGO_BIN_EXE_heliostat");

/// Runs the program under test to its end, without standard input.
pub fn heliostat<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    let mut command = Command::new(HELIOSTAT);
    command.args(arguments).stdin(Stdio::null());
    command.output().expect("the program was built before its tests")
}

/// Starts the program under test and leaves it running until the value is dropped.
pub fn start_heliostat<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Daemon {
    Daemon::start(Command::new(HELIOSTAT).args(arguments)).expect("the program was built before its tests")
}
