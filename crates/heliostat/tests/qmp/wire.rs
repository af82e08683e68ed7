//! [`Wire`]: a control connection as bytes and lines, with nothing put in order.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::wait;

/// A connection.
pub struct Wire {
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Wire {
    /// Connects as soon as somebody listens.
    pub fn connect(socket: &Path) -> Self {
        let stream = wait::for_socket(socket).expect("somebody listens");
        stream.set_write_timeout(Some(wait::LIMIT)).expect("a limit that is not zero");
        Self { stream, unread: Vec::new() }
    }

    /// Connects, and says what comes first.
    pub fn negotiated(socket: &Path) -> Self {
        let mut wire = Self::connect(socket);
        assert!(wire.next()["QMP"].is_object());
        wire.send(b"{'execute':'qmp_capabilities'}");
        assert_eq!(wire.next()["return"], serde_json::json!({}));
        wire
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the daemon takes it");
    }

    /// Sends bytes as they are, to a daemon that may have hung up.
    ///
    /// # Errors
    /// The connection's.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Says that nothing more will come.
    pub fn finish_sending(&self) {
        self.stream.shutdown(Shutdown::Write).expect("it was open");
    }

    /// The next line, as text without its end.
    ///
    /// # Errors
    /// `UnexpectedEof` when the connection has ended, `TimedOut` when nothing comes.
    pub fn line(&mut self, limit: Duration) -> io::Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<u8> = self.unread.drain(..end + 2).take(end).collect();
                return Ok(String::from_utf8(line).expect("ASCII"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.unread.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next message of any kind.
    pub fn next(&mut self) -> Value {
        let line = self.line(wait::LIMIT).expect("a message comes");
        serde_json::from_str(&line).expect("JSON")
    }

    /// The next message that is no event.
    pub fn next_reply(&mut self) -> Value {
        loop {
            let message = self.next();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    /// Sends a command and returns what is answered.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let message = serde_json::json!({ "execute": command, "arguments": arguments });
        self.send(message.to_string().as_bytes());
        self.next_reply()
    }

    /// Reads to the end of the connection; says how many bytes came.
    pub fn read_to_end(&mut self) -> usize {
        self.stream.set_read_timeout(Some(wait::LIMIT)).expect("a limit that is not zero");
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = self.stream.read_to_end(&mut rest);
        self.unread.len() + rest.len()
    }
}
