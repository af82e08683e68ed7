//! Reads, writes and flushes of a file through the thread's ring, finished when the kernel cuts them short.
//!
//! Called by the storages of this crate, on a thread that runs [`crate::runtime`]. An operation owns its
//! memory and its descriptor until the kernel is done with them, dropped futures included. Where the ring is
//! denied, the same operations run on blocking threads.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use compio::BufResult;
use compio::driver::op::Sync;
use compio::driver::{Decision, IourOpCode, OpCode, OpEntry, PollOpCode};
use compio::runtime::Runtime;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::u64_from;
use heliostat_block::storage::Durability;
use io_uring::opcode;
use io_uring::types::Fd;
use rustix::io::ReadWriteFlags;

use crate::lock::OpenFile;
use crate::runtime::{BLOCKING, Driver};

/// The longest single operation: what Linux cuts reads and writes to (`MAX_RW_COUNT`), rounded down so that
/// what is left stays aligned for direct I/O.
const OPERATION_LEN_MAX: usize = 0x7fff_0000;

fn operation_len(len: usize) -> u32 {
    u32::try_from(len.min(OPERATION_LEN_MAX)).expect("the maximum fits in 32 bits")
}

/// Runs one operation. Where it blocks a thread, it waits for the right to.
async fn submit<T: OpCode + 'static>(operation: T) -> BufResult<usize, T> {
    let _permit = match Driver::in_use() {
        Driver::Polling => Some(BLOCKING.acquire().await),
        _ => None,
    };
    Runtime::with_current(|runtime| runtime.submit(operation)).await
}

struct Read {
    file: Arc<OpenFile>,
    offset: u64,
    buffer: Buffer,
    done: usize,
}

impl Read {
    fn blocking(&mut self) -> io::Result<usize> {
        let offset = self.offset + u64_from(self.done);
        Ok(rustix::io::pread(&self.file, &mut self.buffer[self.done..], offset)?)
    }
}

// SAFETY: the entry points into the heap memory of `buffer`, which does not move when `self` does, and names a
// descriptor that `file` keeps open; `self` owns both, and the driver keeps `self` until the kernel is done.
unsafe impl IourOpCode for Read {
    type Control = ();

    fn create_entry(&mut self, (): &mut ()) -> OpEntry {
        let rest = &mut self.buffer[self.done..];
        opcode::Read::new(Fd(self.file.as_raw_fd()), rest.as_mut_ptr(), operation_len(rest.len()))
            .offset(self.offset + u64_from(self.done))
            .build()
            .into()
    }

    fn call_blocking(&mut self, (): &mut ()) -> io::Result<usize> {
        self.blocking()
    }
}

// SAFETY: it never waits for a descriptor, so there is none that `op_type` would have to name.
unsafe impl PollOpCode for Read {
    type Control = ();

    fn pre_submit(&mut self, (): &mut ()) -> io::Result<Decision> {
        Ok(Decision::Blocking)
    }

    fn operate(&mut self, (): &mut ()) -> Poll<io::Result<usize>> {
        Poll::Ready(self.blocking())
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
    let mut operation = Read { file: Arc::clone(file), offset, buffer, done };
    while operation.done < operation.buffer.len() {
        let BufResult(result, back) = submit(operation).await;
        operation = back;
        match result {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => operation.done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(operation.buffer)
}

struct Write {
    file: Arc<OpenFile>,
    offset: u64,
    data: Bytes,
    done: usize,
    flags: ReadWriteFlags,
}

impl Write {
    fn blocking(&mut self) -> io::Result<usize> {
        let offset = self.offset + u64_from(self.done);
        Ok(rustix::io::pwritev2(&self.file, &[IoSlice::new(&self.data[self.done..])], offset, self.flags)?)
    }
}

// SAFETY: as for `Read`; the memory behind `data` does not move when `data` does, and nobody can change it.
unsafe impl IourOpCode for Write {
    type Control = ();

    fn create_entry(&mut self, (): &mut ()) -> OpEntry {
        let rest = &self.data[self.done..];
        opcode::Write::new(Fd(self.file.as_raw_fd()), rest.as_ptr(), operation_len(rest.len()))
            .offset(self.offset + u64_from(self.done))
            .rw_flags(self.flags.bits().cast_signed())
            .build()
            .into()
    }

    fn call_blocking(&mut self, (): &mut ()) -> io::Result<usize> {
        self.blocking()
    }
}

// SAFETY: as for `Read`.
unsafe impl PollOpCode for Write {
    type Control = ();

    fn pre_submit(&mut self, (): &mut ()) -> io::Result<Decision> {
        Ok(Decision::Blocking)
    }

    fn operate(&mut self, (): &mut ()) -> Poll<io::Result<usize>> {
        Poll::Ready(self.blocking())
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
    let mut operation = Write { file: Arc::clone(file), offset, data, done, flags };
    while operation.done < operation.data.len() {
        let BufResult(result, back) = submit(operation).await;
        operation = back;
        match result {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => operation.done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes what was written to `file` durable, as fdatasync(2) does.
///
/// # Errors
/// The host's.
pub(crate) async fn flush(file: &Arc<OpenFile>) -> io::Result<()> {
    loop {
        let BufResult(result, _) = submit(Sync::new(Arc::clone(file), true)).await;
        match result {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
