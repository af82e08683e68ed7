//! The NBD server inside TLS, and the tools that people use with it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "common/nbd.rs"]
mod nbd;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use heliostat::authz::Client;
use heliostat::front::nbd::{ExportSettings, NbdServer, ServerSettings, ServerTls, TlsPolicy};
use heliostat_host::socket::Address;
use heliostat_host::tls::{Credentials, CredentialsSettings, Endpoint, PeerCheck};

use common::certificates::{Authority, When};
use common::{folder, tool, wait};
use nbd::{Guest, Memory, Served, rest_of};

const SIZE: usize = 8 << 20;

fn credentials(dir: &Path) -> Arc<Credentials> {
    let settings =
        CredentialsSettings { dir: dir.to_owned(), endpoint: Endpoint::Server, peers: PeerCheck::Required };
    Credentials::load(settings).unwrap()
}

fn settings(dir: &Path, policy: TlsPolicy) -> ServerSettings {
    let tls = ServerTls { credentials: credentials(dir), policy, admits: None };
    ServerSettings { tls: Some(tls), ..ServerSettings::default() }
}

/// A server on TCP, and one on a Unix socket that is only there for its nodes.
struct Scene {
    server: NbdServer,
    nodes: Served,
}

impl Scene {
    /// With one export `disk` in memory.
    fn start(settings: ServerSettings) -> Self {
        let server = NbdServer::start(&Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))), settings);
        let scene = Self { server: server.unwrap(), nodes: Served::start(ServerSettings::default()) };
        scene.export("disk", None);
        scene
    }

    fn export(&self, name: &str, clients: Option<Vec<Client>>) {
        let node = self.nodes.node(name, Memory::new(SIZE));
        let settings = ExportSettings { clients, ..self.nodes.settings(name, &node) };
        self.server.add_export(settings).unwrap();
    }

    fn address(&self) -> SocketAddr {
        match &self.server.addresses()[0] {
            Address::Tcp(address) => *address,
            Address::Unix(_) => panic!("it was started on TCP"),
        }
    }

    /// The address of an export as libnbd's tools want it, with the certificates in `folder`.
    fn uri(&self, export: &str, folder: &Path) -> String {
        let folder = folder.display().to_string().replace(' ', "%20");
        format!("nbds://localhost:{}/{export}?tls-certificates={folder}", self.address().port())
    }

    fn plain_uri(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.address().port())
    }

    /// A tool of QEMU's with the disk in it, after `words`.
    fn qemu(&self, tool: &Path, words: &[&str], folder: &Path, more: &str) -> Command {
        let mut command = Command::new(tool);
        command.args(words);
        let folder = folder.display();
        command.args(["--object", &format!("tls-creds-x509,id=t,endpoint=client,dir={folder}{more}")]);
        command
    }

    fn options(&self, more: &str) -> String {
        let port = self.address().port();
        format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=t{more}"
        )
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

#[track_caller]
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

#[test]
fn libnbds_tools_copy_in_and_out() {
    let (Some(nbdinfo), Some(nbdcopy)) = (tool("nbdinfo"), tool("nbdcopy")) else { return };
    let authority = Authority::new("ca");
    let scene = Scene::start(settings(&authority.server(), TlsPolicy::Required));
    let uri = scene.uri("disk", &authority.client("friend"));
    assert!(run(Command::new(nbdinfo).arg(&uri)).contains("with TLS"), "nbdinfo sees TLS");
    let folder = folder();
    let (source, back) = (folder.path().join("source"), folder.path().join("back"));
    let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    fs::write(&source, &bytes).unwrap();
    run(Command::new(&nbdcopy).arg("--flush").arg(&source).arg(&uri));
    run(Command::new(&nbdcopy).arg(&uri).arg(&back));
    assert!(fs::read(&back).unwrap() == bytes);
}

#[test]
fn qemus_tools_use_it_with_both_versions_of_tls() {
    let (Some(qemu_io), Some(qemu_img)) = (tool("qemu-io"), tool("qemu-img")) else { return };
    let authority = Authority::new("ca");
    let scene = Scene::start(settings(&authority.server(), TlsPolicy::Required));
    let client = authority.client("friend");
    for (pattern, more) in [
        (1, ""),
        (2, ",priority=NORMAL:-VERS-ALL:+VERS-TLS1.2"),
        (3, ",priority=NORMAL:-VERS-ALL:+VERS-TLS1.3"),
    ] {
        let mut io = scene.qemu(&qemu_io, &[], &client, more);
        io.arg("--image-opts");
        io.args(["-c", &format!("write -P {pattern} 0 5M")]);
        io.args(["-c", &format!("read -P {pattern} 100 3M"), "-c", "flush"]);
        let said = run(io.arg(scene.options("")));
        assert!(!said.contains("Pattern verification failed"), "{said}");
    }
    let mut info = scene.qemu(&qemu_img, &["info"], &client, "");
    assert!(run(info.arg("--image-opts").arg(scene.options(""))).contains("8 MiB"));
}

#[test]
fn clients_that_are_not_known_are_turned_away_and_others_served() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let mut settings = settings(&ours.server(), TlsPolicy::Required);
    if let Some(tls) = &mut settings.tls {
        tls.admits = Some(Arc::new(|peer| peer.name == "C=GB,O=Example,CN=friend"));
    }
    let scene = Scene::start(settings);
    // A certificate of another authority, with ours to believe the server by.
    let foreign = theirs.client("friend");
    fs::copy(ours.nobody().join("ca-cert.pem"), foreign.join("ca-cert.pem")).unwrap();
    for folder in [
        foreign,
        theirs.client("other"),
        ours.nobody(),
        ours.client("stranger"),
        ours.issue("client", "past", When::Past),
    ] {
        refused(Command::new(&nbdinfo).arg("--size").arg(scene.uri("disk", &folder)));
    }
    let plain = refused(Command::new(&nbdinfo).arg(scene.plain_uri("disk")));
    assert!(plain.contains("TLS"), "{plain}");
    let size = run(Command::new(&nbdinfo).arg("--size").arg(scene.uri("disk", &ours.client("friend"))));
    assert_eq!(size.trim(), SIZE.to_string());
}

#[test]
fn a_client_turns_away_from_a_server_of_another_name() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let authority = Authority::new("ca");
    let scene = Scene::start(settings(&authority.server(), TlsPolicy::Required));
    let client = authority.client("friend");
    let info = |more: &str| {
        let mut info = scene.qemu(&qemu_img, &["info"], &client, "");
        info.arg("--image-opts").arg(scene.options(more));
        info
    };
    let said = refused(&mut info(",tls-hostname=elsewhere"));
    assert!(said.contains("Certificate does not match the hostname elsewhere"), "{said}");
    run(&mut info(",tls-hostname=localhost"));
}

#[test]
fn an_export_is_there_for_its_own_clients_only() {
    let (Some(nbdinfo), Some(openssl)) = (tool("nbdinfo"), tool("openssl")) else { return };
    let authority = Authority::new("ca");
    let scene = Scene::start(settings(&authority.server(), TlsPolicy::Optional));
    let (friend, other) = (authority.client("friend"), authority.client("other"));
    scene.export("named", Some(vec!["C=GB,O=Example,CN=friend".parse().unwrap()]));
    scene.export(
        "printed",
        Some(vec![fingerprint(&openssl, &friend.join("client-cert.pem")).parse().unwrap()]),
    );
    scene.export("nobodys", Some(Vec::new()));
    let list = |uri: &str| {
        let list = run(Command::new(&nbdinfo).args(["--list", "--json"]).arg(uri));
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let exports = list["exports"].as_array().unwrap().clone();
        let names = exports.iter().map(|export| export["export-name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(list(&scene.uri("", &friend)), ["disk", "named", "printed"]);
    assert_eq!(list(&scene.uri("", &other)), ["disk"]);
    assert_eq!(list(&scene.plain_uri("")), ["disk"], "without a certificate");
    for (export, folder) in [("named", &other), ("printed", &other), ("nobodys", &friend)] {
        refused(Command::new(&nbdinfo).arg(scene.uri(export, folder)));
        refused(Command::new(&nbdinfo).arg(scene.plain_uri(export)));
    }
    run(Command::new(&nbdinfo).arg(scene.uri("printed", &friend)));
}

/// The SHA-256 of a certificate, as openssl prints it.
fn fingerprint(openssl: &Path, path: &Path) -> String {
    let said =
        run(Command::new(openssl).args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(path));
    let (_, digits) = said.trim().split_once('=').unwrap();
    format!("sha256:{digits}")
}

#[test]
fn new_certificates_count_for_the_next_client_and_broken_ones_for_none() {
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let dir = old.server();
    let scene = Scene::start(settings(&dir, TlsPolicy::Required));
    let (of_old, of_new) = (old.client("friend"), new.client("friend"));
    let info = |folder: &Path| {
        let mut info = Command::new(&nbdinfo);
        info.arg("--size").arg(scene.uri("disk", folder));
        info
    };
    run(&mut info(&of_old));
    refused(&mut info(&of_new));
    new.issue_into(&dir, "server", "localhost", When::Now);
    run(&mut info(&of_new));
    refused(&mut info(&of_old));
    fs::write(dir.join("server-cert.pem"), "no certificate").unwrap();
    run(&mut info(&of_new));
}

/// A client that has asked for TLS and was told to begin.
fn before_tls(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12..], [0, 0, 0, 1, 0, 0, 0, 0], "an acknowledgement");
    stream
}

/// Waits until the server has closed the connection.
fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server did not close the connection: {error}"),
    }
}

#[test]
fn who_speaks_no_tls_after_asking_for_it_is_cut_off() {
    let authority = Authority::new("ca");
    let scene = Scene::start(settings(&authority.server(), TlsPolicy::Optional));
    for garbage in
        [&b"IHAVEOPT\0\0\0\x03\0\0\0\0"[..], &[0; 4096], &[22, 3, 1, 0, 5, 1, 0, 0, 1, 0], &[0xff; 70_000]]
    {
        let mut stream = before_tls(scene.address());
        // It may be cut off before all was said.
        let _ = stream.write_all(garbage);
        is_closed(&mut stream);
    }
    // What comes in one piece with the wish was not said inside TLS.
    let mut stream = TcpStream::connect(scene.address()).unwrap();
    stream.set_read_timeout(Some(wait::LIMIT)).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    assert_eq!(said.len(), 18, "the greeting alone");
}

#[test]
fn the_time_for_the_handshake_counts_inside_tls_too() {
    let authority = Authority::new("ca");
    let settings = settings(&authority.server(), TlsPolicy::Required);
    let scene = Scene::start(ServerSettings { handshake_time: Duration::from_millis(200), ..settings });
    for begun in [&[][..], &[22, 3, 1], &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]] {
        let mut stream = before_tls(scene.address());
        stream.write_all(begun).unwrap();
        is_closed(&mut stream);
    }
}

#[test]
fn where_tls_is_optional_a_client_may_do_without() {
    let authority = Authority::new("ca");
    let settings = settings(&authority.server(), TlsPolicy::Optional);
    let served = Served::start(settings);
    served.export("disk", served.node("disk", Memory::new(SIZE)));
    let mut guest: Guest = served.guest("disk");
    guest.write(5, b"plain");
    assert_eq!(guest.read(5, 5), b"plain");
}

#[test]
fn where_tls_is_required_the_oldest_way_to_an_export_ends_the_connection() {
    let authority = Authority::new("ca");
    let served = Served::start(settings(&authority.server(), TlsPolicy::Required));
    served.export("disk", served.node("disk", Memory::new(SIZE)));
    let mut stream = served.raw();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    assert_eq!(rest_of(&mut stream).len(), 18, "the greeting alone");
}

#[test]
fn required_tls_may_be_reached_from_anywhere() {
    let anywhere = Address::Tcp(SocketAddr::from(([0, 0, 0, 0], 0)));
    let authority = Authority::new("ca");
    let dir = authority.server();
    assert!(NbdServer::start(&anywhere, settings(&dir, TlsPolicy::Required)).is_ok());
    let refused = NbdServer::start(&anywhere, settings(&dir, TlsPolicy::Optional)).map(|_| ());
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn tls_opens_an_address_to_other_hosts_only_where_it_asks_for_certificates() {
    let authority = Authority::new("ca");
    let start = |policy, peers| {
        let settings = CredentialsSettings { dir: authority.server(), endpoint: Endpoint::Server, peers };
        let credentials = Credentials::load(settings).unwrap();
        let tls = Some(ServerTls { credentials, policy, admits: None });
        let anywhere = Address::Tcp(SocketAddr::from(([0, 0, 0, 0], 0)));
        NbdServer::start(&anywhere, ServerSettings { tls, ..ServerSettings::default() })
            .map(|_| ())
            .map_err(|error| error.kind())
    };
    assert_eq!(start(TlsPolicy::Required, PeerCheck::Required), Ok(()));
    for (policy, peers) in [
        (TlsPolicy::Required, PeerCheck::None),
        (TlsPolicy::Optional, PeerCheck::Required),
        (TlsPolicy::Optional, PeerCheck::None),
    ] {
        assert_eq!(start(policy, peers), Err(std::io::ErrorKind::PermissionDenied));
    }
}
