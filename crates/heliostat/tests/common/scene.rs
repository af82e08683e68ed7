//! [`Scene`]: a daemon of ours with a control client and a chain of images, for tests of what mirrors do with bytes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::process::Daemon;
use super::qcow2::{qemu_img, qemu_io};
use super::qmp::Qmp;
use super::{folder, start_heliostat, tool, wait};

/// A daemon of ours in a folder of its own, a control client, and images.
pub struct Scene {
    /// Where the images are.
    pub folder: tempfile::TempDir,
    /// The client.
    pub qmp: Qmp,
    daemon: Daemon,
}

impl Scene {
    /// Starts the daemon. `None`, having said so, where there is no `qemu-img`.
    pub fn new() -> Option<Self> {
        tool("qemu-img")?;
        let folder = folder();
        let socket = folder.path().join("control");
        let mut daemon = start_heliostat([Path::new("serve"), Path::new("--control"), &socket]);
        daemon.listens(&socket).unwrap();
        Some(Self { qmp: Qmp::connect(&socket).unwrap(), folder, daemon })
    }

    /// The folder.
    pub fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Runs `qemu-img`.
    pub fn img(&self, arguments: &[&str]) -> String {
        qemu_img(self.folder.path(), arguments)
    }

    /// Runs `qemu-io` on an image.
    pub fn io(&self, image: &str, steps: &[&str]) {
        qemu_io(self.folder.path(), image, steps);
    }

    /// A chain of three: raw, qcow2, qcow2, with data, zeroes and holes in each.
    pub fn chain(&self) {
        self.img(&["create", "-q", "-f", "qcow2", "base.qcow2", "16M"]);
        self.io("base.qcow2", &["write -P 1 0 8M", "write -P 2 12M 1M"]);
        self.img(&["convert", "-O", "raw", "base.qcow2", "base.raw"]);
        self.img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
        self.io("mid.qcow2", &["write -P 3 1M 2M", "write -z 4M 1M", "write -P 4 14M 64k"]);
        self.img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
        self.io("top.qcow2", &["write -P 5 2M 1M", "write -z 6M 1M", "write -z 1M 64k", "write -P 6 15M 4k"]);
    }

    /// Carries out a command, which must succeed. `DIR` in its arguments is the folder.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let arguments = arguments.to_string().replace("DIR", self.folder.path().to_str().unwrap());
        self.qmp.execute(command, serde_json::from_str(&arguments).unwrap()).unwrap()
    }

    /// Opens an image as the node `node`.
    pub fn add(&mut self, node: &str, image: &str, more: Value) {
        let driver = if image.ends_with(".raw") { "raw" } else { "qcow2" };
        let mut spec = json!({
            "driver": driver, "node-name": node, "file": { "driver": "file", "filename": format!("DIR/{image}") },
        });
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        self.execute("blockdev-add", spec);
    }

    /// Mirrors `s` to `t`, all of it unless `more` says otherwise.
    pub fn mirror(&mut self, more: Value) {
        let mut spec = json!({ "job-id": "j", "device": "s", "target": "t", "sync": "full" });
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        self.execute("blockdev-mirror", spec);
    }

    /// Waits until the job is ready, and lets it complete.
    pub fn complete(&mut self) {
        self.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
        self.execute("block-job-complete", json!({ "device": "j" }));
        let event = self.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
        assert!(event["data"].get("error").is_none(), "{event}");
    }

    /// Ends the daemon in order; what it leaves is judged then.
    pub fn end(self) -> tempfile::TempDir {
        assert!(self.daemon.stop().unwrap().success());
        self.folder
    }

    /// Offers `node` to guests. Says where.
    pub fn export(&mut self, node: &str) -> String {
        let path = self.path().join("nbd");
        let address = json!({ "addr": { "type": "unix", "data": { "path": path } } });
        self.execute("nbd-server-start", address);
        let export = json!({ "type": "nbd", "id": "e", "node-name": node, "name": "d", "writable": true });
        self.execute("block-export-add", export);
        format!("nbd+unix:///d?socket={}", path.display())
    }

    /// Is a guest of the export at `uri`, through `qemu-io`.
    pub fn guest(&self, uri: &str, steps: &[&str]) {
        let mut command = std::process::Command::new(tool("qemu-io").unwrap());
        command.args(["-f", "raw", uri]);
        for step in steps {
            command.args(["-c", step]);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{steps:?}: {output:?}");
    }
}

impl Scene {
    /// Lets the job complete, which is ready.
    pub fn complete_now(&mut self) {
        self.execute("block-job-complete", json!({ "device": "j" }));
        let event = self.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
        assert!(event["data"].get("error").is_none(), "{event}");
    }
}
