//! JSON as QMP has it: read with single quotes too and without repeated keys, written as QEMU writes it.
//!
//! Knows no command. Depth is bounded by its caller's [`super::splitter`] and once more here.

use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Map, Number, Value};

use super::splitter::DEPTH_MAX;

/// How much of a word an error repeats.
const SHOWN_MAX: usize = 64;

/// Why a text is no JSON. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("JSON parse error, {0}")]
pub struct ParseError(String);

/// Reads one value, all of `text`.
///
/// # Errors
/// [`ParseError`] with the first thing that is wrong.
pub fn parse(text: &[u8]) -> Result<Value, ParseError> {
    let text = std::str::from_utf8(text).map_err(|_| error("invalid UTF-8 sequence in string"))?;
    let mut parser = Parser { rest: text, depth: 0 };
    let value = parser.value()?;
    parser.skip_space();
    if parser.rest.is_empty() { Ok(value) } else { Err(error("expecting end of input")) }
}

/// Writes `value` on one line as QEMU does: a space after each comma and colon, nothing but ASCII.
#[must_use]
pub fn write(value: &Value) -> String {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, QemuStyle);
    value.serialize(&mut serializer).expect("a Value has only string keys, and a Vec takes everything");
    String::from_utf8(bytes).expect("the formatter writes ASCII only")
}

fn error(text: &str) -> ParseError {
    ParseError(text.to_owned())
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }

    /// The next character that is no space, not taken.
    fn peek(&mut self) -> Option<char> {
        self.skip_space();
        self.rest.chars().next()
    }

    /// Takes the next character if it is this one.
    fn take(&mut self, wanted: char) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self) -> Result<Value, ParseError> {
        match self.peek() {
            Some('{') => self.nested(Self::object),
            Some('[') => self.nested(Self::array),
            Some('"' | '\'') => self.string().map(Value::String),
            Some('-' | '0'..='9') => self.number(),
            Some('a'..='z' | 'A'..='Z') => self.word(),
            None | Some('}' | ']' | ',' | ':') => Err(error("expecting value")),
            Some(stray) => Err(ParseError(format!("stray '{stray}'"))),
        }
    }

    fn nested(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<Value, ParseError>,
    ) -> Result<Value, ParseError> {
        if self.depth == DEPTH_MAX {
            return Err(error("nested too deep"));
        }
        self.depth += 1;
        self.rest = &self.rest[1..];
        let value = read(self);
        self.depth -= 1;
        value
    }

    fn object(&mut self) -> Result<Value, ParseError> {
        let mut map = Map::new();
        if self.take('}') {
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(error("key is not a string in object"));
            };
            if !self.take(':') {
                return Err(error("missing : in object pair"));
            }
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return Err(error("duplicate key"));
            }
            if self.take('}') {
                return Ok(Value::Object(map));
            }
            if !self.take(',') {
                return Err(error("expected separator in dict"));
            }
        }
    }

    fn array(&mut self) -> Result<Value, ParseError> {
        let mut list = Vec::new();
        if self.take(']') {
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            if self.take(']') {
                return Ok(Value::Array(list));
            }
            if !self.take(',') {
                return Err(error("expected separator in list"));
            }
        }
    }

    /// Takes what belongs to a number or a word.
    fn run(&mut self) -> &'a str {
        let belongs = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_');
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (run, rest) = self.rest.split_at(end);
        self.rest = rest;
        run
    }

    fn word(&mut self) -> Result<Value, ParseError> {
        match self.run() {
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            "null" => Ok(Value::Null),
            other => Err(ParseError(format!("invalid keyword '{}'", shown(other)))),
        }
    }

    fn number(&mut self) -> Result<Value, ParseError> {
        let run = self.run();
        let number = serde_json::from_str::<Number>(run);
        number.map(Value::Number).map_err(|_| ParseError(format!("stray '{}'", shown(run))))
    }

    fn string(&mut self) -> Result<String, ParseError> {
        let mut chars = self.rest.chars();
        let quote = chars.next();
        let mut text = String::new();
        loop {
            match chars.next() {
                None => return Err(ParseError(format!("stray '{}'", shown(self.rest)))),
                Some('\\') => text.push(escape(&mut chars)?),
                end if end == quote => break,
                Some(c) if c < ' ' => return Err(ParseError(format!("stray '{}'", shown(self.rest)))),
                Some(c) => text.push(c),
            }
        }
        self.rest = chars.as_str();
        Ok(text)
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_MAX).collect()
}

fn escape(chars: &mut std::str::Chars<'_>) -> Result<char, ParseError> {
    Ok(match chars.next() {
        Some('b') => '\u{8}',
        Some('f') => '\u{c}',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some(same @ ('"' | '\'' | '\\' | '/')) => same,
        Some('u') => return unicode(chars),
        _ => return Err(error("invalid escape sequence in string")),
    })
}

fn unicode(chars: &mut std::str::Chars<'_>) -> Result<char, ParseError> {
    let first = four_digits(chars)?;
    let invalid = || ParseError(format!("\\u{first:04x} is not a valid Unicode character"));
    // Half of a pair: the other half follows.
    if (0xD800..0xDC00).contains(&first) && chars.as_str().starts_with("\\u") {
        chars.nth(1);
        let second = four_digits(chars)?;
        let low = second.checked_sub(0xDC00).filter(|low| *low < 0x400).ok_or_else(invalid)?;
        return char::from_u32(0x10000 + ((first - 0xD800) << 10) + low).ok_or_else(invalid);
    }
    char::from_u32(first).ok_or_else(invalid)
}

fn four_digits(chars: &mut std::str::Chars<'_>) -> Result<u32, ParseError> {
    let mut number = 0;
    for _ in 0..4 {
        let digit = chars.next().and_then(|c| c.to_digit(16));
        number = number * 16 + digit.ok_or_else(|| error("invalid escape sequence in string"))?;
    }
    Ok(number)
}

/// How QEMU lays JSON out on a line.
struct QemuStyle;

impl Formatter for QemuStyle {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for c in fragment.chars() {
            if c.is_ascii() && c != '\u{7f}' {
                write!(writer, "{c}")?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::control::splitter::{Piece, Splitter};

    #[test]
    fn single_quotes_and_escapes_are_read() {
        let text =
            br#"{'a': "it's", "b": 'say "x"', 'c': '\u00e9\ud83d\ude00\'\/', "d": [1, -2, 1.5, null]}"#;
        let value = json!({
            "a": "it's", "b": "say \"x\"", "c": "\u{e9}\u{1f600}'/", "d": [1, -2, 1.5, null]
        });
        assert_eq!(parse(text), Ok(value));
    }

    #[test]
    fn what_is_wrong_is_said_as_qemu_says_it() {
        let table: [(&[u8], &str); 12] = [
            (b"{'a' 'b'}", "missing : in object pair"),
            (b"{'a':1,}", "expecting value"),
            (b"{'a':1 'b':2}", "expected separator in dict"),
            (b"[1 2]", "expected separator in list"),
            (b"{'a':1,'a':2}", "duplicate key"),
            (b"garbage", "invalid keyword 'garbage'"),
            (b"{1:2}", "key is not a string in object"),
            (b"{'a':%p}", "stray '%'"),
            (b"{'a':01}", "stray '01'"),
            (br"{'a':'\x'}", "invalid escape sequence in string"),
            (br"{'a':'\ud83d'}", r"\ud83d is not a valid Unicode character"),
            (b"{'a':]}", "expecting value"),
        ];
        for (text, what) in table {
            assert_eq!(parse(text), Err(ParseError(what.to_owned())), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn values_are_written_as_qemu_writes_them() {
        let value = json!({ "return": [1, { "a": "\u{e9}\u{1f600}\u{7f}\n" }], "id": null });
        let text = r#"{"return": [1, {"a": "\u00E9\uD83D\uDE00\u007F\n"}], "id": null}"#;
        assert_eq!(write(&value), text);
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_the_same(value in any_value()) {
            prop_assert_eq!(parse(write(&value).as_bytes()), Ok(value));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            take_all(&bytes);
        }

        #[test]
        fn no_text_of_json_characters_makes_it_panic(text in "[\\[\\]{}:,'\"\\\\ux0-9a-f \n.eE+-]{0,200}") {
            take_all(text.as_bytes());
        }

        #[test]
        fn where_packets_end_makes_no_difference(
            text in "[\\[\\]{}:,'\"\\\\a1 \n\u{1}]{0,80}",
            cuts in prop::collection::vec(1_usize..8, 0..80),
        ) {
            let mut in_packets = Vec::new();
            let mut splitter = Splitter::default();
            let mut rest = text.as_bytes();
            for cut in cuts.into_iter().chain(std::iter::repeat(100)) {
                if rest.is_empty() {
                    break;
                }
                let (mut packet, later) = rest.split_at(cut.min(rest.len()));
                rest = later;
                in_packets.extend(std::iter::from_fn(|| splitter.next(&mut packet)));
            }
            prop_assert_eq!(in_packets, take_all(text.as_bytes()));
        }
    }

    fn take_all(bytes: &[u8]) -> Vec<Piece> {
        let mut splitter = Splitter::default();
        let mut rest = bytes;
        let pieces: Vec<_> = std::iter::from_fn(|| splitter.next(&mut rest)).collect();
        assert!(rest.is_empty());
        for piece in &pieces {
            if let Piece::Message(text) = piece {
                let _ = parse(text);
            }
        }
        pieces
    }
}
