//! [`Stage`]: a daemon of ours that mirrors the disk of a guest to an NBD server that can be stopped, killed and
//! started again; and the guest, which notes how long its longest request took.
//!
//! For tests that say `mod common;` and `mod nbd;` beside it.

#![allow(dead_code, reason = "each test file uses only its part of this")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use heliostat_block::nbd::ReplyStyle;
use serde_json::{Value, json};

use crate::common::process::Daemon;
use crate::common::qmp::Qmp;
use crate::common::{self, wait};
use crate::nbd::Guest;

/// Bytes of the disk.
pub const SIZE: usize = 8 << 20;

/// Longer than any request takes that waits for nobody, on a machine that is busy with other tests.
pub const PROMPT: Duration = Duration::from_secs(1);

/// The pause between two requests of a guest.
const PACE: Duration = Duration::from_millis(2);

/// How the mirror deals with guests' writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Background,
    WriteBlocking,
}

/// The daemon, its disk, and the server of the target.
pub struct Stage {
    pub qmp: Qmp,
    daemon: Daemon,
    target: Option<Daemon>,
    folder: tempfile::TempDir,
}

/// A guest that writes until it is told to stop.
pub struct Writer {
    stop: mpsc::Sender<()>,
    work: JoinHandle<Duration>,
}

impl Stage {
    /// A full disk, exported, and a daemon. `None`, having said so, without nbdkit.
    pub fn new() -> Option<Self> {
        common::tool("nbdkit")?;
        let folder = common::folder();
        let path = |name: &str| folder.path().join(name);
        let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap() + 1).collect();
        std::fs::write(path("source"), bytes).unwrap();
        std::fs::File::create(path("copy")).unwrap().set_len(SIZE.try_into().unwrap()).unwrap();
        let control = path("control");
        let mut daemon = common::start_heliostat([Path::new("serve"), Path::new("--control"), &control]);
        daemon.listens(&control).unwrap();
        let mut qmp = Qmp::connect(&control).unwrap();
        let mut execute = |command: &str, arguments: Value| qmp.execute(command, arguments).unwrap();
        execute("blockdev-add", json!({ "driver": "file", "node-name": "disk", "filename": path("source") }));
        let address = json!({ "type": "unix", "data": { "path": path("guests") } });
        execute("nbd-server-start", json!({ "addr": address }));
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk", "writable": true });
        execute("block-export-add", export);
        Some(Self { qmp, daemon, target: None, folder })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the server of the target: `nbdkit` with these arguments, a path `DIR/…` in the folder.
    pub fn start_target(&mut self, arguments: &[&str]) {
        let socket = self.path("target");
        let _ = std::fs::remove_file(&socket);
        let folder = self.folder.path().display().to_string();
        let mut command = Command::new("nbdkit");
        command.arg("--foreground").stderr(Stdio::null()).arg("--unix").arg(&socket);
        command.args(arguments.iter().map(|argument| argument.replace("DIR", &folder)));
        let mut target = Daemon::start(&mut command).unwrap();
        target.listens(&socket).unwrap();
        self.target = Some(target);
    }

    /// Starts one with the copy in a file by another command, which is told where that is.
    pub fn start_elsewhere(&mut self, mut command: Command) {
        command.args(["--foreground", "file"]).arg(self.path("copy")).stderr(Stdio::null());
        self.target = Some(Daemon::start(&mut command).unwrap());
    }

    /// Starts one with the copy in a file.
    pub fn start_file_target(&mut self) {
        self.start_target(&["file", "DIR/copy"]);
    }

    pub fn signal_target(&self, name: &str) {
        self.target.as_ref().unwrap().signal(name).unwrap();
    }

    pub fn kill_target(&mut self) {
        self.target.take().unwrap().kill().unwrap();
    }

    /// Adds the node of the target.
    pub fn add_target(&mut self, reconnect_delay: u32) {
        let server = json!({ "type": "unix", "path": self.path("target") });
        self.add_target_at(server, reconnect_delay, &json!({}));
    }

    /// The same of a server elsewhere, with some options more.
    pub fn add_target_at(&mut self, server: Value, reconnect_delay: u32, more: &Value) {
        let mut node = json!({
            "driver": "nbd", "node-name": "target", "reconnect-delay": reconnect_delay, "discard": "unmap",
            "open-timeout": 30,
        });
        node["server"] = server;
        for (key, value) in more.as_object().into_iter().flatten() {
            node[key] = value.clone();
        }
        self.execute("blockdev-add", node);
    }

    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).unwrap()
    }

    /// Starts the mirror `job`, with some arguments more.
    pub fn mirror(&mut self, mode: Mode, more: &Value) {
        let copy_mode = if mode == Mode::Background { "background" } else { "write-blocking" };
        let mut arguments = json!({
            "job-id": "job", "device": "disk", "target": "target", "sync": "full", "copy-mode": copy_mode,
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        self.execute("blockdev-mirror", arguments);
    }

    pub fn ready(&mut self) {
        self.event("BLOCK_JOB_READY");
    }

    pub fn event(&mut self, name: &str) -> Value {
        self.qmp.wait_event(name, wait::LIMIT).unwrap()
    }

    /// Waits until the job says that it is degraded, or no more; answers the reason.
    pub fn degraded(&mut self, wanted: bool) -> String {
        let event = self.event("BLOCK_JOB_DEGRADED");
        assert_eq!(event["data"]["degraded"], wanted, "{event}");
        event["data"]["reason"].as_str().unwrap_or_default().to_owned()
    }

    pub fn job(&mut self) -> Value {
        self.execute("query-block-jobs", json!({}))[0].take()
    }

    /// How the connection to the target is.
    pub fn link(&mut self) -> Value {
        let nodes = self.execute("query-named-block-nodes", json!({ "flat": true }));
        let mut nodes = nodes.as_array().unwrap().iter();
        nodes.find(|node| node["node-name"] == "target").unwrap()["nbd"].clone()
    }

    /// A guest that writes all over the disk from now on.
    pub fn guest(&self) -> Writer {
        let stream = UnixStream::connect(self.path("guests")).unwrap();
        stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
        let mut guest = Guest::new(stream, "disk", ReplyStyle::Structured).unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let work = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            for turn in 0_usize.. {
                let offset = turn * 7919 % (SIZE / 4096) * 4096;
                let before = Instant::now();
                guest.write(offset.try_into().unwrap(), &[u8::try_from(turn % 255).unwrap() + 1; 4096]);
                longest = longest.max(before.elapsed());
                if stopped.recv_timeout(PACE) != Err(mpsc::RecvTimeoutError::Timeout) {
                    break;
                }
            }
            longest
        });
        Writer { stop, work }
    }

    /// Ends the job with a consistent copy, and everything; the copy must equal the source.
    pub fn ends_with_a_copy(mut self) {
        self.execute("block-job-cancel", json!({ "device": "job" }));
        let ended = self.event("BLOCK_JOB_COMPLETED");
        assert_eq!(ended["data"].get("error"), None, "{ended}");
        self.quit();
        let [source, copy] = ["source", "copy"].map(|name| std::fs::read(self.path(name)).unwrap());
        assert!(source == copy, "the copy is not the source");
    }

    /// Ends the daemon, which must take no longer than a person waits.
    pub fn quit(&mut self) {
        let before = Instant::now();
        self.execute("quit", json!({}));
        wait::until("the daemon's end", wait::LIMIT, || match self.daemon.is_running() {
            Ok(false) => Some(()),
            _ => None,
        })
        .unwrap();
        assert!(before.elapsed() < Duration::from_secs(10), "{:?}", before.elapsed());
    }
}

impl Writer {
    /// Ends it. Answers how long its longest request took.
    pub fn stop(self) -> Duration {
        drop(self.stop);
        self.work.join().unwrap()
    }
}
