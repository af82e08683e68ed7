//! [`Target`]: the file or device that a mirror writes to: checked before anything is touched, made if it is
//! missing, and removed again if the mirror that made it fails.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use heliostat_block::driver::qcow2::create::{CreateOptions, create};
use heliostat_block::driver::qcow2::file::ImageFile;
use heliostat_host::file::FileStorage;
use heliostat_host::open::{Access, Cache, Existing, OpenOptions};
use heliostat_host::runtime::block_on;

use super::disk::{Backing, FormatName, Kind, look_at, size_of};
use super::image::{self, Format};
use super::output::say;
use super::remote::{At, is_export};
use super::units;

/// What the operator allows to happen to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// It is made; one that holds anything is left alone.
    Create,
    /// It must be there, and is used as it is (`--existing`).
    Existing,
    /// It is made; one that is there loses its contents (`--force`).
    Replace,
}

/// What will happen to a target; nothing has happened yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    path: PathBuf,
    size: u64,
    kind: Kind,
    backing: Option<Backing>,
    way: Way,
}

/// What a mirror needs of its target.
#[derive(Clone, Debug)]
pub struct Needs<'a> {
    /// The disk that is mirrored.
    pub source: &'a Path,
    /// Its virtual size.
    pub size: u64,
    /// Of which format it is.
    pub kind: Kind,
    /// The format of the target, where the operator says it.
    pub format: Option<FormatName>,
    /// What a new target is to stand on.
    pub backing: Option<Backing>,
}

impl Needs<'_> {
    /// Of which format a new target is. One that may not look like an image stays so on the target.
    fn kind_of_new(&self) -> Kind {
        match (self.format, self.kind) {
            (Some(FormatName::Qcow2), _) | (None, Kind::Qcow2 | Kind::LooksQcow2) => Kind::Qcow2,
            (Some(FormatName::Raw), Kind::LooksRaw) | (None, Kind::LooksRaw) => Kind::LooksRaw,
            (Some(FormatName::Raw), _) | (None, Kind::Raw) => Kind::Raw,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Create,
    Replace,
    Use,
}

/// A target that is there. Dropped before [`Target::keep`], it is removed again if we made it.
pub struct Target {
    path: PathBuf,
    kind: Kind,
    shares_backing: bool,
    was_created: bool,
    reads_zero: bool,
    removes: bool,
}

impl Plan {
    /// Decides what is to happen to what is there, so that it can take `size` bytes from `source`.
    ///
    /// # Errors
    /// When it must not, or cannot, be used. Nothing has been touched.
    pub fn new(needs: Needs<'_>, at: At<'_>, permission: Permission, cache: Cache) -> Result<Self> {
        let path = at.path;
        let kind = needs.kind_of_new();
        let (source, size) = (needs.source, needs.size);
        let plan =
            |way, kind| Self { path: path.to_owned(), size, kind, backing: needs.backing.clone(), way };
        if is_export(path) {
            // It is there, or cannot be had: an export cannot be made.
            let kind = Kind::of(path, needs.format, look_at(at)?);
            check_size(at, size, kind)?;
            return Ok(plan(Way::Use, kind));
        }
        let Some(there) = metadata(path)? else {
            if permission == Permission::Existing {
                bail!(
                    "{}: there is no such file, and --existing was given; without it the file is made",
                    path.display()
                );
            }
            check_parent(path)?;
            return plan(Way::Create, kind).checked();
        };
        if let Some(source_there) = metadata(source)?
            && is_same(&source_there, &there)
        {
            bail!(
                "{} and {} are the same file; a disk cannot be mirrored into itself",
                source.display(),
                path.display()
            );
        }
        let is_file = there.is_file();
        let way = match permission {
            Permission::Create if is_file && there.len() > 0 => bail!(
                "{} exists and is not empty; add --existing to mirror onto it as it is, or --force to replace \
                 its contents",
                path.display()
            ),
            Permission::Create | Permission::Replace if is_file => Way::Replace,
            Permission::Create if there.file_type().is_block_device() => bail!(
                "{} is a block device, whose contents would be lost; add --existing if that is what you want",
                path.display()
            ),
            _ => Way::Use,
        };
        image::open_as(path, &options(cache))?;
        if way != Way::Use {
            return plan(way, kind).checked();
        }
        let kind = Kind::of(path, needs.format, look_at(at)?);
        check_size(at, size, kind)?;
        Ok(plan(way, kind))
    }

    /// Says whether it has, or shows, what is not copied: it is there already, or stands on something.
    #[must_use]
    pub const fn has_the_rest(&self) -> bool {
        matches!(self.way, Way::Use) || self.backing.is_some()
    }

    /// Refuses what cannot be made.
    fn checked(self) -> Result<Self> {
        if self.backing.is_some() && self.kind.format() == Format::Raw {
            bail!("--sync top: a raw target can stand on no other image; leave --target-format out");
        }
        if self.kind.format() == Format::Qcow2 && !self.size.is_multiple_of(512) {
            bail!(
                "the source has {} bytes, and a qcow2 image has whole sectors of 512; add --target-format raw",
                units::count(self.size)
            );
        }
        Ok(self)
    }

    /// Carries it out.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn make(self, cache: Cache) -> Result<Target> {
        let existing = if self.way == Way::Replace { Existing::Replace } else { Existing::Refuse };
        let is_new = self.way != Way::Use;
        let shares_backing = is_new && self.backing.is_some();
        match self.kind.format() {
            _ if !is_new => {}
            Format::Raw => drop(FileStorage::create(&self.path, self.size, existing, &options(cache))?),
            Format::Qcow2 => self.make_qcow2(existing, cache)?,
        }
        let was_created = self.way == Way::Create;
        Ok(Target {
            path: self.path,
            kind: self.kind,
            shares_backing,
            was_created,
            reads_zero: is_new && !shares_backing,
            removes: was_created,
        })
    }
}

impl Plan {
    fn make_qcow2(&self, existing: Existing, cache: Cache) -> Result<()> {
        let storage = FileStorage::create(&self.path, 0, existing, &options(cache))?;
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        let create_options = CreateOptions {
            size: self.size,
            backing_file: self.backing.as_ref().map(|backing| bytes(backing.name.as_os_str())),
            backing_format: self.backing.as_ref().map(|backing| backing.format.clone().into_bytes()),
            ..CreateOptions::default()
        };
        let file = ImageFile::new(Arc::new(storage));
        let made = block_on(create(&file, None, &create_options)).context("cannot start the I/O engine")?;
        made.with_context(|| format!("cannot create {}", self.path.display())).inspect_err(|_| {
            if self.way == Way::Create {
                let _ = std::fs::remove_file(&self.path);
            }
        })
    }
}

impl Target {
    /// Of which format it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Says whether it was made to stand on what the source stands on.
    #[must_use]
    pub const fn shares_backing(&self) -> bool {
        self.shares_backing
    }

    /// Says whether all of it is known to read as zero.
    #[must_use]
    pub const fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    /// Leaves it there from now on.
    pub const fn keep(&mut self) {
        self.removes = false;
    }

    /// Says what has become of a target whose mirror did not succeed, and removes it if we made it.
    pub fn give_up(self) {
        if !self.was_created {
            say(format_args!("heliostat: {} is incomplete; do not use it", self.path.display()));
        } else if self.removes {
            say(format_args!(
                "heliostat: {} was made for this and is incomplete, so it is removed (--keep-partial keeps it)",
                self.path.display()
            ));
        } else {
            say(format_args!("heliostat: {} is incomplete, and kept as asked", self.path.display()));
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.removes {
            // Nothing more can be done about it; a later run refuses the leftover file.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

const fn options(cache: Cache) -> OpenOptions {
    OpenOptions {
        access: Access::ReadWrite,
        cache,
        flush: heliostat_host::open::Flush::Honor,
        discard: heliostat_host::open::Discard::Unmap,
        locking: heliostat_host::open::Locking::Auto,
    }
}

/// What is at `path`; `None` when nothing is.
fn metadata(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    let same_device =
        a.file_type().is_block_device() && b.file_type().is_block_device() && a.rdev() == b.rdev();
    same_device || (a.dev() == b.dev() && a.ino() == b.ino())
}

fn check_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => bail!("cannot create {}: it is a directory", path.display()),
    };
    if !parent.is_dir() {
        bail!("cannot create {}: there is no directory {}", path.display(), parent.display());
    }
    Ok(())
}

/// Compares the size of a target that is there with what is needed.
fn check_size(at: At<'_>, size: u64, kind: Kind) -> Result<()> {
    let there = size_of(at, kind)?;
    if there == size {
        return Ok(());
    }
    let relation = if there < size { "smaller" } else { "larger" };
    bail!(
        "{} is {relation} than the source: it has {} bytes ({}), the source {} ({}); both must be the same",
        at.path.display(),
        units::count(there),
        units::size(there),
        units::count(size),
        units::size(size)
    )
}
