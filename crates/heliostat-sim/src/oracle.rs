//! [`Oracle`]: what a disk may hold, given what its guests asked for and were told.
//!
//! It knows no mirror and no storage. For each byte it keeps the writes whose data may be there: a write that
//! began after another had ended, and that ended well, takes its place; two that were in flight at once may
//! both be there, and so may one that failed. A discard may have done anything or nothing.
//!
//! The same is kept a second time for the disk as a crash would leave it, where a write takes another's place
//! only when it is surely durable.

mod resize;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use heliostat_block::buffer::is_zero;
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::range::ByteRange;

use crate::random::mix;

/// A write's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WriteId(usize);

/// What a write puts into its range.
#[derive(Clone, Debug)]
pub(crate) enum Put {
    /// Bytes that follow from the write's number and their place.
    Pattern,
    Zeroes,
    /// Zeroes or nothing.
    Discard,
    /// Zeroes that nobody has written: the disk has become longer.
    Gained,
    /// These bytes, from offset 0 on: how a disk was found.
    Image(Arc<Vec<u8>>),
}

struct Write {
    range: ByteRange,
    put: Put,
    begun: u64,
    /// `u64::MAX` while in flight.
    ended: u64,
    /// It was answered without an error.
    good: bool,
    /// A flush has failed since: no later one makes it durable.
    doubtful: bool,
}

/// Bytes that have the same history.
#[derive(Clone, Default)]
struct Segment {
    end: u64,
    visible: Vec<WriteId>,
    crash: Vec<WriteId>,
}

struct Reading {
    range: ByteRange,
    allowed: Vec<(ByteRange, Vec<WriteId>)>,
}

/// What one disk may hold.
pub(crate) struct Oracle {
    /// Counts beginnings and ends: the order in which a guest saw them.
    moment: u64,
    writes: Vec<Write>,
    /// By first byte; they cover the disk.
    segments: BTreeMap<u64, Segment>,
    readings: BTreeMap<u64, Reading>,
    size: u64,
    /// The sizes that a crash may leave.
    crash_sizes: BTreeSet<u64>,
    size_min: u64,
    failures_known: u64,
}

/// A read's number.
pub(crate) struct ReadId(u64);
/// A flush's number: the moment at which it began.
pub(crate) struct FlushId(u64);

impl Oracle {
    pub(crate) fn new(image: Vec<u8>) -> Self {
        let size = u64_from(image.len());
        let mut oracle = Self {
            moment: 0,
            writes: Vec::new(),
            segments: BTreeMap::new(),
            readings: BTreeMap::new(),
            size,
            crash_sizes: [size].into(),
            size_min: size,
            failures_known: 0,
        };
        oracle.settle(image);
        oracle
    }

    /// The disk is known to hold `image`, durably: whatever was possible before.
    pub(crate) fn settle(&mut self, image: Vec<u8>) {
        let range = ByteRange::from_bounds(0, self.size);
        let moment = self.tick();
        let put = Put::Image(Arc::new(image));
        self.writes.push(Write { range, put, begun: moment, ended: moment, good: true, doubtful: false });
        let id = WriteId(self.writes.len() - 1);
        self.segments.clear();
        self.segments.insert(0, Segment { end: self.size, visible: vec![id], crash: vec![id] });
    }

    fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// The moment that is now; see [`Oracle::written_since`].
    pub(crate) const fn now(&self) -> u64 {
        self.moment
    }

    // ------------------------------------------------------------------ writes

    pub(crate) fn begin_write(&mut self, range: ByteRange, put: Put) -> WriteId {
        let begun = self.tick();
        self.writes.push(Write { range, put, begun, ended: u64::MAX, good: false, doubtful: false });
        let id = WriteId(self.writes.len() - 1);
        self.each(range, |segment| {
            segment.visible.push(id);
            segment.crash.push(id);
        });
        for reading in self.readings.values_mut().filter(|reading| reading.range.overlaps(range)) {
            reading.allowed.push((range, vec![id]));
        }
        id
    }

    /// The bytes that a write with a pattern writes.
    pub(crate) fn data(&self, id: WriteId) -> Vec<u8> {
        let range = self.writes[id.0].range;
        match self.writes[id.0].put {
            Put::Pattern => {
                let words =
                    (range.offset() / 8..range.end().div_ceil(8)).flat_map(|word| pattern(id, word * 8));
                words.skip(usize_from(range.offset() % 8)).take(usize_from(range.len())).collect()
            }
            _ => (range.offset()..range.end()).map(|at| self.byte(id, at)).collect(),
        }
    }

    pub(crate) fn end_write(&mut self, id: WriteId, good: bool, durable: bool) {
        let ended = self.tick();
        let write = &mut self.writes[id.0];
        write.ended = ended;
        write.good = good;
        let range = write.range;
        if !good || matches!(write.put, Put::Discard) {
            return;
        }
        let writes = std::mem::take(&mut self.writes);
        self.each(range, |segment| {
            supersede(&writes, &mut segment.visible, id);
            if durable {
                supersede(&writes, &mut segment.crash, id);
            }
        });
        self.writes = writes;
    }

    /// So many flushes of the disk have failed until now: if these are more than it knew of, none after them
    /// makes durable what was written before.
    pub(crate) fn flushes_failed(&mut self, count: u64) {
        if count != self.failures_known {
            self.failures_known = count;
            self.writes.iter_mut().for_each(|write| write.doubtful = true);
        }
    }

    pub(crate) fn begin_flush(&mut self) -> FlushId {
        FlushId(self.tick())
    }

    pub(crate) fn end_flush(&mut self, id: &FlushId, good: bool) {
        self.tick();
        if !good {
            return;
        }
        let writes = std::mem::take(&mut self.writes);
        for segment in self.segments.values_mut() {
            for write in segment.crash.clone() {
                let of = &writes[write.0];
                if of.good && !of.doubtful && of.ended < id.0 && !matches!(of.put, Put::Discard) {
                    supersede(&writes, &mut segment.crash, write);
                }
            }
        }
        self.writes = writes;
    }

    /// Calls `change` with the segments of `range`, cut so that they lie inside.
    fn each(&mut self, range: ByteRange, mut change: impl FnMut(&mut Segment)) {
        if range.is_empty() {
            return;
        }
        self.cut(range.offset());
        self.cut(range.end());
        self.segments.range_mut(range.offset()..range.end()).for_each(|(_, segment)| change(segment));
    }

    fn cut(&mut self, at: u64) {
        let Some((_, segment)) = self.segments.range_mut(..at).next_back() else { return };
        if segment.end > at {
            let right = segment.clone();
            segment.end = at;
            self.segments.insert(at, right);
        }
    }

    fn byte(&self, id: WriteId, at: u64) -> u8 {
        match &self.writes[id.0].put {
            Put::Pattern => pattern(id, at)[usize_from(at % 8)],
            Put::Zeroes | Put::Discard | Put::Gained => 0,
            Put::Image(image) => image[usize_from(at)],
        }
    }

    /// Whether one write explains all of `bytes`: the usual case, and quicker to find out.
    fn is_all_of(&self, id: WriteId, range: ByteRange, bytes: &[u8]) -> bool {
        match &self.writes[id.0].put {
            Put::Pattern => {
                let mut word = pattern(id, range.offset());
                (range.offset()..range.end()).zip(bytes).all(|(at, byte)| {
                    if at % 8 == 0 {
                        word = pattern(id, at);
                    }
                    word[usize_from(at % 8)] == *byte
                })
            }
            Put::Zeroes | Put::Discard | Put::Gained => is_zero(bytes),
            Put::Image(image) => image[usize_from(range.offset())..usize_from(range.end())] == *bytes,
        }
    }

    // ------------------------------------------------------------------ reads

    pub(crate) fn begin_read(&mut self, range: ByteRange) -> ReadId {
        let id = self.tick();
        let allowed = self.possible(range, |segment| &segment.visible);
        self.readings.insert(id, Reading { range, allowed });
        ReadId(id)
    }

    fn possible(
        &self,
        range: ByteRange,
        of: impl Fn(&Segment) -> &Vec<WriteId>,
    ) -> Vec<(ByteRange, Vec<WriteId>)> {
        let first = self.segments.range(..=range.offset()).next_back().map_or(0, |(start, _)| *start);
        let inside = self.segments.range(first..range.end());
        inside
            .filter_map(|(start, segment)| {
                let part = ByteRange::from_bounds(*start, segment.end).intersection(range)?;
                Some((part, of(segment).clone()))
            })
            .collect()
    }

    /// A read has ended; `seen` are the bytes that it brought, or none where it failed.
    ///
    /// # Errors
    /// The first byte that nothing explains.
    pub(crate) fn end_read(&mut self, id: &ReadId, seen: Option<(ByteRange, &[u8])>) -> Result<(), String> {
        self.tick();
        let Some(reading) = self.readings.remove(&id.0) else { return Ok(()) };
        match seen {
            Some((range, bytes)) => self.explain(&reading.allowed, range, bytes),
            None => Ok(()),
        }
    }

    /// As [`Oracle::end_read`], for a client that was told that ranges read as zero.
    pub(crate) fn end_extents(&mut self, id: &ReadId, zeroes: &[ByteRange]) -> Result<(), String> {
        self.tick();
        let Some(reading) = self.readings.remove(&id.0) else { return Ok(()) };
        for range in zeroes {
            self.explain(&reading.allowed, *range, &vec![0; usize_from(range.len())])?;
        }
        Ok(())
    }

    fn explain(
        &self,
        allowed: &[(ByteRange, Vec<WriteId>)],
        range: ByteRange,
        bytes: &[u8],
    ) -> Result<(), String> {
        let mut explained = vec![false; bytes.len()];
        for (part, ids) in allowed {
            let Some(part) = part.intersection(range) else { continue };
            let inside = usize_from(part.offset() - range.offset())..usize_from(part.end() - range.offset());
            if ids.iter().any(|id| self.is_all_of(*id, part, &bytes[inside.clone()])) {
                explained[inside].fill(true);
                continue;
            }
            for at in part.offset()..part.end() {
                let index = usize_from(at - range.offset());
                explained[index] |= ids.iter().any(|id| self.byte(*id, at) == bytes[index]);
            }
        }
        let Some(wrong) = explained.iter().position(|good| !good) else { return Ok(()) };
        let count = explained.iter().filter(|good| !**good).count();
        let at = range.offset() + u64_from(wrong);
        Err(format!("byte {at:#x} is {:#04x}, {count} bytes of {range} are not admissible", bytes[wrong]))
    }

    // ------------------------------------------------------------------ images

    /// Checks a whole disk that nobody uses.
    ///
    /// # Errors
    /// The first byte that nothing explains.
    pub(crate) fn check_image(&self, image: &[u8]) -> Result<(), String> {
        self.check_size(u64_from(image.len()), false)?;
        let range = ByteRange::from_bounds(0, self.size);
        self.explain(&self.possible(range, |segment| &segment.visible), range, image)
    }

    /// Checks a whole disk as a crash has left it.
    ///
    /// # Errors
    /// The first byte that nothing explains: a write was lost that was promised to be durable.
    pub(crate) fn check_crash(&self, image: &[u8]) -> Result<(), String> {
        let range = ByteRange::from_bounds(0, self.size);
        self.explain(&self.possible(range, |segment| &segment.crash), range, image)
    }

    /// As [`Oracle::check_crash`], for an image whose clusters move: where something was written since a flush that
    /// made it durable, and a flush has failed since, there may be anything. Everywhere else nothing is forgiven.
    ///
    /// # Errors
    /// The first byte that nothing explains.
    pub(crate) fn check_crash_of_image(&self, image: &[u8]) -> Result<(), String> {
        self.check_size(u64_from(image.len()), true)?;
        for (start, segment) in &self.segments {
            let range = ByteRange::from_bounds(*start, segment.end.min(u64_from(image.len())));
            let is_doubtful =
                segment.crash.len() > 1 && segment.crash.iter().any(|write| self.writes[write.0].doubtful);
            if !is_doubtful && !range.is_empty() {
                let bytes = &image[usize_from(range.offset())..usize_from(range.end())];
                self.explain(&[(range, segment.crash.clone())], range, bytes)?;
            }
        }
        Ok(())
    }

    /// The ranges of all writes that have not ended.
    pub(crate) fn in_flight(&self) -> Vec<ByteRange> {
        self.writes.iter().filter(|write| write.ended == u64::MAX).map(|write| write.range).collect()
    }

    /// The ranges of all that had not ended at `moment` or came later, discards and what failed among it.
    pub(crate) fn touched_since(&self, moment: u64) -> Vec<ByteRange> {
        self.writes.iter().filter(|write| write.ended > moment).map(|write| write.range).collect()
    }

    /// The ranges of all writes that had not ended at `moment` or came later, as starts and ends. Discards and
    /// failed writes are left out: they may have done nothing.
    pub(crate) fn written_since(&self, moment: u64) -> BTreeMap<u64, u64> {
        let mut ranges = BTreeMap::new();
        for write in self.writes.iter().filter(|write| write.ended > moment) {
            let is_write = matches!(write.put, Put::Pattern | Put::Zeroes);
            if !write.range.is_empty() && is_write && write.good {
                let end = ranges.entry(write.range.offset()).or_insert(0);
                *end = write.range.end().max(*end);
            }
        }
        ranges
    }
}

/// The eight bytes around `at` of a write with a pattern; never zero, so that zeroes are told apart.
fn pattern(id: WriteId, at: u64) -> [u8; 8] {
    let word = mix((at / 8) ^ (u64_from(id.0) << 40));
    (word | 0x0101_0101_0101_0101).to_le_bytes()
}

/// `by` has taken the place of every write that had ended before it began.
fn supersede(writes: &[Write], of: &mut Vec<WriteId>, by: WriteId) {
    let begun = writes[by.0].begun;
    of.retain(|id| *id == by || writes[id.0].ended > begun);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    fn with(image: &[u8], range: ByteRange, bytes: &[u8]) -> Vec<u8> {
        let mut image = image.to_vec();
        image[usize_from(range.offset())..usize_from(range.end())].copy_from_slice(bytes);
        image
    }

    #[test]
    fn a_later_write_takes_an_earlier_ones_place() {
        let zero = vec![0; 16];
        let mut oracle = Oracle::new(zero.clone());
        let first = oracle.begin_write(range(0, 8), Put::Pattern);
        let one = with(&zero, range(0, 8), &oracle.data(first));
        assert!(oracle.check_image(&zero).is_ok() && oracle.check_image(&one).is_ok());
        oracle.end_write(first, true, false);
        assert!(oracle.check_image(&zero).is_err() && oracle.check_image(&one).is_ok());
    }

    #[test]
    fn writes_in_flight_at_once_may_both_be_there() {
        let zero = vec![0; 16];
        let mut oracle = Oracle::new(zero.clone());
        let first = oracle.begin_write(range(0, 8), Put::Pattern);
        let second = oracle.begin_write(range(4, 8), Put::Pattern);
        oracle.end_write(first, true, false);
        oracle.end_write(second, true, false);
        let one = with(&zero, range(0, 8), &oracle.data(first));
        let both = with(&one, range(4, 8), &oracle.data(second));
        let other = with(&with(&zero, range(4, 8), &oracle.data(second)), range(0, 8), &oracle.data(first));
        assert!(oracle.check_image(&both).is_ok() && oracle.check_image(&other).is_ok());
        assert!(oracle.check_image(&one).is_err(), "the second is missing");
    }

    #[test]
    fn a_crash_may_lose_what_was_not_flushed() {
        let zero = vec![0; 16];
        let mut oracle = Oracle::new(zero.clone());
        let write = oracle.begin_write(range(0, 8), Put::Pattern);
        let one = with(&zero, range(0, 8), &oracle.data(write));
        oracle.end_write(write, true, false);
        assert!(oracle.check_crash(&zero).is_ok() && oracle.check_crash(&one).is_ok());
        let flush = oracle.begin_flush();
        oracle.end_flush(&flush, true);
        assert!(oracle.check_crash(&zero).is_err() && oracle.check_crash(&one).is_ok());
    }

    #[test]
    fn a_flush_after_a_failed_one_promises_nothing_for_what_came_before() {
        let zero = vec![0; 16];
        let mut oracle = Oracle::new(zero.clone());
        let write = oracle.begin_write(range(0, 8), Put::Pattern);
        oracle.end_write(write, true, false);
        oracle.flushes_failed(1);
        let flush = oracle.begin_flush();
        oracle.end_flush(&flush, true);
        assert!(oracle.check_crash(&zero).is_ok());
    }

    #[test]
    fn a_read_may_bring_what_was_there_at_any_moment_of_it() {
        let zero = vec![0; 16];
        let mut oracle = Oracle::new(zero);
        let read = oracle.begin_read(range(0, 16));
        let write = oracle.begin_write(range(0, 8), Put::Pattern);
        oracle.end_write(write, true, false);
        assert!(oracle.end_read(&read, Some((range(0, 16), &[0; 16]))).is_ok());
        let read = oracle.begin_read(range(0, 16));
        assert!(oracle.end_read(&read, Some((range(0, 16), &[0; 16]))).is_err());
    }
}
