//! qcow2: images that grow as they are written, on top of others. [`Qcow2`] is the driver.
//!
//! Written from the public specification (QEMU's `docs/interop/qcow2`) and from what QEMU's tools are seen to do.
//!
//! The tables are in [`state`], in memory, behind one lock that is never held across I/O. A request looks there
//! where its bytes are, does its I/O without the lock, and changes the tables when its data is there. What the tables
//! need from the file is loaded on demand; what is changed goes back in [`commit`], in an order that leaves a sound
//! image whenever it stops.

mod allocate;
pub mod bitmap_directory;
mod bitmaps;
pub mod check;
mod commit;
mod compressed;
pub mod create;
pub mod entry;
pub mod error;
mod extension;
mod extents;
pub mod file;
pub mod header;
mod header_change;
mod hollow;
mod in_flight;
pub mod layout;
mod map;
mod open;
mod read;
mod refcount;
mod resize;
mod slices;
pub mod snapshot;
mod state;
mod write;
mod zero;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;

use self::error::Corruption;
use self::file::ImageFile;
use self::header::{Compression, Header, incompatible};
use self::layout::Layout;
use self::slices::Kind;
use self::state::{Attempt, Obstacle, State};
use crate::buffer::Buffer;
use crate::convert::usize_from;
use crate::debug_event::DebugEvent;
use crate::node::Node;
use crate::range::ByteRange;
use crate::range_lock::RangeLock;
use crate::storage::{Storage, Traits, pass};
use crate::throttle::while_wanted;

pub use bitmaps::StoredBitmap;
pub use open::{CACHE_MAX, OpenOptions};
pub use resize::Preallocation;

/// An open image. Used from any thread.
pub struct Qcow2 {
    layout: Layout,
    read_only: bool,
    compression: Compression,
    is_data_file_raw: bool,
    /// The virtual size; changed by a resize only.
    size: AtomicU64,
    file: ImageFile,
    /// Where guest data is, if not in `file`.
    data_file: Option<ImageFile>,
    /// What is below it: changed only while nothing is in flight here; read for an instant by requests.
    backing: RwLock<Backing>,
    /// Its persistent dirty bitmaps; empty where it is not written. Held to look which there are, and when the disk gets
    /// another size.
    bitmaps: Mutex<Vec<StoredBitmap>>,
    /// Whether clusters that it has may be holes of the file; asked once.
    hollow: OnceLock<bool>,
    /// Held for look-ups and changes, never across I/O.
    state: Mutex<State>,
    /// Slices that are being loaded, by their place.
    loading: RangeLock,
    /// L1 entries for which a table is being made, by number.
    linking: RangeLock,
    /// Held by the commit that is under way.
    turn: RangeLock,
    /// Hears of the first corruption that is found.
    herald: OnceLock<Herald>,
    is_told: AtomicBool,
}

/// What is below an image.
struct Backing {
    node: Option<Arc<Node>>,
    /// The image names a backing file, and nothing was put there.
    is_missing: bool,
}

/// Hears of a corruption. Must not block.
type Herald = Box<dyn Fn(&Corruption) + Send + Sync>;

/// A request that has looked at the mapping: what it saw is not used anew before it has ended.
pub(crate) struct Visit<'a> {
    driver: &'a Qcow2,
    epoch: u64,
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.driver.lock().epochs.leave(self.epoch);
    }
}

/// A write that has begun. Dropped before its end it may still land, at any time: nothing that it saw is used anew
/// then, so all that is freed from now on is lost space, until a check gives it back.
struct Landing<'a>(Option<Visit<'a>>);

impl Landing<'_> {
    /// It has ended.
    fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if let Some(visit) = self.0.take() {
            visit.driver.lock().epochs.leak(visit.epoch);
            std::mem::forget(visit);
        }
    }
}

/// Slices that stay in memory while something is tried.
struct Pins<'a> {
    driver: &'a Qcow2,
    starts: Vec<u64>,
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        if !self.starts.is_empty() {
            let mut state = self.driver.lock();
            self.starts.iter().for_each(|start| state.slices.unpin(*start));
        }
    }
}

impl Qcow2 {
    /// The image's header, as it is now.
    #[must_use]
    pub fn header(&self) -> Header {
        self.lock().header.clone()
    }

    /// How it is laid out.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Says whether the image names a backing file and was opened without one. What it does not hold reads as zero
    /// now, and as something else later.
    #[must_use]
    pub fn lacks_backing(&self) -> bool {
        self.below().is_missing
    }

    /// What is below it.
    #[must_use]
    pub fn backing(&self) -> Option<Arc<Node>> {
        self.below().node.clone()
    }

    /// Puts another node below it, or none. What the image does not hold reads as that shows it from now on. The
    /// header stays as it is. The caller holds the gate, and nothing is in flight: a request that has planned with
    /// the old one must not end with the new one.
    pub(crate) fn set_backing(&self, node: Option<Arc<Node>>) {
        let is_missing = node.is_none() && self.lock().header.backing_file.is_some();
        *self.backing.write().unwrap_or_else(PoisonError::into_inner) = Backing { node, is_missing };
    }

    fn below(&self) -> RwLockReadGuard<'_, Backing> {
        self.backing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the highest write to its file ended since it was opened.
    #[must_use]
    pub fn file_written_end(&self) -> u64 {
        self.file.written_end()
    }

    /// The same of its data file, where it has one.
    #[must_use]
    pub fn data_file_written_end(&self) -> Option<u64> {
        self.data_file.as_ref().map(ImageFile::written_end)
    }

    /// What was found wrong since it was opened, if anything was.
    #[must_use]
    pub fn corruption(&self) -> Option<Corruption> {
        self.lock().corrupt.clone()
    }

    /// Lets `herald` hear, once, of the first corruption that a request meets. Must not block. Only the first who asks
    /// hears of it.
    pub fn on_corruption(&self, herald: impl Fn(&Corruption) + Send + Sync + 'static) {
        let _ = self.herald.set(Box::new(herald));
    }

    pub(crate) fn traits(&self) -> Traits {
        let file = self.data().storage().traits();
        let entries_say_zero = self.layout.version >= 3 && !self.is_data_file_raw;
        Traits {
            read_only: self.read_only,
            can_discard: true,
            can_zero_fast: entries_say_zero || file.can_zero_fast,
            can_resize: false,
            preferred_size: u32::try_from(self.layout.cluster_size()).unwrap_or(file.preferred_size),
            ..file
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn set_known_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(crate) fn allocated_size(&self) -> Option<u64> {
        let data = match &self.data_file {
            Some(file) => file.storage().allocated_size()?,
            None => 0,
        };
        Some(self.file.storage().allocated_size()? + data)
    }

    /// Makes everything durable and cuts off what the file was made longer ahead of need. Nobody may use the image
    /// any more.
    ///
    /// # Errors
    /// The first of the flush and the cut.
    pub async fn close(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.lock().corrupt.is_some() {
            return self.flush().await;
        }
        let stored = self.store_bitmaps().await;
        // Whatever came of that: guests' data is worth more than bitmaps. What is unmapped is given back once that is
        // durable, and that has to be written, too.
        self.flush().await?;
        stored?;
        if self.lock().is_changed() {
            self.flush().await?;
        }
        // Where the end cannot be found, the file stays a little longer.
        let _ = self.attempt(State::find_end).await;
        let end = self.lock().used_end << self.layout.cluster_bits;
        self.file.cut_to(end).await?;
        match &self.data_file {
            // Alone it is a raw image as long as the disk; what it was found with is not ours to cut.
            Some(data) => data.cut_to(self.size().max(data.size_found())).await,
            None => Ok(()),
        }
    }

    /// What holds the image.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        self.file.storage()
    }

    /// Everything that holds parts of it.
    pub(crate) fn storages(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        std::iter::once(&self.file).chain(&self.data_file).map(ImageFile::storage)
    }

    /// Says to what is below that something happens, and waits where the request is held up there.
    async fn raise(&self, event: DebugEvent) {
        pass(&**self.storage(), event).await;
    }

    /// [`Qcow2::raise`] for what happened under the lock.
    async fn raise_what_happened(&self) {
        let raised = std::mem::take(&mut self.lock().raised);
        for event in raised {
            self.raise(event).await;
        }
    }

    /// The file of the guest's data.
    fn data(&self) -> &ImageFile {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    fn backing_size(&self) -> u64 {
        self.below().node.as_ref().map_or(0, |backing| backing.size())
    }

    /// Where what is below ends, for whoever wants to know whether it would show through a hole. Ends nowhere where it
    /// is missing and its size not known.
    fn below_end(&self) -> u64 {
        if self.lacks_backing() { u64::MAX } else { self.backing_size() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries something under the lock until nothing stands in its way.
    async fn attempt<T>(&self, mut what: impl FnMut(&mut State) -> Attempt<T>) -> io::Result<T> {
        let mut pins = Pins { driver: self, starts: Vec::new() };
        loop {
            let (tried, has_raised) = {
                let mut state = self.lock();
                (what(&mut state), !state.raised.is_empty())
            };
            if has_raised {
                Box::pin(self.raise_what_happened()).await;
            }
            match tried {
                Ok(done) => return Ok(done),
                Err(Obstacle::Load(start, kind)) => {
                    self.load(start, kind).await?;
                    self.lock().slices.pin(start);
                    pins.starts.push(start);
                }
                Err(obstacle) => self.overcome(obstacle).await?,
            }
        }
    }

    /// Does what has to happen before something can be tried again.
    ///
    /// # Errors
    /// When it cannot be done at all.
    async fn overcome(&self, obstacle: Obstacle) -> io::Result<()> {
        match obstacle {
            Obstacle::Load(start, kind) => self.load(start, kind).await,
            Obstacle::Wait(listener) => {
                listener.await;
                Ok(())
            }
            Obstacle::NeedsTable(index) => self.make_table(index).await,
            Obstacle::NeedsLength(end) => {
                self.file.grow_to(end).await?;
                let size = self.file.size();
                self.lock().file_end = size;
                Ok(())
            }
            Obstacle::Fail(error) => {
                let found = error.get_ref().and_then(|inner| inner.downcast_ref::<Corruption>()).cloned();
                if let Some(corruption) = found {
                    self.mark_corrupt(corruption).await;
                }
                Err(error)
            }
        }
    }

    async fn load(&self, start: u64, kind: Kind) -> io::Result<()> {
        let slice = {
            let size = self.lock().slices.slice_size();
            ByteRange::from_bounds(start, start.saturating_add(size))
        };
        // Who waits for another's load and is not wanted any more has left nothing behind.
        let Some(_held) = while_wanted(self.loading.lock(slice)).await else {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "nobody needs it any more"));
        };
        if self.lock().slices.contains(start) {
            return Ok(());
        }
        self.raise(match kind {
            Kind::L2 => DebugEvent::L2Load,
            Kind::Refcounts => DebugEvent::RefblockLoad,
        })
        .await;
        // Whoever wants to change it waits for this, too: so it cannot be older than what others have.
        let bytes = self.file.read(slice).await?;
        self.lock().slices.insert(start, kind, bytes.to_vec());
        Ok(())
    }

    /// Gives the L1 entry of that number an L2 table of its own: an empty one, or a copy of one that a snapshot
    /// uses too.
    async fn make_table(&self, index: u64) -> io::Result<()> {
        let _held = self.linking.lock(ByteRange::from_bounds(index, index + 1)).await;
        let layout = self.layout;
        let guest = index * layout.l2_coverage();
        let old = self.lock().l1_entry(guest);
        let shared = old.table(layout)?;
        if shared.is_some() && old.is_copied() {
            return Ok(());
        }
        let run = Box::pin(self.attempt(|state| state.allocate(1))).await?;
        let host = self.lock().clusters(run.first, 1);
        let content = async {
            self.raise(DebugEvent::L2AllocWrite).await;
            self.file.grow_to(host.end()).await?;
            match shared {
                Some(table) => {
                    let from = ByteRange::from_bounds(table, table + layout.cluster_size());
                    self.raise(DebugEvent::L2AllocCowRead).await;
                    self.file.read(from).await.map(Some)
                }
                None if run.fresh => Ok(None),
                None => Ok(Some(Buffer::zeroed(usize_from(host.len())))),
            }
        };
        let content = match content.await {
            Ok(content) => content,
            Err(error) => {
                let _ = Box::pin(self.attempt(|state| state.drop_reference(run.first))).await;
                return Err(error);
            }
        };
        let mut state = self.lock();
        match content {
            // The next commit writes it, and writes it again if it fails: a table that is written here and lost by
            // a flush that fails would be linked all the same.
            Some(content) => state.put_table(host.offset(), &content),
            // It is in the file as it is. What is known need not be read: its first users are waiting.
            None => state.slices.insert_zeroes(host, Kind::L2),
        }
        state.link_table(index, host.offset());
        if let Some(table) = shared {
            state.tables.remove(&layout.cluster_index(table));
            state.drop_later([layout.cluster_index(table)], false);
        }
        Ok(())
    }

    /// Sees to it that nothing is written any more, and says so in the image.
    async fn mark_corrupt(&self, corruption: Corruption) {
        if let Some(herald) = self.herald.get()
            && !self.is_told.swap(true, Ordering::AcqRel)
        {
            herald(&corruption);
        }
        let word = {
            let mut state = self.lock();
            let is_new = state.header.incompatible & incompatible::CORRUPT == 0;
            state.corrupt.get_or_insert(corruption);
            if self.read_only || self.layout.version < 3 || !is_new {
                return;
            }
            state.header.incompatible |= incompatible::CORRUPT;
            state.header.incompatible.to_be_bytes()
        };
        // Whoever found it gets an error in any case.
        let _ = self.file.write(open::INCOMPATIBLE_WORD, Bytes::copy_from_slice(&word)).await;
        let _ = self.file.flush().await;
    }
}

#[cfg(all(test, not(loom)))]
mod crash_tests;
#[cfg(all(test, not(loom)))]
mod fault_tests;
#[cfg(test)]
pub(in crate::driver) mod test_memory;
