//! `--chardev` and `--monitor`: where operators connect, and that they may give orders there.
//!
//! A socket listens from its option on; who connects before all options have been carried out waits for the greeting.

use std::io;
use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Refused, keyval};
use crate::control::{ControlAddress, ControlListener, ControlServer, ControlSettings, Peers, Style};
use crate::daemon::Daemon;

/// The sockets that were asked for, and what becomes of them.
#[derive(Default)]
pub(super) struct Chardevs {
    list: Vec<Chardev>,
}

struct Chardev {
    id: String,
    listener: ControlListener,
    /// Orders are taken there, laid out so.
    monitor: Option<Style>,
}

/// What QEMU knows of a socket's options. Those that make no difference here are taken and left.
const KNOWN: [&str; 20] = [
    "backend",
    "id",
    "path",
    "server",
    "wait",
    "host",
    "port",
    "abstract",
    "tight",
    "ipv4",
    "ipv6",
    "nodelay",
    "delay",
    "telnet",
    "websocket",
    "tls-creds",
    "reconnect",
    "reconnect-ms",
    "logfile",
    "mux",
];

impl Chardevs {
    /// Carries out a `--chardev`. Answers what is to be said aside.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) fn add(&mut self, text: &str, peers: &Peers) -> Result<Vec<String>, Refused> {
        let (options, warnings) = options(text)?;
        let get =
            |key: &str| options.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str());
        let backend = get("backend").unwrap_or_default();
        let id = get("id").ok_or_else(|| Refused("chardev: no id specified".to_owned()))?;
        match backend {
            "socket" => {}
            "null" | "file" | "pipe" | "pty" | "stdio" | "serial" | "udp" | "ringbuf" | "vc" | "mux"
            | "hub" | "memory" | "parallel" => {
                return Err(Refused(format!("heliostat has no char driver '{backend}', only socket")));
            }
            _ => return Err(Refused(format!("'{backend}' is not a valid char driver name"))),
        }
        if let Some((unknown, _)) = options.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(Refused(format!("Invalid parameter '{unknown}'")));
        }
        let flag = |key: &str| match get(key) {
            None | Some("off" | "no" | "false" | "n") => Ok(false),
            Some("on" | "yes" | "true" | "y") => Ok(true),
            Some(_) => Err(Refused(format!("Parameter '{key}' expects 'on' or 'off'"))),
        };
        flag("wait")?;
        if !flag("server")? {
            return Err(Refused("heliostat takes connections only: say server=on".to_owned()));
        }
        for unsupported in ["abstract", "telnet", "websocket"] {
            if flag(unsupported)? {
                return Err(Refused(format!("heliostat has no {unsupported} sockets for orders")));
            }
        }
        if get("tls-creds").is_some() {
            return Err(Refused("heliostat has no TLS yet; use a Unix socket".to_owned()));
        }
        if self.list.iter().any(|chardev| chardev.id == id) {
            return Err(Refused("duplicate yank instance".to_owned()));
        }
        let address = match (get("path"), get("host").or_else(|| get("port").map(|_| "")), get("port")) {
            (Some(path), ..) => ControlAddress::Unix(PathBuf::from(path)),
            (None, Some(host), Some(port)) => tcp(host, port)?,
            _ => return Err(Refused("chardev: socket: no path and no host and port given".to_owned())),
        };
        let settings = ControlSettings { address: address.clone(), peers: peers.clone(), style: Style::Line };
        let listener = ControlListener::bind(settings).map_err(|error| bind_text(&address, &error))?;
        self.list.push(Chardev { id: id.to_owned(), listener, monitor: None });
        Ok(warnings)
    }

    /// Carries out a `--monitor`.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) fn monitor(&mut self, text: &str) -> Result<(), Refused> {
        let pairs = keyval::pairs(text, "chardev")?;
        let get =
            |key: &str| pairs.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str());
        let id = get("chardev").ok_or_else(|| Refused("Parameter 'chardev' is missing".to_owned()))?;
        if let Some(mode) = get("mode").filter(|mode| *mode != "control") {
            return Err(Refused(match mode {
                "readline" => "'readline' monitors are not supported: say mode=control".to_owned(),
                other => format!("Parameter 'mode' does not accept value '{other}'"),
            }));
        }
        let style = match get("pretty") {
            None | Some("off") => Style::Line,
            Some("on") => Style::Pretty,
            Some(_) => return Err(Refused("Parameter 'pretty' expects 'on' or 'off'".to_owned())),
        };
        let unknown =
            pairs.iter().find(|(key, _)| !["chardev", "mode", "pretty", "id"].contains(&key.as_str()));
        if let Some((unknown, _)) = unknown {
            return Err(Refused(format!("Parameter '{unknown}' is unexpected")));
        }
        let chardev = self.list.iter_mut().find(|chardev| chardev.id == id);
        let chardev = chardev.ok_or_else(|| Refused(format!("chardev \"{id}\" not found")))?;
        if chardev.monitor.replace(style).is_some() {
            return Err(Refused(format!("chardev '{id}' is already in use")));
        }
        Ok(())
    }

    /// Takes orders from now on, where there is a monitor. Sockets without one go on listening, unanswered.
    ///
    /// # Errors
    /// [`Refused`] where the host has no thread for it.
    pub(super) fn serve(
        self,
        daemon: &Arc<Daemon>,
    ) -> Result<(Vec<ControlServer>, Vec<ControlListener>), Refused> {
        let (mut servers, mut silent) = (Vec::new(), Vec::new());
        for chardev in self.list {
            match chardev.monitor {
                Some(style) => {
                    let server = ControlServer::serve(chardev.listener.with_style(style), Arc::clone(daemon));
                    servers.push(server.map_err(|error| Refused(format!("cannot take orders: {error}")))?);
                }
                None => silent.push(chardev.listener),
            }
        }
        Ok((servers, silent))
    }
}

/// Keys with their values.
type Pairs = Vec<(String, String)>;

/// Keys with their values, and warnings about short forms: `server` for `server=on`, `nowait` for `wait=off`.
fn options(text: &str) -> Result<(Pairs, Vec<String>), Refused> {
    let mut warnings = Vec::new();
    let mut long = Vec::new();
    for (index, part) in text.replace(",,", "\u{0}").split(',').enumerate() {
        let part = part.replace('\u{0}', ",,");
        if index == 0 || part.contains('=') || part.is_empty() {
            long.push(part);
            continue;
        }
        let said = match part.strip_prefix("no") {
            Some("delay" | "") | None => format!("{part}=on"),
            Some(name) => format!("{name}=off"),
        };
        warnings.push(format!(
            "warning: short-form boolean option '{part}' deprecated\nPlease use {said} instead"
        ));
        long.push(said);
    }
    Ok((keyval::pairs(&long.join(","), "backend")?, warnings))
}

fn tcp(host: &str, port: &str) -> Result<ControlAddress, Refused> {
    let failed = |why: &str| Refused(format!("address resolution failed for {host}:{port}: {why}"));
    let number = port.parse::<u16>().map_err(|_| failed("Servname not supported for ai_socktype"))?;
    let found = (host, number).to_socket_addrs().map_err(|_| failed("Name or service not known"))?;
    let mut found: Vec<_> = found.collect();
    // An IPv4 address first, as clients try it.
    found.sort_by_key(|address| !address.is_ipv4());
    found.first().copied().map(ControlAddress::Tcp).ok_or_else(|| failed("Name or service not known"))
}

fn bind_text(address: &ControlAddress, error: &io::Error) -> Refused {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => "No such file or directory",
        io::ErrorKind::AddrInUse => "Address already in use",
        io::ErrorKind::AddrNotAvailable => "Cannot assign requested address",
        // Ours, for addresses that others can reach, says why.
        io::ErrorKind::PermissionDenied if matches!(address, ControlAddress::Unix(_)) => "Permission denied",
        _ => return Refused(error.to_string()),
    };
    Refused(match address {
        ControlAddress::Unix(path) => format!("Failed to bind socket to {}: {reason}", path.display()),
        ControlAddress::Tcp(address) => format!("Failed to bind socket to {address}: {reason}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        match Chardevs::default().add(text, &Peers::none()) {
            Ok(_) => panic!("{text} was taken"),
            Err(Refused(text)) => text,
        }
    }

    #[test]
    fn what_is_wrong_with_a_socket_is_said() {
        for (text, what) in [
            ("socket", "chardev: no id specified"),
            ("zork,id=c", "'zork' is not a valid char driver name"),
            ("stdio,id=c", "heliostat has no char driver 'stdio', only socket"),
            ("socket,id=c,path=/x,server=on,wait=maybe", "Parameter 'wait' expects 'on' or 'off'"),
            ("socket,id=c,path=/x,server=on,zork=1", "Invalid parameter 'zork'"),
            ("socket,id=c,path=/x", "heliostat takes connections only: say server=on"),
            (
                "socket,id=c,path=/nonexistent/x,server=on,wait=off",
                "Failed to bind socket to /nonexistent/x: No such file or directory",
            ),
            (
                "socket,id=c,host=0.0.0.0,port=0,server=on",
                "0.0.0.0:0 can be reached from other hosts, and nobody is asked for a password; listen on 127.0.0.1 or \
                 [::1], or on a Unix socket, and let others in by a tunnel (ssh -L)",
            ),
        ] {
            assert_eq!(refused(text), what, "{text}");
        }
    }

    #[test]
    fn short_forms_are_taken_with_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c,c");
        let text =
            format!("socket,id=c,path={},server,nowait", path.display().to_string().replace(',', ",,"));
        let mut chardevs = Chardevs::default();
        assert_eq!(chardevs.add(&text, &Peers::none()).unwrap().len(), 2);
        assert!(path.exists());
        assert_eq!(chardevs.monitor("x"), Err(Refused("chardev \"x\" not found".to_owned())));
        assert_eq!(chardevs.monitor("c,pretty=on"), Ok(()));
        assert_eq!(chardevs.monitor("chardev=c"), Err(Refused("chardev 'c' is already in use".to_owned())));
    }
}
