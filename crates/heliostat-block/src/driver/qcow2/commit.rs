//! Bringing changed tables to the file, in the order that a crash at any moment needs.
//!
//! | step | what is written | because |
//! |---|---|---|
//! | 1 | refcount blocks, then, after a flush, refcount table entries of new ones | a table entry must not point to what is not there |
//! | 2 | a flush | guest data and reference counts are durable before a mapping names them |
//! | 3 | L2 tables, a flush | a table's entries are durable before the table is linked |
//! | 4 | L1 entries, a flush | |
//! | 5 | nothing: references to what is unmapped now end, in memory, to be written in step 1 of the next commit | what the medium still names must not be given to anybody |
//!
//! So a crash leaves at most clusters that are counted and not used. One commit runs at a time; who asks for a flush
//! meanwhile shares the next.

use std::error::Error;
use std::fmt;
use std::io;
use std::mem;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream;

use super::Qcow2;
use super::allocate::Allocation;
use super::file::ImageFile;
use super::slices::Kind;
use super::state::{Limbo, State, numbers_len, write_numbers};
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// Writes of tables that are under way at once.
const WRITES_AT_ONCE: usize = 16;

/// Where the header says where the refcount table is, and how long.
const REFCOUNT_TABLE_WORDS: u64 = 48;

/// Neighbouring slices are written together, up to this length.
const WRITE_LEN_MAX: usize = 1 << 20;

/// How often a commit is carried out in which a storage says that it may have lost something.
const ATTEMPTS: usize = 8;

/// A flush has succeeded, and what it was to make durable may be gone all the same: see [`Storage::losses`].
///
/// [`Storage::losses`]: crate::storage::Storage::losses
#[derive(Debug)]
struct Lost;

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what was written may have been lost before it was flushed")
    }
}

impl Error for Lost {}

/// What one commit writes, as it was when the commit began.
struct Batch {
    number: u64,
    refcounts: Vec<(u64, Bytes)>,
    /// Changed entries of the refcount table, or all of it in another place.
    refcount_table: Vec<(u64, Bytes)>,
    /// The header's new words about the refcount table.
    moved: Option<Bytes>,
    l2: Vec<(u64, Bytes)>,
    l1: Vec<(u64, Bytes)>,
    limbo: Vec<Limbo>,
    /// Whoever entered later sees nothing of what is in `limbo`.
    epoch: u64,
    l1_dirty: Vec<u64>,
    table_dirty: Vec<u64>,
}

/// Which commits there were.
#[derive(Default)]
pub(crate) struct Commits {
    /// The number of the last that began.
    begun: u64,
    /// The last that ended well.
    durable: u64,
    /// Whether one is under way.
    pub(crate) is_running: bool,
    /// What is on the medium can no longer be told: tables were being written when a commit was dropped, and may
    /// still land over newer ones; or a flush has lost what was copied. So nothing more is committed, and what was
    /// flushed stays.
    is_adrift: bool,
    /// Since the last commit began, or since one before that has failed, older data was copied to new clusters.
    copies: [bool; 2],
    /// Flushes of a file that have failed.
    failed_flushes: u64,
    /// What the storages' count of losses was when it was last looked at.
    losses: u64,
    /// What is unmapped for good, and may still be read by requests of that epoch or before.
    passing: Vec<(u64, Limbo)>,
}

impl State {
    fn take_batch(&mut self) -> Batch {
        self.commits.begun += 1;
        self.commits.is_running = true;
        self.commits.copies = [false, self.commits.copies[0] || self.commits.copies[1]];
        let entry = |at: u64, number: u64| (at, Bytes::copy_from_slice(&number.to_be_bytes()));
        let table = self.header.refcount_table;
        let table_dirty: Vec<_> = mem::take(&mut self.refcount_table_dirty).into_iter().collect();
        let l1_dirty: Vec<_> = mem::take(&mut self.l1_dirty).into_iter().collect();
        let is_moved = mem::take(&mut self.refcount_table_moved);
        let refcount_table = if is_moved {
            vec![(table.offset, Bytes::from(write_numbers(self.refcount_table.iter().copied())))]
        } else {
            table_dirty
                .iter()
                .map(|index| entry(table.offset + index * 8, self.refcount_table[usize_from(*index)]))
                .collect()
        };
        let moved = is_moved
            .then(|| Bytes::from([&table.offset.to_be_bytes()[..], &table.len.to_be_bytes()[..]].concat()));
        debug_assert!(
            !is_moved || numbers_len(self.refcount_table.len()) <= self.header.refcount_table_range().len()
        );
        let l1_at = self.header.l1.offset;
        let l1 =
            l1_dirty.iter().map(|index| entry(l1_at + index * 8, self.l1[usize_from(*index)].0)).collect();
        Batch {
            number: self.commits.begun,
            refcounts: self.slices.take_dirty(Kind::Refcounts),
            refcount_table,
            moved,
            l2: self.slices.take_dirty(Kind::L2),
            l1,
            limbo: mem::take(&mut self.limbo),
            epoch: self.epochs.turn(),
            l1_dirty,
            table_dirty,
        }
    }

    /// Looks whether the storages have lost something since the last time: `losses` is their count. What was durable is
    /// believed. Older data that was copied since must not be given up for what may not be there.
    fn look_at_losses(&mut self, losses: u64) -> bool {
        let is_lost = mem::replace(&mut self.commits.losses, losses) != losses;
        self.commits.is_adrift |= is_lost && self.commits.copies != [false, false];
        is_lost
    }

    /// A copy of older data is about to begin. A loss that came before, when there was none, does not concern it.
    pub(super) fn forget_old_losses(&mut self, losses: u64) {
        if !self.commits.is_running && self.commits.copies == [false, false] {
            self.commits.losses = losses;
        }
    }

    /// Data for new clusters is being written, or has been. With it, perhaps, older data: what shares their units of
    /// allocation, or, where the file has blocks, their blocks.
    pub(super) fn note_copy(&mut self, allocation: &Allocation) {
        self.commits.copies[0] |= self.has_blocks || allocation.writes_around();
    }

    /// Takes note of how a commit ended.
    fn end_batch(&mut self, batch: Batch, is_durable: bool) {
        self.commits.is_running = false;
        let starts = batch.refcounts.iter().chain(&batch.l2).map(|(start, _)| *start);
        if is_durable || is_planted(Bug::FailedCommitForgotten) {
            self.slices.durable(starts);
            self.commits.durable = batch.number;
            self.commits.copies[1] = false;
            let epoch = batch.epoch;
            self.commits.passing.extend(batch.limbo.into_iter().map(|limbo| (epoch, limbo)));
        } else {
            self.slices.failed(starts);
            self.l1_dirty.extend(batch.l1_dirty);
            self.refcount_table_dirty.extend(batch.table_dirty);
            self.refcount_table_moved |= batch.moved.is_some();
            self.limbo.extend(batch.limbo);
        }
    }

    /// Takes what nobody uses any more, neither on the medium nor in memory.
    fn take_passed(&mut self) -> Vec<Limbo> {
        let all = mem::take(&mut self.commits.passing);
        let (passed, passing): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|(epoch, _)| self.epochs.has_passed(*epoch) || is_planted(Bug::FreedBesideRead));
        self.commits.passing = passing;
        passed.into_iter().map(|(_, limbo)| limbo).collect()
    }
}

/// Tables that are being written. Dropped before [`Tables::end`], they are adrift.
pub(super) struct Tables<'a>(Option<&'a Qcow2>);

impl<'a> Tables<'a> {
    pub(super) const fn of(driver: &'a Qcow2) -> Self {
        Self(Some(driver))
    }

    /// They are written, or have not been and will be.
    pub(super) fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Tables<'_> {
    fn drop(&mut self) {
        if let Some(driver) = self.0 {
            driver.lock().commits.is_adrift = true;
        }
    }
}

/// A commit under way. Dropped before its end, it has failed: what it was to write is written again.
struct Running<'a> {
    driver: &'a Qcow2,
    batch: Option<Batch>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Some(batch) = self.batch.take() {
            self.driver.lock().end_batch(batch, false);
        }
    }
}

impl Qcow2 {
    /// Makes everything durable that has ended before this call.
    ///
    /// # Errors
    /// The storage's; what could not be written is written again by the next. Any, for ever, once what the medium
    /// holds is not known any more.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        let begun = self.lock().commits.begun;
        for _ in 1..ATTEMPTS {
            match self.commit(begun).await {
                // The tables are changed still: they are written again.
                Err(error) if error.get_ref().is_some_and(|error| error.is::<Lost>()) => {}
                ended => return ended,
            }
        }
        self.commit(begun).await
    }

    /// Makes everything durable, unless a commit has done so that is later than `begun`.
    async fn commit(&self, begun: u64) -> io::Result<()> {
        let _turn = self.turn.lock(ByteRange::from_bounds(0, 1)).await;
        {
            let mut state = self.lock();
            // One that began after this call, and ended well, has done it.
            if state.commits.durable > begun {
                return Ok(());
            }
            state.look_at_losses(self.losses());
            if state.commits.is_adrift {
                return Err(io::Error::other(
                    "what the medium holds of the image is not known any more: it has to be opened again",
                ));
            }
        }
        let batch = self.lock().take_batch();
        let mut running = Running { driver: self, batch: Some(batch) };
        if let Some(batch) = &running.batch {
            self.write_batch(batch).await?;
        }
        if let Some(batch) = running.batch.take() {
            self.lock().end_batch(batch, true);
        }
        self.release_passed().await;
        Ok(())
    }

    /// How often any of its storages may have lost something; see [`crate::storage::Storage::losses`].
    pub(crate) fn losses(&self) -> u64 {
        self.storages().map(|storage| storage.losses()).sum()
    }

    /// What [`Qcow2::flush_after`] wants to know of the time before something is written.
    pub(crate) fn failed_flushes(&self) -> u64 {
        self.losses() + self.lock().commits.failed_flushes
    }

    /// [`Qcow2::flush`] for what was written since `failed` was the count of failed flushes.
    ///
    /// # Errors
    /// As [`Qcow2::flush`]. And if a flush that somebody else asked for has failed since, or a storage has lost
    /// something: what was written may be gone, and this one would not know.
    pub(crate) async fn flush_after(&self, failed: u64) -> io::Result<()> {
        self.flush().await?;
        if self.failed_flushes() == failed {
            return Ok(());
        }
        Err(io::Error::other("what was written has perhaps been lost since, before it was flushed"))
    }

    /// Writes tables where so much is changed that there would soon be no room for more.
    pub(crate) async fn make_room(&self) -> io::Result<()> {
        if self.lock().slices.wants_commit() { self.flush().await } else { Ok(()) }
    }

    async fn write_batch(&self, batch: &Batch) -> io::Result<()> {
        self.write_all(&batch.refcounts, DebugEvent::RefblockUpdatePart).await?;
        if !batch.refcount_table.is_empty() {
            self.flush_file(&self.file).await?;
            let table = match batch.moved {
                Some(_) => DebugEvent::RefblockAllocWriteTable,
                None => DebugEvent::RefblockAllocHookup,
            };
            self.write_all(&batch.refcount_table, table).await?;
            if let Some(words) = &batch.moved {
                self.flush_file(&self.file).await?;
                let switch = DebugEvent::RefblockAllocSwitchTable;
                self.write_all(&[(REFCOUNT_TABLE_WORDS, words.clone())], switch).await?;
            }
        }
        let data_is_last = is_planted(Bug::MappingBeforeDataFile);
        if let Some(data) = self.data_file.as_ref().filter(|_| !data_is_last) {
            self.flush_file(data).await?;
        }
        let is_last = batch.l2.is_empty() && batch.l1.is_empty();
        if !is_planted(Bug::TablesBeforeCounts) {
            self.flush_image(is_last).await?;
        }
        if !batch.l2.is_empty() {
            self.write_all(&batch.l2, DebugEvent::L2Update).await?;
            if !is_planted(Bug::LinksBeforeTables) {
                self.flush_image(batch.l1.is_empty()).await?;
            }
        }
        if !batch.l1.is_empty() {
            self.write_all(&batch.l1, DebugEvent::L1Update).await?;
            self.flush_image(true).await?;
        }
        if let Some(data) = self.data_file.as_ref().filter(|_| data_is_last) {
            self.flush_file(data).await?;
        }
        Ok(())
    }

    /// Makes the image file durable; says so before the last time.
    async fn flush_image(&self, is_last: bool) -> io::Result<()> {
        if is_last {
            self.raise(DebugEvent::FlushToDisk).await;
        }
        self.flush_file(&self.file).await
    }

    /// Makes one file durable. Where that fails, what was written to it since the last time may be gone, and later
    /// flushes do not tell. Who wrote it has been told; but older data that was copied with it must not be given up
    /// for what may not be there. So it is where a storage has lost something, though its flush succeeds.
    async fn flush_file(&self, file: &ImageFile) -> io::Result<()> {
        let flushed = file.flush().await;
        let mut state = self.lock();
        let is_lost = state.look_at_losses(self.losses());
        if flushed.is_err() {
            state.commits.failed_flushes += 1;
            state.commits.is_adrift |= state.commits.copies != [false, false];
        }
        flushed?;
        if is_lost { Err(io::Error::other(Lost)) } else { Ok(()) }
    }

    /// Writes pieces of the image file, neighbours together, several at once.
    async fn write_all(&self, pieces: &[(u64, Bytes)], event: DebugEvent) -> io::Result<()> {
        if !pieces.is_empty() {
            self.raise(event).await;
        }
        let tables = Tables::of(self);
        let mut writes = stream::iter(joined(pieces).into_iter().map(|(at, data)| self.file.write(at, data)))
            .buffer_unordered(WRITES_AT_ONCE);
        let mut failed = Ok(());
        while let Some(written) = writes.next().await {
            failed = failed.and(written);
        }
        tables.end();
        failed
    }

    /// Ends references to what is unmapped for good, and gives its space back.
    async fn release_passed(&self) {
        let passed = self.lock().take_passed();
        for Limbo { clusters, discard } in passed {
            for cluster in clusters {
                // An error leaves a cluster that is counted and not used: a check gives it back.
                let Ok(count) = self.attempt(|state| state.refcount(cluster)).await else { continue };
                if discard && count == 1 {
                    // Before it can be anybody else's.
                    let range = self.lock().clusters(cluster, 1);
                    self.file.discard(range).await;
                }
                self.raise(DebugEvent::ClusterFree).await;
                let _ = self.attempt(|state| state.drop_reference(cluster)).await;
            }
        }
    }
}

/// Joins pieces that follow each other.
fn joined(pieces: &[(u64, Bytes)]) -> Vec<(u64, Bytes)> {
    let mut joined = Vec::new();
    let mut run: Option<(u64, BytesMut)> = None;
    for (at, data) in pieces {
        if let Some((start, bytes)) = &mut run
            && *start + u64_from(bytes.len()) == *at
            && bytes.len() + data.len() <= WRITE_LEN_MAX
        {
            bytes.extend_from_slice(data);
            continue;
        }
        joined.extend(run.replace((*at, BytesMut::from(&data[..]))));
    }
    joined.extend(run);
    joined.into_iter().map(|(at, bytes)| (at, bytes.freeze())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_others_are_not() {
        let piece = |at, len: usize| (at, Bytes::from(vec![1; len]));
        let all = joined(&[piece(0, 10), piece(10, 5), piece(20, 5)]);
        assert_eq!(all, [piece(0, 15), piece(20, 5)]);
        let long = joined(&[piece(0, WRITE_LEN_MAX), piece(u64_from(WRITE_LEN_MAX), 1)]);
        assert_eq!(long.len(), 2);
    }
}
