//! `heliostat storage-daemon`: takes the options of `qemu-storage-daemon`, in their order, and does what they say.
//!
//! Each option is a QMP command in other words, and is carried out as one. Errors are QEMU's, with the option before
//! them. Called by the command line; also when the program is called `qemu-storage-daemon`.

mod background;
mod chardev;
mod keyval;
mod options;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use self::background::PidFile;
use self::chardev::Chardevs;
use self::options::{Given, Name};
use super::ending;
use super::output::{self, say};
use super::serve::notify;
use crate::control::schema::{self, NBD_SERVER_OPTIONS};
use crate::control::{self, Arguments, ControlListener, ControlServer, Peer, Peers};
use crate::daemon::{Daemon, Gate, Probing};

/// The name under which QEMU's daemon is started.
pub const QEMU_NAME: &str = "qemu-storage-daemon";

/// Why an option is refused; the option is put before it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refused(String);

/// Does what `arguments` say, until the end is asked for. `program` is put before what is said, and `before` comes
/// before the arguments when the program is started once more.
#[must_use]
pub fn main(program: &str, before: &[String], arguments: &[String]) -> ExitCode {
    match run(program, before, arguments) {
        Ok(code) => code,
        Err(Refused(text)) => {
            say(format_args!("{program}: {text}"));
            ExitCode::FAILURE
        }
    }
}

fn run(program: &str, before: &[String], arguments: &[String]) -> Result<ExitCode, Refused> {
    let given = options::read(arguments)?;
    let has = |name| given.iter().any(|option| option.name == name);
    if let Some(first) = given.iter().find(|option| matches!(option.name, Name::Help | Name::Version)) {
        let text = match first.name {
            Name::Help => HELP.replace("PROGRAM", program),
            _ => format!(
                "{program} version {} (heliostat {})",
                control::qemu_version(),
                env!("CARGO_PKG_VERSION")
            ),
        };
        output::result(&text).map_err(|error| Refused(format!("{error:#}")))?;
        return Ok(ExitCode::SUCCESS);
    }
    if has(Name::Daemonize) && !has(Name::InBackground) {
        return background::start(before, arguments);
    }
    let failed = |error: anyhow::Error| Refused(format!("{error:#}"));
    let mut signals = ending::signals().map_err(failed)?;
    let daemon = Daemon::with_gate(gate(&given)?);
    let up = match bring_up(program, &daemon, &given) {
        Ok(up) => up,
        Err(refused) => {
            // What was opened so far is closed in order. Why it ends has been found already.
            let _ = daemon.shutdown();
            return Err(refused);
        }
    };
    if has(Name::InBackground) {
        background::settle()?;
    }
    notify(&[sd_notify::NotifyState::Ready]);
    ending::wait(&daemon, &mut signals).map_err(failed)?;
    notify(&[sd_notify::NotifyState::Stopping]);
    let outcome = ending::end(&daemon, &mut signals);
    up.servers.into_iter().for_each(ControlServer::stop);
    outcome.map(|outcome| ExitCode::from(outcome.status())).map_err(failed)
}

/// What lives as long as the daemon does.
struct Up {
    servers: Vec<ControlServer>,
    _silent: Vec<ControlListener>,
    _pid_file: Option<PidFile>,
}

/// What images may open, and who may give orders: ours, and wanted before anything is opened.
fn gate(given: &[Given]) -> Result<Gate, Refused> {
    let values = |name| given.iter().filter(move |option| option.name == name).map(|option| &option.value);
    let paths: Vec<_> = values(Name::AllowPath).map(PathBuf::from).collect();
    let probes = given.iter().any(|option| option.name == Name::ProbeBacking);
    let probing = if probes { Probing::Allowed } else { Probing::Refused };
    Gate::new(&paths, probing).map_err(|(path, error)| {
        Refused(format!("--allow-path {}: there is no such directory: {error}", path.display()))
    })
}

fn bring_up(program: &str, daemon: &Arc<Daemon>, given: &[Given]) -> Result<Up, Refused> {
    let peers: Result<Vec<Peer>, _> = given
        .iter()
        .filter(|option| option.name == Name::ControlAllow)
        .map(|option| option.value.parse().map_err(|text| Refused(format!("{}: {text}", option.written))))
        .collect();
    let peers = Peers::new(peers?);
    let mut chardevs = Chardevs::default();
    let mut pid_path = None;
    // Whoever finds the server finds its exports.
    daemon.hold_clients();
    for option in given {
        let in_place = |Refused(text)| Refused(format!("{}: {text}", option.written));
        let warn = |text: &str| say(format_args!("{program}: {}: {text}", option.written));
        match option.name {
            Name::Blockdev => command(daemon, "blockdev-add", "driver", &option.value),
            Name::Export => command(daemon, "block-export-add", "type", &option.value),
            Name::NbdServer => nbd_server(daemon, &option.value),
            Name::Object => object(daemon, &option.value),
            Name::Chardev => chardevs
                .add(&option.value, &peers)
                .map(|warnings| warnings.iter().for_each(|warning| warn(warning))),
            Name::Monitor => chardevs.monitor(&option.value),
            Name::Trace => {
                warn("warning: heliostat has no trace events; ignored");
                Ok(())
            }
            Name::Pidfile => {
                pid_path = Some(Path::new(&option.value));
                Ok(())
            }
            _ => Ok(()),
        }
        .map_err(in_place)?;
    }
    daemon.let_clients_in();
    let pid_file = pid_path.map(PidFile::write).transpose()?;
    let (servers, silent) = chardevs.serve(daemon)?;
    Ok(Up { servers, _silent: silent, _pid_file: pid_file })
}

/// Carries a command out whose arguments are an option's value.
fn command(daemon: &Arc<Daemon>, name: &str, implied: &str, text: &str) -> Result<(), Refused> {
    let Some(command) = schema::find(name) else { return Err(Refused(format!("heliostat has no {name}"))) };
    let arguments = keyval::read(text, implied, command.takes)?;
    execute(daemon, name, &arguments, text)
}

fn execute(
    daemon: &Arc<Daemon>,
    name: &str,
    arguments: &Map<String, Value>,
    text: &str,
) -> Result<(), Refused> {
    let done = control::execute(daemon, name, arguments);
    done.map(|_| ()).map_err(|refusal| refused(refusal.text(), text))
}

fn refused(why: &str, text: &str) -> Refused {
    Refused(if text.starts_with('{') { why.to_owned() } else { keyval::as_option(why) })
}

/// On the command line an address has its members beside its type; QMP's has them one deeper.
fn nbd_server(daemon: &Arc<Daemon>, text: &str) -> Result<(), Refused> {
    let mut arguments = keyval::read(text, "", &NBD_SERVER_OPTIONS)?;
    Arguments::check(&arguments, &NBD_SERVER_OPTIONS).map_err(|refusal| refused(refusal.text(), text))?;
    if let Some(Value::Object(mut address)) = arguments.remove("addr") {
        let kind = address.remove("type").unwrap_or_default();
        if let (Some("fd"), Some(number)) = (kind.as_str(), address.get("str").and_then(Value::as_str)) {
            let parsed = number.parse();
            daemon.pass_descriptor(
                parsed.map_err(|_| refused(&format!("Unable to parse FD number {number}"), text))?,
            );
        }
        arguments.insert("addr".to_owned(), json!({ "type": kind, "data": address }));
    }
    execute(daemon, "nbd-server-start", &arguments, text)
}

fn object(daemon: &Arc<Daemon>, text: &str) -> Result<(), Refused> {
    let kind = match text.starts_with('{') {
        true => String::new(),
        false => keyval::pairs(text, "qom-type")?
            .into_iter()
            .find(|(key, _)| key == "qom-type")
            .map(|(_, value)| value)
            .ok_or_else(|| Refused("Parameter 'qom-type' is missing".to_owned()))?,
    };
    if kind == "secret" || kind == "secret_keyring" {
        return Err(Refused(format!("heliostat has no encryption, so it takes no '{kind}'")));
    }
    if matches!(kind.as_str(), "tls-creds-psk" | "tls-creds-anon" | "tls-cipher-suites") {
        return Err(Refused(format!(
            "heliostat's TLS knows certificates only: it takes no '{kind}', but tls-creds-x509"
        )));
    }
    if schema::find("object-add").is_none() {
        return Err(Refused(format!("Parameter 'qom-type' does not accept value '{kind}'")));
    }
    command(daemon, "object-add", "qom-type", text)
}

const HELP: &str = "\
Usage: PROGRAM [options]
Serves disks, takes orders over QMP, mirrors; with the options of qemu-storage-daemon.

  -h, --help             display this help and exit
  -V, --version          output version information and exit
  -T, --trace ...        accepted, of no effect

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         open a node; also as a JSON object, as in QMP's
                         blockdev-add

  --chardev [backend=]socket,id=<id>,path=<path>,server=on[,wait=off]
  --chardev [backend=]socket,id=<id>,host=<host>,port=<port>,server=on[,wait=off]
                         listen for operators; over TCP on this host's
                         loopback only; never waits for one

  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         take QMP commands there, from any number of clients

  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=fd,addr.str=<number>[,max-connections=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
               [,tls-creds=<id>][,tls-authz=<id>]
                         start an NBD server for exporting nodes

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,writable=on|off]
                         offer a node over NBD (requires --nbd-server)

  --object [qom-type=]<type>,id=<id>[,<property>=<value>...]
                         make an object: throttle-group, tls-creds-x509,
                         authz-simple, authz-list

  --daemonize            go into the background once all of this is done
  --pidfile <path>       write the process id to a file once all of this is done

Not in qemu-storage-daemon:

  --allow-path <dir>     let images open backing and data files in this
                         directory, beside those in their own
  --probe-backing        guess the format of a backing file where the image
                         does not say it
  --control-allow user:<name>|group:<name>
                         let these give orders on Unix sockets, too
";
