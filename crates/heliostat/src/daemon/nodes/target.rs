//! The target of a mirror that names a file: opened when the mirror starts, alone; put on top of the rest of its chain
//! when it ends; gone when nobody uses it.
//!
//! It is no operator's node: it lives as long as the mirror, or an export, uses it. It is opened without what it stands
//! on, because that may not be complete yet. Called by `drive_mirror`.

use std::sync::Arc;

use heliostat_block::graph::{GraphError, NamedBitmaps, Onto, Role};
use heliostat_block::named_bitmap::Change;
use heliostat_block::node::Node;
use heliostat_block::tracked::Drained;
use heliostat_host::clock::RealClock;

use super::super::gate::Format;
use super::super::open::flush;
use super::super::{Daemon, DaemonError, MirrorSpec};
use super::qcow2::{namer, probe};
use super::{
    BackingSpec, Child, DEPTH_MAX, DriverSpec, FilterEntry, Making, NodeSpec, Nodes, Qcow2Spec, Record,
    patiently,
};

/// What the target of a mirror stands on when it has taken the source's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beneath {
    /// What it stands on already.
    AsItIs,
    /// What the source stands on.
    SourcesBacking,
    /// The source.
    Source,
    /// What the image itself says.
    FromHeader,
}

/// Who says what an image stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Named {
    /// Its header, too.
    ByImage,
    /// The operator alone, as far as is known.
    ByOperator,
}

/// How the target keeps its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Wanted {
    /// As the file below it does.
    AsBelow,
    /// In a format that somebody has said.
    Said(Format),
    /// In the format that it begins as.
    Guessed,
}

impl Daemon {
    /// Opens the node of a target over `below`, which is what holds it.
    ///
    /// # Errors
    /// As [`Daemon::add_node`]; nothing is left then.
    pub(in super::super) fn make_target(
        &self,
        below: &NodeSpec,
        name: Option<String>,
        wanted: Wanted,
    ) -> Result<Arc<Node>, DaemonError> {
        let there = self.lock_nodes().list.len();
        let made = self.try_target(below, name, wanted);
        if made.is_err() {
            // As in `add_node`.
            let _ = self.drop_unused_from(there);
        }
        made
    }

    fn try_target(
        &self,
        below: &NodeSpec,
        name: Option<String>,
        wanted: Wanted,
    ) -> Result<Arc<Node>, DaemonError> {
        let making = Making { depth: DEPTH_MAX, is_owned: false };
        if wanted == Wanted::AsBelow {
            let spec = NodeSpec { name, ..below.clone() };
            return Ok(self.make_node(&spec, making)?.entry.node);
        }
        // Before anything is opened.
        self.check_new(&NodeSpec { name: name.clone(), ..below.clone() }, making)?;
        let passes = heliostat_block::node::Discard::Unmap;
        let file = self.make_node(&NodeSpec { name: None, discard: passes, ..below.clone() }, making)?;
        let (format, is_guess) = match wanted {
            Wanted::Said(format) => (format, false),
            Wanted::AsBelow | Wanted::Guessed => (probe(&file)?, true),
        };
        let child = Child::Named(file.entry.node.name().to_string());
        let driver = match format {
            Format::Raw => DriverSpec::Raw { file: child, offset: None, size: None, is_guess },
            Format::Qcow2 => DriverSpec::Qcow2(Box::new(Qcow2Spec {
                backing: BackingSpec::Nothing,
                ..Qcow2Spec::new(child)
            })),
        };
        let node = self.make_node(&NodeSpec { name, driver, ..below.clone() }, making)?.entry.node;
        if node.image().is_some_and(|image| image.header().backing_file.is_none()) {
            // It stands on nothing by its own account, too.
            self.change_record(&node, |record| record.below.entry.backing_is_given = false);
        }
        if is_guess
            && let Some(image) = node.image().map(|image| image.header())
            && let Some(backing) = image.backing_file
        {
            // At the end it would be opened on the word of who wrote the image.
            let name = String::from_utf8_lossy(&backing).into_owned();
            return Err(DaemonError::TargetGuess { path: file.entry.path, name });
        }
        Ok(node)
    }

    /// Opens what the target stands on by its own account, through the gate, to be put there when the source is
    /// drained. Nothing where it is open already, or stands on nothing.
    ///
    /// # Errors
    /// `Backing`.
    pub(in super::super) fn open_beneath(&self, target: &Arc<Node>) -> Result<(), DaemonError> {
        let Some(image) = target.image() else { return Ok(()) };
        let header = image.header();
        let Some(backing) = &header.backing_file else { return Ok(()) };
        let record = self.below(target.name().as_str())?;
        if record.entry.backing.is_some() {
            return Ok(());
        }
        let Some(child) = &record.entry.child else { return Ok(()) };
        let by = namer(&self.below(child.as_str())?, None);
        let there = self.lock_nodes().list.len();
        let opening = || {
            let above = NodeSpec {
                cache: record.entry.cache,
                ..NodeSpec::new(None, DriverSpec::NullCo { size: 0, read_zeroes: true })
            };
            let image = Qcow2Spec::new(Child::Named(child.to_string()));
            let making = Making { depth: DEPTH_MAX, is_owned: false };
            let format = self.gate.format(header.backing_format.as_deref(), backing, &by)?;
            let found = self.named_backing(&above, &image, backing, format, &by, making)?;
            self.check_chain(&found, &by)?;
            let place = self.attach_backing(&found, target.name())?;
            Ok((found.entry.node.name().clone(), place))
        };
        let (name, place) = opening().map_err(|error: DaemonError| {
            let _ = self.drop_unused_from(there);
            DaemonError::Backing(Box::new(error))
        })?;
        self.change_record(target, |record| {
            record.below.entry.backing = Some(name);
            record.places.push(place);
        });
        Ok(())
    }

    /// Puts `target` on what it is to stand on, and in the place of the drained node, the source or one below it, in
    /// this order: nobody sees it without. Called on the job's thread, which must not wait for an operator's change to end.
    ///
    /// # Errors
    /// With the reason; nothing has changed then.
    pub(in super::super) fn succeed(
        &self,
        drained: &Drained,
        target: &Arc<Node>,
        beneath: Beneath,
    ) -> Result<(), String> {
        let source = drained.node();
        let below = match beneath {
            Beneath::AsItIs => None,
            Beneath::SourcesBacking => source.backing(),
            Beneath::Source => Some(Arc::clone(source)),
            Beneath::FromHeader => {
                let name = self.below(target.name().as_str()).ok().and_then(|record| record.entry.backing);
                // It is there: its place keeps it.
                name.and_then(|name| self.graph.node(name.as_str()).ok())
            }
        };
        let Some(below) = below else {
            if beneath == Beneath::FromHeader && target.lacks_backing() {
                return Err("What the target stands on is not open".to_owned());
            }
            self.graph.pivot(drained, target);
            self.follow_filters(source, target);
            return Ok(());
        };
        if beneath == Beneath::FromHeader {
            target.set_backing(Some(below));
            self.change_record(target, |record| record.below.entry.backing_is_given = false);
            self.graph.pivot(drained, target);
            self.follow_filters(source, target);
            return Ok(());
        }
        let onto = Onto { drained, target, below: &below, bitmaps: NamedBitmaps::Follow };
        self.put_on_top(&[onto], &[Named::ByImage], &[]).map_err(|error| error.to_string())
    }

    /// Puts each target on top of what is to be below it, and in the place of its drained node, in this order: nobody
    /// sees it without. All at one point, at which `bitmaps` change, too.
    ///
    /// # Errors
    /// Where a user of what is to be below minds; nothing has changed then.
    pub(in super::super) fn put_on_top(
        &self,
        moves: &[Onto<'_>],
        named: &[Named],
        bitmaps: &[(Arc<Node>, Change)],
    ) -> Result<(), GraphError> {
        let before: Vec<_> = moves.iter().map(|one| one.target.backing()).collect();
        for one in moves {
            one.target.set_backing(Some(Arc::clone(one.below)));
        }
        let places = self.graph.pivot_all_onto(moves, bitmaps).inspect_err(|_| {
            for (one, before) in moves.iter().zip(before) {
                one.target.set_backing(before);
            }
        })?;
        for ((one, named), place) in moves.iter().zip(named).zip(places) {
            self.change_record(one.target, |record| {
                record.below.entry.backing = Some(one.below.name().clone());
                record.below.entry.backing_is_given = *named == Named::ByOperator;
                record.places.push(place);
            });
            self.follow_filters(one.drained.node(), one.target);
        }
        Ok(())
    }

    /// Takes note that the filters over `replaced` stand on `target` now.
    fn follow_filters(&self, replaced: &Arc<Node>, target: &Arc<Node>) {
        let mut nodes = self.lock_nodes();
        let entries = nodes.list.iter_mut().map(|record| &mut record.below.entry);
        for entry in entries.filter(|entry| entry.filter.is_some()) {
            if entry.child.as_ref() == Some(replaced.name()) {
                entry.child = Some(target.name().clone());
            }
        }
        nodes.follow_file(target);
    }

    /// Puts the drained node, a filter, on `below` instead of what it stands on; see
    /// [`heliostat_block::graph::Graph::move_filter`].
    pub(in super::super) fn change_child(&self, drained: &Drained, below: &Arc<Node>) {
        let mut nodes = self.lock_nodes();
        let is_it = |record: &&mut Record| Arc::ptr_eq(record.node(), drained.node());
        let Some(record) = nodes.list.iter_mut().find(is_it) else { return };
        let mut places = record.places.iter();
        let Some(place) = places.find(|place| matches!(place.role(), Role::Child { .. })) else { return };
        self.graph.move_filter(drained, place, below);
        record.below.entry.child = Some(below.name().clone());
        nodes.follow_file(below);
    }

    /// Puts other nodes, or none, below images: all or none. The caller holds the gates of the images' nodes.
    ///
    /// # Errors
    /// With a node that somebody uses in a way that does not go with this; nothing has changed then.
    pub(in super::super) fn change_backings(
        &self,
        moves: &[(Arc<Node>, Option<Arc<Node>>)],
    ) -> Result<(), Arc<Node>> {
        let attach = |(node, backing): &(Arc<Node>, Option<Arc<Node>>)| {
            let Some(backing) = backing else { return Ok(None) };
            let role = Role::Backing { of: node.name().clone() };
            self.graph.attach(backing, role).map(Some).map_err(|_| Arc::clone(backing))
        };
        let places = moves.iter().map(attach).collect::<Result<Vec<_>, _>>()?;
        for ((node, backing), place) in moves.iter().zip(places) {
            node.set_backing(backing.clone());
            self.change_record(node, |record| {
                record.places.retain(|place| !matches!(place.role(), Role::Backing { .. }));
                record.places.extend(place);
                record.below.entry.backing = backing.as_ref().map(|backing| backing.name().clone());
                record.below.entry.backing_is_given = true;
            });
        }
        Ok(())
    }

    /// Keeps what is said of a node, for who asks; and lets its file flush as it is said.
    pub(in super::super) fn keep_said(&self, node: &Arc<Node>, spec: &NodeSpec) {
        self.change_record(node, |record| {
            let entry = &mut record.below.entry;
            entry.cache = spec.cache;
            if let Some(file) = &entry.file {
                file.set_flush(flush(spec.cache));
            }
            if let DriverSpec::Throttle { group, .. } = &spec.driver {
                entry.filter = Some(FilterEntry::Throttle { group: group.clone() });
            }
        });
    }

    fn change_record(&self, node: &Arc<Node>, change: impl FnOnce(&mut Record)) {
        let mut nodes = self.lock_nodes();
        if let Some(record) = nodes.list.iter_mut().find(|record| Arc::ptr_eq(record.node(), node)) {
            change(record);
        }
    }

    /// Checks that `spec` names a node that may be replaced by a copy of `source`: this, or one to which it passes its
    /// requests on. Answers the nodes below the source down to that.
    pub(in super::super) fn check_replaces(
        &self,
        spec: &MirrorSpec,
        source: &Arc<Node>,
    ) -> Result<Vec<Arc<Node>>, DaemonError> {
        let Some(replaces) = &spec.replaces else { return Ok(Vec::new()) };
        let node = self.graph.node(replaces).map_err(|_| DaemonError::NodeNameNotFound(replaces.clone()))?;
        let mut below = Vec::new();
        let mut at = Arc::clone(source);
        while !Arc::ptr_eq(&at, &node) {
            at = at.passes_on_to().ok_or_else(|| DaemonError::CannotReplace {
                replaces: node.name().clone(),
                source_node: source.name().clone(),
            })?;
            // Another's filter would move with the pivot, and a mirror of that which is to replace the node, too, would
            // find nobody there. One that comes later may only read, finds the same bytes in the target, and cannot
            // replace the node.
            let is_shared =
                self.graph.roles(&at).iter().filter(|role| matches!(role, Role::Child { .. })).count() > 1;
            if is_shared {
                return Err(DaemonError::NodeBusy(at.name().clone()));
            }
            below.push(Arc::clone(&at));
        }
        Ok(below)
    }

    /// Closes what was made for a job and is used by nobody any more, on a thread of the data plane. Waits for
    /// changes that are under way.
    pub(in super::super) async fn let_go(&self) {
        loop {
            // Most jobs leave nothing behind, and need not wait.
            if self.orphan().is_none() {
                return;
            }
            let record = {
                let _change = self.changes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                self.orphan().and_then(|node| self.forget(node.name().as_str()))
            };
            if let Some(record) = record {
                record.close_here().await;
            }
        }
    }

    fn orphan(&self) -> Option<Arc<Node>> {
        let nodes: Vec<_> = {
            let nodes = self.lock_nodes();
            let made = nodes.list.iter().filter(|record| !record.is_owned);
            made.map(|record| Arc::clone(record.node())).collect()
        };
        nodes.into_iter().find(|node| self.graph.roles(node).is_empty())
    }
}

impl Record {
    /// Leaves its image, or file, in order, as well as that can be done.
    async fn close_here(self) {
        // As closing a file does: who cared has flushed.
        let _ = patiently(self.node(), &RealClock::new(), self.node().close()).await;
    }
}

impl Nodes {
    /// Takes note that `node` has come below others: all that is above it is in its file now.
    fn follow_file(&mut self, node: &Arc<Node>) {
        let mut lower: Vec<_> =
            self.find(node.name().as_str()).map(|record| record.below.clone()).into_iter().collect();
        while let Some(below) = lower.pop() {
            for record in &mut self.list {
                let entry = &mut record.below.entry;
                if entry.child.as_ref() == Some(below.entry.node.name()) {
                    entry.path.clone_from(&below.entry.path);
                    record.below.identity = below.identity;
                    lower.push(record.below.clone());
                }
            }
        }
    }
}
