//! `heliostat job`: jobs of a running daemon, ours or QEMU's, seen and steered over the control socket.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use common::process::Daemon;
use common::qmp::Qmp;
use common::{HELIOSTAT, folder, heliostat, start_heliostat, tool, wait};

const SIZE: u64 = 16 << 20;

/// A daemon with a few disks, all of them data.
struct Bench {
    folder: tempfile::TempDir,
    daemon: Daemon,
    socket: PathBuf,
    qmp: Qmp,
}

impl Bench {
    fn ours() -> Self {
        let folder = folder();
        let socket = folder.path().join("control");
        let mut daemon = start_heliostat(["serve".as_ref(), "--control".as_ref(), socket.as_os_str()]);
        daemon.listens(&socket).unwrap();
        Self::of(folder, daemon, socket)
    }

    fn of(folder: tempfile::TempDir, daemon: Daemon, socket: PathBuf) -> Self {
        let mut qmp = Qmp::connect(&socket).unwrap();
        for name in ["a", "b", "c", "d"] {
            let path = folder.path().join(name);
            File::create(&path).unwrap().write_all_at(&vec![7; usize::try_from(SIZE).unwrap()], 0).unwrap();
            let node = json!({ "driver": "file", "filename": path, "node-name": name });
            qmp.execute("blockdev-add", node).unwrap();
        }
        Self { folder, daemon, socket, qmp }
    }

    fn mirror(&mut self, id: &str, source: &str, target: &str, speed: u64, more: &Value) {
        let mut arguments = json!({
            "job-id": id, "device": source, "target": target, "sync": "full", "speed": speed,
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            arguments[name] = value.clone();
        }
        self.qmp.execute("blockdev-mirror", arguments).unwrap();
    }

    fn job(&self, arguments: &[&str]) -> Output {
        job(&self.socket, arguments)
    }

    fn shown(&self, id: &str) -> Value {
        let output = self.job(&["show", id, "--json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
    }
}

fn job(socket: &Path, arguments: &[&str]) -> Output {
    let control = ["--control".as_ref(), socket.as_os_str()];
    heliostat(["job".as_ref()].into_iter().chain(arguments.iter().map(AsRef::as_ref)).chain(control))
}

fn done(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

fn refused(output: &Output, why: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("heliostat: ") && said.contains(why), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_job_is_listed_paused_resumed_and_brought_to_its_end() {
    let mut bench = Bench::ours();
    bench.mirror("move", "a", "b", 64 << 10, &json!({}));
    let list = String::from_utf8(bench.job(&["list"]).stdout).unwrap();
    assert!(list.starts_with("JOB") && list.contains("move") && list.contains("running"), "{list}");
    let all: Value = serde_json::from_slice(&bench.job(&["list", "--json"]).stdout).unwrap();
    assert_eq!(all[0]["device"], "move");

    done(&bench.job(&["pause", "move"]));
    wait::until("the job to pause", wait::LIMIT, || {
        (bench.shown("move")["status"] == "paused").then_some(())
    })
    .unwrap();
    refused(&bench.job(&["pause"]), "already paused");
    done(&bench.job(&["resume"]));
    refused(&bench.job(&["complete"]), "cannot accept command verb 'complete'");
    done(&bench.job(&["set-speed", "move", "1G"]));
    assert_eq!(bench.shown("move")["speed"], 1 << 30);
    done(&bench.job(&["set-speed", "0"]));
    done(&bench.job(&["watch", "--until-ready"]));
    assert_eq!(bench.shown("move")["ready"], true);
    done(&bench.job(&["complete", "--json"]));
    bench.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    assert_eq!(String::from_utf8(bench.job(&["list", "--json"]).stdout).unwrap().trim(), "[]");
    refused(&bench.job(&["pause"]), "there is no job");
    let (a, b) = (bench.folder.path().join("a"), bench.folder.path().join("b"));
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
    assert!(bench.daemon.stop().unwrap().success());
}

#[test]
fn watching_ends_with_the_job_and_says_how_it_ended() {
    let mut bench = Bench::ours();
    for (end, word, status) in [
        (json!({ "command": "block-job-complete" }), "completed", 0),
        (json!({ "command": "block-job-cancel" }), "completed", 0),
        (json!({ "command": "block-job-cancel", "force": true }), "cancelled", 1),
    ] {
        bench.mirror("j", "a", "b", 0, &json!({}));
        bench.qmp.wait_event("BLOCK_JOB_READY", wait::LIMIT).unwrap();
        let mut watching = Command::new(HELIOSTAT);
        watching.args(["job", "watch", "--json", "--control"]).arg(&bench.socket);
        let mut watching = watching.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(watching.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("j: 100 %"), "it has seen the job: {line}");
        let mut arguments = json!({ "device": "j" });
        if let Some(force) = end.get("force") {
            arguments["force"] = force.clone();
        }
        bench.qmp.execute(end["command"].as_str().unwrap(), arguments).unwrap();
        let output = watching.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        let ended: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(ended["ended"], word);
    }
}

#[test]
fn a_job_that_waits_is_finalized_and_dismissed() {
    let mut bench = Bench::ours();
    bench.mirror("j", "a", "b", 0, &json!({ "auto-finalize": false, "auto-dismiss": false }));
    done(&bench.job(&["watch", "--until-ready", "--quiet"]));
    done(&bench.job(&["complete"]));
    bench.qmp.wait_event("BLOCK_JOB_PENDING", wait::LIMIT).unwrap();
    assert_eq!(bench.shown("j")["status"], "pending");
    done(&bench.job(&["finalize"]));
    bench.qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    wait::until("the job to conclude", wait::LIMIT, || {
        (bench.shown("j")["status"] == "concluded").then_some(())
    })
    .unwrap();
    let output = bench.job(&["watch", "--json"]);
    let ended: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &ended["ended"]), (Some(0), &json!("completed")));
    done(&bench.job(&["dismiss"]));
    refused(&bench.job(&["show"]), "there is no job");
}

#[test]
fn a_name_is_needed_where_there_are_several() {
    let mut bench = Bench::ours();
    bench.mirror("one", "a", "b", 64 << 10, &json!({}));
    bench.mirror("two", "c", "d", 64 << 10, &json!({}));
    refused(&bench.job(&["pause"]), "which job? there is two, one");
    refused(&bench.job(&["pause", "three"]), "three");
    refused(&bench.job(&["show", "three"]), "there is no job three; there is two, one");
    done(&bench.job(&["cancel", "one"]));
    bench.qmp.wait_event("BLOCK_JOB_CANCELLED", wait::LIMIT).unwrap();
    done(&bench.job(&["pause"]));
    done(&bench.job(&["cancel", "--force"]));
}

#[test]
fn what_is_no_daemon_is_told_apart() {
    let folder = folder();
    let missing = folder.path().join("missing");
    refused(&job(&missing, &["list"]), "there is no such socket");
    let stale = folder.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    refused(&job(&stale, &["list"]), "nobody listens");
    let silent = folder.path().join("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    let hangs_up = std::thread::spawn(move || drop(listener.accept()));
    refused(&job(&silent, &["list"]), "is it a control socket?");
    hangs_up.join().unwrap();
    let output = heliostat(["job", "list"]);
    refused(&output, "--control");
}

#[test]
fn an_nbd_socket_is_no_control_socket() {
    let folder = folder();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("nbd"));
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let arguments = ["serve".as_ref(), disk.as_os_str(), "--nbd".as_ref(), socket.as_os_str()];
    let mut daemon = start_heliostat(arguments);
    daemon.listens(&socket).unwrap();
    let output = job(&socket, &["list"]);
    refused(&output, "control socket");
    daemon.stop().unwrap();
}

#[test]
fn a_mirror_of_the_command_line_is_steered_too() {
    let folder = folder();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    File::create(&source).unwrap().write_all_at(&[1; 1 << 20], 0).unwrap();
    let control = folder.path().join("control");
    let mut command = Command::new(HELIOSTAT);
    command.arg("mirror").args([&source, &target]).args(["--on-ready", "wait", "--json", "--control"]);
    let mut child = command.arg(&control).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    wait::for_socket(&control).unwrap();
    done(&job(&control, &["watch", "--until-ready", "--quiet"]));
    assert!(child.try_wait().unwrap().is_none());
    done(&job(&control, &["complete"]));
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["ended"], "completed");
    assert!(!control.exists());
}

#[test]
fn quit_ends_the_daemon_in_order() {
    let mut bench = Bench::ours();
    bench.mirror("j", "a", "b", 64 << 10, &json!({}));
    bench.qmp.execute("quit", json!({})).unwrap();
    bench.qmp.wait_event("BLOCK_JOB_CANCELLED", wait::LIMIT).unwrap();
    assert!(bench.daemon.wait().unwrap().success());
    assert!(!bench.socket.exists());
}

#[test]
fn a_daemon_of_qemu_is_steered_as_well() {
    let Some(program) = tool("qemu-storage-daemon") else { return };
    let folder = folder();
    let (daemon, socket) = Daemon::start_qemu(&program, folder.path()).unwrap();
    let mut bench = Bench::of(folder, daemon, socket.clone());
    bench.mirror("j", "a", "b", 0, &json!({}));
    // It takes one client at a time.
    drop(bench.qmp);
    let job = |arguments: &[&str]| job(&socket, arguments);
    done(&job(&["watch", "--until-ready", "--quiet"]));
    assert!(String::from_utf8(job(&["list"]).stdout).unwrap().contains("ready"));
    done(&job(&["complete"]));
}

#[test]
fn fio_verifies_its_writes_while_a_mirror_starts_runs_and_completes() {
    let Some(fio) = tool("fio") else { return };
    let folder = folder();
    let [source, target, nbd, control] =
        ["source", "target", "nbd", "control"].map(|name| folder.path().join(name));
    for path in [&source, &target] {
        File::create(path).unwrap().set_len(64 << 20).unwrap();
    }
    let mut serve = Command::new(HELIOSTAT);
    serve.arg("serve").arg(&source).arg("--nbd").arg(&nbd).arg("--control").arg(&control);
    let daemon = Daemon::start(&mut serve).unwrap();
    let mut qmp = Qmp::connect(&control).unwrap();
    qmp.execute("blockdev-add", json!({ "driver": "file", "filename": target, "node-name": "target" }))
        .unwrap();

    let work = |engine: &[&str]| {
        let mut command = Command::new(&fio);
        command.args(["--name=w", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=16M"]);
        command.args(["--verify=crc32c", "--randseed=3", "--output-format=terse"]).args(engine);
        command.current_dir(folder.path()).stdout(Stdio::null());
        command
    };
    let uri = format!("--uri=nbd+unix:///disk?socket={}", nbd.display());
    let mut guest = work(&["--ioengine=nbd", "--rate_iops=1500", &uri]).spawn().unwrap();
    wait::until("the guest's first writes", wait::LIMIT, || {
        std::fs::metadata(&source)
            .is_ok_and(|it| std::os::unix::fs::MetadataExt::blocks(&it) > 0)
            .then_some(())
    })
    .unwrap();
    let mirror = json!({
        "job-id": "j", "device": "disk", "target": "target", "sync": "full", "granularity": 4096,
    });
    qmp.execute("blockdev-mirror", mirror).unwrap();
    done(&job(&control, &["watch", "--until-ready", "--quiet"]));
    done(&job(&control, &["complete"]));
    qmp.wait_event("BLOCK_JOB_COMPLETED", wait::LIMIT).unwrap();
    assert!(guest.try_wait().unwrap().is_none(), "the guest has work left when the disk has moved");
    assert!(guest.wait().unwrap().success());
    assert!(daemon.stop().unwrap().success());
    let target = format!("--filename={}", target.display());
    assert!(work(&["--ioengine=psync", "--verify_only", &target]).status().unwrap().success());
}
