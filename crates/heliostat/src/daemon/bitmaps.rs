//! Named dirty bitmaps: added, removed, cleared, switched on and off, merged; several of these at one moment, all or
//! none.
//!
//! What is asked is first tried on a list of what there is, in its order, so that each refusal is the one that the
//! action would meet on its own; when all has passed, it is done, and nothing of that can fail. It decides nothing of
//! what a bitmap hears: that is the node's.

use std::sync::Arc;

use heliostat_block::dirty_bitmap::DirtyBitmap;
use heliostat_block::error::InvalidGranularity;
use heliostat_block::limits::GRANULARITY_DEFAULT;
use heliostat_block::named_bitmap::{Change, NamedBitmap, change};
use heliostat_block::node::Node;

use super::{Daemon, DaemonError};

/// The most bitmaps on one node: each write goes through all of them.
const BITMAPS_MAX: usize = 128;

/// The most memory of one node's bitmaps: what an image may ask for, too.
const MEMORY_MAX: u64 = 256 << 20;

/// The finest granularity that a node's clusters make the default, as QEMU has it.
const GRANULARITY_DEFAULT_MIN: u32 = 4 << 10;

/// The longest name, as QEMU has it.
const NAME_MAX: usize = 1023;

/// A bitmap that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapSpec {
    /// On which node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes a bit; default: the node's clusters, from 4 to 64 KiB.
    pub granularity: Option<u32>,
    /// It is kept in the image.
    pub persistent: bool,
    /// It hears of no writes at first.
    pub disabled: bool,
}

/// What is to become of a bitmap, each by its node and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    /// It is made.
    Add(BitmapSpec),
    /// It goes, also from its image.
    Remove(String, String),
    /// Nothing is dirty in it any more.
    Clear(String, String),
    /// It hears of writes from now on.
    Enable(String, String),
    /// It hears of writes no more.
    Disable(String, String),
    /// It also has what others have.
    Merge(String, String, Vec<(String, String)>),
}

/// Why a bitmap is not to be had. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// It has no name.
    #[error("Bitmap name cannot be empty")]
    NameEmpty,
    /// Its name is too long.
    #[error("Bitmap name too long: {0}")]
    NameTooLong(String),
    /// A granularity that is none.
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity,
    /// There is one of that name.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// The node has no place for it.
    #[error("Can't store persistent bitmaps to {0}: Operation not supported")]
    CannotStore(String),
    /// The image has no place for it.
    #[error(
        "Can't make bitmap '{name}' persistent in '{node}': Cannot store dirty bitmaps in qcow2 v2 files"
    )]
    Version2 {
        /// The bitmap.
        name: String,
        /// The node.
        node: String,
    },
    /// No such node.
    #[error("Node '{0}' not found")]
    NodeNotFound(String),
    /// No such bitmap.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// No such bitmap in a chain of nodes.
    #[error("Bitmap '{0}' is not found")]
    NotInChain(String),
    /// It hears of writes to a node that an export says nobody writes.
    #[error("Enabled bitmap '{0}' incompatible with readonly export")]
    Changing(String),
    /// A job uses it, or an export.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// Its bits were not saved.
    #[error("Bitmap '{0}' is inconsistent and cannot be used")]
    Inconsistent(String),
    /// The image that it is in is only read.
    #[error("Bitmap '{0}' is readonly and cannot be modified")]
    ReadOnly(String),
    /// They are of disks of different sizes.
    #[error(
        "Bitmaps are of different sizes (destination size is {into}, source size is {from}) and can't be merged"
    )]
    Sizes {
        /// The size of the disk of the one.
        into: u64,
        /// And of the other.
        from: u64,
    },
    /// There is no memory for so many bits.
    #[error(transparent)]
    Memory(#[from] InvalidGranularity),
    /// More bits than a node may have.
    #[error("the bitmaps of node '{node}' would take more than {} MiB of memory", MEMORY_MAX >> 20)]
    TooLarge {
        /// The node.
        node: String,
    },
}

/// What may be asked of a bitmap that is looked up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Its bits change.
    Change,
    /// Its bits are read, or it is switched on or off.
    Look,
    /// It goes.
    Remove,
}

/// What there would be, and how it comes to that.
#[derive(Default)]
pub(super) struct Plan {
    nodes: Vec<(Arc<Node>, Vec<NamedBitmap>)>,
    changes: Vec<(Arc<Node>, Change)>,
}

impl Daemon {
    /// Does all of `actions` at one moment, or nothing.
    ///
    /// # Errors
    /// Of the first action that cannot be done.
    pub fn change_bitmaps(&self, actions: &[BitmapAction]) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let mut plan = Plan::default();
        actions.iter().try_for_each(|action| plan.add(self, action))?;
        plan.carry_out();
        Ok(())
    }
}

impl BitmapAction {
    /// The nodes that it names.
    pub(super) fn nodes(&self) -> Vec<&str> {
        match self {
            Self::Add(spec) => vec![&spec.node],
            Self::Remove(node, _) | Self::Clear(node, _) | Self::Enable(node, _) | Self::Disable(node, _) => {
                vec![node]
            }
            Self::Merge(node, _, from) => {
                std::iter::once(node).chain(from.iter().map(|(node, _)| node)).map(String::as_str).collect()
            }
        }
    }
}

impl Plan {
    /// Makes the changes, at one moment.
    pub(super) fn carry_out(&self) {
        change(&self.changes);
    }

    /// What is to be changed at that moment, for who makes it.
    pub(super) fn changes(&self) -> &[(Arc<Node>, Change)] {
        &self.changes
    }

    /// Adds an action to what was planned before.
    pub(super) fn add(&mut self, daemon: &Daemon, action: &BitmapAction) -> Result<(), DaemonError> {
        match action {
            BitmapAction::Add(spec) => self.add_new(daemon, spec),
            BitmapAction::Remove(node, name) => {
                let (node, bitmap) = self.find(daemon, node, name, Use::Remove)?;
                // As with QEMU it is only hidden until all has passed: its name is not free.
                bitmap.busy = true;
                self.changes.push((node, Change::Remove(name.clone())));
                Ok(())
            }
            BitmapAction::Clear(node, name) => {
                let (node, bitmap) = self.find(daemon, node, name, Use::Change)?;
                let fresh =
                    Arc::new(DirtyBitmap::new(node.size(), bitmap.granularity).map_err(BitmapError::Memory)?);
                self.changes.push((node, Change::Clear(name.clone(), fresh)));
                Ok(())
            }
            BitmapAction::Enable(node, name) | BitmapAction::Disable(node, name) => {
                let recording = matches!(action, BitmapAction::Enable(..));
                let (node, _) = self.find(daemon, node, name, Use::Look)?;
                self.changes.push((node, Change::Record(name.clone(), recording)));
                Ok(())
            }
            BitmapAction::Merge(node, into, from) => {
                let (node, _) = self.find(daemon, node, into, Use::Change)?;
                let mut sources = Vec::new();
                for (source, name) in from {
                    let (source, _) = self.find(daemon, source, name, Use::Look)?;
                    let sizes = BitmapError::Sizes { into: node.size(), from: source.size() };
                    if source.size() != node.size() {
                        return Err(sizes.into());
                    }
                    sources.push((source, name.clone()));
                }
                self.changes.push((node, Change::Merge(into.clone(), sources)));
                Ok(())
            }
        }
    }

    fn add_new(&mut self, daemon: &Daemon, spec: &BitmapSpec) -> Result<(), DaemonError> {
        let BitmapSpec { name, persistent, .. } = spec;
        if name.is_empty() {
            return Err(BitmapError::NameEmpty.into());
        }
        let node = daemon.node(&spec.node)?;
        let granularity = spec.granularity.unwrap_or_else(|| default_granularity(&node));
        if granularity < 512 || !granularity.is_power_of_two() {
            return Err(BitmapError::Granularity.into());
        }
        if *persistent {
            check_storable(&node, name)?;
        }
        let size = node.size();
        let (_, there) = self.node(&node);
        if there.iter().any(|bitmap| bitmap.name == *name) {
            return Err(BitmapError::Exists(name.clone()).into());
        }
        if name.len() > NAME_MAX {
            return Err(BitmapError::NameTooLong(name.clone()).into());
        }
        if there.len() >= BITMAPS_MAX {
            return Err(DaemonError::TooMany { what: "bitmaps", limit: BITMAPS_MAX });
        }
        let needed = |granularity: u32| size.div_ceil(u64::from(granularity)).div_ceil(8);
        let all = there.iter().map(|bitmap| needed(bitmap.granularity)).fold(0, u64::saturating_add);
        if all.saturating_add(needed(granularity)) > MEMORY_MAX {
            return Err(BitmapError::TooLarge { node: spec.node.clone() }.into());
        }
        daemon.check_hears(&node)?;
        let bits = Arc::new(DirtyBitmap::new(size, granularity).map_err(BitmapError::Memory)?);
        let mut bitmap = NamedBitmap::new(name.clone(), bits);
        bitmap.recording = !spec.disabled;
        bitmap.persistent = *persistent;
        there.push(bitmap.clone());
        self.changes.push((node, Change::Add(bitmap)));
        Ok(())
    }

    /// A node, and the bitmaps that it would have.
    fn node(&mut self, node: &Arc<Node>) -> &mut (Arc<Node>, Vec<NamedBitmap>) {
        let at = self.nodes.iter().position(|(other, _)| Arc::ptr_eq(other, node));
        let at = at.unwrap_or_else(|| {
            self.nodes.push((Arc::clone(node), node.named_bitmaps()));
            self.nodes.len() - 1
        });
        &mut self.nodes[at]
    }

    fn find(
        &mut self,
        daemon: &Daemon,
        node: &str,
        name: &str,
        wanted: Use,
    ) -> Result<(Arc<Node>, &mut NamedBitmap), BitmapError> {
        let node = daemon.node(node).map_err(|_| BitmapError::NodeNotFound(node.to_owned()))?;
        let (_, there) = self.node(&node);
        let bitmap = there.iter_mut().find(|bitmap| bitmap.name == name);
        let bitmap = bitmap.ok_or_else(|| BitmapError::NotFound(name.to_owned()))?;
        if bitmap.busy {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        // What an image keeps changes with the image only.
        let is_kept = bitmap.read_only || (bitmap.persistent && node.options().read_only);
        if is_kept && wanted != Use::Look {
            return Err(BitmapError::ReadOnly(name.to_owned()));
        }
        if bitmap.bits.is_none() && wanted != Use::Remove {
            return Err(BitmapError::Inconsistent(name.to_owned()));
        }
        Ok((node, bitmap))
    }

    /// A job takes it: those who come after it may not.
    pub(super) fn hold(&mut self, daemon: &Daemon, node: &Arc<Node>, name: &str) -> Result<(), BitmapError> {
        self.find(daemon, node.name().as_str(), name, Use::Look)?.1.busy = true;
        Ok(())
    }

    /// Says whether `name` of `node` may be used so.
    pub(super) fn check(
        &mut self,
        daemon: &Daemon,
        node: &Arc<Node>,
        name: &str,
        wanted: Use,
    ) -> Result<(), BitmapError> {
        self.find(daemon, node.name().as_str(), name, wanted).map(|_| ())
    }
}

fn check_storable(node: &Node, name: &str) -> Result<(), BitmapError> {
    if node.can_store_bitmaps() {
        return match name.len() {
            0..=NAME_MAX => Ok(()),
            _ => Err(BitmapError::NameTooLong(name.to_owned())),
        };
    }
    let node_name = node.name().to_string();
    match node.image() {
        Some(image) if image.layout().version < 3 => {
            Err(BitmapError::Version2 { name: name.to_owned(), node: node_name })
        }
        _ => Err(BitmapError::CannotStore(node_name)),
    }
}

fn default_granularity(node: &Node) -> u32 {
    let cluster = node.cluster_size().and_then(|bytes| u32::try_from(bytes).ok());
    cluster.unwrap_or(GRANULARITY_DEFAULT).clamp(GRANULARITY_DEFAULT_MIN, GRANULARITY_DEFAULT)
}
