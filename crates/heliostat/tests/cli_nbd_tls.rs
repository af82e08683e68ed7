//! `nbds` addresses where a verb takes a disk, before servers of others: `nbdkit` and `qemu-nbd`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::certificates::Authority;
use common::process::Daemon;
use common::{folder, heliostat, start_heliostat, tool};

const SIZE: usize = 1 << 20;

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

/// `nbdkit`, with the file `name` of the folder behind TLS only. Answers its socket, too.
fn nbdkit(folder: &Path, name: &str, certificates: &Path) -> Option<(Daemon, PathBuf)> {
    let nbdkit = tool("nbdkit")?;
    let socket = folder.join(format!("{name}.sock"));
    let mut command = Command::new(nbdkit);
    command.args(["--foreground", "--tls=require", "--tls-verify-peer", "--exportname", "disk"]);
    command.arg(format!("--tls-certificates={}", certificates.display())).stderr(Stdio::null());
    command.arg("--unix").arg(&socket).arg("file").arg(folder.join(name));
    let mut server = Daemon::start(&mut command).unwrap();
    server.listens(&socket).unwrap();
    Some((server, socket))
}

/// `qemu-nbd`, likewise.
fn qemu_nbd(folder: &Path, name: &str, certificates: &Path) -> Option<(Daemon, PathBuf)> {
    let qemu_nbd = tool("qemu-nbd")?;
    let socket = folder.join(format!("{name}.sock"));
    let mut command = Command::new(qemu_nbd);
    command.args(["--persistent", "--format", "raw", "--shared", "8", "--export-name", "disk"]);
    let object = "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir";
    command.arg("--object").arg(format!("{object}={}", certificates.display())).args(["--tls-creds", "t"]);
    command.arg("--socket").arg(&socket).arg(folder.join(name));
    let mut server = Daemon::start(&mut command).unwrap();
    server.listens(&socket).unwrap();
    Some((server, socket))
}

fn private(socket: &Path) -> String {
    format!("nbds+unix:///disk?socket={}", socket.display())
}

#[test]
fn a_disk_is_mirrored_privately_from_one_server_to_another_and_looked_at_there() {
    let authority = Authority::new("ca");
    let (certificates, client) = (authority.server(), authority.client("friend"));
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect();
    std::fs::write(path("source"), &bytes).unwrap();
    std::fs::write(path("copy"), vec![0; SIZE]).unwrap();
    let Some((_source, source)) = nbdkit(folder.path(), "source", &certificates) else { return };
    let Some((_copy, copy)) = qemu_nbd(folder.path(), "copy", &certificates) else { return };
    let (source, copy) = (private(&source), private(&copy));
    let run = |arguments: &[&str]| {
        let certificates = format!("--tls-certificates={}", client.display());
        let output = heliostat(arguments.iter().copied().chain([certificates.as_str()]));
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        said(&output)
    };
    run(&["mirror", "-q", &source, &copy]);
    assert!(std::fs::read(path("copy")).unwrap() == bytes);
    assert!(run(&["compare", &source, &copy]).contains("identical"));
    assert!(run(&["info", &copy]).contains("export of an NBD server"));
    run(&["map", &source]);
}

#[test]
fn a_private_export_is_served_on_to_clients() {
    let Some(qemu_io) = tool("qemu-io") else { return };
    let authority = Authority::new("ca");
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("disk"), vec![0; SIZE]).unwrap();
    let Some((_server, socket)) = nbdkit(folder.path(), "disk", &authority.server()) else { return };
    let client = authority.client("friend");
    let address =
        format!("{}&tls-certificates={}", private(&socket), client.display().to_string().replace(' ', "%20"));
    let served = path("served");
    let mut daemon = start_heliostat([Path::new("serve"), Path::new(&address), Path::new("--nbd"), &served]);
    daemon.listens(&served).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", served.display());
    let mut command = Command::new(qemu_io);
    command
        .args(["-f", "raw", "-c", "write -P 7 64k 64k", "-c", "flush", "-c", "read -P 7 64k 64k"])
        .arg(uri);
    assert!(command.output().unwrap().status.success());
    daemon.stop().unwrap();
    assert!(std::fs::read(path("disk")).unwrap()[64 << 10..128 << 10].iter().all(|byte| *byte == 7));
}

#[test]
fn what_is_wrong_with_the_certificates_is_said_with_what_would_help() {
    let (ours, others) = (Authority::new("ca"), Authority::new("other"));
    let folder = folder();
    std::fs::write(folder.path().join("disk"), vec![0; SIZE]).unwrap();
    let Some((_server, socket)) = nbdkit(folder.path(), "disk", &ours.server()) else { return };
    let address = private(&socket);
    let refused = |arguments: &[&str], help: &str| {
        let output = heliostat(["info"].iter().chain(arguments));
        assert!(!output.status.success() && said(&output).contains(help), "{arguments:?}: {}", said(&output));
    };
    let with = |folder: PathBuf| format!("--tls-certificates={}", folder.display());
    refused(&[&address], "add --tls-certificates FOLDER");
    refused(&[&address, &with(folder.path().join("none"))], "ca-cert.pem");
    // The server is somebody else's.
    refused(&[&address, &with(others.client("friend"))], "one of those that --tls-certificates");
    // It wants a certificate, and there is none.
    refused(&[&address, &with(ours.nobody())], "that it knows our certificate");
    // It is not the host that was asked for.
    let friend = with(ours.client("friend"));
    refused(&[&address, &friend, "--tls-hostname=example.com"], "--tls-hostname");
    refused(&[&address.replacen("nbds", "nbd", 1), &friend], "write nbds where it wants TLS");
    refused(&["nbd://localhost:1/disk", &friend], "write nbds://localhost:1/disk");
    let output = heliostat(["info", &address, &friend]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn certificates_must_be_for_the_host_that_was_asked_for() {
    let Some(nbdkit) = tool("nbdkit") else { return };
    let authority = Authority::new("ca");
    let folder = folder();
    let socket = folder.path().join("sock");
    let far = authority.issue("server", "far.example.com", common::certificates::When::Now);
    let mut command = Command::new(nbdkit);
    command.args(["--foreground", "--tls=require", "--unix"]).arg(&socket).stderr(Stdio::null());
    command.arg(format!("--tls-certificates={}", far.display())).args(["memory", "1M"]);
    let mut server = Daemon::start(&mut command).unwrap();
    server.listens(&socket).unwrap();
    let friend = format!("--tls-certificates={}", authority.nobody().display());
    let info = |more: &[&str]| {
        let arguments = ["info", &private(&socket), &friend].map(str::to_owned);
        heliostat(arguments.iter().map(String::as_str).chain(more.iter().copied()))
    };
    assert!(!info(&[]).status.success());
    let right = info(&["--tls-hostname=far.example.com"]);
    assert!(right.status.success(), "{}", said(&right));
    assert!(!info(&["--tls-hostname=near.example.com"]).status.success());
}
