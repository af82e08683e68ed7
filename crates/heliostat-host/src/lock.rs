//! Locks on image files that QEMU's tools see, and that see theirs.
//!
//! Every program that has an image open says what it does with it and what it lets others do meanwhile, by
//! holding single bytes of the file with shared open-file-description locks (fcntl(2)): byte 100 + n while it
//! uses permission n, byte 200 + n while it does not share permission n. A newcomer takes its bytes first and
//! looks for contradictions second, so that of two newcomers at least one sees the other. The bytes need not
//! exist in the file. This is what `strace qemu-img` and `/proc/locks` show.
//!
//! Called when a file is opened. The locks end with the last use of the open file, operations that
//! the kernel has not finished among them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::fs::MetadataExt;
use std::sync::Arc;

use crate::blocking::Share;

/// The first of the bytes that say what is used.
const USES: u64 = 100;
/// The first of the bytes that say what others must not use.
const REFUSES: u64 = 200;

/// What a program may do with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Read what makes sense together.
    ConsistentRead,
    /// Write.
    Write,
    /// Change the length.
    Resize,
}

impl Permission {
    const fn bit(self) -> u64 {
        match self {
            Self::ConsistentRead => 0,
            Self::Write => 1,
            // Bit 2 is writing what is there already; we have no use for it.
            Self::Resize => 3,
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        })
    }
}

/// What we do with an image, and what others must not do meanwhile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) uses: &'static [Permission],
    pub(crate) refuses: &'static [Permission],
}

/// Reads, while nobody changes anything.
pub(crate) const STILL: Claim =
    Claim { uses: &[Permission::ConsistentRead], refuses: &[Permission::Write, Permission::Resize] };

/// Why an image could not be locked. Prints as QEMU's tools do: `Failed to get "write" lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What it is about.
    pub permission: Permission,
    /// Who is in the way of whom.
    pub side: Side,
}

/// Who is in the way of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Somebody refuses what we want to do.
    TheyRefuse,
    /// Somebody does what we would refuse.
    TheyUse,
}

impl Conflict {
    const fn byte(self) -> u64 {
        match self.side {
            Side::TheyRefuse => REFUSES + self.permission.bit(),
            Side::TheyUse => USES + self.permission.bit(),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = if self.side == Side::TheyUse { "shared " } else { "" };
        write!(f, "Failed to get {shared}\"{}\" lock", self.permission)
    }
}

/// A program that has an image open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// Its name, as the kernel knows it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == std::process::id() {
            return write!(f, "this program itself (pid {})", self.pid);
        }
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// A program that has an image open in a way that others have to know of. Prints as who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User(pub Option<Holder>);

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(holder) => holder.fmt(f),
            // Another's process, which we may not look into.
            None => f.write_str("another program"),
        }
    }
}

/// How trying to lock came out.
#[derive(Debug)]
pub(crate) enum Outcome {
    Locked,
    /// The file system has no such locks.
    NoLocksHere,
    Conflict(Conflict, Option<Holder>),
}

/// An open file and the locks on it, which end when nobody reads or writes any more: operations that the kernel
/// has not finished are users too.
#[derive(Debug)]
pub(crate) struct OpenFile {
    fd: Arc<OwnedFd>,
    claim: Option<Claim>,
    /// The same file, opened on its own, for those whose use does not matter to other programs, and who must not
    /// be told the errors that are a flush's to tell.
    for_writeback: Option<Arc<OwnedFd>>,
    /// What it may have of the blocking threads; the same one however the file is opened.
    share: Share,
    /// The same file, opened in another way, and holding the locks.
    _locked: Option<Arc<OpenFile>>,
}

impl OpenFile {
    /// An open file on which the locks of `claim` have been taken.
    pub(crate) fn new(fd: OwnedFd, claim: Option<Claim>, for_writeback: Option<OwnedFd>) -> Arc<Self> {
        let fd = Arc::new(fd);
        Arc::new(Self {
            fd,
            claim,
            for_writeback: for_writeback.map(Arc::new),
            share: Share::new(),
            _locked: None,
        })
    }

    /// The same file as `locked`, opened in another way.
    pub(crate) fn beside(locked: &Arc<Self>, fd: OwnedFd) -> Arc<Self> {
        let for_writeback = locked.for_writeback();
        let share = locked.share.clone();
        Arc::new(Self {
            fd: Arc::new(fd),
            claim: None,
            for_writeback,
            share,
            _locked: Some(Arc::clone(locked)),
        })
    }

    /// A descriptor for whoever writes back, if one could be had. Being late with closing it does no harm: the
    /// file can be opened again, by anybody, though it is being written back.
    pub(crate) fn for_writeback(&self) -> Option<Arc<OwnedFd>> {
        self.for_writeback.clone()
    }

    /// Where calls wait that block on this file.
    pub(crate) const fn share(&self) -> &Share {
        &self.share
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for OpenFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        for byte in self.claim.iter().flat_map(|claim| claim.bytes()) {
            // What cannot be unlocked now ends with the descriptor.
            let _ = set(self.as_fd(), byte, libc::F_UNLCK);
        }
    }
}

/// Takes the locks of `claim` on the open file behind `file`. Without success none is left.
pub(crate) fn lock(file: BorrowedFd<'_>, claim: Claim) -> io::Result<Outcome> {
    let outcome = try_lock(file, claim);
    if !matches!(outcome, Ok(Outcome::Locked)) {
        for byte in claim.bytes() {
            // What cannot be unlocked now ends with the descriptor, which is about to be closed.
            let _ = set(file, byte, libc::F_UNLCK);
        }
    }
    match outcome {
        Ok(Outcome::Conflict(conflict, _)) => Ok(Outcome::Conflict(conflict, holder(file, conflict.byte()))),
        outcome => outcome,
    }
}

/// Says who is in the way of `claim`, without taking any lock: nobody who opens the image now is disturbed.
pub(crate) fn in_the_way(file: BorrowedFd<'_>, claim: Claim) -> io::Result<Option<User>> {
    match contradiction(file, claim) {
        Ok(found) => Ok(found.map(|conflict| User(holder(file, conflict.byte())))),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Claim {
    /// Every byte to hold, with what holding it means.
    fn conflicts(self) -> impl Iterator<Item = Conflict> {
        let uses = self.uses.iter().map(|p| Conflict { permission: *p, side: Side::TheyUse });
        let refuses = self.refuses.iter().map(|p| Conflict { permission: *p, side: Side::TheyRefuse });
        uses.chain(refuses)
    }

    fn bytes(self) -> impl Iterator<Item = u64> {
        self.conflicts().map(Conflict::byte)
    }
}

fn try_lock(file: BorrowedFd<'_>, claim: Claim) -> io::Result<Outcome> {
    for held in claim.conflicts() {
        match set(file, held.byte(), libc::F_RDLCK) {
            Ok(()) => {}
            Err(error) if is_missing(&error) => return Ok(Outcome::NoLocksHere),
            // Somebody outside of the scheme holds the byte for itself alone.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Outcome::Conflict(held, None));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(contradiction(file, claim)?.map_or(Outcome::Locked, |conflict| Outcome::Conflict(conflict, None)))
}

/// Looks what others hold that contradicts `claim`.
fn contradiction(file: BorrowedFd<'_>, claim: Claim) -> io::Result<Option<Conflict>> {
    let used = claim.uses.iter().map(|p| Conflict { permission: *p, side: Side::TheyRefuse });
    let refused = claim.refuses.iter().map(|p| Conflict { permission: *p, side: Side::TheyUse });
    for conflict in used.chain(refused) {
        if is_held_by_others(file, conflict.byte())? {
            return Ok(Some(conflict));
        }
    }
    Ok(None)
}

fn is_missing(error: &io::Error) -> bool {
    // No locks on this file system, or a kernel without this kind.
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn request(kind: i32, byte: u64) -> libc::flock {
    // SAFETY: flock is a C struct of integers; all zeroes is a value of it, and its l_pid must be zero here.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = i16::try_from(kind).expect("the kinds of lock are small numbers");
    request.l_whence = i16::try_from(libc::SEEK_SET).expect("SEEK_SET is zero");
    request.l_start = i64::try_from(byte).expect("the bytes of the scheme are below 300");
    request.l_len = 1;
    request
}

fn set(file: BorrowedFd<'_>, byte: u64, kind: i32) -> io::Result<()> {
    let request = request(kind, byte);
    // SAFETY: F_OFD_SETLK reads one flock, which outlives the call; the descriptor is borrowed, so it is open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is_held_by_others(file: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    let mut request = request(libc::F_WRLCK, byte);
    // SAFETY: F_OFD_GETLK reads and writes one flock, which we own; the descriptor is borrowed, so it is open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}

/// Finds who holds a lock on `byte`, as far as we may look into other processes. Only for an error's text.
fn holder(file: BorrowedFd<'_>, byte: u64) -> Option<Holder> {
    let file = std::fs::File::from(file.try_clone_to_owned().ok()?).metadata().ok()?;
    let identity = (file.st_dev(), file.st_ino());
    let numbers = |path: &str| -> Vec<u32> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    };
    for pid in numbers("/proc") {
        for fd in numbers(&format!("/proc/{pid}/fd")) {
            let Ok(metadata) = std::fs::metadata(format!("/proc/{pid}/fd/{fd}")) else { continue };
            let Ok(about) = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")) else { continue };
            if (metadata.st_dev(), metadata.st_ino()) == identity && about.lines().any(|l| holds(l, byte)) {
                let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                return Some(Holder { pid, name: name.trim_end().to_owned() });
            }
        }
    }
    None
}

/// Says whether a line of fdinfo is about a lock on `byte`. Such a line reads
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:123 100 101`, see proc(5).
fn holds(line: &str, byte: u64) -> bool {
    let mut words = line.split_whitespace();
    if words.next() != Some("lock:") {
        return false;
    }
    let mut last = words.rev();
    let (Some(end), Some(start)) = (last.next(), last.next()) else { return false };
    let end = end.parse().unwrap_or(u64::MAX); // "EOF"
    start.parse::<u64>().is_ok_and(|start| (start..=end).contains(&byte))
}

/// Drops every lock of `claim`, so that somebody else may have them while the descriptor stays open.
#[cfg(test)]
pub(crate) fn unlock(file: BorrowedFd<'_>, claim: Claim) {
    for byte in claim.bytes() {
        set(file, byte, libc::F_UNLCK).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: Claim = Claim { uses: &[Permission::ConsistentRead], refuses: &[] };
    const WRITER: Claim = Claim {
        uses: &[Permission::ConsistentRead, Permission::Write],
        refuses: &[Permission::Write, Permission::Resize],
    };

    fn twice() -> (tempfile::NamedTempFile, std::fs::File, std::fs::File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, other) = (file.reopen().unwrap(), file.reopen().unwrap());
        (file, one, other)
    }

    fn conflict(file: &std::fs::File, claim: Claim) -> String {
        match lock(file.as_fd(), claim).unwrap() {
            Outcome::Conflict(conflict, holder) => {
                assert_eq!(holder.expect("we may look at ourselves").pid, std::process::id());
                conflict.to_string()
            }
            outcome => panic!("{outcome:?}"),
        }
    }

    #[test]
    fn readers_share_with_anybody() {
        let (_file, one, other) = twice();
        for claim in [READER, WRITER, STILL] {
            assert!(matches!(lock(one.as_fd(), claim).unwrap(), Outcome::Locked));
            assert!(matches!(lock(other.as_fd(), READER).unwrap(), Outcome::Locked));
            unlock(one.as_fd(), claim);
            unlock(other.as_fd(), READER);
        }
    }

    #[test]
    fn who_only_looks_sees_the_writer_and_is_in_nobodys_way() {
        let (file, one, other) = twice();
        assert_eq!(in_the_way(other.as_fd(), STILL).unwrap(), None);
        assert!(
            matches!(lock(one.as_fd(), WRITER).unwrap(), Outcome::Locked),
            "nothing was locked by looking"
        );
        let user = in_the_way(other.as_fd(), STILL).unwrap().expect("it is written");
        assert_eq!(user.0.as_ref().map(|holder| holder.pid), Some(std::process::id()));
        unlock(one.as_fd(), WRITER);
        // Readers, also those that need it still, are no writers.
        assert!(matches!(lock(one.as_fd(), STILL).unwrap(), Outcome::Locked));
        assert_eq!(in_the_way(other.as_fd(), STILL).unwrap(), None);
        drop(file);
    }

    #[test]
    fn a_second_writer_is_refused_and_leaves_no_lock_behind() {
        let (_file, one, other) = twice();
        assert!(matches!(lock(one.as_fd(), WRITER).unwrap(), Outcome::Locked));
        assert_eq!(conflict(&other, WRITER), "Failed to get \"write\" lock");
        drop(one);
        let third = _file.reopen().unwrap();
        assert!(matches!(lock(third.as_fd(), WRITER).unwrap(), Outcome::Locked));
    }

    #[test]
    fn who_needs_a_still_image_and_who_writes_exclude_each_other() {
        let (_file, one, other) = twice();
        assert!(matches!(lock(one.as_fd(), STILL).unwrap(), Outcome::Locked));
        assert!(matches!(lock(other.as_fd(), STILL).unwrap(), Outcome::Locked));
        unlock(other.as_fd(), STILL);
        assert_eq!(conflict(&other, WRITER), "Failed to get \"write\" lock");
        unlock(one.as_fd(), STILL);
        assert!(matches!(lock(one.as_fd(), WRITER).unwrap(), Outcome::Locked));
        assert_eq!(conflict(&other, STILL), "Failed to get shared \"write\" lock");
    }
}
