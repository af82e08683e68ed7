//! Opening and creating image files and block devices: options, checks, locks, probes, and errors that say
//! what to do next.
//!
//! The calls here block; they belong to start-up and to control commands, not to a data-plane task in a hurry.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, fstat};
use rustix::io::Errno;

use crate::file::FileStorage;
use crate::lock::{self, Claim, Conflict, Holder, OpenFile, Outcome, Permission};
use crate::probe::{self, Shape};

/// What may be done with an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes.
    #[default]
    ReadWrite,
    /// Reads and writes, or only reads where the host allows no writing (QEMU's `auto-read-only`).
    ReadWriteIfAllowed,
    /// Reads only.
    ReadOnly,
}

/// Whether the host's page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// It is.
    #[default]
    Page,
    /// It is passed by (QEMU's `cache.direct`). File systems that live in memory have nothing else; there it
    /// changes nothing.
    Direct,
}

/// Whether a flush reaches the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// It does.
    #[default]
    Honor,
    /// It does nothing, and neither does a durable write (QEMU's `cache.no-flush`). Data is lost when the host
    /// crashes.
    Ignore,
}

/// Whether a discard gives space back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// It does nothing.
    #[default]
    Ignore,
    /// It does, where the host can.
    Unmap,
}

/// What other programs may do with the image while it is open, see [`crate::lock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Who may write lets nobody else write; who only reads lets others write (as `qemu-img info -U`).
    #[default]
    Auto,
    /// Nobody else may write, even though we only read (as `qemu-img convert`).
    Still,
    /// Others may write while we do.
    Shared,
    /// No locks are taken or looked at.
    Off,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// What may be done with it.
    pub access: Access,
    /// Whether the page cache is used.
    pub cache: Cache,
    /// Whether a flush reaches the medium.
    pub flush: Flush,
    /// Whether a discard gives space back.
    pub discard: Discard,
    /// What others may do meanwhile.
    pub locking: Locking,
}

/// What to do about a file that is there when one is to be created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Leave it alone, and fail.
    #[default]
    Refuse,
    /// Empty it, if nobody else uses it.
    Replace,
}

/// What we wanted of the host when it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make a file.
    Create,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Create => "create",
        })
    }
}

/// Why an image could not be opened or created: what, where, why, what next, in one line.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is there.
    #[error("cannot open {}: there is no such file; check the path, or create it first", path.display())]
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// Something is there already.
    #[error("cannot create {}: it exists already; choose another name, or ask for the existing file", path.display())]
    Exists {
        /// Where.
        path: PathBuf,
    },
    /// The host's permissions forbid it.
    #[error("may not {attempt} {}: {error}; check the permissions of the file and its directories", path.display())]
    Denied {
        /// Where.
        path: PathBuf,
        /// What was tried.
        attempt: Attempt,
        /// What the host said.
        error: io::Error,
    },
    /// It can be read but never written.
    #[error("cannot write to {}: its file system or device is read-only; open it read-only", path.display())]
    ReadOnly {
        /// Where.
        path: PathBuf,
    },
    /// It is neither a regular file nor a block device.
    #[error("cannot use {}: it is {kind}; a disk is a regular file or a block device", path.display())]
    NotADisk {
        /// Where.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// Another program uses it in a way that excludes ours.
    #[error("cannot open {}: {conflict}; {}", path.display(), in_use(holder.as_ref()))]
    Locked {
        /// Where.
        path: PathBuf,
        /// What excludes what.
        conflict: Conflict,
        /// Who has it, where that could be found out.
        holder: Option<Holder>,
    },
    /// The host itself uses the block device.
    #[error("cannot write to {}: the host uses it, as a mounted file system or a part of another device; \
             unmount it first", path.display())]
    Busy {
        /// Where.
        path: PathBuf,
    },
    /// The page cache cannot be passed by.
    #[error("cannot open {} with direct I/O: {error}; its file system may have none, use the page cache", path.display())]
    NoDirect {
        /// Where.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// Anything else.
    #[error("cannot {what} {}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What was being done: a verb.
        what: &'static str,
        /// What the host said.
        error: io::Error,
    },
}

fn in_use(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) => format!("{holder} has it open; end that first, or open it read-only"),
        None => "another program has it open; end that first, or open it read-only".to_owned(),
    }
}

impl OpenError {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Missing { path }
            | Self::Exists { path }
            | Self::Denied { path, .. }
            | Self::ReadOnly { path }
            | Self::NotADisk { path, .. }
            | Self::Locked { path, .. }
            | Self::Busy { path }
            | Self::NoDirect { path, .. }
            | Self::Io { path, .. } => path,
        }
    }

    /// The host's error number that says the same, for protocols that need one.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Missing { .. } => libc::ENOENT,
            Self::Exists { .. } => libc::EEXIST,
            Self::ReadOnly { .. } => libc::EROFS,
            Self::NotADisk { kind, .. } if *kind == DIRECTORY => libc::EISDIR,
            Self::NotADisk { .. } => libc::EINVAL,
            Self::Locked { .. } => libc::EAGAIN,
            Self::Busy { .. } => libc::EBUSY,
            Self::Denied { error, .. } | Self::NoDirect { error, .. } | Self::Io { error, .. } => {
                error.raw_os_error().unwrap_or(libc::EIO)
            }
        }
    }

    pub(crate) fn io(path: &Path, what: &'static str, error: impl Into<io::Error>) -> Self {
        Self::Io { path: path.to_owned(), what, error: error.into() }
    }

    pub(crate) fn from_open(path: &Path, attempt: Attempt, errno: Errno) -> Self {
        let path = path.to_owned();
        match errno {
            Errno::NOENT if attempt != Attempt::Create => Self::Missing { path },
            Errno::EXIST => Self::Exists { path },
            Errno::ACCESS | Errno::PERM => Self::Denied { path, attempt, error: errno.into() },
            Errno::ROFS => Self::ReadOnly { path },
            Errno::BUSY => Self::Busy { path },
            Errno::ISDIR => Self::NotADisk { path, kind: DIRECTORY },
            _ if attempt == Attempt::Create => Self::io(&path, "create", errno),
            _ => Self::io(&path, "open", errno),
        }
    }
}

const DIRECTORY: &str = "a directory";

/// Flags of every descriptor that we open. Not waiting for a FIFO's other end or a device's medium; not
/// becoming the owner of a terminal.
const ALWAYS: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

impl FileStorage {
    /// Opens the image at `path`. Its size is what it is now; bytes that appear behind it later are not seen.
    ///
    /// # Errors
    /// One for each way in which it can fail; nothing has been changed then.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        // Looked at first: only opening it can have side effects on what is not a disk.
        let metadata = rustix::fs::stat(path).map_err(|e| OpenError::from_open(path, Attempt::Read, e))?;
        check_kind(path, FileType::from_raw_mode(metadata.st_mode))?;
        Self::from_file(path, open_file(path, options)?, options)
    }

    /// Makes a sparse image of `size` bytes at `path`. `options` say how it is opened then, which is always
    /// for writing.
    ///
    /// # Errors
    /// As [`FileStorage::open`], and no space. What was created is removed then; a file that was there
    /// before keeps its contents unless it was to be replaced, could be locked, and only then something
    /// failed.
    pub fn create(
        path: &Path,
        size: u64,
        existing: Existing,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let options = OpenOptions { access: Access::ReadWrite, ..*options };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | ALWAYS;
        match rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)) {
            Ok(file) => {
                let created = RemoveOnFailure(Some(path));
                let file = Opened { file, for_writeback: None, is_writable: true };
                let storage = Self::resized(path, file, size, &options)?;
                created.keep();
                Ok(storage)
            }
            Err(Errno::EXIST) if existing == Existing::Replace => {
                let metadata =
                    rustix::fs::stat(path).map_err(|e| OpenError::from_open(path, Attempt::Create, e))?;
                let kind = FileType::from_raw_mode(metadata.st_mode);
                check_kind(path, kind)?;
                if kind == FileType::BlockDevice {
                    return Err(OpenError::Exists { path: path.to_owned() });
                }
                Self::resized(path, open_file(path, &options)?, size, &options)
            }
            Err(errno) => Err(OpenError::from_open(path, Attempt::Create, errno)),
        }
    }

    /// Gives an open file its length, with the locks held, and makes the storage of it.
    fn resized(path: &Path, opened: Opened, size: u64, options: &OpenOptions) -> Result<Self, OpenError> {
        // From here on a failure gives them back with the descriptor.
        take_locks(path, &opened, options.locking)?;
        let length = |size| match rustix::fs::ftruncate(&opened.file, size) {
            // The kernel says EINVAL for what no file can have.
            Err(Errno::INVAL) => Err(Errno::FBIG),
            result => result,
        };
        length(0).and_then(|()| length(size)).map_err(|e| OpenError::io(path, "give its length to", e))?;
        // The file must be found after a crash, as what is flushed to it later must.
        sync_directory_of(path);
        Self::from_file(path, opened, options)
    }

    pub(crate) fn from_file(path: &Path, opened: Opened, options: &OpenOptions) -> Result<Self, OpenError> {
        let file = opened.file.as_fd();
        let stat = fstat(file).map_err(|e| OpenError::io(path, "look at", e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        check_kind(path, kind)?;
        // What a ring makes of this on a file differs from kernel to kernel, down to giving up instead of waiting.
        let flags = rustix::fs::fcntl_getfl(file).map_err(|e| OpenError::io(path, "look at", e))?;
        rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK)
            .map_err(|e| OpenError::io(path, "set up", e))?;
        let claim = take_locks(path, &opened, options.locking)?;
        let size = match kind {
            // Leaves the file offset at the end; nothing here uses it.
            FileType::BlockDevice => rustix::fs::seek(file, SeekFrom::End(0)),
            _ => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
        }
        .map_err(|e| OpenError::io(path, "find the size of", e))?;
        let in_memory = kind == FileType::RegularFile && probe::is_in_memory(file);
        let direct = match options.cache {
            Cache::Direct if !in_memory => Some(reopen_direct(path, file, opened.is_writable)?),
            _ => None,
        };
        let direct_file = direct.as_ref().map(AsFd::as_fd);
        let shape = Shape::probe(file, direct_file, size, in_memory, opened.is_writable)
            .map_err(|e| OpenError::io(path, "probe", e))?;
        let for_writeback =
            opened.for_writeback.or_else(|| opened.is_writable.then(|| reopen(file)).flatten());
        let cached = OpenFile::new(opened.file, claim, for_writeback);
        let direct = direct.map(|direct| OpenFile::beside(&cached, direct));
        Ok(Self::new(path.to_owned(), cached, direct, shape, size, options))
    }
}

/// The same file, opened once more, to be written back through. The kernel tells an error of writing back once
/// to each opened file: told to the one that nobody flushes through, it would be lost to the flush.
fn reopen(file: BorrowedFd<'_>) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// A file that was just opened.
pub(crate) struct Opened {
    /// Of a block device, it may exclude the host itself and whoever asks for the same. Only with this very
    /// descriptor may such a device be zeroed and discarded.
    file: OwnedFd,
    /// The same one without that, since whoever writes back may be late with closing it.
    for_writeback: Option<OwnedFd>,
    is_writable: bool,
}

/// Removes a file that was created, unless everything went well.
struct RemoveOnFailure<'a>(Option<&'a Path>);

impl RemoveOnFailure<'_> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnFailure<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

pub(crate) fn check_kind(path: &Path, kind: FileType) -> Result<(), OpenError> {
    let kind = match kind {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => DIRECTORY,
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "neither a file nor a device",
    };
    Err(OpenError::NotADisk { path: path.to_owned(), kind })
}

/// Opens for what `options` ask.
pub(crate) fn open_file(path: &Path, options: &OpenOptions) -> Result<Opened, OpenError> {
    let open = |flags| rustix::fs::open(path, flags | ALWAYS, Mode::empty());
    if options.access != Access::ReadOnly {
        // On a block device it means: fail if the host itself uses it. Without meaning for a file.
        let (exclusive, is_device) = match options.locking {
            Locking::Auto | Locking::Still if is_block_device(path) => (OFlags::EXCL, true),
            _ => (OFlags::empty(), false),
        };
        match open(OFlags::RDWR | exclusive) {
            Ok(file) if probe::is_read_only_device(file.as_fd()) => {
                if options.access == Access::ReadWrite {
                    return Err(OpenError::ReadOnly { path: path.to_owned() });
                }
            }
            Ok(file) => {
                // Without it nothing is written back early, which costs nothing but time.
                let for_writeback = if is_device { open(OFlags::RDWR).ok() } else { None };
                return Ok(Opened { file, for_writeback, is_writable: true });
            }
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS)
                if options.access == Access::ReadWriteIfAllowed => {}
            Err(errno) => return Err(OpenError::from_open(path, Attempt::Write, errno)),
        }
    }
    let file = open(OFlags::RDONLY).map_err(|e| OpenError::from_open(path, Attempt::Read, e))?;
    Ok(Opened { file, for_writeback: None, is_writable: false })
}

fn is_block_device(path: &Path) -> bool {
    rustix::fs::stat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::BlockDevice)
}

/// Opens the same file once more, passing the page cache by.
pub(crate) fn reopen_direct(
    path: &Path,
    file: BorrowedFd<'_>,
    is_writable: bool,
) -> Result<OwnedFd, OpenError> {
    let access = if is_writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
    let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty());
    // By way of the descriptor, since somebody may have renamed the file; by name where there is no /proc.
    let reopened = match open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))) {
        Err(Errno::NOENT) => open(path),
        result => result,
    };
    let reopened = reopened.map_err(|e| OpenError::NoDirect { path: path.to_owned(), error: e.into() })?;
    let identity = |fd: BorrowedFd<'_>| fstat(fd).map(|s| (s.st_dev, s.st_ino, s.st_rdev));
    match (identity(file), identity(reopened.as_fd())) {
        (Ok(one), Ok(other)) if one == other => Ok(reopened),
        _ => Err(OpenError::io(path, "reopen", io::Error::other("it was replaced meanwhile"))),
    }
}

const READS: &[Permission] = &[Permission::ConsistentRead];
const READS_AND_WRITES: &[Permission] = &[Permission::ConsistentRead, Permission::Write];
const CHANGES: &[Permission] = &[Permission::Write, Permission::Resize];

fn take_locks(path: &Path, opened: &Opened, locking: Locking) -> Result<Option<Claim>, OpenError> {
    let uses = if opened.is_writable { READS_AND_WRITES } else { READS };
    let refuses = match locking {
        Locking::Off => return Ok(None),
        Locking::Auto if opened.is_writable => CHANGES,
        Locking::Still => CHANGES,
        Locking::Auto | Locking::Shared => &[],
    };
    let claim = Claim { uses, refuses };
    match lock::lock(opened.file.as_fd(), claim) {
        Ok(Outcome::Locked) => Ok(Some(claim)),
        Ok(Outcome::NoLocksHere) => Ok(None),
        Ok(Outcome::Conflict(conflict, holder)) => {
            Err(OpenError::Locked { path: path.to_owned(), conflict, holder })
        }
        Err(error) => Err(OpenError::io(path, "lock", error)),
    }
}

/// Makes the name of the file at `path` durable, as far as the host can.
pub fn sync_directory_of(path: &Path) {
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    // Some file systems refuse; they have no way to do better.
    let _ = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
}
