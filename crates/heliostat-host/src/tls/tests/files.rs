//! What the files of credentials hold, lack and become while they are in use.

use super::*;

#[test]
fn a_revoked_certificate_is_refused() {
    on_both(|| async {
        let ca = ca("ca");
        let dir = folder(&ca);
        let mut revoked = params(&[], ExtendedKeyUsagePurpose::ClientAuth);
        revoked.serial_number = Some(SerialNumber::from(77));
        issue(dir.path(), "client", &ca, &revoked);
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(2090, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(77),
                revocation_time: date_time_ymd(2021, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(dir.path().join("ca-crl.pem"), list.signed_by(&ca).unwrap().pem().unwrap()).unwrap();
        let (at_server, at_client) = refusals(&server(dir.path()), &client(dir.path()), "localhost").await;
        assert_eq!(at_server, "the peer's certificate was not accepted: it was revoked");
        assert_eq!(at_client, "the peer ended TLS: our certificate was revoked");
        lost_revocations(dir.path()).await;
    });
}

/// What is no longer there to say so is revoked all the same.
async fn lost_revocations(dir: &Path) {
    let (server, client) = (server(dir), client(dir));
    let list = dir.join("ca-crl.pem");
    let bytes = fs::read(&list).unwrap();
    let why = "the peer's certificate was not accepted: it was revoked";
    fs::remove_file(&list).unwrap();
    assert_eq!(refusals(&server, &client, "localhost").await.0, why);
    assert!(server.trouble().unwrap().contains("ca-crl.pem: it was there and is gone"));
    std::os::unix::fs::symlink("nowhere", &list).unwrap();
    assert_eq!(refusals(&server, &client, "localhost").await.0, why);
    assert!(server.trouble().unwrap().contains("ca-crl.pem: No such file or directory"));
    let text = "Unable to access credentials ca-crl.pem: No such file or directory";
    assert_refused(dir, Endpoint::Server, text);
    fs::remove_file(&list).unwrap();
    fs::write(&list, bytes).unwrap();
    assert_eq!(refusals(&server, &client, "localhost").await.0, why);
    assert_eq!(server.trouble(), None);
}

#[test]
fn changed_files_count_from_the_next_handshake_and_broken_ones_never() {
    on_both(|| async {
        let (old, new) = (ca("old"), ca("new"));
        let (dir, theirs) = (folder(&old), folder(&new));
        let (server, client) = (server(dir.path()), client(theirs.path()));
        assert!(meet(&server, &client, "localhost").await.0.is_err());
        for name in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
            fs::copy(theirs.path().join(name), dir.path().join(name)).unwrap();
        }
        assert!(meet(&server, &client, "localhost").await.0.is_ok());
        assert_eq!(server.trouble(), None);

        let certificate = dir.path().join("server-cert.pem");
        let good = fs::read(&certificate).unwrap();
        fs::write(&certificate, "broken").unwrap();
        assert!(meet(&server, &client, "localhost").await.0.is_ok());
        assert!(server.trouble().unwrap().contains("server-cert.pem: there is no certificate in it"));

        fs::write(&certificate, good).unwrap();
        assert!(meet(&server, &client, "localhost").await.0.is_ok());
        assert_eq!(server.trouble(), None);
    });
}

#[track_caller]
fn assert_refused(dir: &Path, endpoint: Endpoint, expected: &str) {
    let text = try_load(dir, endpoint, PeerCheck::Required).unwrap_err();
    let text = text.replace(&format!("{}/", dir.display()), "");
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn files_that_are_missing_or_broken_are_named() {
    let ca = ca("ca");
    let dir = folder(&ca);
    let path = dir.path();
    let remove = |name: &str| fs::remove_file(path.join(name)).unwrap();

    fs::write(path.join("server-key.pem"), "-----BEGIN ENCRYPTED PRIVATE KEY-----").unwrap();
    let text = "Unable to use credentials server-key.pem: the key is encrypted, which is not supported";
    assert_refused(path, Endpoint::Server, text);
    fs::write(path.join("server-key.pem"), "nothing").unwrap();
    let text = "Unable to use credentials server-key.pem: there is no key in it that can be read";
    assert_refused(path, Endpoint::Server, text);
    fs::copy(path.join("client-key.pem"), path.join("server-key.pem")).unwrap();
    let text = "Cannot load certificate 'server-cert.pem' & key 'server-key.pem': The certificate and the given \
                key do not match";
    assert_refused(path, Endpoint::Server, text);
    remove("server-key.pem");
    let text = "Unable to access credentials server-key.pem: No such file or directory";
    assert_refused(path, Endpoint::Server, text);
    remove("server-cert.pem");
    let text = "Unable to access credentials server-cert.pem: No such file or directory";
    assert_refused(path, Endpoint::Server, text);
    fs::write(path.join("ca-crl.pem"), "nothing").unwrap();
    let text = "Unable to use credentials ca-crl.pem: there is no revocation list in it";
    assert_refused(path, Endpoint::Client, text);
    remove("ca-crl.pem");
    assert!(try_load(path, Endpoint::Client, PeerCheck::Required).is_ok());
    remove("client-key.pem");
    let text = "Unable to access credentials client-key.pem: No such file or directory";
    assert_refused(path, Endpoint::Client, text);
    remove("client-cert.pem");
    assert!(try_load(path, Endpoint::Client, PeerCheck::Required).is_ok());
    remove("ca-cert.pem");
    let text = "Unable to access credentials ca-cert.pem: No such file or directory";
    assert_refused(path, Endpoint::Client, text);
}

#[test]
fn our_own_certificate_must_be_one_that_peers_can_accept() {
    let authority = ca("ca");
    let dir = folder(&authority);
    let mut old = params(&["localhost"], ExtendedKeyUsagePurpose::ServerAuth);
    old.not_before = date_time_ymd(2001, 1, 1);
    old.not_after = date_time_ymd(2002, 1, 1);
    issue(dir.path(), "server", &authority, &old);
    let text = "The certificate server-cert.pem has expired: it was good until Jan  1 00:00:00 2002";
    assert_refused(dir.path(), Endpoint::Server, text);

    old.not_before = date_time_ymd(2090, 1, 1);
    old.not_after = date_time_ymd(2091, 1, 1);
    issue(dir.path(), "server", &authority, &old);
    let text = "The certificate server-cert.pem is not yet active: it is from Jan  1 00:00:00 2090";
    assert_refused(dir.path(), Endpoint::Server, text);

    issue(dir.path(), "server", &authority, &params(&["localhost"], ExtendedKeyUsagePurpose::ClientAuth));
    let text = "Our own certificate server-cert.pem failed validation against ca-cert.pem";
    assert_refused(dir.path(), Endpoint::Server, text);

    issue(dir.path(), "client", &authority, &params(&[], ExtendedKeyUsagePurpose::ClientAuth));
    fs::write(dir.path().join("ca-cert.pem"), ca("other").pem()).unwrap();
    let text = "Our own certificate client-cert.pem failed validation against ca-cert.pem";
    assert_refused(dir.path(), Endpoint::Client, text);
}
