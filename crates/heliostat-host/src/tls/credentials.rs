//! [`Credentials`]: the certificates and the key of a folder in QEMU's layout, kept as new as their files.
//!
//! Looks at the files before each handshake and takes what has changed; what cannot be used leaves the old ones
//! in force, and [`Credentials::trouble`] says why. Touches files on blocking threads only. Called by the stream
//! and by whoever keeps the object.

use std::fmt;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use rustls::{ClientConfig, ServerConfig};

use super::load::{self, Loaded, Side};
use crate::blocking::Share;

/// Which part of a connection credentials are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A server's: `server-cert.pem` and `server-key.pem`.
    Server,
    /// A client's: `client-cert.pem` and `client-key.pem`, where the server wants them.
    Client,
}

/// Whether peers must show a certificate that an authority of `ca-cert.pem` has signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCheck {
    /// They must.
    Required,
    /// A server asks for none; a client believes whatever it is shown, and talks to anybody who is in the way.
    None,
}

/// Where credentials come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialsSettings {
    /// The folder with `ca-cert.pem`, `ca-crl.pem` (where there is one) and the files of the endpoint.
    pub dir: PathBuf,
    /// What they are for.
    pub endpoint: Endpoint,
    /// Whether peers are verified.
    pub peers: PeerCheck,
}

/// Credentials cannot be used: which file, what about it, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CredentialsError(pub(super) String);

/// Credentials in use. May be shared by any number of connections, and used on any thread.
pub struct Credentials {
    settings: CredentialsSettings,
    /// Held while files are looked at, so that one connection reads them for all.
    in_force: Mutex<InForce>,
    /// Of the last attempt to take changed files. Held to copy it.
    trouble: Mutex<Option<String>>,
    tell: Box<Tell>,
}

/// Is told why changed files are not taken.
type Tell = dyn Fn(&CredentialsError) + Send + Sync;

struct InForce {
    side: Side,
    /// Revocations are in force, which end with no file.
    revokes: bool,
    /// Of the files when they were read last, successfully or not.
    stamps: Stamps,
}

/// What tells one state of a file from another: its identity, length and last change. `None` where there is none.
type Stamp = Option<(u64, u64, u64, i64, i64, i64, i64)>;
type Stamps = Vec<Stamp>;

impl Credentials {
    /// Reads the files. Blocks; to be called on a thread that may.
    ///
    /// # Errors
    /// When a file is missing, unreadable, expired, or does not fit the others.
    pub fn load(settings: CredentialsSettings) -> Result<Arc<Self>, CredentialsError> {
        Self::load_and_tell(settings, |_| ())
    }

    /// As [`Credentials::load`]. `tell` is called later, once for each change of the files that cannot be used, on
    /// whatever thread has found it. It must not call these credentials.
    ///
    /// # Errors
    /// As [`Credentials::load`].
    pub fn load_and_tell(
        settings: CredentialsSettings,
        tell: impl Fn(&CredentialsError) + Send + Sync + 'static,
    ) -> Result<Arc<Self>, CredentialsError> {
        let stamps = stamps(&settings);
        let Loaded { side, revokes } = load::load(&settings, false)?;
        let in_force = Mutex::new(InForce { side, revokes, stamps });
        Ok(Arc::new(Self { settings, in_force, trouble: Mutex::default(), tell: Box::new(tell) }))
    }

    /// What they were made from.
    #[must_use]
    pub const fn settings(&self) -> &CredentialsSettings {
        &self.settings
    }

    /// Why files that have changed are not in use; `None` when those in force are the newest.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.lock_trouble().clone()
    }

    /// Takes files that have changed. Blocks; to be called on a thread that may.
    ///
    /// # Errors
    /// When the changed ones cannot be used, or a list of what is revoked is gone. The old ones stay in force. Said once for each change.
    pub fn refresh(&self) -> Result<(), CredentialsError> {
        self.renew(&mut self.in_force.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn renew(&self, in_force: &mut InForce) -> Result<(), CredentialsError> {
        let stamps = stamps(&self.settings);
        if stamps == in_force.stamps {
            return Ok(());
        }
        in_force.stamps = stamps;
        let loaded = load::load(&self.settings, in_force.revokes);
        *self.lock_trouble() = loaded.as_ref().err().map(ToString::to_string);
        if let Err(error) = &loaded {
            (self.tell)(error);
        }
        Loaded { side: in_force.side, revokes: in_force.revokes } = loaded?;
        Ok(())
    }

    fn newest(&self) -> Side {
        let mut in_force = self.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        // Those in force go on serving.
        let _ = self.renew(&mut in_force);
        in_force.side.clone()
    }

    async fn current(self: &Arc<Self>) -> Side {
        static LOADING: LazyLock<Share> = LazyLock::new(Share::new);
        let this = Arc::clone(self);
        LOADING.run(move || this.newest()).await
    }

    pub(super) async fn server(self: &Arc<Self>) -> io::Result<Arc<ServerConfig>> {
        match self.current().await {
            Side::Server(config) => Ok(config),
            Side::Client(_) => Err(wrong("a client", "a server")),
        }
    }

    pub(super) async fn client(self: &Arc<Self>) -> io::Result<Arc<ClientConfig>> {
        match self.current().await {
            Side::Client(config) => Ok(config),
            Side::Server(_) => Err(wrong("a server", "a client")),
        }
    }

    fn lock_trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of a key.
        f.debug_struct("Credentials").field("settings", &self.settings).finish_non_exhaustive()
    }
}

fn wrong(have: &str, need: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("the TLS credentials are {have}'s; {need}'s are needed"),
    )
}

fn stamps(settings: &CredentialsSettings) -> Stamps {
    load::file_names(settings.endpoint).into_iter().map(|name| stamp(&settings.dir.join(name))).collect()
}

fn stamp(path: &Path) -> Stamp {
    // A link that leads nowhere has a stamp of its own.
    let data = std::fs::metadata(path).or_else(|_| std::fs::symlink_metadata(path)).ok()?;
    let (dev, inode, len) = (data.st_dev(), data.st_ino(), data.st_size());
    Some((dev, inode, len, data.st_mtime(), data.st_mtime_nsec(), data.st_ctime(), data.st_ctime_nsec()))
}
