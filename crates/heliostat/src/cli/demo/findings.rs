//! [`Findings`]: what speaks against a claim: counted, and the first few in words.

/// The most findings that are described; more are counted.
const DESCRIBED_MAX: usize = 8;

/// What speaks against a claim.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// How many there are.
    pub count: u64,
    /// The first of them, in words.
    pub described: Vec<String>,
}

impl Findings {
    /// Adds one; `text` is asked for its words only if they are wanted.
    pub fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.described.len() < DESCRIBED_MAX {
            self.described.push(text());
        }
    }
}
