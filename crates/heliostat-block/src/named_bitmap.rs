//! [`NamedBitmap`]: a dirty bitmap that an operator made, or an image brought; and [`Watchers`]: all on one node that
//! hears of writes.
//!
//! What is changed here is changed at one moment: under the lock that each mark is made under, of all nodes concerned
//! at once. So each write's mark comes wholly before a change, or wholly after it. A write is marked when it has ended
//! and before its client hears of it. So whoever had its answer before the change was asked for counts as before it, and
//! what is in flight as one or the other, but in all bitmaps of the change alike.
//!
//! Nothing here does I/O or waits for a request. While a change is made, the answers to writes wait: for as long as it
//! takes to go through the set bits of what is merged; clearing takes no time. Called by `node`, and by the control
//! plane through [`change`].

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

#[cfg(loom)]
use loom::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::dirty_bitmap::{DirtyBitmap, InvalidGranularity};
use crate::job::doubling::Doubling;
use crate::node::Node;
use crate::range::ByteRange;

/// A dirty bitmap with a name, as it is at some moment.
#[derive(Clone, Debug)]
pub struct NamedBitmap {
    /// Its name; one of each on a node.
    pub name: String,
    /// Bytes a bit.
    pub granularity: u32,
    /// Its bits. `None` where they cannot be used: an image has not saved them, or they are of a kind that is not known.
    /// Another one takes their place when it is cleared, and when the node gets another size.
    pub bits: Option<Arc<DirtyBitmap>>,
    /// It hears of writes.
    pub recording: bool,
    /// A job uses it, and nobody else may.
    pub busy: bool,
    /// It is written to the image when that is closed.
    pub persistent: bool,
    /// The image that it is in is only read.
    pub read_only: bool,
    /// The image's name for it, where it came from there: names in images need not be text.
    pub(crate) stored_as: Option<Vec<u8>>,
}

impl NamedBitmap {
    /// Makes one that is on no node yet.
    #[must_use]
    pub fn new(name: String, bits: Arc<DirtyBitmap>) -> Self {
        Self {
            name,
            granularity: bits.granularity(),
            bits: Some(bits),
            recording: true,
            busy: false,
            persistent: false,
            read_only: false,
            stored_as: None,
        }
    }

    /// Says whether it is what the image has under `name`.
    #[must_use]
    pub fn is_stored_as(&self, name: &[u8]) -> bool {
        self.stored_as.as_deref() == Some(name)
    }

    /// Its name and its bits for a disk of `size` bytes; those that it gains are not set. `None` where it has none.
    ///
    /// # Errors
    /// As [`DirtyBitmap::new`].
    pub(crate) fn resized(
        &self,
        size: u64,
    ) -> Result<Option<(String, Arc<DirtyBitmap>)>, InvalidGranularity> {
        let Some(old) = &self.bits else { return Ok(None) };
        let bits = DirtyBitmap::new(size, self.granularity)?;
        bits.merge(old);
        Ok(Some((self.name.clone(), Arc::new(bits))))
    }

    /// Fits a disk of `size` bytes, of which all is dirty that this one did not have: what is there is not known.
    fn follow_to(&mut self, size: u64) {
        let before = self.bits.as_ref().map_or(size, |bits| bits.size());
        self.resize(size);
        if let Some(bits) = self.bits.as_ref().filter(|_| before < size) {
            bits.mark(ByteRange::from_bounds(before, size));
        }
    }

    fn resize(&mut self, size: u64) {
        if self.bits.as_ref().is_some_and(|bits| bits.size() != size) {
            self.bits = self.resized(size).ok().flatten().map(|(_, bits)| bits);
        }
    }

    /// What the image has to call it.
    pub(crate) fn raw_name(&self) -> &[u8] {
        self.stored_as.as_deref().unwrap_or(self.name.as_bytes())
    }
}

/// What becomes of a bitmap.
#[derive(Clone)]
pub enum Change {
    /// It is there from now on. Its name must be free.
    Add(NamedBitmap),
    /// It is gone.
    Remove(String),
    /// Nothing is dirty: these bits, all clear and of the same shape, take the place of its own.
    Clear(String, Arc<DirtyBitmap>),
    /// It hears of writes, or no longer does.
    Record(String, bool),
    /// It is a job's, or no longer is.
    Busy(String, bool),
    /// It also has what others have, each named with its node.
    Merge(String, Vec<(Arc<Node>, String)>),
}

/// Makes all `changes`, each to a bitmap of a node, in their order and at one moment. What they name and is not there is
/// left out: whoever asks has looked, and lets nobody else change bitmaps meanwhile.
pub fn change(changes: &[(Arc<Node>, Change)]) {
    let mut nodes = BTreeMap::new();
    for (node, change) in changes {
        nodes.insert(key(node), node);
        if let Change::Merge(_, from) = change {
            nodes.extend(from.iter().map(|(node, _)| (key(node), node)));
        }
    }
    // In the order of their keys, as everybody who takes several does.
    let mut held: BTreeMap<_, _> =
        nodes.into_iter().map(|(key, node)| (key, node.watchers_of().write())).collect();
    for (node, change) in changes {
        let from: Vec<_> = match change {
            Change::Merge(_, from) => {
                from.iter().filter_map(|(node, name)| held.get(&key(node))?.bits(name)).collect()
            }
            _ => Vec::new(),
        };
        if let Some(watchers) = held.get_mut(&key(node)) {
            watchers.apply(change, &from);
        }
    }
}

/// Lets the bitmaps of `source` follow to `target`, at one moment. Where a name is there already, that one has the marks
/// of both from then on. Nobody may write either meanwhile. What was persistent stays so where the target can store it.
pub(crate) fn follow(source: &Arc<Node>, target: &Arc<Node>) {
    let can_store = target.can_store_bitmaps();
    for bitmap in source.named_bitmaps() {
        let mut bitmap = NamedBitmap {
            persistent: bitmap.persistent && can_store,
            read_only: false,
            stored_as: None,
            ..bitmap
        };
        bitmap.follow_to(target.size());
        let name = bitmap.name.clone();
        let there = target.named_bitmap(&name);
        let mut changes = Vec::new();
        match &there {
            Some(there) if there.bits.is_some() && bitmap.bits.is_some() => {
                let is_recording = bitmap.recording;
                // What is merged has the marks of what the target is longer by, too.
                changes.push((Arc::clone(source), Change::Remove(name.clone())));
                changes.push((Arc::clone(source), Change::Add(bitmap)));
                changes.push((
                    Arc::clone(target),
                    Change::Merge(name.clone(), vec![(Arc::clone(source), name.clone())]),
                ));
                if is_recording {
                    changes.push((Arc::clone(target), Change::Record(name.clone(), true)));
                }
            }
            // Bits that nobody can use are of no use to another image.
            _ if bitmap.bits.is_none() => {}
            _ => {
                changes.push((Arc::clone(target), Change::Remove(name.clone())));
                changes.push((Arc::clone(target), Change::Add(bitmap)));
            }
        }
        changes.push((Arc::clone(source), Change::Remove(name)));
        change(&changes);
    }
}

fn key(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node).addr()
}

/// All that hear of a node's writes.
#[derive(Default)]
pub(crate) struct Watchers(RwLock<Watching>);

/// The same behind the lock.
#[derive(Default)]
pub(crate) struct Watching {
    /// In the order in which they came.
    named: Vec<NamedBitmap>,
    doubling: Option<Arc<Doubling>>,
}

impl Watchers {
    pub(crate) fn with(named: Vec<NamedBitmap>) -> Self {
        Self(RwLock::new(Watching { named, doubling: None }))
    }

    fn read(&self) -> RwLockReadGuard<'_, Watching> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Watching> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn named(&self) -> Vec<NamedBitmap> {
        self.read().named.clone()
    }

    pub(crate) fn doubling(&self) -> Option<Arc<Doubling>> {
        self.read().doubling.clone()
    }

    pub(crate) fn set_doubling(&self, doubling: Option<Arc<Doubling>>) {
        self.write().doubling = doubling;
    }

    /// Tells everybody of a write that has ended, but for the mirror that doubles it.
    pub(crate) fn mark(&self, range: ByteRange, doubled_by: Option<&Arc<Doubling>>) {
        let watching = self.read();
        for bitmap in watching.named.iter().filter(|bitmap| bitmap.recording) {
            if let Some(bits) = &bitmap.bits {
                bits.mark(range);
            }
        }
        if let Some(doubling) = &watching.doubling
            && doubled_by.is_none_or(|by| !Arc::ptr_eq(by, doubling))
        {
            doubling.mark(range);
        }
    }
}

impl Watching {
    fn find(&mut self, name: &str) -> Option<&mut NamedBitmap> {
        self.named.iter_mut().find(|bitmap| bitmap.name == name)
    }

    fn bits(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        self.named.iter().find(|bitmap| bitmap.name == name)?.bits.clone()
    }

    /// Makes all bitmaps as long as a disk of `size` bytes; bits that it gains are not set. One for which there is no
    /// memory is of no use any more, and says so.
    pub(crate) fn resize(&mut self, size: u64) {
        for bitmap in &mut self.named {
            bitmap.resize(size);
        }
    }

    /// Puts other bits in the place of a bitmap's, for a node of another size.
    pub(crate) fn replace_bits(&mut self, name: &str, bits: Arc<DirtyBitmap>) {
        if let Some(bitmap) = self.find(name) {
            bitmap.bits = Some(bits);
        }
    }

    fn apply(&mut self, change: &Change, from: &[Arc<DirtyBitmap>]) {
        match change {
            Change::Add(bitmap) => self.named.push(bitmap.clone()),
            Change::Remove(name) => self.named.retain(|bitmap| bitmap.name != *name),
            Change::Clear(name, fresh) => self.replace_bits(name, Arc::clone(fresh)),
            Change::Record(name, recording) => {
                self.find(name).into_iter().for_each(|bitmap| bitmap.recording = *recording);
            }
            Change::Busy(name, busy) => {
                self.find(name).into_iter().for_each(|bitmap| bitmap.busy = *busy);
            }
            Change::Merge(name, _) => {
                if let Some(bits) = self.bits(name) {
                    from.iter().filter(|from| !Arc::ptr_eq(from, &bits)).for_each(|from| bits.merge(from));
                }
            }
        }
    }
}
