//! From a folder of PEM files to what rustls wants: read, checked, and refused with a text that says which file.
//!
//! Called by the credentials, on a blocking thread; keeps nothing.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::credentials::{CredentialsError, CredentialsSettings, Endpoint, PeerCheck};

/// The longest file that is read: all authorities of the public web are a quarter of a megabyte.
const FILE_LEN_MAX: u64 = 4 << 20;

const CA_CERT: &str = "ca-cert.pem";
const CA_CRL: &str = "ca-crl.pem";

/// What connections are made with.
#[derive(Clone, Debug)]
pub(super) enum Side {
    Server(Arc<ServerConfig>),
    Client(Arc<ClientConfig>),
}

/// What the files make.
pub(super) struct Loaded {
    pub(super) side: Side,
    /// Whether there is a list of what is revoked.
    pub(super) revokes: bool,
}

type Result<T> = std::result::Result<T, CredentialsError>;

/// The files of an endpoint: authorities, what they have revoked, certificate, key.
pub(super) const fn file_names(endpoint: Endpoint) -> [&'static str; 4] {
    match endpoint {
        Endpoint::Server => [CA_CERT, CA_CRL, "server-cert.pem", "server-key.pem"],
        Endpoint::Client => [CA_CERT, CA_CRL, "client-cert.pem", "client-key.pem"],
    }
}

/// A certificate with those between it and an authority, and its key.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    certificate_path: PathBuf,
    key_path: PathBuf,
}

/// Who is believed.
struct Authorities {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    path: PathBuf,
}

/// Reads the files. `revokes`: there was a list of what is revoked before, so there must be one.
pub(super) fn load(settings: &CredentialsSettings, revokes: bool) -> Result<Loaded> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let authorities = authorities(&settings.dir, revokes)?;
    let revokes = !authorities.revoked.is_empty();
    let identity = identity(settings)?;
    match (settings.endpoint, identity) {
        (Endpoint::Server, Some(identity)) => {
            let config = server(settings.peers, &authorities, identity, &provider)?;
            Ok(Loaded { side: Side::Server(Arc::new(config)), revokes })
        }
        (Endpoint::Server, None) => {
            let [_, _, certificate, _] = file_names(Endpoint::Server);
            Err(read(&settings.dir.join(certificate), purpose(certificate)).err().unwrap_or_else(|| {
                CredentialsError(
                    "the server's certificate has come while it was looked for; try again".to_owned(),
                )
            }))
        }
        (Endpoint::Client, identity) => {
            let config = client(settings.peers, &authorities, identity, &provider)?;
            Ok(Loaded { side: Side::Client(Arc::new(config)), revokes })
        }
    }
}

fn purpose(name: &str) -> &'static str {
    match name {
        CA_CERT => "the certificates of the authorities whose word counts for peers",
        CA_CRL => "what the authorities have revoked",
        "server-cert.pem" => "the server's certificate, and any between it and an authority",
        "client-cert.pem" => "the client's certificate, and any between it and an authority",
        _ => "the private key of the certificate beside it",
    }
}

fn read(path: &Path, purpose: &str) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    let bytes = read().map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::NotFound => "No such file or directory".to_owned(),
            io::ErrorKind::PermissionDenied => "Permission denied".to_owned(),
            _ => error.to_string(),
        };
        CredentialsError(format!(
            "Unable to access credentials {}: {reason} (the file is to hold {purpose})",
            path.display()
        ))
    })?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > FILE_LEN_MAX) {
        return Err(refusal(path, &format!("it is longer than {FILE_LEN_MAX} bytes"), purpose));
    }
    Ok(bytes)
}

fn refusal(path: &Path, what: &str, purpose: &str) -> CredentialsError {
    CredentialsError(format!(
        "Unable to use credentials {}: {what} (the file is to hold {purpose})",
        path.display()
    ))
}

/// All certificates of a file, one at least.
fn certificates(path: &Path, purpose: &str) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path, purpose)?;
    let found: std::result::Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| refusal(path, &format!("it is not PEM: {error}"), purpose))?;
    if found.is_empty() {
        return Err(refusal(path, "there is no certificate in it", purpose));
    }
    Ok(found)
}

fn authorities(dir: &Path, revokes: bool) -> Result<Authorities> {
    let path = dir.join(CA_CERT);
    let purpose_of_it = purpose(CA_CERT);
    let mut roots = RootCertStore::empty();
    let mut last = None;
    for certificate in certificates(&path, purpose_of_it)? {
        // One that has expired is passed over as long as there is another.
        match check_time(&path, &certificate) {
            Ok(()) => {
                let added = roots.add(certificate);
                added.map_err(|error| {
                    refusal(&path, &format!("a certificate in it is no authority's: {error}"), purpose_of_it)
                })?;
            }
            Err(error) => last = Some(error),
        }
    }
    if let (true, Some(error)) = (roots.is_empty(), last) {
        return Err(error);
    }
    let crl_path = dir.join(CA_CRL);
    let revoked = if is_there(&crl_path)? {
        let bytes = read(&crl_path, purpose(CA_CRL))?;
        let lists: std::result::Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
        let lists =
            lists.map_err(|error| refusal(&crl_path, &format!("it is not PEM: {error}"), purpose(CA_CRL)))?;
        if lists.is_empty() {
            return Err(refusal(&crl_path, "there is no revocation list in it", purpose(CA_CRL)));
        }
        lists
    } else {
        Vec::new()
    };
    if revokes && revoked.is_empty() {
        return Err(CredentialsError(format!(
            "Unable to access credentials {}: it was there and is gone, and what it revoked stays revoked (put it \
             back; without revocations, an empty list)",
            crl_path.display()
        )));
    }
    Ok(Authorities { roots: Arc::new(roots), revoked, path })
}

/// Says whether there is a file, or anything else of that name. What cannot be looked at is not taken for absent: a
/// list of what was revoked would then count no longer.
fn is_there(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => {
            Err(CredentialsError(format!("Unable to access credentials {}: {error}", path.display())))
        }
    }
}

/// Refuses a certificate whose time is not now.
fn check_time(path: &Path, certificate: &CertificateDer<'_>) -> Result<()> {
    let what = "a certificate in it cannot be read";
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_| CredentialsError(format!("Unable to use credentials {}: {what}", path.display())))?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let validity = parsed.validity();
    if now < validity.not_before.timestamp() {
        let when = validity.not_before;
        return Err(CredentialsError(format!(
            "The certificate {} is not yet active: it is from {when} on (set the clock right, or wait)",
            path.display()
        )));
    }
    if now > validity.not_after.timestamp() {
        let when = validity.not_after;
        return Err(CredentialsError(format!(
            "The certificate {} has expired: it was good until {when} (put a new one in its place)",
            path.display()
        )));
    }
    Ok(())
}

/// The endpoint's own certificate and key. `None` where there are neither.
fn identity(settings: &CredentialsSettings) -> Result<Option<Identity>> {
    let [_, _, certificate, key] = file_names(settings.endpoint);
    let (certificate_path, key_path) = (settings.dir.join(certificate), settings.dir.join(key));
    if !is_there(&certificate_path)? && !is_there(&key_path)? {
        return Ok(None);
    }
    let chain = certificates(&certificate_path, purpose(certificate))?;
    check_time(&certificate_path, &chain[0])?;
    let bytes = read(&key_path, purpose(key))?;
    if bytes.windows(ENCRYPTED.len()).any(|window| window == ENCRYPTED) {
        let what = "the key is encrypted, which is not supported; store it decrypted";
        return Err(refusal(&key_path, what, purpose(key)));
    }
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| {
        refusal(&key_path, &format!("there is no key in it that can be read: {error}"), purpose(key))
    })?;
    Ok(Some(Identity { chain, key, certificate_path, key_path }))
}

const ENCRYPTED: &[u8] = b"ENCRYPTED";

impl Identity {
    /// Says what keeps the authorities from believing us, as they would a peer.
    fn refused(&self, authorities: &Authorities, error: &rustls::Error) -> CredentialsError {
        CredentialsError(format!(
            "Our own certificate {} failed validation against {}: {} (sign it anew, or add its authority)",
            self.certificate_path.display(),
            authorities.path.display(),
            super::explain(error)
        ))
    }

    fn mismatch(certificate: &Path, key: &Path, error: &rustls::Error) -> CredentialsError {
        let why = match error {
            rustls::Error::InconsistentKeys(_) => "The certificate and the given key do not match".to_owned(),
            _ => error.to_string(),
        };
        CredentialsError(format!(
            "Cannot load certificate '{}' & key '{}': {why} (put the key there that the certificate was made for)",
            certificate.display(),
            key.display()
        ))
    }
}

fn builder_error(path: &Path, error: &impl std::fmt::Display) -> CredentialsError {
    CredentialsError(format!("Unable to use credentials {}: {error}", path.display()))
}

fn client_verifier(
    authorities: &Authorities,
    provider: &Arc<CryptoProvider>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    WebPkiClientVerifier::builder_with_provider(Arc::clone(&authorities.roots), Arc::clone(provider))
        .with_crls(revoked)
        .allow_unknown_revocation_status()
        .build()
        .map_err(|error| builder_error(&authorities.path, &error))
}

fn server(
    peers: PeerCheck,
    authorities: &Authorities,
    identity: Identity,
    provider: &Arc<CryptoProvider>,
) -> Result<ServerConfig> {
    ParsedCertificate::try_from(&identity.chain[0])
        .and_then(|parsed| {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &authorities.roots,
                &identity.chain[1..],
                UnixTime::now(),
                provider.signature_verification_algorithms.all,
            )
        })
        .map_err(|error| identity.refused(authorities, &error))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| builder_error(&authorities.path, &error))?;
    let builder = match peers {
        PeerCheck::Required => {
            let verifier = client_verifier(authorities, provider, authorities.revoked.clone())?;
            builder.with_client_cert_verifier(verifier)
        }
        PeerCheck::None => builder.with_no_client_auth(),
    };
    let Identity { chain, key, certificate_path, key_path } = identity;
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| Identity::mismatch(&certificate_path, &key_path, &error))?;
    // A session that is taken up again would pass by authorities and revocations that have changed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client(
    peers: PeerCheck,
    authorities: &Authorities,
    identity: Option<Identity>,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientConfig> {
    if let Some(identity) = &identity {
        client_verifier(authorities, provider, Vec::new())?
            .verify_client_cert(&identity.chain[0], &identity.chain[1..], UnixTime::now())
            .map_err(|error| identity.refused(authorities, &error))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| builder_error(&authorities.path, &error))?;
    let builder = match peers {
        PeerCheck::Required => {
            let roots = Arc::clone(&authorities.roots);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider))
                .with_crls(authorities.revoked.clone())
                .allow_unknown_revocation_status()
                .build()
                .map_err(|error| builder_error(&authorities.path, &error))?;
            builder.with_webpki_verifier(verifier)
        }
        PeerCheck::None => {
            let verifier = Arc::new(Believing(Arc::clone(provider)));
            builder.dangerous().with_custom_certificate_verifier(verifier)
        }
    };
    let mut config = match identity {
        Some(Identity { chain, key, certificate_path, key_path }) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| Identity::mismatch(&certificate_path, &key_path, &error))?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Believes any server that has the key of the certificate it shows: what `verify-peer=off` asks for.
#[derive(Debug)]
struct Believing(Arc<CryptoProvider>);

impl ServerCertVerifier for Believing {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
