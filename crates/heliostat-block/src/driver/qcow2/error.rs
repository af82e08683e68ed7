//! [`FormatError`]: why an image cannot be used as qcow2. [`Corruption`]: what in it contradicts itself.

use std::io;

use crate::range::ByteRange;

/// Why an image cannot be opened, made or changed. The texts of damaged headers are QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The file cannot be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file is something else.
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    /// A field of the header makes no sense, or is beyond a limit.
    #[error("{0}")]
    Header(String),
    /// The image needs what this program does not do. The text names it.
    #[error("{0}")]
    Unsupported(String),
    /// The image has been found corrupt before, and may only be read until it is repaired.
    #[error("qcow2: Image is corrupt; cannot be opened read/write")]
    MarkedCorrupt,
    /// Tables contradict each other.
    #[error("{0}")]
    Corrupt(#[from] Corruption),
    /// What was asked for cannot be had.
    #[error("{0}")]
    Invalid(String),
}

impl FormatError {
    /// What the header says is wrong.
    pub(crate) fn header(text: impl Into<String>) -> Self {
        Self::Header(text.into())
    }
}

/// What in an image contradicts itself. Whoever finds one while writing marks the image corrupt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    /// An entry of a table points to no start of a cluster, or to where no cluster can be.
    #[error("{what} entry {entry:#x} points to {offset:#x}, where no cluster can be")]
    Misplaced {
        /// Which table.
        what: &'static str,
        /// The entry as it stands.
        entry: u64,
        /// Where it points.
        offset: u64,
    },
    /// An entry says two things at once.
    #[error("{what} entry {entry:#x} contradicts itself")]
    Contradiction {
        /// Which table.
        what: &'static str,
        /// The entry as it stands.
        entry: u64,
    },
    /// Something was to be written where a table of the image stands.
    #[error("a write to {range} would destroy the {table}")]
    Overlap {
        /// What was to be written, in the image file.
        range: ByteRange,
        /// What stands there.
        table: &'static str,
    },
    /// A cluster is in use that is counted as free, or the other way round.
    #[error("the cluster at {offset:#x} has the reference count {count}, which cannot be")]
    Refcount {
        /// Where the cluster is, in the image file.
        offset: u64,
        /// How often it is counted.
        count: u64,
    },
    /// Compressed data cannot be read.
    #[error("the compressed cluster at {offset:#x} cannot be decompressed")]
    Compressed {
        /// Where it begins, in the image file.
        offset: u64,
    },
}

impl From<Corruption> for io::Error {
    fn from(corruption: Corruption) -> Self {
        Self::new(io::ErrorKind::InvalidData, corruption)
    }
}
