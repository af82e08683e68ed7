//! TLS as operators ask for it: on the command line of `serve`, on `storage-daemon`'s beside QEMU's, and over QMP.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod qmp;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::certificates::Authority;
use common::process::Daemon;
use common::{HELIOSTAT, heliostat, tool, wait};
use qmp::wire::Wire;
use serde_json::json;

/// Asks for an export on a Unix socket with a client's certificates; answers whether it was given.
fn is_served(qemu_img: &Path, socket: &Path, folder: &Path) -> bool {
    let mut command = Command::new(qemu_img);
    command.args(["info", "--object"]);
    command.arg(format!("tls-creds-x509,id=t,endpoint=client,dir={}", folder.display()));
    command.arg("--image-opts");
    command.arg(format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=t,tls-hostname=localhost",
        socket.display()
    ));
    command.output().unwrap().status.success()
}

fn disk(folder: &Path) -> PathBuf {
    let path = folder.join("source");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    path
}

#[test]
fn the_same_arguments_let_the_same_clients_in_with_both_programs() {
    let (Some(qemu), Some(qemu_img)) = (tool("qemu-storage-daemon"), tool("qemu-img")) else { return };
    let authority = Authority::new("ca");
    let (dir, friend) = (authority.server(), authority.client("friend"));
    let (friend_of_glob, enemy) = (authority.client("guest one"), authority.client("enemy"));
    for program in [vec![qemu], vec![PathBuf::from(HELIOSTAT), PathBuf::from("storage-daemon")]] {
        let folder = common::folder();
        let path = |name: &str| folder.path().join(name);
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]).stdin(Stdio::null());
        command.arg("--object").arg(format!("tls-creds-x509,id=t,endpoint=server,dir={}", dir.display()));
        command.args([
            "--object",
            "authz-list,id=a,policy=deny,rules.0.match=C=GB,,O=Example,,CN=friend,rules.0.policy=allow,\
             rules.1.match=*CN=guest*,rules.1.format=glob,rules.1.policy=allow",
        ]);
        command.arg("--blockdev");
        command.arg(format!("file,node-name=n,filename={}", disk(folder.path()).display()));
        let server = format!("addr.type=unix,addr.path={},tls-creds=t,tls-authz=a", path("nbd").display());
        command.args(["--nbd-server", &server, "--export", "nbd,id=e,node-name=n,name=disk"]);
        command.arg("--pidfile").arg(path("pid"));
        let _daemon = Daemon::start(&mut command).unwrap();
        wait::until("the pid file", wait::LIMIT, || path("pid").exists().then_some(())).unwrap();
        for (client, is_let_in) in [(&friend, true), (&friend_of_glob, true), (&enemy, false)] {
            let is = is_served(&qemu_img, &path("nbd"), client);
            assert_eq!(is, is_let_in, "{} by {}", client.display(), program[0].display());
        }
    }
}

#[test]
fn serve_with_a_folder_of_certificates_wants_tls_from_everybody() {
    let (Some(qemu_img), Some(nbdinfo)) = (tool("qemu-img"), tool("nbdinfo")) else { return };
    let authority = Authority::new("ca");
    let folder = common::folder();
    let socket = folder.path().join("nbd");
    let serve = |more: &[&str]| {
        let mut command = Command::new(HELIOSTAT);
        command.arg("serve").arg(disk(folder.path())).arg("--nbd").arg(&socket);
        command.arg("--tls-dir").arg(authority.server()).args(more);
        let mut daemon = Daemon::start(&mut command).unwrap();
        daemon.listens(&socket).unwrap();
        daemon
    };
    let (friend, other) = (authority.client("friend"), authority.client("other"));
    let plain = || {
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        Command::new(&nbdinfo).arg(uri).output().unwrap().status.success()
    };
    let daemon = serve(&[]);
    assert!(is_served(&qemu_img, &socket, &friend));
    assert!(!is_served(&qemu_img, &socket, &authority.nobody()));
    assert!(!plain());
    daemon.stop().unwrap();

    let daemon = serve(&["--tls-allow", "C=GB,O=Example,CN=friend"]);
    assert!(is_served(&qemu_img, &socket, &friend));
    assert!(!is_served(&qemu_img, &socket, &other));
    daemon.stop().unwrap();

    let daemon = serve(&["--tls", "optional"]);
    assert!(is_served(&qemu_img, &socket, &friend));
    assert!(plain());
    daemon.stop().unwrap();

    let daemon = serve(&["--tls-any-client"]);
    assert!(is_served(&qemu_img, &socket, &authority.nobody()));
    assert!(!plain());
    daemon.stop().unwrap();
}

#[test]
fn serve_says_which_file_is_missing_and_what_an_address_needs() {
    let folder = common::folder();
    let (disk, socket) = (disk(folder.path()), folder.path().join("nbd"));
    let (disk, socket) = (disk.to_str().unwrap(), socket.to_str().unwrap());
    let refused = |arguments: &[&str]| {
        let output = heliostat(["serve", disk].iter().chain(arguments));
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = refused(&["--nbd", socket, "--tls-dir", "/nonexistent"]);
    assert!(said.contains("--tls-dir: Unable to access credentials /nonexistent/ca-cert.pem"), "{said}");
    let said = refused(&["--nbd", "0.0.0.0:0"]);
    assert!(said.contains("add TLS that asks for certificates (--tls-dir"), "{said}");
    let said = refused(&["--nbd", "0.0.0.0:0", "--tls-dir", "/nonexistent", "--tls", "optional"]);
    assert!(said.contains("can be reached from other hosts"), "{said}");
    let any = ["--nbd", "0.0.0.0:0", "--tls-dir", "/nonexistent", "--tls-any-client"];
    let said = refused(&any);
    assert!(said.contains("can be reached from other hosts"), "{said}");
    // Past the address, to the certificates.
    let said = refused(&[&any[..], &["--allow-remote"]].concat());
    assert!(said.contains("Unable to access credentials"), "{said}");
    let said = refused(&["--nbd", "0.0.0.0:0", "--tls-dir", "/nonexistent"]);
    assert!(said.contains("Unable to access credentials"), "{said}");
    let said = refused(&["--nbd", socket, "--tls-dir", "/nonexistent", "--tls-allow", "friend"]);
    assert!(said.contains("neither a distinguished name"), "{said}");
}

#[test]
fn who_is_let_in_may_be_changed_while_the_server_runs() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let authority = Authority::new("ca");
    let folder = common::folder();
    let path = |name: &str| folder.path().join(name);
    let mut command = Command::new(HELIOSTAT);
    let mut daemon = Daemon::start(command.args(["serve", "--control"]).arg(path("control"))).unwrap();
    daemon.listens(&path("control")).unwrap();
    let mut wire = Wire::negotiated(&path("control"));
    let mut execute = |command: &str, arguments: serde_json::Value| {
        let reply = wire.execute(command, &arguments);
        assert!(reply.get("error").is_none(), "{command}: {reply}");
    };
    let (friend, other) = (authority.client("friend"), authority.client("other"));
    let dir = authority.server();
    execute(
        "object-add",
        json!({ "qom-type": "tls-creds-x509", "id": "t", "dir": dir, "endpoint": "server" }),
    );
    execute("object-add", json!({ "qom-type": "authz-list", "id": "a" }));
    execute("blockdev-add", json!({ "driver": "file", "node-name": "n", "filename": disk(folder.path()) }));
    let address = json!({ "type": "unix", "data": { "path": path("nbd") } });
    execute("nbd-server-start", json!({ "addr": address, "tls-creds": "t", "tls-authz": "a" }));
    execute(
        "block-export-add",
        json!({
            "type": "nbd", "id": "e", "node-name": "n", "name": "disk", "tls-clients": ["C=GB,O=Example,CN=friend"],
        }),
    );
    assert!(!is_served(&qemu_img, &path("nbd"), &friend), "the list lets nobody in yet");
    let rules = json!([{ "match": "*", "policy": "allow", "format": "glob" }]);
    execute("qom-set", json!({ "path": "a", "property": "rules", "value": rules }));
    assert!(is_served(&qemu_img, &path("nbd"), &friend));
    assert!(!is_served(&qemu_img, &path("nbd"), &other), "the export is not for this one");
    execute("object-del", json!({ "id": "a" }));
    assert!(!is_served(&qemu_img, &path("nbd"), &friend), "without the list nobody is let in");
}
