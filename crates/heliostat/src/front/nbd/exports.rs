//! [`Exports`]: what an NBD server offers, changed by the control plane while connections use it.
//!
//! Never waits with the lock held. Called by the server's handle on any thread and by its connections.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::{Event, EventListener, Listener};
use heliostat_block::limits::{NBD_CONTEXTS_MAX, NBD_PAYLOAD_MAX};
use heliostat_block::nbd::wire::STRING_MAX;
use heliostat_block::nbd::{Access, BlockSizes, Offer};
use heliostat_host::tls::Peer;

use crate::authz;
use crate::serve::Seat;

/// The most exports of one server: a listing of them stays below what a client will read.
const EXPORTS_MAX: usize = 1024;

/// What an export is to be.
pub struct ExportSettings {
    /// The name that clients ask for; 1 to 4096 bytes without NUL. May be empty, which is the default export.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Where its requests go.
    pub seat: Arc<Seat>,
    /// Whether clients may write. Where the node may not be written they cannot anyway.
    pub access: Access,
    /// Whether clients that ask for no name get it. A server's only export is that anyway.
    pub is_default: bool,
    /// Whom it is for, by the certificates that they show; for others it is not there. `None`: for everybody.
    pub clients: Option<Vec<authz::Client>>,
}

/// Why an export was not added or removed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// There is one of that name.
    #[error("NBD server already has export named '{0}'")]
    Duplicate(String),
    /// There is none of that name.
    #[error("Export '{0}' is not found")]
    NotFound(String),
    /// Clients use it.
    #[error("export '{0}' still in use")]
    InUse(String),
    /// The name is longer than the protocol allows.
    #[error("export name '{0}' too long")]
    NameTooLong(String),
    /// The description is.
    #[error("description '{0}' too long")]
    DescriptionTooLong(String),
    /// The name, the description or the name of a bitmap cannot be said in the protocol.
    #[error("export name, description or bitmap's name is too long or holds NUL")]
    Invalid,
    /// More contexts than there may be.
    #[error("an NBD export has at most {NBD_CONTEXTS_MAX} metadata contexts")]
    TooManyContexts,
    /// There are as many as there may be.
    #[error("an NBD server has at most {EXPORTS_MAX} exports")]
    TooMany,
    /// The server is being stopped.
    #[error("NBD server not running")]
    Stopping,
}

/// What to do about clients of an export that is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Refuse while there are any.
    Safe,
    /// Let their requests in flight end, send the answers, close their connections.
    Hard,
}

/// An export as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Connections that use it.
    pub clients: usize,
}

/// One export. Outlives its removal as long as a connection uses it.
pub(super) struct Export {
    settings: ExportSettings,
    closing: AtomicBool,
    clients: Arc<Clients>,
}

/// How many connections use an export.
#[derive(Default)]
struct Clients {
    count: Mutex<usize>,
    none: Event,
}

/// That a connection uses an export.
struct Counted(Arc<Clients>);

type ByName = BTreeMap<String, Arc<Export>>;

/// What a server offers.
pub(super) struct Exports {
    /// Held for look-ups and changes only. Lock order: this, then an export's clients.
    by_name: Mutex<ByName>,
    stopping: AtomicBool,
    /// Connections are taken.
    is_open: AtomicBool,
    /// Tells connections to look whether they are to end.
    changed: Event,
}

/// A connection's use of an export.
pub(super) struct Client {
    export: Arc<Export>,
    /// Dropped last: who hears that there are no clients may want the node's file for himself.
    _counted: Counted,
}

/// An export that is no longer offered, while its last connections end.
pub struct Removed(Arc<Export>);

impl Exports {
    pub(super) const fn new(is_open: bool) -> Self {
        Self {
            by_name: Mutex::new(BTreeMap::new()),
            stopping: AtomicBool::new(false),
            is_open: AtomicBool::new(is_open),
            changed: Event::new(),
        }
    }

    /// Lets connections be taken.
    pub(super) fn open(&self) {
        self.is_open.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    /// Waits until connections are taken.
    pub(super) async fn opened(&self) {
        loop {
            let changed = self.changed.listen();
            if self.is_open.load(Ordering::SeqCst) {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn check(&self, name: &str, description: &str) -> Result<(), ExportError> {
        self.check_in(&self.by_name(), name, description)
    }

    fn check_in(&self, by_name: &ByName, name: &str, description: &str) -> Result<(), ExportError> {
        if name.len() > STRING_MAX {
            return Err(ExportError::NameTooLong(name.to_owned()));
        }
        if description.len() > STRING_MAX {
            return Err(ExportError::DescriptionTooLong(description.to_owned()));
        }
        if name.contains('\0') || description.contains('\0') {
            return Err(ExportError::Invalid);
        }
        if self.is_stopping() {
            return Err(ExportError::Stopping);
        }
        if by_name.len() >= EXPORTS_MAX {
            return Err(ExportError::TooMany);
        }
        if by_name.contains_key(name) {
            return Err(ExportError::Duplicate(name.to_owned()));
        }
        Ok(())
    }

    pub(super) fn add(&self, settings: ExportSettings) -> Result<(), ExportError> {
        let mut by_name = self.by_name();
        self.check_in(&by_name, &settings.name, &settings.description)?;
        let contexts = settings.seat.contexts.offered();
        if contexts.len() > NBD_CONTEXTS_MAX {
            return Err(ExportError::TooManyContexts);
        }
        let is_sayable = |name: &str| name.len() <= STRING_MAX && !name.contains('\0');
        if !contexts.iter().all(|context| is_sayable(&context.name())) {
            return Err(ExportError::Invalid);
        }
        let name = settings.name.clone();
        let (closing, clients) = (AtomicBool::new(false), Arc::default());
        by_name.insert(name, Arc::new(Export { settings, closing, clients }));
        Ok(())
    }

    pub(super) fn remove(&self, name: &str, removal: Removal) -> Result<Removed, ExportError> {
        let mut by_name = self.by_name();
        let export = by_name.get(name).ok_or_else(|| ExportError::NotFound(name.to_owned()))?;
        if removal == Removal::Safe && export.clients.count() > 0 {
            return Err(ExportError::InUse(name.to_owned()));
        }
        let export = Arc::clone(export);
        export.closing.store(true, Ordering::SeqCst);
        by_name.remove(name);
        drop(by_name);
        self.changed.notify(usize::MAX);
        Ok(Removed(export))
    }

    pub(super) fn status(&self) -> Vec<ExportStatus> {
        let by_name = self.by_name();
        by_name
            .iter()
            .map(|(name, export)| ExportStatus { name: name.clone(), clients: export.clients.count() })
            .collect()
    }

    /// What a handshake with this peer may offer now. In the order of their names.
    pub(super) fn offers(&self, peer: Option<&Peer>) -> (Vec<Arc<Export>>, Vec<Offer>) {
        let is_for = |export: &&Arc<Export>| {
            export.settings.clients.as_ref().is_none_or(|clients| authz::is_among(clients, peer))
        };
        let exports: Vec<_> = self.by_name().values().filter(is_for).cloned().collect();
        let offers = exports.iter().map(|export| export.offer()).collect();
        (exports, offers)
    }

    /// Counts a connection in. `None` when the export was removed since it was offered.
    pub(super) fn enter(&self, export: &Arc<Export>) -> Option<Client> {
        let _by_name = self.by_name();
        if export.is_closing() || self.is_stopping() {
            return None;
        }
        Some(Client { export: Arc::clone(export), _counted: Clients::enter(&export.clients) })
    }

    /// Tells every connection to end.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Hears of the next change from now on. To be made before the state is looked at.
    pub(super) fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    fn by_name(&self) -> MutexGuard<'_, ByName> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Export {
    fn offer(&self) -> Offer {
        let node = self.settings.seat.place.node();
        let access = if node.options().read_only { Access::ReadOnly } else { self.settings.access };
        let traits = node.traits();
        Offer {
            name: self.settings.name.clone(),
            description: self.settings.description.clone(),
            size: node.size(),
            access,
            // The node takes requests of any alignment, and a pivot may bring one with other blocks.
            block_sizes: BlockSizes::new(1, traits.preferred_size.max(traits.block_size), NBD_PAYLOAD_MAX),
            is_default: self.settings.is_default,
            contexts: self.settings.seat.contexts.offered(),
        }
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }
}

impl Clients {
    fn enter(this: &Arc<Self>) -> Counted {
        *this.lock() += 1;
        Counted(Arc::clone(this))
    }

    fn count(&self) -> usize {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Where its requests go.
    pub(super) fn seat(&self) -> &Arc<Seat> {
        &self.export.settings.seat
    }

    /// Says whether the export was removed.
    pub(super) fn is_closing(&self) -> bool {
        self.export.is_closing()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut count = self.0.lock();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify(usize::MAX);
        }
    }
}

impl Removed {
    /// Waits until its last connection has ended. On any runtime.
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind; the connections end all the same.
    pub async fn ended(&self) {
        let clients = &self.0.clients;
        while clients.count() > 0 {
            let none = clients.none.listen();
            if clients.count() > 0 {
                none.await;
            }
        }
    }

    /// As [`Removed::ended`], blocking.
    pub fn wait(&self) {
        let clients = &self.0.clients;
        while clients.count() > 0 {
            let none = clients.none.listen();
            if clients.count() > 0 {
                none.wait();
            }
        }
    }
}
