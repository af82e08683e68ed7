//! [`Qmp`]: a control client that works with ours and with `qemu-storage-daemon` alike.
//!
//! Blocking, one connection, every wait with a deadline. Used by end to end tests and by the benchmarks, where
//! the same code drives both daemons. Knows the envelope of the protocol, not its commands.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wait;

/// Why a command brought no answer.
#[derive(Debug)]
pub enum QmpError {
    /// The daemon refused it.
    Refused {
        /// The error class, `GenericError` mostly.
        class: String,
        /// The text for people.
        description: String,
    },
    /// The connection is closed, silent past the deadline, or sends what is no message.
    Broken(io::Error),
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { class, description } => write!(f, "{class}: {description}"),
            Self::Broken(error) => write!(f, "control connection: {error}"),
        }
    }
}

impl std::error::Error for QmpError {}

impl From<io::Error> for QmpError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// A connection to a control socket.
pub struct Qmp {
    stream: UnixStream,
    /// What has arrived and is not a whole line yet, or not taken.
    unread: Vec<u8>,
    /// Events that arrived while something else was waited for.
    events: VecDeque<Value>,
    greeting: Value,
    next_id: u64,
}

impl Qmp {
    /// Connects as soon as somebody listens, reads the greeting and negotiates.
    ///
    /// # Errors
    /// [`QmpError::Broken`] when that has not happened within [`wait::LIMIT`].
    pub fn connect(socket: &Path) -> Result<Self, QmpError> {
        let mut qmp = Self::greeted(wait::for_socket(socket)?)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Takes over a fresh connection and reads the greeting; the negotiation is left to the caller.
    ///
    /// # Errors
    /// [`QmpError::Broken`] without a greeting.
    pub fn greeted(stream: UnixStream) -> Result<Self, QmpError> {
        let mut qmp =
            Self { stream, unread: Vec::new(), events: VecDeque::new(), greeting: Value::Null, next_id: 0 };
        qmp.greeting = qmp.read_message(wait::LIMIT)?;
        Ok(qmp)
    }

    /// The daemon's first message.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Executes a command and returns what it answers. Events that come first are kept.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with the daemon's words, or [`QmpError::Broken`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.next_id += 1;
        let id = json!(self.next_id);
        self.send(&json!({ "execute": command, "arguments": arguments, "id": id }).to_string())?;
        let deadline = Instant::now() + wait::LIMIT;
        loop {
            let mut message = self.read_message(left(deadline))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("id") == Some(&id) {
                return answer(&mut message);
            }
        }
    }

    /// Executes a command without arguments `count` times, sending on without waiting for answers, and reads those.
    ///
    /// # Errors
    /// The connection's; `TimedOut` when they are not all there after `limit`.
    pub fn pipeline(&mut self, command: &str, count: u32, limit: Duration) -> io::Result<()> {
        let text = format!("{{\"execute\": \"{command}\"}}\n");
        let mut sending = self.stream.try_clone()?;
        sending.set_write_timeout(Some(limit))?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let batch = text.repeat(50);
                let whole = (0..count / 50).try_for_each(|_| sending.write_all(batch.as_bytes()));
                let rest = usize::try_from(count % 50).expect("less than 50");
                whole.and_then(|()| sending.write_all(text.repeat(rest).as_bytes()))
            });
            let deadline = Instant::now() + limit;
            let mut answers = 0;
            let mut read = 0;
            while answers < count {
                // Counted, not read: the client is not what is measured.
                let mut piece = [0; 65536];
                self.stream.set_read_timeout(Some(left(deadline).max(Duration::from_millis(1))))?;
                match self.stream.read(&mut piece) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(len) => {
                        read += len;
                        let ends = piece[..len].iter().filter(|byte| **byte == b'\n').count();
                        answers += u32::try_from(ends).expect("fewer than bytes");
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        return Err(io::Error::new(error.kind(), format!("after {read} bytes: {error}")));
                    }
                }
            }
            sender.join().expect("sending does not panic")
        })
    }

    /// Sends a text as it stands and a line's end: for tests of what is no proper command.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, text: &str) -> io::Result<()> {
        self.stream.set_write_timeout(Some(wait::LIMIT))?;
        // At once: who has understood `quit` may be gone before a newline that comes after it.
        self.stream.write_all(format!("{text}\n").as_bytes())
    }

    /// Reads the next message of any kind, passing by the events that are kept.
    ///
    /// # Errors
    /// `TimedOut` after `limit`, `UnexpectedEof` at the connection's end, `InvalidData` for what is no JSON.
    pub fn read_message(&mut self, limit: Duration) -> io::Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(io::Error::from);
            }
            let mut piece = [0; 4096];
            // A timeout of zero would mean none.
            self.stream.set_read_timeout(Some(left(deadline).max(Duration::from_millis(1))))?;
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.unread.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "no message came"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for the first event of this name that was not taken yet, and takes it; others stay.
    ///
    /// # Errors
    /// `TimedOut` after `limit`; the connection's.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> io::Result<Value> {
        self.wait_any_event(&[name], limit)
    }

    /// Waits for the first event that has one of these names and was not taken yet, and takes it; others stay.
    ///
    /// # Errors
    /// As [`Qmp::wait_event`].
    pub fn wait_any_event(&mut self, names: &[&str], limit: Duration) -> io::Result<Value> {
        let is_it = |event: &Value| event["event"].as_str().is_some_and(|name| names.contains(&name));
        if let Some(event) = self.events.iter().position(is_it).and_then(|index| self.events.remove(index)) {
            return Ok(event);
        }
        let deadline = Instant::now() + limit;
        loop {
            let message = self.read_message(left(deadline)).map_err(|error| {
                let text = format!("waiting for {}: {error}; before: {:?}", names.join(" or "), self.events);
                io::Error::new(error.kind(), text)
            })?;
            if is_it(&message) {
                return Ok(message);
            }
            if message.get("event").is_some() {
                self.events.push_back(message);
            }
        }
    }

    /// Takes all events up to the first of this name and with it, in the order in which they came.
    ///
    /// # Errors
    /// As [`Qmp::wait_event`]; what came before stays.
    pub fn events_until(&mut self, name: &str, limit: Duration) -> io::Result<Vec<Value>> {
        if let Some(index) = self.events.iter().position(|event| event["event"] == name) {
            return Ok(self.events.drain(..=index).collect());
        }
        let last = self.wait_event(name, limit)?;
        Ok(self.events.drain(..).chain([last]).collect())
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn answer(message: &mut Value) -> Result<Value, QmpError> {
    if let Some(value) = message.get_mut("return") {
        return Ok(value.take());
    }
    let text = |key: &str| message["error"][key].as_str().unwrap_or_default().to_owned();
    Err(QmpError::Refused { class: text("class"), description: text("desc") })
}
