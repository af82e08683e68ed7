//! Preparing a mapping: what the first part of a write comes to, and which clusters it gets.
//!
//! Under the lock, without I/O. A write that changes the mapping is entered among the allocations in flight here, and
//! leaves in [`super::write`] when its data is there.

use super::entry::{Cluster, Standard};
use super::read::{Segment, Source, segments_of};
use super::refcount::Run;
use super::state::{Attempt, Obstacle, State};
use crate::convert::usize_from;
use crate::planted::{Bug, is_planted};
use crate::range::ByteRange;

/// What the first part of a write comes to.
pub(crate) enum Step {
    /// It goes where its clusters are.
    InPlace {
        range: ByteRange,
        host: u64,
    },
    Allocate(Allocation),
}

/// A write to clusters whose mapping will change. Entered among the allocations in flight.
pub(crate) struct Allocation {
    /// Guest clusters, whole; the last may reach beyond the disk.
    pub(crate) clusters: ByteRange,
    /// What the guest writes there.
    pub(super) write: ByteRange,
    /// What will be data afterwards: the write, and around it what shares its units of allocation.
    pub(super) hull: ByteRange,
    /// Where `clusters` will be, in the file of the guest's data.
    pub(super) host: u64,
    /// The clusters that were taken for it, if they are new.
    pub(super) run: Option<Run>,
    /// What is in `hull` and not in `write`.
    pub(super) gaps: Vec<Segment>,
    /// What the entry said, or all of them.
    pub(super) old: Cluster,
}

impl Allocation {
    /// Whether more has to be written than what the guest writes: older data, or zeroes over what was there.
    pub(super) fn writes_around(&self) -> bool {
        let is_fresh = self.run.is_some_and(|run| run.fresh);
        self.gaps.iter().any(|gap| !is_fresh || gap.source != Source::Zero)
    }
}

impl State {
    /// Says what the first part of a write to `range` comes to, and takes what it needs.
    pub(crate) fn plan_write(&mut self, range: ByteRange, backing: u64) -> Attempt<Step> {
        self.check_sound()?;
        let layout = self.layout;
        let guest = layout.cluster_start(range.offset());
        let first = ByteRange::from_bounds(guest, guest + layout.cluster_size());
        self.check_free(first)?;
        let old = self.cluster(guest)?;
        if let Some(host) = self.host_in_place(old, range.intersection(first).unwrap_or(range)) {
            return self.plan_in_place(range, host);
        }
        self.check_table(guest)?;
        let allocation = match old {
            Cluster::Standard(Standard { host: None, .. }) => self.plan_new(range, old)?,
            Cluster::Standard(Standard { host: Some(host), copied, .. })
                if self.is_external() || (copied && !self.haunted.contains_key(&host)) =>
            {
                if !self.is_external() {
                    self.check_in_place(ByteRange::from_bounds(host, host + layout.cluster_size()))?;
                }
                self.plan_kept(range, old, host)
            }
            _ => self.plan_moved(range, old)?,
        };
        self.allocations.enter(allocation.clusters);
        Ok(Step::Allocate(Allocation { gaps: self.gaps(&allocation, backing), ..allocation }))
    }

    /// That nobody is about to change the mapping of `clusters`.
    pub(crate) fn check_free(&self, clusters: ByteRange) -> Attempt<()> {
        match self.allocations.first_in(clusters) {
            Some(_) => Err(Obstacle::Wait(self.allocations.listen())),
            None => Ok(()),
        }
    }

    /// Where `part` of a cluster can be written in place.
    pub(super) fn host_in_place(&self, cluster: Cluster, part: ByteRange) -> Option<u64> {
        let layout = self.layout;
        let Cluster::Standard(Standard { host: Some(host), copied, data, .. }) = cluster else {
            return None;
        };
        if (!copied && !is_planted(Bug::SharedInPlace)) || self.haunted.contains_key(&host) {
            return None;
        }
        let within = layout.in_cluster(part.offset());
        let bits = layout.subclusters_of(ByteRange::from_bounds(within, within + part.len()));
        (data & bits == bits).then_some(host + within)
    }

    /// The longest part of a write that goes in place in one piece, of which the first cluster does at `host`.
    pub(super) fn plan_in_place(&mut self, range: ByteRange, host: u64) -> Attempt<Step> {
        let layout = self.layout;
        let size = layout.cluster_size();
        let mut end = layout.cluster_start(range.offset()) + size;
        while end < range.end() {
            let next = ByteRange::from_bounds(end, end + size);
            let part = ByteRange::from_bounds(end, next.end().min(range.end()));
            if self.check_free(next).is_err() {
                break;
            }
            // Whatever stands in the way is met when its turn comes.
            let Ok(cluster) = self.cluster(end) else { break };
            if self.host_in_place(cluster, part) != Some(host + (end - range.offset())) {
                break;
            }
            end = next.end();
        }
        let range = ByteRange::from_bounds(range.offset(), end.min(range.end()));
        if !self.is_external() {
            self.check_in_place(ByteRange::from_bounds(host, host + range.len()))?;
        }
        Ok(Step::InPlace { range, host })
    }

    /// New clusters where there are none: as many at once as follow each other on both sides.
    fn plan_new(&mut self, range: ByteRange, old: Cluster) -> Attempt<Allocation> {
        let layout = self.layout;
        let size = layout.cluster_size();
        let guest = layout.cluster_start(range.offset());
        let end = range.end().next_multiple_of(size).min(self.slice_end(guest));
        let mut count = 1;
        while guest + count * size < end {
            let next = guest + count * size;
            let is_alike = self.check_free(ByteRange::from_bounds(next, next + size)).is_ok()
                && self.cluster(next).is_ok_and(|cluster| cluster == old);
            if !is_alike {
                break;
            }
            count += 1;
        }
        let (host, run) = if self.is_external() {
            (guest, None)
        } else {
            let run = self.allocate(count)?;
            count = run.count;
            (run.first << layout.cluster_bits, Some(run))
        };
        let clusters = ByteRange::from_bounds(guest, guest + count * size);
        let write = range.intersection(clusters).unwrap_or(range);
        let hull = write.widen(layout.unit(), u64::MAX);
        Ok(Allocation { clusters, write, hull, host, run, gaps: Vec::new(), old })
    }

    /// The cluster's own host cluster, of which the write needs more subclusters than hold data.
    fn plan_kept(&self, range: ByteRange, old: Cluster, host: u64) -> Allocation {
        let layout = self.layout;
        let guest = layout.cluster_start(range.offset());
        let clusters = ByteRange::from_bounds(guest, guest + layout.cluster_size());
        let write = range.intersection(clusters).unwrap_or(range);
        let wide = write.widen(layout.unit(), u64::MAX);
        // What is data already may be written in place by others meanwhile, and is left alone.
        let is_data = |at: u64| {
            let found = self.host_in_place(old, ByteRange::from_bounds(at, at + 1)).is_some();
            found && !is_planted(Bug::CopyOverData)
        };
        let start = if is_data(write.offset()) { write.offset() } else { wide.offset() };
        let end = if is_data(write.end() - 1) { write.end() } else { wide.end() };
        let hull = ByteRange::from_bounds(start, end);
        Allocation { clusters, write, hull, host, run: None, gaps: Vec::new(), old }
    }

    /// A new cluster in the place of one that others use too, or that is compressed.
    fn plan_moved(&mut self, range: ByteRange, old: Cluster) -> Attempt<Allocation> {
        let layout = self.layout;
        if let Cluster::Standard(Standard { host: Some(host), .. }) = old
            && self.haunted.get(&host).is_some_and(|epoch| !self.epochs.has_ended(*epoch))
        {
            // Somebody may still write it in place, and that must not miss the copy.
            return Err(Obstacle::Wait(self.epochs.listen()));
        }
        let guest = layout.cluster_start(range.offset());
        let clusters = ByteRange::from_bounds(guest, guest + layout.cluster_size());
        let write = range.intersection(clusters).unwrap_or(range);
        let run = self.allocate(1)?;
        let data = match old {
            Cluster::Compressed(_) => layout.all_subclusters(),
            Cluster::Standard(standard) => standard.data,
        };
        let wide = write.widen(layout.unit(), u64::MAX);
        let unit = layout.unit();
        let first = guest + u64::from(data.trailing_zeros()) * unit;
        let last = guest + u64::from(32 - data.leading_zeros()) * unit;
        let hull = if data == 0 {
            wide
        } else {
            ByteRange::from_bounds(wide.offset().min(first), wide.end().max(last))
        };
        let host = run.first << layout.cluster_bits;
        Ok(Allocation { clusters, write, hull, host, run: Some(run), gaps: Vec::new(), old })
    }

    /// What is in the hull and not in the write. What lies beyond the disk, or below it where nothing is, is zero.
    fn gaps(&self, allocation: &Allocation, backing: u64) -> Vec<Segment> {
        let layout = self.layout;
        let Allocation { write, hull, old, .. } = allocation;
        let head = ByteRange::from_bounds(hull.offset(), write.offset());
        let tail = ByteRange::from_bounds(write.end(), hull.end());
        let mut gaps = Vec::new();
        for gap in [head, tail] {
            let inside = ByteRange::from_bounds(gap.offset(), gap.end().min(self.header.size));
            gaps.extend(segments_of(*old, layout, inside).into_iter().map(|mut segment| {
                if segment.source == Source::Backing && segment.range.offset() >= backing {
                    segment.source = Source::Zero;
                }
                segment
            }));
            let beyond = ByteRange::from_bounds(gap.offset().max(self.header.size), gap.end());
            if !beyond.is_empty() {
                gaps.push(Segment { range: beyond, source: Source::Zero });
            }
        }
        gaps
    }

    /// The data is there: changes the mapping.
    pub(super) fn finish_write(&mut self, allocation: &Allocation) -> Attempt<()> {
        let layout = self.layout;
        let Allocation { clusters, hull, host, old, .. } = allocation;
        self.check_sound()?;
        self.check_table(clusters.offset())?;
        let kept = match old {
            Cluster::Standard(standard) if standard.host == Some(*host) => standard.data,
            _ => 0,
        };
        let zero = match old {
            Cluster::Standard(standard) => standard.zero,
            Cluster::Compressed(_) => 0,
        };
        for guest in (clusters.offset()..clusters.end()).step_by(usize_from(layout.cluster_size())) {
            let cluster = ByteRange::from_bounds(guest, guest + layout.cluster_size());
            let part = cluster.intersection(*hull).unwrap_or(ByteRange::from_bounds(0, 0));
            let within = layout.in_cluster(part.offset());
            let bits = layout.subclusters_of(ByteRange::from_bounds(within, within + part.len()));
            let standard = Standard {
                host: Some(host + (guest - clusters.offset())),
                copied: true,
                data: kept | bits,
                zero: zero & !bits,
            };
            self.set_cluster(guest, standard.encode(layout))?;
        }
        // Again: a commit may have ended since the data was begun.
        self.note_copy(allocation);
        if allocation.run.is_some() {
            self.drop_cluster(*old, false);
        }
        Ok(())
    }

    /// The entry that said `old` no longer does: its host clusters are referenced once less.
    pub(crate) fn drop_cluster(&mut self, old: Cluster, discard: bool) {
        let layout = self.layout;
        if self.is_external() {
            return;
        }
        match old {
            // A haunted cluster is nobody's any more.
            Cluster::Standard(Standard { host: Some(host), .. }) if !self.haunted.contains_key(&host) => {
                self.drop_later([layout.cluster_index(host)], discard);
            }
            Cluster::Standard(_) => {}
            Cluster::Compressed(compressed) => {
                let (first, last) = compressed.host_clusters(layout);
                self.drop_later(first..=last, false);
            }
        }
    }

    /// A write that filled the cluster at `host` up was dropped and may still land there, with what was around it:
    /// it must not be filled up again, nor be anybody else's.
    pub(super) fn haunt(&mut self, host: u64) {
        let epoch = self.epochs.turn();
        self.haunted.insert(host, epoch);
    }

    /// The data could not be written: gives the clusters back, which nothing names.
    pub(super) fn abandon(&mut self, run: Run) -> Attempt<()> {
        for cluster in run.first..run.first + run.count {
            // Each obstacle comes before the first change.
            self.refcount(cluster)?;
        }
        for cluster in run.first..run.first + run.count {
            self.drop_reference(cluster)?;
        }
        Ok(())
    }
}
