//! [`Named`]: a named dirty bitmap on the guests' disk, and the disk that is known to hold all but what it has.
//!
//! The promise of incremental copies: wherever the bitmap says nothing, that disk holds what the guests' disk holds. It
//! is looked at whenever a job ends, and when the run is over.

use std::sync::{Arc, Mutex, PoisonError};

use heliostat_block::convert::usize_from;
use heliostat_block::dirty_bitmap::DirtyBitmap;
use heliostat_block::job::scan::SyncMode;
use heliostat_block::job::{BitmapMode, ByBitmap, Force, JobStatus, Verb};
use heliostat_block::named_bitmap::{Change, NamedBitmap, change};
use heliostat_block::range::ByteRange;

use crate::bench::Bench;
use crate::operator::{Errand, Goal};
use crate::random::Random;

const NAME: &str = "bitmap";

/// What one job has to do with the bitmap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    mode: BitmapMode,
    /// By the bitmap, where the target holds the rest.
    by_bitmap: bool,
}

impl Wish {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let modes = [
            BitmapMode::OnSuccess,
            BitmapMode::OnSuccess,
            BitmapMode::Always,
            BitmapMode::Always,
            BitmapMode::Never,
        ];
        Self { mode: random.pick(&modes), by_bitmap: random.chance(800) }
    }
}

/// What is known of the bitmap of a run.
#[derive(Default)]
pub(crate) struct Named(Mutex<State>);

#[derive(Default)]
struct State {
    /// There is one.
    is_there: bool,
    /// The disk that holds all but what it has.
    base: Option<usize>,
}

impl Named {
    fn set_base(&self, base: Option<usize>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).base = base;
    }

    fn base(&self) -> Option<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).base
    }

    fn is_there(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_there
    }

    /// Lets the guests' disk have one.
    pub(crate) fn begin(bench: &Bench, granularity: u32) {
        let node = &bench.disks[bench.current()].node;
        match DirtyBitmap::new(node.size(), granularity) {
            Ok(bits) => {
                let bitmap = NamedBitmap::new(NAME.to_owned(), Arc::new(bits));
                change(&[(Arc::clone(node), Change::Add(bitmap))]);
                bench.named.0.lock().unwrap_or_else(PoisonError::into_inner).is_there = true;
            }
            Err(refusal) => bench.world.fail(format!("no bitmap of a disk as small as this: {refusal}")),
        }
    }

    /// What a job of the guests' disk to `target` is to do with it; settles how it copies.
    pub(crate) fn for_job(bench: &Bench, target: usize, errand: &mut Errand) -> Option<ByBitmap> {
        let is_by_bitmap = |wish: &Wish| wish.by_bitmap && bench.named.base() == Some(target);
        let wish = errand.wish.filter(|wish| {
            let is_of_use = errand.mirror.sync != SyncMode::None && wish.mode != BitmapMode::Never;
            bench.named.is_there() && (is_by_bitmap(wish) || is_of_use)
        })?;
        let source = &bench.disks[bench.current()].node;
        let Some(bitmap) = source.named_bitmap(NAME) else {
            bench.world.fail("the bitmap is not where the guests are");
            return None;
        };
        if bitmap.busy {
            bench.world.fail("the bitmap is busy, and no job runs");
        }
        if is_by_bitmap(&wish) {
            errand.mirror.sync = SyncMode::Bitmap;
        }
        change(&[(Arc::clone(source), Change::Busy(NAME.to_owned(), true))]);
        ByBitmap::new(source, NAME.to_owned(), bitmap.granularity, wish.mode).ok()
    }

    /// A job of `source` to `target` has ended.
    pub(crate) fn job_ended(
        bench: &Bench,
        sync: SyncMode,
        disks: (usize, usize),
        ended_well: bool,
        pivoted: bool,
    ) {
        let (source, target) = disks;
        let storage = &bench.disks[source].storage;
        let base = match (ended_well, pivoted) {
            // What the old disk had not made durable may be gone when it is looked at again, and what a failed flush of
            // it has lost may be gone already.
            (true, true) => {
                let is_whole = storage.flush_failures() == 0 && storage.durable() == storage.visible();
                is_whole.then_some(source)
            }
            (true, false) if sync == SyncMode::None => bench.named.base().filter(|base| *base != target),
            (true, false) => Some(target),
            (false, _) => bench.named.base().filter(|base| *base != target || sync == SyncMode::Bitmap),
        };
        let base = if ended_well && pivoted && sync == SyncMode::None { None } else { base };
        bench.named.set_base(base);
        Self::check(bench);
    }

    /// Holds the bitmap to its promise.
    pub(crate) fn check(bench: &Bench) {
        if !bench.named.is_there() {
            return;
        }
        let current = &bench.disks[bench.current()];
        let Some(bits) = current.node.named_bitmap(NAME).and_then(|bitmap| bitmap.bits) else {
            bench.world.fail("the bitmap is not where the guests are");
            return;
        };
        let Some(base) = bench.named.base() else { return };
        let mut covered = vec![false; usize_from(bits.size())];
        let mut cover =
            |range: ByteRange| covered[usize_from(range.offset())..usize_from(range.end())].fill(true);
        // A write that has not ended is not marked yet.
        bench.oracle().in_flight().into_iter().for_each(&mut cover);
        let mut from = 0;
        while let Some(run) = bits.next_dirty(from, u64::MAX) {
            from = run.end();
            cover(run);
        }
        let (now, then) = (current.storage.visible(), bench.disks[base].storage.durable());
        let differs = (0..covered.len()).find(|at| !covered[*at] && now[*at] != then[*at]);
        if let Some(at) = differs {
            bench.world.fail(format!(
                "the bitmap says nothing of {at:#x}, where the guests' disk has {:#04x} and its copy {:#04x}",
                now[at], then[at]
            ));
        }
    }
}

/// Wishes for some of the jobs of a run: first a copy, then others that go on from it, or from elsewhere.
pub(crate) fn draw_wishes(errands: &mut Vec<Errand>, random: &mut Random) {
    errands.truncate(2);
    let again = errands[random.index(errands.len())].clone();
    errands.push(again);
    let target = errands[0].target;
    for (number, errand) in errands.iter_mut().enumerate() {
        errand.wish = random.chance(850).then(|| Wish::draw(random));
        if random.chance(700) {
            errand.target = target;
        }
        let goals: &[Goal] = match number {
            0 => &[Goal::Copy, Goal::Copy, Goal::Complete],
            _ => &[Goal::Copy, Goal::Cancel, Goal::Complete],
        };
        errand.goal = random.pick(goals);
        if number == 0 {
            errand.verbs = 0;
            errand.impulse = None;
        }
        if errand.goal == Goal::Cancel && random.chance(500) {
            let moment = random.pick(&[JobStatus::Running, JobStatus::Running, JobStatus::Ready]);
            errand.impulse = Some((moment, Verb::Cancel(Force::Hard)));
        }
    }
}
