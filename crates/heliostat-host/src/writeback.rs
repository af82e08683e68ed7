//! [`Writeback`]: starts writing a file's dirty pages while a copy goes on, and drops them from the host's
//! cache when they are clean, so that no flush at the end waits for gigabytes and the cache stays with those
//! who use it.
//!
//! Starting to write can wait when the disk's queue is full, so it is done on a blocking thread; callers only
//! leave a note. Nothing depends on it: what it misses, the kernel writes later.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_block::range::ByteRange;
use rustix::fs::Advice;

use crate::runtime::run_detached;

/// Notes that wait; more are dropped. Copies come in some order, so a worker that keeps up sees a few.
const NOTES_MAX: usize = 256;

/// Ranges that are being written and are to be dropped from the cache then. So many behind the front, a range
/// has usually been written and waiting for it costs nothing.
const BEHIND: usize = 16;

/// The dirty pages of one file.
#[derive(Debug)]
pub(crate) struct Writeback {
    file: Arc<OwnedFd>,
    /// Protects only itself; held for a push or a pop.
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    to_start: VecDeque<ByteRange>,
    started: VecDeque<ByteRange>,
    has_worker: bool,
}

impl Writeback {
    pub(crate) fn new(file: Arc<OwnedFd>) -> Self {
        Self { file, notes: Mutex::default() }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that `range` is written soon. Never waits.
    pub(crate) fn start(this: &Arc<Self>, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let mut notes = this.notes();
        let is_full = notes.to_start.len() >= NOTES_MAX;
        match notes.to_start.back_mut() {
            Some(last) if last.end() == range.offset() => {
                *last = ByteRange::from_bounds(last.offset(), range.end());
            }
            _ if is_full => return,
            _ => notes.to_start.push_back(range),
        }
        if !notes.has_worker {
            let worker = Arc::clone(this);
            notes.has_worker = run_detached(move || worker.work());
        }
    }

    fn work(&self) {
        loop {
            let mut notes = self.notes();
            let Some(range) = notes.to_start.pop_front() else {
                notes.has_worker = false;
                return;
            };
            notes.started.push_back(range);
            let behind = if notes.started.len() > BEHIND { notes.started.pop_front() } else { None };
            drop(notes);
            self.sync(range, libc::SYNC_FILE_RANGE_WRITE);
            if let Some(behind) = behind {
                self.sync(
                    behind,
                    libc::SYNC_FILE_RANGE_WAIT_BEFORE
                        | libc::SYNC_FILE_RANGE_WRITE
                        | libc::SYNC_FILE_RANGE_WAIT_AFTER,
                );
                let len = std::num::NonZeroU64::new(behind.len());
                let _ = rustix::fs::fadvise(&*self.file, behind.offset(), len, Advice::DontNeed);
            }
        }
    }

    fn sync(&self, range: ByteRange, flags: libc::c_uint) {
        let (Ok(offset), Ok(len)) = (i64::try_from(range.offset()), i64::try_from(range.len())) else {
            return;
        };
        // An error here is not an answer to anybody: the flush that promises durability reports its own.
        // SAFETY: the call takes numbers only, and the descriptor is open as long as `self` is.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, len, flags) };
    }
}
