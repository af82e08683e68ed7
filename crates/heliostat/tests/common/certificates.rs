//! Certificates in QEMU's folder layout, made by the test that uses them.

#![allow(dead_code, reason = "each test file uses only its part of this")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// An authority, and a folder for each of those that it signs for.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

/// When a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Now,
    Past,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, folder: super::folder() }
    }

    /// A folder with a server's certificate for `localhost` and 127.0.0.1.
    pub fn server(&self) -> PathBuf {
        self.issue("server", "localhost", When::Now)
    }

    /// A folder with the certificate of the client `C=GB,O=Example,CN=name`.
    pub fn client(&self, name: &str) -> PathBuf {
        self.issue("client", name, When::Now)
    }

    /// A folder with nothing but the authority's certificate.
    pub fn nobody(&self) -> PathBuf {
        let path = self.folder.path().join("nobody");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("ca-cert.pem"), self.issuer.pem()).unwrap();
        path
    }

    /// A folder of a server or a client of that name.
    pub fn issue(&self, side: &str, name: &str, when: When) -> PathBuf {
        let path = self.folder.path().join(format!("{side} {name}"));
        fs::create_dir_all(&path).unwrap();
        self.issue_into(&path, side, name, when);
        path
    }

    /// The same, in place of what is there.
    pub fn issue_into(&self, path: &Path, side: &str, name: &str, when: When) {
        let is_server = side == "server";
        let names: Vec<String> =
            if is_server { vec![name.to_owned(), "127.0.0.1".to_owned()] } else { Vec::new() };
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CountryName, DnValue::PrintableString("GB".try_into().unwrap()));
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, name);
        // The second one is what QEMU insists on.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![match is_server {
            true => ExtendedKeyUsagePurpose::ServerAuth,
            false => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if when == When::Past {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        // The key first: a certificate without its key is no use to anybody.
        fs::write(path.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
        fs::write(path.join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
        fs::write(path.join("ca-cert.pem"), self.issuer.pem()).unwrap();
    }
}
