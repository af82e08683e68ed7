//! [`Stream`]: the bytes to and from a server, in plain text or behind something that makes them private.
//!
//! Reading and writing never wait; waiting is a call of its own. Called by the connection loop of this module.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::task::{Context, Poll};

use heliostat_block::clock::LocalFuture;

use crate::socket::Socket;

/// A connected byte stream, used on one thread. Closed when dropped.
pub trait Stream {
    /// Reads what is there. 0 means that the server will send no more (or an empty buffer).
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; else why the stream is broken.
    fn recv_now(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Takes as much of `slices`, one after the other, as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; else why the stream is broken.
    fn send_now(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Sends on what was taken and has not left yet. Says whether all has.
    ///
    /// # Errors
    /// Why the stream is broken.
    fn flush_now(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    /// Ready when there may be something to read, an end, or an error.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ready when there may be room to write, or an error.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

/// Makes streams private: what NBD's `STARTTLS` asks for.
pub trait Privacy: fmt::Debug + Send + Sync {
    /// Begins on `socket`, on which nothing but the agreement to do so was said; ready when both sides know each other.
    ///
    /// # Errors
    /// Why they do not.
    ///
    /// # Cancel safety
    /// Dropping it closes the socket.
    fn begin(&self, socket: Socket) -> LocalFuture<'_, io::Result<Box<dyn Stream>>>;
}

impl Stream for Socket {
    fn recv_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Self::recv_now(self, buffer)
    }

    fn send_now(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Self::send_now(self, slices)
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(self.readable()).poll(cx)
    }

    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(self.writable()).poll(cx)
    }
}
