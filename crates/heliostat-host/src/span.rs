//! Spans of files: bytes that a socket can be given from the page cache. What else a [`Span`] may be, the core says.
//!
//! A span is lent only where all of it is in memory, so that sending or reading it does not wait for a medium. The kernel
//! may drop a page in between; then it does wait, once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use heliostat_block::buffer::Buffer;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;
use heliostat_block::span::Span;
use rustix::io::Errno;

use crate::extents::{PAGE, cached_pages};
use crate::lock::OpenFile;
use crate::probe::Shape;

/// Shorter reads are copied: lending pages costs more than that.
const LEN_MIN: u64 = 32 << 10;

/// Longer ones are left to the ring's workers: what a socket does not take at once is copied by the thread that asks, and
/// its other clients wait for that.
const LEN_MAX: u64 = 256 << 10;

/// Lends `range` of `file`, if that is worth it and all of it is in memory.
pub(crate) fn lend(file: &Arc<OpenFile>, shape: Shape, range: ByteRange) -> Option<Span> {
    let is_lent = (LEN_MIN..=LEN_MAX).contains(&range.len())
        && is_there(file, shape, range)
        && is_cached(file, shape, range);
    is_lent.then(|| Span::new(Arc::<OpenFile>::clone(file), range.offset(), usize_from(range.len())))
}

/// Whether the file reaches so far. Somebody else may have made it shorter, of which the page cache keeps more than is
/// there for a while.
fn is_there(file: &Arc<OpenFile>, shape: Shape, range: ByteRange) -> bool {
    let end = || rustix::fs::fstat(file).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
    shape.is_device || end().is_some_and(|end| range.end() <= end)
}

fn is_cached(file: &Arc<OpenFile>, shape: Shape, range: ByteRange) -> bool {
    let pages = range.end().div_ceil(PAGE) - range.offset() / PAGE;
    shape.in_memory || cached_pages(file, range.offset(), range.len()).is_some_and(|cached| cached >= pages)
}

/// The file that a span is of.
///
/// # Errors
/// `InvalidInput` for what no file has lent.
pub(crate) fn file_of(span: &Span) -> io::Result<BorrowedFd<'_>> {
    let file = span.place::<OpenFile>().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(file.as_fd())
}

/// Reads what lies in `span` into `buffer`, which is as long, without waiting for more than memory.
///
/// # Errors
/// The host's; `UnexpectedEof` when the file ends before it; `InvalidInput` for what no file has lent.
pub fn read_span(span: &Span, mut buffer: Buffer) -> io::Result<Buffer> {
    let file = file_of(span)?;
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], span.offset() + u64_from(done)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(buffer)
}
