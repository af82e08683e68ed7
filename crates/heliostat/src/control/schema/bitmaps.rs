//! What commands on dirty bitmaps take.

use super::{Kind, Record, optional, record, required};

/// A bitmap by its node and its name.
pub(super) static NAME: Record = record(&[
    required("node", Kind::Text, "the node that it hangs on"),
    required("name", Kind::Text, "its name"),
]);

/// A bitmap by its name, or also by its node.
pub(super) static NAMED: Kind = Kind::TextOrObject(&NAME, "BlockDirtyBitmapOrStr");

/// A bitmap that is to be made.
pub(super) static ADD: Record = record(&[
    required("node", Kind::Text, "the node that it is to hang on"),
    required("name", Kind::Text, "its name"),
    optional(
        "granularity",
        Kind::Uint32,
        "bytes a bit; a power of two, 512 B to 2 GiB; default: the node's clusters, from 4 to 64 KiB",
    ),
    optional("persistent", Kind::Flag, "keep it in the image; default false"),
    optional("disabled", Kind::Flag, "let it hear of no writes at first; default false"),
]);

/// A bitmap that is to have what others have.
pub(super) static MERGE: Record = record(&[
    required("node", Kind::Text, "the node that the one to change hangs on"),
    required("target", Kind::Text, "the one to change"),
    required(
        "bitmaps",
        Kind::List(&NAMED),
        "the others: names of ones on the same node, or with their nodes",
    ),
]);
