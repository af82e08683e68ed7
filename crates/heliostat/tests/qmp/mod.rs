//! Two daemons, one conversation: ours and `qemu-storage-daemon`, started the same way and spoken to in the same
//! words, and what they said put side by side.
//!
//! Each test file that compares says `mod qmp;` beside `mod common;`.

#![allow(dead_code, reason = "each test file is a program of its own and uses only its part of this")]

pub mod faults;
pub mod guest;
pub mod steps;
pub mod transcript;
pub mod verbs;
pub mod wire;

use std::path::{Path, PathBuf};

use crate::common;
use crate::common::process::Daemon;
use wire::Wire;

/// Whose daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// `heliostat serve --control`.
    Ours,
    /// `qemu-storage-daemon`.
    Qemu,
}

/// A daemon with a control socket, in a folder of its own.
pub struct Peer {
    whose: Whose,
    daemon: Option<Daemon>,
    folder: tempfile::TempDir,
}

impl Peer {
    /// Starts ours.
    pub fn ours() -> Self {
        let folder = common::folder();
        let socket = folder.path().join("control");
        let mut daemon = common::start_heliostat([Path::new("serve"), Path::new("--control"), &socket]);
        daemon.listens(&socket).expect("it listens");
        Self { whose: Whose::Ours, daemon: Some(daemon), folder }
    }

    /// Starts QEMU's. `None`, having said so, where it is not installed.
    pub fn qemu() -> Option<Self> {
        let program = common::tool("qemu-storage-daemon")?;
        let folder = common::folder();
        let (daemon, _) = Daemon::start_qemu(&program, folder.path()).expect("it starts and listens");
        Some(Self { whose: Whose::Qemu, daemon: Some(daemon), folder })
    }

    /// Whose it is.
    pub fn whose(&self) -> Whose {
        self.whose
    }

    /// Its folder, in which images go.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// A new connection to it, before the greeting.
    pub fn connect(&self) -> Wire {
        Wire::connect(&self.socket())
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.daemon.as_ref().expect("taken by nobody yet").id()
    }

    /// The process.
    pub fn process(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("taken by nobody yet")
    }

    /// Waits until it ends by itself; says whether it was content.
    pub fn ends_well(mut self) -> bool {
        let daemon = self.daemon.take().expect("taken by nobody yet");
        daemon.wait().expect("it ends").success()
    }

    /// Waits until it ends by itself, content, and looks at what it has left.
    pub fn ends_well_but(mut self, look: impl FnOnce(&Path)) {
        let daemon = self.daemon.take().expect("taken by nobody yet");
        assert!(daemon.wait().expect("it ends").success());
        look(self.folder.path());
    }

    /// Makes an image full of data in its folder: then both daemons have the same to copy, as QEMU counts holes.
    pub fn image(&self, name: &str, size: usize) -> PathBuf {
        let path = self.folder.path().join(name);
        let bytes: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).expect("less than 251") + 1).collect();
        std::fs::write(&path, bytes).expect("the folder is writable");
        path
    }
}
