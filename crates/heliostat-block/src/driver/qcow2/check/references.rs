//! [`References`]: how often each cluster is used, by what the tables say.
//!
//! Kept in pieces that are made where something is: memory follows what is in use, not how long a sparse file is.

use std::collections::BTreeMap;

use super::super::error::FormatError;
use super::super::layout::Layout;
use crate::convert::{u64_from, usize_from};
use crate::range::ByteRange;

/// Clusters that a piece counts.
const PIECE: u64 = 1024;
/// Bytes of memory that a piece takes, with its place in the map.
const PIECE_MEMORY: u64 = PIECE * 4 + 64;

/// What adding a reference has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Added {
    /// The region reaches beyond the end of the file; nothing was added.
    pub(super) is_outside: bool,
    /// How often a count was at its largest already.
    pub(super) overflows: u64,
}

/// How often each cluster is used.
pub(super) struct References {
    layout: Layout,
    file_len: u64,
    clusters: u64,
    pieces: Vec<Box<[u32]>>,
    places: BTreeMap<u64, usize>,
    /// Where the piece is that was used last: what follows is mostly beside it.
    last: (u64, usize),
    memory_max: u64,
    /// What others keep for the same check.
    memory_beside: u64,
}

impl References {
    pub(super) fn new(layout: Layout, file_len: u64, memory_max: u64) -> Self {
        Self {
            layout,
            file_len,
            clusters: layout.clusters_for(file_len),
            pieces: Vec::new(),
            places: BTreeMap::new(),
            last: (u64::MAX, 0),
            memory_max,
            memory_beside: 0,
        }
    }

    /// Clusters of the file; one that is begun counts.
    pub(super) const fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Says whether a region lies, but for less than a cluster, beyond the end of the file.
    pub(super) const fn is_outside(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        end >> 63 != 0 || end.saturating_sub(self.file_len) >= self.layout.cluster_size()
    }

    /// Adds `times` references to each cluster of a region.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(super) fn add(&mut self, offset: u64, len: u64, times: u64) -> Result<Added, FormatError> {
        let mut added = Added::default();
        if len == 0 || times == 0 {
            return Ok(added);
        }
        if self.is_outside(offset, len) {
            return Ok(Added { is_outside: true, overflows: 0 });
        }
        let layout = self.layout;
        let max = layout.refcount_max();
        for cluster in layout.cluster_index(offset)..=layout.cluster_index(offset + len - 1) {
            self.clusters = self.clusters.max(cluster + 1);
            let count = self.count_mut(cluster)?;
            let wanted = u64::from(*count) + times;
            added.overflows += wanted.saturating_sub(max.max(u64::from(*count)));
            *count = u32::try_from(wanted).unwrap_or(u32::MAX);
        }
        Ok(added)
    }

    /// Says that others keep `bytes` more.
    ///
    /// # Errors
    /// When that is too much.
    pub(super) fn spend(&mut self, bytes: u64) -> Result<(), FormatError> {
        self.memory_beside += bytes;
        self.check_memory()
    }

    fn check_memory(&self) -> Result<(), FormatError> {
        if u64_from(self.pieces.len()) * PIECE_MEMORY + self.memory_beside <= self.memory_max {
            return Ok(());
        }
        let mib = self.memory_max >> 20;
        Err(FormatError::Invalid(format!("checking this image would take more than {mib} MiB of memory")))
    }

    fn count_mut(&mut self, cluster: u64) -> Result<&mut u32, FormatError> {
        let key = cluster / PIECE;
        if self.last.0 != key {
            let place = match self.places.get(&key) {
                Some(place) => *place,
                None => {
                    self.pieces.push(vec![0; usize_from(PIECE)].into_boxed_slice());
                    self.check_memory()?;
                    self.places.insert(key, self.pieces.len() - 1);
                    self.pieces.len() - 1
                }
            };
            self.last = (key, place);
        }
        Ok(&mut self.pieces[self.last.1][usize_from(cluster % PIECE)])
    }

    /// What the reference count of a cluster must be: how often it is used, or the largest count that there is.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.uses(cluster).min(self.layout.refcount_max())
    }

    /// How often a cluster is used.
    pub(super) fn uses(&self, cluster: u64) -> u64 {
        let key = cluster / PIECE;
        let place = if self.last.0 == key { Some(&self.last.1) } else { self.places.get(&key) };
        place.map_or(0, |place| u64::from(self.pieces[*place][usize_from(cluster % PIECE)]))
    }

    /// How often each of these clusters, which are not many, must be counted; see [`References::get`].
    pub(super) fn of(&self, clusters: ByteRange) -> Vec<u64> {
        let max = self.layout.refcount_max();
        let mut counts = vec![0; usize_from(clusters.len())];
        for (key, place) in self.places.range(clusters.offset() / PIECE..clusters.end().div_ceil(PIECE)) {
            let start = key * PIECE;
            let (first, end) = (start.max(clusters.offset()), (start + PIECE).min(clusters.end()));
            let from = &self.pieces[*place][usize_from(first - start)..usize_from(end - start)];
            let to = &mut counts[usize_from(first - clusters.offset())..];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = u64::from(*from).min(max));
        }
        counts
    }

    /// Says whether there may be references among these clusters, from the first up to, not including, the last.
    pub(super) fn may_have(&self, clusters: ByteRange) -> bool {
        let (first, last) = (clusters.offset() / PIECE, clusters.end().div_ceil(PIECE));
        self.places.range(first..last).next().is_some()
    }

    /// The clusters that are used, from `from` on, with how often.
    pub(super) fn used_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> {
        self.places.range(from / PIECE..).flat_map(move |(key, place)| {
            let counts = self.pieces[*place].iter().enumerate();
            counts
                .map(move |(index, count)| (key * PIECE + u64_from(index), u64::from(*count)))
                .filter(move |(cluster, count)| *count > 0 && *cluster >= from)
        })
    }

    /// The cluster behind the last that is used.
    pub(super) fn end(&self) -> u64 {
        let last = self.places.iter().rev().find_map(|(key, place)| {
            let last = self.pieces[*place].iter().rposition(|count| *count > 0)?;
            Some(key * PIECE + u64_from(last) + 1)
        });
        last.unwrap_or(0)
    }
}
