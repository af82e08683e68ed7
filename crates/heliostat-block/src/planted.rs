//! Bugs that the simulator's tests plant, to see that it finds them. Never in the program: without the feature
//! `planted-bugs` nothing can be planted, and every question here is a constant.
//!
//! Each stands for a rule that is broken, at the one place that keeps it: of MIRROR.md section 4, or of the order in
//! which the qcow2 driver does things.

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A plain write is marked before it has ended, not after.
    MarkBeforeWrite,
    /// A copy's bits are cleared when it has ended, not before it reads.
    ClearAfterRead,
    /// The gate counts as quiet while requests are in flight behind it.
    PivotWithoutDrain,
    /// Overlapping doubled writes do not take turns.
    DoubledWithoutTurns,
    /// A copy takes no notice of doubled writes.
    CopyBesideDoubled,
    /// A target write past its deadline is forgotten.
    LateWriteForgotten,
    /// A failed flush of the target is tried again, and nothing is dirty for it.
    FlushTriedAgain,
    /// A copy believes what the first pass was told of holes.
    OldHoleBelieved,
    /// A write that failed is not marked.
    FailedWriteNotMarked,
    /// A doubled write whose target half failed is not marked.
    FailedHalfNotMarked,
    /// A doubled write does not become a plain one when it overlaps a copy.
    DoubledBesideCopy,
    /// A flush that fails takes no notice of copies on their way.
    FlushForgetsCopies,
    /// Nobody heeds that the target may have lost what was not flushed.
    LossNotHeeded,
    /// A named bitmap is cleared a while after the gate has opened again, not behind it.
    BitmapClearedLate,
    /// A named bitmap is cleared although the copy was not completed.
    BitmapClearedOnFailure,
    /// A named bitmap that is kept up to date at every end forgets what had not been copied.
    BitmapForgetsRest,
    /// A source that the target will stand on is not flushed with it.
    StandsOnUnflushed,
    /// A named bitmap that was handed over for a pivot is not given back when that is refused.
    BitmapNotTakenBack,
    /// The gate stays closed when a pivot was refused.
    GateLeftClosed,
    /// Each mirror of a group closes its gate for itself, and ends when it can.
    GroupEndsOneByOne,
    /// One of a group that fails does not take the others with it.
    GroupFailsAlone,
    /// qcow2: a mapping is visible before its data is there.
    MappingBeforeData,
    /// qcow2: L2 tables are written without waiting for reference counts and data to be durable.
    TablesBeforeCounts,
    /// qcow2: L1 entries are written without waiting for their tables to be durable.
    LinksBeforeTables,
    /// qcow2: a freed cluster is used anew before it is durable that it is free.
    FreedBeforeCommit,
    /// qcow2: a freed cluster is used anew while requests that saw it in use are in flight.
    FreedBesideRead,
    /// qcow2: allocations in flight are not looked at.
    AllocationsForgotten,
    /// qcow2: what is copied around a write covers data that others write in place meanwhile.
    CopyOverData,
    /// qcow2: FUA makes the data durable and not its mapping.
    FuaWithoutMapping,
    /// qcow2: tables that could not be written are not written again.
    FailedCommitForgotten,
    /// qcow2: a cluster that a snapshot uses too is written in place.
    SharedInPlace,
    /// qcow2: the header names a longer disk before what it gains reads as zero.
    SizeBeforeZeroes,
    /// qcow2: an image is no longer called dirty before its repaired counts are durable.
    CleanBeforeCounts,
    /// qcow2: bitmaps of an image that is being written do not say that they are in use.
    BitmapsBelieved,
    /// qcow2: mappings are written without waiting for the external data file to be durable.
    MappingBeforeDataFile,
}

#[cfg(feature = "planted-bugs")]
mod state {
    use std::cell::{Cell, RefCell};

    use super::Bug;
    use crate::storage::Extent;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
        static OLD_HOLES: RefCell<Vec<Extent>> = const { RefCell::new(Vec::new()) };
    }

    /// Breaks one rule for everything that runs on this thread from now on, or none.
    ///
    /// What a run has left behind is forgotten, so call it before each.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
        OLD_HOLES.take();
    }

    pub(crate) fn is_planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }

    pub(crate) fn remember_holes(extents: &[Extent]) {
        let holes = extents.iter().filter(|extent| !extent.status.may_hold_data());
        if is_planted(Bug::OldHoleBelieved) {
            OLD_HOLES.with_borrow_mut(|old| old.extend(holes));
        }
    }

    pub(crate) fn old_hole(extent: Extent) -> Option<Extent> {
        if !is_planted(Bug::OldHoleBelieved) {
            return None;
        }
        OLD_HOLES.with_borrow(|old| {
            let at = extent.range.offset();
            let hole = old.iter().find(|hole| hole.range.offset() <= at && at < hole.range.end())?;
            Some(Extent { range: hole.range.intersection(extent.range)?, ..*hole })
        })
    }
}

#[cfg(feature = "planted-bugs")]
pub use state::plant;
#[cfg(feature = "planted-bugs")]
pub(crate) use state::{is_planted, old_hole, remember_holes};

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is_planted(_: Bug) -> bool {
    false
}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn remember_holes(_: &[crate::storage::Extent]) {}

#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn old_hole(_: crate::storage::Extent) -> Option<crate::storage::Extent> {
    None
}
