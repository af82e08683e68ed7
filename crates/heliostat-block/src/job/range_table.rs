//! [`RangeTable`]: the one table in which copies (C), doubled writes (D) and target writes of unknown fate (U)
//! stand, so that what must not meet does not (MIRROR.md section 4).
//!
//! Pure: decides who may enter and who must wait; never waits itself. Its user holds a lock around each call
//! and clears dirty bits in the same step. Called by `doubling`.

use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// What stands in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(PartialOrd, Ord))]
pub(crate) enum Kind {
    /// C: a dirty range on its way from source to target.
    Copy,
    /// D: a write on its way to both sides, or waiting for its turn.
    Doubled,
    /// U: a target write that the guest no longer waits for, and which may still land.
    Unknown,
}

/// An entry's number; smaller came earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// What a doubled write that has a ticket may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Write both sides.
    Go,
    /// An earlier doubled write overlaps: wait until something leaves.
    Wait,
    /// What it waited for has become unknown: leave, and be a plain write. Nobody waits for a lost target.
    BePlain,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, PartialOrd, Ord))]
struct Entry {
    ticket: Ticket,
    range: ByteRange,
    kind: Kind,
    /// Halves of a doubled write, or the copy, that have not ended.
    parts_left: u8,
}

/// Ranges that are on their way. Short: as long as copies and guests' requests are in flight.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, PartialOrd, Ord))]
pub(crate) struct RangeTable {
    /// In order of arrival.
    entries: Vec<Entry>,
    next: u64,
}

impl RangeTable {
    /// The longest part at the start of `range` that a copy may take: it overlaps nothing. `None` when its
    /// first byte is taken; then `Err` of where to look on.
    pub(crate) fn free_part(&self, range: ByteRange) -> Result<ByteRange, u64> {
        let beside_doubled = is_planted(Bug::CopyBesideDoubled);
        let entries = self.entries.iter().filter(|entry| !beside_doubled || entry.kind == Kind::Copy);
        let overlapping = entries.map(|entry| entry.range).filter(|held| held.overlaps(range));
        let mut end = range.end();
        let mut resume = None;
        for held in overlapping {
            if held.offset() <= range.offset() {
                resume = resume.max(Some(held.end()));
            }
            end = end.min(held.offset());
        }
        match resume {
            Some(resume) => Err(resume),
            None => Ok(ByteRange::from_bounds(range.offset(), end)),
        }
    }

    /// Enters a copy of a range that is free.
    pub(crate) fn enter_copy(&mut self, range: ByteRange) -> Ticket {
        debug_assert!(self.free_part(range) == Ok(range), "a copy overlaps nothing");
        self.enter(range, Kind::Copy, 1)
    }

    /// Enters a doubled write, unless a copy overlaps, or the fate of any target write is unknown: then `None`,
    /// and it is a plain write. A target that does not answer must not be given more to hold, nor another guest
    /// to keep waiting. It has its turn when [`RangeTable::turn`] says so.
    pub(crate) fn enter_doubled(&mut self, range: ByteRange) -> Option<Ticket> {
        let beside_copy = is_planted(Bug::DoubledBesideCopy);
        let blocked = self.entries.iter().any(|e| match e.kind {
            Kind::Unknown => true,
            Kind::Copy => !beside_copy && e.range.overlaps(range),
            Kind::Doubled => false,
        });
        (!blocked).then(|| self.enter(range, Kind::Doubled, 2))
    }

    fn enter(&mut self, range: ByteRange, kind: Kind, parts_left: u8) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.entries.push(Entry { ticket, range, kind, parts_left });
        ticket
    }

    /// What a doubled write may do now. Asked until it is not [`Turn::Wait`]; never after.
    pub(crate) fn turn(&self, ticket: Ticket) -> Turn {
        let mine = self.entry(ticket).range;
        if is_planted(Bug::DoubledWithoutTurns) || is_planted(Bug::DoubledBesideCopy) {
            return Turn::Go;
        }
        let mut earlier = self.entries.iter().filter(|e| e.ticket < ticket && e.range.overlaps(mine));
        earlier
            .try_fold(Turn::Go, |_, held| match held.kind {
                Kind::Unknown => Err(Turn::BePlain),
                Kind::Doubled | Kind::Copy => Ok(Turn::Wait),
            })
            .unwrap_or_else(|plain| plain)
    }

    /// The guest no longer waits for the target's half: D becomes U. Says whether that half is still out.
    pub(crate) fn lose_sight(&mut self, ticket: Ticket) -> bool {
        let entry = self.entry_mut(ticket);
        entry.kind = Kind::Unknown;
        entry.parts_left -= 1;
        let still_out = entry.parts_left > 0;
        if !still_out {
            self.remove(ticket);
        }
        still_out
    }

    /// One part has ended; the entry goes with the last. Says whether it went.
    pub(crate) fn part_ended(&mut self, ticket: Ticket) -> bool {
        let entry = self.entry_mut(ticket);
        entry.parts_left -= 1;
        let gone = entry.parts_left == 0;
        if gone {
            self.remove(ticket);
        }
        gone
    }

    /// Takes an entry out, whatever its parts.
    pub(crate) fn remove(&mut self, ticket: Ticket) {
        self.entries.retain(|entry| entry.ticket != ticket);
    }

    /// Whether anything stands at `ticket`.
    pub(crate) fn contains(&self, ticket: Ticket) -> bool {
        self.entries.iter().any(|entry| entry.ticket == ticket)
    }

    /// What stands at `ticket`.
    pub(crate) fn kind(&self, ticket: Ticket) -> Kind {
        self.entry(ticket).kind
    }

    /// How many entries of `kind` there are.
    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.entries.iter().filter(|entry| entry.kind == kind).count()
    }

    /// Bytes that copies hold.
    pub(crate) fn copying_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.kind == Kind::Copy).map(|entry| entry.range.len()).sum()
    }

    fn entry(&self, ticket: Ticket) -> &Entry {
        self.entries.iter().find(|e| e.ticket == ticket).expect("who holds a ticket stands in the table")
    }

    fn entry_mut(&mut self, ticket: Ticket) -> &mut Entry {
        self.entries.iter_mut().find(|e| e.ticket == ticket).expect("who holds a ticket stands in the table")
    }
}

/// What the model of `model_tests` needs to look at a table, or to break its rules.
#[cfg(test)]
impl RangeTable {
    pub(crate) fn enter_regardless(&mut self, range: ByteRange) -> Ticket {
        self.enter(range, Kind::Doubled, 2)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    #[test]
    fn a_copy_takes_what_is_free() {
        let mut table = RangeTable::default();
        assert_eq!(table.free_part(range(0, 100)), Ok(range(0, 100)));
        table.enter_copy(range(40, 10));
        let doubled = table.enter_doubled(range(60, 10)).unwrap();
        assert_eq!(table.free_part(range(0, 100)), Ok(range(0, 40)));
        assert_eq!(table.free_part(range(45, 100)), Err(50));
        assert_eq!(table.free_part(range(50, 100)), Ok(range(50, 10)));
        assert!(table.lose_sight(doubled));
        assert_eq!(table.free_part(range(60, 5)), Err(70), "a write of unknown fate blocks copies too");
        assert_eq!(table.copying_bytes(), 10);
    }

    #[test]
    fn a_doubled_write_that_meets_a_copy_or_an_unknown_write_is_plain() {
        let mut table = RangeTable::default();
        let copy = table.enter_copy(range(0, 10));
        assert_eq!(table.enter_doubled(range(9, 2)), None);
        assert!(table.part_ended(copy));
        let doubled = table.enter_doubled(range(9, 2)).unwrap();
        assert!(table.lose_sight(doubled));
        assert_eq!(table.enter_doubled(range(10, 4)), None);
        assert_eq!(table.enter_doubled(range(100, 4)), None, "wherever it is");
    }

    #[test]
    fn overlapping_doubled_writes_take_turns_in_order() {
        let mut table = RangeTable::default();
        let first = table.enter_doubled(range(0, 10)).unwrap();
        let second = table.enter_doubled(range(5, 10)).unwrap();
        let third = table.enter_doubled(range(12, 10)).unwrap();
        let beside = table.enter_doubled(range(100, 1)).unwrap();
        assert_eq!(
            [first, second, third, beside].map(|t| table.turn(t)),
            [Turn::Go, Turn::Wait, Turn::Wait, Turn::Go]
        );
        assert!(!table.part_ended(first), "the other side is still on its way");
        assert_eq!(table.turn(second), Turn::Wait);
        assert!(table.part_ended(first));
        assert_eq!([second, third].map(|t| table.turn(t)), [Turn::Go, Turn::Wait]);
    }

    #[test]
    fn who_waits_for_a_write_that_becomes_unknown_goes_on_as_plain() {
        let mut table = RangeTable::default();
        let first = table.enter_doubled(range(0, 10)).unwrap();
        let second = table.enter_doubled(range(5, 10)).unwrap();
        assert!(table.lose_sight(first));
        assert_eq!(table.turn(second), Turn::BePlain);
    }

    #[test]
    fn losing_sight_of_a_half_that_has_ended_removes_it() {
        let mut table = RangeTable::default();
        let ticket = table.enter_doubled(range(0, 10)).unwrap();
        assert!(!table.part_ended(ticket));
        assert!(!table.lose_sight(ticket));
        assert_eq!(table.count(Kind::Unknown), 0);
    }
}
