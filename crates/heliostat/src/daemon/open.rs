//! Opening the file or block device of a node, as its options say.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use heliostat_block::node::Discard;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{self, Access, Cache, Flush, Locking, OpenError, OpenOptions};

use super::{CacheUse, DaemonError, FileSpec, NodeSpec, Sharing};

/// Opens the storage of a file node.
pub(super) fn open_file(
    file: &FileSpec,
    spec: &NodeSpec,
    driver: &'static str,
) -> Result<FileStorage, DaemonError> {
    let wants_device = driver == "host_device";
    let wrong_kind = || {
        // QEMU takes character devices too, which no disk is.
        let wanted = match std::fs::metadata(&file.path) {
            _ if !wants_device => "a regular file",
            Ok(metadata) if metadata.file_type().is_char_device() => "a block device",
            _ => "either a character or block device",
        };
        DaemonError::WrongKind { driver, path: file.path.clone(), wanted }
    };
    let options = options(spec, file.sharing);
    let storage = FileStorage::open(file.now_at.as_ref().unwrap_or(&file.path), &options).map_err(
        |error| match error {
            OpenError::NotADisk { .. } if error.errno() != rustix::io::Errno::ISDIR.raw_os_error() => {
                wrong_kind()
            }
            error => error.into(),
        },
    )?;
    if storage.is_device() == wants_device { Ok(storage) } else { Err(wrong_kind()) }
}

/// How the host is asked to open what a node keeps its bytes in.
pub(super) fn options(spec: &NodeSpec, sharing: Sharing) -> OpenOptions {
    let access = match (spec.read_only, spec.auto_read_only) {
        (true, _) => Access::ReadOnly,
        (false, true) => Access::ReadWriteIfAllowed,
        (false, false) => Access::ReadWrite,
    };
    OpenOptions {
        access,
        cache: if spec.cache.direct { Cache::Direct } else { Cache::Page },
        flush: flush(spec.cache),
        discard: match spec.discard {
            Discard::Unmap => open::Discard::Unmap,
            Discard::Ignore | Discard::ZeroesOnly => open::Discard::Ignore,
        },
        locking: match sharing {
            Sharing::Locked => Locking::Auto,
            Sharing::Still => Locking::Still,
            Sharing::Anything => Locking::Off,
        },
    }
}

/// Whether flushes reach the medium.
pub(super) const fn flush(cache: CacheUse) -> Flush {
    if cache.no_flush { Flush::Ignore } else { Flush::Honor }
}

/// Says whether there is a block device.
pub(super) fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
