//! Where to listen, as people type it; and the rule that a disk is offered to this host only, unless asked.
//!
//! Looks names up; opens nothing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use heliostat_host::socket::{Address, Listener};

use super::activation;
use crate::daemon::NbdAddress;

/// An address as it was typed: `unix:PATH`, a path with a slash, `HOST:PORT` or `:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP. The host may be a name; none is this host's own loopback address.
    Tcp {
        /// A name or an address.
        host: Option<String>,
        /// The port; 0 lets the host choose.
        port: u16,
    },
    /// Sockets that whoever started this program has bound.
    Inherited(Which),
}

/// Which of the sockets that this program was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one with this descriptor.
    Number(i32),
    /// Those that a service manager has passed on under this name.
    Named(String),
    /// All that a service manager has passed on.
    All,
}

/// How clients speak to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// In plain text.
    Plain,
    /// Inside TLS.
    Tls,
}

/// Who may reach a TCP address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Programs on this host.
    Loopback,
    /// Anybody who can reach this host (`--allow-remote`, or TLS that asks for certificates).
    Anybody,
}

/// Why nothing can listen there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressError {
    /// A name that nobody knows.
    Unknown {
        /// The host.
        host: String,
        /// What the host's resolver said.
        reason: String,
    },
    /// Others than this host could reach it.
    Remote(SocketAddr),
    /// A socket that this program was started with is of no use.
    Inherited(String),
    /// No such socket was passed on.
    NotPassed(Which),
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { host, reason } => write!(f, "cannot find the host \"{host}\": {reason}"),
            Self::Inherited(reason) => f.write_str(reason),
            Self::NotPassed(Which::Named(name)) => {
                write!(f, "no socket was passed on under the name \"{name}\" (LISTEN_FDNAMES)")
            }
            Self::NotPassed(_) => f.write_str("no socket was passed on (LISTEN_PID, LISTEN_FDS)"),
            Self::Remote(address) => write!(
                f,
                "{address} can be reached from other hosts, and NBD asks nobody for a password; \
                 add TLS that asks for certificates (--tls-dir without --tls-any-client), or --allow-remote if \
                 anybody may come"
            ),
        }
    }
}

impl std::error::Error for AddressError {}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unix = |path: &str| match path {
            "" => Err("the path of the socket is missing".to_owned()),
            path => Ok(Self::Unix(PathBuf::from(path))),
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return unix(path);
        }
        if text.contains('/') {
            return unix(text);
        }
        match text.strip_prefix("fd:") {
            Some("") => return Err("write fd:NUMBER, fd:NAME or fd:all".to_owned()),
            Some("all") => return Ok(Self::Inherited(Which::All)),
            Some(name) => {
                return Ok(Self::Inherited(match name.parse() {
                    Ok(number) => Which::Number(number),
                    Err(_) => Which::Named(name.to_owned()),
                }));
            }
            None => {}
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err("write unix:PATH, a path with a slash, HOST:PORT, :PORT or fd:NUMBER".to_owned());
        };
        let port = port.parse().map_err(|_| format!("\"{port}\" is no port; ports go from 0 to 65535"))?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if bare.contains(':') && bare == host {
            return Err(format!("write the IPv6 address in brackets: [{host}]:{port}"));
        }
        Ok(Self::Tcp { host: (!bare.is_empty()).then(|| bare.to_owned()), port })
    }
}

impl Endpoint {
    /// Finds the addresses, one but for sockets that were passed on, and refuses one beyond `reach`.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn resolve(&self, reach: Reach) -> Result<Vec<NbdAddress>, AddressError> {
        match self {
            Self::Unix(path) => Ok(vec![NbdAddress::Unix(path.clone())]),
            Self::Tcp { host: None, port } => {
                Ok(vec![NbdAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, *port)))])
            }
            Self::Tcp { host: Some(host), port } => look_up(host, *port, reach).map(|found| vec![found]),
            Self::Inherited(which) => inherited(which, reach),
        }
    }
}

fn look_up(host: &str, port: u16, reach: Reach) -> Result<NbdAddress, AddressError> {
    let unknown = |reason: String| AddressError::Unknown { host: host.to_owned(), reason };
    let found = match host.parse::<IpAddr>() {
        Ok(address) => SocketAddr::from((address, port)),
        Err(_) => (host, port)
            .to_socket_addrs()
            .map_err(|error| unknown(error.to_string()))?
            .next()
            .ok_or_else(|| unknown("it has no address".to_owned()))?,
    };
    if reach == Reach::Loopback && !found.ip().is_loopback() {
        return Err(AddressError::Remote(found));
    }
    Ok(NbdAddress::Tcp(found))
}

fn inherited(which: &Which, reach: Reach) -> Result<Vec<NbdAddress>, AddressError> {
    let passed = || activation::sockets(std::process::id(), |name| std::env::var(name).ok());
    let numbers: Vec<i32> = match which {
        Which::Number(number) => vec![*number],
        Which::Named(name) => {
            let of_name = passed().into_iter().filter(|passed| passed.name == *name);
            of_name.map(|passed| passed.number).collect()
        }
        Which::All => passed().into_iter().map(|passed| passed.number).collect(),
    };
    if numbers.is_empty() {
        return Err(AddressError::NotPassed(which.clone()));
    }
    for number in &numbers {
        let listener =
            Listener::inherited(*number).map_err(|error| AddressError::Inherited(error.to_string()))?;
        if let (Address::Tcp(address), Reach::Loopback) = (listener.address(), reach)
            && !address.ip().is_loopback()
        {
            return Err(AddressError::Remote(*address));
        }
    }
    Ok(numbers.into_iter().map(NbdAddress::Inherited).collect())
}

/// How a client names an export at `address`.
#[must_use]
pub fn nbd_uri(scheme: Scheme, address: &Address, export: &str) -> String {
    let export = percent_encode(export);
    let scheme = match scheme {
        Scheme::Plain => "nbd",
        Scheme::Tls => "nbds",
    };
    match address {
        Address::Unix(path) => {
            format!("{scheme}+unix:///{export}?socket={}", percent_encode(&path.to_string_lossy()))
        }
        Address::Tcp(address) => format!("{scheme}://{address}/{export}"),
    }
}

/// Leaves what a URI may hold unescaped, slashes included.
fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: Option<&str>, port: u16) -> Endpoint {
        Endpoint::Tcp { host: host.map(str::to_owned), port }
    }

    #[test]
    fn each_form_is_understood() {
        let table = [
            ("unix:s", Endpoint::Unix("s".into())),
            ("unix:/run/a:1", Endpoint::Unix("/run/a:1".into())),
            ("./s", Endpoint::Unix("./s".into())),
            (":10809", tcp(None, 10809)),
            ("localhost:0", tcp(Some("localhost"), 0)),
            ("[::1]:10809", tcp(Some("::1"), 10809)),
            ("fd:3", Endpoint::Inherited(Which::Number(3))),
            ("fd:nbd", Endpoint::Inherited(Which::Named("nbd".to_owned()))),
            ("fd:all", Endpoint::Inherited(Which::All)),
            ("./fd:3", Endpoint::Unix("./fd:3".into())),
            ("192.0.2.1:65535", tcp(Some("192.0.2.1"), 65535)),
        ];
        for (text, endpoint) in table {
            assert_eq!(text.parse(), Ok(endpoint), "{text}");
        }
    }

    #[test]
    fn bad_addresses_are_refused_with_what_to_write_instead() {
        for text in ["", "unix:", "fd:", "10809", "host", "host:", "host:99999", "host:http", "::1:10809"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        let error = "::1:10809".parse::<Endpoint>().unwrap_err();
        assert!(error.contains("[::1]:10809"), "{error}");
    }

    #[test]
    fn an_address_beyond_this_host_must_be_asked_for() {
        for text in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert!(matches!(endpoint.resolve(Reach::Loopback), Err(AddressError::Remote(_))), "{text}");
            assert!(endpoint.resolve(Reach::Anybody).is_ok());
        }
        for text in ["127.0.0.1:1", "[::1]:1", ":1"] {
            assert!(text.parse::<Endpoint>().unwrap().resolve(Reach::Loopback).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_uri_names_the_export_and_the_socket() {
        let unix = Address::Unix("/tmp/a b/s".into());
        assert_eq!(nbd_uri(Scheme::Plain, &unix, "disk"), "nbd+unix:///disk?socket=/tmp/a%20b/s");
        let tcp = Address::Tcp("127.0.0.1:10809".parse().unwrap());
        assert_eq!(nbd_uri(Scheme::Plain, &tcp, ""), "nbd://127.0.0.1:10809/");
        assert_eq!(nbd_uri(Scheme::Tls, &tcp, ""), "nbds://127.0.0.1:10809/");
    }
}
