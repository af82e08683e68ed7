//! The same operations, done by ours to one image and by `qemu-io` to its twin, leave two images with the same map: what
//! is data, what is zero, what has a place in the file and what comes from below. Where ours means to differ, that is
//! written here, in [`IntendedDifference`].
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod common;
mod images;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use common::{memory_directory, run, skipped};
use heliostat_block::convert::usize_from;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::{Durability, ZeroEffort, ZeroSpace};
use heliostat_host::runtime::block_on;
use images::map::Piece;
use images::scene::{Scene, qemu_io, random_range, sectors, text};
use images::{DataFile, Random, Wish, map};

/// How many twins are made; `HELIOSTAT_CASES` makes it another number, `HELIOSTAT_SEED` begins elsewhere.
const CASES: u64 = 30;

/// Seeds that have shown a difference once.
const MORE: [u64; 8] = [36, 37, 38, 144, 152, 206, 225, 229];

/// Operations between two looks.
const AT_ONCE: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Write(ByteRange, u8),
    Zero(ByteRange, ZeroSpace),
    Discard(ByteRange),
}

impl Operation {
    /// As `qemu-io` takes it.
    fn command(self) -> String {
        let what = |range: ByteRange| format!("{} {}", range.offset(), range.len());
        match self {
            Self::Write(range, byte) => format!("write -P {byte} {}", what(range)),
            Self::Zero(range, ZeroSpace::MayUnmap) => format!("write -z -u {}", what(range)),
            Self::Zero(range, ZeroSpace::Keep) => format!("write -z {}", what(range)),
            Self::Discard(range) => format!("discard {}", what(range)),
        }
    }

    async fn carry_out(self, node: &Arc<Node>) {
        let tracked = node.enter().await;
        let durability = Durability::Cached;
        match self {
            Self::Write(range, byte) => {
                let data = Bytes::from(vec![byte; usize_from(range.len())]);
                tracked.write(range.offset(), data, durability).await.unwrap();
            }
            Self::Zero(range, space) => {
                tracked.write_zeroes(range, space, ZeroEffort::Any, durability).await.unwrap();
            }
            Self::Discard(range) => tracked.discard(range).await.unwrap(),
        }
    }
}

/// Operations on whole sectors; half of them on whole clusters.
fn operations(random: &mut Random, wish: &Wish) -> Vec<Operation> {
    let mut operations = Vec::new();
    while operations.len() < 12 {
        let mut range = sectors(random_range(random, wish.size), wish.size);
        if random.chance(50) {
            range = range.widen(wish.cluster_size(), wish.size & !511);
        }
        if range.is_empty() {
            continue;
        }
        let space = if random.chance(50) { ZeroSpace::MayUnmap } else { ZeroSpace::Keep };
        operations.push(match random.below(4) {
            0 | 1 => Operation::Write(range, u8::try_from(1 + random.below(250)).unwrap()),
            2 => Operation::Zero(range, space),
            _ => Operation::Discard(range),
        });
    }
    operations
}

/// Where ours leaves another map than QEMU, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum IntendedDifference {
    /// What nothing holds, here or below, reads as zero. QEMU writes an entry that says so when it is zeroed, or, in
    /// version 2, data. Ours writes nothing: a mirror that zeroes 16 TiB of a sparse target would make 2 GiB of tables.
    NothingIsZeroed,
    /// Who zeroes and wants the space kept (NBD's NO_HOLE) keeps it in version 2, too, as zeroes that are written. QEMU
    /// gives it back where nothing is below.
    SpaceIsKept,
    /// An external data file that is a raw image by itself is zeroed, and the entry goes on to lead there: so a crash
    /// between the two cannot make the file and the disk say different things. QEMU makes a zero cluster of it.
    RawFileSaysIt,
    /// The last cluster of a disk that ends inside it is whole where all that the disk has of it is zeroed, so its space
    /// is given back. QEMU does so without subclusters only.
    LastIsWhole,
}

use IntendedDifference::{LastIsWhole, NothingIsZeroed, RawFileSaysIt, SpaceIsKept};

impl IntendedDifference {
    const ALL: [Self; 4] = [NothingIsZeroed, SpaceIsKept, RawFileSaysIt, LastIsWhole];

    /// Why the two may say different things of one part of a disk.
    fn find(wish: &Wish, ours: Piece, theirs: Piece) -> Option<Self> {
        let is_nothing = |piece: Piece| !piece.present && piece.zero;
        let is_data = |piece: Piece| piece.present && piece.depth == 0 && piece.data && !piece.compressed;
        let is_zero = |piece: Piece| piece.present && piece.depth == 0 && piece.zero && !piece.data;
        if is_nothing(ours) && (is_zero(theirs) || (wish.version < 3 && is_data(theirs))) {
            Some(NothingIsZeroed)
        } else if wish.version < 3 && is_data(ours) && is_nothing(theirs) {
            Some(SpaceIsKept)
        } else if wish.data_file == DataFile::Raw && ours.offset.is_some() && is_zero(theirs) {
            Some(RawFileSaysIt)
        } else if wish.extended_l2
            && ours.start >= wish.size & !(wish.cluster_size() - 1)
            && (is_zero(ours) && is_zero(theirs) && ours.offset.is_none())
        {
            Some(LastIsWhole)
        } else {
            None
        }
    }
}

fn twin(seed: u64) -> Scene {
    Scene::make(Wish::draw(seed), memory_directory().unwrap(), false)
}

/// Compares the maps of twins. Returns the differences that are intended.
fn compare(ours: &Scene, theirs: &Scene, done: &[Operation]) -> BTreeSet<IntendedDifference> {
    let [one, other] = [ours, theirs].map(|scene| {
        let mut pieces = map::qemu(&scene.path);
        map::forget_holes(&mut pieces);
        pieces
    });
    let parts = map::side_by_side(&one, &other).into_iter().filter(|(ours, theirs)| ours != theirs);
    let found = parts.map(|(one, other)| {
        IntendedDifference::find(&ours.wish, one, other).unwrap_or_else(|| {
            panic!("{:?}\nafter {done:?}\nours: {one:?}\nqemu: {other:?}", ours.wish);
        })
    });
    found.collect()
}

fn case(seed: u64) -> BTreeSet<IntendedDifference> {
    let (ours, theirs) = (twin(seed), twin(seed));
    eprintln!("seed {seed}: {:?}", ours.wish);
    let mut found = compare(&ours, &theirs, &[]);
    assert!(found.is_empty(), "twins");
    let mut random = Random(seed ^ 0x7717);
    let operations = operations(&mut random, &ours.wish);
    for (number, some) in operations.chunks(AT_ONCE).enumerate() {
        block_on(async {
            let node = ours.open(false).await;
            for operation in some {
                operation.carry_out(&node).await;
            }
            node.close().await.unwrap();
        })
        .unwrap();
        qemu_io(&theirs.path, &some.iter().map(|operation| operation.command()).collect::<Vec<_>>());
        found.extend(compare(&ours, &theirs, &operations[..number * AT_ONCE + some.len()]));
    }
    for scene in [&ours, &theirs] {
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&scene.path)]).unwrap();
    }
    let arguments = ["compare", "-f", "qcow2", "-F", "qcow2", text(&ours.path), text(&theirs.path)];
    run("qemu-img", &arguments).unwrap();
    found
}

#[test]
fn the_same_operations_leave_the_same_map() {
    let missing = ["qemu-img", "qemu-io"].into_iter().find_map(|tool| run(tool, &["--version"]).err());
    if let Some(missing) = missing {
        skipped(&missing);
        return;
    }
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, cases) = (number("HELIOSTAT_SEED"), number("HELIOSTAT_CASES"));
    let seeds = first.unwrap_or(1)..first.unwrap_or(1) + cases.unwrap_or(CASES);
    let mut found: BTreeSet<_> = seeds.flat_map(case).collect();
    if (first, cases) == (None, None) {
        found.extend(MORE.into_iter().flat_map(case));
        assert_eq!(found, IntendedDifference::ALL.into(), "one that is not met any more is none");
    }
}
