//! [`NbdServer`]: the NBD front end.
//!
//! A thread with a ring of its own takes connections and serves them, with others beside it where there are several
//! ([`crew`]); the handle may be used from any other thread. What is said on the wire is decided in `heliostat_block::nbd`, what is done with a request in
//! [`crate::serve`]; here are sockets, threads and limits. Called by the control plane and the command line.

mod budget;
mod connection;
mod crew;
mod exports;
mod flights;
mod greeting;
mod input;
mod pace;
mod patience;
mod stint;

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use futures_util::future::{Either, select, select_all};
pub use heliostat_block::nbd::handshake::TlsPolicy;
use heliostat_host::clock::RealClock;
use heliostat_host::runtime::Thread;
use heliostat_host::socket::{Address, Listener, Socket};
use heliostat_host::tls::{Credentials, Peer, PeerCheck};

use crate::serve::Buffers;
use budget::Budget;
use crew::Crew;
use exports::Exports;
pub use exports::{ExportError, ExportSettings, ExportStatus, Removal, Removed};

/// Connections of one server at once when nothing is said, as QEMU has it.
pub const CONNECTIONS_DEFAULT: usize = 100;

/// How long a client may take for the handshake when nothing is said. People type no handshakes; a program on
/// the other side of the world needs two seconds.
pub const HANDSHAKE_TIME_DEFAULT: Duration = Duration::from_secs(10);

/// The memory that the connections of one server may hold together when nothing is said: eight times what
/// one may hold.
pub const MEMORY_DEFAULT: u64 = 512 << 20;

/// How long a client may neither read its answers nor send the data that it has announced while others wait for
/// memory, when nothing is said. Longer than a guest is stopped to be looked at, shorter than what others' block layers
/// take for an error.
pub const SLOW_READER_TIME_DEFAULT: Duration = Duration::from_secs(20);

/// How long to wait when the host has no descriptor left for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who may reach a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This host: a Unix socket, or TCP on a loopback address.
    Local,
    /// Whoever can reach the address. NBD has no password.
    Anywhere,
}

/// TLS as a server has it.
#[derive(Clone)]
pub struct ServerTls {
    /// A server's certificates.
    pub credentials: Arc<Credentials>,
    /// Whether clients must, or may.
    pub policy: TlsPolicy,
    /// Decides who is let in, by the certificate that was shown. Asked on the server's thread, once for each
    /// connection that has set up TLS. `None` lets everybody in whom the credentials let in.
    pub admits: Option<Admits>,
}

/// A rule of who is let in.
pub type Admits = Arc<dyn Fn(&Peer) -> bool + Send + Sync>;

impl ServerTls {
    /// Whether nobody is served without TLS and a certificate.
    fn keeps_strangers_out(&self) -> bool {
        self.policy == TlsPolicy::Required && self.credentials.settings().peers == PeerCheck::Required
    }

    /// Says whether whoever has set up TLS is let in. Nobody is who has shown no certificate where there is a rule.
    fn admits(&self, peer: Option<&Peer>) -> bool {
        self.admits.as_ref().is_none_or(|admits| peer.is_some_and(|peer| admits(peer)))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("credentials", &self.credentials)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

/// How a server is to be.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Who may reach it. Where TLS is required, and a certificate of who comes, anybody may.
    pub reach: Reach,
    /// Whether clients may speak to it inside TLS, or must.
    pub tls: Option<ServerTls>,
    /// The most connections at once; further ones wait. 0 means no bound.
    pub connections_max: usize,
    /// How long a client may take until it has chosen its export. After that it may be silent for ever.
    pub handshake_time: Duration,
    /// Whether clients are served from the start.
    pub doors: Doors,
    /// The most bytes that all connections hold together: of requests in flight and of answers that are not read. At
    /// least two of the largest requests.
    pub memory_max: u64,
    /// How long a client may neither read its answers nor send the data that it has announced, beside a few bytes,
    /// while others wait for that memory.
    pub slow_reader_time: Duration,
}

/// Whether a new server serves those who connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doors {
    /// At once.
    Open,
    /// From [`NbdServer::let_in`] on; until then they wait for its first byte.
    Closed,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            reach: Reach::Local,
            tls: None,
            connections_max: CONNECTIONS_DEFAULT,
            handshake_time: HANDSHAKE_TIME_DEFAULT,
            doors: Doors::Open,
            memory_max: MEMORY_DEFAULT,
            slow_reader_time: SLOW_READER_TIME_DEFAULT,
        }
    }
}

/// An NBD server that runs on a thread of its own.
///
/// Dropped, it stops as [`NbdServer::stop`] says.
pub struct NbdServer {
    exports: Arc<Exports>,
    addresses: Vec<Address>,
    /// `None` once it was stopped.
    thread: Option<Thread<()>>,
}

/// Where a server gets its clients from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Door {
    /// An address that it binds.
    Bind(Address),
    /// A socket that whoever started the program has bound, by its descriptor's number.
    Inherited(i32),
}

impl NbdServer {
    /// Listens and starts the thread. There are no exports yet.
    ///
    /// # Errors
    /// `PermissionDenied` for an address that others can reach when that was not asked for; `AddrInUse`; any
    /// other of the host's. The message names the address.
    pub fn start(address: &Address, settings: ServerSettings) -> io::Result<Self> {
        Self::start_at(&[Door::Bind(address.clone())], settings)
    }

    /// The same at several addresses. Which of them a client comes from makes no difference.
    ///
    /// # Errors
    /// As [`NbdServer::start`], of the first that cannot be had; then it listens at none of them. `InvalidInput` for
    /// a descriptor that is no socket.
    pub fn start_at(doors: &[Door], settings: ServerSettings) -> io::Result<Self> {
        let mut listeners = Vec::with_capacity(doors.len());
        for door in doors {
            let listener = match door {
                Door::Bind(address) => {
                    check_reach(address, &settings)?;
                    Listener::bind(address)?
                }
                Door::Inherited(number) => Listener::inherited(*number)?,
            };
            check_reach(listener.address(), &settings)?;
            listeners.push(listener);
        }
        if listeners.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a server needs an address"));
        }
        let addresses = listeners.iter().map(|listener| listener.address().clone()).collect();
        let exports = Arc::new(Exports::new(settings.doors == Doors::Open));
        let shared = Arc::clone(&exports);
        let body = move || run(listeners, shared, settings);
        let thread = Thread::spawn("nbd", body)?;
        Ok(Self { exports, addresses, thread: Some(thread) })
    }

    /// The first of the addresses at which it listens, with the port that the host chose.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.addresses[0]
    }

    /// Where it listens, with the ports that the host chose; in the order in which they were given.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Takes connections from now on, where it was started with [`Doors::Closed`].
    pub fn let_in(&self) {
        self.exports.open();
    }

    /// Says whether an export of that name and description could be added now.
    ///
    /// # Errors
    /// As [`NbdServer::add_export`].
    pub fn check_export(&self, name: &str, description: &str) -> Result<(), ExportError> {
        self.exports.check(name, description)
    }

    /// Offers one more export.
    ///
    /// # Errors
    /// When the name is taken or cannot be said, or there are too many.
    pub fn add_export(&self, settings: ExportSettings) -> Result<(), ExportError> {
        self.exports.add(settings)
    }

    /// Offers an export no longer. With [`Removal::Hard`], clients' connections end soon; the value returned
    /// tells when.
    ///
    /// # Errors
    /// When there is no such export, or with [`Removal::Safe`] when clients use it.
    pub fn remove_export(&self, name: &str, removal: Removal) -> Result<Removed, ExportError> {
        self.exports.remove(name, removal)
    }

    /// The exports and how many connections use each.
    #[must_use]
    pub fn exports(&self) -> Vec<ExportStatus> {
        self.exports.status()
    }

    /// Takes no more connections and no more requests, lets those in flight end, sends their answers, closes
    /// the connections, and waits for all that. A client that does not read its answers is waited for a few
    /// seconds.
    ///
    /// # Panics
    /// With the panic of the server's thread.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.exports.stop();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the connections of one thread share.
struct Shared {
    exports: Arc<Exports>,
    buffers: Buffers,
    clock: RealClock,
    handshake_time: Duration,
    tls: Option<ServerTls>,
    slow_reader_time: Duration,
    budget: Rc<Budget>,
    /// Connections of this thread that have something to do.
    awake: Rc<Cell<usize>>,
    /// Those of all threads of the server.
    all_awake: Arc<AtomicUsize>,
}

impl Shared {
    fn new(exports: Arc<Exports>, settings: &ServerSettings, all_awake: Arc<AtomicUsize>) -> Self {
        Self {
            exports,
            buffers: Buffers::new(),
            clock: RealClock::new(),
            handshake_time: settings.handshake_time,
            tls: settings.tls.clone(),
            slow_reader_time: settings.slow_reader_time,
            budget: Budget::new(settings.memory_max),
            awake: Rc::default(),
            all_awake,
        }
    }
}

/// The server's thread.
async fn run(listeners: Vec<Listener>, exports: Arc<Exports>, settings: ServerSettings) {
    let bound = if settings.connections_max == 0 { usize::MAX } else { settings.connections_max };
    let mut crew = Crew::new(Arc::clone(&exports), settings);
    let tally = Arc::clone(crew.tally());
    // Those who have connected wait for it: they are to find what will be offered from the start.
    let _ = until_stopped(&exports, exports.opened()).await;
    let mut turn = 0;
    loop {
        let next = async {
            tally.fewer_than(bound).await;
            accept_any(&listeners, &mut turn).await
        };
        match until_stopped(&exports, next).await {
            None => break,
            Some(Ok(socket)) => crew.serve(socket),
            Some(Err(_)) => RealClock::new().sleep(ACCEPT_PAUSE).await,
        }
    }
    drop(listeners);
    crew.end().await;
}

/// Takes the next connection from whichever listener has one. Each is looked at first in its turn, so that one with
/// many clients does not keep those of others waiting.
async fn accept_any(listeners: &[Listener], turn: &mut usize) -> io::Result<Socket> {
    // `start_at` refuses a server without any.
    *turn = (*turn + 1) % listeners.len();
    let (later, first) = listeners.split_at(*turn);
    let accepts = first.iter().chain(later).map(|listener| Box::pin(listener.accept()));
    select_all(accepts).await.0
}

/// Refuses an address beyond what was asked for.
fn check_reach(address: &Address, settings: &ServerSettings) -> io::Result<()> {
    if let (Address::Tcp(socket), Reach::Local) = (address, settings.reach)
        && !socket.ip().is_loopback()
        && !settings.tls.as_ref().is_some_and(ServerTls::keeps_strangers_out)
    {
        let message = format!("{address} can be reached from other hosts, which was not asked for");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(())
}

/// Awaits `future`, but not beyond the server's end. `None` when that came first.
async fn until_stopped<T>(exports: &Exports, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    loop {
        let changed = exports.listen();
        if exports.is_stopping() {
            return None;
        }
        match select(future, changed).await {
            Either::Left((output, _)) => return Some(output),
            Either::Right(((), unfinished)) => future = unfinished,
        }
    }
}
