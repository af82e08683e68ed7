//! [`Proof`]: whether the disks hold what the guest's record says they must.
//!
//! Both disks are read in full, through nodes that were opened for this, after the daemon is gone. Nothing that
//! the daemon or the mirror believes comes in; only the record, the moment of the pivot, and the bytes.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::try_join;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use heliostat_block::buffer::Buffer;
use heliostat_block::convert::usize_from;
use heliostat_block::error::BlockError;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;

use super::guest::describe;
use super::pattern::{BLOCK, Pattern};
use super::record::{Expected, PivotWindow, Record};

/// Read at once from each disk: long enough for any disk's full speed.
const PIECE: u64 = 1 << 20;

/// Pieces on their way at once.
const PIECES_IN_FLIGHT: usize = 4;

/// The most findings that are described; more are counted.
const DESCRIBED_MAX: usize = 8;

/// What is wrong with a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// How many blocks are wrong.
    pub count: u64,
    /// The first of them, in words.
    pub described: Vec<String>,
}

impl Findings {
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.described.len() < DESCRIBED_MAX {
            self.described.push(text());
        }
    }
}

/// What reading both disks has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Blocks of each disk, all of which were read.
    pub blocks: u64,
    /// Blocks of the target that do not hold what was last acknowledged.
    pub target: Findings,
    /// Blocks of the source that do not hold what was last acknowledged before the pivot, or that hold what
    /// was written after it.
    pub source: Findings,
    /// Blocks that no request touched after the pivot began.
    pub untouched: u64,
    /// Those of them that differ between source and target.
    pub differing: Findings,
}

/// Reads both disks and compares them with the record.
///
/// # Errors
/// When a disk cannot be read.
pub async fn prove(
    source: &Arc<Node>,
    target: &Arc<Node>,
    record: &Record,
    window: PivotWindow,
    pattern: Pattern,
) -> Result<Proof, BlockError> {
    let at_pivot = record.at_pivot(window);
    let touched = record.touched_since(window);
    let disk = ByteRange::from_bounds(0, record.blocks() * BLOCK);
    let mut proof = Proof { blocks: record.blocks(), ..Proof::default() };
    let pieces = stream::iter(disk.pieces(PIECE))
        .map(|piece| async move {
            let (old, new) = try_join(read(source, piece), read(target, piece)).await?;
            Ok::<_, BlockError>((piece, old, new))
        })
        .buffered(PIECES_IN_FLIGHT);
    let mut pieces = std::pin::pin!(pieces);
    while let Some((piece, old, new)) = pieces.try_next().await? {
        let sides = old.chunks(usize_from(BLOCK)).zip(new.chunks(usize_from(BLOCK)));
        for (block, (old, new)) in (piece.offset() / BLOCK..).zip(sides) {
            let judge = Judge { pattern, block };
            judge.compare(&mut proof.target, "the target", new, record.expected(block));
            judge.compare(&mut proof.source, "the source", old, &at_pivot[usize_from(block)]);
            judge.equal(&mut proof, &touched, old, new);
        }
    }
    Ok(proof)
}

async fn read(node: &Arc<Node>, range: ByteRange) -> Result<Buffer, BlockError> {
    node.enter().await.read(range.offset(), Buffer::zeroed(usize_from(range.len()))).await
}

/// Looks at one block.
struct Judge {
    pattern: Pattern,
    block: u64,
}

impl Judge {
    fn compare(&self, findings: &mut Findings, side: &str, bytes: &[u8], expected: &Expected) {
        if expected.contents().iter().any(|content| self.pattern.holds(self.block, *content, bytes)) {
            return;
        }
        findings.add(|| {
            let (found, wanted) = (self.pattern.recognise(bytes), describe(expected.contents()));
            format!("block {} of {side} holds {found}, not {wanted}", self.block)
        });
    }

    fn equal(&self, proof: &mut Proof, touched: &BTreeSet<u64>, old: &[u8], new: &[u8]) {
        if touched.contains(&self.block) {
            return;
        }
        proof.untouched += 1;
        if old != new {
            proof.differing.add(|| format!("block {} differs between source and target", self.block));
        }
    }
}
