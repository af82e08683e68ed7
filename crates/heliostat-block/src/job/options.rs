//! [`MirrorOptions`]: what a mirror is told when it starts, and cannot be told otherwise later.

use std::time::Duration;

use super::OnError;
use super::scan::SyncMode;
use crate::limits::{BUF_SIZE_DEFAULT, GRANULARITY_DEFAULT, TARGET_DEADLINE_DEFAULT};

/// A mirror's arguments (MIRROR.md section 2), checked by the control plane.
#[derive(Clone, Copy, Debug)]
pub struct MirrorOptions {
    /// What the first pass copies.
    pub sync: SyncMode,
    /// Bytes a dirty bit; a power of two, 512 B to 64 MiB.
    pub granularity: u32,
    /// Bytes of copies in flight; rounded up to the granularity.
    pub buf_size: u64,
    /// What to do when the source cannot be read.
    pub on_source_error: OnError,
    /// What to do when the target cannot be written or flushed.
    pub on_target_error: OnError,
    /// Zeroes may become holes on the target.
    pub unmap: bool,
    /// The target is known to read as zero all over.
    pub target_is_zero: bool,
    /// Data that is all zero is not written as data.
    pub detect_zeroes: bool,
    /// The target will stand on the source: what it does not hold the source must hold durably, so that a flush of
    /// the one is a flush of both.
    pub stands_on_source: bool,
    /// How long a guest waits for the target's half of its write.
    pub target_deadline: Duration,
}

impl Default for MirrorOptions {
    fn default() -> Self {
        Self {
            sync: SyncMode::Full,
            granularity: GRANULARITY_DEFAULT,
            buf_size: BUF_SIZE_DEFAULT,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: true,
            target_is_zero: false,
            detect_zeroes: false,
            stands_on_source: false,
            target_deadline: TARGET_DEADLINE_DEFAULT,
        }
    }
}
