//! [`Tally`]: how many tests passed, failed and were skipped, as read from what a test runner printed.

use std::fmt;
use std::ops::AddAssign;

/// Prints as `N passed, N failed, N skipped`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Tally {
    /// One step that is one test.
    pub fn step(success: bool) -> Self {
        Self { passed: u64::from(success), failed: u64::from(!success), skipped: 0 }
    }

    /// What the summaries of nextest or `cargo test` in `output` say, all of them added. A runner that failed
    /// without a failed test (its build broke, say) counts as one failure.
    pub fn from_output(output: &str, success: bool) -> Self {
        let mut tally = Self::default();
        for line in output.lines() {
            if let Some((_, counts)) =
                line.split_once("tests run: ").or_else(|| line.split_once("test run: "))
            {
                tally += Self::from_counts(counts, ',');
            } else if let Some((_, counts)) = line.split_once("test result: ") {
                let counts = counts.split_once(". ").map_or(counts, |(_, counts)| counts);
                tally += Self::from_counts(counts, ';');
            }
        }
        if !success && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }

    fn from_counts(counts: &str, separator: char) -> Self {
        let mut tally = Self::default();
        for count in counts.split(separator) {
            let mut words = count.split_whitespace();
            let Some(Ok(number)) = words.next().map(str::parse::<u64>) else { continue };
            match words.collect::<Vec<_>>()[..] {
                ["passed", ..] => tally.passed += number,
                ["skipped" | "ignored", ..] => tally.skipped += number,
                ["failed" | "timed" | "exec" | "leaky-failed", ..] => tally.failed += number,
                // "filtered out" and "measured" ran nothing.
                _ => {}
            }
        }
        tally
    }

    /// Takes `skipped` tests, which said themselves that they could not run, out of those that passed. They
    /// count as failed where `as_failed`.
    pub fn with_skipped(self, skipped: u64, as_failed: bool) -> Self {
        let passed = self.passed.saturating_sub(skipped);
        if as_failed {
            Self { passed, failed: self.failed + skipped, skipped: self.skipped }
        } else {
            Self { passed, failed: self.failed, skipped: self.skipped + skipped }
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped }
    }

    #[test]
    fn the_summaries_of_both_runners_are_understood() {
        let cases = [
            ("     Summary [   0.012s] 7 tests run: 7 passed, 0 skipped", true, tally(7, 0, 0)),
            (
                "Summary [ 1.2s] 9 tests run: 5 passed (1 slow), 2 failed, 2 timed out, 3 skipped",
                false,
                tally(5, 4, 3),
            ),
            ("Summary [ 1.2s] 1 test run: 1 passed, 0 skipped", true, tally(1, 0, 0)),
            ("Summary [ 1.2s] 2/9 tests run: 1 passed, 1 failed, 0 skipped", false, tally(1, 1, 0)),
            (
                "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s\n\
                 test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s",
                false,
                tally(7, 3, 1),
            ),
            ("", true, tally(0, 0, 0)),
        ];
        for (output, success, expected) in cases {
            assert_eq!(Tally::from_output(output, success), expected, "{output}");
        }
    }

    #[test]
    fn a_runner_that_fails_without_a_failed_test_is_one_failure() {
        assert_eq!(Tally::from_output("error: could not compile", false), tally(0, 1, 0));
    }

    #[test]
    fn a_test_that_says_it_skipped_has_not_passed() {
        assert_eq!(tally(5, 0, 1).with_skipped(2, false), tally(3, 0, 3));
        assert_eq!(tally(5, 0, 1).with_skipped(2, true), tally(3, 2, 1), "a failure in CI");
    }

    #[test]
    fn the_last_line_has_the_promised_form() {
        assert_eq!(tally(1, 2, 3).to_string(), "1 passed, 2 failed, 3 skipped");
    }
}
