//! [`TlsStream`]: TLS over a [`Socket`], with the socket's own way of reading and writing.
//!
//! Reading and writing never wait, and what is on its way has a bound: one block of records in each direction,
//! given back when there is nothing in it. Sessions are never resumed, so that each connection shows its
//! certificates to what is in force then. Knows no protocol; used through [`crate::stream::Stream`].

mod block;
mod credentials;
mod engine;
mod load;
mod peer;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{AlertDescription, CertificateError};

use crate::runtime::yield_now;
use crate::socket::Socket;
use block::Block;
pub use credentials::{Credentials, CredentialsError, CredentialsSettings, Endpoint, PeerCheck};
use engine::{Engine, Say, Sink, Turn};
pub use peer::Peer;

/// How often one read may receive without finding a byte. A record of the longest kind takes one, one that had begun
/// before it another.
const RECEIVES_MAX: usize = 2;

/// A byte stream inside TLS, used on one thread. Its handshake is over.
///
/// Says goodbye when it is dropped, if that can be said at once.
pub struct TlsStream {
    socket: Socket,
    peer: Option<Peer>,
    /// Never borrowed across a wait.
    state: RefCell<State>,
}

struct State {
    engine: Engine,
    /// Records that were received and not understood yet.
    input: Block,
    /// Records that are to be sent.
    output: Block,
    /// What was decrypted before anybody had room for it: never more than a block's.
    plain: Vec<u8>,
    /// How much of it was read.
    plain_read: usize,
    /// How much was taken from a caller of `send_now` who has not been told yet.
    unreported: usize,
    /// There may be a whole record in the input.
    may_have_more: bool,
    /// Much was received and brought nothing: other tasks are to have their turn before more is.
    gives_way: bool,
    end: Option<End>,
}

/// Why nothing more comes.
#[derive(Clone, Debug)]
enum End {
    /// The peer has said so.
    Goodbye,
    /// The stream ended without the peer's word.
    Cut,
    /// One side did not like what the other said.
    Failed(String),
}

impl TlsStream {
    /// Does the server's part of the handshake.
    ///
    /// # Errors
    /// `InvalidData` when it fails, which the peer has been told; `UnexpectedEof`; any other of the host's.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection.
    pub async fn accept(socket: Socket, credentials: &Arc<Credentials>) -> io::Result<Self> {
        let config = credentials.server().await?;
        let connection = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
        Self::new(socket, Engine::Server(connection)).await
    }

    /// Does the client's part of the handshake. `host` is the name or address that the server's certificate must
    /// be for.
    ///
    /// # Errors
    /// `InvalidInput` when `host` is neither; else as [`TlsStream::accept`]. With TLS 1.3 the server's refusal of
    /// our certificate comes with the first read.
    ///
    /// # Cancel safety
    /// As [`TlsStream::accept`].
    pub async fn connect(socket: Socket, credentials: &Arc<Credentials>, host: &str) -> io::Result<Self> {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            let text =
                format!("'{host}' is neither a host's name nor an address that a certificate could be for");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let config = credentials.client().await?;
        let connection = UnbufferedClientConnection::new(config, name).map_err(io::Error::other)?;
        Self::new(socket, Engine::Client(connection)).await
    }

    async fn new(socket: Socket, engine: Engine) -> io::Result<Self> {
        let state = State {
            engine,
            input: Block::default(),
            output: Block::default(),
            plain: Vec::new(),
            plain_read: 0,
            unreported: 0,
            may_have_more: true,
            gives_way: false,
            end: None,
        };
        let mut stream = Self { socket, peer: None, state: RefCell::new(state) };
        stream.handshake().await?;
        let certificate = stream.state.get_mut().engine.peer_certificate().cloned();
        stream.peer = certificate.map(|certificate| Peer::of(&certificate)).transpose()?;
        Ok(stream)
    }

    async fn handshake(&mut self) -> io::Result<()> {
        let state = self.state.get_mut();
        loop {
            let progress = state.read_records(&mut [], &self.socket);
            match state.flush(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.writable().await?;
                    continue;
                }
                result => result?,
            }
            progress?;
            if !state.engine.is_handshaking() {
                return Ok(());
            }
            match state.receive(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.readable().await?,
                // A handshake has a few flights, so this costs little; a peer that sends on and on is not alone here.
                result => {
                    result?;
                    yield_now().await;
                }
            }
        }
    }

    /// Who the peer is by the certificate that it showed. `None` when it showed none.
    #[must_use]
    pub const fn peer(&self) -> Option<&Peer> {
        self.peer.as_ref()
    }

    /// Reads what is there, into `buffer`. 0 means that the peer has said that it will send no more.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there, or only records without a byte; `UnexpectedEof` when the stream ended without the peer's word, so
    /// that somebody may have cut it; `InvalidData` when the peer broke the rules or said that we did; else any
    /// of the host's.
    pub fn recv_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut state = self.state.borrow_mut();
        for receives in 0.. {
            let read = state.read_plain(buffer);
            if read > 0 {
                return Ok(read);
            }
            let read = state.read_records(buffer, &self.socket)?;
            // An answer to the peer's wish for new keys goes now, or with what is sent next.
            let _ = state.flush(&self.socket);
            if read > 0 {
                return Ok(read);
            }
            match &state.end {
                Some(End::Goodbye) => return Ok(0),
                Some(end) => return Err(end.error()),
                None if receives == RECEIVES_MAX => break,
                None => state.receive(&self.socket)?,
            }
        }
        // The peer sends records with nothing in them faster than they are read.
        state.gives_way = true;
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Writes as much of `slices`, one after the other, as there is room for.
    ///
    /// After `WouldBlock` some of it may already be on its way: the next call must offer the same bytes again,
    /// in front of any others, and is told then.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; `BrokenPipe` when the peer reads no more; `InvalidData` when the peer
    /// broke the rules; else any of the host's.
    pub fn send_now(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        state.flush(&self.socket)?;
        if state.unreported == 0 {
            state.unreported = state.encrypt(Say::Data(slices), &self.socket)?;
            state.flush(&self.socket)?;
        }
        let len: usize = slices.iter().map(|slice| slice.len()).sum();
        debug_assert!(state.unreported <= len, "what was offered before must be offered again");
        Ok(std::mem::take(&mut state.unreported).min(len))
    }

    /// Waits until there may be something to read, an end, or an error. One task at a time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// As [`Socket::readable`].
    pub async fn readable(&self) -> io::Result<()> {
        if std::mem::take(&mut self.state.borrow_mut().gives_way) {
            yield_now().await;
            return Ok(());
        }
        {
            let mut state = self.state.borrow_mut();
            if state.plain_read < state.plain.len() || state.may_have_more || state.end.is_some() {
                return Ok(());
            }
            state.rest();
        }
        self.socket.readable().await
    }

    /// Waits until there is room to write, or an error. One task at a time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// As [`Socket::readable`].
    pub async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Says goodbye, if that can be said at once, and makes every later call here end at once.
    pub fn shutdown(&self) {
        self.say_goodbye();
        self.socket.shutdown();
    }

    /// Tells the peer that nothing more comes; what it sends can still be read.
    pub fn shutdown_send(&self) {
        self.say_goodbye();
        self.socket.shutdown_send();
    }

    fn say_goodbye(&self) {
        let mut state = self.state.borrow_mut();
        let is_broken = matches!(state.end, Some(End::Failed(_) | End::Cut));
        if !is_broken && !state.engine.is_handshaking() && state.encrypt(Say::Goodbye, &self.socket).is_ok() {
            let _ = state.flush(&self.socket);
        }
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("socket", &self.socket)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Drop for TlsStream {
    fn drop(&mut self) {
        self.say_goodbye();
    }
}

impl State {
    /// Takes what was decrypted before.
    fn read_plain(&mut self, buffer: &mut [u8]) -> usize {
        let left = &self.plain[self.plain_read..];
        let now = left.len().min(buffer.len());
        buffer[..now].copy_from_slice(&left[..now]);
        self.plain_read += now;
        if self.plain_read == self.plain.len() {
            self.plain.clear();
            self.plain_read = 0;
        }
        now
    }

    /// Decrypts what is in the input until the buffer is full. Nothing is left of an earlier decryption.
    fn read_records(&mut self, buffer: &mut [u8], socket: &Socket) -> io::Result<usize> {
        let wants_none = buffer.is_empty();
        let mut sink = Sink { buffer, filled: 0, rest: &mut self.plain };
        while self.end.is_none() && (wants_none || !sink.is_full()) {
            let turn = self.engine.turn(&mut self.input, &mut self.output, &mut sink, Say::Nothing);
            match turn {
                Ok(Turn::Again) => {}
                Ok(Turn::Hungry | Turn::Ready(_)) => {
                    self.may_have_more = false;
                    break;
                }
                Ok(Turn::Closed) => self.end = Some(End::Goodbye),
                Err(error) => {
                    let filled = sink.filled;
                    let error = self.fail(&error, socket);
                    // What came before the fault is as good as ever.
                    return if filled > 0 { Ok(filled) } else { Err(error) };
                }
            }
        }
        Ok(sink.filled)
    }

    /// Takes from the socket what is there.
    fn receive(&mut self, socket: &Socket) -> io::Result<()> {
        let room = self.input.room();
        if room.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a TLS message of the peer is too long"));
        }
        let received = socket.recv_now(room)?;
        if received == 0 {
            self.end = Some(End::Cut);
            return Err(End::Cut.error());
        }
        self.input.fill(received);
        self.may_have_more = true;
        Ok(())
    }

    /// Puts what is to be said into the output. Whatever stands before that in the input is decrypted first.
    fn encrypt(&mut self, say: Say<'_>, socket: &Socket) -> io::Result<usize> {
        loop {
            if let Some(end @ End::Failed(_)) = &self.end {
                return Err(end.error());
            }
            let mut sink = Sink { buffer: &mut [], filled: 0, rest: &mut self.plain };
            match self.engine.turn(&mut self.input, &mut self.output, &mut sink, say) {
                Ok(Turn::Again) => {}
                Ok(Turn::Ready(taken)) => return Ok(taken),
                Ok(Turn::Closed) if self.end.is_none() => self.end = Some(End::Goodbye),
                Ok(Turn::Closed | Turn::Hungry) => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(error) => return Err(self.fail(&error, socket)),
            }
        }
    }

    /// Sends what is in the output.
    fn flush(&mut self, socket: &Socket) -> io::Result<()> {
        while !self.output.is_empty() {
            let sent = socket.send_now(&[IoSlice::new(self.output.filled())])?;
            self.output.discard(sent);
        }
        Ok(())
    }

    fn fail(&mut self, error: &rustls::Error, socket: &Socket) -> io::Error {
        self.engine.last_words(&mut self.input, &mut self.output);
        let _ = self.flush(socket);
        let end = End::Failed(explain(error));
        let error = end.error();
        self.end = Some(end);
        error
    }

    /// Gives back what memory is not in use.
    fn rest(&mut self) {
        self.input.release();
        self.output.release();
        if self.plain.is_empty() {
            self.plain = Vec::new();
        }
    }
}

impl End {
    fn error(&self) -> io::Error {
        match self {
            Self::Goodbye => io::ErrorKind::UnexpectedEof.into(),
            Self::Cut => io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the TLS stream ended without the peer's goodbye, so that something may be missing",
            ),
            Self::Failed(text) => io::Error::new(io::ErrorKind::InvalidData, text.clone()),
        }
    }
}

/// What failed, in words that say what to look at.
fn explain(error: &rustls::Error) -> String {
    use rustls::Error;
    match error {
        Error::InvalidCertificate(certificate) => {
            format!("the peer's certificate was not accepted: {}", explain_certificate(certificate))
        }
        Error::NoCertificatesPresented => "the peer showed no certificate, and one is required".to_owned(),
        Error::AlertReceived(alert) => {
            let text = match alert {
                AlertDescription::UnknownCA => "it does not know the authority that signed our certificate",
                AlertDescription::CertificateExpired => "our certificate has expired",
                AlertDescription::CertificateRevoked => "our certificate was revoked",
                AlertDescription::CertificateRequired => "it requires a certificate, and we showed none",
                AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
                    "it does not accept our certificate"
                }
                AlertDescription::AccessDenied => "it does not admit us",
                AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => {
                    "it shares no version or cipher with us, or requires a certificate that we did not show"
                }
                _ => return format!("the peer ended TLS: {alert:?}"),
            };
            format!("the peer ended TLS: {text}")
        }
        Error::InvalidMessage(_) => format!("the peer does not speak TLS: {error}"),
        _ => format!("TLS failed: {error}"),
    }
}

fn explain_certificate(error: &CertificateError) -> String {
    match error {
        // The other one is that of an authority of the same name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "no authority of ca-cert.pem has signed it".to_owned()
        }
        CertificateError::Revoked => "it was revoked".to_owned(),
        CertificateError::Expired => "it has expired".to_owned(),
        CertificateError::NotValidYet => "it is not valid yet".to_owned(),
        CertificateError::NotValidForName => "it is for another host name".to_owned(),
        // These say it with the dates and names.
        _ => error.to_string(),
    }
}
