//! [`Scene`]: the disks that rows work on, in memory and on the disk, made once and compared byte for byte.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::workspace;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// The length of one read or write when disks are made, copied plainly or compared.
const STEP: u64 = MIB;

const PREFIX: &str = "heliostat-bench-";

/// Folders of one benchmark; they go with it.
pub struct Scene {
    memory: TempDir,
    disk: TempDir,
    quick: bool,
}

impl Scene {
    pub fn new(quick: bool) -> Result<Self> {
        let build = workspace::target();
        std::fs::create_dir_all(&build)?;
        Ok(Self { memory: fresh_folder(Path::new("/dev/shm"))?, disk: fresh_folder(&build)?, quick })
    }

    /// The folder on tmpfs.
    pub fn memory(&self) -> &Path {
        self.memory.path()
    }

    /// The folder on the file system of the build.
    pub fn disk(&self) -> &Path {
        self.disk.path()
    }

    pub fn is_quick(&self) -> bool {
        self.quick
    }

    /// `full`, or an eighth of it where only the way is tried.
    pub fn size(&self, full: u64) -> u64 {
        if self.quick { full / 8 } else { full }
    }

    /// A disk of `size` bytes without a hole or a zero block, made at the first call.
    pub fn full_disk(&self, folder: &Path, size: u64) -> Result<PathBuf> {
        self.disk_with(&folder.join(format!("full-{size}")), size, |file| write_noise(file, 0, size))
    }

    /// A sparse disk: `places` places of `len` bytes of data, spread evenly; made at the first call.
    pub fn sparse_disk(&self, folder: &Path, size: u64, places: u64, len: u64) -> Result<PathBuf> {
        let path = folder.join(format!("sparse-{size}-{places}"));
        self.disk_with(&path, size, |file| {
            (0..places).try_for_each(|place| write_noise(file, place * (size / places), len))
        })
    }

    fn disk_with(
        &self,
        path: &Path,
        size: u64,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<PathBuf> {
        if !path.exists() {
            let file = empty_disk(path, size)?;
            fill(&file)
                .and_then(|()| file.sync_all())
                .with_context(|| format!("filling {}", path.display()))?;
        }
        Ok(path.to_owned())
    }

    /// Removes the disks, so that the next row has the room.
    pub fn tidy_up(&self) {
        for folder in [self.memory(), self.disk()] {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                // What cannot go now goes with the folder.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Makes a folder, and removes those of benchmarks that were killed.
fn fresh_folder(place: &Path) -> Result<TempDir> {
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(place);
    made.with_context(|| format!("making a folder in {}", place.display()))
}

/// Makes a disk that is one hole, in place of what was there.
pub fn empty_disk(path: &Path, size: u64) -> Result<File> {
    let _ = std::fs::remove_file(path);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path);
    let file = file.with_context(|| format!("making {}", path.display()))?;
    file.set_len(size)?;
    Ok(file)
}

/// Bytes that the file occupies.
pub fn occupied(path: &Path) -> Result<u64> {
    Ok(path.metadata()?.blocks() * 512)
}

/// Fills a range with bytes that look like chance and hold no zero block; the same for the same range.
fn write_noise(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mut block = vec![0; usize_from(STEP)];
    let mut state = offset ^ 0x9e37_79b9_7f4a_7c15;
    for start in (offset..offset + len).step_by(usize_from(STEP)) {
        for word in block.chunks_exact_mut(8) {
            // xorshift64: no word of it is zero.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let piece = usize_from(STEP.min(offset + len - start));
        file.write_all_at(&block[..piece], start)?;
    }
    Ok(())
}

/// Copies with two threads, half of the disk each, in plain reads and writes.
pub fn copy_with_two_threads(source: &Path, target: &Path) -> Result<()> {
    let (source, size) = (File::open(source)?, source.metadata()?.len());
    let target = OpenOptions::new().write(true).open(target)?;
    let middle = (size / 2).next_multiple_of(STEP).min(size);
    thread::scope(|scope| {
        let first = scope.spawn(|| copy_plainly(&source, &target, 0, middle));
        let second = copy_plainly(&source, &target, middle, size);
        first.join().expect("copying does not panic").and(second)
    })?;
    Ok(())
}

/// Writes `size` bytes of one thread's, the same ones again and again.
pub fn write_with_one_thread(target: &Path, size: u64) -> Result<()> {
    let target = OpenOptions::new().write(true).open(target)?;
    let block = vec![0x5a; usize_from(STEP)];
    for at in (0..size).step_by(usize_from(STEP)) {
        target.write_all_at(&block[..usize_from(STEP.min(size - at))], at)?;
    }
    Ok(())
}

fn copy_plainly(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut block = vec![0; usize_from(STEP)];
    for at in (start..end).step_by(usize_from(STEP)) {
        let piece = &mut block[..usize_from(STEP.min(end - at))];
        source.read_exact_at(piece, at)?;
        target.write_all_at(piece, at)?;
    }
    Ok(())
}

/// Makes sure that two disks of `size` bytes are equal, looking only at `places` where it is mostly holes.
pub fn ensure_equal(a: &Path, b: &Path, places: impl Iterator<Item = (u64, u64)>) -> Result<()> {
    let (first, second) = (File::open(a)?, File::open(b)?);
    let len = first.metadata()?.len();
    ensure!(len == second.metadata()?.len(), "the copy has another size");
    let (mut left, mut right) = (vec![0; usize_from(STEP)], vec![0; usize_from(STEP)]);
    for (offset, len) in places {
        for at in (offset..offset + len).step_by(usize_from(STEP)) {
            let piece = usize_from(STEP.min(offset + len - at));
            first.read_exact_at(&mut left[..piece], at)?;
            second.read_exact_at(&mut right[..piece], at)?;
            ensure!(left[..piece] == right[..piece], "the copy differs in the MiB at {at:#x}");
        }
    }
    Ok(())
}

fn usize_from(value: u64) -> usize {
    usize::try_from(value).expect("steps are small")
}

/// Bytes in MiB, to a KiB: for figures, which need no more.
pub fn mib(bytes: u64) -> f64 {
    let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
    f64::from(kib) / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_equal_and_a_flipped_byte_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let size = 3 * MIB + 4096;
        write_noise(&empty_disk(&a, size).unwrap(), 0, size).unwrap();
        let copy = empty_disk(&b, size).unwrap();
        copy_with_two_threads(&a, &b).unwrap();
        ensure_equal(&a, &b, [(0, size)].into_iter()).unwrap();
        copy.write_all_at(b"\0", 2 * MIB + 5).unwrap();
        let error = ensure_equal(&a, &b, [(0, size)].into_iter()).unwrap_err();
        assert!(error.to_string().contains("0x200000"), "{error}");
    }

    #[test]
    fn noise_has_no_zero_block() {
        let folder = tempfile::tempdir().unwrap();
        let file = empty_disk(&folder.path().join("a"), MIB).unwrap();
        write_noise(&file, 0, MIB).unwrap();
        let mut bytes = vec![0; usize_from(MIB)];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.chunks(512).all(|block| block.iter().any(|byte| *byte != 0)));
    }
}
