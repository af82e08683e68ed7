//! [`Options`]: the letters and the arguments of a command; numbers with a suffix. Parses only.

/// The options and arguments of a command.
#[derive(Debug)]
pub(super) struct Options<'a> {
    letters: Vec<(char, &'a str)>,
    /// What stands beside the options, in order.
    pub(super) arguments: Vec<&'a str>,
}

impl<'a> Options<'a> {
    /// Takes `words` apart. `known` has the letters; one with a colon after it takes a value.
    ///
    /// # Errors
    /// The first letter that is unknown, or that lacks its value.
    pub(super) fn parse(known: &str, words: &[&'a str]) -> Result<Self, char> {
        let mut options = Self { letters: Vec::new(), arguments: Vec::new() };
        let mut words = words.iter().copied();
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                options.arguments.push(word);
                continue;
            };
            for (at, letter) in letters.char_indices() {
                let place = known.find(letter).filter(|_| letter != ':').ok_or(letter)?;
                let after = &letters[at + letter.len_utf8()..];
                if !known[place + letter.len_utf8()..].starts_with(':') {
                    options.letters.push((letter, ""));
                    continue;
                }
                let value = if after.is_empty() { words.next().ok_or(letter)? } else { after };
                options.letters.push((letter, value));
                break;
            }
        }
        Ok(options)
    }

    /// Whether the letter was given.
    pub(super) fn has(&self, letter: char) -> bool {
        self.value(letter).is_some()
    }

    /// The value of a letter; empty where it takes none. The last one that was given.
    pub(super) fn value(&self, letter: char) -> Option<&'a str> {
        self.letters.iter().rev().find(|(other, _)| *other == letter).map(|(_, value)| *value)
    }
}

/// A number of bytes: decimal with a fraction or hexadecimal, with a suffix or none.
///
/// # Errors
/// What is printed.
pub(super) fn number(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n");
    let too_large = || format!("Parsing error: argument too large -- {text}\n");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let end = text.find(|character: char| !character.is_ascii_digit() && character != '.');
    let (digits, suffix) = text.split_at(end.unwrap_or(text.len()));
    let power = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        "e" => 6,
        _ => return Err(wrong()),
    };
    let unit = 1_u128 << (10 * power);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() || fraction.len() > 18 || (power == 0 && !fraction.is_empty()) {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let parts = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().map_err(|_| wrong())? };
    let places = u32::try_from(fraction.len()).map_err(|_| wrong())?;
    let bytes =
        whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(parts * unit / 10_u128.pow(places)));
    let bytes = bytes.and_then(|bytes| i64::try_from(bytes).ok()).ok_or_else(too_large)?;
    Ok(bytes.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_suffixes_and_fractions() {
        let table = [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("1.5k", 1536),
            ("64K", 65536),
            ("1M", 1 << 20),
            ("2G", 2 << 30),
            ("0x1000", 4096),
            ("1b", 1),
        ];
        for (text, expected) in table {
            assert_eq!(number(text), Ok(expected), "{text}");
        }
        for text in ["zz", "", "k", "4kk", ".5k", "1.5", "-1", "0x"] {
            assert!(number(text).unwrap_err().starts_with("Parsing error: non-numeric"), "{text}");
        }
        assert_eq!(number("9E").unwrap_err(), "Parsing error: argument too large -- 9E\n");
    }

    #[test]
    fn letters_may_stand_together_and_anywhere() {
        let options = Options::parse("qP:z", &["-qP", "7", "0", "-z", "4k"]).unwrap();
        assert!(options.has('q') && options.has('z') && !options.has('P') || options.value('P') == Some("7"));
        assert_eq!(options.arguments, ["0", "4k"]);
        assert_eq!(Options::parse("P:", &["-P9", "0"]).unwrap().value('P'), Some("9"));
        assert_eq!(Options::parse("q", &["-1", "5"]).unwrap_err(), '1');
        assert_eq!(Options::parse("P:", &["-P"]).unwrap_err(), 'P');
    }
}
