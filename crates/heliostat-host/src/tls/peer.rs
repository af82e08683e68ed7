//! [`Peer`]: who a peer is by its certificate. Called when a handshake is over; decides nothing.

use std::fmt::Write as _;
use std::io;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use x509_parser::asn1_rs::{Tag, ToDer};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// Who a peer is. Its certificate has been verified, if that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The distinguished name in QEMU's form: the parts in the order of the certificate, escaped as
    /// [RFC 4514](https://www.rfc-editor.org/rfc/rfc4514) says: `C=GB,O=Example,CN=client`.
    pub name: String,
    /// SHA-256 of the whole certificate.
    pub fingerprint: [u8; 32],
}

impl Peer {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> io::Result<Self> {
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, certificate).as_ref());
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "the peer's certificate cannot be read")
        })?;
        Ok(Self { name: distinguished_name(parsed.subject()), fingerprint })
    }
}

/// The name as GnuTLS writes it, which is what QEMU compares.
pub(super) fn distinguished_name(name: &X509Name<'_>) -> String {
    let mut text = String::new();
    for part in name.iter() {
        if !text.is_empty() {
            text.push(',');
        }
        for (index, attribute) in part.iter().enumerate() {
            if index > 0 {
                text.push('+');
            }
            put_attribute(&mut text, attribute);
        }
    }
    text
}

fn put_attribute(text: &mut String, attribute: &AttributeTypeAndValue<'_>) {
    let id = attribute.attr_type().to_id_string();
    let value = attribute.attr_value();
    let label = label(&id);
    text.push_str(label.unwrap_or(&id));
    // A country that is no printable string is malformed, and GnuTLS does not read it.
    let is_sound = label.is_some_and(|label| label != "C" || value.tag() == Tag::PrintableString);
    match attribute.as_str() {
        Ok(value) if is_sound => {
            text.push('=');
            put_escaped(text, value);
        }
        // What has no name or no text is written as it is encoded.
        _ => {
            text.push_str("=#");
            for byte in value.to_der_vec().unwrap_or_default() {
                let _ = write!(text, "{byte:02x}");
            }
        }
    }
}

fn put_escaped(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let is_edge = match character {
            ' ' => index == 0 || index == last,
            '#' => index == 0,
            _ => false,
        };
        if is_edge || matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            text.push('\\');
        }
        text.push(character);
    }
}

/// GnuTLS's name of an attribute.
fn label(id: &str) -> Option<&'static str> {
    Some(match id {
        "2.5.4.3" => "CN",
        "2.5.4.4" => "surName",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "street",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.12" => "title",
        "2.5.4.13" => "description",
        "2.5.4.17" => "postalCode",
        "2.5.4.41" => "name",
        "2.5.4.42" => "givenName",
        "2.5.4.43" => "initials",
        "2.5.4.46" => "dnQualifier",
        "2.5.4.65" => "pseudonym",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        "1.2.840.113549.1.9.1" => "EMAIL",
        _ => return None,
    })
}
