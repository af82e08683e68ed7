//! [`Graph`]: the nodes by name, and who uses them. [`Place`]: where a user of a node stands. [`Spot`]: which node that
//! is now.
//!
//! An export holds a place, not a node, and a filter's requests go to a spot; a pivot puts another node there while the
//! gate is closed. The graph
//! does no I/O and knows no protocol. Called by the control plane and by jobs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use crate::clock::Moment;
use crate::name::NodeName;
use crate::named_bitmap::{Change, change, follow};
use crate::node::Node;
use crate::tracked::{Drained, Tracked};

/// What somebody does with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Offers it to clients.
    Export {
        /// The export's id.
        id: String,
        /// Whether clients may write.
        writable: bool,
    },
    /// Is mirrored.
    MirrorSource {
        /// The job's id.
        job: String,
    },
    /// Is mirrored to.
    MirrorTarget {
        /// The job's id.
        job: String,
    },
    /// Is the lower layer of another node, through which its bytes are written.
    Child {
        /// The upper node.
        of: NodeName,
        /// What it asks for beyond that.
        claims: Claims,
    },
    /// Is what another node stands on: read through it, and not to change meanwhile.
    Backing {
        /// The upper node.
        of: NodeName,
    },
}

/// What a node asks for below it beyond what its requests need: for tests of who may use what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Nobody else may read.
    pub reads_alone: bool,
    /// It may change the length.
    pub resizes: bool,
}

/// Why a node cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// There is no such node.
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    NotFound(String),
    /// There is one of that name already.
    #[error("Duplicate nodes with node-name='{0}'")]
    Duplicate(String),
    /// The node's present user does not allow this use.
    #[error("Node '{node}' is in use: {role:?}")]
    InUse {
        /// The node.
        node: NodeName,
        /// The use that stands in the way.
        role: Role,
    },
}

/// The nodes and their users.
#[derive(Default)]
pub struct Graph {
    /// Held for look-ups and changes, never across I/O. Lock order: this, then a place's node.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<NodeName, Arc<Node>>,
    places: Vec<Weak<Place>>,
    generated: u64,
}

/// Where one user of a node stands. Dropped, the use has ended.
pub struct Place {
    role: Role,
    spot: Arc<Spot>,
}

/// A pivot to a node that stands on something from then on.
#[derive(Clone, Copy)]
pub struct Onto<'a> {
    /// The node whose users move.
    pub drained: &'a Drained,
    /// Where they move to.
    pub target: &'a Arc<Node>,
    /// What that stands on.
    pub below: &'a Arc<Node>,
    /// What becomes of the named bitmaps of the drained node.
    pub bitmaps: NamedBitmaps,
}

/// What becomes of the named bitmaps of a node that its users leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBitmaps {
    /// They go where the users go.
    Follow,
    /// They stay, with what was written until then.
    Stay,
}

impl Place {
    fn new(role: Role, node: &Arc<Node>) -> Arc<Self> {
        Arc::new(Self { role, spot: Spot::of(Arc::clone(node)) })
    }

    /// What this user does.
    #[must_use]
    pub const fn role(&self) -> &Role {
        &self.role
    }

    /// The node that stands here now.
    #[must_use]
    pub fn node(&self) -> Arc<Node> {
        self.spot.node()
    }

    /// Where requests go that are to follow the place, for as long as there is one.
    #[must_use]
    pub const fn spot(&self) -> &Arc<Spot> {
        &self.spot
    }

    /// Enters whichever node stands here when the gate lets the request through; a guest's way in.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it has not entered.
    pub async fn enter(&self) -> Tracked {
        let arrived = self.node().clock().now();
        self.spot.enter_as(Some(arrived)).await
    }
}

/// Which node stands somewhere.
pub struct Spot {
    /// Changed only while nothing is on its way through it, and no new request can come: the gate of the node that
    /// stands here is closed and quiet, or that of the filter whose spot it is.
    node: RwLock<Arc<Node>>,
}

impl Spot {
    /// One for `node`.
    #[must_use]
    pub fn of(node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { node: RwLock::new(node) })
    }

    /// The node that stands here now.
    #[must_use]
    pub fn node(&self) -> Arc<Node> {
        Arc::clone(&self.node.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enters whichever node stands here when the gate lets the request through; the way in for what comes from above.
    ///
    /// # Cancel safety
    /// As [`Place::enter`].
    pub(crate) async fn enter(&self) -> Tracked {
        self.enter_as(None).await
    }

    /// Enters, for a guest that arrived then, or for a job.
    async fn enter_as(&self, guest: Option<Moment>) -> Tracked {
        let mut node = self.node();
        loop {
            let tracked = match guest {
                Some(arrived) => node.enter_for_guest(arrived).await,
                None => node.enter().await,
            };
            // Inside, the gate cannot be passed by a pivot: what stands here now stays until we leave.
            let standing = self.node();
            if Arc::ptr_eq(&standing, &node) {
                return tracked;
            }
            tracked.turn_back();
            node = standing;
        }
    }

    fn put(&self, node: &Arc<Node>) {
        *self.node.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(node);
    }
}

impl Graph {
    /// Adds a node.
    ///
    /// # Errors
    /// [`GraphError::Duplicate`].
    pub fn add(&self, node: Arc<Node>) -> Result<(), GraphError> {
        let mut state = self.state();
        if state.nodes.contains_key(node.name()) {
            return Err(GraphError::Duplicate(node.name().to_string()));
        }
        state.nodes.insert(node.name().clone(), node);
        Ok(())
    }

    /// Makes a name that no node has.
    #[must_use]
    pub fn generate_name(&self) -> NodeName {
        let mut state = self.state();
        let number = state.generated;
        state.generated += 1;
        NodeName::generated(number)
    }

    /// Finds a node.
    ///
    /// # Errors
    /// [`GraphError::NotFound`].
    pub fn node(&self, name: &str) -> Result<Arc<Node>, GraphError> {
        let state = self.state();
        let found = state.nodes.values().find(|node| node.name().as_str() == name);
        found.cloned().ok_or_else(|| GraphError::NotFound(name.to_owned()))
    }

    /// All nodes, by name.
    #[must_use]
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.state().nodes.values().cloned().collect()
    }

    /// Everybody who uses `node`, in the order in which they came.
    #[must_use]
    pub fn roles(&self, node: &Arc<Node>) -> Vec<Role> {
        self.state().places_at(node).map(|place| place.role.clone()).collect()
    }

    /// Removes a node that nobody uses. Its storage is closed when the last reference goes.
    ///
    /// # Errors
    /// [`GraphError::NotFound`], [`GraphError::InUse`].
    pub fn remove(&self, name: &str) -> Result<Arc<Node>, GraphError> {
        let node = self.node(name)?;
        let mut state = self.state();
        if let Some(place) = state.places_at(&node).next() {
            return Err(GraphError::InUse { node: node.name().clone(), role: place.role.clone() });
        }
        state.nodes.remove(node.name());
        Ok(node)
    }

    /// Puts a user at `node`, if its present users allow that. A mirror's target allows nobody else, because
    /// nobody may see or change a half-made copy; a source allows everybody but a second mirror.
    ///
    /// # Errors
    /// [`GraphError::InUse`] with the use that stands in the way.
    pub fn attach(&self, node: &Arc<Node>, role: Role) -> Result<Arc<Place>, GraphError> {
        let mut state = self.state();
        let conflict = state.places_at(node).find(|place| conflicts(&place.role, &role));
        if let Some(place) = conflict {
            return Err(GraphError::InUse { node: node.name().clone(), role: place.role.clone() });
        }
        let place = Place::new(role, node);
        state.places.retain(|place| place.strong_count() > 0);
        state.places.push(Arc::downgrade(&place));
        Ok(place)
    }

    /// Ends a use now, whoever still holds its place. Nothing may come through it any more.
    pub fn detach(&self, place: &Arc<Place>) {
        self.state().places.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(place)));
    }

    /// Puts `target` in the place of the drained node under every export, and under every filter: the pivot. Who waits
    /// at the closed gate goes to `target` when it opens. The named bitmaps of the drained node follow.
    ///
    /// Where filters stand on the drained node, the caller has drained those before it, from the top down.
    pub fn pivot(&self, drained: &Drained, target: &Arc<Node>) {
        self.state().pivot(drained.node(), target, NamedBitmaps::Follow);
    }

    /// As [`Graph::pivot`] for each of `moves`, in their order, with its target standing on something from then on: all
    /// in one step, so that nobody comes between who minds, and nobody sees some without the others. `bitmaps` change at
    /// the same point, before those of the drained nodes follow, where they do. Answers the places of what is below.
    ///
    /// # Errors
    /// [`GraphError::InUse`] where a user of what is to be below that does not move minds; nothing has changed then.
    pub fn pivot_all_onto(
        &self,
        moves: &[Onto<'_>],
        bitmaps: &[(Arc<Node>, Change)],
    ) -> Result<Vec<Arc<Place>>, GraphError> {
        let mut state = self.state();
        for Onto { drained, target, below, .. } in moves {
            let role = Role::Backing { of: target.name().clone() };
            let stays = |place: &Arc<Place>| {
                !(state.moves_with_a_pivot(place) && Arc::ptr_eq(&place.node(), drained.node()))
            };
            let minds = |place: &Arc<Place>| stays(place) && conflicts(&place.role, &role);
            if let Some(place) = state.places_at(below).find(minds) {
                return Err(GraphError::InUse { node: below.name().clone(), role: place.role.clone() });
            }
        }
        change(bitmaps);
        let mut standing = Vec::new();
        for Onto { drained, target, below, bitmaps } in moves {
            state.pivot(drained.node(), target, *bitmaps);
            let role = Role::Backing { of: target.name().clone() };
            let place = Place::new(role, below);
            state.places.push(Arc::downgrade(&place));
            standing.push(place);
        }
        Ok(standing)
    }

    /// Puts the drained node, a filter that stands at `place`, on `below` instead. The caller has seen to it that the
    /// users of `below` allow that, and that nobody reads through the filter past its gate.
    pub fn move_filter(&self, drained: &Drained, place: &Place, below: &Arc<Node>) {
        let _state = self.state();
        debug_assert!(
            matches!(&place.role, Role::Child { of, .. } if of == drained.node().name()),
            "another node stands there"
        );
        place.spot.put(below);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn places_at(&self, node: &Arc<Node>) -> impl Iterator<Item = Arc<Place>> {
        self.places.iter().filter_map(Weak::upgrade).filter(|place| Arc::ptr_eq(&place.node(), node))
    }

    fn pivot(&self, replaced: &Arc<Node>, target: &Arc<Node>, bitmaps: NamedBitmaps) {
        if bitmaps == NamedBitmaps::Follow {
            // Before anybody can write there: a write that they do not hear of would be lost to them.
            follow(replaced, target);
        }
        for place in self.places_at(replaced).filter(|place| self.moves_with_a_pivot(place)) {
            place.spot.put(target);
        }
    }

    /// Exports do, and filters, whose requests go wherever their place is. What else stands on a node stays on it.
    fn moves_with_a_pivot(&self, place: &Place) -> bool {
        match &place.role {
            Role::Export { .. } => true,
            Role::Child { of, .. } => self.nodes.get(of).is_some_and(|upper| upper.passes_on_to().is_some()),
            Role::MirrorSource { .. } | Role::MirrorTarget { .. } | Role::Backing { .. } => false,
        }
    }
}

fn conflicts(present: &Role, wanted: &Role) -> bool {
    match (present, wanted) {
        (Role::MirrorTarget { .. }, _) | (_, Role::MirrorTarget { .. }) => true,
        (Role::MirrorSource { .. }, Role::MirrorSource { .. }) => true,
        // Windows of one node stand side by side; who attaches them sees to it that none shows another's bytes.
        (Role::Child { .. }, Role::Child { .. }) => false,
        // Several overlays may stand on one node, which nobody changes. Copying it is reading it.
        (Role::Backing { .. }, Role::Backing { .. } | Role::MirrorSource { .. })
        | (Role::MirrorSource { .. }, Role::Backing { .. }) => false,
        // What is written through the upper node passes this one by: nobody may rely on hearing of it here.
        // Who reads relies on the length.
        (Role::Child { claims, .. }, Role::Export { writable: false, .. })
        | (Role::Export { writable: false, .. }, Role::Child { claims, .. }) => {
            claims.reads_alone || claims.resizes
        }
        (Role::Child { .. } | Role::Backing { .. }, other)
        | (other, Role::Child { .. } | Role::Backing { .. }) => {
            !matches!(other, Role::Export { writable: false, .. })
        }
        _ => false,
    }
}
