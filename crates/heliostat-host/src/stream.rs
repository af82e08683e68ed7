//! [`Stream`]: a socket, plain or inside TLS. For whoever speaks a protocol that may be either.

use std::io::{self, IoSlice};
use std::sync::Arc;

use heliostat_block::span::Span;

use crate::socket::Socket;
use crate::tls::{Credentials, Peer, TlsStream};

/// A connected byte stream, used on one thread. Closed when it is dropped, on both sides and at once.
#[derive(Debug)]
pub enum Stream {
    /// As the network carries it.
    Plain(Socket),
    /// Encrypted, and the peer known.
    Tls(Box<TlsStream>),
}

impl From<Socket> for Stream {
    fn from(socket: Socket) -> Self {
        Self::Plain(socket)
    }
}

impl Stream {
    /// Goes over to TLS as the server. Nothing of the peer's handshake may have been read.
    ///
    /// # Errors
    /// `InvalidInput` when it is inside TLS already; else as [`TlsStream::accept`].
    ///
    /// # Cancel safety
    /// Dropping it closes the connection.
    pub async fn accept_tls(self, credentials: &Arc<Credentials>) -> io::Result<Self> {
        Ok(Self::Tls(Box::new(TlsStream::accept(self.plain()?, credentials).await?)))
    }

    /// Goes over to TLS as the client, with the server that has a certificate for `host`.
    ///
    /// # Errors
    /// As [`Stream::accept_tls`] and [`TlsStream::connect`].
    ///
    /// # Cancel safety
    /// Dropping it closes the connection.
    pub async fn connect_tls(self, credentials: &Arc<Credentials>, host: &str) -> io::Result<Self> {
        Ok(Self::Tls(Box::new(TlsStream::connect(self.plain()?, credentials, host).await?)))
    }

    fn plain(self) -> io::Result<Socket> {
        match self {
            Self::Plain(socket) => Ok(socket),
            Self::Tls(_) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the stream is inside TLS already"))
            }
        }
    }

    /// Who the peer is by its certificate. `None` without TLS, and when it showed none.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => stream.peer(),
        }
    }

    /// Whether what it carries is encrypted.
    #[must_use]
    pub const fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Reads what is there, into `buffer`. 0 means that the peer will send no more (or an empty buffer).
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there. Inside TLS, `UnexpectedEof` when the stream ended without the peer's
    /// word, and `InvalidData` when the peer broke the rules or refuses us. Else any of the host's.
    pub fn recv_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.recv_now(buffer),
            Self::Tls(stream) => stream.recv_now(buffer),
        }
    }

    /// Writes as much of `slices`, one after the other, as there is room for.
    ///
    /// After `WouldBlock` the next call must offer the same bytes again, in front of any others: inside TLS some
    /// of them may be on their way already.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; `BrokenPipe` when the peer reads no more; inside TLS, `InvalidData`
    /// when the peer broke the rules; else any of the host's.
    pub fn send_now(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.send_now(slices),
            Self::Tls(stream) => stream.send_now(slices),
        }
    }

    /// Sends as much of `span` as there is room for, without copying it. For plain streams.
    ///
    /// # Errors
    /// As [`Socket::send_span_now`]; `Unsupported` inside TLS.
    pub fn send_span_now(&self, span: &Span) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.send_span_now(span),
            Self::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Waits until there is something to read, an end, or an error. May return without; look and wait again.
    /// One task at a time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// As [`Socket::readable`].
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.readable().await,
            Self::Tls(stream) => stream.readable().await,
        }
    }

    /// Waits until there is room to write, or an error. May return without; look and wait again. One task at a
    /// time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// As [`Socket::readable`].
    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.writable().await,
            Self::Tls(stream) => stream.writable().await,
        }
    }

    /// Tells the peer that nothing more comes, and makes every later call here end at once.
    pub fn shutdown(&self) {
        match self {
            Self::Plain(socket) => socket.shutdown(),
            Self::Tls(stream) => stream.shutdown(),
        }
    }

    /// Tells the peer that nothing more comes; what it sends can still be read.
    pub fn shutdown_send(&self) {
        match self {
            Self::Plain(socket) => socket.shutdown_send(),
            Self::Tls(stream) => stream.shutdown_send(),
        }
    }
}
