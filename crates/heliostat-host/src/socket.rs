//! [`Listener`] and [`Socket`]: byte streams over Unix sockets and TCP.
//!
//! The NBD front end and the built-in client use them. Reading and writing never wait; waiting is a call of
//! its own, so that a caller can look again for a moment before it sleeps. Knows no protocol.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::fs::MetadataExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use heliostat_block::span::Span;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, sockopt,
};

use crate::blocking;
use crate::readiness::{self, Readiness};
use crate::span;

/// Connections that wait to be accepted. The kernel cuts it to its own bound (4096 by default).
const BACKLOG: i32 = 1024;

/// What a Unix socket may hold before it is read. The kernel cuts it to its own bound (208 KiB by default), and doubles it.
const UNIX_SEND_BUFFER: usize = 512 << 10;

/// The kernel takes no more slices in one call.
const SLICES_MAX: usize = 1024;

/// How long a connection may take to come about: longer than a busy host needs, shorter than a person waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A path in the file system.
    Unix(PathBuf),
    /// A host and a port. Port 0 lets the host choose one ([`Listener::address`] tells).
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

fn explain(what: &str, address: &Address, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {address}: {error}"))
}

/// A socket that takes connections. A Unix one removes its file when it is dropped.
#[derive(Debug)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    address: Address,
    /// Kept for what it does when it is dropped.
    _file: Option<SocketFile>,
}

/// The file of a Unix socket that we made, told from a later one at the same path.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn identity(path: &Path) -> io::Result<(u64, u64)> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok((metadata.st_dev(), metadata.st_ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Binds and listens. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when another program listens there or, for a Unix socket, the path is another kind of
    /// file; any other of the host's. The message names the address.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => bind_unix(path),
            Address::Tcp(socket) => bind_tcp(*socket),
        }
        .map_err(|error| explain("cannot listen on", address, error))
    }

    /// Listens on a socket that whoever started this program has bound, by the number of its descriptor. It is copied:
    /// the number stays open, and a Unix socket's file stays when this is dropped. An abstract or unnamed address is
    /// said as an empty path.
    ///
    /// # Errors
    /// `InvalidInput` when the number is no socket; the host's when one cannot listen on it.
    pub fn inherited(number: i32) -> io::Result<Self> {
        let no_socket = || {
            let message = format!("File descriptor '{number}' is not a socket");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        if number < 0 {
            return Err(no_socket());
        }
        // SAFETY: the number is not -1, and is used for one call only, which fails where nothing is open under it.
        // Nobody in this process closes descriptors that it was started with.
        let inherited = unsafe { BorrowedFd::borrow_raw(number) };
        sockopt::socket_type(inherited).map_err(|_| no_socket())?;
        let fd = rustix::io::fcntl_dupfd_cloexec(inherited, 3)?;
        rustix::io::ioctl_fionbio(&fd, true)?;
        rustix::net::listen(&fd, BACKLOG)?;
        let bound = rustix::net::getsockname(&fd)?;
        let address = match sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => {
                let unix = SocketAddrUnix::try_from(bound)?;
                let path = unix.path_bytes().unwrap_or_default();
                Address::Unix(PathBuf::from(OsStr::from_bytes(path)))
            }
            _ => Address::Tcp(SocketAddr::try_from(bound)?),
        };
        Ok(Self { fd: Arc::new(fd), address, _file: None })
    }

    /// Where it listens, with the port that the host chose.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for a connection and takes it. The socket may be used on this thread, or sent to another one
    /// with [`Socket::detach`].
    ///
    /// # Errors
    /// Any of the host's, too many open files among them: whoever goes on must pause first, since the same
    /// connection waits still. Connections that failed before they were taken are passed over.
    ///
    /// # Cancel safety
    /// Dropping it loses no connection.
    pub async fn accept(&self) -> io::Result<Socket> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => return Socket::new(fd, matches!(self.address, Address::Tcp(_))),
                Err(Errno::AGAIN) => readiness::readable(&self.fd).await?,
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn bind_unix(path: &Path) -> io::Result<Listener> {
    let address = SocketAddrUnix::new(path).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidFilename,
            "the path is too long for a socket (107 bytes at most)",
        )
    })?;
    let fd = stream_socket(AddressFamily::UNIX)?;
    match rustix::net::bind(&fd, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            rustix::net::bind(&fd, &address)?;
        }
        result => result?,
    }
    let file = SocketFile { path: path.to_owned(), identity: SocketFile::identity(path)? };
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(Listener { fd: Arc::new(fd), address: Address::Unix(path.to_owned()), _file: Some(file) })
}

/// Removes a socket's file if nobody listens on it.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> io::Result<()> {
    let in_use = |text: &str| io::Error::new(io::ErrorKind::AddrInUse, text.to_owned());
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use("a file that is not a socket is there"));
    }
    match rustix::net::connect(stream_socket(AddressFamily::UNIX)?, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
        _ => Err(in_use("another program listens there")),
    }
}

fn bind_tcp(socket: SocketAddr) -> io::Result<Listener> {
    let family = if socket.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = stream_socket(family)?;
    // A restarted daemon gets its port back while old connections of it are still fading out.
    sockopt::set_socket_reuseaddr(&fd, true)?;
    rustix::net::bind(&fd, &socket)?;
    rustix::net::listen(&fd, BACKLOG)?;
    let bound = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
    Ok(Listener { fd: Arc::new(fd), address: Address::Tcp(bound), _file: None })
}

/// A connected byte stream, used on one thread.
///
/// Closed when it is dropped, on both sides and at once.
#[derive(Debug)]
pub struct Socket {
    fd: Arc<OwnedFd>,
    readiness: Readiness,
}

/// A [`Socket`] on its way to another thread.
#[derive(Debug)]
pub struct DetachedSocket(Arc<OwnedFd>);

impl DetachedSocket {
    /// Makes it usable on the current thread.
    #[must_use]
    pub fn attach(self) -> Socket {
        Socket { fd: self.0, readiness: Readiness::default() }
    }
}

impl Socket {
    fn new(fd: OwnedFd, is_tcp: bool) -> io::Result<Self> {
        if is_tcp {
            // Replies are sent whole; waiting for more to send only delays them.
            sockopt::set_tcp_nodelay(&fd, true)?;
            // A client whose host died is noticed after some hours, not never.
            sockopt::set_socket_keepalive(&fd, true)?;
        } else {
            // TCP finds its own; this one is too small for one long answer.
            sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER)?;
        }
        Ok(Self { fd: Arc::new(fd), readiness: Readiness::default() })
    }

    /// Connects, and waits until it is done, at most ten seconds.
    ///
    /// # Errors
    /// Any of the host's; the message names the address.
    ///
    /// # Cancel safety
    /// Dropping it lets a connection come about that is closed at once.
    pub async fn connect(address: &Address) -> io::Result<Self> {
        let target = address.clone();
        let connect = blocking::connecting().run(move || match target {
            Address::Unix(path) => connect_unix(&path),
            Address::Tcp(socket) => connect_tcp(socket),
        });
        let fd = connect.await.map_err(|error| explain("cannot connect to", address, error))?;
        Self::new(fd, matches!(address, Address::Tcp(_)))
    }

    /// Takes over a connection that somebody else has made.
    ///
    /// # Errors
    /// `InvalidInput` when it is not a connected stream socket; else the host's.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let is_stream = matches!(sockopt::socket_type(&fd), Ok(kind) if kind == SocketType::STREAM);
        if !is_stream || rustix::net::getpeername(&fd).is_err() {
            let message = "the descriptor is not a connected stream socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        let is_tcp = !matches!(sockopt::socket_domain(&fd), Ok(AddressFamily::UNIX));
        Self::new(fd, is_tcp)
    }

    /// Makes two that are connected with each other.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self::new(one, false)?, Self::new(other, false)?))
    }

    /// Makes it ready to be sent to another thread.
    #[must_use]
    pub fn detach(self) -> DetachedSocket {
        let fd = Arc::clone(&self.fd);
        // Cancels what the ring of this thread still waits for; the socket itself goes on.
        self.readiness.clear();
        DetachedSocket(fd)
    }

    /// Reads what is there, into `buffer`. 0 means that the peer will send no more (or an empty buffer).
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; else any of the host's.
    pub fn recv_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((received, _)) => return Ok(received),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes as much of `slices`, one after the other, as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; `BrokenPipe` when the peer reads no more; else any of the host's.
    pub fn send_now(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let slices = &slices[..slices.len().min(SLICES_MAX)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.fd, slices, &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => return Ok(sent),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends as much of `span` as there is room for, without copying it.
    ///
    /// # Errors
    /// As [`Socket::send_now`]; `UnexpectedEof` when the file ends before it; `InvalidInput` for what no file has lent.
    pub fn send_span_now(&self, span: &Span) -> io::Result<usize> {
        let file = span::file_of(span)?;
        let mut offset = span.offset();
        loop {
            match rustix::fs::sendfile(&self.fd, file, Some(&mut offset), span.len()) {
                Ok(0) if !span.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(sent) => return Ok(sent),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until there is something to read, an end, or an error. May return without; look and wait again.
    /// One task at a time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// May be dropped at any time; the next call goes on where it was left. What the ring holds for it goes
    /// with the socket.
    pub async fn readable(&self) -> io::Result<()> {
        self.readiness.readable(&self.fd).await
    }

    /// Waits until there is room to write, or an error. May return without; look and wait again. One task at
    /// a time.
    ///
    /// # Errors
    /// When the host refuses to wait for it.
    ///
    /// # Cancel safety
    /// As [`Socket::readable`].
    pub async fn writable(&self) -> io::Result<()> {
        self.readiness.writable(&self.fd).await
    }

    /// Tells the peer that nothing more comes, and makes every later call here end at once. Data sent before
    /// still arrives. Does nothing the second time.
    pub fn shutdown(&self) {
        // Fails only when there is no connection any more, which is what was asked for.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Tells the peer that nothing more comes; what it sends can still be read.
    pub fn shutdown_send(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.readiness.is_armed() {
            // The ring keeps the descriptor open until it has seen the cancellation. The peer must not wait
            // for that.
            self.shutdown();
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    // Blocking, since a non-blocking one fails when the backlog is full, with nothing to wait for.
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&fd, &address)?;
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, None)?;
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

fn connect_tcp(socket: SocketAddr) -> io::Result<OwnedFd> {
    let stream = TcpStream::connect_timeout(&socket, CONNECT_TIMEOUT)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::lock::OpenFile;
    use crate::runtime::{Driver, block_on_with, spawn_local};

    const BOTH: [Driver; 2] = [Driver::IoUring, Driver::Polling];

    fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
        for driver in BOTH {
            block_on_with(driver, test()).unwrap();
        }
    }

    async fn recv(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match socket.recv_now(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.readable().await?,
                result => return result,
            }
        }
    }

    async fn send_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match socket.send_now(&[IoSlice::new(bytes)]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
                Err(error) => return Err(error),
                Ok(sent) => bytes = &bytes[sent..],
            }
        }
        Ok(())
    }

    async fn echo_once(listener: Listener) {
        let socket = listener.accept().await.unwrap();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match recv(&socket, &mut buffer).await.unwrap() {
                0 => return,
                received => send_all(&socket, &buffer[..received]).await.unwrap(),
            }
        }
    }

    async fn check_echo(address: &Address) {
        let listener = Listener::bind(address).unwrap();
        let address = listener.address().clone();
        spawn_local(echo_once(listener));
        let client = std::rc::Rc::new(Socket::connect(&address).await.unwrap());
        let sender = std::rc::Rc::clone(&client);
        // More than the buffers of both sides hold, so that both must wait.
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let to_send = sent.clone();
        spawn_local(async move {
            send_all(&sender, &to_send).await.unwrap();
            sender.shutdown_send();
        });
        let mut received = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match recv(&client, &mut buffer).await.unwrap() {
                0 => break,
                count => received.extend_from_slice(&buffer[..count]),
            }
        }
        assert!(received == sent);
    }

    #[test]
    fn bytes_arrive_in_order_over_a_unix_socket() {
        on_both(|| async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("s");
            check_echo(&Address::Unix(path.clone())).await;
            assert!(!path.exists(), "the listener removes its file");
        });
    }

    #[test]
    fn bytes_arrive_in_order_over_tcp() {
        on_both(|| async { check_echo(&Address::Tcp("127.0.0.1:0".parse().unwrap())).await });
    }

    #[test]
    fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = Address::Unix(path.clone());
        // A socket file whose owner is gone.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let live = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_listener_does_not_remove_the_socket_of_its_successor() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("s"));
        let first = Listener::bind(&address).unwrap();
        std::fs::remove_file(directory.path().join("s")).unwrap();
        let _second = Listener::bind(&address).unwrap();
        drop(first);
        assert!(directory.path().join("s").exists());
    }

    #[test]
    fn a_dropped_wait_leaves_the_socket_usable_and_closable() {
        on_both(|| async {
            let (one, other) = Socket::pair().unwrap();
            let mut waiting = std::pin::pin!(one.readable());
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            send_all(&other, b"x").await.unwrap();
            let mut buffer = [0; 8];
            assert_eq!(recv(&one, &mut buffer).await.unwrap(), 1);
            assert_eq!(one.recv_now(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let mut waiting = Box::pin(other.readable());
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            drop(waiting);
            drop(other);
            assert_eq!(one.recv_now(&mut buffer).unwrap(), 0, "closed at once, though a poll was armed");
        });
    }

    #[test]
    fn sending_to_a_closed_peer_is_an_error_and_no_signal() {
        let (one, other) = Socket::pair().unwrap();
        drop(other);
        assert_eq!(one.send_now(&[IoSlice::new(b"x")]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_span_of_a_file_arrives_as_it_lies_there() {
        on_both(|| async {
            let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let (one, other) = Socket::pair().unwrap();
            let mut span = Span::new(file_with(&bytes), 1, bytes.len());
            let reader = async {
                let (mut received, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
                while received.len() < bytes.len() - 1 {
                    let count = recv(&other, &mut buffer).await.unwrap();
                    received.extend_from_slice(&buffer[..count]);
                }
                received
            };
            let sender = async {
                loop {
                    match one.send_span_now(&span) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            one.writable().await.unwrap();
                        }
                        Err(error) => return error.kind(),
                        Ok(sent) => span.advance(sent),
                    }
                }
            };
            let (received, error) = futures_util::join!(reader, sender);
            assert!(received == bytes[1..]);
            assert_eq!(error, io::ErrorKind::UnexpectedEof, "the file has a byte less than the span");
            drop(other);
            let span = Span::new(file_with(b"x"), 0, 1);
            assert_eq!(one.send_span_now(&span).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
    }

    fn file_with(bytes: &[u8]) -> Arc<OpenFile> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        OpenFile::new(file.into(), None, None)
    }

    #[test]
    fn a_socket_moves_to_another_thread() {
        on_both(|| async {
            let (one, other) = Socket::pair().unwrap();
            assert!(futures_util::poll!(std::pin::pin!(one.readable())).is_pending());
            let detached = one.detach();
            let thread = crate::runtime::Thread::spawn("test", move || async move {
                let socket = detached.attach();
                let mut buffer = [0; 8];
                recv(&socket, &mut buffer).await.unwrap()
            })
            .unwrap();
            send_all(&other, b"abc").await.unwrap();
            assert_eq!(thread.join(), 3);
        });
    }
}
