//! JSON as QMP has it: read with single quotes too and without repeated keys, written as QEMU writes it.
//!
//! Knows no command. Depth is bounded by its caller's [`super::splitter`] and once more here.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Map, Number, Value};

use super::splitter::{DEPTH_MAX, shown, token_len};

/// Why a text is no JSON. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("JSON parse error, {0}")]
pub struct ParseError(String);

/// Reads one value, all of `text`.
///
/// # Errors
/// [`ParseError`] with the first thing that is wrong.
pub fn parse(text: &[u8]) -> Result<Value, ParseError> {
    let mut parser = Parser { rest: text, depth: 0 };
    let value = parser.value()?;
    parser.skip_space();
    if parser.rest.is_empty() { Ok(value) } else { Err(error("expecting end of input")) }
}

/// How messages are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// On one line.
    #[default]
    Line,
    /// For people: a line for each member, as QEMU does it with `pretty=on`.
    Pretty,
}

/// Writes `value` as QEMU does, nothing but ASCII.
#[must_use]
pub fn write_in(value: &Value, style: Style) -> String {
    match style {
        Style::Line => write(value),
        Style::Pretty => {
            let mut bytes = Vec::new();
            let mut serializer = Serializer::with_formatter(&mut bytes, QemuPretty { depth: 0 });
            value
                .serialize(&mut serializer)
                .expect("a Value has only string keys, and a Vec takes everything");
            String::from_utf8(bytes).expect("the formatter writes ASCII only")
        }
    }
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
    rest: &'a [u8],
    depth: usize,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        let end = self.rest.iter().position(|byte| !is_space(byte)).unwrap_or(self.rest.len());
        self.rest = &self.rest[end..];
    }

    /// The next byte that is no space, not taken.
    fn peek(&mut self) -> Option<u8> {
        self.skip_space();
        self.rest.first().copied()
    }

    /// Takes the next byte if it is this one.
    fn take(&mut self, wanted: u8) -> bool {
        let is_there = self.peek() == Some(wanted);
        if is_there {
            self.rest = &self.rest[1..];
        }
        is_there
    }

    fn value(&mut self) -> Result<Value, ParseError> {
        match self.peek() {
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::array),
            Some(b'"' | b'\'') => self.string().map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'a'..=b'z') => self.word(),
            None | Some(b'}' | b']' | b',' | b':') => Err(error("expecting value")),
            Some(_) => Err(stray(&self.rest[..1])),
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
        if self.take(b'}') {
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(error("key is not a string in object"));
            };
            if !self.take(b':') {
                return Err(error("missing : in object pair"));
            }
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return Err(error("duplicate key"));
            }
            if self.take(b'}') {
                return Ok(Value::Object(map));
            }
            if !self.take(b',') {
                return Err(error("expected separator in dict"));
            }
        }
    }

    fn array(&mut self) -> Result<Value, ParseError> {
        let mut list = Vec::new();
        if self.take(b']') {
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            if self.take(b']') {
                return Ok(Value::Array(list));
            }
            if !self.take(b',') {
                return Err(error("expected separator in list"));
            }
        }
    }

    fn word(&mut self) -> Result<Value, ParseError> {
        let (word, rest) = self.rest.split_at(token_len(self.rest));
        self.rest = rest;
        match word {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            other => Err(ParseError(format!("invalid keyword '{}'", shown(other)))),
        }
    }

    fn number(&mut self) -> Result<Value, ParseError> {
        let (run, rest) = self.rest.split_at(token_len(self.rest));
        self.rest = rest;
        let text = std::str::from_utf8(run).map_err(|_| stray(run))?;
        if text == "-0" {
            return Ok(Value::from(0));
        }
        if let Ok(number) = serde_json::from_str::<Number>(text) {
            return Ok(Value::Number(number));
        }
        // One that is too large for any kind of number is the largest there is. QEMU calls it infinite, of which
        // JSON knows nothing.
        match text.parse::<f64>() {
            Ok(number) if number.is_infinite() => Ok(Value::from(f64::MAX.copysign(number))),
            _ => Err(stray(run)),
        }
    }

    /// Takes a string off the front, its quotes included.
    fn quoted(&mut self) -> Result<&'a [u8], ParseError> {
        let quote = self.rest[0];
        // The first quote ends nothing.
        let mut is_escaped = true;
        let end = self.rest.iter().position(|byte| {
            let is_end = !is_escaped && *byte == quote;
            is_escaped = !is_escaped && *byte == b'\\';
            is_end
        });
        let bare = end.map(|end| self.rest.split_at(end + 1));
        let (token, rest) = bare.ok_or_else(|| stray(self.rest))?;
        if let Some(at) = token.iter().position(|byte| *byte < b' ') {
            return Err(stray(&token[..=at]));
        }
        self.rest = rest;
        Ok(token)
    }

    fn string(&mut self) -> Result<String, ParseError> {
        let token = self.quoted()?;
        let mut text = Vec::new();
        let mut at = 1;
        while at < token.len() - 1 {
            match token[at] {
                b'\\' => {
                    let (c, len) = escape(&token[at + 1..])?;
                    text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                    at += len + 1;
                }
                // How QEMU's texts, which end at a zero, may hold one all the same.
                0xC0 if token[at + 1] == 0x80 => {
                    text.push(0);
                    at += 2;
                }
                byte => {
                    text.push(byte);
                    at += 1;
                }
            }
        }
        let text = String::from_utf8(text).ok().filter(|text| !text.chars().any(is_no_character));
        text.ok_or_else(|| error("invalid UTF-8 sequence in string"))
    }
}

fn stray(token: &[u8]) -> ParseError {
    ParseError(format!("stray '{}'", shown(token)))
}

/// Says whether Unicode promises never to give `c` a meaning.
fn is_no_character(c: char) -> bool {
    matches!(c, '\u{FDD0}'..='\u{FDEF}') || u32::from(c) & 0xFFFE == 0xFFFE
}

/// What stands behind a backslash, and how many bytes that took.
fn escape(rest: &[u8]) -> Result<(char, usize), ParseError> {
    let c = match rest.first() {
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(same @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(*same),
        Some(b'u') => return unicode(&rest[1..]).map(|(c, len)| (c, len + 1)),
        _ => return Err(error("invalid escape sequence in string")),
    };
    Ok((c, 1))
}

fn unicode(rest: &[u8]) -> Result<(char, usize), ParseError> {
    let invalid = || {
        let digits = shown(&rest[..rest.len().min(4)]);
        ParseError(format!("\\u{digits} is not a valid Unicode character"))
    };
    let first = four_digits(rest).ok_or_else(invalid)?;
    // Half of a pair: the other half follows.
    let (code, len) = match (first, rest.get(4..6)) {
        (0xD800..0xDC00, Some(b"\\u")) => {
            let second = four_digits(&rest[6..]).and_then(|second| second.checked_sub(0xDC00));
            let low = second.filter(|low| *low < 0x400).ok_or_else(invalid)?;
            (0x10000 + ((first - 0xD800) << 10) + low, 10)
        }
        _ => (first, 4),
    };
    let c = char::from_u32(code).filter(|c| !is_no_character(*c)).ok_or_else(invalid)?;
    Ok((c, len))
}

fn four_digits(text: &[u8]) -> Option<u32> {
    let digits = text.get(..4)?;
    digits.iter().try_fold(0, |number, digit| Some(number * 16 + char::from(*digit).to_digit(16)?))
}

/// A number with 17 digits at most, as `printf` has it with `%.17g`: QEMU writes numbers that are not whole so.
fn with_17_digits(number: f64) -> String {
    let text = format!("{number:.16e}");
    let (digits, exponent) = text.split_once('e').expect("it was asked for");
    let exponent: i32 = exponent.parse().expect("a small number");
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    match usize::try_from(16 - exponent) {
        Ok(behind) if exponent >= -4 => trimmed(&format!("{number:.behind$}")),
        _ => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{}e{sign}{:02}", trimmed(digits), exponent.abs())
        }
    }
}

/// How QEMU lays JSON out on a line.
struct QemuStyle;

impl Formatter for QemuStyle {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(with_17_digits(value).as_bytes())
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let short = match escape {
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04X}"),
            CharEscape::Quote => "\\\"",
            CharEscape::ReverseSolidus => "\\\\",
            CharEscape::Solidus => "/",
            CharEscape::Backspace => "\\b",
            CharEscape::FormFeed => "\\f",
            CharEscape::LineFeed => "\\n",
            CharEscape::CarriageReturn => "\\r",
            CharEscape::Tab => "\\t",
        };
        writer.write_all(short.as_bytes())
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

/// How QEMU lays JSON out for people.
struct QemuPretty {
    depth: usize,
}

impl QemuPretty {
    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        write!(writer, "\r\n{:1$}", "", self.depth * 4)
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        self.line(writer)?;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b"," })?;
        self.line(writer)
    }
}

impl Formatter for QemuPretty {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        QemuStyle.begin_object_value(writer)
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        QemuStyle.write_f64(writer, value)
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        QemuStyle.write_char_escape(writer, escape)
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        QemuStyle.write_string_fragment(writer, fragment)
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
        let table: [(&[u8], &str); 15] = [
            (br"{'a':'\u12'}", r"\u12' is not a valid Unicode character"),
            (br"{'a':'\uFFFE'}", r"\uFFFE is not a valid Unicode character"),
            (b"{'a':'\xef\xbf\xbf'}", "invalid UTF-8 sequence in string"),
            (b"{'a':0x10}", "expected separator in dict"),
            (b"{'a' 'b'}", "missing : in object pair"),
            (b"{'a':1,}", "expecting value"),
            (b"{'a':1 'b':2}", "expected separator in dict"),
            (b"[1 2]", "expected separator in list"),
            (b"{'a':1,'a':2}", "duplicate key"),
            (b"garbage", "invalid keyword 'garbage'"),
            (b"{1:2}", "key is not a string in object"),
            (b"{'a':%p}", "stray '%'"),
            (br"{'a':'\x'}", "invalid escape sequence in string"),
            (br"{'a':'\ud83d'}", r"\ud83d is not a valid Unicode character"),
            (b"{'a':]}", "expecting value"),
        ];
        for (text, what) in table {
            assert_eq!(parse(text), Err(ParseError(what.to_owned())), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn numbers_are_written_as_qemu_writes_them() {
        let table = [
            ("-0", "0"),
            ("-0.0", "-0"),
            ("1.0", "1"),
            ("1e-3", "0.001"),
            ("0.1", "0.10000000000000001"),
            ("1e16", "10000000000000000"),
            ("1e17", "1e+17"),
            ("1e-400", "0"),
            ("3.5e-7", "3.4999999999999998e-07"),
            ("123456.789", "123456.789"),
            ("-9223372036854775809", "-9.2233720368547758e+18"),
            ("18446744073709551615", "18446744073709551615"),
            ("18446744073709551616", "1.8446744073709552e+19"),
            ("1e400", "1.7976931348623157e+308"),
        ];
        for (read, written) in table {
            assert_eq!(write(&parse(read.as_bytes()).unwrap()), written, "{read}");
        }
    }

    #[test]
    fn values_are_written_as_qemu_writes_them() {
        let value = json!({ "return": [1, { "a": "\u{e9}\u{1f600}\u{7f}\u{b}\n" }], "id": null });
        let text = r#"{"return": [1, {"a": "\u00E9\uD83D\uDE00\u007F\u000B\n"}], "id": null}"#;
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
            let is_whole = |text: &str| !text.chars().any(is_no_character);
            prop_assume!(is_whole(&value.to_string()));
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
