//! Our client's part of TLS, before servers of others: `qemu-nbd` and `nbdkit`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use heliostat_block::nbd::ReplyStyle;
use heliostat_block::nbd::client::{Allocation, Found, Negotiation, NegotiationError, Wish};
use heliostat_host::runtime::block_on;
use heliostat_host::socket::{Address, Socket};
use heliostat_host::stream::Stream;
use heliostat_host::tls::{Credentials, CredentialsSettings, Endpoint, PeerCheck};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

const SIZE: u64 = 1 << 20;

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Puts a server's and a client's certificates into a folder.
fn furnish(folder: &Path, ca: &Ca) {
    for (side, names, usage) in [
        ("server", vec!["localhost".to_owned()], ExtendedKeyUsagePurpose::ServerAuth),
        ("client", vec![], ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, side);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        fs::write(folder.join(format!("{side}-cert.pem")), params.signed_by(&key, ca).unwrap().pem())
            .unwrap();
        fs::write(folder.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
        fs::write(folder.join("ca-cert.pem"), ca.pem()).unwrap();
    }
}

/// A server that ends with the test.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `None` where the program is not installed.
fn start(command: &mut Command, socket: PathBuf) -> Option<Server> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let server = Server { child, socket };
    let end = Instant::now() + Duration::from_secs(60);
    while !server.socket.exists() {
        assert!(Instant::now() < end, "the server does not come");
        std::thread::yield_now();
    }
    Some(server)
}

fn qemu_nbd(folder: &Path, more: &[&str]) -> Option<Server> {
    let (socket, disk) = (folder.join("qemu-nbd"), folder.join("disk"));
    fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--format", "raw", "--export-name", "disk", "--shared", "4", "--socket"]);
    command.arg(&socket).args(more).arg(disk);
    start(&mut command, socket)
}

fn nbdkit(folder: &Path, more: &[&str]) -> Option<Server> {
    let socket = folder.join("nbdkit");
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exportname", "disk", "--unix"]).arg(&socket).args(more);
    command.args(["memory", &SIZE.to_string()]);
    start(&mut command, socket)
}

async fn send(stream: &Stream, output: &mut BytesMut) -> io::Result<()> {
    while !output.is_empty() {
        match stream.send_now(&[IoSlice::new(output)]) {
            Ok(sent) => drop(output.split_to(sent)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn receive(stream: &Stream, input: &mut BytesMut) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.recv_now(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                input.extend_from_slice(&buffer[..count]);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(error) => return Err(error),
        }
    }
}

/// Asks for the export, inside TLS where there are credentials.
async fn negotiate(
    server: &Server,
    tls: Option<(&Path, &str)>,
) -> io::Result<Result<Found, NegotiationError>> {
    let wish =
        Wish { export: "disk".to_owned(), replies: ReplyStyle::Structured, allocation: Allocation::Wanted };
    let mut stream = Stream::from(Socket::connect(&Address::Unix(server.socket.clone())).await?);
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut negotiation = Negotiation::new(wish);
    if tls.is_some() {
        negotiation = negotiation.with_tls();
    }
    loop {
        let found = match negotiation.step(&mut input, &mut output) {
            Ok(found) => found,
            Err(error) => return Ok(Err(error)),
        };
        send(&stream, &mut output).await?;
        if let Some(found) = found {
            assert_eq!(stream.is_tls(), tls.is_some());
            return Ok(Ok(found));
        }
        if let (true, Some((dir, host))) = (negotiation.awaits_tls(), tls) {
            stream = stream.connect_tls(&credentials(dir), host).await?;
            negotiation.tls_reached(&mut output);
            send(&stream, &mut output).await?;
        }
        receive(&stream, &mut input).await?;
    }
}

fn credentials(dir: &Path) -> Arc<Credentials> {
    let settings =
        CredentialsSettings { dir: dir.to_owned(), endpoint: Endpoint::Client, peers: PeerCheck::Required };
    Credentials::load(settings).unwrap()
}

fn check(start: impl Fn(&Path, &[&str]) -> Option<Server>, with_tls: &dyn Fn(&str) -> Vec<String>) {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    furnish(ours.path(), &ca());
    furnish(theirs.path(), &ca());
    let bare = tempfile::tempdir().unwrap();
    fs::copy(ours.path().join("ca-cert.pem"), bare.path().join("ca-cert.pem")).unwrap();
    let dir = ours.path().to_str().unwrap();
    let arguments = with_tls(dir);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let Some(server) = start(ours.path(), &arguments) else { return };
    block_on(async {
        let found = negotiate(&server, Some((ours.path(), "localhost"))).await.unwrap().unwrap();
        assert_eq!(found.terms.size, SIZE);
        assert_eq!(found.terms.replies, ReplyStyle::Structured);

        let error = negotiate(&server, Some((ours.path(), "elsewhere"))).await.unwrap_err();
        assert!(error.to_string().contains("elsewhere"), "{error}");
        let error = negotiate(&server, Some((theirs.path(), "localhost"))).await.unwrap_err();
        let text = "the peer's certificate was not accepted: no authority of ca-cert.pem has signed it";
        assert_eq!(error.to_string(), text);
        // What it says to that is the server's business.
        assert!(negotiate(&server, Some((bare.path(), "localhost"))).await.is_err());
        assert_eq!(negotiate(&server, None).await.unwrap(), Err(NegotiationError::TlsRequired));
    })
    .unwrap();
    drop(server);

    let plain = tempfile::tempdir().unwrap();
    let Some(server) = start(plain.path(), &[]) else { return };
    block_on(async {
        let refused = negotiate(&server, Some((ours.path(), "localhost"))).await.unwrap();
        assert!(matches!(refused, Err(NegotiationError::TlsRefused { .. })), "{refused:?}");
    })
    .unwrap();
}

#[test]
fn qemu_nbd_is_met_inside_tls_or_not_at_all() {
    check(qemu_nbd, &|dir| {
        let object = format!("tls-creds-x509,id=t,endpoint=server,dir={dir}");
        ["--object", &object, "--tls-creds", "t"].map(str::to_owned).to_vec()
    });
}

#[test]
fn nbdkit_is_met_inside_tls_or_not_at_all() {
    check(nbdkit, &|dir| {
        let certificates = format!("--tls-certificates={dir}");
        ["--tls=require", &certificates, "--tls-verify-peer"].map(str::to_owned).to_vec()
    });
}
