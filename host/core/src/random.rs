//! Turns a seed into a sequence of numbers, so that what is random in a decision can be replayed.

/// A splitmix64 generator (Steele, Lea, Flood 2014): eight bytes of state, every seed is good.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator whose whole sequence is determined by `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from `low` to `high`, both inclusive; `low` where the range is empty.
    ///
    /// The bias of the modulo is below 2^-32 for the ranges of milliseconds this is used for.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        match high.checked_sub(low).and_then(|span| span.checked_add(1)) {
            Some(span) => low + self.next_u64() % span,
            None if high < low => low,
            None => self.next_u64(),
        }
    }

    /// True once in `n` times on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next_u64().is_multiple_of(n)
    }
}

/// Scrambles 64 bits so that neighbouring inputs give unrelated outputs.
#[must_use]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_gives_the_same_sequence() {
        let (mut left, mut right) = (Random::new(7), Random::new(7));
        for _ in 0..100 {
            assert_eq!(left.next_u64(), right.next_u64());
        }
    }

    #[test]
    fn between_reaches_both_ends_and_nothing_else() {
        let mut random = Random::new(1);
        let mut seen = [0u32; 4];
        for _ in 0..1000 {
            seen[usize::try_from(random.between(3, 6) - 3).expect("0 to 3")] += 1;
        }
        assert!(seen.iter().all(|&n| 150 < n), "{seen:?}");
        assert_eq!(random.between(5, 5), 5);
        assert_eq!(random.between(6, 5), 6);
    }
}
