//! Places to keep test disks in, each of a kind that behaves differently.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::storage::Storage;
use heliostat_host::file::FileStorage;
use heliostat_host::runtime::Driver;

pub const DRIVERS: [Driver; 2] = [Driver::IoUring, Driver::Polling];

/// Says that a test, or a part of one, did not run, and why.
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// A directory in memory, where there is one.
pub fn memory_directory() -> Option<tempfile::TempDir> {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(directory) => Some(directory),
        Err(error) => {
            skipped(&format!("no tmpfs at /dev/shm: {error}"));
            None
        }
    }
}

/// A directory where temporary files are, usually on a disk.
pub fn disk_directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs a program and returns what it printed, or what went wrong.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(out.trim().to_owned())
    } else {
        Err(format!("{program}: {}", err.trim()))
    }
}

/// A block device whose disk is a file.
pub struct LoopDevice {
    pub path: PathBuf,
}

impl LoopDevice {
    /// Makes one of `size` bytes with blocks of `block` bytes, in `directory`; says so where that is not
    /// allowed.
    pub fn new(directory: &Path, size: u64, block: u32) -> Option<Self> {
        let backing = directory.join(format!("backing-{block}"));
        std::fs::File::create(&backing).unwrap().set_len(size).unwrap();
        let arguments = ["--find", "--show", "--sector-size", &block.to_string(), backing.to_str().unwrap()];
        match run("losetup", &arguments) {
            Ok(path) => Some(Self { path: path.into() }),
            Err(error) => {
                skipped(&format!("no loop device: {error}"));
                None
            }
        }
    }
}

impl LoopDevice {
    /// Makes it refuse to be written.
    pub fn set_read_only(&self) {
        run("blockdev", &["--setro", self.path.to_str().unwrap()]).unwrap();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The kernel remembers that one was read-only for its next user.
        let _ = run("blockdev", &["--setrw", self.path.to_str().unwrap()]);
        if let Err(error) = run("losetup", &["--detach", self.path.to_str().unwrap()]) {
            eprintln!("{error}");
        }
    }
}

/// A small file system of its own, of `kind`, that is easily filled.
pub struct SmallFileSystem {
    pub path: PathBuf,
    device: Option<LoopDevice>,
    _directory: tempfile::TempDir,
}

impl SmallFileSystem {
    /// The device that it lies on.
    pub fn device(&self) -> Option<&Path> {
        self.device.as_ref().map(|device| device.path.as_path())
    }

    pub fn tmpfs() -> Option<Self> {
        let directory = disk_directory();
        let path = directory.path().join("mount");
        std::fs::create_dir(&path).unwrap();
        let arguments = ["-t", "tmpfs", "-o", "size=8m", "heliostat-test", path.to_str().unwrap()];
        Self::mounted(&arguments, path.clone(), None, directory)
    }

    pub fn ext4() -> Option<Self> {
        let directory = disk_directory();
        let device = LoopDevice::new(directory.path(), 16 << 20, 512)?;
        let path = directory.path().join("mount");
        std::fs::create_dir(&path).unwrap();
        if let Err(error) = run("mkfs.ext4", &["-q", device.path.to_str().unwrap()]) {
            skipped(&error);
            return None;
        }
        let arguments = [device.path.to_str().unwrap().to_owned(), path.to_str().unwrap().to_owned()];
        let arguments = [arguments[0].as_str(), arguments[1].as_str()];
        Self::mounted(&arguments, path.clone(), Some(device), directory)
    }

    fn mounted(
        arguments: &[&str],
        path: PathBuf,
        device: Option<LoopDevice>,
        directory: tempfile::TempDir,
    ) -> Option<Self> {
        match run("mount", arguments) {
            Ok(_) => Some(Self { path, device, _directory: directory }),
            Err(error) => {
                skipped(&format!("cannot mount: {error}"));
                None
            }
        }
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &[self.path.to_str().unwrap()]) {
            eprintln!("{error}");
        }
    }
}

/// Bytes that differ from place to place and from seed to seed, in memory that starts `skew` bytes behind a
/// page, so that direct I/O cannot always use it as it is.
pub fn pattern(seed: u64, len: u64, skew: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut buffer = Buffer::zeroed(usize_from(len) + skew);
    for word in buffer[skew..].chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&(state | 0x0101_0101_0101_0101).to_le_bytes()[..word.len()]);
    }
    buffer.freeze().slice(skew..)
}

/// All of a storage's contents.
pub async fn contents(storage: &FileStorage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let whole = heliostat_block::range::ByteRange::from_bounds(0, storage.size());
    for piece in whole.pieces(1 << 20) {
        let buffer = storage.read(piece.offset(), Buffer::zeroed(usize_from(piece.len()))).await.unwrap();
        bytes.extend_from_slice(&buffer);
    }
    bytes
}
