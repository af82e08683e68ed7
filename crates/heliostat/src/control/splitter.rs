//! [`Splitter`]: cuts the bytes that a client sends into messages.
//!
//! A message is one JSON value, wherever lines and packets begin and end: clients send several in one packet,
//! one over several lines, and none for hours after half of one. Looks only at brackets and quotes; what the
//! message says is `json`'s. Memory and depth are bounded, so that no client can make them grow.

/// The longest message. Commands are a few hundred bytes; a list of a thousand nodes' options would fit.
pub const MESSAGE_LEN_MAX: usize = 1 << 20;

/// How deep a message may be nested, as QEMU has it.
pub const DEPTH_MAX: usize = 1024;

/// How much of a token an error repeats.
const SHOWN_MAX: usize = 32;

/// What came out of a client's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The text of one value.
    Message(Vec<u8>),
    /// Bytes that are no value. Some of what follows has been passed over to find the next.
    Fault(Fault),
}

/// Why bytes are no value. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A control character, where JSON allows none.
    #[error("JSON parse error, stray '{0}'")]
    Stray(String),
    /// Something that cannot stand at the start of a value.
    #[error("JSON parse error, expecting value")]
    NoValue,
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("JSON nesting depth limit exceeded")]
    TooDeep,
    /// Longer than [`MESSAGE_LEN_MAX`]. Nothing more is taken from this client.
    #[error("JSON token size limit exceeded")]
    TooLong,
}

/// Where in a message the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between messages.
    Idle,
    /// In a string that began with this quote.
    String { quote: u8, escaped: bool },
    /// In an array or an object, outside of strings.
    Inside,
    /// In a number or a word that is a message of its own.
    Word,
    /// Behind a fault; the rest of the line is passed over.
    Skipping,
    /// A message was too long.
    Closed,
}

/// Cuts a client's bytes into messages.
#[derive(Debug)]
pub struct Splitter {
    state: State,
    depth: usize,
    message: Vec<u8>,
    /// Where in the message the present token starts.
    token: usize,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: State::Idle, depth: 0, message: Vec::new(), token: 0 }
    }
}

impl Splitter {
    /// Takes bytes off the front of `input`, up to the end of the next piece. `None` when all were taken and
    /// there is no whole piece yet.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Piece> {
        if self.state == State::Closed {
            *input = &[];
        }
        while let Some((&byte, rest)) = input.split_first() {
            if self.state == State::Word && ends_word(byte) {
                // The byte belongs to what follows.
                return Some(self.finish());
            }
            *input = rest;
            if let Some(piece) = self.take(byte) {
                return Some(piece);
            }
        }
        None
    }

    /// Says whether nothing more is taken.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    fn take(&mut self, byte: u8) -> Option<Piece> {
        match self.state {
            State::Skipping => {
                // A client that has lost its way says so with a byte that no JSON has (QMP's specification).
                if byte == b'\n' || is_lost(byte) {
                    self.state = State::Idle;
                }
                return None;
            }
            State::Idle if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => return None,
            _ => {}
        }
        if self.message.len() == MESSAGE_LEN_MAX {
            *self = Self { state: State::Closed, ..Self::default() };
            return Some(Piece::Fault(Fault::TooLong));
        }
        if is_stray(byte, self.state) {
            return Some(self.stray(byte));
        }
        self.message.push(byte);
        match (self.state, byte) {
            (State::String { quote, escaped: false }, _) if byte == quote => return self.string_ended(),
            (State::String { quote, escaped }, _) => {
                self.state = State::String { quote, escaped: !escaped && byte == b'\\' };
            }
            (_, b'"' | b'\'') => {
                self.token = self.message.len() - 1;
                self.state = State::String { quote: byte, escaped: false };
            }
            (_, b'{' | b'[') => return self.enter(),
            (State::Inside, b'}' | b']') => return self.leave(),
            (State::Inside | State::Word, _) => {}
            (_, b'}' | b']' | b',' | b':') => return Some(self.fault(Fault::NoValue)),
            _ => self.state = State::Word,
        }
        None
    }

    fn enter(&mut self) -> Option<Piece> {
        if self.depth == DEPTH_MAX {
            return Some(self.fault(Fault::TooDeep));
        }
        self.depth += 1;
        self.state = State::Inside;
        None
    }

    fn leave(&mut self) -> Option<Piece> {
        self.depth -= 1;
        (self.depth == 0).then(|| self.finish())
    }

    fn string_ended(&mut self) -> Option<Piece> {
        if self.depth == 0 {
            return Some(self.finish());
        }
        self.state = State::Inside;
        None
    }

    fn finish(&mut self) -> Piece {
        let done = std::mem::take(self);
        Piece::Message(done.message)
    }

    fn fault(&mut self, fault: Fault) -> Piece {
        *self = Self { state: State::Skipping, ..Self::default() };
        Piece::Fault(fault)
    }

    fn stray(&mut self, byte: u8) -> Piece {
        let token = match self.state {
            State::String { .. } => &self.message[self.token..],
            _ => &[],
        };
        let mut text = String::from_utf8_lossy(&token[..token.len().min(SHOWN_MAX)]).into_owned();
        text.push(if byte.is_ascii() { char::from(byte) } else { char::REPLACEMENT_CHARACTER });
        let piece = self.fault(Fault::Stray(text));
        if byte == b'\n' || is_lost(byte) {
            self.state = State::Idle;
        }
        piece
    }
}

fn ends_word(byte: u8) -> bool {
    byte <= b' ' || matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':' | b'"' | b'\'') || is_lost(byte)
}

/// Says whether a byte says that its sender has lost its way: no JSON has it, and no UTF-8.
fn is_lost(byte: u8) -> bool {
    byte == 0xFF || (byte < b' ' && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

fn is_stray(byte: u8, state: State) -> bool {
    is_lost(byte) || (byte < b' ' && matches!(state, State::String { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(input: &[u8]) -> Vec<Piece> {
        let mut splitter = Splitter::default();
        let mut rest = input;
        std::iter::from_fn(|| splitter.next(&mut rest)).collect()
    }

    fn message(text: &str) -> Piece {
        Piece::Message(text.as_bytes().to_vec())
    }

    #[test]
    fn messages_are_cut_wherever_lines_end() {
        assert_eq!(
            split(b" {'a':1}{\"b\":\n[2]}\r\n5 'x}' true\n"),
            ["{'a':1}", "{\"b\":\n[2]}", "5", "'x}'", "true"].map(message)
        );
    }

    #[test]
    fn a_message_that_arrives_byte_by_byte_is_whole_at_its_last() {
        let text = br#"{"a":"}\"{","b":['\'']}"#;
        let mut splitter = Splitter::default();
        for (index, byte) in text.iter().enumerate() {
            let piece = splitter.next(&mut std::slice::from_ref(byte));
            assert_eq!(piece.is_some(), index + 1 == text.len(), "at {index}");
        }
    }

    #[test]
    fn a_fault_costs_the_rest_of_its_line_and_no_more() {
        let table: [(&[u8], Fault); 4] = [
            (b"}{}\n{}", Fault::NoValue),
            (b"\"abc\n{}", Fault::Stray("\"abc\n".to_owned())),
            (b"{'a\tb':1}\n{}", Fault::Stray("'a\t".to_owned())),
            (b",\n{}", Fault::NoValue),
        ];
        for (input, fault) in table {
            assert_eq!(split(input), [Piece::Fault(fault), message("{}")], "{input:?}");
        }
    }

    #[test]
    fn a_byte_that_no_json_has_starts_afresh_at_once() {
        let lost = |text: &str| Piece::Fault(Fault::Stray(text.to_owned()));
        assert_eq!(split(b"{'a':\xff{}"), [lost("\u{fffd}"), message("{}")]);
        assert_eq!(split(b"{'a':'b\x1b{}"), [lost("'b\x1b"), message("{}")]);
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
        assert_eq!(split(&nested(DEPTH_MAX)).len(), 1);
        let mut too_deep = nested(10_000);
        too_deep.extend_from_slice(b"\n{}");
        assert_eq!(split(&too_deep), [Piece::Fault(Fault::TooDeep), message("{}")]);
    }

    #[test]
    fn a_message_without_end_is_refused_with_bounded_memory() {
        let mut splitter = Splitter::default();
        let chunk = vec![b'x'; 1 << 16];
        let mut pieces = Vec::new();
        let mut start: &[u8] = b"{'a':'";
        assert_eq!(splitter.next(&mut start), None);
        for _ in 0..1600 {
            let mut rest = chunk.as_slice();
            pieces.extend(std::iter::from_fn(|| splitter.next(&mut rest)));
            assert!(splitter.message.capacity() <= 2 * MESSAGE_LEN_MAX);
        }
        assert_eq!(pieces, [Piece::Fault(Fault::TooLong)]);
        assert!(splitter.is_closed());
    }
}
