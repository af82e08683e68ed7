//! What the qcow2 fuzz targets do with their bytes. Also built into a test of `heliostat-block`, which replays the
//! committed corpora.

use std::sync::Arc;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::check::{self, CheckOptions, CheckReport, Finding, FindingKind, Repair};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, Storage, ZeroEffort, ZeroSpace};

#[path = "memory.rs"]
mod memory;

use memory::{MemoryStorage, StandingClock, run};

/// A file does not grow beyond this: what an image makes of its few bytes must have a bound.
const SIZE_MAX: u64 = 2 << 20;

/// A read or a write is no longer than this.
const REQUEST_MAX: u64 = 1 << 20;

fn in_memory(image: &[u8]) -> Arc<MemoryStorage> {
    MemoryStorage::new(image.to_vec(), SIZE_MAX)
}

fn open_image(storage: &Arc<MemoryStorage>, read_only: bool) -> Option<Arc<Node>> {
    let open = |data_file: Option<Arc<dyn Storage>>| {
        let options = OpenOptions { read_only, data_file, ..OpenOptions::default() };
        run(Qcow2::open(Arc::<MemoryStorage>::clone(storage), options)).ok()
    };
    // Whichever it wants: an image says whether its data is in a file of their own.
    let qcow2 = open(None).or_else(|| open(Some(in_memory(&[]))))?;
    let options = NodeOptions { read_only, discard: Discard::Unmap, ..NodeOptions::default() };
    Some(Node::new(NodeName::generated(0), Driver::Qcow2(qcow2), options, Arc::new(StandingClock)))
}

/// The start of `range`, no longer than a request.
fn cut(range: ByteRange) -> ByteRange {
    ByteRange::from_bounds(range.offset(), range.end().min(range.offset() + REQUEST_MAX))
}

/// Any bytes as an image: it is refused, or read.
pub fn open(image: &[u8]) {
    let Some(node) = open_image(&in_memory(image), true) else { return };
    run(async {
        let tracked = node.enter().await;
        let size = node.size();
        for at in [0, size / 3, size.saturating_sub(5000)] {
            let range = cut(ByteRange::from_bounds(at, size));
            let buffer = Buffer::zeroed(usize_from(range.len()));
            // Whether it can be read is the image's business; that it is answered is ours.
            let _ = tracked.read(at, buffer).await;
        }
        let mut at = 0;
        for _ in 0..64 {
            let Ok(extents) = tracked.extents(ByteRange::from_bounds(at, size)).await else { break };
            let Some(last) = extents.last() else { break };
            assert_eq!(extents[0].range.offset(), at, "an answer begins where it was asked");
            at = last.range.end();
        }
    });
}

/// What a check says of an image, if it can be looked at at all.
fn examine(storage: &Arc<MemoryStorage>, repair: Repair) -> Option<CheckReport> {
    let file = ImageFile::new(Arc::<MemoryStorage>::clone(storage));
    let options = CheckOptions { repair, findings_max: usize::MAX, ..CheckOptions::default() };
    run(check::check(&file, options)).ok()
}

/// The first bytes are operations, the others an image.
fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&count, rest) = data.split_first()?;
    rest.split_at_checked(usize::from(count % 32) * 6)
}

/// Operations are done to an image. A sound one holds what is written to it, and stays sound; of any other, whose
/// tables may share a place, only that every operation ends is asked.
pub fn operations(data: &[u8]) {
    let Some((operations, image)) = split(data) else { return };
    let storage = in_memory(image);
    let is_sound = examine(&storage, Repair::No).is_some_and(|report| is_sound(&report));
    operate(&storage, operations, is_sound);
}

/// An image is repaired, and then used like any other.
pub fn repair(data: &[u8]) {
    let Some((operations, image)) = split(data) else { return };
    let storage = in_memory(image);
    let Some(repaired) = examine(&storage, Repair::All) else { return };
    let left = examine(&storage, Repair::No).expect("what was repaired can be looked at");
    let said = (repaired.corruptions, repaired.leaks, repaired.check_errors);
    assert_eq!((left.corruptions, left.leaks, left.check_errors), said, "{repaired:#?} {left:#?}");
    operate(&storage, operations, is_sound(&left));
}

/// Says whether nothing is wrong but space that is lost, and flags that say COPIED too seldom: the last of two entries
/// that had shared a cluster keeps the flag that it had, as snapshots' entries do.
fn is_sound(report: &CheckReport) -> bool {
    let is_harmless = |finding: &&Finding| {
        finding.kind == FindingKind::Leak
            || finding.text.ends_with("wrong COPIED flag: the reference count is 1")
    };
    let harmless = report.findings.iter().filter(is_harmless).count();
    harmless == report.findings.len() && report.findings_left_out == 0 && report.check_errors == 0
}

/// Clusters that are counted and not used, beyond the end of the file, too: it grows over them.
fn leaks(storage: &MemoryStorage) -> u64 {
    let mut bytes = storage.contents();
    bytes.resize(usize_from(SIZE_MAX), 0);
    examine(&in_memory(&bytes), Repair::No).map_or(0, |report| report.leaks)
}

fn operate(storage: &Arc<MemoryStorage>, operations: &[u8], is_sound_before: bool) {
    let leaks_before = if is_sound_before { leaks(storage) } else { 0 };
    let Some(node) = open_image(storage, false) else { return };
    run(async {
        for operation in operations.chunks_exact(6) {
            carry_out(&node, operation, is_sound_before).await;
        }
        let closed = node.close().await;
        if closed.is_err() || !is_sound_before {
            return;
        }
        let after = examine(storage, Repair::No).expect("what was sound can be looked at");
        assert!(is_sound(&after) && leaks(storage) <= leaks_before, "{after:#?}");
    });
}

async fn carry_out(node: &Arc<Node>, operation: &[u8], is_sound: bool) {
    let number = |at: usize| u64::from(u16::from_be_bytes([operation[at], operation[at + 1]]));
    let size = node.size();
    if size == 0 {
        return;
    }
    let at = (number(1) * 509) % size;
    let range = cut(ByteRange::from_bounds(at, (at + 1 + number(3) * 3).min(size)));
    let tracked = node.enter().await;
    let fill = operation[5] | 1;
    let holds = match operation[0] % 5 {
        0 | 1 => {
            let data = Bytes::from(vec![fill; usize_from(range.len())]);
            let written = tracked.write(range.offset(), data, Durability::Cached).await;
            written.is_ok().then_some(fill)
        }
        2 => {
            let space = if operation[5].is_multiple_of(2) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
            let zeroed = tracked.write_zeroes(range, space, ZeroEffort::Any, Durability::Cached).await;
            zeroed.is_ok().then_some(0)
        }
        3 => {
            // It may be refused, as anything may be on a file that ends at its bound.
            let _ = tracked.discard(range).await;
            None
        }
        _ => {
            let _ = tracked.flush().await;
            None
        }
    };
    if let Some(byte) = holds.filter(|_| is_sound) {
        let read = tracked.read(range.offset(), Buffer::zeroed(usize_from(range.len()))).await;
        let is_there = read.is_ok_and(|read| read.iter().all(|other| *other == byte));
        assert!(is_there, "what was written to {range} is not there");
    }
}
