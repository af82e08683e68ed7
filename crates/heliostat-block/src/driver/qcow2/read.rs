//! Reading: where each byte is, under the lock; then the I/O, side by side, without it.

use std::io;

use futures_util::StreamExt;
use futures_util::stream;

use super::compressed::decompress;
use super::entry::{Cluster, Compressed, Standard};
use super::layout::Layout;
use super::state::{Attempt, State};
use super::{Qcow2, Visit};
use crate::buffer::Buffer;
use crate::convert::{u64_from, usize_from};
use crate::debug_event::DebugEvent;
use crate::range::ByteRange;
use crate::storage::IoFuture;

/// Pieces of one request that are read side by side.
const PIECES_AT_ONCE: usize = 16;

/// Where bytes of the virtual disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// In a file, from this offset on: the image or its external data file.
    Host(u64),
    /// Nowhere: they are zero, and this image says so.
    Zero,
    /// Not in this image.
    Backing,
    /// In a compressed cluster.
    Compressed(Compressed),
}

/// A part of the virtual disk whose bytes are in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: ByteRange,
    pub(crate) source: Source,
}

/// Where the bytes of `part` are, a part of the guest cluster of which `cluster` is known.
pub(crate) fn segments_of(cluster: Cluster, layout: Layout, part: ByteRange) -> Vec<Segment> {
    let standard = match cluster {
        Cluster::Compressed(compressed) => {
            return vec![Segment { range: part, source: Source::Compressed(compressed) }];
        }
        Cluster::Standard(standard) => standard,
    };
    let mut found = Vec::new();
    let mut from = part.offset();
    while from < part.end() {
        let unit_end = (from & !(layout.unit() - 1)) + layout.unit();
        let range = ByteRange::from_bounds(from, unit_end.min(part.end()));
        push(&mut found, Segment { range, source: source_of(standard, layout, from) });
        from = range.end();
    }
    found
}

fn source_of(standard: Standard, layout: Layout, at: u64) -> Source {
    let within = layout.in_cluster(at);
    let bit = layout.subclusters_of(ByteRange::from_bounds(within, within + 1));
    match standard.host {
        Some(host) if standard.data & bit != 0 => Source::Host(host + within),
        _ if standard.zero & bit != 0 => Source::Zero,
        _ => Source::Backing,
    }
}

/// Appends a segment, as part of the last one where the two are one. Compressed ones stay apart: each stands for one
/// cluster, also where a damaged image has two entries for the same bytes.
pub(crate) fn push(segments: &mut Vec<Segment>, next: Segment) {
    if let Some(last) = segments.last_mut() {
        let follows = match (last.source, next.source) {
            (Source::Host(one), Source::Host(other)) => one + last.range.len() == other,
            (Source::Zero, Source::Zero) | (Source::Backing, Source::Backing) => true,
            _ => false,
        };
        if follows && last.range.end() == next.range.offset() {
            last.range = ByteRange::from_bounds(last.range.offset(), next.range.end());
            return;
        }
    }
    segments.push(next);
}

impl State {
    /// Where the bytes of `range` are.
    pub(crate) fn plan_read(&mut self, range: ByteRange) -> Attempt<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut from = range.offset();
        while from < range.end() {
            from = self.look(ByteRange::from_bounds(from, range.end()), &mut segments)?;
        }
        Ok(segments)
    }

    /// Looks where the first bytes of `range` are; says how far it looked.
    pub(crate) fn look(&mut self, range: ByteRange, segments: &mut Vec<Segment>) -> Attempt<u64> {
        let layout = self.layout;
        let from = range.offset();
        if self.l1_entry(from).table(layout)?.is_none() {
            let end = ((layout.l1_index(from) + 1).saturating_mul(layout.l2_coverage())).min(range.end());
            push(segments, Segment { range: ByteRange::from_bounds(from, end), source: Source::Backing });
            return Ok(end);
        }
        let cluster = self.cluster(from)?;
        let end = (layout.cluster_start(from) + layout.cluster_size()).min(range.end());
        for segment in segments_of(cluster, layout, ByteRange::from_bounds(from, end)) {
            push(segments, segment);
        }
        Ok(end)
    }
}

impl Qcow2 {
    pub(crate) fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_, Buffer> {
        let range = ByteRange::from_bounds(offset, offset + u64_from(buffer.len()));
        let planned = {
            let mut state = self.lock();
            state.plan_read(range).map(|segments| (segments, state.epochs.enter()))
        };
        let Ok((segments, epoch)) = planned else {
            return IoFuture::pending(self.read_when_loaded(range, buffer));
        };
        let visit = Visit { driver: self, epoch };
        if let [Segment { source: Source::Host(host), .. }] = segments[..] {
            if let Some(held_up) = self.storage().raise(DebugEvent::ReadAio) {
                return IoFuture::pending(async move {
                    let _visit = visit;
                    held_up.await;
                    self.data().read_into(host, buffer).await
                });
            }
            return match self.data().read_into(host, buffer) {
                ready @ IoFuture::Ready(_) => ready,
                IoFuture::Pending(reading) => IoFuture::pending(async move {
                    let _visit = visit;
                    reading.await
                }),
            };
        }
        IoFuture::pending(async move {
            let _visit = visit;
            self.read_segments(&segments, buffer).await
        })
    }

    async fn read_when_loaded(&self, range: ByteRange, buffer: Buffer) -> io::Result<Buffer> {
        let plan = |state: &mut State| Ok((state.plan_read(range)?, state.epochs.enter()));
        let (segments, epoch) = self.attempt(plan).await?;
        let _visit = Visit { driver: self, epoch };
        self.read_segments(&segments, buffer).await
    }

    /// Fills `buffer` with what `segments`, which follow each other, say.
    pub(crate) async fn read_segments(&self, segments: &[Segment], buffer: Buffer) -> io::Result<Buffer> {
        if let [segment] = segments {
            return self.read_segment(*segment, buffer).await;
        }
        let mut buffer = buffer;
        let start = segments.first().map_or(0, |segment| segment.range.offset());
        let place = |range: ByteRange| usize_from(range.offset() - start)..usize_from(range.end() - start);
        let reads = segments.iter().filter(|segment| segment.source != Source::Zero).map(|segment| async {
            let piece = Buffer::zeroed(usize_from(segment.range.len()));
            (segment.range, self.read_segment(*segment, piece).await)
        });
        for zero in segments.iter().filter(|segment| segment.source == Source::Zero) {
            buffer[place(zero.range)].fill(0);
        }
        let mut failed = Ok(());
        let mut reads = stream::iter(reads).buffer_unordered(PIECES_AT_ONCE);
        // All are awaited, also after an error: what was started runs to its end here.
        while let Some((range, read)) = reads.next().await {
            match read {
                Ok(piece) => buffer[place(range)].copy_from_slice(&piece),
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed.map(|()| buffer)
    }

    async fn read_segment(&self, segment: Segment, mut buffer: Buffer) -> io::Result<Buffer> {
        match segment.source {
            Source::Host(host) => {
                self.raise(DebugEvent::ReadAio).await;
                self.data().read_into(host, buffer).await
            }
            Source::Zero => {
                buffer.fill(0);
                Ok(buffer)
            }
            Source::Backing => self.read_backing(segment.range, buffer).await,
            Source::Compressed(compressed) => {
                self.raise(DebugEvent::ReadCompressed).await;
                let data = self
                    .file
                    .read(ByteRange::from_bounds(compressed.offset, compressed.offset + compressed.len))
                    .await?;
                let size = usize_from(self.layout.cluster_size());
                let cluster = decompress(&data, self.compression, size, compressed.offset)?;
                let start = usize_from(self.layout.in_cluster(segment.range.offset()));
                buffer.copy_from_slice(&cluster[start..start + usize_from(segment.range.len())]);
                Ok(buffer)
            }
        }
    }

    /// Reads what is below this image. Where nothing is, there are zeroes.
    async fn read_backing(&self, range: ByteRange, mut buffer: Buffer) -> io::Result<Buffer> {
        let Some(backing) = self.backing() else {
            buffer.fill(0);
            return Ok(buffer);
        };
        self.raise(DebugEvent::ReadBackingAio).await;
        let inside = ByteRange::from_bounds(range.offset(), range.end().min(backing.size()));
        if inside == range {
            return backing.read_blocks(range.offset(), buffer).await.map_err(io::Error::from);
        }
        buffer.fill(0);
        if !inside.is_empty() {
            let piece = Buffer::zeroed(usize_from(inside.len()));
            let piece = backing.read_blocks(inside.offset(), piece).await.map_err(io::Error::from)?;
            buffer[..piece.len()].copy_from_slice(&piece);
        }
        Ok(buffer)
    }
}
