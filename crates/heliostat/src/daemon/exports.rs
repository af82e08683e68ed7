//! The exports of a daemon, and the one NBD server that offers them.
//!
//! An export is listed until its last client has left, and only then said to be deleted. Waiting for that
//! holds up nobody but who asked for it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use heliostat_block::convert::usize_from;
use heliostat_block::graph::{GraphError, Place, Role};
use heliostat_block::name::is_wellformed_id;
use heliostat_block::nbd::Access;
use heliostat_block::node::Node;
use heliostat_host::runtime::STACK;
use heliostat_host::socket::Address;

use super::events::Happening;
use super::export_bitmaps::set_busy;
use super::{Daemon, DaemonError};
use crate::authz::Client;
use crate::front::nbd::{
    self, Door, Doors, ExportError, ExportSettings, NbdServer, Reach, Removed, ServerSettings, TlsPolicy,
};
use crate::serve::Seat;
use crate::serve::status::{Contexts, Depth};

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// On a Unix socket.
    Unix(PathBuf),
    /// On a TCP socket.
    Tcp(SocketAddr),
    /// On a socket that was bound by whoever started the program, by its descriptor's number.
    Inherited(i32),
}

impl From<NbdAddress> for Door {
    fn from(address: NbdAddress) -> Self {
        match address {
            NbdAddress::Unix(path) => Self::Bind(Address::Unix(path)),
            NbdAddress::Tcp(address) => Self::Bind(Address::Tcp(address)),
            NbdAddress::Inherited(number) => Self::Inherited(number),
        }
    }
}

/// What an NBD server is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdSpec {
    /// Where it listens; all of them or none. Whether other hosts may reach them has been settled by whoever chose
    /// them.
    pub addresses: Vec<NbdAddress>,
    /// Connections at once; 0 is no bound.
    pub max_connections: u32,
    /// How long a client may take until it has chosen its export; where nothing is said, some seconds.
    pub handshake_time: Option<Duration>,
    /// TLS, where there is any.
    pub tls: Option<NbdTls>,
    /// The most bytes that its connections hold together; where nothing is said, some hundred MiB.
    pub memory_max: Option<u64>,
}

/// TLS as an NBD server is to have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTls {
    /// The id of a server's credentials.
    pub credentials: String,
    /// The id of the object that says who is let in. Looked up for each client; one that is not there lets nobody in.
    pub authz: Option<String>,
    /// Whether clients must, or may.
    pub policy: TlsPolicy,
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
    /// Whom it is for, by the certificates that they show. `None`: for everybody.
    pub clients: Option<Vec<Client>>,
    /// Whether clients may ask in which layer a range is.
    pub depth: Depth,
    /// Bitmaps that clients may ask for; each with its node, or the nearest of the chain.
    pub bitmaps: Vec<(Option<String>, String)>,
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
    /// The same for its clients, and what was counted of their requests.
    pub seat: Arc<Seat>,
    /// It is no longer offered; its last clients are leaving.
    pub is_leaving: bool,
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
    /// Descriptors of sockets that a server may be started on.
    descriptors: Vec<i32>,
    /// Clients of a server that is started are to wait.
    holds_clients: bool,
}

impl Daemon {
    /// Starts the NBD server. Returns the addresses at which it listens, with the ports where none was said.
    ///
    /// # Errors
    /// `NbdRunning`; `CredentialsNotFound`, `NotCredentials`, `CredentialsEndpoint`; `NbdListen` when the host refuses an
    /// address.
    pub fn start_nbd_server(&self, spec: &NbdSpec) -> Result<Vec<Address>, DaemonError> {
        let _change = self.begin_change()?;
        let mut serving = self.lock_serving();
        if serving.server.is_some() {
            return Err(DaemonError::NbdRunning);
        }
        let entrances: Vec<Door> = spec.addresses.iter().cloned().map(Door::from).collect();
        let connections_max = usize_from(u64::from(spec.max_connections));
        let handshake_time = spec.handshake_time.unwrap_or(nbd::HANDSHAKE_TIME_DEFAULT);
        let doors = if serving.holds_clients { Doors::Closed } else { Doors::Open };
        let tls = spec.tls.as_ref().map(|tls| self.server_tls(tls)).transpose()?;
        let memory_max = spec.memory_max.unwrap_or(nbd::MEMORY_DEFAULT);
        let settings = ServerSettings {
            reach: Reach::Anywhere,
            tls,
            connections_max,
            handshake_time,
            doors,
            memory_max,
            ..ServerSettings::default()
        };
        let server = NbdServer::start_at(&entrances, settings)
            .map_err(|source| DaemonError::NbdListen { text: bind_text(&entrances, &source), source })?;
        let bound = server.addresses().to_vec();
        serving.server = Some(server);
        Ok(bound)
    }

    /// Starts the NBD server with one export. Whoever finds the server finds that. Returns the addresses at which it
    /// listens.
    ///
    /// # Errors
    /// As [`Daemon::start_nbd_server`] and [`Daemon::add_export`]. Who connects waits then, until [`Daemon::let_clients_in`].
    pub fn serve(&self, spec: &NbdSpec, export: &ExportSpec) -> Result<Vec<Address>, DaemonError> {
        self.hold_clients();
        let addresses = self.start_nbd_server(spec)?;
        self.add_export(export)?;
        self.let_clients_in();
        Ok(addresses)
    }

    /// Allows an NBD server to be started once on a socket that this process was started with.
    pub fn pass_descriptor(&self, number: i32) {
        self.lock_serving().descriptors.push(number);
    }

    /// The descriptor of that number, if it may be used; not again after that.
    #[must_use]
    pub fn take_descriptor(&self, number: &str) -> Option<i32> {
        let descriptors = &mut self.lock_serving().descriptors;
        let found = descriptors.iter().position(|passed| passed.to_string() == number)?;
        Some(descriptors.remove(found))
    }

    /// Lets NBD clients wait who connect to a server that is started from now on, until
    /// [`Daemon::let_clients_in`]: so that none of them comes before the exports that they are to find.
    pub fn hold_clients(&self) {
        self.lock_serving().holds_clients = true;
    }

    /// Serves those who wait and those who come.
    pub fn let_clients_in(&self) {
        let mut serving = self.lock_serving();
        serving.holds_clients = false;
        if let Some(server) = &serving.server {
            server.let_in();
        }
    }

    /// Stops the NBD server and removes its exports, when what is in flight has ended.
    ///
    /// # Errors
    /// `NbdNotRunning`.
    pub fn stop_nbd_server(&self) -> Result<(), DaemonError> {
        let change = self.begin_change()?;
        let server = self.lock_serving().server.take().ok_or(DaemonError::NbdNotRunning)?;
        // A client's request may take long; others may make changes meanwhile.
        drop(change);
        self.stop(server);
        Ok(())
    }

    /// Offers a node to NBD clients.
    ///
    /// # Errors
    /// `ExportId`, `ExportIdExists`, `NodeNotFound`, `NbdNotRunning`, `ExportReadOnly`, `PermissionConflict`,
    /// `Export` when the server refuses it.
    pub fn add_export(&self, spec: &ExportSpec) -> Result<Export, DaemonError> {
        let _change = self.begin_change()?;
        if !is_wellformed_id(&spec.id) {
            return Err(DaemonError::ExportId);
        }
        if self.exports().iter().any(|export| export.id == spec.id) {
            return Err(DaemonError::ExportIdExists(spec.id.clone()));
        }
        let node = self.graph.node(&spec.node);
        let node = node.map_err(|_| DaemonError::ExportNodeNotFound(spec.node.clone()))?;
        if self.lock_serving().server.is_none() {
            return Err(DaemonError::NbdNotRunning);
        }
        if spec.writable && node.options().read_only {
            return Err(DaemonError::ExportReadOnly);
        }
        let role = Role::Export { id: spec.id.clone(), writable: spec.writable };
        let place = self.graph.attach(&node, role).map_err(|error| match error {
            GraphError::InUse { node, role } => super::conflict::conflict(node, &role, spec.writable),
            _ => DaemonError::NodeNotFound(spec.node.clone()),
        })?;
        let name = spec.name.clone().unwrap_or_else(|| spec.node.clone());
        let description = spec.description.clone().unwrap_or_default();
        let mut serving = self.lock_serving();
        let server = serving.server.as_ref().ok_or(DaemonError::NbdNotRunning)?;
        server.check_export(&name, &description)?;
        let bitmaps = self.bitmaps_to_offer(&node, spec)?;
        let export = Export {
            id: spec.id.clone(),
            name,
            seat: Seat::with_contexts(Arc::clone(&place), Contexts::new(spec.depth, bitmaps)),
            place,
            is_leaving: false,
        };
        server.add_export(ExportSettings {
            name: export.name.clone(),
            description,
            seat: Arc::clone(&export.seat),
            access: if spec.writable { Access::Writable } else { Access::ReadOnly },
            is_default: false,
            clients: spec.clients.clone(),
        })?;
        set_busy(&export, true);
        serving.exports.push(export.clone());
        Ok(export)
    }

    /// Offers an export no longer. With [`Removal::Hard`] it is listed as leaving until its clients are gone.
    ///
    /// # Errors
    /// `ExportNotFound`, `ExportInUse`.
    pub fn remove_export(self: &Arc<Self>, id: &str, removal: Removal) -> Result<(), DaemonError> {
        let change = self.begin_change()?;
        let removed = {
            let mut serving = self.lock_serving();
            let Serving { server, exports, .. } = &mut *serving;
            let found = exports.iter_mut().find(|export| export.id == id && !export.is_leaving);
            let (Some(export), Some(server)) = (found, server) else {
                return Err(DaemonError::ExportNotFound(id.to_owned()));
            };
            let removal = match removal {
                Removal::Safe => nbd::Removal::Safe,
                Removal::Hard => nbd::Removal::Hard,
            };
            let removed = server.remove_export(&export.name, removal).map_err(|error| match error {
                ExportError::InUse(_) => DaemonError::ExportInUse(id.to_owned()),
                other => other.into(),
            })?;
            export.is_leaving = true;
            removed
        };
        // Seeing it off is a change of its own, which may come later.
        drop(change);
        self.see_off(id, removed, removal);
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
            self.stop(server);
        }
    }

    fn stop(&self, server: NbdServer) {
        let mut ids = Vec::new();
        for export in self.lock_serving().exports.iter_mut().rev() {
            // One that is leaving already is another's to see off.
            if !std::mem::replace(&mut export.is_leaving, true) {
                ids.push(export.id.clone());
            }
        }
        server.stop();
        for id in ids {
            self.delete(&id);
        }
    }

    /// Waits until the last client has left, beside the caller where that may take long.
    fn see_off(self: &Arc<Self>, id: &str, removed: Removed, removal: Removal) {
        let (daemon, name) = (Arc::downgrade(self), id.to_owned());
        let waiting = move || {
            removed.wait();
            drop(removed);
            if let Some(daemon) = daemon.upgrade() {
                daemon.delete(&name);
            }
        };
        match removal {
            // It has no clients.
            Removal::Safe => waiting(),
            Removal::Hard => {
                // Bounded by the number of exports.
                let thread = std::thread::Builder::new().name("export-end".to_owned()).stack_size(STACK);
                // Without a thread it stays listed as leaving until the server is stopped.
                let _ = thread.spawn(waiting);
            }
        }
    }

    fn delete(&self, id: &str) {
        let export = {
            let mut serving = self.lock_serving();
            let found = serving.exports.iter().position(|export| export.id == id);
            found.map(|index| serving.exports.remove(index))
        };
        if let Some(export) = export {
            set_busy(&export, false);
            // A client may still be letting go of it; who hears of the end may remove the node at once.
            self.graph.detach(&export.place);
            // Or open its file again.
            drop(export);
            self.drop_orphans_alone();
            self.events.say(Happening::ExportDeleted { id: id.to_owned() });
        }
    }

    fn lock_serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// QEMU's text for an address that cannot be had.
fn bind_text(doors: &[Door], error: &io::Error) -> String {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => "No such file or directory".to_owned(),
        io::ErrorKind::AddrInUse => "Address already in use".to_owned(),
        io::ErrorKind::AddrNotAvailable => "Cannot assign requested address".to_owned(),
        io::ErrorKind::PermissionDenied => "Permission denied".to_owned(),
        _ => error.to_string(),
    };
    match doors.first() {
        Some(Door::Bind(Address::Unix(path))) => {
            format!("Failed to bind socket to {}: {reason}", path.display())
        }
        Some(Door::Inherited(_)) if error.raw_os_error().is_none() => error.to_string(),
        Some(Door::Inherited(_)) => {
            let errno = rustix::io::Errno::from_io_error(error).unwrap_or(rustix::io::Errno::IO);
            format!("Failed to listen on fd socket: {}", super::error::strerror(errno))
        }
        _ => format!("Failed to bind socket: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::daemon::{DriverSpec, NodeSpec};

    #[test]
    fn nobody_is_greeted_before_there_is_an_export_to_be_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd");
        let daemon = Daemon::new();
        let null = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
        daemon.add_node(&NodeSpec::new(Some("n".to_owned()), null)).unwrap();
        let address = NbdAddress::Unix(path.clone());
        let spec = NbdSpec {
            addresses: vec![address],
            max_connections: 0,
            handshake_time: None,
            memory_max: None,
            tls: None,
        };
        let export = |node: &str| ExportSpec {
            id: "e".to_owned(),
            node: node.to_owned(),
            name: None,
            description: None,
            writable: false,
            depth: Depth::Untold,
            bitmaps: Vec::new(),
            clients: None,
        };
        // The moment between the server and its export, which an export that is refused makes last.
        assert!(daemon.serve(&spec, &export("missing")).is_err());
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(client.read(&mut [0]).is_err(), "greeted");
        client.set_read_timeout(None).unwrap();
        daemon.add_export(&export("n")).unwrap();
        daemon.let_clients_in();
        client.read_exact(&mut [0; 18]).unwrap();
        daemon.shutdown().unwrap();
    }
}
