//! Faults of the host that any daemon meets alike: a file system that is full, a disk whose medium is gone, a
//! limit on how long files may become. Each can be mended again.
//!
//! The first two need an administrator's rights; where there are none, tests say so and are skipped.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Peer;
use crate::common;

/// Room on a [`SmallMemory`].
const ROOM: usize = 256 << 10;

/// A small file system in memory, mounted as long as the value lives.
pub struct SmallMemory(PathBuf);

impl SmallMemory {
    /// Says whether there can be one; if not, says so aloud too.
    pub fn is_possible() -> bool {
        let folder = common::folder();
        let made = Self::try_mount(&folder.path().join("try"));
        made.map_err(|why| common::skip(&format!("cannot mount a small file system: {why}"))).is_ok()
    }

    /// Mounts one at `path`, which is made.
    pub fn mount(path: &Path) -> Self {
        Self::try_mount(path).expect("it was possible before")
    }

    fn try_mount(path: &Path) -> Result<Self, String> {
        fs::create_dir(path).map_err(|error| error.to_string())?;
        let size = format!("size={ROOM}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "heliostat-test"]).arg(path))?;
        Ok(Self(path.to_owned()))
    }

    /// Makes a file in it that is all hole.
    pub fn hole(&self, name: &str, size: u64) {
        File::create(self.0.join(name))
            .and_then(|file| file.set_len(size))
            .expect("there is room for a hole");
    }

    /// Takes all room that is left.
    pub fn fill(folder: &Path) {
        let mut filler = File::create(folder.join("filler")).expect("there is room for a name");
        let taken = (0..=ROOM / 4096).find(|_| filler.write_all(&[1; 4096]).is_err());
        assert!(taken.is_some(), "it takes more than it has room for");
    }

    /// Gives it back.
    pub fn empty(folder: &Path) {
        fs::remove_file(folder.join("filler")).expect("it was filled");
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        // Lazily: a daemon may still hold files open; it goes with them.
        let _ = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// A block device over a file, as long as the value lives. Where the file is cut short, reads fail.
pub struct Disk {
    device: String,
}

impl Disk {
    /// Says whether there can be one; if not, says so aloud too.
    pub fn is_possible() -> bool {
        let folder = common::folder();
        let made = Self::try_make(&folder.path().join("try"), 4096, &folder.path().join("device"));
        made.map_err(|why| common::skip(&format!("cannot make a block device: {why}"))).is_ok()
    }

    /// Makes one over the new file `medium`, with data all over, and shows it at `link`.
    pub fn make(medium: &Path, size: usize, link: &Path) -> Self {
        Self::try_make(medium, size, link).expect("it was possible before")
    }

    fn try_make(medium: &Path, size: usize, link: &Path) -> Result<Self, String> {
        Self::bring_back(medium, size);
        Self::try_over(medium, link)
    }

    /// Makes one over a file that is there, and shows it at `link`.
    pub fn over(medium: &Path, link: &Path) -> Self {
        Self::try_over(medium, link).expect("it was possible before")
    }

    fn try_over(medium: &Path, link: &Path) -> Result<Self, String> {
        let device = run(Command::new("losetup").args(["--find", "--show"]).arg(medium))?;
        let disk = Self { device: device.trim().to_owned() };
        std::os::unix::fs::symlink(&disk.device, link).map_err(|error| error.to_string())?;
        Ok(disk)
    }

    /// Takes the medium away: what was not read before cannot be read.
    pub fn take_away(medium: &Path) {
        OpenOptions::new().write(true).open(medium).and_then(|file| file.set_len(0)).expect("it is ours");
    }

    /// Brings it back, with the same data.
    pub fn bring_back(medium: &Path, size: usize) {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(medium);
        file.and_then(|mut file| file.write_all(&vec![7; size])).expect("the folder is writable");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // One that is still open goes when it is closed.
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.device));
    }
}

/// Limits how far into files a daemon may write; `None` for as far as it likes.
pub fn limit_files(peer: &Peer, bytes: Option<u64>) {
    let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    // The soft limit alone: it can be raised again.
    let mut command = Command::new("prlimit");
    command.arg(format!("--pid={}", peer.id())).arg(format!("--fsize={limit}:"));
    run(&mut command).expect("the limits of our own child can be changed");
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}
