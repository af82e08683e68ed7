//! The exports of a daemon, and the one NBD server that offers them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use heliostat_block::graph::{GraphError, Place, Role};
use heliostat_block::node::Node;

use super::{Daemon, DaemonError};
use crate::front::nbd::{ExportSettings, NbdServer, Reach, ServerSettings};
use heliostat_block::nbd::Access;
use heliostat_host::socket::Address;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// On a Unix socket.
    Unix(PathBuf),
    /// On a TCP socket.
    Tcp(SocketAddr),
}

/// What an NBD server is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// Where it listens.
    pub address: NbdAddress,
    /// Connections at once; 0 is as many as the program's own bound allows.
    pub max_connections: u32,
}

/// What an export is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// Its id, by which an operator speaks of it.
    pub id: String,
    /// The node to offer.
    pub node: String,
    /// Its name, by which clients ask for it; the node's name where nothing is said.
    pub name: Option<String>,
    /// A text for clients.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Only if it has no clients.
    Safe,
    /// Its clients are disconnected when what they have in flight has ended.
    Hard,
}

/// An export.
#[derive(Clone)]
pub struct Export {
    /// Its id.
    pub id: String,
    /// The name that clients ask for.
    pub name: String,
    /// Where it stands in the graph.
    pub place: Arc<Place>,
}

impl Export {
    /// The node that it offers now.
    #[must_use]
    pub fn node(&self) -> Arc<Node> {
        self.place.node()
    }
}

/// The server and its exports, oldest first.
#[derive(Default)]
pub(super) struct Serving {
    server: Option<NbdServer>,
    exports: Vec<Export>,
}

impl Daemon {
    /// Starts the NBD server. Returns the address at which it listens, with the port where none was said.
    ///
    /// # Errors
    /// `NbdRunning`; `Nbd` when the host refuses the address.
    pub fn start_nbd_server(&self, spec: &NbdSpec) -> Result<NbdAddress, DaemonError> {
        let _change = self.begin_change()?;
        let mut serving = self.lock_serving();
        if serving.server.is_some() {
            return Err(DaemonError::NbdRunning);
        }
        let address = match spec.address.clone() {
            NbdAddress::Unix(path) => Address::Unix(path),
            NbdAddress::Tcp(address) => Address::Tcp(address),
        };
        let settings = ServerSettings { reach: Reach::Anywhere, ..ServerSettings::default() };
        let server = NbdServer::start(&address, settings).map_err(|e| DaemonError::Nbd(e.to_string()))?;
        let bound = match server.address().clone() {
            Address::Unix(path) => NbdAddress::Unix(path),
            Address::Tcp(address) => NbdAddress::Tcp(address),
        };
        serving.server = Some(server);
        Ok(bound)
    }

    /// Stops the NBD server and removes its exports, when what is in flight has ended.
    ///
    /// # Errors
    /// `NbdNotRunning`.
    pub fn stop_nbd_server(&self) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        Err(DaemonError::NbdNotRunning)
    }

    /// Offers a node to NBD clients.
    ///
    /// # Errors
    /// `NbdNotRunning`, `ExportIdExists`, `NodeNotFound`, `PermissionConflict`, `TargetReadOnly`.
    pub fn add_export(&self, spec: &ExportSpec) -> Result<Export, DaemonError> {
        let _change = self.begin_change()?;
        if self.exports().iter().any(|export| export.id == spec.id) {
            return Err(DaemonError::ExportIdExists(spec.id.clone()));
        }
        let node =
            self.graph.node(&spec.node).map_err(|_| DaemonError::NodeNameNotFound(spec.node.clone()))?;
        if spec.writable && node.options().read_only {
            return Err(DaemonError::TargetReadOnly);
        }
        let role = Role::Export { id: spec.id.clone(), writable: spec.writable };
        let place = self.graph.attach(&node, role).map_err(|error| match error {
            GraphError::InUse { node, .. } => DaemonError::NodeInUse(node),
            _ => DaemonError::NodeNotFound(spec.node.clone()),
        })?;
        let name = spec.name.clone().unwrap_or_else(|| spec.node.clone());
        let export = Export { id: spec.id.clone(), name, place };
        let mut serving = self.lock_serving();
        let server = serving.server.as_ref().ok_or(DaemonError::NbdNotRunning)?;
        server
            .add_export(ExportSettings {
                name: export.name.clone(),
                description: spec.description.clone().unwrap_or_default(),
                place: Arc::clone(&export.place),
                access: if spec.writable { Access::Writable } else { Access::ReadOnly },
                is_default: false,
            })
            .map_err(|error| DaemonError::Nbd(error.to_string()))?;
        serving.exports.push(export.clone());
        Ok(export)
    }

    /// Removes an export.
    ///
    /// # Errors
    /// `ExportNotFound`, `ExportInUse`.
    pub fn remove_export(&self, id: &str, removal: Removal) -> Result<(), DaemonError> {
        let _change = self.begin_change()?;
        let _ = removal;
        let mut serving = self.lock_serving();
        let found = serving.exports.iter().position(|export| export.id == id);
        let index = found.ok_or_else(|| DaemonError::ExportNotFound(id.to_owned()))?;
        serving.exports.remove(index);
        Ok(())
    }

    /// The exports, newest first.
    #[must_use]
    pub fn exports(&self) -> Vec<Export> {
        self.lock_serving().exports.iter().rev().cloned().collect()
    }

    /// Ends the server, if there is one; called when the daemon is closing.
    pub(super) fn end_serving(&self) {
        let server = self.lock_serving().server.take();
        if let Some(server) = server {
            server.stop();
        }
        self.lock_serving().exports.clear();
    }

    fn lock_serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
