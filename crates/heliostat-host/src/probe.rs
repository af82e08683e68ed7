//! [`Shape`]: what a file or a block device is and can do, found out when it is opened.
//!
//! Nothing is assumed from a name or a version; what cannot be asked is tried, where trying changes nothing.

use std::io;
use std::os::fd::BorrowedFd;

use heliostat_block::buffer::{BUFFER_ALIGNMENT, Buffer};
use heliostat_block::convert::u64_from;
use rustix::fs::{AtFlags, FallocateFlags, FileType, StatxFlags, fstat};
use rustix::io::Errno;
use rustix::ioctl::{Getter, ioctl};

/// BLKROGET of linux/fs.h: whether a device may be written.
const BLKROGET: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 94);

/// The strictest unit for direct I/O that is tried: no disk has larger blocks than a page.
const BLOCK_SIZE_MAX: u32 = 4096;

const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// What a file or a block device is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) is_device: bool,
    /// On a file system that keeps files in memory: nothing there waits for a medium.
    pub(crate) in_memory: bool,
    pub(crate) is_writable: bool,
    /// Unit of offsets and lengths: of direct I/O, else 1.
    pub(crate) block_size: u32,
    /// Unit of addresses for direct I/O, else 1.
    pub(crate) memory_alignment: u32,
    /// The device's own unit, for zeroing and discarding; 1 for a file.
    pub(crate) device_block: u32,
    pub(crate) preferred_size: u32,
    /// Whether a range can be made a hole that surely reads as zeroes.
    pub(crate) can_punch: bool,
    /// Whether zeroing without giving up space needs no writing of zeroes.
    pub(crate) can_zero_range: bool,
    /// Whether the device takes discards; a file does where it can be punched.
    pub(crate) can_discard: bool,
}

impl Shape {
    pub(crate) fn probe(
        file: BorrowedFd<'_>,
        direct: Option<BorrowedFd<'_>>,
        size: u64,
        in_memory: bool,
        is_writable: bool,
    ) -> io::Result<Self> {
        let stat = fstat(file)?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let device_block = if is_device { rustix::fs::ioctl_blksszget(file)? } else { 1 };
        let (block_size, memory_alignment) = match direct {
            Some(direct) => direct_alignment(direct)?,
            None => (1, 1),
        };
        let io_block = u32::try_from(stat.st_blksize).unwrap_or(BLOCK_SIZE_MAX).max(BLOCK_SIZE_MAX);
        let preferred_size = if io_block.is_power_of_two() { io_block } else { BLOCK_SIZE_MAX };
        let queue = if is_device { Queue::of(stat.st_rdev) } else { Queue::default() };
        let can_punch = is_writable && if is_device { queue.zeroes } else { can_punch(file, size) };
        Ok(Self {
            is_device,
            in_memory,
            is_writable,
            block_size,
            memory_alignment,
            device_block,
            preferred_size,
            can_punch,
            // For a file it turns out at the first try; trying here could take space.
            can_zero_range: is_writable && if is_device { queue.zeroes } else { !in_memory },
            can_discard: if is_device { queue.discards } else { can_punch },
        })
    }
}

impl Shape {
    /// Where the tail of a file of `size` bytes starts. From there to the end, direct I/O is not used: the file
    /// ends in the middle of a block, and no page may be written both ways. `size` where there is no such tail.
    pub(crate) fn tail_of(&self, size: u64) -> u64 {
        if size.is_multiple_of(u64::from(self.block_size)) {
            return size;
        }
        // Not only the block but the page, since the page cache writes back pages.
        size - size % u64::from(self.preferred_size)
    }
}

/// Says whether `file` lies on a file system that keeps files in memory.
pub(crate) fn is_in_memory(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.f_type))
}

/// Says whether `file` is a block device that may not be written, though it could be opened for that.
pub(crate) fn is_read_only_device(file: BorrowedFd<'_>) -> bool {
    let is_device = fstat(file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::BlockDevice);
    // SAFETY: BLKROGET stores one int, on any device or not at all; that is what the getter reads.
    let request = unsafe { Getter::<BLKROGET, i32>::new() };
    // SAFETY: the request is what its number says, see above; no memory but its own is touched.
    is_device && unsafe { ioctl(file, request) }.is_ok_and(|flag| flag != 0)
}

/// Finds the units of direct I/O: of offsets and lengths, and of addresses.
pub(crate) fn direct_alignment(direct: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let told = rustix::fs::statx(direct, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(told) = told
        && StatxFlags::from_bits_retain(told.stx_mask).contains(StatxFlags::DIOALIGN)
        && told.stx_dio_offset_align.is_power_of_two()
        && told.stx_dio_mem_align.is_power_of_two()
    {
        return Ok((told.stx_dio_offset_align, told.stx_dio_mem_align));
    }
    let mut block = 512;
    let mut buffer = Buffer::zeroed(BUFFER_ALIGNMENT);
    while block < BLOCK_SIZE_MAX {
        let len = usize::try_from(block).expect("a block is small");
        match rustix::io::pread(direct, &mut buffer[..len], 0) {
            Err(Errno::INVAL) => block *= 2,
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    Ok((block, block))
}

/// Tries whether holes can be punched, behind the end of the file, where nothing is lost.
fn can_punch(file: BorrowedFd<'_>, size: u64) -> bool {
    let page = u64_from(BUFFER_ALIGNMENT);
    let Some(behind) = size.checked_next_multiple_of(page) else { return false };
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, behind, page).is_ok()
}

/// What a device's queue can do without being written to.
#[derive(Default)]
struct Queue {
    zeroes: bool,
    discards: bool,
}

impl Queue {
    fn of(device: u64) -> Self {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let limit = |name: &str| {
            // A partition has no queue of its own; its disk is the directory above.
            ["queue", "../queue"].iter().find_map(|queue| {
                let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
                std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
            })
        };
        Self {
            zeroes: limit("write_zeroes_max_bytes").is_some_and(|max| max > 0),
            discards: limit("discard_max_bytes").is_some_and(|max| max > 0),
        }
    }
}
