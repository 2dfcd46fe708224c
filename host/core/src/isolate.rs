//! Decides which records of a batch are poison: those that trap however often they are tried.
//!
//! The batch is halved, and each part tried on a copy of the operator in the state that everything
//! before it has left. A part that succeeds is done; one that traps is halved again. So `p` poison
//! records among `n` cost about `p * log2(n)` tries, and every other record is processed once.

use std::ops::Range;

/// The search through one batch that has trapped.
///
/// ```
/// # use cofferdam_core::isolate::Isolation;
/// // Record 2 of 4 is poison at its second trap.
/// let mut search = Isolation::new(4, 2);
/// let mut poison = search.on_trap();
/// while let Some(part) = search.next_part() {
///     match part.contains(&2) {
///         true => poison = search.on_trap().or(poison),
///         false => search.on_success(),
///     }
/// }
/// assert_eq!(poison, Some(2));
/// ```
#[derive(Debug, Clone)]
pub struct Isolation {
    /// Parts to try, the next one last.
    parts: Vec<Range<u32>>,
    /// How often a record alone must trap.
    traps_max: u32,
    /// How often the next part, a record alone, has.
    traps: u32,
}

impl Isolation {
    /// A batch of this many records that is about to be tried.
    #[must_use]
    pub fn new(records: u32, traps_max: u32) -> Self {
        let all = 0..records;
        let parts = if all.is_empty() { Vec::new() } else { vec![all] };
        Self { parts, traps_max: traps_max.max(1), traps: 0 }
    }

    /// What to try next; `None` when every record was processed or found to be poison.
    #[must_use]
    pub fn next_part(&self) -> Option<Range<u32>> {
        self.parts.last().cloned()
    }

    /// The part was processed.
    pub fn on_success(&mut self) {
        self.parts.pop();
        self.traps = 0;
    }

    /// The part has trapped, and the operator was put back to the state before it. Gives the
    /// record that is poison, and thereby left out, if it is known by now.
    pub fn on_trap(&mut self) -> Option<u32> {
        let part = self.parts.last()?.clone();
        if part.len() == 1 {
            self.traps += 1;
            if self.traps < self.traps_max {
                return None;
            }
            self.parts.pop();
            self.traps = 0;
            return Some(part.start);
        }
        let middle = part.start + (part.end - part.start) / 2;
        self.parts.pop();
        self.parts.push(middle..part.end);
        self.parts.push(part.start..middle);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a search; gives what was processed, in order, the poison found, and the tries.
    fn search(
        records: u32,
        traps: u32,
        is_poison: impl Fn(u32) -> bool,
    ) -> (Vec<u32>, Vec<u32>, u32) {
        let mut search = Isolation::new(records, traps);
        let (mut processed, mut poison, mut tries) = (Vec::new(), Vec::new(), 0);
        while let Some(part) = search.next_part() {
            tries += 1;
            if part.clone().any(&is_poison) {
                poison.extend(search.on_trap());
            } else {
                processed.extend(part);
                search.on_success();
            }
        }
        (processed, poison, tries)
    }

    #[test]
    fn every_other_record_is_processed_once_and_in_order() {
        // Under miri each search takes its time.
        let end = if cfg!(miri) { 6 } else { 40 };
        for records in 0..end {
            for bits in (0..1u64 << records.min(12)).step_by(7) {
                let is_poison = |record: u32| record < 12 && bits >> record & 1 == 1;
                let (processed, poison, _) = search(records, 2, is_poison);
                let expected: Vec<u32> = (0..records).filter(|it| !is_poison(*it)).collect();
                assert_eq!(processed, expected, "{records} records, {bits:b}");
                assert!(poison.iter().copied().eq((0..records).filter(|it| is_poison(*it))));
            }
        }
    }

    #[test]
    fn one_among_a_thousand_costs_some_tens_of_tries() {
        let (_, poison, tries) = search(1024, 3, |record| record == 700);
        assert_eq!(poison, [700]);
        assert!(tries <= 2 * 10 + 1 + 3, "{tries}");
    }

    #[test]
    fn record_that_does_not_trap_again_is_processed() {
        let mut search = Isolation::new(1, 3);
        assert_eq!(search.on_trap(), None);
        assert_eq!(search.on_trap(), None);
        search.on_success();
        assert_eq!(search.next_part(), None);
    }
}
