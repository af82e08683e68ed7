//! [`Gate`]: the one way by which an image opens another file (invariant 5).
//!
//! The names of a backing file and of a data file stand in the image, and whoever wrote the image chose them: a guest,
//! perhaps, that was given a raw disk. So a name is a request, not an order. The gate follows it once, looks where it
//! led, and hands out what it found only if that lies in a tree that the operator has allowed. It opens nothing for
//! reading or writing itself, and knows no node. What an operator names directly does not pass here. Called by
//! `nodes`, and by nobody else who reads names from images.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use heliostat_host::open::OpenError;
use heliostat_host::pinned::{Identity, Pinned};

use super::error::open_text;

/// The most images on top of each other, as libvirt has it. A request that goes down to the lowest nests calls for each:
/// through 200 of them it needs 3 MiB of stack without optimisation, and 768 KiB with it, see [`heliostat_host::runtime::STACK`].
pub const CHAIN_MAX: usize = 200;

/// What an image names a file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It stands on it.
    Backing,
    /// It keeps its data there.
    Data,
}

impl Purpose {
    const fn word(self) -> &'static str {
        match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        }
    }
}

/// How a file keeps its bytes, of those that can be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One to one.
    Raw,
    /// As a qcow2 image.
    Qcow2,
}

/// Whether a backing file's format may be guessed where the image does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probing {
    /// It may not.
    #[default]
    Refused,
    /// It may.
    Allowed,
}

/// What the operator allows images to open.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// Without links.
    trees: Vec<PathBuf>,
    probing: Probing,
}

/// An image that names another file.
#[derive(Clone, Debug)]
pub struct Namer {
    /// Where it is, as it was named itself.
    pub path: PathBuf,
    /// The tree of the image that the operator named, which is allowed without being listed.
    pub tree: Option<PathBuf>,
    /// The files on the way from the operator's image to this one, itself included.
    pub trail: Vec<Identity>,
}

/// A file that an image may open.
#[derive(Debug)]
pub struct Admitted {
    /// Where it is, as the image's name reads beside the image.
    pub path: PathBuf,
    /// What is there.
    pub file: Pinned,
}

/// Why an image may not open a file that it names. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The name is not a path.
    #[error(
        "{} names the {what} '{name}', and '{prefix}' is no path: only files are opened by name; give the node itself \
         in the arguments instead", image.display()
    )]
    NotAPath {
        /// The image.
        image: PathBuf,
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
        /// What makes it none.
        prefix: String,
    },
    /// The file is where the image may not reach.
    #[error(
        "{} names the {what} '{name}', which is not in {}: an image opens files only where the operator allows it; \
         if this one is meant, allow its directory with --allow-path, or give the node itself in the arguments",
        image.display(), allowed(trees)
    )]
    Outside {
        /// The image.
        image: PathBuf,
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
        /// Where it might be.
        trees: Vec<PathBuf>,
    },
    /// The file is already on the way from the first image to this one.
    #[error("Backing file '{}' creates an infinite loop", path.display())]
    Loop {
        /// The file.
        path: PathBuf,
    },
    /// There are too many images on top of each other.
    #[error("{} is below {CHAIN_MAX} images, which is the most; join some of them (qemu-img rebase)", path.display())]
    TooDeep {
        /// The file.
        path: PathBuf,
    },
    /// The image does not say of what format its backing file is.
    #[error(
        "{} names the backing file '{name}' and not its format, and guessing it would let a guest choose what is \
         opened; write it into the image (qemu-img rebase -u -F FORMAT -b '{name}'), give the node itself in the \
         arguments, or allow guessing with --probe-backing", image.display()
    )]
    NoFormat {
        /// The image.
        image: PathBuf,
        /// The name.
        name: String,
    },
    /// The format is none that is known.
    #[error("Unknown driver '{0}'")]
    UnknownFormat(String),
    /// The file cannot be found or is no disk.
    #[error("{}", text_of(.0))]
    Open(OpenError),
}

fn text_of(error: &OpenError) -> String {
    match error {
        OpenError::NotADisk { path, .. } => {
            format!("'file' driver requires '{}' to be a regular file", path.display())
        }
        other => open_text(other),
    }
}

fn allowed(trees: &[PathBuf]) -> String {
    match trees {
        [] => "any allowed directory (there is none)".to_owned(),
        trees => trees.iter().map(|tree| tree.display().to_string()).collect::<Vec<_>>().join(" or "),
    }
}

impl Gate {
    /// A gate that lets images open what is in `trees`, beside what is in their own.
    ///
    /// # Errors
    /// With the directory that is not there.
    pub fn new(trees: &[PathBuf], probing: Probing) -> Result<Self, (PathBuf, std::io::Error)> {
        let real = |tree: &PathBuf| std::fs::canonicalize(tree).map_err(|error| (tree.clone(), error));
        Ok(Self { trees: trees.iter().map(real).collect::<Result<_, _>>()?, probing })
    }

    /// Lets the image `by` have the file that it names, if it may.
    ///
    /// # Errors
    /// [`GateError`]; nothing was opened then.
    pub fn admit(&self, name: &[u8], purpose: Purpose, by: &Namer) -> Result<Admitted, GateError> {
        let path = beside(name, purpose, &by.path)?;
        if by.trail.len() >= CHAIN_MAX {
            return Err(GateError::TooDeep { path });
        }
        let outside = || GateError::Outside {
            image: by.path.clone(),
            what: purpose.word(),
            name: String::from_utf8_lossy(name).into_owned(),
            trees: self.trees.iter().chain(&by.tree).cloned().collect(),
        };
        let file = match Pinned::find(&path) {
            Ok(file) => file,
            // What is there and what is not is nobody's business outside.
            Err(_) if !self.allows(&nearest(&path), by) => return Err(outside()),
            Err(error) => return Err(GateError::Open(error)),
        };
        let is_listed = self.trees.iter().any(|tree| file.path().starts_with(tree));
        // A directory that holds a device holds all of the host's: only listing it allows that.
        if !is_listed && (file.is_device() || !self.allows(file.path(), by)) {
            return Err(outside());
        }
        if by.trail.contains(&file.identity()) {
            return Err(GateError::Loop { path });
        }
        Ok(Admitted { path, file })
    }

    /// The format of the backing file `name` of which `by` says that it is `said`. `None`: it may be guessed.
    ///
    /// # Errors
    /// [`GateError::NoFormat`], [`GateError::UnknownFormat`].
    pub fn format(&self, said: Option<&[u8]>, name: &[u8], by: &Namer) -> Result<Option<Format>, GateError> {
        match said {
            // QEMU has written the names of protocols here, too.
            Some(b"raw" | b"file" | b"host_device") => Ok(Some(Format::Raw)),
            Some(b"qcow2") => Ok(Some(Format::Qcow2)),
            Some(other) => Err(GateError::UnknownFormat(String::from_utf8_lossy(other).into_owned())),
            None if self.probing == Probing::Allowed => Ok(None),
            None => Err(GateError::NoFormat {
                image: by.path.clone(),
                name: String::from_utf8_lossy(name).into_owned(),
            }),
        }
    }

    fn allows(&self, place: &Path, by: &Namer) -> bool {
        self.trees.iter().chain(&by.tree).any(|tree| place.starts_with(tree))
    }
}

/// The tree in which an image that the operator named may open files unasked: its own directory. Not the whole file
/// system, and nothing for a device, whose directory is the host's.
pub fn tree_of(path: &Path) -> Option<PathBuf> {
    if !std::fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let directory = match path.parent()? {
        empty if empty.as_os_str().is_empty() => Path::new("."),
        directory => directory,
    };
    std::fs::canonicalize(directory).ok().filter(|tree| tree.parent().is_some())
}

/// The path that `name` means in the image at `image`.
///
/// # Errors
/// [`GateError::NotAPath`].
fn beside(name: &[u8], purpose: Purpose, image: &Path) -> Result<PathBuf, GateError> {
    let first = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    if let Some(colon) = first.iter().position(|byte| *byte == b':') {
        return Err(GateError::NotAPath {
            image: image.to_owned(),
            what: purpose.word(),
            name: String::from_utf8_lossy(name).into_owned(),
            prefix: String::from_utf8_lossy(&first[..=colon]).into_owned(),
        });
    }
    // What is absolute stays as it is.
    Ok(image.parent().unwrap_or(Path::new("")).join(OsStr::from_bytes(name)))
}

/// How the name of a backing file reads beside the image that names it, for people; leads nowhere.
pub fn resolved(name: &[u8], image: &Path) -> String {
    match beside(name, Purpose::Backing, image) {
        Ok(path) => path.to_string_lossy().into_owned(),
        Err(_) => String::from_utf8_lossy(name).into_owned(),
    }
}

/// Where the nearest directory above `path` that is there really is.
fn nearest(path: &Path) -> PathBuf {
    path.ancestors().skip(1).find_map(|above| std::fs::canonicalize(above).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Scene(tempfile::TempDir);

    impl Scene {
        fn new() -> Self {
            let scene = Self(tempfile::tempdir().unwrap());
            for directory in ["images/below", "other"] {
                fs::create_dir_all(scene.at(directory)).unwrap();
            }
            for file in ["images/top", "images/base", "images/below/deep", "other/secret"] {
                fs::write(scene.at(file), [0; 512]).unwrap();
            }
            scene
        }

        fn at(&self, place: &str) -> PathBuf {
            self.0.path().join(place)
        }

        fn namer(&self) -> Namer {
            let path = self.at("images/top");
            let trail = vec![Pinned::find(&path).unwrap().identity()];
            Namer { tree: tree_of(&path), path, trail }
        }

        fn asks(&self, gate: &Gate, name: &str) -> Result<Admitted, GateError> {
            gate.admit(name.as_bytes(), Purpose::Backing, &self.namer())
        }
    }

    #[test]
    fn what_is_in_the_images_own_tree_is_let_through() {
        let scene = Scene::new();
        let gate = Gate::default();
        let absolute = scene.at("images/below/../base");
        for name in ["base", "./below/deep", "below/../base", absolute.to_str().unwrap()] {
            assert!(scene.asks(&gate, name).is_ok(), "{name}");
        }
        symlink(scene.at("images/base"), scene.at("images/link")).unwrap();
        assert_eq!(scene.asks(&gate, "link").unwrap().path, scene.at("images/link"));
    }

    #[test]
    fn nothing_outside_is_let_through_by_any_name_and_nobody_learns_what_is_there() {
        let scene = Scene::new();
        let gate = Gate::default();
        symlink(scene.at("other/secret"), scene.at("images/to-secret")).unwrap();
        symlink(scene.at("other"), scene.at("images/to-other")).unwrap();
        let absolute = scene.at("other/secret");
        let names = [
            "../other/secret",
            "../other/none",
            "to-secret",
            "to-other/secret",
            "to-other/none/none",
            absolute.to_str().unwrap(),
            "/etc/shadow",
            "/etc/none",
            "/dev/zero",
            "/proc/self/mem",
        ];
        for name in names {
            let refused = scene.asks(&gate, name);
            assert!(matches!(refused, Err(GateError::Outside { .. })), "{name}: {refused:?}");
        }
    }

    #[test]
    fn a_tree_that_the_operator_lists_is_open_to_images() {
        let scene = Scene::new();
        // By way of a link, as operators name things.
        symlink(scene.at("other"), scene.at("listed")).unwrap();
        let gate = Gate::new(&[scene.at("listed")], Probing::Refused).unwrap();
        assert!(scene.asks(&gate, "../other/secret").is_ok());
        assert!(matches!(scene.asks(&gate, "/etc/shadow"), Err(GateError::Outside { .. })));
        assert!(Gate::new(&[scene.at("none")], Probing::Refused).is_err());
    }

    #[test]
    fn what_is_no_disk_is_refused_even_inside() {
        let scene = Scene::new();
        let gate = Gate::default();
        let fifo = scene.at("images/fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for name in ["fifo", "below", "none", ".."] {
            assert!(matches!(scene.asks(&gate, name), Err(GateError::Open(_))), "{name}");
        }
    }

    #[test]
    fn names_of_protocols_and_definitions_are_no_paths() {
        let scene = Scene::new();
        for name in ["json:{}", "nbd:localhost:1", "http://x/y", "file:base", "a:b"] {
            let refused = scene.asks(&Gate::default(), name);
            assert!(matches!(refused, Err(GateError::NotAPath { .. })), "{name}: {refused:?}");
        }
        // As QEMU has it, a slash makes a path of it.
        assert!(matches!(scene.asks(&Gate::default(), "./a:b"), Err(GateError::Open(_))));
    }

    #[test]
    fn an_image_on_its_own_way_is_a_loop_by_whatever_name() {
        let scene = Scene::new();
        fs::hard_link(scene.at("images/top"), scene.at("images/again")).unwrap();
        for name in ["top", "below/../top", "again"] {
            assert!(matches!(scene.asks(&Gate::default(), name), Err(GateError::Loop { .. })), "{name}");
        }
        let identity = Pinned::find(&scene.at("images/top")).unwrap().identity();
        let deep = Namer { trail: vec![identity; CHAIN_MAX], ..scene.namer() };
        let refused = Gate::default().admit(b"base", Purpose::Backing, &deep);
        assert!(matches!(refused, Err(GateError::TooDeep { .. })));
    }

    #[test]
    fn a_format_is_guessed_only_where_that_is_allowed() {
        let scene = Scene::new();
        let by = scene.namer();
        let strict = Gate::default();
        let guessing = Gate::new(&[], Probing::Allowed).unwrap();
        assert_eq!(strict.format(Some(b"raw"), b"base", &by).unwrap(), Some(Format::Raw));
        assert_eq!(strict.format(Some(b"qcow2"), b"base", &by).unwrap(), Some(Format::Qcow2));
        assert!(matches!(strict.format(None, b"base", &by), Err(GateError::NoFormat { .. })));
        assert!(matches!(strict.format(Some(b"vmdk"), b"base", &by), Err(GateError::UnknownFormat(_))));
        assert_eq!(guessing.format(None, b"base", &by).unwrap(), None);
    }

    #[test]
    fn a_device_and_the_root_open_no_tree() {
        assert_eq!(tree_of(Path::new("/dev/null")), None);
        assert_eq!(tree_of(Path::new("/none")), None);
    }
}
