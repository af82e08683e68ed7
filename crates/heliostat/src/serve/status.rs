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
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::tracked::Tracked;

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

    /// What the contexts with these ids say of `range`; each may stop early.
    ///
    /// # Errors
    /// What a node says.
    pub async fn describe(
        &self,
        tracked: &Tracked,
        range: ByteRange,
        ids: &[u32],
    ) -> Result<Vec<(u32, Vec<Described>)>, BlockError> {
        let mut said = Vec::with_capacity(ids.len());
        for id in ids {
            let source = Context::index_of(*id).and_then(|index| self.0.get(index));
            let described = match source {
                Some(Source::Depth) => {
                    let ends: Vec<u64> = chain(tracked.node()).skip(1).map(|node| node.size()).collect();
                    Described::depths(&tracked.node().map(range).await?, &ends)
                }
                Some(Source::Bitmap(bitmap)) => {
                    let found = bitmap.find(tracked.node());
                    let bits: Option<Arc<DirtyBitmap>> = found.and_then(|(_, bitmap)| bitmap.bits);
                    Described::dirty(range, bits.as_deref(), NBD_EXTENTS_MAX / ids.len())
                }
                // Ids are checked against what was offered.
                Some(Source::Allocation) | None => {
                    tracked.extents(range).await?.into_iter().map(Described::allocation).collect()
                }
            };
            said.push((*id, described));
        }
        Ok(said)
    }
}
