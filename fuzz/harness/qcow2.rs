//! What the qcow2 fuzz targets do with their bytes. Also built into a test of `heliostat-block`, which replays the
//! committed corpora.

use std::sync::Arc;

use bytes::Bytes;
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::driver::Driver;
use heliostat_block::driver::qcow2::{OpenOptions, Qcow2};
use heliostat_block::name::NodeName;
use heliostat_block::node::{Discard, Node, NodeOptions};
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};

#[path = "memory.rs"]
mod memory;

use memory::{MemoryStorage, StandingClock, run};

/// A file does not grow beyond this: what an image makes of its few bytes must have a bound.
const SIZE_MAX: u64 = 2 << 20;

/// A read or a write is no longer than this.
const REQUEST_MAX: u64 = 1 << 20;

fn open_image(image: &[u8], read_only: bool) -> Option<Arc<Node>> {
    let storage = MemoryStorage::new(image.to_vec(), SIZE_MAX);
    let data = MemoryStorage::new(Vec::new(), SIZE_MAX);
    let options = OpenOptions { read_only, data_file: Some(data), ..OpenOptions::default() };
    let qcow2 = run(Qcow2::open(storage, options)).ok()?;
    let options = NodeOptions { read_only, discard: Discard::Unmap, ..NodeOptions::default() };
    Some(Node::new(NodeName::generated(0), Driver::Qcow2(qcow2), options, Arc::new(StandingClock)))
}

/// The start of `range`, no longer than a request.
fn cut(range: ByteRange) -> ByteRange {
    ByteRange::from_bounds(range.offset(), range.end().min(range.offset() + REQUEST_MAX))
}

/// Any bytes as an image: it is refused, or read.
pub fn open(image: &[u8]) {
    let Some(node) = open_image(image, true) else { return };
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

/// The first bytes are operations, the others an image to which they are done. What was written is read back.
pub fn operations(data: &[u8]) {
    let Some((&count, rest)) = data.split_first() else { return };
    let count = usize::from(count % 32) * 6;
    if rest.len() < count {
        return;
    }
    let (operations, image) = rest.split_at(count);
    let Some(node) = open_image(image, false) else { return };
    run(async {
        for operation in operations.chunks_exact(6) {
            carry_out(&node, operation).await;
        }
        let _ = node.close().await;
    });
}

async fn carry_out(node: &Arc<Node>, operation: &[u8]) {
    let number = |at: usize| u64::from(u16::from_be_bytes([operation[at], operation[at + 1]]));
    let size = node.size();
    if size == 0 {
        return;
    }
    let at = (number(1) * 509) % size;
    let range = cut(ByteRange::from_bounds(at, (at + 1 + number(3) * 3).min(size)));
    let tracked = node.enter().await;
    let fill = operation[5] | 1;
    match operation[0] % 5 {
        0 | 1 => {
            let data = Bytes::from(vec![fill; usize_from(range.len())]);
            if tracked.write(range.offset(), data, Durability::Cached).await.is_ok() {
                expect(&tracked, range, fill).await;
            }
        }
        2 => {
            let space = if operation[5].is_multiple_of(2) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
            let zeroed = tracked.write_zeroes(range, space, ZeroEffort::Any, Durability::Cached).await;
            if zeroed.is_ok() {
                expect(&tracked, range, 0).await;
            }
        }
        3 => drop(tracked.discard(range).await),
        _ => drop(tracked.flush().await),
    }
}

async fn expect(tracked: &heliostat_block::tracked::Tracked, range: ByteRange, byte: u8) {
    let read = tracked.read(range.offset(), Buffer::zeroed(usize_from(range.len()))).await;
    let is_there = read.is_ok_and(|read| read.iter().all(|other| *other == byte));
    assert!(is_there, "what was written to {range} is not there");
}
