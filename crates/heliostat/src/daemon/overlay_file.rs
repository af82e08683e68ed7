//! The file of a snapshot's overlay: whether it can be made, and what it is to be.
//!
//! It looks at what is there and makes nothing. Called by `snapshot`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use heliostat_block::name::NodeName;
use heliostat_host::pinned::Pinned;

use super::drive_mirror::{Layer, New, check_creatable, image_of, layer};
use super::gate::Format;
use super::{Beneath, Daemon, DaemonError, NodeEntry, SnapshotSpec, TargetMode};

/// Checks what can be known of the overlay before anything is made.
pub(super) fn overlay_file(
    daemon: &Daemon,
    spec: &SnapshotSpec,
    node: &NodeEntry,
) -> Result<New, DaemonError> {
    let Some(layer) = layer(&spec.format) else {
        return Err(match spec.mode {
            TargetMode::AbsolutePaths => {
                DaemonError::Create(format!("Unknown file format '{}'", spec.format))
            }
            TargetMode::Existing => DaemonError::UnknownDriver(spec.format.clone()),
        });
    };
    let mut new = New { path: spec.file.clone(), layer, beneath: Beneath::Source, image: None };
    if spec.mode == TargetMode::Existing {
        return Ok(new);
    }
    if !layer.is_image() {
        let text = format!("Backing file not supported for file format '{}'", spec.format);
        return Err(DaemonError::Create(text));
    }
    let is_same = std::fs::canonicalize(&spec.file)
        .is_ok_and(|file| std::fs::canonicalize(&node.path).is_ok_and(|path| path == file));
    if is_same {
        let text = "Error: Trying to create an image with the same filename as the backing file";
        return Err(DaemonError::Create(text.to_owned()));
    }
    new.image = Some(image_of(node, Some(node))?);
    check_creatable(&spec.file, node, &daemon.files_in_use())?;
    if let Some(name) = &spec.overlay_name {
        NodeName::new(name)?;
    }
    Ok(new)
}

/// Refuses an overlay for whose nodes there is no room beside those of `images` that are to be made.
pub(super) fn check_room(daemon: &Daemon, layer: Layer, images: usize) -> Result<(), DaemonError> {
    daemon.check_room_for_nodes(images * Layer::Format(Format::Qcow2).nodes() + layer.nodes())
}

/// Refuses what was opened while it was looked whether all can be done, where one of `files`, which are to be replaced
/// then, is of it.
pub(super) fn check_unopened(daemon: &Daemon, files: &[PathBuf]) -> Result<(), DaemonError> {
    let opened = daemon.files_in_use();
    let is_opened = |file: &PathBuf| Pinned::find(file).is_ok_and(|found| opened.contains(&found.identity()));
    if files.iter().any(is_opened) { Err(locked()) } else { Ok(()) }
}

/// What is said of a file that is somebody else's.
pub(super) fn locked() -> DaemonError {
    DaemonError::Create("Failed to get \"write\" lock".to_owned())
}

/// Says whether both are, or would be, one file.
pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some((std::fs::canonicalize(folder).ok()?, path.file_name()?.to_owned()))
    };
    (identity(a).is_some() && identity(a) == identity(b)) || (place(a).is_some() && place(a) == place(b))
}
