//! [`Stream`]: one operator's connection, over a Unix socket or TCP.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use rustix::net::SendFlags;

/// A connection.
pub(super) enum Stream {
    /// From this host, by a file.
    Unix(UnixStream),
    /// From this host's loopback.
    Tcp(TcpStream),
}

impl Stream {
    /// Sends as much as goes without waiting. An error shows when the rest is sent.
    pub(super) fn send_now(&self, bytes: &[u8]) -> usize {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match self {
            Self::Unix(stream) => rustix::net::send(stream, bytes, flags),
            Self::Tcp(stream) => rustix::net::send(stream, bytes, flags),
        };
        sent.unwrap_or(0)
    }

    /// Ends it, for everybody who holds it.
    ///
    /// # Errors
    /// Where it has ended already.
    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
