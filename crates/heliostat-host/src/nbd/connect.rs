//! One attempt to reach an export: connect, agree, and perhaps make it private first.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::future::{Either, select};
use heliostat_block::nbd::ReplyStyle;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, NegotiationError, Wish};
use heliostat_block::nbd::wire::rep;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::blocking;
use crate::clock::RealClock;
use crate::socket::{Address, Socket};
use crate::stream::Stream;
use crate::tls::Credentials;

/// How long an attempt may take from the first packet to the last word of the handshake, names looked up included: as
/// long as a connection alone may take, and longer than the other side of the world needs for both.
const ATTEMPT_TIME: Duration = Duration::from_secs(10);

/// Received at once in the handshake.
const RECEIVE: usize = 4096;

/// Where a server is.
#[derive(Clone, Debug)]
pub enum ServerAddress {
    /// A socket of this host, or a numeric address.
    Socket(Address),
    /// A name to look up, each time anew, and a port.
    Host(String, u16),
    /// A connection that somebody has made already. It cannot be made again.
    Connected(Arc<OpenConnection>),
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(Address::Unix(path)) => write!(f, "{}", path.display()),
            // As QEMU has it: without brackets.
            Self::Socket(Address::Tcp(address)) => write!(f, "{}:{}", address.ip(), address.port()),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
            Self::Connected(_) => f.write_str("a connection made by others"),
        }
    }
}

/// A connection that somebody has made, until it is used.
#[derive(Debug)]
pub struct OpenConnection(Mutex<Option<OwnedFd>>);

impl OpenConnection {
    /// Holds `socket`, which must be a connected stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(socket))))
    }

    /// Holds a copy of the descriptor of that number, which this process has.
    ///
    /// # Errors
    /// When there is none, or when the host gives no copy.
    pub fn inherited(number: i32) -> io::Result<Arc<Self>> {
        // So it need not be known who else has it.
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        Ok(Self::new(pidfd_getfd(this, number, PidfdGetfdFlags::empty())?))
    }

    fn take(&self) -> io::Result<OwnedFd> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        socket.ok_or_else(|| io::Error::other("a connection that was made by others cannot be made again"))
    }
}

/// What is to be reached, and how.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    pub(super) address: ServerAddress,
    pub(super) export: String,
    pub(super) context: Option<String>,
    pub(super) tls: Option<Tls>,
}

/// With what connections are encrypted.
#[derive(Clone, Debug)]
pub struct Tls {
    /// What is shown to the server, and whom to trust.
    pub credentials: Arc<Credentials>,
    /// What the server's certificate must be for.
    pub host: String,
}

/// A connection in the transmission phase.
pub(super) struct Reached {
    pub(super) stream: Stream,
    pub(super) found: Found,
    /// What was received beyond the handshake.
    pub(super) rest: BytesMut,
}

/// Tries once. The error is for people.
pub(super) async fn reach(destination: Destination, clock: RealClock) -> Result<Reached, String> {
    let attempt = pin!(attempt(&destination));
    match select(attempt, clock.sleep(ATTEMPT_TIME)).await {
        Either::Left((reached, _)) => reached,
        Either::Right(_) => Err(format!("the server did not answer within {} s", ATTEMPT_TIME.as_secs())),
    }
}

async fn attempt(destination: &Destination) -> Result<Reached, String> {
    let address = &destination.address;
    let mut stream = Stream::from(connect(address).await?);
    let mut talk =
        Talk { input: BytesMut::new(), output: BytesMut::new(), negotiation: negotiation(destination) };
    if let Some(tls) = &destination.tls {
        if talk.go_on(&stream).await?.is_some() {
            return Err("the server agreed before it was private".to_owned());
        }
        let private = stream.connect_tls(&tls.credentials, &tls.host).await;
        stream = private.map_err(|error| format!("no TLS with '{address}': {error}"))?;
        talk.negotiation.tls_reached(&mut talk.output);
        send_all(&stream, &mut talk.output).await?;
    }
    match talk.go_on(&stream).await? {
        // What was asked for by name is not done without.
        Some(found) if found.terms.allocation.is_none() && destination.context.is_some() => {
            let name = destination.context.as_deref().unwrap_or_default();
            Err(format!("requested x-dirty-bitmap {name} not found"))
        }
        Some(found) => Ok(Reached { stream, found, rest: talk.input }),
        None => Err("the server wants to be private twice".to_owned()),
    }
}

fn negotiation(destination: &Destination) -> Negotiation {
    let allocation = destination.context.clone().map_or(Allocation::Wanted, Allocation::Context);
    let wish = Wish { export: destination.export.clone(), replies: ReplyStyle::Extended, allocation };
    match destination.tls {
        None => Negotiation::new(wish),
        Some(_) => Negotiation::new(wish).with_tls(),
    }
}

async fn connect(address: &ServerAddress) -> Result<Socket, String> {
    // The words are QEMU's.
    let failed = |error: io::Error| format!("Failed to connect to '{address}': {}", plain(&error));
    match address {
        ServerAddress::Socket(socket) => Socket::connect(socket).await.map_err(failed),
        ServerAddress::Connected(connection) => {
            connection.take().and_then(Socket::from_fd).map_err(|error| error.to_string())
        }
        ServerAddress::Host(host, port) => {
            let name = (host.clone(), *port);
            let found = blocking::connecting().run(move || name.to_socket_addrs()).await;
            let unknown = |why: &str| format!("address resolution failed for {address}: {why}");
            let mut last = unknown("it has no address");
            for found in found.map_err(|error| unknown(resolver_words(&error.to_string())))? {
                match Socket::connect(&Address::Tcp(found)).await {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = failed(error),
                }
            }
            Err(last)
        }
    }
}

/// The host's words alone.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.rsplit_once(" (os error ").map_or(text.as_str(), |(text, _)| text);
    // Where to is said already.
    text.rsplit_once(": ").map_or(text, |(_, text)| text).to_owned()
}

/// What the resolver said, without what the standard library puts before it.
fn resolver_words(text: &str) -> &str {
    text.strip_prefix("failed to lookup address information: ").unwrap_or(text)
}

struct Talk {
    negotiation: Negotiation,
    input: BytesMut,
    output: BytesMut,
}

impl Talk {
    /// Goes on until there is an agreement, or until TLS must begin.
    async fn go_on(&mut self, stream: &Stream) -> Result<Option<Found>, String> {
        loop {
            let step = self.negotiation.step(&mut self.input, &mut self.output);
            // Also after a refusal: the goodbye, which the server need not hear.
            let sent = send_all(stream, &mut self.output).await;
            let found = step.map_err(|error| match error {
                // The words are QEMU's.
                NegotiationError::Refused { reply: rep::ERR_UNKNOWN, .. } => {
                    "Requested export not available".to_owned()
                }
                error => error.to_string(),
            })?;
            sent?;
            if found.is_some() || self.negotiation.awaits_tls() {
                return Ok(found);
            }
            receive(stream, &mut self.input).await?;
        }
    }
}

async fn send_all(stream: &Stream, output: &mut BytesMut) -> Result<(), String> {
    let result: io::Result<()> = async {
        while !output.is_empty() {
            match stream.send_now(&[IoSlice::new(output)]) {
                Ok(count) => output.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
    .await;
    result.map_err(|error| error.to_string())
}

async fn receive(stream: &Stream, input: &mut BytesMut) -> Result<(), String> {
    let mut buffer = [0; RECEIVE];
    loop {
        match stream.recv_now(&mut buffer) {
            Ok(0) => return Err("the server closed the connection in the handshake".to_owned()),
            Ok(count) => {
                input.extend_from_slice(&buffer[..count]);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.readable().await.map_err(|error| error.to_string())?;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}
