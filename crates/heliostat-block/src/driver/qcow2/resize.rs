//! Making a disk longer or shorter, and giving it space ahead.
//!
//! The header's word for the size comes at one moment, and the disk is right on both sides of it. A disk that becomes
//! longer is made ready first: what it gains is overwritten or covered, and durable, before the header names it. One
//! that becomes shorter is unmapped afterwards: until the header says so, all of it is still there.

use std::io;

use bytes::Bytes;

use super::Qcow2;
use super::commit::Tables;
use super::entry::{L1Entry, Standard};
use super::error::FormatError;
use super::layout::Layout;
use super::refcount::Run;
use super::state::{Attempt, State, write_numbers};
use super::write::Part;
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;
use crate::storage::ZeroSpace;

/// QEMU's limit for an L1 table.
const L1_SIZE_MAX: u64 = 32 << 20;

/// Where the header says how long the disk is, and how long the L1 table and where.
const SIZE_WORD: u64 = 24;
const L1_WORDS: u64 = 36;

/// Zeroes that are written where space is to be filled.
const FILL_LEN: u64 = 1 << 20;

/// What is done about space that a disk does not use yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Clusters are taken, so that writes change no tables.
    Metadata,
    /// And the host keeps their space.
    Falloc,
    /// And they are filled with zeroes.
    Full,
}

impl State {
    /// Unmaps the clusters of `range` for good, so that what is below them would show; says how far.
    fn forget_clusters(&mut self, range: ByteRange) -> Attempt<u64> {
        let layout = self.layout;
        let guest = range.offset();
        self.check_sound()?;
        let Some(_) = self.l1_entry(guest).table(layout)? else {
            return Ok(((layout.l1_index(guest) + 1) * layout.l2_coverage()).min(range.end()));
        };
        self.check_free(ByteRange::from_bounds(guest, guest + layout.cluster_size()))?;
        let old = self.cluster(guest)?;
        self.check_table(guest)?;
        self.set_cluster(guest, Standard::default().encode(layout))?;
        self.drop_cluster(old, true);
        Ok(guest + layout.cluster_size())
    }

    /// Lets go of the L2 tables that map nothing before `size`.
    fn forget_tables(&mut self, size: u64) -> Attempt<()> {
        let layout = self.layout;
        for index in layout.l1_entries_for(size)..u64_from(self.l1.len()) {
            let entry = self.l1[usize_from(index)];
            if let Some(table) = entry.table(layout)? {
                let end = table + layout.cluster_size();
                for slice in (table..end).step_by(usize_from(self.slices.slice_size())) {
                    self.slices.forget(slice);
                }
                self.l1[usize_from(index)] = L1Entry::default();
                self.l1_dirty.insert(index);
                self.tables.remove(&layout.cluster_index(table));
                self.drop_later([layout.cluster_index(table)], true);
            }
        }
        Ok(())
    }

    /// Finds the end of what is in use.
    pub(crate) fn find_end(&mut self) -> Attempt<()> {
        while self.used_end > 1 && self.refcount(self.used_end - 1)? == 0 {
            self.used_end -= 1;
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Makes the disk `size` bytes long. Bytes that it gains read as zeroes; what lies beyond the new end is gone.
    /// Nobody may use the image meanwhile.
    ///
    /// # Errors
    /// [`FormatError`]; the disk is as it was then. But where the header could not be written, the medium may say
    /// either size: nothing more is committed before the image is opened again.
    pub(crate) async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), FormatError> {
        self.attempt(|state| state.check_sound()).await?;
        self.check_size(size)?;
        let bitmaps = self.bitmaps_for(size)?;
        let old = self.size();
        // Nothing may be half done when the header says something new.
        self.flush().await?;
        if is_planted(Bug::SizeBeforeZeroes) {
            self.write_header(SIZE_WORD, Bytes::copy_from_slice(&size.to_be_bytes())).await?;
        }
        let gained = ByteRange::from_bounds(old, size);
        if let Err(error) = self.prepare(gained, preallocation).await {
            // What was done for it does no harm and takes space; where that cannot be given back, it stays so.
            let _ = self.forget_from(old).await;
            return Err(error);
        }
        self.write_header(SIZE_WORD, Bytes::copy_from_slice(&size.to_be_bytes())).await?;
        self.lock().header.size = size;
        self.set_known_size(size);
        self.set_bitmaps(bitmaps);
        if size < old {
            // It is shorter, whatever comes of this. What stays mapped is cleared when it becomes longer again.
            let _ = self.forget_from(size).await;
            if let Some(data) = &self.data_file {
                let _ = data.cut_to(size).await;
            }
        }
        Ok(())
    }

    fn check_size(&self, size: u64) -> Result<(), FormatError> {
        let invalid = |text: &str| Err(FormatError::Invalid(text.to_owned()));
        if !size.is_multiple_of(512) {
            return invalid("The new size must be a multiple of 512");
        }
        if self.layout.l1_entries_for(size) * 8 > L1_SIZE_MAX {
            return invalid("Failed to grow the L1 table: File too large");
        }
        let has_snapshots = self.lock().header.snapshots.len > 0;
        if has_snapshots && (self.layout.version < 3 || size < self.size()) {
            return invalid("Can't resize an image which has snapshots");
        }
        if self.layout.version < 3 && self.lacks_backing() && size > self.size() {
            // It has no word for zero, and how much of what is below would show is not known.
            return invalid("An image of version 2 is made longer only together with its backing file");
        }
        Ok(())
    }

    /// Makes everything ready for a disk that reaches to the end of `gained`. Durable when it returns.
    async fn prepare(&self, gained: ByteRange, preallocation: Preallocation) -> Result<(), FormatError> {
        if gained.is_empty() {
            return Ok(());
        }
        self.grow_l1(self.layout.l1_entries_for(gained.end())).await?;
        self.clear_gained(gained).await?;
        let mut preallocation = preallocation;
        if let (Some(data), true) = (&self.data_file, self.is_data_file_raw) {
            // Alone it shows the same.
            data.write_zeroes(gained, ZeroSpace::MayUnmap).await?;
            if data.size() < gained.end() {
                data.set_size(gained.end()).await?;
            }
            if preallocation == Preallocation::Off {
                // As in a new image, all of it is mapped: for whoever looks at the tables only.
                preallocation = Preallocation::Metadata;
            }
        }
        self.preallocate(gained, preallocation).await?;
        Ok(self.flush().await?)
    }

    /// Makes `gained` read as zero: what stands behind the old end in its cluster is overwritten, what is below is
    /// covered, and what others may have mapped beyond the end is unmapped.
    async fn clear_gained(&self, gained: ByteRange) -> io::Result<()> {
        let layout = self.layout;
        let cluster_end = gained.offset().next_multiple_of(layout.cluster_size());
        let visible = cluster_end.max(self.below_end()).min(gained.end());
        let mut ranges = vec![ByteRange::from_bounds(gained.offset(), visible)];
        {
            let state = self.lock();
            let tables = (layout.l1_index(visible)..layout.l1_entries_for(gained.end()))
                .map(|index| index * layout.l2_coverage())
                .filter(|guest| state.l1_entry(*guest) != L1Entry::default());
            let mapped = tables.map(|guest| {
                let end = (guest + layout.l2_coverage()).min(gained.end());
                ByteRange::from_bounds(guest.max(visible), end)
            });
            ranges.extend(mapped);
        }
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            self.zero(range, ZeroSpace::MayUnmap).await?;
        }
        Ok(())
    }

    /// Unmaps all clusters that begin at `size` or behind it, beyond the disk's end.
    async fn forget_from(&self, size: u64) -> io::Result<()> {
        let mut at = size.next_multiple_of(self.layout.cluster_size());
        let end = u64_from(self.lock().l1.len()).saturating_mul(self.layout.l2_coverage());
        while at < end {
            let rest = ByteRange::from_bounds(at, end);
            at = self.attempt(|state| state.forget_clusters(rest)).await?;
            self.make_room().await?;
        }
        // Entries are gone from the medium before their tables are.
        self.flush().await?;
        self.attempt(|state| state.forget_tables(size)).await?;
        self.flush().await
    }

    /// Gives the L1 table room for so many entries, in another place if it has to be.
    async fn grow_l1(&self, entries: u64) -> Result<(), FormatError> {
        let old = self.lock().header.l1_range();
        if entries * 8 <= old.len() {
            return Ok(());
        }
        let layout = self.layout;
        self.raise(DebugEvent::L1GrowAllocTable).await;
        let run = self.attempt(|state| state.allocate_all(layout.clusters_for(entries * 8))).await?;
        let host = self.lock().clusters(run.first, run.count);
        // The table's room is a whole number of clusters, and so are its entries.
        let len = host.len() / 8;
        let table = {
            let state = self.lock();
            let old = state.l1.iter().map(|entry| entry.0);
            write_numbers(old.chain(std::iter::repeat(0)).take(usize_from(len)))
        };
        let failed = self.failed_flushes();
        let made = async {
            self.raise(DebugEvent::L1GrowWriteTable).await;
            self.file.write(host.offset(), Bytes::from(table)).await?;
            // The new table's reference counts and contents are durable before the header names it.
            self.flush_after(failed).await
        };
        if let Err(error) = made.await {
            self.give_back(run).await;
            return Err(error.into());
        }
        self.raise(DebugEvent::L1GrowActivateTable).await;
        let words = [&u32_be(len)[..], &host.offset().to_be_bytes()[..]].concat();
        self.write_header(L1_WORDS, Bytes::from(words)).await?;
        let mut state = self.lock();
        state.unprotect(old);
        state.header.l1.offset = host.offset();
        state.header.l1.len = u32::try_from(len).unwrap_or(u32::MAX);
        state.l1.resize(usize_from(len), L1Entry::default());
        state.protect(host, "active L1 table");
        let first = layout.cluster_index(old.offset());
        state.drop_later(first..first + layout.clusters_for(old.len()), false);
        Ok(())
    }

    /// Changes words of the header. Where that fails, or is dropped, which of them the medium holds is not known.
    pub(super) async fn write_header(&self, at: u64, words: Bytes) -> io::Result<()> {
        let written = Tables::of(self);
        let losses = self.losses();
        self.file.write(at, words).await?;
        self.file.flush().await?;
        if self.losses() != losses {
            return Err(io::Error::other("words of the header may have been lost before they were flushed"));
        }
        written.end();
        Ok(())
    }

    pub(super) async fn give_back(&self, run: Run) {
        for cluster in run.first..run.first + run.count {
            // What cannot be given back is counted and not used, until a check finds it.
            let _ = self.attempt(|state| state.drop_reference(cluster)).await;
        }
    }

    /// Gives `range` its clusters, but for the one in which it begins: that was there before.
    async fn preallocate(&self, range: ByteRange, how: Preallocation) -> io::Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        let start = range.offset().next_multiple_of(self.layout.cluster_size());
        let mut rest = ByteRange::from_bounds(start, range.end());
        while !rest.is_empty() {
            let part = match self.next_part(rest) {
                Ok(part) => part,
                Err(obstacle) => {
                    self.overcome(obstacle).await?;
                    continue;
                }
            };
            rest = ByteRange::from_bounds(part.range().end(), rest.end());
            if let Part::Allocate(in_flight) = part
                && in_flight.is_new()
            {
                let host = in_flight.host();
                let host = match self.data_file {
                    // It is as long as the disk.
                    Some(_) => ByteRange::from_bounds(host.offset(), host.end().min(range.end())),
                    None => host,
                };
                match how {
                    Preallocation::Off | Preallocation::Metadata => {
                        self.data().grow_to(host.end()).await?;
                        if !in_flight.is_fresh() {
                            self.data().write_zeroes(host, ZeroSpace::MayUnmap).await?;
                        }
                    }
                    Preallocation::Full => {
                        for piece in host.pieces(FILL_LEN) {
                            let zeroes = Buffer::zeroed(usize_from(piece.len())).freeze();
                            self.data().write(piece.offset(), zeroes).await?;
                        }
                    }
                    Preallocation::Falloc => self.data().write_zeroes(host, ZeroSpace::Keep).await?,
                }
                self.finish_part(&in_flight).await?;
            }
            self.make_room().await?;
        }
        Ok(())
    }
}

fn u32_be(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes()
}

impl Layout {
    /// The largest disk that an image of this layout can have.
    #[must_use]
    pub const fn size_max(self) -> u64 {
        (L1_SIZE_MAX / 8).saturating_mul(self.l2_coverage())
    }
}
