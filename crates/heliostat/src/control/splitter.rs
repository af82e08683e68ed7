//! [`Splitter`]: cuts the bytes that a client sends into messages.
//!
//! A message is one JSON value, wherever lines and packets begin and end: clients send several in one packet,
//! one over several lines, and none for hours after half of one. Looks only at tokens and brackets; what the
//! message says is `json`'s. Memory and depth are bounded, so that no client can make them grow.
//!
//! Where bytes make no token, they are passed over up to the next one that may begin something: a bracket, a comma,
//! a colon, the end of a line. QEMU goes on at the same places, so a client that has lost its way hears the same.

/// The longest message. Commands are a few hundred bytes; a list of a thousand nodes' options would fit.
pub const MESSAGE_LEN_MAX: usize = 1 << 20;

/// How deep a message may be nested, as QEMU has it.
pub const DEPTH_MAX: usize = 1024;

/// How much of a token an error repeats: more than any that was meant, less than what a client cannot read.
pub(super) const SHOWN_MAX: usize = 4096;

/// What came out of a client's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The tokens of one value, or of what is none although its tokens are.
    Message(Vec<u8>),
    /// Bytes that are no token. Some of what follows is passed over to find the next.
    Fault(Fault),
}

/// Why bytes are no value. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Where a token should go on or begin there is something else. Holds the token so far, and that.
    #[error("JSON parse error, stray '{0}'")]
    Stray(String),
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("JSON nesting depth limit exceeded")]
    TooDeep,
    /// Longer than [`MESSAGE_LEN_MAX`]. Nothing more is taken from this client.
    #[error("JSON token size limit exceeded")]
    TooLong,
}

/// Where the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between tokens.
    Between,
    /// In a token.
    In(Token),
    /// Behind bytes that are no token.
    Lost,
    /// Behind a message that is nested too deep; the rest of the line is passed over.
    TooDeep,
    /// A message was too long.
    Closed,
}

/// A token of more than one byte, and how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    String {
        quote: u8,
        escaped: bool,
    },
    Word,
    /// Behind a number's sign.
    Sign,
    /// Behind a zero that begins a number. QEMU takes no exponent there, and neither do we.
    Zero,
    Whole,
    /// Behind the point.
    Point,
    Fraction,
    /// Behind the `e`.
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// What a byte is to the token before it.
enum Next {
    /// Part of it.
    Goes(Token),
    /// Its last byte.
    Last,
    /// Behind it.
    Behind,
    /// Neither.
    Wrong,
}

impl Token {
    /// The token that begins with `byte`.
    fn beginning(byte: u8) -> Option<Self> {
        match byte {
            b'"' | b'\'' => Some(Self::String { quote: byte, escaped: false }),
            b'a'..=b'z' => Some(Self::Word),
            b'-' => Some(Self::Sign),
            b'0' => Some(Self::Zero),
            b'1'..=b'9' => Some(Self::Whole),
            _ => None,
        }
    }

    fn next(self, byte: u8) -> Next {
        let is_digit = byte.is_ascii_digit();
        match (self, byte) {
            (Self::String { .. }, _) if is_lost(byte) || byte < b' ' => Next::Wrong,
            (Self::String { quote, escaped: false }, _) if byte == quote => Next::Last,
            (Self::String { quote, escaped }, _) => {
                Next::Goes(Self::String { quote, escaped: !escaped && byte == b'\\' })
            }
            (Self::Word, b'a'..=b'z') => Next::Goes(Self::Word),
            (Self::Sign, b'0') => Next::Goes(Self::Zero),
            (Self::Sign | Self::Whole, _) if is_digit => Next::Goes(Self::Whole),
            (Self::Zero | Self::Whole, b'.') => Next::Goes(Self::Point),
            (Self::Whole | Self::Fraction, b'e' | b'E') => Next::Goes(Self::Exponent),
            (Self::Point | Self::Fraction, _) if is_digit => Next::Goes(Self::Fraction),
            (Self::Exponent, b'+' | b'-') => Next::Goes(Self::ExponentSign),
            (Self::Exponent | Self::ExponentSign | Self::ExponentDigits, _) if is_digit => {
                Next::Goes(Self::ExponentDigits)
            }
            (Self::Zero, _) if is_digit => Next::Wrong,
            (Self::Sign | Self::Point | Self::Exponent | Self::ExponentSign, _) => Next::Wrong,
            _ => Next::Behind,
        }
    }
}

/// Cuts a client's bytes into messages.
#[derive(Debug)]
pub struct Splitter {
    state: State,
    /// How many brackets of each kind are open: `{`, `[`.
    open: [usize; 2],
    message: Vec<u8>,
    /// Where in the message the present token starts.
    token: usize,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: State::Between, open: [0; 2], message: Vec::new(), token: 0 }
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
            if let State::In(token) = self.state
                && matches!(token.next(byte), Next::Behind)
            {
                // The byte belongs to what follows.
                self.state = State::Between;
                if self.open == [0; 2] {
                    return Some(self.finish());
                }
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
            State::Lost if is_landmark(byte) => self.state = State::Between,
            State::TooDeep if byte == b'\n' || is_lost(byte) => self.state = State::Between,
            State::Lost | State::TooDeep => return None,
            _ => {}
        }
        let is_idle = self.message.is_empty() && self.state == State::Between;
        if is_idle && matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
            return None;
        }
        if self.message.len() == MESSAGE_LEN_MAX {
            *self = Self { state: State::Closed, ..Self::default() };
            return Some(Piece::Fault(Fault::TooLong));
        }
        self.message.push(byte);
        match self.state {
            State::In(token) => match token.next(byte) {
                Next::Goes(token) => self.state = State::In(token),
                Next::Last => {
                    self.state = State::Between;
                    return (self.open == [0; 2]).then(|| self.finish());
                }
                Next::Behind | Next::Wrong => return Some(self.stray()),
            },
            _ => return self.begin(byte),
        }
        None
    }

    /// Takes the first byte of a token.
    fn begin(&mut self, byte: u8) -> Option<Piece> {
        self.token = self.message.len() - 1;
        let kind = usize::from(matches!(byte, b'[' | b']'));
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => None,
            b'{' | b'[' => {
                if self.open[0] + self.open[1] == DEPTH_MAX {
                    *self = Self { state: State::TooDeep, ..Self::default() };
                    return Some(Piece::Fault(Fault::TooDeep));
                }
                self.open[kind] += 1;
                None
            }
            // One that closes nothing ends the message, too: it is none.
            b'}' | b']' if self.open[kind] == 0 => Some(self.finish()),
            b'}' | b']' => {
                self.open[kind] -= 1;
                (self.open == [0; 2]).then(|| self.finish())
            }
            b',' | b':' => (self.open == [0; 2]).then(|| self.finish()),
            _ => match Token::beginning(byte) {
                Some(token) => {
                    self.state = State::In(token);
                    None
                }
                None => Some(self.stray()),
            },
        }
    }

    fn finish(&mut self) -> Piece {
        let done = std::mem::take(self);
        Piece::Message(done.message)
    }

    /// The last byte is not one that belongs there.
    fn stray(&mut self) -> Piece {
        let lost = std::mem::replace(self, Self { state: State::Lost, ..Self::default() });
        let token = &lost.message[lost.token..];
        Piece::Fault(Fault::Stray(shown(token)))
    }
}

/// How many bytes at the front of `text` are a word or a number, or would be one if more followed.
pub(super) fn token_len(text: &[u8]) -> usize {
    let mut token = text.first().and_then(|byte| Token::beginning(*byte));
    let goes_on = |byte: &&u8| match token.map(|before| before.next(**byte)) {
        Some(Next::Goes(next)) => {
            token = Some(next);
            true
        }
        _ => false,
    };
    text.iter().skip(1).take_while(goes_on).count() + usize::from(!text.is_empty())
}

/// A token as an error repeats it.
pub(super) fn shown(token: &[u8]) -> String {
    let token = &token[..token.len().min(SHOWN_MAX)];
    // Texts of QEMU end at a zero.
    let end = token.iter().position(|byte| *byte == 0).unwrap_or(token.len());
    String::from_utf8_lossy(&token[..end]).into_owned()
}

/// Says whether a byte says that its sender has lost its way: no JSON has it, and no UTF-8 (QMP's specification).
fn is_lost(byte: u8) -> bool {
    byte >= 0xFE || (byte < b' ' && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

/// Says whether something may begin at a byte, whatever stood before it.
fn is_landmark(byte: u8) -> bool {
    is_lost(byte) || matches!(byte, b'\r' | b'\n' | b'{' | b'}' | b'[' | b']' | b',' | b':')
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
    fn behind_what_is_no_token_the_next_bracket_or_line_begins_afresh() {
        let stray = |text: &str| Piece::Fault(Fault::Stray(text.to_owned()));
        let table: [(&[u8], Vec<Piece>); 8] = [
            (b"\"abc\n true\n{}", vec![stray("\"abc\n"), message("{}")]),
            (b"; true 'x' {}", vec![stray(";"), message("{}")]),
            (b"; true\n 5\n", vec![stray(";"), message("5")]),
            (b"{'a':01}{}", vec![stray("01"), message("}"), message("{}")]),
            (b"-}{}", vec![stray("-}"), message("{}")]),
            (b"truE\n", vec![message("tru"), stray("E")]),
            (b"1true2.5\n", ["1", "true", "2.5"].map(message).to_vec()),
            (b"}{},[1}", vec![message("}"), message("{}"), message(","), message("[1}")]),
        ];
        for (input, pieces) in table {
            assert_eq!(split(input), pieces, "{}", String::from_utf8_lossy(input));
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
