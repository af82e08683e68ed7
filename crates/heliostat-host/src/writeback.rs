//! [`Writeback`]: starts writing a file's dirty pages while a copy goes on, and drops them from the host's
//! cache when they are clean, so that no flush at the end waits for gigabytes and the cache stays with those
//! who use it.
//!
//! Starting to write can wait when the disk's queue is full, so it is done on a blocking thread; callers only
//! leave a note. Nothing depends on it: what it misses, the kernel writes later.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use heliostat_block::range::ByteRange;
use rustix::fs::Advice;

use crate::blocking::run_detached;

/// Notes that wait; more are dropped. Copies come in some order, so a worker that keeps up sees a few.
const NOTES_MAX: usize = 256;

/// The most that is started at once, so that what lies behind is dropped in good time.
const PIECE_LEN: u64 = 8 << 20;

/// How much may be under way before the oldest of it is waited for and dropped. So far behind the front it has
/// usually been written, and waiting costs nothing.
const BEHIND_LEN: u64 = 64 << 20;

const WRITE_AND_WAIT: libc::c_uint =
    libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;

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
    started_len: u64,
    has_worker: bool,
}

/// What the worker does next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Start writing this.
    Start(ByteRange),
    /// Wait until this is written, and drop it.
    Drop(ByteRange),
}

impl Notes {
    fn add(&mut self, range: ByteRange) {
        let is_full = self.to_start.len() >= NOTES_MAX;
        match self.to_start.back_mut() {
            Some(last) if last.end() == range.offset() => {
                *last = ByteRange::from_bounds(last.offset(), range.end());
            }
            _ if is_full || range.is_empty() => {}
            _ => self.to_start.push_back(range),
        }
    }

    /// Takes the next step; `None` when there is nothing to do until the next note.
    fn next_step(&mut self) -> Option<Step> {
        if self.started_len > BEHIND_LEN {
            let oldest = self.started.pop_front()?;
            self.started_len -= oldest.len();
            return Some(Step::Drop(oldest));
        }
        let front = self.to_start.front_mut()?;
        let piece = ByteRange::from_bounds(front.offset(), front.end().min(front.offset() + PIECE_LEN));
        *front = ByteRange::from_bounds(piece.end(), front.end());
        if front.is_empty() {
            self.to_start.pop_front();
        }
        self.started.push_back(piece);
        self.started_len += piece.len();
        Some(Step::Start(piece))
    }
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
        let mut notes = this.notes();
        notes.add(range);
        if !notes.has_worker {
            let worker = Arc::clone(this);
            notes.has_worker = run_detached(move || worker.work());
        }
    }

    fn work(&self) {
        while let Some(step) = self.take_step() {
            match step {
                Step::Start(range) => self.sync(range, libc::SYNC_FILE_RANGE_WRITE),
                Step::Drop(range) => {
                    self.sync(range, WRITE_AND_WAIT);
                    let len = NonZeroU64::new(range.len());
                    let _ = rustix::fs::fadvise(&*self.file, range.offset(), len, Advice::DontNeed);
                }
            }
        }
    }

    fn take_step(&self) -> Option<Step> {
        let mut notes = self.notes();
        let step = notes.next_step();
        notes.has_worker = step.is_some();
        step
    }

    fn sync(&self, range: ByteRange, flags: libc::c_uint) {
        let (Ok(offset), Ok(len)) = (i64::try_from(range.offset()), i64::try_from(range.len())) else {
            return;
        };
        // An error here is not an answer to anybody. The file was opened for this alone, so the flush that
        // promises durability is told the same error.
        // SAFETY: the call takes numbers only, and the descriptor is open as long as `self` is.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), offset, len, flags) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start * MIB, end * MIB)
    }

    #[test]
    fn neighbours_are_started_together_in_pieces_and_dropped_far_behind() {
        let mut notes = Notes::default();
        for n in 0..80 {
            notes.add(range(n, n + 1));
        }
        notes.add(range(200, 201));
        let mut steps = Vec::new();
        while let Some(step) = notes.next_step() {
            steps.push(step);
        }
        let started = (0..10).map(|n| Step::Start(range(n * 8, n * 8 + 8)));
        let mut expected: Vec<_> = started.chain([Step::Start(range(200, 201))]).collect();
        // 64 MiB may be under way: the ninth piece makes the first one be waited for.
        expected.insert(9, Step::Drop(range(0, 8)));
        expected.insert(11, Step::Drop(range(8, 16)));
        expected.push(Step::Drop(range(16, 24)));
        assert_eq!(steps, expected);
    }

    #[test]
    fn notes_are_bounded() {
        let mut notes = Notes::default();
        for n in 0..10_000 {
            notes.add(range(2 * n, 2 * n + 1));
        }
        assert_eq!(notes.to_start.len(), NOTES_MAX);
    }
}
