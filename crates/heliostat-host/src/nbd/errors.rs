//! What a storage's user is told of what a server, or the lack of one, has answered.

use std::io;

use heliostat_block::nbd::Errno;
use heliostat_block::nbd::client_reply::Failure;
use heliostat_block::nbd::link::LinkError;

/// The server has answered another thing than was asked for.
pub(super) fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the NBD server answered something else")
}

/// What a storage's user is told. A failure that the server says nothing more about keeps its number.
pub(super) fn io_error(error: LinkError) -> io::Error {
    let errno = match &error {
        LinkError::Server(Failure { errno, .. }) => *errno,
        LinkError::NotOffered => return io::Error::new(io::ErrorKind::Unsupported, error),
        LinkError::OutsideTerms => return io::Error::new(io::ErrorKind::InvalidInput, error),
        LinkError::Lost(_) | LinkError::Changed(_) | LinkError::Closed => {
            return io::Error::new(io::ErrorKind::NotConnected, error);
        }
    };
    let (number, kind) = match errno {
        Errno::Permission => (libc::EPERM, io::ErrorKind::PermissionDenied),
        Errno::Io => (libc::EIO, io::ErrorKind::Other),
        Errno::Memory => (libc::ENOMEM, io::ErrorKind::OutOfMemory),
        Errno::Invalid => (libc::EINVAL, io::ErrorKind::InvalidInput),
        Errno::NoSpace => (libc::ENOSPC, io::ErrorKind::StorageFull),
        Errno::Overflow => (libc::EOVERFLOW, io::ErrorKind::Other),
        Errno::NotSupported => (libc::EOPNOTSUPP, io::ErrorKind::Unsupported),
        Errno::Shutdown => (libc::ESHUTDOWN, io::ErrorKind::NotConnected),
    };
    match error {
        LinkError::Server(failure) if failure.message.is_empty() => io::Error::from_raw_os_error(number),
        error => io::Error::new(kind, error),
    }
}
