//! [`clusters`]: reads tables ahead of who looks at them, several at once, so that a check waits for a disk as often
//! as a copy would. Only reads; memory is bounded. Called by whoever goes through many tables.

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
pub(super) fn clusters<'a, T: 'a>(
    file: &'a ImageFile,
    layout: Layout,
    wanted: impl IntoIterator<Item = (Option<u64>, T), IntoIter: 'a>,
) -> impl Stream<Item = Result<(Option<Buffer>, T), FormatError>> + 'a {
    let at_once = (BYTES_MAX / layout.cluster_size()).clamp(2, AT_ONCE_MAX);
    let reads = wanted.into_iter().map(move |(offset, with)| async move {
        Ok(match offset {
            Some(offset) => (Some(file.read(cluster_at(offset, layout)).await?), with),
            None => (None, with),
        })
    });
    stream::iter(reads).buffered(usize_from(at_once))
}
