//! [`Record`]: what the demo's guest did, in its own words: each request, when it was sent, when it was
//! answered. The proof is made from this and nothing else.
//!
//! Two requests of the guest never touch the same block at the same time, so that what a block must hold is
//! never a matter of opinion. Pure: times come in.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use heliostat_block::clock::Moment;
use heliostat_block::convert::{u64_from, usize_from};

use super::pattern::Content;

/// What a request does to its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Each block holds the request's own data then.
    Write,
    /// Each block holds zeroes then.
    Zero,
    /// The contents are no longer needed: each block holds zeroes then, or what it held before.
    Trim,
}

/// One request that changes blocks.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it does.
    pub change: Change,
    /// To which blocks.
    pub blocks: Range<u64>,
    /// When it was sent.
    pub sent: Moment,
    /// When it was answered with success; `None` until then, and for ever when it failed.
    pub acknowledged: Option<Moment>,
}

/// When the pivot happened, as far as can be told from outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PivotWindow {
    /// The mirror was told to complete. What was acknowledged before is on the source.
    pub asked: Moment,
    /// The mirror said that it has completed. What is sent from now on is on the target alone.
    pub done: Moment,
}

/// Everything that a guest did.
#[derive(Debug)]
pub struct Record {
    /// The blocks that held data at the start.
    initial: Vec<Range<u64>>,
    /// In the order in which they were sent; the request's number is its index plus one.
    entries: Vec<Entry>,
    /// What each block may hold now.
    now: Vec<Expected>,
}

/// What a block may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Just this. By far the most.
    One(Content),
    /// One of these: it was trimmed, or a request failed or was under way.
    Any(Vec<Content>),
}

impl Expected {
    /// All that it may be.
    #[must_use]
    pub fn contents(&self) -> &[Content] {
        match self {
            Self::One(content) => std::slice::from_ref(content),
            Self::Any(contents) => contents,
        }
    }

    fn or(&self, other: Content) -> Self {
        let mut contents = self.contents().to_vec();
        if !contents.contains(&other) {
            contents.push(other);
        }
        match contents[..] {
            [content] => Self::One(content),
            _ => Self::Any(contents),
        }
    }

    /// What it may be after a request that surely was carried out.
    fn after(&self, change: Change, request: u64) -> Self {
        match change {
            Change::Write => Self::One(Content::Written(request)),
            Change::Zero => Self::One(Content::Zeroes),
            Change::Trim => self.or(Content::Zeroes),
        }
    }

    /// What it may be after a request that was carried out or not.
    fn perhaps_after(&self, change: Change, request: u64) -> Self {
        match change {
            Change::Write => self.or(Content::Written(request)),
            Change::Zero | Change::Trim => self.or(Content::Zeroes),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.contents().iter().map(ToString::to_string).collect();
        f.write_str(&words.join(" or "))
    }
}

impl Record {
    /// Starts with a disk of `blocks` blocks that holds data in the `initial` ranges.
    #[must_use]
    pub fn new(blocks: u64, initial: Vec<Range<u64>>) -> Self {
        let now = at_start(blocks, &initial);
        Self { initial, entries: Vec::new(), now }
    }

    /// How many blocks the disk has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        u64_from(self.now.len())
    }

    /// Notes that a request was sent. Answers its number.
    pub fn sent(&mut self, change: Change, blocks: Range<u64>, at: Moment) -> u64 {
        self.entries.push(Entry { change, blocks, sent: at, acknowledged: None });
        u64_from(self.entries.len())
    }

    /// Notes that it was answered with success.
    pub fn acknowledged(&mut self, request: u64, at: Moment) {
        let entry = &mut self.entries[index_of(request)];
        entry.acknowledged = Some(at);
        let (change, blocks) = (entry.change, entry.blocks.clone());
        self.change(blocks, |expected| expected.after(change, request));
    }

    /// Notes that it failed: it may have been carried out, or not.
    pub fn failed(&mut self, request: u64) {
        let entry = &self.entries[index_of(request)];
        let (change, blocks) = (entry.change, entry.blocks.clone());
        self.change(blocks, |expected| expected.perhaps_after(change, request));
    }

    fn change(&mut self, blocks: Range<u64>, to: impl Fn(&Expected) -> Expected) {
        for expected in &mut self.now[usize_from(blocks.start)..usize_from(blocks.end)] {
            *expected = to(expected);
        }
    }

    /// What a block must hold by now: the last request that was acknowledged decides.
    #[must_use]
    pub fn expected(&self, block: u64) -> &Expected {
        &self.now[usize_from(block)]
    }

    /// All requests, in the order in which they were sent.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What each block must hold on the old source: all that was acknowledged before the pivot, none of what
    /// was sent after it, and of what lies between any part.
    #[must_use]
    pub fn at_pivot(&self, window: PivotWindow) -> Vec<Expected> {
        let mut blocks = at_start(self.blocks(), &self.initial);
        for (index, entry) in self.entries.iter().enumerate() {
            let request = u64_from(index) + 1;
            let before = entry.acknowledged.is_some_and(|at| at < window.asked);
            if entry.sent > window.done {
                continue;
            }
            for expected in &mut blocks[usize_from(entry.blocks.start)..usize_from(entry.blocks.end)] {
                *expected = if before {
                    expected.after(entry.change, request)
                } else {
                    expected.perhaps_after(entry.change, request)
                };
            }
        }
        blocks
    }

    /// Which blocks were touched by requests that were not acknowledged before the pivot: there alone source
    /// and target may differ.
    #[must_use]
    pub fn touched_since(&self, window: PivotWindow) -> BTreeSet<u64> {
        let late = self.entries.iter().filter(|entry| entry.acknowledged.is_none_or(|at| at >= window.asked));
        late.flat_map(|entry| entry.blocks.clone()).collect()
    }

    /// How many requests were acknowledged before, during and after the pivot.
    #[must_use]
    pub fn counts(&self, window: PivotWindow) -> Counts {
        let mut counts = Counts::default();
        for entry in &self.entries {
            match entry.acknowledged {
                None => counts.failed += 1,
                Some(at) if at < window.asked => counts.before += 1,
                Some(_) if entry.sent > window.done => counts.after += 1,
                Some(_) => counts.during += 1,
            }
        }
        counts
    }
}

/// How many requests that change blocks there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Acknowledged before the mirror was told to complete.
    pub before: u64,
    /// Under way at some moment between that and its completion.
    pub during: u64,
    /// Sent after it, and acknowledged.
    pub after: u64,
    /// Never acknowledged.
    pub failed: u64,
}

fn index_of(request: u64) -> usize {
    usize_from(request - 1)
}

fn at_start(blocks: u64, initial: &[Range<u64>]) -> Vec<Expected> {
    let mut expected = vec![Expected::One(Content::Zeroes); usize_from(blocks)];
    for range in initial {
        expected[usize_from(range.start)..usize_from(range.end)].fill(Expected::One(Content::Written(0)));
    }
    expected
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_start(Duration::from_millis(ms))
    }

    const WINDOW: (u64, u64) = (100, 110);

    fn window() -> PivotWindow {
        PivotWindow { asked: at(WINDOW.0), done: at(WINDOW.1) }
    }

    fn done(record: &mut Record, change: Change, blocks: Range<u64>, sent: u64, acknowledged: u64) -> u64 {
        let request = record.sent(change, blocks, at(sent));
        record.acknowledged(request, at(acknowledged));
        request
    }

    #[test]
    fn the_last_acknowledged_request_decides_what_a_block_holds() {
        let mut record = Record::new(8, vec![0..2, 2..4]);
        assert_eq!(record.expected(3), &Expected::One(Content::Written(0)));
        assert_eq!(record.expected(4), &Expected::One(Content::Zeroes));
        let first = done(&mut record, Change::Write, 2..6, 1, 2);
        assert_eq!(record.expected(5), &Expected::One(Content::Written(first)));
        done(&mut record, Change::Zero, 2..3, 3, 4);
        assert_eq!(record.expected(2), &Expected::One(Content::Zeroes));
        done(&mut record, Change::Trim, 2..4, 5, 6);
        assert_eq!(record.expected(2), &Expected::One(Content::Zeroes), "zeroes or zeroes");
        assert_eq!(record.expected(3).contents(), [Content::Written(first), Content::Zeroes]);
        let last = done(&mut record, Change::Write, 3..4, 7, 8);
        assert_eq!(record.expected(3), &Expected::One(Content::Written(last)));
    }

    #[test]
    fn a_request_that_failed_may_have_happened() {
        let mut record = Record::new(2, vec![]);
        let request = record.sent(Change::Write, 0..1, at(1));
        record.failed(request);
        assert_eq!(record.expected(0).contents(), [Content::Zeroes, Content::Written(request)]);
        assert_eq!(record.counts(window()).failed, 1);
    }

    #[test]
    fn the_source_holds_what_came_before_the_pivot_and_nothing_that_came_after() {
        let mut record = Record::new(4, vec![]);
        let before = done(&mut record, Change::Write, 0..3, 1, 99);
        let during = done(&mut record, Change::Write, 1..2, 98, 105);
        let after = done(&mut record, Change::Write, 2..4, 111, 120);
        let source = record.at_pivot(window());
        assert_eq!(source[0], Expected::One(Content::Written(before)));
        assert_eq!(source[1].contents(), [Content::Written(before), Content::Written(during)]);
        assert_eq!(source[2], Expected::One(Content::Written(before)));
        assert_eq!(source[3], Expected::One(Content::Zeroes));
        assert_eq!(record.expected(2), &Expected::One(Content::Written(after)));
        let touched: Vec<_> = record.touched_since(window()).into_iter().collect();
        assert_eq!(touched, [1, 2, 3]);
        assert_eq!(record.counts(window()), Counts { before: 1, during: 1, after: 1, failed: 0 });
    }
}
