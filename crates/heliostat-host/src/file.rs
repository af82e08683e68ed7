//! [`FileStorage`]: an image file or a block device of this host.
//!
//! Decides for each request which way it takes: at once in the calling thread, where it will not wait for a
//! medium, or through the thread's ring. Opened in [`crate::open`]; called by drivers.

mod way;

use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use heliostat_block::buffer::{Buffer, BufferPool};
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;
use heliostat_block::span::Span;
use heliostat_block::storage::{Durability, Extent, IoFuture, Storage, Traits, ZeroEffort, ZeroSpace};
use rustix::io::{Errno, ReadWriteFlags};

use crate::extents::Layout;
use crate::fallocate::{self, Space};
use crate::length::Length;
use crate::lock::{self, OpenFile, User};
use crate::open::{Discard, Flush, OpenOptions};
use crate::pace::Pace;
use crate::pinned::Identity;
use crate::probe::Shape;
use crate::ring;
use crate::span;
use crate::writeback::Writeback;

use self::way::Other;
pub use self::way::Way;

/// The longest request that is carried out in the calling thread. Copying it takes some tens of microseconds,
/// for which the thread's other clients wait; beyond that, the ring's workers copy beside the thread.
const INLINE_LEN_MAX: usize = 256 << 10;

/// The longest range that is zeroed or discarded in the calling thread, where it lies in memory.
const INLINE_SPACE_MAX: u64 = 1 << 20;

/// Memory kept for direct I/O from and to memory that is not aligned: length and number of pieces.
const BOUNCE_LEN: usize = 1 << 20;
const BOUNCES_KEPT: usize = 8;

/// An image file or a block device of this host.
///
/// Shared by threads. A call that cannot be answered at once must be awaited on a thread that runs
/// [`crate::runtime`].
pub struct FileStorage {
    path: PathBuf,
    /// What the requests go to: the file with the page cache or, passing it by, the other one.
    main: Arc<OpenFile>,
    /// The file with the page cache, holder of the locks.
    cached: Arc<OpenFile>,
    shape: Shape,
    length: Arc<Length>,
    /// Changed by whoever opened it; read by every flush.
    ignores_flush: Arc<AtomicBool>,
    ignores_discard: bool,
    /// Whether a read can be tried without waiting; found out at the first.
    can_try_reading: AtomicBool,
    pace: Pace,
    bounces: BufferPool,
    space: Arc<Space>,
    layout: Arc<Layout>,
    writeback: Option<Arc<Writeback>>,
    /// Where requests go instead, while they do.
    other: Other,
}

impl fmt::Debug for FileStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStorage").field("path", &self.path).field("shape", &self.shape).finish()
    }
}

impl FileStorage {
    pub(crate) fn new(
        path: PathBuf,
        cached: Arc<OpenFile>,
        direct: Option<Arc<OpenFile>>,
        shape: Shape,
        size: u64,
        options: &OpenOptions,
    ) -> Self {
        let is_direct = direct.is_some();
        let writes_back = shape.is_writable && !shape.in_memory && !is_direct;
        Self {
            path,
            main: direct.unwrap_or_else(|| Arc::clone(&cached)),
            shape,
            length: Arc::new(Length::new(Arc::clone(&cached), shape, size)),
            ignores_flush: Arc::new(AtomicBool::new(options.flush == Flush::Ignore)),
            ignores_discard: options.discard == Discard::Ignore,
            can_try_reading: AtomicBool::new(!is_direct && !shape.in_memory),
            pace: Pace::new(),
            bounces: BufferPool::new(BOUNCE_LEN, BOUNCES_KEPT),
            space: Arc::new(Space::new(Arc::clone(&cached), shape)),
            layout: Arc::new(Layout::new(Arc::clone(&cached), shape)),
            writeback: cached
                .for_writeback()
                .filter(|_| writes_back)
                .map(|file| Arc::new(Writeback::new(file))),
            cached,
            other: Other::default(),
        }
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is, whatever its names.
    ///
    /// # Errors
    /// When the host cannot say.
    pub fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&rustix::fs::fstat(self.cached.as_fd())?))
    }

    /// Says whether it is a block device, not a file.
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.shape.is_device
    }

    /// Says whether the page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.opened_direct() != self.other.is_taken()
    }

    fn opened_direct(&self) -> bool {
        !Arc::ptr_eq(&self.main, &self.cached)
    }

    /// Says who else has it open in a way that keeps it from being still, as far as locks tell. Takes none, so
    /// that it disturbs nobody who is about to open it.
    ///
    /// # Errors
    /// The host's.
    pub fn writer(&self) -> io::Result<Option<User>> {
        lock::in_the_way(self.cached.as_fd(), lock::STILL)
    }

    /// Refuses what lies outside, which would make the file longer, and what may not be changed.
    fn check(&self, range: Option<ByteRange>, is_change: bool) -> io::Result<()> {
        if is_change && !self.shape.is_writable {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        match range {
            Some(range) if range.end() <= self.length.size() => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "outside of the storage")),
        }
    }

    fn range(offset: u64, len: usize) -> Option<ByteRange> {
        ByteRange::new(offset, u64_from(len)).ok()
    }

    /// Reads without waiting, as far as that goes; says how many bytes it were.
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            let at = offset + u64_from(done);
            let result = if self.shape.in_memory {
                rustix::io::pread(&*self.main, rest, at)
            } else {
                let slices = &mut [IoSliceMut::new(rest)];
                rustix::io::preadv2(&*self.main, slices, at, ReadWriteFlags::NOWAIT)
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::OPNOTSUPP) => {
                    self.can_try_reading.store(false, Ordering::Relaxed);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    async fn read_direct(&self, offset: u64, mut buffer: Buffer) -> io::Result<Buffer> {
        let _held = self.length.hold_ways().await;
        let direct_len = usize_from(self.length.direct_len(offset, u64_from(buffer.len())));
        if direct_len == buffer.len() {
            // A buffer starts on a page, which is enough for any memory.
            return ring::read(&self.main, offset, buffer, 0).await;
        }
        let tail = ring::read(
            &self.cached,
            offset + u64_from(direct_len),
            Buffer::zeroed(buffer.len() - direct_len),
            0,
        );
        let tail = tail.await?;
        buffer[direct_len..].copy_from_slice(&tail);
        if direct_len > 0 {
            let head = ring::read(&self.main, offset, self.bounces.take(direct_len), 0).await?;
            buffer[..direct_len].copy_from_slice(&head);
        }
        Ok(buffer)
    }

    async fn write_direct(&self, offset: u64, data: Bytes, durability: Durability) -> io::Result<()> {
        let _held = self.length.hold_ways().await;
        let direct_len = usize_from(self.length.direct_len(offset, u64_from(data.len())));
        if direct_len > 0 {
            let head = self.aligned(data.slice(..direct_len));
            ring::write(&self.main, offset, head, 0, durability).await?;
        }
        if direct_len < data.len() {
            ring::write(&self.cached, offset, data, direct_len, durability).await?;
        }
        Ok(())
    }

    /// The same bytes, in memory that direct I/O can use.
    fn aligned(&self, data: Bytes) -> Bytes {
        let alignment = usize_from(u64::from(self.shape.memory_alignment));
        if data.as_ptr().addr().is_multiple_of(alignment) {
            return data;
        }
        let mut bounce = self.bounces.take(data.len());
        bounce.copy_from_slice(&data);
        bounce.freeze()
    }

    /// Lets flushes reach the medium, or not, from now on. The first that does makes durable what was written before.
    pub fn set_flush(&self, flush: Flush) {
        self.ignores_flush.store(flush == Flush::Ignore, Ordering::Release);
    }

    fn ignores_flush(&self) -> bool {
        self.ignores_flush.load(Ordering::Acquire)
    }

    /// What `durability` comes to here: nothing has to be waited for where flushes do nothing.
    fn effective(&self, durability: Durability) -> Durability {
        if self.ignores_flush() || self.shape.in_memory { Durability::Cached } else { durability }
    }

    async fn write_zeroes_slowly(&self, range: ByteRange) -> io::Result<()> {
        let zeroes = fallocate::zeroes();
        for piece in range.pieces(u64_from(zeroes.len())) {
            let data = zeroes.slice(..usize_from(piece.len()));
            if self.opened_direct() {
                self.write_direct(piece.offset(), data, Durability::Cached).await?;
            } else {
                ring::write(&self.main, piece.offset(), data, 0, Durability::Cached).await?;
            }
        }
        Ok(())
    }

    async fn flush_file(&self) -> io::Result<()> {
        ring::flush(&self.cached).await
    }
}

impl Storage for FileStorage {
    fn traits(&self) -> Traits {
        let able = self.space.able();
        Traits {
            block_size: self.shape.block_size,
            preferred_size: self.shape.preferred_size,
            read_only: !self.shape.is_writable,
            can_discard: able.discard && !self.ignores_discard,
            can_zero_fast: able.punch || able.zero_range,
            can_resize: self.length.can_change(),
            remote: false,
        }
    }

    fn size(&self) -> u64 {
        self.length.size()
    }

    fn set_size(&self, size: u64) -> IoFuture<'_, ()> {
        if !self.shape.is_writable {
            return IoFuture::ready(Err(io::ErrorKind::ReadOnlyFilesystem.into()));
        }
        if !self.length.can_change() {
            return IoFuture::ready(Err(io::ErrorKind::Unsupported.into()));
        }
        if let Some(other) = self.other.get() {
            return IoFuture::pending(async move { other.set_size(size).await });
        }
        IoFuture::pending(async move {
            let changed = self.length.change(size).await;
            // What was data may be a hole when the file is long again.
            self.layout.forget();
            changed
        })
    }

    fn allocated_size(&self) -> Option<u64> {
        if self.shape.is_device {
            return None;
        }
        let stat = rustix::fs::fstat(&*self.cached).ok()?;
        // st_blocks counts 512 bytes, whatever the file system's blocks are.
        u64::try_from(stat.st_blocks).ok()?.checked_mul(512)
    }

    fn read(&self, offset: u64, mut buffer: Buffer) -> IoFuture<'_, Buffer> {
        if let Err(error) = self.check(Self::range(offset, buffer.len()), false) {
            return IoFuture::ready(Err(error));
        }
        if let Some(other) = self.other.get() {
            return IoFuture::pending(async move { other.read(offset, buffer).await });
        }
        if self.opened_direct() {
            return IoFuture::pending(self.read_direct(offset, buffer));
        }
        let may_try = self.shape.in_memory || self.can_try_reading.load(Ordering::Relaxed);
        let done = if buffer.len() <= INLINE_LEN_MAX && may_try {
            match self.read_now(offset, &mut buffer) {
                Ok(done) if done == buffer.len() => return IoFuture::ready(Ok(buffer)),
                Ok(done) => done,
                Err(error) => return IoFuture::ready(Err(error)),
            }
        } else {
            0
        };
        IoFuture::pending(ring::read(&self.main, offset, buffer, done))
    }

    fn span(&self, range: ByteRange) -> Option<Span> {
        if self.opened_direct() || self.other.is_taken() {
            return None;
        }
        self.check(Some(range), false).ok()?;
        span::lend(&self.main, self.shape, range)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> IoFuture<'_, ()> {
        if let Err(error) = self.check(Self::range(offset, data.len()), true) {
            return IoFuture::ready(Err(error));
        }
        if let Some(other) = self.other.get() {
            return IoFuture::pending(async move { other.write(offset, data, durability).await });
        }
        let durability = self.effective(durability);
        if self.opened_direct() {
            return IoFuture::pending(self.write_direct(offset, data, durability));
        }
        if data.len() <= INLINE_LEN_MAX && durability == Durability::Cached {
            if self.shape.in_memory {
                return IoFuture::ready(write_now(&self.main, offset, &data));
            }
            if let Some(watch) = self.pace.start() {
                let result = write_now(&self.main, offset, &data);
                self.pace.end(watch);
                return IoFuture::ready(result);
            }
        }
        IoFuture::pending(ring::write(&self.main, offset, data, 0, durability))
    }

    fn write_zeroes(
        &self,
        range: ByteRange,
        space: ZeroSpace,
        effort: ZeroEffort,
        durability: Durability,
    ) -> IoFuture<'_, ()> {
        if let Err(error) = self.check(Some(range), true) {
            return IoFuture::ready(Err(error));
        }
        if let Some(other) = self.other.get() {
            let zeroed = async move { other.write_zeroes(range, space, effort, durability).await };
            return IoFuture::pending(zeroed);
        }
        let durability = self.effective(durability);
        let at_once = (self.shape.in_memory && range.len() <= INLINE_SPACE_MAX)
            .then(|| self.space.zero(range, space, effort));
        if let Some(Ok([None, None, None])) = at_once {
            self.layout.forget();
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(async move {
            let left = match at_once {
                Some(result) => result?,
                None => {
                    let worker = Arc::clone(&self.space);
                    self.cached.share().run(move || worker.zero(range, space, effort)).await?
                }
            };
            self.layout.forget();
            for piece in left.into_iter().flatten() {
                self.write_zeroes_slowly(piece).await?;
            }
            match durability {
                Durability::Cached => Ok(()),
                Durability::Fua => self.flush_file().await,
            }
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        if let Err(error) = self.check(Some(range), true) {
            return IoFuture::ready(Err(error));
        }
        if self.ignores_discard || !self.space.able().discard {
            return IoFuture::ready(Ok(()));
        }
        if let Some(other) = self.other.get() {
            return IoFuture::pending(async move { other.discard(range).await });
        }
        if self.shape.in_memory && range.len() <= INLINE_SPACE_MAX {
            let result = self.space.discard(range);
            self.layout.forget();
            return IoFuture::ready(result);
        }
        IoFuture::pending(async move {
            let worker = Arc::clone(&self.space);
            let result = self.cached.share().run(move || worker.discard(range)).await;
            self.layout.forget();
            result
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        if self.ignores_flush() || self.shape.in_memory || !self.shape.is_writable {
            return IoFuture::ready(Ok(()));
        }
        IoFuture::pending(self.flush_file())
    }

    fn extents(&self, range: ByteRange) -> IoFuture<'_, Vec<Extent>> {
        if let Err(error) = self.check(Some(range), false) {
            return IoFuture::ready(Err(error));
        }
        if let Some(known) = self.layout.known(range) {
            return IoFuture::ready(Ok(known));
        }
        let worker = Arc::clone(&self.layout);
        IoFuture::pending(async move { self.cached.share().run(move || worker.extents(range)).await })
    }

    fn start_writeback(&self, range: ByteRange) {
        if let Some(other) = self.other.get() {
            other.start_writeback(range);
        } else if let Some(writeback) = &self.writeback {
            Writeback::start(writeback, range);
        }
    }
}

/// Writes all of `data` in the calling thread.
fn write_now(file: &impl AsFd, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        match rustix::io::pwrite(file, &data[done..], offset + u64_from(done)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Mutex, mpsc};

    use futures_util::future::join_all;

    use super::*;
    use crate::blocking::THREADS_OF_ONE;
    use crate::open::{Cache, Existing};
    use crate::runtime::{Driver, block_on_with, spawn_local, yield_now};
    use crate::span::read_span;

    fn create(directory: &tempfile::TempDir, name: &str) -> FileStorage {
        let options = OpenOptions { cache: Cache::Direct, ..OpenOptions::default() };
        FileStorage::create(&directory.path().join(name), 1 << 20, Existing::Refuse, &options).unwrap()
    }

    /// Writes, reads, asks for holes and flushes, more at once than there are threads.
    async fn use_it(storage: &FileStorage) {
        let requests = (0..100_u64).map(|n| async move {
            let offset = n * 8192;
            storage.write(offset, vec![7; 8192].into(), Durability::Cached).await.unwrap();
            assert_eq!(storage.read(offset, Buffer::zeroed(8192)).await.unwrap()[8191], 7);
            let range = ByteRange::from_bounds(offset, offset + 8192);
            storage.extents(range).await.unwrap();
            storage.flush().await.unwrap();
        });
        join_all(requests).await;
    }

    /// Keeps all of the threads that `storage` may have, as calls do whose medium does not answer, until what this
    /// returns is dropped.
    async fn hang(storage: &FileStorage) -> mpsc::Sender<()> {
        let (let_go, may_go) = mpsc::channel();
        let (may_go, begun) = (Arc::new(Mutex::new(may_go)), Arc::new(AtomicUsize::new(0)));
        for _ in 0..THREADS_OF_ONE {
            let (file, may_go, counted) =
                (Arc::clone(&storage.cached), Arc::clone(&may_go), Arc::clone(&begun));
            let hang = move || {
                counted.fetch_add(1, Ordering::SeqCst);
                may_go.lock().unwrap().recv().unwrap_err()
            };
            spawn_local(async move {
                file.share().run(hang).await;
            });
        }
        while begun.load(Ordering::SeqCst) < THREADS_OF_ONE {
            yield_now().await;
        }
        let_go
    }

    #[test]
    fn what_is_in_memory_can_be_sent_from_there_and_nothing_else_can() {
        let directory = tempfile::tempdir().unwrap();
        for cache in [Cache::Page, Cache::Direct] {
            let path = directory.path().join(format!("{cache:?}"));
            let options = OpenOptions { cache, ..OpenOptions::default() };
            let storage = FileStorage::create(&path, 1 << 20, Existing::Refuse, &options).unwrap();
            let range = |offset, len| ByteRange::new(offset, len).unwrap();
            let quarter = range(4096, 256 << 10);
            block_on_with(Driver::Polling, async {
                let bytes: Vec<u8> = (0..=250).cycle().take(1 << 20).collect();
                storage.write(0, bytes.clone().into(), Durability::Cached).await.unwrap();
                if storage.is_direct() {
                    assert!(storage.span(quarter).is_none(), "it passes the page cache by");
                    return;
                }
                let span = storage.span(quarter).expect("it was written just now");
                assert_eq!((span.offset(), span.len()), (4096, 256 << 10));
                let read = read_span(&span, Buffer::zeroed(span.len())).unwrap();
                assert!(*read == bytes[4096..4096 + (256 << 10)]);
                assert!(storage.span(range(4096, 4096)).is_none(), "it is shorter to copy");
                assert!(
                    storage.span(range(0, 1 << 20)).is_none(),
                    "others would wait for what is left of it"
                );
                assert!(
                    storage.span(range((1 << 20) - 4096, 256 << 10)).is_none(),
                    "it ends behind the disk"
                );
                // Somebody else makes the file shorter.
                std::fs::File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
                assert!(storage.span(quarter).is_none(), "it is not there any more");
                assert!(read_span(&span, Buffer::zeroed(span.len())).is_err());
            })
            .unwrap();
        }
    }

    #[test]
    fn a_write_that_is_dropped_while_it_waits_for_a_thread_is_left_undone() {
        let directory = tempfile::tempdir().unwrap();
        let storage = create(&directory, "disk");
        block_on_with(Driver::Polling, async {
            let let_go = hang(&storage).await;
            let mut write = storage.write(0, vec![7; 8192].into(), Durability::Cached);
            assert!(futures_util::poll!(&mut write).is_pending());
            drop(write);
            drop(let_go);
            assert!(storage.read(0, Buffer::zeroed(8192)).await.unwrap().is_zero());
        })
        .unwrap();
    }

    #[test]
    fn a_file_that_hangs_keeps_its_own_requests_waiting_and_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let [hung, other] = ["hung", "other"].map(|name| Arc::new(create(&directory, name)));
        block_on_with(Driver::Polling, async {
            let let_go = hang(&hung).await;
            let mut waiting = Box::pin(use_it(&hung));
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            use_it(&other).await;
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            drop(let_go);
            waiting.await;
        })
        .unwrap();
    }
}
