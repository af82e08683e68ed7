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

use super::findings::Findings;
use super::pattern::{BLOCK, Pattern};
use super::record::{Expected, PivotWindow, Record};

/// Read at once from each disk: long enough for any disk's full speed.
const PIECE: u64 = 1 << 20;

/// Pieces on their way at once.
const PIECES_IN_FLIGHT: usize = 4;

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
            let (found, wanted) = (self.pattern.recognise(bytes), expected);
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::time::Duration;

    use heliostat_block::clock::Moment;
    use heliostat_host::open::{Cache, Locking};
    use heliostat_host::runtime::block_on;

    use super::*;
    use crate::cli::demo::record::Change;
    use crate::cli::image;

    const PATTERN: Pattern = Pattern::new(7);
    const BLOCKS: u64 = 600;

    fn at(ms: u64) -> Moment {
        Moment::from_start(Duration::from_millis(ms))
    }

    fn window() -> PivotWindow {
        PivotWindow { asked: at(100), done: at(110) }
    }

    fn put(file: &File, block: u64, request: u64) {
        let mut bytes = [0; 4096];
        PATTERN.fill(block, request, &mut bytes);
        file.write_all_at(&bytes, block * BLOCK).unwrap();
    }

    /// A disk with data at blocks 0 to 9, on which block 3 was written before the pivot and block 5 after it.
    struct Disks {
        folder: tempfile::TempDir,
        source: File,
        target: File,
        record: Record,
        /// The request that wrote block 3, and the one that wrote block 5.
        requests: [u64; 2],
    }

    impl Disks {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut record = Record::new(BLOCKS, Vec::from([0..4, 4..10]));
            let before = record.sent(Change::Write, 3..4, at(1));
            record.acknowledged(before, at(2));
            let after = record.sent(Change::Write, 5..6, at(120));
            record.acknowledged(after, at(121));
            let [source, target] = ["source", "target"].map(|name| {
                let path = folder.path().join(name);
                let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
                file.set_len(BLOCKS * BLOCK).unwrap();
                (0..10).for_each(|block| put(&file, block, 0));
                put(&file, 3, before);
                file
            });
            put(&target, 5, after);
            Self { folder, source, target, record, requests: [before, after] }
        }

        fn prove(&self) -> Proof {
            let open = |name: &str| {
                let path = self.folder.path().join(name);
                image::open(Path::new(&path), Cache::Page, Locking::Still).unwrap().node
            };
            let (source, target) = (open("source"), open("target"));
            block_on(prove(&source, &target, &self.record, window(), PATTERN)).unwrap().unwrap()
        }
    }

    /// How many blocks are found wrong on the target, on the source, and between them.
    fn counts(proof: &Proof) -> [u64; 3] {
        [proof.target.count, proof.source.count, proof.differing.count]
    }

    #[test]
    fn disks_as_the_record_wants_them_pass() {
        let proof = Disks::new().prove();
        assert_eq!(counts(&proof), [0, 0, 0], "{proof:?}");
        assert_eq!(proof.untouched, BLOCKS - 1);
    }

    #[test]
    fn one_bit_of_data_or_of_a_hole_is_found() {
        for at in [0, 3 * BLOCK + 2000, 9 * BLOCK + 4095, 300 * BLOCK, BLOCKS * BLOCK - 1] {
            let disks = Disks::new();
            let mut byte = [0];
            disks.target.read_exact_at(&mut byte, at).unwrap();
            disks.target.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert_eq!(counts(&disks.prove()), [1, 0, 1], "byte {at}");
        }
    }

    #[test]
    fn a_write_from_before_the_pivot_that_the_mirror_missed_is_found() {
        let disks = Disks::new();
        put(&disks.target, 3, 0);
        let proof = disks.prove();
        assert_eq!(counts(&proof), [1, 0, 1]);
        assert_eq!(
            proof.target.described,
            ["block 3 of the target holds request 0's data of block 3, not what request 1 wrote"]
        );
    }

    #[test]
    fn a_write_after_the_pivot_that_went_to_the_source_is_found() {
        let disks = Disks::new();
        put(&disks.target, 5, 0);
        put(&disks.source, 5, disks.requests[1]);
        assert_eq!(counts(&disks.prove()), [1, 1, 0]);
    }

    #[test]
    fn a_block_at_the_wrong_place_is_found() {
        let disks = Disks::new();
        let mut bytes = [0; 4096];
        PATTERN.fill(8, 0, &mut bytes);
        disks.target.write_all_at(&bytes, 9 * BLOCK).unwrap();
        let proof = disks.prove();
        assert_eq!(counts(&proof), [1, 0, 1]);
        assert!(proof.target.described[0].contains("data of block 8"), "{:?}", proof.target);
    }

    #[test]
    fn bytes_that_nobody_wrote_on_both_sides_are_found() {
        let disks = Disks::new();
        for file in [&disks.source, &disks.target] {
            file.write_all_at(b"stray", 77 * BLOCK).unwrap();
        }
        assert_eq!(counts(&disks.prove()), [1, 1, 0]);
    }

    #[test]
    fn findings_beyond_a_few_are_counted_only() {
        let disks = Disks::new();
        (20..120).for_each(|block| put(&disks.target, block, 9));
        let proof = disks.prove();
        assert_eq!(proof.target.count, 100);
        assert!(proof.target.described.len() < 20);
    }
}
