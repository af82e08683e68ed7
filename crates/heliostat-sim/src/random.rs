//! [`Random`]: numbers that follow from a seed.
//!
//! Our own few lines, not a library: a seed that failed once must fail for ever, so the sequence may never
//! change with a version. The generator is SplitMix64 (public domain, Sebastiano Vigna).

use std::time::Duration;

/// A source of numbers. A copy goes on as the original would; [`Random::fork`] makes an unrelated one.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Makes one whose numbers have nothing to do with the ones to come.
    pub(crate) const fn fork(&mut self) -> Self {
        Self(mix(self.next() ^ 0x5851_f42d_4c95_7f2d))
    }

    /// A number below `bound`; 0 when that is 0.
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        let number = self.next();
        if bound == 0 { 0 } else { number % bound }
    }

    /// A number from `low` to `high`, both included.
    pub(crate) const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// Yes in `per_mille` of a thousand cases.
    pub(crate) const fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        let len = u64::try_from(len).expect("a length fits in 64 bits");
        usize::try_from(self.below(len)).expect("less than a length")
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())]
    }

    /// A time up to `longest`; short ones are as likely as long ones, on a scale of doublings.
    pub(crate) fn time(&mut self, longest: Duration) -> Duration {
        let nanos = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        let shift = self.below(8);
        Duration::from_nanos(self.below((nanos >> shift) + 1))
    }

    /// A time up to `longest`, each as likely.
    pub(crate) fn even_time(&mut self, longest: Duration) -> Duration {
        let nanos = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.below(nanos + 1))
    }
}

/// Spreads every bit of `number` over all bits of the answer.
pub(crate) const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
