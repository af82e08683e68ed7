//! `heliostat compare A B`: whether two disks read the same, of whatever format their images are.
//!
//! What both sides say is zero is not read, so that sparse images take no time. Holes equal zeroes; where one
//! image is longer, the rest of it must be zeroes. Exit status as `qemu-img compare`: 0 same, 1 differ, 2
//! trouble.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use futures_util::future::try_join;
use futures_util::stream::{self, TryStreamExt};
use heliostat_block::buffer::{BufferPool, is_zero};
use heliostat_block::convert::{u64_from, usize_from};
use heliostat_block::error::BlockError;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Extent;
use heliostat_host::runtime::block_on;
use serde_json::json;

use super::disk::{Disk, FormatName, Look, Trust};
use super::output::{self, Form, Outcome};
use super::remote::Certificates;
use super::units;
use crate::daemon::Sharing;

/// Read at once: long enough for full speed, short enough to stay in a processor's cache.
const PIECE: u64 = 1 << 20;

/// Pieces on their way at once, from each image.
const PIECES_IN_FLIGHT: usize = 8;

/// Says whether two images read the same; exit status 0 when they do, 1 when not, 2 when that cannot be told
#[derive(Args, Debug)]
pub struct Compare {
    /// An image: a file, a block device, or the address of an NBD export
    a: PathBuf,
    /// The other one
    b: PathBuf,
    /// What the first image is: needed only for one that looks like another format
    #[arg(long, value_enum)]
    format_a: Option<FormatName>,
    /// What the second one is
    #[arg(long, value_enum)]
    format_b: Option<FormatName>,
    /// Images of different size are different, even if the rest is zeroes
    #[arg(long)]
    strict: bool,
    /// Compare even while another program writes to them; the answer may then mean nothing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Read from the disks, not from the host's page cache
    #[arg(long)]
    direct: bool,
    #[command(flatten)]
    trust: Trust,
    #[command(flatten)]
    certificates: Certificates,
}

/// What comparing has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Comparison {
    sizes: [u64; 2],
    /// Bytes of either image that were read.
    read: u64,
    /// The first byte that differs.
    difference: Option<u64>,
}

impl Compare {
    /// Compares, and says.
    ///
    /// # Errors
    /// When an image cannot be opened or read.
    pub fn run(&self, form: Form) -> Result<Outcome> {
        let sharing = if self.force_share { Sharing::Anything } else { Sharing::Still };
        let look = |format| Look { format, trust: &self.trust, direct: self.direct, sharing };
        let a = Disk::open(self.certificates.at(&self.a), &look(self.format_a))?;
        let b = Disk::open(self.certificates.at(&self.b), &look(self.format_b))?;
        let comparison = block_on(compare(&a.node, &b.node))
            .context("cannot start the I/O engine")?
            .with_context(|| format!("cannot compare {} and {}", self.a.display(), self.b.display()))?;
        let [size_a, size_b] = comparison.sizes;
        let sizes_count = self.strict && size_a != size_b;
        let same = comparison.difference.is_none() && !sizes_count;
        match form {
            Form::Json => output::json(&json!({
                "identical": same,
                "first-difference": comparison.difference,
                "size-a": size_a,
                "size-b": size_b,
                "bytes-read": comparison.read,
            }))?,
            Form::Text => output::result(&self.words(comparison, same))?,
        }
        Ok(if same { Outcome::Done } else { Outcome::No })
    }

    fn words(&self, comparison: Comparison, same: bool) -> String {
        let [size_a, size_b] = comparison.sizes;
        let sizes = format!(
            "{} has {} bytes, {} has {}",
            self.a.display(),
            units::count(size_a),
            self.b.display(),
            units::count(size_b)
        );
        match comparison.difference {
            Some(at) => format!("The images differ, first at byte {at} ({at:#x})."),
            None if !same => format!("The images differ in size: {sizes}."),
            None if size_a != size_b => {
                format!("The images are identical, but for zeroes at the end: {sizes}.")
            }
            None => format!(
                "The images are identical: {}, {} of data compared.",
                units::size(size_a),
                units::size(comparison.read)
            ),
        }
    }
}

/// Compares two nodes.
///
/// # Errors
/// When one of them cannot be read.
async fn compare(a: &Arc<Node>, b: &Arc<Node>) -> Result<Comparison, BlockError> {
    let walk = Walk { sides: [Side::new(a), Side::new(b)], at: 0 };
    let buffers = BufferPool::new(usize_from(PIECE), 2 * PIECES_IN_FLIGHT);
    let pieces = stream::try_unfold(walk, |mut walk| async move {
        Ok::<_, BlockError>(walk.next().await?.map(|piece| (piece, walk)))
    });
    let compared = pieces
        .map_ok(|piece| {
            let buffers = &buffers;
            async move { Ok((piece.range.len(), look_at(a, b, piece, buffers).await?)) }
        })
        .try_buffered(PIECES_IN_FLIGHT);
    let mut compared = std::pin::pin!(compared);
    let mut comparison = Comparison { sizes: [a.size(), b.size()], read: 0, difference: None };
    while let Some((len, difference)) = compared.try_next().await? {
        comparison.read += len;
        if difference.is_some() {
            comparison.difference = difference;
            break;
        }
    }
    Ok(comparison)
}

/// A range that must be read from one side or both; the other is known to be zero there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    range: ByteRange,
    is_data: [bool; 2],
}

/// Answers where the first difference in a piece is.
async fn look_at(
    a: &Arc<Node>,
    b: &Arc<Node>,
    piece: Piece,
    buffers: &BufferPool,
) -> Result<Option<u64>, BlockError> {
    let len = usize_from(piece.range.len());
    let read = |node: &Arc<Node>| {
        let node = Arc::clone(node);
        async move { node.enter().await.read(piece.range.offset(), buffers.take(len)).await }
    };
    let at = |index: usize| piece.range.offset() + u64_from(index);
    match piece.is_data {
        [true, true] => {
            let (a, b) = try_join(read(a), read(b)).await?;
            Ok(first_difference(&a, &b).map(at))
        }
        [true, false] => Ok(first_nonzero(&read(a).await?).map(at)),
        [false, true] => Ok(first_nonzero(&read(b).await?).map(at)),
        [false, false] => Ok(None),
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    // Equal is by far the most common, and comparing whole slices is what processors do best.
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) {
        return None;
    }
    bytes.iter().position(|byte| *byte != 0)
}

/// Goes through both images at once.
struct Walk {
    sides: [Side; 2],
    at: u64,
}

/// Where one image is data.
struct Side {
    node: Arc<Node>,
    ahead: VecDeque<Extent>,
}

impl Walk {
    /// The next piece that must be read; passes over what is zero on both sides.
    async fn next(&mut self) -> Result<Option<Piece>, BlockError> {
        let [a, b] = &mut self.sides;
        let end = a.node.size().max(b.node.size());
        while self.at < end {
            let (a_is_data, a_end) = a.at(self.at).await?;
            let (b_is_data, b_end) = b.at(self.at).await?;
            let until = a_end.min(b_end).min(end);
            if !a_is_data && !b_is_data {
                self.at = until;
                continue;
            }
            let range = ByteRange::from_bounds(self.at, until.min(self.at + PIECE));
            self.at = range.end();
            return Ok(Some(Piece { range, is_data: [a_is_data, b_is_data] }));
        }
        Ok(None)
    }
}

impl Side {
    fn new(node: &Arc<Node>) -> Self {
        Self { node: Arc::clone(node), ahead: VecDeque::new() }
    }

    /// Says whether byte `at` may be anything but zero, and up to where that is so. Zeroes follow the end.
    async fn at(&mut self, at: u64) -> Result<(bool, u64), BlockError> {
        if at >= self.node.size() {
            return Ok((false, u64::MAX));
        }
        while self.ahead.front().is_some_and(|extent| extent.range.end() <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            let rest = ByteRange::from_bounds(at, self.node.size());
            self.ahead = self.node.enter().await.extents(rest).await?.into();
        }
        Ok(match self.ahead.front() {
            Some(extent) => (extent.status.may_hold_data(), extent.range.end()),
            None => (true, self.node.size()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        let mut a = vec![0_u8; 5000];
        let b = a.clone();
        assert_eq!(first_difference(&a, &b), None);
        assert_eq!(first_nonzero(&a), None);
        a[4999] = 1;
        a[4000] = 1;
        assert_eq!(first_difference(&a, &b), Some(4000));
        assert_eq!(first_nonzero(&a), Some(4000));
    }
}
