//! [`Contexts`]: what clients of an export may ask of its ranges, and the answers.
//!
//! A bitmap is looked up by its name at each request: a mirror that ends takes the export's bitmaps along to its
//! target. Called where requests are carried out, and by the front end, which names them to clients.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use heliostat_block::dirty_bitmap::DirtyBitmap;
use heliostat_block::error::BlockError;
use heliostat_block::limits::NBD_EXTENTS_MAX;
use heliostat_block::named_bitmap::NamedBitmap;
use heliostat_block::nbd::context::{Context, Described};
use heliostat_block::nbd::request::ExtentsWanted;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::tracked::Tracked;

/// How far is looked at first for a client that wants one piece: what a guest's file system has in one place mostly.
const FIRST_LOOK: u64 = 64 << 10;

/// How much further each look goes than the one before: four more for all of what 32 bits can ask for.
const LOOK_GROWTH: u64 = 16;

/// A bitmap that clients may ask for.
#[derive(Clone, Debug)]
pub struct OfferedBitmap {
    /// Its name.
    pub name: String,
    /// The node that it hung on when it was offered.
    pub node: Weak<Node>,
}

impl OfferedBitmap {
    /// The node that it hangs on now, and what it is: where it was offered, or else in the chain from `top` on.
    #[must_use]
    pub fn find(&self, top: &Arc<Node>) -> Option<(Arc<Node>, NamedBitmap)> {
        let there = |node: Arc<Node>| node.named_bitmap(&self.name).map(|bitmap| (node, bitmap));
        self.node.upgrade().and_then(there).or_else(|| find_in_chain(top, &self.name))
    }
}

/// Finds the bitmap of that name that is nearest to the top of a chain of nodes.
#[must_use]
pub fn find_in_chain(top: &Arc<Node>, name: &str) -> Option<(Arc<Node>, NamedBitmap)> {
    chain(top).find_map(|node| node.named_bitmap(name).map(|bitmap| (node, bitmap)))
}

/// A node and what it stands on, from the top on.
fn chain(top: &Arc<Node>) -> impl Iterator<Item = Arc<Node>> {
    std::iter::successors(Some(Arc::clone(top)), |node| node.backing())
}

/// One context, and where its answers come from.
#[derive(Debug)]
enum Source {
    Allocation,
    Depth,
    Bitmap(OfferedBitmap),
}

/// What clients may ask of the ranges of an export.
#[derive(Debug)]
pub struct Contexts(Vec<Source>);

impl Default for Contexts {
    /// `base:allocation` alone.
    fn default() -> Self {
        Self::new(Depth::Untold, Vec::new())
    }
}

/// Whether clients may ask in which layer a range is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depth {
    /// They may not.
    #[default]
    Untold,
    /// They may.
    Told,
}

impl Contexts {
    /// `base:allocation`, and these. Of bitmaps with one name, the first.
    #[must_use]
    pub fn new(depth: Depth, bitmaps: Vec<OfferedBitmap>) -> Self {
        let mut list = vec![Source::Allocation];
        if depth == Depth::Told {
            list.push(Source::Depth);
        }
        let mut names = BTreeSet::new();
        let first = bitmaps.into_iter().filter(|bitmap| names.insert(bitmap.name.clone()));
        list.extend(first.map(Source::Bitmap));
        Self(list)
    }

    /// The same for the handshake, in the order of their ids.
    #[must_use]
    pub fn offered(&self) -> Vec<Context> {
        let offered = self.0.iter().map(|source| match source {
            Source::Allocation => Context::Allocation,
            Source::Depth => Context::Depth,
            Source::Bitmap(bitmap) => Context::Bitmap(bitmap.name.clone()),
        });
        offered.collect()
    }

    /// The bitmaps among them.
    pub fn bitmaps(&self) -> impl Iterator<Item = &OfferedBitmap> {
        self.0.iter().filter_map(|source| match source {
            Source::Bitmap(bitmap) => Some(bitmap),
            Source::Allocation | Source::Depth => None,
        })
    }

    /// What the contexts with these ids say of `range`; each may stop early, and with [`ExtentsWanted::One`] does so
    /// soon behind its first piece.
    ///
    /// # Errors
    /// What a node says.
    pub async fn describe(
        &self,
        tracked: &Tracked,
        range: ByteRange,
        wanted: ExtentsWanted,
        ids: &[u32],
    ) -> Result<Vec<(u32, Vec<Described>)>, BlockError> {
        let mut said = Vec::with_capacity(ids.len());
        for id in ids {
            // Ids are checked against what was offered.
            let index = Context::index_of(*id);
            let source = index.and_then(|index| self.0.get(index)).unwrap_or(&Source::Allocation);
            let described = match wanted {
                ExtentsWanted::One => vec![source.first(tracked, range).await?],
                ExtentsWanted::Many => source.describe(tracked, range, NBD_EXTENTS_MAX / ids.len()).await?,
            };
            said.push((*id, described));
        }
        Ok(said)
    }
}

impl Source {
    /// What it says of `range`: of a bitmap at most `max` pieces, of nodes as many as they say at once.
    async fn describe(
        &self,
        tracked: &Tracked,
        range: ByteRange,
        max: usize,
    ) -> Result<Vec<Described>, BlockError> {
        match self {
            Self::Depth => {
                let ends: Vec<u64> = chain(tracked.node()).skip(1).map(|node| node.size()).collect();
                Ok(Described::depths(&tracked.node().map(range).await?, &ends))
            }
            Self::Bitmap(bitmap) => {
                let found = bitmap.find(tracked.node());
                let bits: Option<Arc<DirtyBitmap>> = found.and_then(|(_, bitmap)| bitmap.bits);
                Ok(Described::dirty(range, bits.as_deref(), max))
            }
            Self::Allocation => {
                Ok(tracked.extents(range).await?.into_iter().map(Described::allocation).collect())
            }
        }
    }

    /// What it says of the start of `range`, which is not empty. Looks a short way first and then ever further, as
    /// long as nothing else comes: so one piece costs no look at thousands behind it.
    async fn first(&self, tracked: &Tracked, range: ByteRange) -> Result<Described, BlockError> {
        let mut first = Described { range: ByteRange::from_bounds(range.offset(), range.offset()), flags: 0 };
        let mut len = FIRST_LOOK;
        while first.range.end() < range.end() {
            let at = first.range.end();
            let look = ByteRange::from_bounds(at, at.saturating_add(len).min(range.end()));
            for piece in self.describe(tracked, look, 1).await? {
                if first.range.is_empty() {
                    first.flags = piece.flags;
                }
                if piece.flags != first.flags || piece.range.offset() != first.range.end() {
                    return Ok(first);
                }
                first.range = ByteRange::from_bounds(range.offset(), piece.range.end());
            }
            // Who stops early has had enough.
            if first.range.end() < look.end() {
                break;
            }
            len = len.saturating_mul(LOOK_GROWTH);
        }
        Ok(first)
    }
}
