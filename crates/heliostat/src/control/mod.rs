//! Control: QMP on a Unix socket or this host's loopback, for any number of operators at once.
//!
//! One thread takes connections; each client has one that reads and obeys and one that sends. Commands may
//! block, so a client that waits for one holds nobody else up. Bounded everywhere: clients, message length,
//! nesting, what waits to be sent. Touches no image and decides nothing; that is the daemon's.

mod arguments;
mod commands;
mod events;
pub mod json;
mod outbox;
mod peers;
mod qemu_io;
mod refusal;
pub mod schema;
mod session;
mod socket;
pub mod splitter;
mod stream;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use heliostat_host::runtime::STACK;
use serde_json::{Map, Value};

pub use arguments::Arguments;
pub use commands::{Depth, image_info, qemu_version};
pub use json::Style;
pub use peers::{Peer, Peers};
pub use refusal::Refusal;

use crate::daemon::{Daemon, Watch};
use outbox::{Outbox, Overflow};
use session::Session;
use socket::{ControlSocket, Doors};
use splitter::Splitter;
use stream::Stream;

/// Clients at once. Each costs two threads; more is a client that forgets to close its connections.
pub const CLIENTS_MAX: usize = 64;

/// How long the end waits for clients to read what was said last.
const FAREWELL_TIME: Duration = Duration::from_secs(2);

/// How long a client that says no more may take to read what it was sent.
const PARTING_TIME: Duration = Duration::from_secs(10);

/// How long to wait when the host has no descriptor left for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How much is read at once: a few dozen commands.
const READ_LEN: usize = 16 << 10;

/// Where operators connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlAddress {
    /// At a Unix socket.
    Unix(PathBuf),
    /// At an address of this host's loopback.
    Tcp(SocketAddr),
}

/// How operators are served.
#[derive(Clone, Debug)]
pub struct ControlSettings {
    /// Where they connect.
    pub address: ControlAddress,
    /// Who may, beside whoever runs the daemon. With nobody named, the mode of the socket's file decides.
    pub peers: Peers,
    /// How messages are laid out.
    pub style: Style,
}

impl ControlSettings {
    /// At a Unix socket, for whoever runs the daemon.
    #[must_use]
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        let address = ControlAddress::Unix(path.into());
        Self { address, peers: Peers::none(), style: Style::Line }
    }
}

/// Carries a command out, as if a client had sent it.
///
/// # Errors
/// [`Refusal`], as a client sees it.
pub fn execute(daemon: &Arc<Daemon>, name: &str, arguments: &Map<String, Value>) -> Result<Value, Refusal> {
    commands::run(daemon, name, arguments)
}

/// Where operators may connect already, and wait to be greeted.
pub struct ControlListener {
    socket: ControlSocket,
    peers: Peers,
    style: Style,
}

impl ControlListener {
    /// Listens. A socket's file is its owner's alone, unless others were named who may give orders.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there already; `PermissionDenied` where other hosts could reach it; any
    /// other of the host's. The message names the path.
    pub fn bind(settings: ControlSettings) -> io::Result<Self> {
        let ControlSettings { address, peers, style } = settings;
        let doors = if peers.is_none() { Doors::Owner } else { Doors::Everybody };
        let socket = match &address {
            ControlAddress::Unix(path) => ControlSocket::bind(path, doors)?,
            ControlAddress::Tcp(address) => ControlSocket::bind_tcp(*address)?,
        };
        Ok(Self { socket, peers, style })
    }

    /// The same, with messages laid out so.
    #[must_use]
    pub fn with_style(self, style: Style) -> Self {
        Self { style, ..self }
    }

    /// Where it listens, where that is no path: with the port, where none was said.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.socket.tcp_address()
    }
}

/// QMP for operators. Ends when it is stopped or dropped.
pub struct ControlServer {
    shared: Arc<Shared>,
    _watch: Watch,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    daemon: Arc<Daemon>,
    socket: ControlSocket,
    peers: Peers,
    style: Style,
    stopping: AtomicBool,
    clients: Mutex<Clients>,
    /// A client has gone.
    fewer: Condvar,
}

#[derive(Default)]
struct Clients {
    list: BTreeMap<u64, Arc<Client>>,
    next: u64,
}

struct Client {
    stream: Stream,
    outbox: Outbox,
    style: Style,
}

impl ControlServer {
    /// Listens and takes commands for `daemon` from now on.
    ///
    /// # Errors
    /// As [`ControlListener::bind`].
    pub fn start(settings: ControlSettings, daemon: Arc<Daemon>) -> io::Result<Self> {
        Self::serve(ControlListener::bind(settings)?, daemon)
    }

    /// Takes commands for `daemon` from now on.
    ///
    /// # Errors
    /// The host's, where it has no thread for it.
    pub fn serve(listener: ControlListener, daemon: Arc<Daemon>) -> io::Result<Self> {
        let ControlListener { socket, peers, style } = listener;
        let shared = Arc::new(Shared {
            daemon: Arc::clone(&daemon),
            socket,
            peers,
            style,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
            fewer: Condvar::new(),
        });
        let listeners = Arc::downgrade(&shared);
        let watch = daemon.watch(move |event| {
            if let Some(shared) = Weak::upgrade(&listeners) {
                shared.tell(&line(&events::message(event), shared.style));
            }
        });
        let accepting = Arc::clone(&shared);
        let acceptor =
            thread::Builder::new().name("qmp-accept".to_owned()).spawn(move || accepting.accept())?;
        Ok(Self { shared, _watch: watch, acceptor: Some(acceptor) })
    }

    /// Takes no more commands, lets those under way end, lets clients read what was said last, closes their
    /// connections and removes the socket. Waits a few seconds at most for clients that do not read.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Said here, not left to a drop: clients' threads hold on to the socket too, and may outlive the program.
        self.shared.socket.close();
        // Its panic has been told by its thread.
        let _ = acceptor.join();
        self.shared.say_farewell();
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn accept(self: &Arc<Self>) {
        loop {
            let accepted = self.socket.accept();
            if self.stopping.load(Ordering::SeqCst) {
                match accepted {
                    // Hung up on: it would wait for its greeting until the program has ended.
                    Ok(_) => continue,
                    // Nobody is left that had connected before the socket was closed.
                    Err(_) => return,
                }
            }
            match accepted {
                Ok(stream) => self.take_on(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => thread::sleep(ACCEPT_PAUSE),
            }
        }
    }

    fn take_on(self: &Arc<Self>, stream: Stream) {
        if let Err(text) = self.peers.check(&stream) {
            turn_away(&stream, text);
            return;
        }
        let client = Arc::new(Client { stream, outbox: Outbox::default(), style: self.style });
        let number = {
            let mut clients = self.lock();
            if clients.list.len() >= CLIENTS_MAX {
                drop(clients);
                let text = format!("there are {CLIENTS_MAX} clients already, which is the most");
                turn_away(&client.stream, text);
                return;
            }
            clients.next += 1;
            let number = clients.next;
            clients.list.insert(number, Arc::clone(&client));
            number
        };
        client.outbox.send(line(&session::greeting(), self.style));
        let (sender, shared) = (Arc::clone(&client), Arc::clone(self));
        let sending = thread::Builder::new().name(format!("qmp-out-{number}"));
        let reading = thread::Builder::new().name(format!("qmp-{number}")).stack_size(STACK);
        let sending = sending.spawn(move || {
            sender.send_all();
            shared.let_go(number);
        });
        if sending.is_err() {
            self.let_go(number);
            return;
        }
        let (daemon, reader) = (Arc::clone(&self.daemon), Arc::clone(&client));
        if reading.spawn(move || reader.obey_all(daemon)).is_err() {
            client.outbox.break_off();
        }
    }

    fn tell(&self, line: &Arc<[u8]>) {
        for client in self.lock().list.values() {
            if client.outbox.event(line) == Err(Overflow) {
                client.hang_up();
            }
        }
    }

    fn let_go(&self, number: u64) {
        self.lock().list.remove(&number);
        self.fewer.notify_all();
    }

    fn say_farewell(&self) {
        let deadline = Instant::now() + FAREWELL_TIME;
        let mut clients = self.lock();
        for client in clients.list.values() {
            // Its reader finds the end, and leaves after the command that it is carrying out.
            let _ = client.stream.shutdown(Shutdown::Read);
        }
        while !clients.list.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                clients.list.values().for_each(|client| client.hang_up());
                return;
            }
            clients = self.fewer.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Reads, obeys and replies until the client has nothing more to say.
    fn obey_all(&self, daemon: Arc<Daemon>) {
        let mut session = Session::new(daemon);
        let mut splitter = Splitter::default();
        let mut buffer = vec![0; READ_LEN];
        while self.outbox.wait_for_room() && !splitter.is_closed() {
            let count = match (&self.stream).read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let mut rest = &buffer[..count];
            while let Some(piece) = splitter.next(&mut rest) {
                if !self.outbox.wait_for_room() {
                    break;
                }
                let order = session.read(piece);
                if order.is_change() {
                    self.outbox.begin_command();
                }
                let reply = session.obey(order);
                if session.wants_events() {
                    self.outbox.want_events();
                }
                let reply = line(&reply, self.style);
                if rest.is_empty() {
                    // It waits for this one.
                    self.outbox.reply_at_once(reply, |batch| self.stream.send_now(batch));
                } else {
                    self.outbox.reply(reply);
                }
            }
        }
        self.outbox.finish();
        // It has nothing more to say, and may not be reading either.
        self.outbox.wait_until_sent(PARTING_TIME);
        self.hang_up();
    }

    /// Sends until there is nothing more to send or nobody to send it to, and closes the connection.
    fn send_all(&self) {
        while let Some(batch) = self.outbox.take() {
            if (&self.stream).write_all(&batch).is_err() {
                self.outbox.break_off();
            }
            self.outbox.sent();
        }
        self.hang_up();
    }

    fn hang_up(&self) {
        // Fails only where the client has hung up already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn line(message: &Value, style: Style) -> Arc<[u8]> {
    let mut text = json::write_in(message, style);
    text.push_str("\r\n");
    text.into_bytes().into()
}

/// Tells who is not served why not.
fn turn_away(mut stream: &Stream, text: String) {
    let refusal = refusal::Refusal::new(text).to_json();
    // A fresh connection takes so little at once; who cannot be told is turned away all the same.
    let _ = stream.write_all(&line(&serde_json::json!({ "error": refusal }), Style::Line));
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn who_has_connected_and_was_not_accepted_is_hung_up_on_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let shared = Arc::new(Shared {
            daemon: Daemon::new(),
            socket: ControlSocket::bind(&path, Doors::Owner).unwrap(),
            peers: Peers::none(),
            style: Style::Line,
            stopping: AtomicBool::new(true),
            clients: Mutex::default(),
            fewer: Condvar::new(),
        });
        let waiting: Vec<_> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
        shared.socket.close();
        shared.accept();
        for mut client in waiting {
            client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "the end, and no silence");
        }
    }
}
