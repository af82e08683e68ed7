//! The moment at which snapshots are taken: flushes before it, closed gates, the flush behind them, the names of files
//! that are made, and the pivot of all.
//!
//! Everything in it has a bound, and whatever is refused leaves guests on the nodes on which they were. It plans nothing
//! and checks no argument: that is done before.

use std::sync::Arc;

use heliostat_block::graph::{GraphError, NamedBitmaps, Onto};
use heliostat_block::name::NodeName;
use heliostat_block::named_bitmap::Change;
use heliostat_block::node::{Node, NodeOptions};
use heliostat_host::runtime;

use super::super::flusher::Wanted;
use super::super::flushing::{Bounds, flush_until_short, undrained, until};
use super::super::new_file::Made;
use super::super::{Daemon, DaemonError, NodeEntry};
use super::{Planned, Snapshots};

impl Snapshots {
    /// Takes all of them at a moment at which nothing is in flight at any of them, and makes the `changes` of bitmaps at
    /// that moment, too.
    ///
    /// # Errors
    /// `Unflushed`, `UnendedFlush`, `Undrained`, `NodeInUse`; no node has changed then.
    pub(in super::super) fn take(
        &mut self,
        daemon: &Daemon,
        changes: &[(Arc<Node>, Change)],
    ) -> Result<(), DaemonError> {
        let mut made = self.take_made();
        let taken = runtime::block_on(self.take_within(Bounds::default(), daemon, changes, &mut made));
        self.made = made;
        taken.map_err(DaemonError::Engine)?
    }

    pub(super) async fn take_within(
        &self,
        bounds: Bounds,
        daemon: &Daemon,
        changes: &[(Arc<Node>, Change)],
        made: &mut [Made],
    ) -> Result<(), DaemonError> {
        let clock = daemon.clock().as_ref();
        let flusher = daemon.flushers.start()?;
        let unended = |limit| DaemonError::UnendedFlush { nodes: flusher.unended(), limit };
        let is_left = |node: &Arc<Node>| self.is_left(node) && !node.options().read_only;
        // None of them is on top of another: that would be somebody's use, and is refused.
        let nodes = self.nodes();
        // The long ones, beside clients.
        let beside_clients = async || {
            let written = nodes.iter().filter(|node| is_left(node));
            let wanted = written.map(|node| Wanted::Beside(Arc::clone(node))).collect();
            flusher.flush(wanted).await.map_err(DaemonError::Unflushed)
        };
        let deadline = clock.now() + bounds.beside_clients;
        let short = until(clock, deadline, flush_until_short(clock, beside_clients)).await;
        short.ok_or_else(|| unended(bounds.beside_clients))??;
        // All gates close before any waits. What mirrors are writing to overlays ends with what it began with.
        let deadline = clock.now() + bounds.gates;
        let drained = until(clock, deadline, Node::drain_all(&nodes)).await;
        // The gates open again where this ends early.
        let drained = drained.ok_or_else(|| undrained(&nodes, bounds.gates))?;
        let written = drained.iter().filter(|drained| is_left(drained.node()));
        let wanted = written.map(|drained| Wanted::Behind(drained.enter())).collect();
        let flushed = until(clock, deadline, flusher.flush(wanted)).await;
        flushed.ok_or_else(|| unended(bounds.gates))?.map_err(DaemonError::Unflushed)?;
        // Overlays get their names before anybody writes to them, so that what is written is found.
        let named = made.iter_mut().map(Made::take_place).collect::<Result<Vec<_>, _>>()?;
        let named = named.into_iter().flatten().map(Wanted::Name).collect();
        let durable = until(clock, deadline, flusher.flush(named)).await;
        durable.ok_or_else(|| unended(bounds.gates))?.map_err(DaemonError::Unflushed)?;
        let gate = |node: &Arc<Node>| drained.iter().find(|drained| Arc::ptr_eq(drained.node(), node));
        let onto = |planned: &'_ Planned| {
            let drained = gate(&planned.node)?;
            Some(Onto {
                drained,
                target: gate(planned.overlay.as_ref()?)?.node(),
                below: drained.node(),
                bitmaps: NamedBitmaps::Stay,
            })
        };
        let moves: Vec<_> = self.list.iter().filter_map(onto).collect();
        let named: Vec<_> = self.list.iter().map(|planned| planned.named).collect();
        daemon.put_on_top(&moves, &named, changes).map_err(|error| match error {
            GraphError::InUse { node, .. } => DaemonError::NodeInUse(node),
            GraphError::NotFound(name) | GraphError::Duplicate(name) => DaemonError::NodeNotFound(name),
        })?;
        for planned in &self.list {
            daemon.keep_as_it_is(&planned.node);
        }
        Ok(())
    }

    /// All that take part, each once.
    fn nodes(&self) -> Vec<Arc<Node>> {
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        for node in self.list.iter().flat_map(|planned| [Some(&planned.node), planned.overlay.as_ref()]) {
            nodes.extend(node.filter(|node| !nodes.iter().any(|other| Arc::ptr_eq(other, node))).cloned());
        }
        nodes
    }
}

impl Daemon {
    /// The node, and those through which its bytes go.
    fn layers(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let entries = self.nodes();
        let entry = |name: &NodeName| entries.iter().find(|entry| entry.node.name() == name);
        let lower = |above: &&NodeEntry| entry(above.child.as_ref()?);
        std::iter::successors(entry(node.name()), lower).map(|entry| Arc::clone(&entry.node)).collect()
    }

    /// Nobody writes the node, nor what holds it and nothing else, from here on.
    fn keep_as_it_is(&self, node: &Arc<Node>) {
        let layers = self.layers(node);
        let is_alone = |layer: &Arc<Node>| self.graph.roles(layer).len() <= 1;
        for (depth, layer) in layers.iter().enumerate() {
            if depth > 0 && !is_alone(layer) {
                return;
            }
            layer.set_options(NodeOptions { read_only: true, ..layer.options() });
        }
    }
}
