//! [`Control`]: a connection to a daemon's control socket: commands out, answers and events in.
//!
//! Speaks QMP, so that it works with any daemon that does. Blocking, and every wait has an end. Used by `job`.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// How long an answer may take. Commands are answered at once, or something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest message that is taken: a daemon with every bound reached says less.
const MESSAGE_MAX: usize = 16 << 20;

/// Events that are kept while an answer is waited for; the oldest go.
const EVENTS_MAX: usize = 1024;

/// A connection to a daemon.
pub struct Control {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
}

/// The daemon's answer to a command that it did not carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its class: `GenericError` mostly.
    pub class: String,
    /// Its words.
    pub description: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.description)
    }
}

impl std::error::Error for Refusal {}

impl Control {
    /// Connects, and gets through the greeting.
    ///
    /// # Errors
    /// When nobody listens there, or who does speaks no QMP.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| explain(socket, &error))?;
        let mut control = Self { stream, unread: Vec::new(), events: VecDeque::new(), next_id: 0 };
        let greeting = control.message(PATIENCE).with_context(|| no_greeting(socket))?;
        if greeting.get("QMP").is_none() {
            if let Some(why) = greeting["error"]["desc"].as_str() {
                bail!("{} lets us in no further: {why}", socket.display());
            }
            bail!("{} is no control socket: who listens there does not speak QMP", socket.display());
        }
        control.execute("qmp_capabilities", json!({}))?;
        Ok(control)
    }

    /// Executes a command. Events that come first are kept.
    ///
    /// # Errors
    /// A [`Refusal`] with the daemon's words; anything else when the connection is of no use any more.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next_id += 1;
        let id = json!(self.next_id);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.stream.set_write_timeout(Some(PATIENCE))?;
        self.stream.write_all(line.as_bytes()).context("the daemon takes no command")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.message(left).with_context(|| format!("no answer to {command}"))?;
            if message.get("event").is_some() {
                self.keep(message);
            } else if message.get("id") == Some(&id) {
                return answer(message);
            }
        }
    }

    /// Waits for the next event, at most for `limit`.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn event(&mut self, limit: Duration) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.message(deadline.saturating_duration_since(Instant::now())) {
                Ok(message) if message.get("event").is_some() => return Ok(Some(message)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
                Err(error) => return Err(error).context("the daemon has gone"),
            }
        }
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn message(&mut self, limit: Duration) -> io::Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(io::Error::from);
            }
            let is_message =
                self.unread.first().is_none_or(|byte| matches!(byte, b'{' | b'\r' | b'\n' | b' '));
            if !is_message || self.unread.len() > MESSAGE_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "what it sends is no message"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // A timeout of zero would mean none.
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
                }
                Ok(count) => self.unread.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= deadline {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "no message came in time"));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn answer(mut message: Value) -> Result<Value> {
    if let Some(value) = message.get_mut("return") {
        return Ok(value.take());
    }
    let text = |name: &str| message["error"][name].as_str().unwrap_or_default().to_owned();
    Err(Refusal { class: text("class"), description: text("desc") }.into())
}

fn explain(socket: &Path, error: &io::Error) -> anyhow::Error {
    let path = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "no daemon at {path}: there is no such socket; start one with `heliostat serve … --control {path}`"
        ),
        io::ErrorKind::ConnectionRefused => anyhow!(
            "no daemon at {path}: nobody listens on this socket any more; start one with `heliostat serve … \
             --control {path}`"
        ),
        io::ErrorKind::PermissionDenied => {
            anyhow!("may not use {path}: {error}; ask whoever runs the daemon")
        }
        _ => anyhow!("cannot connect to {path}: {error}"),
    }
}

fn no_greeting(socket: &Path) -> String {
    format!("{} did not greet as a daemon does; is it a control socket?", socket.display())
}
