//! How many records an operator gets in one call.
//!
//! Limits hold for a call, and a user sets them for what a record may take. So a call gets few records where each of
//! them takes long: it begins with one, gets twice as many while calls take little of their limits, and fewer as soon
//! as they take more.

/// A call that takes less than this part of its limit may be twice as large: even if each of its records took four
/// times as long, the call would be within the quarter below.
const LOW: f64 = 1.0 / 32.0;
/// A call that takes more is made smaller.
const HIGH: f64 = 1.0 / 4.0;

/// The size of an operator's next call.
#[derive(Debug, Clone)]
pub struct CallSize {
    records_max: usize,
    /// So many records come one at a time, because a call with several of them has failed at a limit.
    alone: u64,
}

impl CallSize {
    /// That of the first call of an instance; the first `alone` records come one at a time.
    #[must_use]
    pub fn new(alone: u64) -> Self {
        Self { records_max: 1, alone }
    }

    /// How many records the next call may have; at least 1.
    #[must_use]
    pub fn records_max(&self) -> usize {
        if 0 < self.alone { 1 } else { self.records_max }
    }

    /// How many records have still to come one at a time.
    #[must_use]
    pub fn alone_left(&self) -> u64 {
        self.alone
    }

    /// A call with so many records has failed at a limit, and its records come again.
    pub fn failed(&mut self, records: usize) {
        self.records_max = self.records_max.min((records / 2).max(1));
    }

    /// A call with so many records has ended well. It has taken this part of its limits, of the one that it came
    /// nearest to.
    pub fn called(&mut self, records: usize, load: f64) {
        self.alone = self.alone.saturating_sub(records as u64);
        if HIGH < load {
            // As many as would have taken half of that.
            let fits = records as f64 * (HIGH / 2.0) / load;
            self.records_max = self.records_max.min((fits as usize).max(1));
        } else if load < LOW && self.records_max <= records {
            self.records_max = self.records_max.saturating_mul(2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// What each record takes of the limit of its call, in the order of records.
    fn loads(size: &mut CallSize, costs: &[f64]) -> Vec<(usize, f64)> {
        let (mut calls, mut from) = (Vec::new(), 0);
        while from < costs.len() {
            let to = costs.len().min(from + size.records_max());
            let load = costs[from..to].iter().sum();
            size.called(to - from, load);
            calls.push((to - from, load));
            from = to;
        }
        calls
    }

    #[test]
    fn cheap_records_come_in_large_calls_soon() {
        let calls = loads(&mut CallSize::new(0), &vec![1e-6; 100_000]);
        assert!(calls.len() < 30, "{}", calls.len());
        assert_eq!(
            calls[..4].iter().map(|(records, _)| *records).collect::<Vec<_>>(),
            [1, 2, 4, 8]
        );
    }

    /// Any cost of a record that a call of one can bear is borne, where records differ by no more than eight times.
    #[test]
    fn no_call_exceeds_its_limit_if_each_record_is_within_it() {
        for seed in 0..2_000 {
            let mut random = Random::new(seed);
            let least = 0.12 / 10_f64.powi(random.between(0, 6) as i32);
            let mut costs = Vec::new();
            for _ in 0..100 {
                let cost = least * random.between(1, 8) as f64;
                costs.extend((0..random.between(1, 300)).map(|_| cost));
            }
            for (records, load) in loads(&mut CallSize::new(0), &costs) {
                assert!(load < 1.0, "seed {seed}: {records} records take {load}");
            }
        }
    }

    /// What no rule can foresee: after that the records of the call come one at a time.
    #[test]
    fn records_of_a_call_that_failed_come_alone() {
        let mut costs = vec![1e-6; 10_000];
        costs.extend(vec![0.9; 10]);
        assert!(loads(&mut CallSize::new(0), &costs).iter().any(|(_, load)| 1.0 < *load));
        let calls = loads(&mut CallSize::new(12_000), &costs);
        assert!(calls.iter().all(|(records, load)| *records == 1 && *load < 1.0));
        let mut size = CallSize::new(1);
        size.called(1, 1e-9);
        assert_eq!((size.records_max(), size.alone_left()), (2, 0));
        size.failed(2);
        assert_eq!(size.records_max(), 1);
    }

    #[test]
    fn an_expensive_record_makes_calls_small_and_cheap_ones_large_again() {
        let mut size = CallSize::new(0);
        loads(&mut size, &vec![1e-5; 20_000]);
        let before = size.records_max();
        assert!(1_000 < before);
        size.called(before, 0.5);
        assert_eq!(size.records_max(), before / 4);
        loads(&mut size, &vec![1e-5; 20_000]);
        assert!(before <= size.records_max());
    }
}
