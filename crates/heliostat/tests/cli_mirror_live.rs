//! `heliostat mirror --nbd`: clients use the disk while it is mirrored, move over with it, and are never cut off
//! by a mirror that fails.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use serde_json::Value;

use common::{HELIOSTAT, folder, tool, wait};

const SIZE: u64 = 64 << 20;

/// A mirror whose result can be waited for while it serves on.
struct Live {
    child: Child,
    results: serde_json::StreamDeserializer<'static, serde_json::de::IoRead<BufReader<ChildStdout>>, Value>,
    uri: String,
}

impl Live {
    fn start(folder: &Path, flags: &[&str]) -> Self {
        Self::start_in(folder, folder, &mut Command::new(HELIOSTAT), flags)
    }

    /// Mirrors `source` of a folder to `target` of another, with `command` before the arguments.
    fn start_in(folder: &Path, target: &Path, command: &mut Command, flags: &[&str]) -> Self {
        let socket = folder.join("nbd");
        command.arg("mirror").args([folder.join("source"), target.join("target")]).arg("--nbd").arg(&socket);
        command.args(flags).args(["--json", "--quiet"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let results = serde_json::Deserializer::from_reader(stdout).into_iter();
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let mut live = Self { child, results, uri };
        let listens = wait::until("it to listen", wait::LIMIT, || {
            let ended = live.child.try_wait().unwrap();
            let connected = std::os::unix::net::UnixStream::connect(&socket).is_ok();
            (connected || ended.is_some()).then_some(connected)
        });
        assert!(listens.unwrap(), "it ended: {}", live.said());
        live
    }

    fn said(&mut self) -> String {
        let mut said = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    /// Waits until the job has ended.
    fn result(&mut self) -> Value {
        self.results.next().expect("a result before the end").unwrap()
    }

    fn end(&mut self, signal: &str) -> (ExitStatus, String) {
        let kill = Command::new("sh").args(["-c", &format!("kill -{signal} {}", self.child.id())]).status();
        assert!(kill.unwrap().success());
        let status = wait::until("the end", wait::LIMIT, || self.child.try_wait().unwrap()).unwrap();
        (status, self.said())
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn source(folder: &Path, data: u64) -> PathBuf {
    let path = folder.join("source");
    let file = File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let piece: Vec<u8> = (0..1_u32 << 20).map(|n| u8::try_from(n % 249).unwrap()).collect();
    (0..data >> 20).for_each(|place| file.write_all_at(&piece, place << 20).unwrap());
    path
}

fn qemu_io(program: &Path, uri: &str, commands: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(["-f", "raw"]);
    commands.iter().for_each(|text| {
        command.args(["-c", text]);
    });
    let output = command.arg(uri).output().unwrap();
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
}

fn bytes_at(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn clients_move_to_the_target_with_what_they_wrote() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let source = source(folder.path(), 8 << 20);
    let target = folder.path().join("target");
    let mut live = Live::start(folder.path(), &["--speed", "8M"]);
    assert!(qemu_io(&program, &live.uri, &["write -P 1 40M 64k", "flush"]), "while it is copied");
    let result = live.result();
    assert_eq!(result["ended"], "completed");
    assert!(result["pause-us"].as_u64().is_some());
    assert!(qemu_io(&program, &live.uri, &["read -P 1 40M 64k", "write -P 2 50M 64k", "flush"]), "after it");
    let (status, said) = live.end("TERM");
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("clients are on") && said.contains("target"), "{said}");
    assert_eq!(bytes_at(&source, 40 << 20, 65536), vec![1; 65536]);
    assert_eq!(bytes_at(&target, 40 << 20, 65536), vec![1; 65536]);
    assert_eq!(bytes_at(&source, 50 << 20, 65536), vec![0; 65536], "the source stays as it was");
    assert_eq!(bytes_at(&target, 50 << 20, 65536), vec![2; 65536]);
    assert_eq!(bytes_at(&source, 0, 8 << 20), bytes_at(&target, 0, 8 << 20));
}

#[test]
fn fio_verifies_what_it_wrote_before_while_and_after_the_disk_moves() {
    let Some(fio) = tool("fio") else { return };
    for copy_mode in ["background", "write-blocking"] {
        let folder = folder();
        source(folder.path(), 16 << 20);
        let mut live =
            Live::start(folder.path(), &["--speed", "24M", "--granularity", "4K", "--copy-mode", copy_mode]);
        let job = |command: &mut Command| {
            command.args(["--name=w", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=32M"]);
            command.args(["--verify=crc32c", "--randseed=7", "--output-format=terse"]);
            command.current_dir(folder.path()).stdout(Stdio::null());
        };
        let mut over_nbd = Command::new(&fio);
        job(&mut over_nbd);
        over_nbd.args(["--ioengine=nbd", "--rate_iops=2000", "--uri"]).arg(&live.uri);
        let mut guest = over_nbd.spawn().unwrap();
        assert_eq!(live.result()["ended"], "completed", "{copy_mode}");
        assert!(guest.try_wait().unwrap().is_none(), "the guest has work left when the disk has moved");
        assert!(guest.wait().unwrap().success(), "{copy_mode}");
        assert_eq!(live.end("TERM").0.code(), Some(0));
        // Once more, from the file itself.
        let mut on_file = Command::new(&fio);
        job(&mut on_file);
        on_file.args(["--ioengine=psync", "--verify_only", "--filename"]).arg(folder.path().join("target"));
        assert!(on_file.status().unwrap().success(), "{copy_mode}");
    }
}

#[test]
fn a_copy_is_left_behind_and_clients_stay_when_asked() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let source = source(folder.path(), 4 << 20);
    let target = folder.path().join("target");
    let mut live = Live::start(folder.path(), &["--on-ready", "cancel"]);
    assert_eq!(live.result()["ended"], "copied");
    assert!(qemu_io(&program, &live.uri, &["write -P 3 30M 64k", "flush"]));
    let (status, said) = live.end("INT");
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("clients stay on"), "{said}");
    assert_eq!(bytes_at(&source, 30 << 20, 65536), vec![3; 65536]);
    assert_eq!(bytes_at(&target, 30 << 20, 65536), vec![0; 65536]);
    assert_eq!(bytes_at(&source, 0, 4 << 20), bytes_at(&target, 0, 4 << 20));
}

#[test]
fn a_target_that_is_kept_in_step_is_a_consistent_copy_after_ctrl_c() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let source = source(folder.path(), 4 << 20);
    let target = folder.path().join("target");
    let mut live = Live::start(folder.path(), &["--on-ready", "wait", "--sync", "full"]);
    for offset in ["20M", "30M"] {
        assert!(qemu_io(&program, &live.uri, &[&format!("write -P 4 {offset} 64k")]));
    }
    wait::until("the target to be in step", wait::LIMIT, || {
        (bytes_at(&target, 30 << 20, 65536) == vec![4; 65536]).then_some(())
    })
    .unwrap();
    let (status, said) = live.end("INT");
    assert_eq!(status.code(), Some(0), "{said}");
    assert_eq!(live.result()["ended"], "copied");
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap());
}

#[test]
fn it_ends_with_the_mirror_when_asked() {
    let folder = folder();
    source(folder.path(), 4 << 20);
    let mut live = Live::start(folder.path(), &["--exit", "--speed", "16M"]);
    assert_eq!(live.result()["ended"], "completed");
    let status = wait::until("the end", wait::LIMIT, || live.child.try_wait().unwrap()).unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(!folder.path().join("nbd").exists());
}

#[test]
fn a_target_without_space_costs_clients_nothing() {
    let (Some(program), Some(unshare)) = (tool("qemu-io"), tool("unshare")) else { return };
    let folder = folder();
    let source = source(folder.path(), 8 << 20);
    let small = folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let script = "mount -t tmpfs -o size=2m none \"$0\" || exit 99; exec \"$@\"";
    let mut probe = Command::new(&unshare);
    probe.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(&small).arg("true");
    if !probe.output().unwrap().status.success() {
        return common::skip("this machine gives no mount of our own");
    }
    let mut command = Command::new(unshare);
    command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(&small).arg(HELIOSTAT);
    let mut live = Live::start_in(folder.path(), &small, &mut command, &[]);
    let result = live.result();
    assert_eq!(result["ended"], "failed");
    assert!(result["error"].as_str().unwrap().contains("no space"), "{result}");
    assert!(qemu_io(&program, &live.uri, &["write -P 5 60M 64k", "flush", "read -P 5 60M 64k"]));
    let (status, said) = live.end("TERM");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("clients stay on") && said.contains("is removed"), "{said}");
    assert_eq!(bytes_at(&source, 60 << 20, 65536), vec![5; 65536]);
}

#[test]
fn an_interrupted_mirror_lets_clients_finish_and_removes_its_target() {
    let Some(program) = tool("qemu-io") else { return };
    let folder = folder();
    let source = source(folder.path(), 16 << 20);
    let mut live = Live::start(folder.path(), &["--speed", "64K"]);
    assert!(qemu_io(&program, &live.uri, &["write -P 6 60M 64k"]));
    let (status, said) = live.end("INT");
    assert_eq!(status.code(), Some(130), "{said}");
    assert_eq!(live.result()["ended"], "cancelled");
    assert!(!folder.path().join("target").exists());
    assert_eq!(bytes_at(&source, 60 << 20, 65536), vec![6; 65536]);
}

#[test]
fn clients_move_to_a_target_that_stands_on_what_they_leave() {
    let (Some(program), Some(_)) = (tool("qemu-io"), tool("qemu-img")) else { return };
    let folder = folder();
    let source = source(folder.path(), 8 << 20);
    let before = bytes_at(&source, 1 << 20, 65536);
    let mut live = Live::start(folder.path(), &["--sync", "none", "--target-format", "qcow2"]);
    assert_eq!(live.result()["ended"], "completed");
    assert!(qemu_io(&program, &live.uri, &["write -P 5 1M 4k", "read -P 5 1M 4k", "flush"]));
    let (status, said) = live.end("TERM");
    assert_eq!(status.code(), Some(0), "{said}");
    assert_eq!(bytes_at(&source, 1 << 20, 65536), before, "nobody writes to the source any more");
    let info = common::qcow2::qemu_img(folder.path(), &["info", "--output=json", "target"]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["backing-filename"], source.canonicalize().unwrap().to_str().unwrap());
    common::qcow2::qemu_io(folder.path(), "target", &["read -P 5 1M 4k"]);
    let raw = folder.path().join("flat");
    common::qcow2::qemu_img(folder.path(), &["convert", "-O", "raw", "target", "flat"]);
    assert_eq!(bytes_at(&raw, (1 << 20) + 4096, 65536 - 4096), before[4096..]);
}
