//! One attempt to reach an export: connect, agree, and perhaps make it private first.

use std::io::{self, IoSlice};
use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::future::{Either, select};
use heliostat_block::nbd::ReplyStyle;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, Wish};

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

/// A connection that somebody has made, until it is used.
#[derive(Debug)]
pub struct OpenConnection(Mutex<Option<OwnedFd>>);

impl OpenConnection {
    /// Holds `socket`, which must be a connected stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(socket))))
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
    let socket = connect(&destination.address).await.map_err(|error| error.to_string())?;
    let mut talk =
        Talk { input: BytesMut::new(), output: BytesMut::new(), negotiation: negotiation(destination) };
    let mut stream = Stream::from(socket);
    if let Some(tls) = &destination.tls {
        if talk.go_on(&stream).await?.is_some() {
            return Err("the server agreed before it was private".to_owned());
        }
        let private = stream.connect_tls(&tls.credentials, &tls.host).await;
        stream = private.map_err(|error| error.to_string())?;
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

async fn connect(address: &ServerAddress) -> io::Result<Socket> {
    match address {
        ServerAddress::Socket(address) => Socket::connect(address).await,
        ServerAddress::Connected(connection) => Socket::from_fd(connection.take()?),
        ServerAddress::Host(host, port) => {
            let name = (host.clone(), *port);
            let found = blocking::connecting().run(move || name.to_socket_addrs()).await;
            let found = found.map_err(|error| {
                io::Error::new(error.kind(), format!("cannot find the host {host}: {error}"))
            })?;
            let mut last = io::Error::other(format!("the host {host} has no address"));
            for address in found {
                match Socket::connect(&Address::Tcp(address)).await {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
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
            let found = step.map_err(|error| error.to_string())?;
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
