//! [`Made`]: a file that is made for a mirror's target or a snapshot's overlay, and gone again when that does not come.
//!
//! An overlay's file is not made in the place of one that is there, but beside it, and takes its place in one step when
//! nothing can be refused any more: until then the old one is whole under its own name. A crash leaves the new one under
//! a name that ends in `.heliostat-new` and a number, or, after that step, the old one. A block device has no room
//! beside it: what was on it is lost when the overlay is made. It knows no nodes. Called by `drive_mirror` and
//! `snapshot`.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use heliostat_block::driver::qcow2::create::create;
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Existing, OpenError, OpenOptions};
use heliostat_host::runtime::block_on;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::drive_mirror::{New, creation, file_spec};
use super::error::strerror;
use super::open::{is_device, options};
use super::{DaemonError, NodeEntry, Sharing};

/// What a file is called that is to take the place of another, before its number.
const SUFFIX: &str = ".heliostat-new";

/// The most bytes of the other's name in that: the host takes 255 in all.
const NAME_MAX: usize = 200;

/// The most such files beside each other: each is left by a crash, or is another daemon's for a moment.
const TRIES: usize = 100;

/// A file that was made: gone again when dropped, if nothing was there before.
pub(super) struct Made {
    path: PathBuf,
    place: Place,
}

/// Where it is.
enum Place {
    /// At its path, where nothing was.
    Own,
    /// At its path, where something was that is gone.
    Anothers,
    /// Beside what is at its path, which nobody else may write meanwhile.
    Beside { at: PathBuf, _old: Box<FileStorage> },
    /// At its path; what was there is at this one.
    Swapped { old: PathBuf },
}

impl Made {
    /// Makes a file at its path, in the place of what is there.
    ///
    /// # Errors
    /// `Create`; the host's `Engine`.
    pub(super) fn in_place(new: &New, source: &NodeEntry) -> Result<Self, DaemonError> {
        let path = new.path.clone();
        let was_there = path.symlink_metadata().is_ok();
        let options = options(&file_spec(&path, source), Sharing::Locked);
        let len = if new.image.is_some() { 0 } else { source.node.size() };
        let is_device = is_device(&path);
        if is_device && new.image.is_none() {
            return Ok(Self { path, place: Place::Anothers });
        }
        let storage = match is_device {
            true => FileStorage::open(&path, &options),
            false => FileStorage::create(&path, len, Existing::Replace, &options),
        };
        let storage = storage.map_err(|error| creation(error.into()))?;
        let made = Self { path, place: if was_there { Place::Anothers } else { Place::Own } };
        fill(storage, new)?;
        Ok(made)
    }

    /// Makes a file that is to take the place of what is at its path, if anything is. See [`Made::take_place`].
    ///
    /// # Errors
    /// As [`Made::in_place`].
    pub(super) fn beside(new: &New, source: &NodeEntry) -> Result<Self, DaemonError> {
        // Where a link leads.
        let path = match fs::canonicalize(&new.path) {
            Ok(path) if !is_device(&path) => path,
            _ => return Self::in_place(new, source),
        };
        let options = options(&file_spec(&path, source), Sharing::Locked);
        let refused = |error: OpenError| creation(error.into());
        let old = FileStorage::open(&path, &options).map_err(refused)?;
        let (at, storage) = create_beside(&path, &options)?;
        let made = Self { path, place: Place::Beside { at: at.clone(), _old: Box::new(old) } };
        if let Ok(there) = fs::metadata(&made.path) {
            look_like(&at, &there);
        }
        fill(storage, new)?;
        Ok(made)
    }

    /// Where it is at this moment.
    pub(super) fn now_at(&self) -> &Path {
        match &self.place {
            Place::Beside { at, .. } => at,
            Place::Own | Place::Anothers | Place::Swapped { .. } => &self.path,
        }
    }

    /// Takes the place of what is at its path, which is at hand for as long as this may be dropped. Answers the path,
    /// whose directory is not durable yet.
    ///
    /// # Errors
    /// `Create`; nothing has changed then.
    pub(super) fn take_place(&mut self) -> Result<Option<PathBuf>, DaemonError> {
        let Place::Beside { at, .. } = &self.place else { return Ok(None) };
        let at = at.clone();
        match renameat_with(CWD, &at, CWD, &self.path, RenameFlags::EXCHANGE) {
            Ok(()) => self.place = Place::Swapped { old: at },
            // Not every file system can. What is there gets a second name first, so that it can come back.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                self.place = Place::Swapped { old: take_over(&at, &self.path)? };
            }
            Err(errno) => return Err(refusal(&self.path, errno)),
        }
        Ok(Some(self.path.clone()))
    }

    /// It stays.
    pub(super) fn keep(mut self) {
        if let Place::Swapped { old } = &self.place {
            let _ = fs::remove_file(old);
        }
        self.place = Place::Anothers;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // Nothing more can be done about it where this fails.
        let _ = match &self.place {
            Place::Anothers => Ok(()),
            Place::Own => fs::remove_file(&self.path),
            Place::Beside { at, .. } => fs::remove_file(at),
            // Back, over what has come.
            Place::Swapped { old } => fs::rename(old, &self.path),
        };
    }
}

/// Gives `at` the name `path`, in one step. Answers under which name what was there still is.
fn take_over(at: &Path, path: &Path) -> Result<PathBuf, DaemonError> {
    let mut kept = at.as_os_str().to_owned();
    kept.push("-old");
    let kept = PathBuf::from(kept);
    let refused =
        |error: io::Error| refusal(path, error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error));
    fs::hard_link(path, &kept).map_err(refused)?;
    fs::rename(at, path).map_err(|error| {
        let _ = fs::remove_file(&kept);
        refused(error)
    })?;
    Ok(kept)
}

fn refusal(path: &Path, errno: Errno) -> DaemonError {
    DaemonError::Create(format!("Could not create '{}': {}", path.display(), strerror(errno)))
}

/// Makes an empty file beside `path`, under a name that says so.
fn create_beside(path: &Path, options: &OpenOptions) -> Result<(PathBuf, FileStorage), DaemonError> {
    let name = path.file_name().unwrap_or_default();
    let name: OsString = match name.to_str() {
        Some(text) => text.get(..text.floor_char_boundary(NAME_MAX)).unwrap_or_default().into(),
        None if name.len() <= NAME_MAX => name.to_owned(),
        None => OsString::new(),
    };
    for number in 0..TRIES {
        let mut name = name.clone();
        name.push(format!("{SUFFIX}{number}"));
        let at = path.with_file_name(name);
        match FileStorage::create(&at, 0, Existing::Refuse, options) {
            Ok(storage) => return Ok((at, storage)),
            Err(OpenError::Exists { .. }) => {}
            Err(error) => return Err(creation(error.into())),
        }
    }
    Err(refusal(path, Errno::EXIST))
}

/// Gives the file at `path` the permissions of another, and its owner where the host lets us.
fn look_like(path: &Path, other: &Metadata) {
    if fs::metadata(path).is_ok_and(|own| (own.uid(), own.gid()) != (other.uid(), other.gid())) {
        let _ = chown(path, Some(other.uid()), Some(other.gid()));
    }
    let _ = fs::set_permissions(path, other.permissions());
}

fn fill(storage: FileStorage, new: &New) -> Result<(), DaemonError> {
    let Some(image) = &new.image else { return Ok(()) };
    let file = ImageFile::new(Arc::new(storage));
    Ok(block_on(create(&file, None, image)).map_err(DaemonError::Engine)??)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use heliostat_block::driver::qcow2::create::CreateOptions;

    use super::*;
    use crate::daemon::drive_mirror::Layer;
    use crate::daemon::gate::Format;
    use crate::daemon::{Beneath, Daemon, DriverSpec, NodeSpec};

    static OLD: [u8; 100_000] = [7; 100_000];

    /// A folder with a file `there`, and an overlay made in its place.
    fn made_over(name: &str) -> (tempfile::TempDir, Made) {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        fs::write(&there, OLD).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("there", folder.path().join("link")).unwrap();
        let daemon = Daemon::new();
        let null = DriverSpec::NullCo { size: 1 << 20, read_zeroes: true };
        daemon.add_node(&NodeSpec::new(Some("source".to_owned()), null)).unwrap();
        let new = New {
            path: folder.path().join(name),
            layer: Layer::Format(Format::Qcow2),
            beneath: Beneath::Source,
            image: Some(CreateOptions { size: 1 << 20, ..CreateOptions::default() }),
        };
        let made = Made::beside(&new, &daemon.nodes()[0]).unwrap();
        (folder, made)
    }

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_there_stays_until_the_place_is_taken() {
        let (folder, made) = made_over("there");
        let there = folder.path().join("there");
        assert!(fs::read(&there).unwrap() == OLD);
        assert_eq!(made.now_at(), folder.path().join("there.heliostat-new0"));
        drop(made);
        assert!(fs::read(&there).unwrap() == OLD);
        assert_eq!(names(folder.path()), ["link", "there"]);
    }

    #[test]
    fn what_was_there_is_back_when_all_is_refused_after_the_place_was_taken() {
        let (folder, mut made) = made_over("link");
        let there = folder.path().join("there");
        assert_eq!(made.take_place().unwrap().unwrap(), there);
        assert!(fs::read(&there).unwrap().starts_with(b"QFI\xfb"));
        assert_eq!(fs::metadata(&there).unwrap().permissions().mode() & 0o777, 0o640);
        drop(made);
        assert!(fs::read(&there).unwrap() == OLD);
        assert_eq!(names(folder.path()), ["link", "there"]);
    }

    #[test]
    fn where_names_cannot_be_swapped_what_was_there_has_a_second_one_and_comes_back() {
        let (folder, mut made) = made_over("there");
        let there = folder.path().join("there");
        let at = made.now_at().to_owned();
        made.place = Place::Swapped { old: take_over(&at, &there).unwrap() };
        assert!(fs::read(&there).unwrap().starts_with(b"QFI\xfb"));
        drop(made);
        assert!(fs::read(&there).unwrap() == OLD);
        assert_eq!(names(folder.path()), ["link", "there"]);
    }

    #[test]
    fn what_is_kept_is_where_the_link_led_and_nothing_else_is_left() {
        let (folder, mut made) = made_over("link");
        made.take_place().unwrap().unwrap();
        made.keep();
        assert!(fs::read(folder.path().join("there")).unwrap().starts_with(b"QFI\xfb"));
        assert!(folder.path().join("link").is_symlink());
        assert_eq!(names(folder.path()), ["link", "there"]);
    }

    #[test]
    fn what_a_crash_has_left_beside_it_is_nobodys_way() {
        let (folder, made) = made_over("there");
        std::mem::forget(made);
        let left = folder.path().join("there.heliostat-new0");
        assert!(left.exists());
        let (at, _new) = create_beside(&folder.path().join("there"), &OpenOptions::default()).unwrap();
        assert_eq!(at, folder.path().join("there.heliostat-new1"));
        let long = folder.path().join("n".repeat(250));
        let (at, _new) = create_beside(&long, &OpenOptions::default()).unwrap();
        assert!(at.exists());
    }
}
