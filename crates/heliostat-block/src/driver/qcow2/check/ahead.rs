//! [`clusters`]: reads tables ahead of who looks at them, several at once, so that a check waits for a disk as often
//! as a copy would. Only reads; memory is bounded. Called by whoever goes through many tables.

use futures_util::future::join_all;
use futures_util::stream::{self, Stream, StreamExt};

use super::super::error::FormatError;
use super::super::file::ImageFile;
use super::super::layout::Layout;
use super::counts::cluster_at;
use crate::buffer::Buffer;
use crate::convert::usize_from;

/// Tables that are read at once: enough to hide the latency of a remote disk.
const AT_ONCE_MAX: u64 = 32;
/// Their bytes at most; where one is longer than half of it, two all the same.
const BYTES_MAX: u64 = 4 << 20;

/// Reads clusters, in the order of `wanted`: each with what comes with it. `None` is nothing to read.
///
/// Nothing is being read while the caller has one in hand: a read may hold a block of the file, and whoever writes
/// there, or reads it too, would wait for a read that nobody polls.
pub(super) fn clusters<'a, T: 'a>(
    file: &'a ImageFile,
    layout: Layout,
    wanted: impl IntoIterator<Item = (Option<u64>, T), IntoIter: 'a>,
) -> impl Stream<Item = Result<(Option<Buffer>, T), FormatError>> + 'a {
    let at_once = usize_from((BYTES_MAX / layout.cluster_size()).clamp(2, AT_ONCE_MAX));
    let mut wanted = wanted.into_iter();
    let batches = std::iter::from_fn(move || {
        let batch: Vec<_> = wanted.by_ref().take(at_once).collect();
        (!batch.is_empty()).then_some(batch)
    });
    let read = move |(offset, with): (Option<u64>, T)| async move {
        Ok(match offset {
            Some(offset) => (Some(file.read(cluster_at(offset, layout)).await?), with),
            None => (None, with),
        })
    };
    stream::iter(batches).then(move |batch| join_all(batch.into_iter().map(read))).flat_map(stream::iter)
}
