//! [`Layout`]: where a file has data and where holes, asked of the file system.
//!
//! The calls block; [`crate::file`] makes them elsewhere than on a data-plane thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Extent, ExtentStatus};
use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;

use crate::lock::OpenFile;
use crate::probe::Shape;

/// The most extents in one answer: as many as a caller works off in some milliseconds, and enough that a
/// disk in pieces costs few calls.
const EXTENTS_MAX: usize = 1024;

/// How far one look at a file in memory goes: a walk over so many pages takes a fraction of a millisecond.
const LOOK_LEN: u64 = 64 << 20;

/// The longest look at a file in memory that a data-plane thread takes itself: some microseconds.
const LOOK_NOW_LEN: u64 = 1 << 20;

/// The unit in which a file in memory has data or holes.
pub(crate) const PAGE: u64 = 4096;

/// How many pages of a range are in the page cache; `None` where the kernel cannot say (before 6.5).
pub(crate) fn cached_pages(file: &impl AsRawFd, offset: u64, len: u64) -> Option<u64> {
    // `struct cachestat_range` and `struct cachestat` of linux/mman.h.
    let range = [offset, len];
    let mut counts = [0_u64; 5];
    // SAFETY: both arrays are as long as the kernel's structures and outlive the call; the descriptor is open.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    (result == 0).then_some(counts[0])
}

/// The same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// Where one file has data.
#[derive(Debug)]
pub(crate) struct Layout {
    file: Arc<OpenFile>,
    shape: Shape,
    /// A range that was seen to be all data. To find its end the kernel walks to the next hole, however far
    /// that is, so asking for a large file in steps would walk it again at each. That it may have been
    /// punched since does no harm: "data" is the answer that claims nothing.
    ///
    /// Protects only itself; held for a copy.
    data: Mutex<ByteRange>,
}

impl Layout {
    pub(crate) fn new(file: Arc<OpenFile>, shape: Shape) -> Self {
        Self { file, shape, data: Mutex::new(ByteRange::from_bounds(0, 0)) }
    }

    fn data(&self) -> MutexGuard<'_, ByteRange> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what it knows, since a hole may have come into being.
    pub(crate) fn forget(&self) {
        *self.data() = ByteRange::from_bounds(0, 0);
    }

    /// Answers without asking, where that is possible.
    pub(crate) fn known(&self, range: ByteRange) -> Option<Vec<Extent>> {
        if range.is_empty() {
            return Some(Vec::new());
        }
        if self.shape.is_device {
            return Some(vec![Extent { range, status: ExtentStatus::Data }]);
        }
        if self.shape.in_memory
            && range.len() <= LOOK_NOW_LEN
            && self.all_cached(range.offset(), range.end()).is_some()
        {
            return Some(vec![Extent { range, status: ExtentStatus::Data }]);
        }
        let data = self.data();
        let known = data.intersection(range).filter(|known| known.offset() == range.offset())?;
        Some(vec![Extent { range: known, status: ExtentStatus::Data }])
    }

    /// Asks the file system.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn extents(&self, range: ByteRange) -> io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        // Behind the end of a file that was cut short nothing is known; reading there will tell.
        let end = u64::try_from(fstat(&*self.file)?.st_size).unwrap_or(0);
        let mut at = range.offset();
        while at < range.end() && extents.len() < EXTENTS_MAX {
            let (status, until) =
                if at >= end { (ExtentStatus::Data, u64::MAX) } else { self.next(at, end, range.end())? };
            let extent = ByteRange::from_bounds(at, until.min(range.end()));
            extents.push(Extent { range: extent, status });
            if status == ExtentStatus::Data && at < end {
                *self.data() = ByteRange::from_bounds(at, until);
            }
            at = extent.end();
        }
        Ok(extents)
    }

    /// How far from `at` on every page of a file in memory is there, if that is far. To find the end of much data
    /// such a file system holds the file's lock, and with it every writer, for as long as it walks; this does not.
    fn all_cached(&self, at: u64, end: u64) -> Option<u64> {
        let until = end.min(at.saturating_add(LOOK_LEN) & !(PAGE - 1));
        let pages = until.checked_sub(at)?.div_ceil(PAGE);
        (pages > 0 && at.is_multiple_of(PAGE) && cached_pages(&*self.file, at, until - at)? >= pages)
            .then_some(until)
    }

    /// The status at `at`, and where it ends at the latest; nobody asks beyond `wanted`. `at` lies before `end`, the file's.
    fn next(&self, at: u64, end: u64, wanted: u64) -> io::Result<(ExtentStatus, u64)> {
        let data = match seek(&*self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data up to the end of the file.
            Err(Errno::NXIO) => end,
            // A file system that does not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((ExtentStatus::Data, end)),
            Err(error) => return Err(error.into()),
        };
        if data > at {
            return Ok((ExtentStatus::Hole, data.min(end)));
        }
        if self.shape.in_memory
            && let Some(until) = self.all_cached(at, wanted.min(end))
        {
            return Ok((ExtentStatus::Data, until));
        }
        match seek(&*self.file, SeekFrom::Hole(at)) {
            // A hole exactly here came into being since; the data that was here is the safe answer.
            Ok(hole) if hole > at => Ok((ExtentStatus::Data, hole)),
            Ok(_) => Ok((ExtentStatus::Data, end.min(at + u64::from(self.shape.preferred_size)))),
            Err(Errno::NXIO) => Ok((ExtentStatus::Data, end)),
            Err(error) => Err(error.into()),
        }
    }
}
