//! [`ControlSocket`]: the file at which operators connect: ours alone, and gone when we are.

use std::fs::{File, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::stream::Stream;

/// Connections that wait to be accepted: more than clients that start at once.
const BACKLOG: i32 = 64;

/// Who may connect, by the mode of the socket's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doors {
    /// Its owner, as far as the mask of the process allows that.
    Owner,
    /// Everybody; who it is is looked at then.
    Everybody,
}

/// A socket that takes operators' connections. Its file is removed when it is dropped.
pub(super) enum ControlSocket {
    /// At a path.
    Unix {
        /// What listens.
        listener: UnixListener,
        /// Where its file is.
        path: PathBuf,
        /// Device and inode of the file, so that another's at the same path is left alone.
        identity: (u64, u64),
    },
    /// On this host's loopback.
    Tcp(TcpListener),
}

impl ControlSocket {
    /// Listens at `path`. A socket there that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when somebody does, or something else is there; any other of the host's. The message names
    /// the path.
    pub(super) fn bind(path: &Path, doors: Doors) -> io::Result<Self> {
        Self::bind_at(path, doors).map_err(|error| {
            let text = format!("cannot take commands at {}: {error}", path.display());
            io::Error::new(error.kind(), text)
        })
    }

    /// Listens at an address of the loopback.
    ///
    /// # Errors
    /// `PermissionDenied` for any other: nobody is asked for a password there. Any of the host's.
    pub(super) fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            let text = format!(
                "{address} can be reached from other hosts, and nobody is asked for a password; listen on 127.0.0.1 \
                 or [::1], or on a Unix socket, and let others in by a tunnel (ssh -L)"
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        TcpListener::bind(address).map(Self::Tcp)
    }

    fn bind_at(path: &Path, doors: Doors) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path).map_err(|_| {
            let text = "the path is too long for a socket (107 bytes at most)";
            io::Error::new(io::ErrorKind::InvalidFilename, text)
        })?;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the mode that the socket has when it is bound: there is no moment at which others
        // could connect, and the mask of the process, which other threads use, is left alone.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let turn = Turn::take(path);
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path)?;
                rustix::net::bind(&socket, &address)?;
            }
            result => result?,
        }
        rustix::net::listen(&socket, BACKLOG)?;
        drop(turn);
        let identity = identity(path)?;
        if doors == Doors::Everybody {
            std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
        }
        Ok(Self::Unix { listener: UnixListener::from(socket), path: path.to_owned(), identity })
    }

    /// Takes the next connection; waits for it.
    ///
    /// # Errors
    /// Any of the host's; every call fails after [`ControlSocket::close`].
    pub(super) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix { listener, .. } => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| {
                // Answers are short, and waited for.
                let _ = stream.set_nodelay(true);
                Stream::Tcp(stream)
            }),
        }
    }

    /// Where it listens, where that is no path.
    pub(super) fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix { .. } => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    /// Takes no more connections, wakes who waits for one, and removes the file.
    pub(super) fn close(&self) {
        // Closing fails only where it is closed already.
        match self {
            Self::Unix { listener, path, identity: own } => {
                if identity(path).is_ok_and(|identity| identity == *own) {
                    let _ = std::fs::remove_file(path);
                }
                let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
            }
            Self::Tcp(listener) => {
                let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.close();
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.st_dev(), metadata.st_ino()))
}

/// Removes a socket's file if nobody listens there.
fn remove_stale(path: &Path) -> io::Result<()> {
    let in_use = |text: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, text.to_owned()));
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return in_use("something that is not a socket is there");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => in_use("another program listens there"),
    }
}

/// A lock on the directory: of two programs that start at once, the second must not take the first one's new
/// socket for a stale one. Released when it is dropped.
struct Turn(#[expect(dead_code, reason = "held for what closing it does")] Option<OwnedFd>);

impl Turn {
    fn take(path: &Path) -> Self {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Where there are no such locks it goes without: what is lost is the second program's refusal.
        let locked = File::open(directory).and_then(|directory| {
            rustix::fs::flock(&directory, FlockOperation::LockExclusive)?;
            Ok(OwnedFd::from(directory))
        });
        Self(locked.ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_its_owners_alone_and_goes_when_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let socket = ControlSocket::bind(&path, Doors::Owner).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn who_asks_everybody_in_opens_the_door() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let _socket = ControlSocket::bind(&path, Doors::Everybody).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
    }

    #[test]
    fn of_many_who_start_at_once_over_a_stale_socket_one_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            let bound = std::thread::scope(|scope| {
                let starting: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| ControlSocket::bind(&path, Doors::Owner))).collect();
                starting.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect::<Vec<_>>()
            });
            assert_eq!(bound.len(), 1, "the others are told that it is in use");
            assert!(UnixStream::connect(&path).is_ok(), "the one that won is the one that is reached");
            drop(bound);
            assert!(!path.exists());
        }
    }

    #[test]
    fn tcp_is_for_this_host_only() {
        let socket = ControlSocket::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(socket.tcp_address().unwrap().port() > 0);
        for other in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            let error = ControlSocket::bind_tcp(other.parse().unwrap()).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{other}");
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| socket.accept());
            socket.close();
            assert!(waiting.join().unwrap().is_err());
        });
    }

    #[test]
    fn a_live_socket_is_not_replaced_and_a_stale_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let live = ControlSocket::bind(&path, Doors::Owner).unwrap();
        assert_eq!(ControlSocket::bind(&path, Doors::Owner).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists());
        drop(live);
        // What a crash leaves behind: a file without a listener.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(ControlSocket::bind(&path, Doors::Owner).unwrap());
    }

    #[test]
    fn a_file_at_the_path_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        std::fs::write(&path, "precious").unwrap();
        assert!(ControlSocket::bind(&path, Doors::Owner).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn closing_wakes_who_waits_for_a_connection() {
        let folder = tempfile::tempdir().unwrap();
        let socket = ControlSocket::bind(&folder.path().join("control"), Doors::Owner).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| socket.accept());
            socket.close();
            assert!(!folder.path().join("control").exists());
            assert!(waiting.join().unwrap().is_err());
        });
    }
}
