//! [`Pinned`]: a file that was found by name and is held, so that what is looked at is what is opened.
//!
//! Between a look at a name and opening it, the name may come to mean another file. Here the name is followed once;
//! the kernel says where that led, and opening it later goes by way of what is held. It decides nothing: whether the
//! place is allowed is its caller's to say. Called by the program's gate for files that images name.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat};
use rustix::io::Errno;

use crate::file::FileStorage;
use crate::open::{Attempt, OpenError, OpenOptions, check_kind, open_file};

/// Which file it is, whatever its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(crate) fn of(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            // Two nodes of one device are one disk. No file has the number 0.
            FileType::BlockDevice => Self { device: stat.st_rdev, inode: 0 },
            _ => Self { device: stat.st_dev, inode: stat.st_ino },
        }
    }
}

/// A file or block device that is held, and not open yet.
#[derive(Debug)]
pub struct Pinned {
    file: OwnedFd,
    path: PathBuf,
    identity: Identity,
    is_device: bool,
}

impl Pinned {
    /// Finds the disk at `path`, through all links. Nothing happens to it: not even a FIFO's other end notices.
    ///
    /// # Errors
    /// As [`FileStorage::open`], for what is missing, is no disk, or must not be looked at. `Io` without `/proc`.
    pub fn find(path: &Path) -> Result<Self, OpenError> {
        let failed = |errno| OpenError::from_open(path, Attempt::Read, errno);
        let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let stat = fstat(&file).map_err(failed)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        check_kind(path, kind)?;
        if stat.st_nlink == 0 {
            // Removed meanwhile: it has no place any more.
            return Err(failed(Errno::NOENT));
        }
        let place = rustix::fs::readlink(by_way_of(&file), Vec::new())
            .map_err(|errno| OpenError::io(path, "find out what is at", errno))?;
        Ok(Self {
            file,
            path: PathBuf::from(OsStr::from_bytes(place.as_bytes())),
            identity: Identity::of(&stat),
            is_device: kind == FileType::BlockDevice,
        })
    }

    /// Where it is, as the kernel says: without links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is.
    #[must_use]
    pub const fn identity(&self) -> Identity {
        self.identity
    }

    /// Says whether it is a block device, not a file.
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.is_device
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn open(&self, options: &OpenOptions) -> Result<FileStorage, OpenError> {
        let opened =
            open_file(&by_way_of(&self.file), options).map_err(|error| renamed(error, &self.path))?;
        FileStorage::from_file(&self.path, opened, options)
    }
}

/// The same error of the same file under the name that people know.
fn renamed(mut error: OpenError, name: &Path) -> OpenError {
    match &mut error {
        OpenError::Missing { path }
        | OpenError::Exists { path }
        | OpenError::Denied { path, .. }
        | OpenError::ReadOnly { path }
        | OpenError::NotADisk { path, .. }
        | OpenError::Locked { path, .. }
        | OpenError::Busy { path }
        | OpenError::NoDirect { path, .. }
        | OpenError::Io { path, .. } => name.clone_into(path),
    }
    error
}

fn by_way_of(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open::Access;

    const READ: OpenOptions = OpenOptions {
        access: Access::ReadOnly,
        cache: crate::open::Cache::Page,
        flush: crate::open::Flush::Honor,
        discard: crate::open::Discard::Ignore,
        locking: crate::open::Locking::Auto,
    };

    #[test]
    fn what_was_found_is_opened_even_if_the_name_leads_elsewhere_by_then() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        std::fs::write(place("mine"), [1; 512]).unwrap();
        std::fs::write(place("other"), [2; 1024]).unwrap();
        std::os::unix::fs::symlink("mine", place("link")).unwrap();
        let pinned = Pinned::find(&place("link")).unwrap();
        assert_eq!(pinned.path(), std::fs::canonicalize(place("mine")).unwrap());
        std::fs::remove_file(place("link")).unwrap();
        std::os::unix::fs::symlink("other", place("link")).unwrap();
        let storage = pinned.open(&READ).unwrap();
        assert_eq!(heliostat_block::storage::Storage::size(&storage), 512);
        assert_eq!(storage.identity().unwrap(), pinned.identity());
        assert_ne!(Pinned::find(&place("link")).unwrap().identity(), pinned.identity());
    }

    #[test]
    fn what_is_no_disk_is_refused_without_being_opened() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(matches!(Pinned::find(&fifo), Err(OpenError::NotADisk { kind: "a FIFO", .. })));
        assert!(matches!(Pinned::find(folder.path()), Err(OpenError::NotADisk { .. })));
        assert!(matches!(Pinned::find(&folder.path().join("none")), Err(OpenError::Missing { .. })));
    }
}
