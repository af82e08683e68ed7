//! [`Space`]: zeroing and discarding by telling the file system or the device, without writing.
//!
//! Everything here blocks and may last long; [`crate::file`] sees to it that no data-plane thread waits. What
//! turns out not to work is remembered and not tried again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{ZeroEffort, ZeroSpace};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::lock::OpenFile;
use crate::probe::Shape;

/// The length of the zeroes that are written where nothing better works: one write of a good size.
const ZEROES_LEN: usize = 1 << 20;

/// BLKDISCARD of linux/fs.h: gives up the contents of a range, told by two u64, offset and length.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Zeroes to write. Page-aligned, so that direct I/O needs no copy of them.
pub(crate) fn zeroes() -> Bytes {
    static ZEROES: OnceLock<Bytes> = OnceLock::new();
    ZEROES.get_or_init(|| Buffer::zeroed(ZEROES_LEN).freeze()).clone()
}

/// What is left to be written with zeroes: before, in, and behind the part that a device takes whole blocks of.
pub(crate) type Left = [Option<ByteRange>; 3];

/// What works, as far as is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Able {
    pub(crate) punch: bool,
    pub(crate) zero_range: bool,
    pub(crate) discard: bool,
}

/// Zeroes and discards ranges of one file or device.
#[derive(Debug)]
pub(crate) struct Space {
    file: Arc<OpenFile>,
    shape: Shape,
    can_punch: AtomicBool,
    can_zero_range: AtomicBool,
    can_discard: AtomicBool,
}

impl Space {
    pub(crate) fn new(file: Arc<OpenFile>, shape: Shape) -> Self {
        Self {
            file,
            shape,
            can_punch: AtomicBool::new(shape.can_punch),
            can_zero_range: AtomicBool::new(shape.can_zero_range),
            can_discard: AtomicBool::new(shape.can_discard),
        }
    }

    pub(crate) fn able(&self) -> Able {
        Able {
            punch: self.can_punch.load(Ordering::Relaxed),
            zero_range: self.can_zero_range.load(Ordering::Relaxed),
            discard: self.can_discard.load(Ordering::Relaxed),
        }
    }

    /// Zeroes `range` in the fastest way that works, and says what it left to be written.
    ///
    /// # Errors
    /// `Unsupported`, with nothing changed, when only a fast way was asked for and there is none; else the
    /// host's.
    pub(crate) fn zero(&self, range: ByteRange, space: ZeroSpace, effort: ZeroEffort) -> io::Result<Left> {
        let [head, middle, tail] = self.split(range);
        let Some(middle) = middle else {
            return Ok([head, None, tail]);
        };
        if space == ZeroSpace::MayUnmap
            && self.attempt(&self.can_punch, FallocateFlags::PUNCH_HOLE, middle)?
        {
            return Ok([head, None, tail]);
        }
        if self.attempt(&self.can_zero_range, FallocateFlags::ZERO_RANGE, middle)? {
            return Ok([head, None, tail]);
        }
        match effort {
            ZeroEffort::Any => Ok([head, Some(middle), tail]),
            ZeroEffort::FastOnly => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Gives up the contents of `range`, as far as that is possible.
    ///
    /// # Errors
    /// The host's, not among them that it cannot do this.
    pub(crate) fn discard(&self, range: ByteRange) -> io::Result<()> {
        let [_, Some(whole), _] = self.split(range) else {
            return Ok(());
        };
        if self.shape.is_device {
            return self.discard_device(whole);
        }
        self.attempt(&self.can_discard, FallocateFlags::PUNCH_HOLE, whole).map(|_| ())
    }

    /// Cuts `range` where a device's blocks begin and end: before, whole blocks, behind. Files take any range.
    fn split(&self, range: ByteRange) -> Left {
        let block = u64::from(self.shape.device_block);
        let piece = |start, end| Some(ByteRange::from_bounds(start, end)).filter(|range| !range.is_empty());
        let start = range.offset().next_multiple_of(block).min(range.end());
        let end = (range.end() - range.end() % block).max(start);
        if start == end {
            return [piece(range.offset(), range.end()), None, None];
        }
        [piece(range.offset(), start), piece(start, end), piece(end, range.end())]
    }

    /// Tries one way, if it may work; says whether it did.
    fn attempt(&self, able: &AtomicBool, mode: FallocateFlags, range: ByteRange) -> io::Result<bool> {
        if !able.load(Ordering::Relaxed) {
            return Ok(false);
        }
        loop {
            let mode = mode | FallocateFlags::KEEP_SIZE;
            match fallocate(&*self.file, mode, range.offset(), range.len()) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY) => {
                    able.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                // Something about this range; another way may do.
                Err(Errno::INVAL) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn discard_device(&self, range: ByteRange) -> io::Result<()> {
        let argument = [range.offset(), range.len()];
        // SAFETY: BLKDISCARD reads two u64, which outlive the call; the descriptor is open as long as `self`
        // is, and the device, whose contents it gives up, was opened for writing (`FileStorage::check`).
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, argument.as_ptr()) };
        if result != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOTTY) => {
                self.can_discard.store(false, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(error),
        }
    }
}
