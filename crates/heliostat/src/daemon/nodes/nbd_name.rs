//! Names of exports: `nbd:unix:PATH:exportname=NAME`, `nbd:HOST:PORT`, `nbd://HOST/NAME`, `nbd+unix:///NAME?socket=PATH`.
//!
//! Pure. As QEMU has them; `nbds` and `nbds+unix`, which it does not have, say that TLS must be used, and may say
//! `tls-certificates=FOLDER` and `tls-hostname=NAME` as libnbd's tools take them.

use std::path::PathBuf;

use super::nbd::{NbdClientSpec, NbdServerAt};

/// The port of NBD where none is said.
const PORT: &str = "10809";

/// Whether a name's first word is one of NBD's.
#[must_use]
pub fn is_nbd(word: &str) -> bool {
    matches!(word, "nbd" | "nbd+tcp" | "nbd+unix" | "nbds" | "nbds+tcp" | "nbds+unix")
}

/// What a name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedExport {
    /// The export.
    pub spec: NbdClientSpec,
    /// Whether it must be reached by TLS.
    pub is_private: bool,
    /// The folder with the certificates for that, where the name says it.
    pub certificates: Option<PathBuf>,
}

/// The export that `rest`, behind the word `word` and a colon, names.
///
/// # Errors
/// In QEMU's words.
pub fn parse(word: &str, rest: &str) -> Result<NamedExport, String> {
    let is_private = word.starts_with("nbds");
    let is_unix = word.ends_with("+unix");
    match rest.strip_prefix("//") {
        Some(address) if is_private => private_url(address, is_unix),
        Some(address) => plain(url(address, is_unix)?),
        None if word == "nbd" => plain(old(rest)?),
        None => Err(no_url()),
    }
}

fn plain(spec: NbdClientSpec) -> Result<NamedExport, String> {
    Ok(NamedExport { spec, is_private: false, certificates: None })
}

/// What stands behind `nbds://`: as behind `nbd://`, and how it is kept private.
fn private_url(address: &str, is_unix: bool) -> Result<NamedExport, String> {
    let address = address.split_once('#').map_or(address, |(address, _)| address);
    let (place, query) = address.split_once('?').unwrap_or((address, ""));
    let (mut certificates, mut host, mut others) = (None, None, Vec::new());
    for part in query.split('&') {
        match part.split_once('=') {
            Some(("tls-certificates", folder)) => certificates = Some(PathBuf::from(decoded(folder)?)),
            Some(("tls-hostname", name)) => host = Some(decoded(name)?),
            _ => others.push(part),
        }
    }
    let spec = url(&format!("{place}?{}", others.join("&")), is_unix)?;
    let spec = NbdClientSpec { tls_hostname: host, ..spec };
    Ok(NamedExport { spec, is_private: true, certificates })
}

fn no_url() -> String {
    "No valid URL specified".to_owned()
}

/// What stands behind `nbd://`.
fn url(address: &str, is_unix: bool) -> Result<NbdClientSpec, String> {
    let address = address.split_once('#').map_or(address, |(address, _)| address);
    let (address, query) = address.split_once('?').map_or((address, None), |(a, q)| (a, Some(q)));
    let (host, path) = address.split_once('/').unwrap_or((address, ""));
    let export = decoded(path)?;
    if is_unix {
        let socket = query.and_then(|query| query.strip_prefix("socket="));
        let socket = socket.filter(|socket| host.is_empty() && !socket.contains('&')).ok_or_else(no_url)?;
        return Ok(NbdClientSpec::new(NbdServerAt::Unix(PathBuf::from(decoded(socket)?)), export));
    }
    if host.is_empty() || query.is_some_and(|query| !query.is_empty()) {
        return Err(no_url());
    }
    // A user has no meaning here.
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let (host, port) = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((host, "")) => (host, PORT),
        Some((host, port)) => (host, port.strip_prefix(':').ok_or_else(no_url)?),
        None => host.split_once(':').unwrap_or((host, PORT)),
    };
    inet(&decoded(host)?, port, export)
}

/// What stands behind `nbd:`, as it was written before there were addresses like those of the web.
fn old(rest: &str) -> Result<NbdClientSpec, String> {
    let (server, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    if server.is_empty() {
        return Err("NBD server address missing".to_owned());
    }
    if let Some(path) = server.strip_prefix("unix:") {
        return Ok(NbdClientSpec::new(NbdServerAt::Unix(PathBuf::from(path)), export.to_owned()));
    }
    let unknown = || format!("error parsing address '{server}'");
    let (host, port) = match server.strip_prefix('[').and_then(|server| server.split_once("]:")) {
        Some(found) => found,
        None => server.split_once(':').ok_or_else(unknown)?,
    };
    inet(host, port, export.to_owned())
}

fn inet(host: &str, port: &str, export: String) -> Result<NbdClientSpec, String> {
    if port.is_empty() || host.is_empty() {
        return Err(no_url());
    }
    let server = NbdServerAt::Inet { host: host.to_owned(), port: port.to_owned(), others: Vec::new() };
    Ok(NbdClientSpec::new(server, export))
}

/// Puts back what `%` and two digits stand for.
fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.filter(|byte| *byte != 0).ok_or_else(no_url)?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| no_url())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str) -> Result<NamedExport, String> {
        let (word, rest) = name.split_once(':').unwrap();
        assert!(is_nbd(word), "{name}");
        parse(word, rest)
    }

    #[test]
    fn every_form_names_the_same() {
        for (name, expected) in [
            ("nbd:unix:/a/s:exportname=d", "nbd+unix:///d?socket=/a/s"),
            ("nbd:unix:/a/s", "nbd+unix://?socket=/a/s"),
            ("nbd+unix:///d?socket=/a/s", "nbd+unix:///d?socket=/a/s"),
            ("nbd+unix://?socket=/a/s", "nbd+unix://?socket=/a/s"),
            ("nbd+unix:///a%20b/c?socket=/x%20y", "nbd+unix:///a b/c?socket=/x y"),
            ("nbd:h:1:exportname=d", "nbd://h:1/d"),
            ("nbd:[::1]:1:exportname=d", "nbd://::1:1/d"),
            ("nbd://h/d", "nbd://h:10809/d"),
            ("nbd+tcp://h:2/d", "nbd://h:2/d"),
            ("nbd://[::1]:2//d", "nbd://::1:2//d"),
            ("nbd://h", "nbd://h:10809"),
            ("nbds://h/d", "nbd://h:10809/d"),
        ] {
            let named = read(name).unwrap();
            assert_eq!(named.spec.name().unwrap(), expected, "{name}");
            assert_eq!(named.is_private, name.starts_with("nbds"));
        }
    }

    #[test]
    fn only_a_private_address_says_its_certificates() {
        for (name, export, folder, host) in [
            ("nbds://h/d?tls-certificates=/a%20b", "nbd://h:10809/d", Some("/a b"), None),
            ("nbds://h/d?tls-hostname=x&tls-certificates=/a", "nbd://h:10809/d", Some("/a"), Some("x")),
            ("nbds+unix:///d?socket=/s&tls-certificates=/a", "nbd+unix:///d?socket=/s", Some("/a"), None),
            ("nbds+unix:///d?tls-hostname=x&socket=/s", "nbd+unix:///d?socket=/s", None, Some("x")),
        ] {
            let named = read(name).unwrap();
            assert_eq!(named.spec.name().unwrap(), export, "{name}");
            assert_eq!(named.certificates.as_deref(), folder.map(std::path::Path::new), "{name}");
            assert_eq!(named.spec.tls_hostname.as_deref(), host, "{name}");
        }
        for name in ["nbd://h/d?tls-certificates=/a", "nbds://h/d?tls-psk-file=/a"] {
            assert_eq!(read(name).unwrap_err(), "No valid URL specified", "{name}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused_in_qemus_words() {
        let url = "No valid URL specified";
        for (name, expected) in [
            ("nbd:", "NBD server address missing"),
            ("nbd:x", "error parsing address 'x'"),
            ("nbd://", url),
            ("nbd+unix:///d", url),
            ("nbd+unix://h/d?socket=/s", url),
            ("nbd+unix:///d?socket=/s&foo=1", url),
            ("nbd://h/d?socket=/s", url),
            ("nbd://h/%0", url),
            ("nbd://h/%00", url),
            ("nbd://h/%ff", url),
        ] {
            assert_eq!(read(name).unwrap_err(), expected, "{name}");
        }
    }
}
