//! [`Source`]: a Rust file as the rules look at it: code without comments and texts, comments without code,
//! tests told apart from the rest.
//!
//! Not a parser. It knows comments, strings and characters, which is what keeps a word in a message from
//! being taken for code.

/// A Rust file. Both views have as many lines as the file, so that line numbers agree.
pub struct Source<'a> {
    pub path: &'a str,
    /// The lines with comments and the insides of strings blanked out.
    pub code: Vec<String>,
    /// The lines with everything but comments blanked out.
    pub comments: Vec<String>,
    /// The line (from 0) at which the tests start; the number of lines where there are none.
    pub tests_start: usize,
}

impl<'a> Source<'a> {
    pub fn new(path: &'a str, text: &str) -> Self {
        let (code, comments) = split(text);
        let code = lines(&code);
        let tests_start = if is_test_file(path) { 0 } else { tests_start(&code) };
        Self { path, code, comments: lines(&comments), tests_start }
    }

    /// The lines of code with their numbers (from 1).
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.iter().enumerate().map(|(index, line)| (index + 1, line.as_str()))
    }

    /// Says whether line `number` (from 1) belongs to tests.
    pub fn in_tests(&self, number: usize) -> bool {
        number > self.tests_start
    }
}

/// Says whether the whole file is tests.
fn is_test_file(path: &str) -> bool {
    path.split('/').any(|part| part == "tests" || part == "tests.rs" || part == "benches")
}

/// Tests stand last in a file: they start at the first `#[cfg(test)]` (also `all(test, …)`) before a module.
fn tests_start(code: &[String]) -> usize {
    let is_gate = |line: &str| line.trim_start().starts_with("#[cfg(") && has_word(line, "test");
    let opens = |index: usize| {
        let next =
            code[index..].iter().find(|line| !line.trim().is_empty() && !line.trim().starts_with("#["));
        next.is_some_and(|line| has_word(line, "mod") && line.contains('{'))
    };
    (0..code.len()).find(|&index| is_gate(&code[index]) && opens(index)).unwrap_or(code.len())
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// Says whether `line` holds `word` with nothing of an identifier on either side.
pub fn has_word(line: &str, word: &str) -> bool {
    words(line).any(|found| found == word)
}

/// The identifiers and numbers of a line.
pub fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// Where a character belongs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Code,
    Comment,
    Text,
}

/// Splits a file into its code and its comments, each with the rest replaced by spaces.
fn split(text: &str) -> (String, String) {
    let mut code = String::with_capacity(text.len());
    let mut comments = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (place, len) = next_piece(rest, code.chars().next_back());
        let (piece, after) = rest.split_at(len);
        for c in piece.chars() {
            let blank = if c == '\n' { '\n' } else { ' ' };
            code.push(if place == Place::Code { c } else { blank });
            comments.push(if place == Place::Comment { c } else { blank });
        }
        rest = after;
    }
    (code, comments)
}

/// What stands at the start of `rest`, and how many bytes of it.
fn next_piece(rest: &str, before: Option<char>) -> (Place, usize) {
    if rest.starts_with("//") {
        return (Place::Comment, rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return (Place::Comment, block_comment_len(rest));
    }
    let starts_word = !before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if starts_word && let Some(len) = raw_string_len(rest) {
        return (Place::Text, len);
    }
    if rest.starts_with('"') {
        return (Place::Text, quoted_len(rest, '"'));
    }
    if rest.starts_with('\'') && is_character(rest) {
        return (Place::Text, quoted_len(rest, '\''));
    }
    (Place::Code, rest.chars().next().map_or(1, char::len_utf8))
}

fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest[at..];
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += here.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// The length of `r"…"`, `r#"…"#` and their kin at the start of `rest`.
fn raw_string_len(rest: &str) -> Option<usize> {
    let body = ["r", "br", "cr"].iter().find_map(|prefix| {
        let after = rest.strip_prefix(prefix)?;
        after.trim_start_matches('#').starts_with('"').then_some(after)
    })?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let end = format!("\"{}", "#".repeat(hashes));
    let start = rest.len() - body.len() + hashes + 1;
    Some(rest[start..].find(&end).map_or(rest.len(), |found| start + found + end.len()))
}

/// The length of a quoted text with escapes.
fn quoted_len(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Tells `'a'` and `'\n'` from the lifetime `'a`.
fn is_character(rest: &str) -> bool {
    let mut following = rest.chars().skip(1);
    match (following.next(), following.next()) {
        (Some('\\'), _) => true,
        (Some(_), Some(second)) => second == '\'',
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_texts_are_not_code() {
        let text = "let a = \"unsafe // no\"; // unsafe here\nlet b = r#\"x \" unsafe\"#; /* un /* safe */ */ c('\"', 'b');";
        let source = Source::new("a.rs", text);
        assert!(source.code.iter().all(|line| !has_word(line, "unsafe")), "{:?}", source.code);
        assert!(source.comments[0].contains("unsafe here"));
        assert!(!source.comments[0].contains("no"));
        assert!(source.code[1].contains("c("), "{:?}", source.code);
    }

    #[test]
    fn a_lifetime_does_not_start_a_text() {
        let source = Source::new("a.rs", "fn f<'a>(x: &'a str) { unsafe {} }");
        assert!(has_word(&source.code[0], "unsafe"));
    }

    #[test]
    fn tests_start_at_their_module() {
        let text = "fn a() {}\n#[cfg(test)]\nuse x;\n#[cfg(all(test, not(loom)))]\nmod tests {\n}\n";
        let source = Source::new("crates/x/src/a.rs", text);
        assert_eq!(source.tests_start, 3);
        assert!(!source.in_tests(2) && source.in_tests(5));
        assert!(Source::new("crates/x/tests/a.rs", text).in_tests(1), "a folder of tests is tests");
    }

    #[test]
    fn a_test_module_in_a_file_of_its_own_does_not_end_the_code() {
        let source = Source::new("crates/x/src/a.rs", "#[cfg(test)]\nmod tests;\nfn a() {}\n");
        assert_eq!(source.tests_start, 3);
    }
}
