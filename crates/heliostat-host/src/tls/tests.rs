//! The stream and its credentials against themselves, on both drivers, with certificates made here.

mod files;

use std::fs;
use std::io::{self, IoSlice};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};

use super::*;
use crate::runtime::{Driver, block_on_with, spawn_local};

const BOTH: [Driver; 2] = [Driver::IoUring, Driver::Polling];

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca(name: &str) -> Ca {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn params(names: &[&str], usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CountryName, DnValue::PrintableString("GB".try_into().unwrap()));
    params.distinguished_name.push(DnType::OrganizationName, "Example, Inc.");
    params.distinguished_name.push(DnType::CommonName, "client");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![usage];
    params
}

/// Writes a certificate and its key, signed by `ca`, and the authority beside it.
fn issue(dir: &Path, side: &str, ca: &Ca, params: &CertificateParams) {
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, ca).unwrap();
    fs::write(dir.join("ca-cert.pem"), ca.pem()).unwrap();
    fs::write(dir.join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
    fs::write(dir.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
}

fn folder(ca: &Ca) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    issue(
        dir.path(),
        "server",
        ca,
        &params(&["localhost", "127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth),
    );
    issue(dir.path(), "client", ca, &params(&[], ExtendedKeyUsagePurpose::ClientAuth));
    dir
}

fn try_load(dir: &Path, endpoint: Endpoint, peers: PeerCheck) -> Result<Arc<Credentials>, String> {
    Credentials::load(CredentialsSettings { dir: dir.to_owned(), endpoint, peers })
        .map_err(|error| error.to_string())
}

fn server(dir: &Path) -> Arc<Credentials> {
    try_load(dir, Endpoint::Server, PeerCheck::Required).unwrap()
}

fn client(dir: &Path) -> Arc<Credentials> {
    try_load(dir, Endpoint::Client, PeerCheck::Required).unwrap()
}

fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for driver in BOTH {
        block_on_with(driver, test()).unwrap();
    }
}

/// Both sides of a handshake over a pair of sockets; the server's first.
async fn meet(
    server: &Arc<Credentials>,
    client: &Arc<Credentials>,
    host: &str,
) -> (io::Result<TlsStream>, io::Result<TlsStream>) {
    let (one, other) = Socket::pair().unwrap();
    join(TlsStream::accept(one, server), TlsStream::connect(other, client, host)).await
}

async fn met(dir: &Path) -> (TlsStream, TlsStream) {
    let (server, client) = meet(&server(dir), &client(dir), "localhost").await;
    (server.unwrap(), client.unwrap())
}

async fn recv(stream: &TlsStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.recv_now(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            result => return result,
        }
    }
}

async fn send_all(stream: &TlsStream, bytes: &[u8], piece: usize) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        let slices: Vec<_> = bytes[sent..].chunks(piece).map(IoSlice::new).take(1000).collect();
        match stream.send_now(&slices) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
            Ok(count) => sent += count,
        }
    }
    Ok(())
}

/// What both sides say to an error of either; the client hears of the server's with its first read.
async fn refusals(server: &Arc<Credentials>, client: &Arc<Credentials>, host: &str) -> (String, String) {
    let (at_server, at_client) = meet(server, client, host).await;
    let at_server = at_server.map(|_| ()).unwrap_err().to_string();
    let at_client = match at_client {
        Ok(stream) => recv(&stream, &mut [0; 1]).await.unwrap_err(),
        Err(error) => error,
    };
    (at_server, at_client.to_string())
}

async fn check_bytes(piece: usize, reads: usize) {
    let ca = ca("ca");
    let dir = folder(&ca);
    let (server, client) = met(dir.path()).await;
    // More than the buffers of both sides hold, so that both must wait.
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let to_send = sent.clone();
    let server = Rc::new(server);
    let echo = Rc::clone(&server);
    spawn_local(async move {
        let mut buffer = vec![0; 100_000];
        loop {
            match recv(&echo, &mut buffer).await.unwrap() {
                0 => return echo.shutdown_send(),
                count => send_all(&echo, &buffer[..count], 70_000).await.unwrap(),
            }
        }
    });
    let client = Rc::new(client);
    let sender = Rc::clone(&client);
    spawn_local(async move {
        send_all(&sender, &to_send, piece).await.unwrap();
        sender.shutdown_send();
    });
    let mut received = Vec::new();
    let mut buffer = vec![0; reads];
    loop {
        match recv(&client, &mut buffer).await.unwrap() {
            0 => break,
            count => received.extend_from_slice(&buffer[..count]),
        }
    }
    assert!(received == sent);
}

#[test]
fn what_is_sent_arrives_whatever_its_pieces_and_ends_with_a_goodbye() {
    on_both(|| check_bytes(100_000, 1 << 20));
    on_both(|| check_bytes(16 << 10, 4096));
    on_both(|| check_bytes(28, 50_000));
}

#[test]
fn each_side_knows_the_other_by_its_certificate() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, _client) = met(dir.path()).await;
        let peer = server.peer().unwrap();
        assert_eq!(peer.name, r"C=GB,O=Example\, Inc.,CN=client");
        let pem = fs::read_to_string(dir.path().join("client-cert.pem")).unwrap();
        let der = rcgen_der(&pem);
        assert_eq!(
            peer.fingerprint[..],
            *aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &der).as_ref()
        );
    });
}

/// What `qemu-nbd` 10.0.2 was seen to compare for such certificates.
#[test]
fn a_name_is_written_as_gnutls_writes_it_for_qemu() {
    use rcgen::DnValue::Utf8String;
    let printable = |text: &str| DnValue::PrintableString(text.try_into().unwrap());
    let utf8 = |text: &str| Utf8String(text.to_owned());
    let email = |text: &str| DnValue::Ia5String(text.try_into().unwrap());
    let custom = |id: &[u64]| DnType::CustomDnType(id.to_vec());
    let email_type = custom(&[1, 2, 840, 113_549, 1, 9, 1]);
    for (parts, name) in [
        (
            vec![
                (DnType::CountryName, printable("GB")),
                (DnType::StateOrProvinceName, utf8("London")),
                (DnType::OrganizationName, utf8("Example, Inc.")),
                (DnType::OrganizationalUnitName, utf8("a")),
                (DnType::CommonName, utf8("client \"x\"")),
            ],
            r#"C=GB,ST=London,O=Example\, Inc.,OU=a,CN=client \"x\""#,
        ),
        (
            vec![(DnType::CommonName, utf8(" lead space")), (DnType::OrganizationName, utf8("trail "))],
            r"CN=\ lead space,O=trail\ ",
        ),
        (
            vec![(DnType::CommonName, utf8(r"x;y<z>#\w=é")), (DnType::OrganizationName, utf8("#hash"))],
            r"CN=x\;y\<z\>#\\w=é,O=\#hash",
        ),
        (
            vec![(email_type, email("a@b.c")), (custom(&[2, 5, 4, 5]), printable("12"))],
            "EMAIL=a@b.c,serialNumber=12",
        ),
        (vec![(DnType::CountryName, utf8("GB"))], "C=#0c024742"),
        (vec![(custom(&[1, 2, 3, 4]), utf8("x"))], "1.2.3.4=#0c0178"),
    ] {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in parts {
            params.distinguished_name.push(kind, value);
        }
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(Peer::of(certificate.der()).unwrap().name, name);
    }
}

fn rcgen_der(pem: &str) -> Vec<u8> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

#[test]
fn a_stream_that_is_cut_is_not_taken_for_one_that_has_ended() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, client) = met(dir.path()).await;
        send_all(&server, b"half", 4).await.unwrap();
        server.socket.shutdown();
        let mut buffer = [0; 16];
        assert_eq!(recv(&client, &mut buffer).await.unwrap(), 4);
        for _ in 0..2 {
            assert_eq!(recv(&client, &mut buffer).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn a_dropped_stream_says_goodbye() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, client) = met(dir.path()).await;
        drop(server);
        assert_eq!(recv(&client, &mut [0; 16]).await.unwrap(), 0);
    });
}

#[test]
fn a_changed_byte_is_an_error_and_the_peer_is_told() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, client) = met(dir.path()).await;
        // A record that nobody has sealed.
        client.socket.send_now(&[IoSlice::new(&[23, 3, 3, 0, 32]), IoSlice::new(&[7; 32])]).unwrap();
        assert_eq!(recv(&server, &mut [0; 16]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let error = recv(&client, &mut [0; 16]).await.unwrap_err();
        assert_eq!(error.to_string(), "the peer ended TLS: BadRecordMac");
        let error = server.send_now(&[IoSlice::new(b"more")]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    });
}

#[test]
fn who_does_not_speak_tls_gets_an_error() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (one, other) = Socket::pair().unwrap();
        other.send_now(&[IoSlice::new(b"GET / HTTP/1.0\r\n\r\n")]).unwrap();
        let error = TlsStream::accept(one, &server(dir.path())).await.unwrap_err();
        assert!(error.to_string().starts_with("the peer does not speak TLS"), "{error}");
    });
}

#[test]
fn a_peer_that_leaves_in_the_middle_of_the_handshake_is_an_error() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (one, other) = Socket::pair().unwrap();
        other.send_now(&[IoSlice::new(&[22, 3, 1, 2, 0, 1])]).unwrap();
        drop(other);
        let error = TlsStream::accept(one, &server(dir.path())).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_client_without_a_certificate_is_refused_where_one_is_required() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let bare = tempfile::tempdir().unwrap();
        fs::write(bare.path().join("ca-cert.pem"), ca.pem()).unwrap();
        let (at_server, at_client) = refusals(&server(dir.path()), &client(bare.path()), "localhost").await;
        assert_eq!(at_server, "the peer showed no certificate, and one is required");
        assert_eq!(at_client, "the peer ended TLS: it requires a certificate, and we showed none");

        let lenient = try_load(dir.path(), Endpoint::Server, PeerCheck::None).unwrap();
        let (server, _client) = meet(&lenient, &client(bare.path()), "localhost").await;
        assert_eq!(server.unwrap().peer(), None);
    });
}

#[test]
fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    on_both(|| async {
        let (ours, theirs) = (folder(&ca("ours")), folder(&ca("theirs")));
        let (at_server, at_client) =
            refusals(&server(ours.path()), &client(theirs.path()), "localhost").await;
        assert_eq!(
            at_server,
            "the peer ended TLS: it does not know the authority that signed our certificate"
        );
        let why = "the peer's certificate was not accepted: no authority of ca-cert.pem has signed it";
        assert_eq!(at_client, why);

        let unchecked = try_load(theirs.path(), Endpoint::Client, PeerCheck::None).unwrap();
        let (at_server, at_client) = refusals(&server(ours.path()), &unchecked, "localhost").await;
        assert_eq!(at_server, why);
        assert_eq!(
            at_client,
            "the peer ended TLS: it does not know the authority that signed our certificate"
        );
    });
}

#[test]
fn a_server_is_believed_for_its_own_names_only() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, client) = (server(dir.path()), client(dir.path()));
        assert!(meet(&server, &client, "127.0.0.1").await.1.is_ok());
        let (_, at_client) = refusals(&server, &client, "elsewhere.example").await;
        assert!(at_client.contains("elsewhere.example"), "{at_client}");
        let error = TlsStream::connect(Socket::pair().unwrap().0, &client, "no name").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    });
}

#[test]
fn nothing_is_kept_for_a_stream_that_waits() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let (server, client) = met(dir.path()).await;
        send_all(&client, b"hello", 5).await.unwrap();
        assert_eq!(recv(&server, &mut [0; 16]).await.unwrap(), 5);
        assert_eq!(server.recv_now(&mut [0; 16]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut waiting = std::pin::pin!(server.readable());
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        assert!(server.state.borrow().input.has_no_memory());
        assert!(server.state.borrow().output.has_no_memory());
    });
}

/// How many records in which there is nothing to read are sent: of 40 bytes each.
const NOTHINGS: u64 = 100_000;

/// A session's ticket: a server may send as many as it likes. Of empty records rustls takes only a few.
const TICKET: [u8; 19] = [4, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 7, 0, 0, 22];

/// Sends records without a byte to read, all ready before the first goes, so that the socket is full all the while.
/// rustls would not make them, so it gives its key away.
async fn send_nothing(server: &TlsStream, spare: Engine) {
    use aws_lc_rs::aead;
    let Engine::Server(connection) = std::mem::replace(&mut server.state.borrow_mut().engine, spare) else {
        panic!("a server")
    };
    #[expect(deprecated, reason = "there are neither tickets nor new keys here")]
    let secrets = connection.dangerous_extract_secrets().unwrap();
    let (first, rustls::ConnectionTrafficSecrets::Aes256Gcm { key, iv }) = secrets.tx else {
        panic!("another cipher")
    };
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref()).unwrap());
    let mut records = Vec::new();
    for number in first..first + NOTHINGS {
        let header = [23, 3, 3, 0, 35];
        let mut nonce: [u8; 12] = iv.as_ref().try_into().unwrap();
        nonce[4..].iter_mut().zip(number.to_be_bytes()).for_each(|(byte, of_number)| *byte ^= of_number);
        let mut sealed = TICKET.to_vec();
        let nonce = aead::Nonce::assume_unique_for_key(nonce);
        key.seal_in_place_append_tag(nonce, aead::Aad::from(header), &mut sealed).unwrap();
        records.extend_from_slice(&header);
        records.extend_from_slice(&sealed);
    }
    let mut rest = &records[..];
    while !rest.is_empty() {
        match server.socket.send_now(&[IoSlice::new(rest)]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                server.socket.writable().await.unwrap();
            }
            // Nobody reads any more.
            Err(_) => return,
            Ok(count) => rest = &rest[count..],
        }
    }
}

#[test]
fn records_without_a_byte_do_not_keep_the_thread_from_others() {
    for driver in BOTH {
        let dir = folder(&ca("ca"));
        let path = dir.path().to_owned();
        let (one, other) = Socket::pair().unwrap();
        let other = other.detach();
        let peer = std::thread::spawn(move || {
            block_on_with(driver, async move {
                let mut config = server(&path).server().await.unwrap();
                Arc::make_mut(&mut config).enable_secret_extraction = true;
                let engine = || Engine::Server(UnbufferedServerConnection::new(Arc::clone(&config)).unwrap());
                let server = TlsStream::new(other.attach(), engine()).await.unwrap();
                send_nothing(&server, engine()).await;
            })
            .unwrap();
        });
        block_on_with(driver, async {
            let client = TlsStream::connect(one, &client(dir.path()), "localhost").await.unwrap();
            // Else it would be a look at an empty socket.
            client.socket.readable().await.unwrap();
            let mut buffer = [0; 16];
            let reads = std::pin::pin!(recv(&client, &mut buffer));
            let others = std::pin::pin!(async {
                for _ in 0..5 {
                    crate::runtime::yield_now().await;
                }
            });
            if let futures_util::future::Either::Left((read, _)) =
                futures_util::future::select(reads, others).await
            {
                panic!("all was read before a turn: {read:?}");
            }
        })
        .unwrap();
        peer.join().unwrap();
    }
}
