//! Nodes that pass requests on to another: the fault injector, throttling, copy-on-read, room ahead of
//! writes; and nodes over nothing.
//!
//! Each stands on one node, whatever that is. Called by `nodes` when a node is made.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use heliostat_block::driver::copy_on_read::CopyOnRead;
use heliostat_block::driver::fault::{FaultInjector, InjectError, RequestLimits, SetState};
use heliostat_block::driver::null::{NullStorage, ReadsZero};
use heliostat_block::driver::preallocate::{Ahead, Preallocate};
use heliostat_block::driver::throttle::Throttle;
use heliostat_block::driver::{Driver, Filter, Raw};
use heliostat_block::graph::{Claims, Spot};
use heliostat_block::name::NodeName;
use heliostat_block::node::Node;
use heliostat_block::range::ByteRange;
use heliostat_block::storage::Storage;
use heliostat_block::throttle::{Limits, ThrottleGroup};

use super::super::{Daemon, DaemonError};
use super::fault_config;
use super::{Below, Child, Making, NodeEntry, NodeSpec, SIZE_MAX};

/// A fault injector, as QEMU's `blkdebug` takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultSpec {
    /// The node below.
    pub image: Child,
    /// A file with more rules.
    pub config: Option<PathBuf>,
    /// How requests are to be cut.
    pub limits: FaultLimits,
    /// What fails.
    pub errors: Vec<InjectError>,
    /// What changes the state.
    pub states: Vec<SetState>,
    /// What it asks for below.
    pub claims: Claims,
}

/// How requests are to be cut, as an operator says it. Zero says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultLimits {
    /// What all must be multiples of.
    pub align: u64,
    /// The most that is read or written at once.
    pub transfer_max: u64,
    /// What zeroing is best a multiple of.
    pub zero_unit: u64,
    /// The most that is made zero at once.
    pub zero_max: u64,
    /// What discards are best a multiple of.
    pub discard_unit: u64,
    /// The most that is discarded at once.
    pub discard_max: u64,
}

/// A node over nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NullSpec {
    /// QEMU's name of the driver, of which it has two.
    pub driver: &'static str,
    /// How long it is in bytes; `None` where that was not said.
    pub size: Option<u64>,
    /// Whether it says that it reads as zero.
    pub read_zeroes: bool,
    /// How long each request takes.
    pub latency: Duration,
}

/// How long a node over nothing is when nothing is said, as in QEMU.
const NULL_SIZE_DEFAULT: u64 = 1 << 30;

/// What a filter is, for who describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FilterEntry {
    /// A fault injector.
    Faults {
        /// The file with rules; empty where there is none.
        config: PathBuf,
        /// Whether anything else was said.
        has_options: bool,
        /// What it asks for below.
        claims: Claims,
    },
    /// Throttling by a group.
    Throttle {
        /// The group's id.
        group: String,
    },
    /// Copy-on-read.
    CopyOnRead,
    /// Room ahead of writes.
    Preallocate,
}

impl Daemon {
    /// Makes a node over nothing.
    pub(super) fn make_null(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        null: &NullSpec,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let size = null.size.unwrap_or(NULL_SIZE_DEFAULT);
        if size > SIZE_MAX {
            return Err(DaemonError::SizeTooLarge);
        }
        if i64::try_from(null.latency.as_nanos()).is_err() {
            return Err(DaemonError::Filter("latency-ns is invalid".to_owned()));
        }
        let reads_zero = if null.read_zeroes { ReadsZero::Promised } else { ReadsZero::Unsaid };
        let storage = NullStorage::new(size.next_multiple_of(512), reads_zero);
        let storage: Arc<dyn Storage> = Arc::new(storage.with_latency(null.latency, Arc::clone(&self.clock)));
        let node = self.node_of(name, Driver::Raw(Raw::whole(Arc::clone(&storage))), spec);
        let path = null_name(null);
        let entry = NodeEntry {
            storage: Some(storage),
            ..NodeEntry::new(node, null.driver, path.into(), spec.cache)
        };
        self.keep(Below { entry, start: 0, identity: None }, Vec::new(), making)
    }

    /// Makes a fault injector.
    pub(super) fn make_faults(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        faults: &FaultSpec,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let (mut errors, mut states) = match &faults.config {
            Some(path) => fault_config::read(path)?,
            None => (Vec::new(), Vec::new()),
        };
        errors.extend(faults.errors.iter().cloned());
        states.extend(faults.states.iter().cloned());
        let below = self.child(&faults.image, making)?;
        let limits = faults.limits.checked(below.entry.node.traits().block_size)?;
        let entry = FilterEntry::Faults {
            config: faults.config.clone().unwrap_or_default(),
            has_options: faults.has_options(),
            claims: faults.claims,
        };
        self.make_filter(name, spec, "blkdebug", entry, &below, making, |child| {
            Filter::Faults(FaultInjector::new(child, limits, errors, states))
        })
    }

    /// Makes a member of a throttle group.
    pub(super) fn make_throttle(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        group: &str,
        file: &Child,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let below = self.child(file, making)?;
        let found = self
            .throttle_group(group)
            .ok_or_else(|| DaemonError::Filter(format!("Throttle group '{group}' does not exist")))?;
        let entry = FilterEntry::Throttle { group: group.to_owned() };
        self.make_filter(name, spec, "throttle", entry, &below, making, |child| {
            Filter::Throttle(Throttle::new(child, found))
        })
    }

    /// Makes a node that keeps what is read through it.
    pub(super) fn make_copy_on_read(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        file: &Child,
        bottom: Option<&str>,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let below = self.child(file, making)?;
        if below.entry.node.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        let bottom = bottom.map(|bottom| self.bottom(&below, bottom)).transpose()?;
        self.make_filter(name, spec, "copy-on-read", FilterEntry::CopyOnRead, &below, making, |child| {
            Filter::CopyOnRead(CopyOnRead::new(child, bottom))
        })
    }

    /// Makes a node that makes room ahead of writes.
    pub(super) fn make_ahead(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        file: &Child,
        ahead: Ahead,
        making: Making,
    ) -> Result<Below, DaemonError> {
        let below = self.child(file, making)?;
        self.make_filter(name, spec, "preallocate", FilterEntry::Preallocate, &below, making, |child| {
            Filter::Preallocate(Preallocate::new(child, ahead))
        })
    }

    /// The layer of that name below `top`, or `top` itself.
    fn bottom(&self, top: &Below, name: &str) -> Result<Arc<Node>, DaemonError> {
        let node = self.graph.node(name);
        let node = node.map_err(|_| DaemonError::Filter(format!("Bottom node '{name}' not found")))?;
        let mut layers = std::iter::successors(Some(Arc::clone(&top.entry.node)), |node| node.backing());
        match layers.any(|layer| Arc::ptr_eq(&layer, &node)) {
            true => Ok(node),
            false => Err(DaemonError::Filter(format!("Node '{name}' is not in the backing chain"))),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what all filters have in common, in one call each")]
    fn make_filter(
        &self,
        name: NodeName,
        spec: &NodeSpec,
        driver: &'static str,
        filter: FilterEntry,
        below: &Below,
        making: Making,
        make: impl FnOnce(Arc<Spot>) -> Filter,
    ) -> Result<Below, DaemonError> {
        if below.entry.node.options().read_only && !spec.read_only && !spec.auto_read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        // What it stands on may grow.
        let shown = ByteRange::from_bounds(0, u64::MAX);
        let claims = match &filter {
            FilterEntry::Faults { claims, .. } => *claims,
            FilterEntry::Throttle { .. } | FilterEntry::CopyOnRead | FilterEntry::Preallocate => {
                Claims::default()
            }
        };
        let place = self.attach_claiming(below, &name, shown, spec.read_only, claims)?;
        let node = self.node_of(name, Driver::Filter(make(Arc::clone(place.spot()))), spec);
        let entry = NodeEntry {
            child: Some(below.entry.node.name().clone()),
            filter: Some(filter),
            ..NodeEntry::new(node, driver, below.entry.path.clone(), spec.cache)
        };
        self.keep(Below { entry, start: 0, identity: below.identity }, vec![place], making)
    }

    /// Lets every request go on that is held up at a breakpoint or by a limit, and holds none up any more.
    pub(in crate::daemon) fn release_held_up(&self) {
        for node in self.graph.nodes() {
            if let Some(injector) = node.fault_injector() {
                injector.end();
            }
        }
        for group in self.lock_groups().values() {
            // No limits make sense always.
            let _ = group.set_limits(Limits::default());
        }
    }

    /// Makes a throttle group of that id.
    ///
    /// # Errors
    /// `ObjectExists`, `ThrottleLimits`, `TooMany`.
    pub fn add_throttle_group(&self, id: &str, limits: Limits) -> Result<(), DaemonError> {
        let mut groups = self.lock_groups();
        if groups.len() >= GROUPS_MAX {
            return Err(DaemonError::TooMany { what: "objects", limit: GROUPS_MAX });
        }
        let group = ThrottleGroup::new(limits, Arc::clone(&self.clock))?;
        if groups.contains_key(id) || self.object(id).is_some() {
            return Err(DaemonError::ObjectExists(id.to_owned()));
        }
        groups.insert(id.to_owned(), group);
        Ok(())
    }

    /// Forgets a throttle group without members.
    ///
    /// # Errors
    /// `ObjectNotFound`, `ObjectInUse`.
    pub fn remove_throttle_group(&self, id: &str) -> Result<(), DaemonError> {
        // Somebody who is about to join it comes first.
        let _change = self.begin_change()?;
        let mut groups = self.lock_groups();
        let group = groups.get(id).ok_or_else(|| DaemonError::ObjectNotFound(id.to_owned()))?;
        if group.has_members() {
            return Err(DaemonError::ObjectInUse(id.to_owned()));
        }
        groups.remove(id);
        Ok(())
    }

    /// The throttle group of that id.
    #[must_use]
    pub fn throttle_group(&self, id: &str) -> Option<Arc<ThrottleGroup>> {
        self.lock_groups().get(id).cloned()
    }

    /// The ids of all throttle groups.
    #[must_use]
    pub fn throttle_groups(&self) -> Vec<String> {
        self.lock_groups().keys().cloned().collect()
    }

    fn lock_groups(&self) -> std::sync::MutexGuard<'_, super::super::ThrottleGroups> {
        self.throttle_groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The most throttle groups: as many as there can be nodes.
const GROUPS_MAX: usize = super::NODES_MAX;

impl FaultSpec {
    fn has_options(&self) -> bool {
        self.limits != FaultLimits::default() || !self.errors.is_empty() || !self.states.is_empty()
    }
}

impl FaultLimits {
    /// The limits, over what takes requests in units of `below` only.
    fn checked(self, below: u32) -> Result<RequestLimits, DaemonError> {
        let refused = |what: &str, value: u64| {
            DaemonError::Filter(format!("Cannot meet constraints with {what} {value}"))
        };
        let align = match u32::try_from(self.align) {
            Ok(0) => 0,
            Ok(align) if align.is_power_of_two() && align < 1 << 30 => align,
            _ => return Err(refused("align", self.align)),
        };
        let unit = u64::from(below.max(align).max(1));
        let fits = |value: u64| value == 0 || (value < 1 << 31 && value.is_multiple_of(unit));
        let all = [
            ("max-transfer", self.transfer_max),
            ("opt-write-zero", self.zero_unit),
            ("max-write-zero", self.zero_max),
            ("opt-discard", self.discard_unit),
            ("max-discard", self.discard_max),
        ];
        if let Some((what, value)) = all.into_iter().find(|(_, value)| !fits(*value)) {
            return Err(refused(what, value));
        }
        let Self { transfer_max, zero_unit, zero_max, discard_unit, discard_max, .. } = self;
        Ok(RequestLimits { align, transfer_max, zero_unit, zero_max, discard_unit, discard_max })
    }
}

/// QEMU's name for a node over nothing.
fn null_name(null: &NullSpec) -> String {
    let zeroes = if null.read_zeroes { "\"read-zeroes\": true, " } else { "" };
    let size = null.size.map_or_else(String::new, |size| format!(", \"size\": {size}"));
    match (zeroes, &*size) {
        ("", "") => format!("{}://", null.driver),
        _ => format!("json:{{{zeroes}\"driver\": \"{}\"{size}}}", null.driver),
    }
}
