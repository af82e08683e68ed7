//! Reads, writes and flushes of a file through the thread's ring, finished when the kernel cuts them short.
//!
//! Called by the storages of this crate, on a thread that runs [`crate::runtime`]. An operation owns its
//! memory and its descriptor until the kernel is done with them, dropped futures included. Dropping one asks the
//! kernel to cancel the operation, which it does unless it has begun. Where the ring is denied, the same operations
//! run on blocking threads, and one that has begun runs to its end.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use compio::BufResult;
use compio::driver::{Decision, Extra, IourOpCode, OpEntry, PollOpCode};
use compio::runtime::Runtime;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::u64_from;
use heliostat_block::storage::Durability;
use io_uring::opcode;
use io_uring::types::{Fd, FsyncFlags};
use rustix::io::ReadWriteFlags;

use crate::blocking::Permit;
use crate::lock::OpenFile;
use crate::runtime::{Driver, InFlight};

/// The longest single operation: what Linux cuts reads and writes to (`MAX_RW_COUNT`), rounded down so that
/// what is left stays aligned for direct I/O.
const OPERATION_LEN_MAX: usize = 0x7fff_0000;

fn operation_len(len: usize) -> u32 {
    u32::try_from(len.min(OPERATION_LEN_MAX)).expect("the maximum fits in 32 bits")
}

/// What the kernel is asked to do: once as an entry of the ring, once as a call that blocks.
///
/// # Safety
/// The entry may name `file`, and point into memory that `self` owns and that does not move when `self` does,
/// in the way that `self` may use it; nothing else.
unsafe trait Request: 'static {
    /// The entry.
    fn entry(&mut self, file: Fd) -> OpEntry;

    /// The same as a call.
    fn call(&mut self, file: &OpenFile) -> io::Result<usize>;
}

/// A request on its way through the kernel. Owns what the kernel uses meanwhile.
struct Operation<R> {
    file: Arc<OpenFile>,
    request: R,
    in_flight: Option<InFlight>,
    /// Where it blocks a thread: as long as it does, whether or not anybody still waits.
    permit: Option<Permit>,
}

impl<R: Request> Operation<R> {
    fn new(file: &Arc<OpenFile>, request: R) -> Self {
        Self { file: Arc::clone(file), request, in_flight: None, permit: None }
    }

    /// Has the kernel do it. Where that blocks a thread, it waits for the right to.
    async fn run(mut self) -> (io::Result<usize>, Self) {
        if Driver::in_use() == Driver::Polling {
            self.permit = Some(self.file.share().enter().await);
        }
        self.in_flight = Some(InFlight::new());
        let BufResult(result, this) = Runtime::with_current(|runtime| runtime.submit(self)).await;
        (result, this)
    }
}

// SAFETY: what the entry names and points to stays there until the operation is complete: `self` owns it, as
// `Request` promises, and the driver keeps `self` until the kernel is done.
unsafe impl<R: Request> IourOpCode for Operation<R> {
    type Control = ();

    fn create_entry(&mut self, (): &mut ()) -> OpEntry {
        self.request.entry(Fd(self.file.as_raw_fd()))
    }

    fn call_blocking(&mut self, (): &mut ()) -> io::Result<usize> {
        self.request.call(&self.file)
    }

    // SAFETY: it asks nothing of its caller.
    unsafe fn set_result(&mut self, (): &mut (), _: &io::Result<usize>, _: &Extra) {
        self.in_flight = None;
        self.permit = None;
    }
}

// SAFETY: it never waits for a descriptor, so there is none that `op_type` would have to name.
unsafe impl<R: Request> PollOpCode for Operation<R> {
    type Control = ();

    fn pre_submit(&mut self, (): &mut ()) -> io::Result<Decision> {
        Ok(Decision::Blocking)
    }

    fn operate(&mut self, (): &mut ()) -> Poll<io::Result<usize>> {
        Poll::Ready(self.request.call(&self.file))
    }

    // SAFETY: it asks nothing of its caller.
    unsafe fn set_result(&mut self, (): &mut (), _: &io::Result<usize>, _: &Extra) {
        self.in_flight = None;
        self.permit = None;
    }
}

struct Read {
    offset: u64,
    buffer: Buffer,
    done: usize,
}

// SAFETY: it points into the heap memory of `buffer`, which is ours alone and does not move.
unsafe impl Request for Read {
    fn entry(&mut self, file: Fd) -> OpEntry {
        let rest = &mut self.buffer[self.done..];
        opcode::Read::new(file, rest.as_mut_ptr(), operation_len(rest.len()))
            .offset(self.offset + u64_from(self.done))
            .build()
            .into()
    }

    fn call(&mut self, file: &OpenFile) -> io::Result<usize> {
        let offset = self.offset + u64_from(self.done);
        Ok(rustix::io::pread(file, &mut self.buffer[self.done..], offset)?)
    }
}

/// Fills `buffer` from its byte `done` on; its first byte lies at `offset` of the file.
///
/// # Errors
/// `UnexpectedEof` when the file ends before that; else the host's.
pub(crate) async fn read(
    file: &Arc<OpenFile>,
    offset: u64,
    buffer: Buffer,
    done: usize,
) -> io::Result<Buffer> {
    let mut operation = Operation::new(file, Read { offset, buffer, done });
    while operation.request.done < operation.request.buffer.len() {
        let (result, back) = operation.run().await;
        operation = back;
        match result {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => operation.request.done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(operation.request.buffer)
}

struct Write {
    offset: u64,
    data: Bytes,
    done: usize,
    flags: ReadWriteFlags,
}

// SAFETY: it points into the memory behind `data`, which stays as long as `data` does and which nobody can
// change; the kernel only reads it.
unsafe impl Request for Write {
    fn entry(&mut self, file: Fd) -> OpEntry {
        let rest = &self.data[self.done..];
        opcode::Write::new(file, rest.as_ptr(), operation_len(rest.len()))
            .offset(self.offset + u64_from(self.done))
            .rw_flags(self.flags.bits().cast_signed())
            .build()
            .into()
    }

    fn call(&mut self, file: &OpenFile) -> io::Result<usize> {
        let offset = self.offset + u64_from(self.done);
        Ok(rustix::io::pwritev2(file, &[IoSlice::new(&self.data[self.done..])], offset, self.flags)?)
    }
}

/// Writes `data` from its byte `done` on; its first byte goes to `offset` of the file.
///
/// # Errors
/// The host's. After one, any part may have been written.
pub(crate) async fn write(
    file: &Arc<OpenFile>,
    offset: u64,
    data: Bytes,
    done: usize,
    durability: Durability,
) -> io::Result<()> {
    let flags = match durability {
        Durability::Cached => ReadWriteFlags::empty(),
        Durability::Fua => ReadWriteFlags::DSYNC,
    };
    let mut operation = Operation::new(file, Write { offset, data, done, flags });
    while operation.request.done < operation.request.data.len() {
        let (result, back) = operation.run().await;
        operation = back;
        match result {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => operation.request.done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Flush;

// SAFETY: it points nowhere.
unsafe impl Request for Flush {
    fn entry(&mut self, file: Fd) -> OpEntry {
        opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build().into()
    }

    fn call(&mut self, file: &OpenFile) -> io::Result<usize> {
        rustix::fs::fdatasync(file)?;
        Ok(0)
    }
}

/// Makes what was written to `file` durable, as fdatasync(2) does.
///
/// # Errors
/// The host's.
pub(crate) async fn flush(file: &Arc<OpenFile>) -> io::Result<()> {
    let mut operation = Operation::new(file, Flush);
    loop {
        let (result, back) = operation.run().await;
        operation = back;
        match result {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
