//! Decides after which delay a failed job is restarted, or that it is given up.
//!
//! The four strategies, their defaults and their counting are Flink's
//! (`org.apache.flink.runtime.executiongraph.failover.*RestartBackoffTimeStrategy`, 2.0), folded
//! from its three calls (notify, may restart, backoff) into one.

use std::collections::VecDeque;

use crate::{ids::Millis, random::Random};

/// A restart strategy with its settings. Durations in milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub enum RestartStrategy {
    /// The first failure ends the job.
    None,
    /// `attempts` restarts, `delay_ms` after each failure. The count never starts again.
    FixedDelay {
        /// How many restarts in the life of the job. Flink's default: 1.
        attempts: u64,
        /// Flink's default: 1 s.
        delay_ms: u64,
    },
    /// Restarts as long as no more than `failures_per_interval_max` failures fall in an interval.
    FailureRate {
        /// Failures tolerated within the interval. Flink's default: 1.
        failures_per_interval_max: u32,
        /// Flink's default: 1 min.
        interval_ms: u64,
        /// Flink's default: 1 s.
        delay_ms: u64,
    },
    /// Waits longer after each failure, until the job has been stable for a while.
    ExponentialDelay(ExponentialDelay),
}

/// The settings of the exponential-delay strategy; `default()` gives Flink's (since 1.19).
#[derive(Debug, Clone, PartialEq)]
pub struct ExponentialDelay {
    /// The first delay, and the lower bound of every other.
    pub initial_backoff_ms: u64,
    /// The upper bound, jitter included.
    pub backoff_ms_max: u64,
    /// What a delay is multiplied by to give the next one.
    pub backoff_multiplier: f64,
    /// How long the job must run after a delay for the delays to start again.
    pub reset_threshold_ms: u64,
    /// The share of a delay that is added or taken away at random, 0 to 1.
    pub jitter_factor: f64,
    /// Restarts before giving up, counted since the last reset; `None`: no limit.
    pub attempts_max: Option<u64>,
}

impl Default for ExponentialDelay {
    fn default() -> Self {
        Self {
            initial_backoff_ms: 1_000,
            backoff_ms_max: 60_000,
            backoff_multiplier: 1.5,
            reset_threshold_ms: 3_600_000,
            jitter_factor: 0.1,
            attempts_max: None,
        }
    }
}

/// The answer to one failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// False where the failure belongs to a restart that is already scheduled.
    pub is_new_attempt: bool,
    /// False where the strategy allows no restart any more.
    pub can_restart: bool,
    /// The delay of the restart, in milliseconds from the failure.
    pub backoff_ms: u64,
}

/// A strategy and what it remembers of earlier failures. One for the whole life of a job.
#[derive(Debug, Clone)]
pub struct RestartState {
    strategy: RestartStrategy,
    memory: Memory,
    /// The end of the last delay, where failures up to it count once; see
    /// [`RestartState::merging`].
    merged_until: Option<Option<Millis>>,
    /// A restart is scheduled and has not begun.
    is_pending: bool,
}

#[derive(Debug, Clone)]
enum Memory {
    Nothing,
    Count(u64),
    Recent(VecDeque<Millis>),
    /// `next_at` is the end of the last delay; `None` before the first failure.
    Backoff {
        next_at: Option<Millis>,
        attempts: u64,
    },
}

impl RestartState {
    /// A strategy that has seen no failure yet.
    #[must_use]
    pub fn new(strategy: RestartStrategy) -> Self {
        let memory = match strategy {
            RestartStrategy::None => Memory::Nothing,
            RestartStrategy::FixedDelay { .. } => Memory::Count(0),
            RestartStrategy::FailureRate { .. } => Memory::Recent(VecDeque::new()),
            RestartStrategy::ExponentialDelay(_) => Memory::Backoff { next_at: None, attempts: 0 },
        };
        Self { strategy, memory, merged_until: None, is_pending: false }
    }

    /// Failures up to the end of a delay belong to the restart that is already scheduled, whatever
    /// the strategy: many tasks that fail by one incident cost one attempt. Not Flink's, which does
    /// so for the exponential delay alone.
    #[must_use]
    pub fn merging(mut self, is_merging: bool) -> Self {
        self.merged_until = is_merging.then_some(None);
        self
    }

    /// How many more failures lead to a restart, where the strategy has such a number.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        match (&self.strategy, &self.memory) {
            (RestartStrategy::None, _) => Some(0),
            (RestartStrategy::FixedDelay { attempts, .. }, Memory::Count(failures)) => {
                Some(attempts.saturating_sub(*failures))
            }
            (RestartStrategy::ExponentialDelay(settings), Memory::Backoff { attempts, .. }) => {
                settings.attempts_max.map(|max| max.saturating_sub(*attempts))
            }
            _ => None,
        }
    }

    /// The scheduled restart has begun: what fails from now on belongs to the new attempt and counts,
    /// even within the same millisecond.
    pub fn on_restarted(&mut self) {
        self.is_pending = false;
    }

    /// Counts one failure and says what follows from it. `random` gives the jitter.
    pub fn on_failure(&mut self, now: Millis, random: &mut Random) -> Verdict {
        let is_pending = std::mem::replace(&mut self.is_pending, true);
        if let Some(Some(until)) =
            self.merged_until.filter(|until| is_pending && Some(now) <= *until)
        {
            return verdict(false, true, until.since(now));
        }
        let verdict = self.count(now, is_pending, random);
        if let Some(until) = &mut self.merged_until {
            *until = Some(now.after(verdict.backoff_ms));
        }
        verdict
    }

    fn count(&mut self, now: Millis, is_pending: bool, random: &mut Random) -> Verdict {
        match (&self.strategy, &mut self.memory) {
            (RestartStrategy::FixedDelay { attempts, delay_ms }, Memory::Count(failures)) => {
                *failures += 1;
                verdict(true, *failures <= *attempts, *delay_ms)
            }
            (
                RestartStrategy::FailureRate { failures_per_interval_max, interval_ms, delay_ms },
                Memory::Recent(recent),
            ) => {
                let capacity = *failures_per_interval_max as usize + 1;
                if recent.len() == capacity {
                    recent.pop_front();
                }
                recent.push_back(now);
                let is_below = match recent.front() {
                    Some(oldest) if recent.len() == capacity => *interval_ms < now.since(*oldest),
                    _ => true,
                };
                verdict(true, is_below, *delay_ms)
            }
            (
                RestartStrategy::ExponentialDelay(settings),
                Memory::Backoff { next_at, attempts },
            ) => {
                let pending_until = next_at.filter(|next| is_pending && now <= *next);
                settings.on_failure(next_at, attempts, pending_until.is_some(), now, random)
            }
            _ => verdict(true, false, 0),
        }
    }
}

fn verdict(is_new_attempt: bool, can_restart: bool, backoff_ms: u64) -> Verdict {
    Verdict { is_new_attempt, can_restart, backoff_ms }
}

impl ExponentialDelay {
    fn on_failure(
        &self,
        next_at: &mut Option<Millis>,
        attempts: &mut u64,
        is_merged: bool,
        now: Millis,
        random: &mut Random,
    ) -> Verdict {
        // A failure up to and including the end of the delay belongs to the restart that is
        // already scheduled.
        if !is_merged {
            if next_at.is_none_or(|next| self.reset_threshold_ms <= now.since(next)) {
                *attempts = 0;
            }
            *next_at = Some(now.after(self.delay_ms(*attempts, random)));
            *attempts += 1;
        }
        let can_restart = self.attempts_max.is_none_or(|max| *attempts <= max);
        verdict(!is_merged, can_restart, next_at.map_or(0, |next| next.since(now)))
    }

    fn delay_ms(&self, attempts: u64, random: &mut Random) -> u64 {
        // Not capped yet: Flink's jitter is a share of the delay before the cap. The cast saturates.
        let base_ms =
            (self.initial_backoff_ms as f64 * self.backoff_multiplier.powf(attempts as f64)) as u64;
        let jitter_ms = (base_ms as f64 * self.jitter_factor) as u64;
        let delay_ms =
            (base_ms - jitter_ms).saturating_add(random.between(0, jitter_ms.saturating_mul(2)));
        delay_ms.clamp(self.initial_backoff_ms, self.backoff_ms_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds failures at the given times; gives `new/merged restart delay` or `give up` for each.
    fn check(strategy: RestartStrategy, failures_ms: &[u64], expected: &[&str]) {
        let mut state = RestartState::new(strategy);
        let mut random = Random::new(0);
        let answers: Vec<String> = failures_ms
            .iter()
            .map(|&at| {
                let verdict = state.on_failure(Millis(at), &mut random);
                let kind = if verdict.is_new_attempt { "new" } else { "merged" };
                match verdict.can_restart {
                    true => format!("{kind} {}", verdict.backoff_ms),
                    false => format!("{kind} give up"),
                }
            })
            .collect();
        assert_eq!(answers, expected);
    }

    fn exponential(
        b0: u64,
        max: u64,
        m: f64,
        reset: u64,
        j: f64,
        a: Option<u64>,
    ) -> RestartStrategy {
        RestartStrategy::ExponentialDelay(ExponentialDelay {
            initial_backoff_ms: b0,
            backoff_ms_max: max,
            backoff_multiplier: m,
            reset_threshold_ms: reset,
            jitter_factor: j,
            attempts_max: a,
        })
    }

    #[test]
    fn none_gives_up_at_the_first_failure() {
        check(RestartStrategy::None, &[5], &["new give up"]);
    }

    #[test]
    fn fixed_delay_allows_its_attempts_and_not_one_more() {
        check(
            RestartStrategy::FixedDelay { attempts: 3, delay_ms: 10 },
            &[0, 0, 900_000_000, 900_000_001],
            &["new 10", "new 10", "new 10", "new give up"],
        );
    }

    #[test]
    fn merged_failures_of_one_incident_count_once() {
        let strategy = RestartStrategy::FixedDelay { attempts: 2, delay_ms: 10 };
        let mut state = RestartState::new(strategy.clone()).merging(true);
        let mut random = Random::new(0);
        let mut at = |ms| state.on_failure(Millis(ms), &mut random);
        assert_eq!(at(0), verdict(true, true, 10));
        assert_eq!(at(3), verdict(false, true, 7));
        assert_eq!(at(10), verdict(false, true, 0));
        assert_eq!(at(11), verdict(true, true, 10));
        assert!(!at(30).can_restart, "the third incident is one too many");
        check(strategy, &[0, 0, 0], &["new 10", "new 10", "new give up"]);
    }

    #[test]
    fn failure_rate_counts_only_what_falls_in_the_interval() {
        let strategy = |max| RestartStrategy::FailureRate {
            failures_per_interval_max: max,
            interval_ms: if max == 1 { 1 } else { 10_000 },
            delay_ms: 0,
        };
        check(strategy(1), &[0, 2, 4], &["new 0", "new 0", "new 0"]);
        check(strategy(3), &[0, 0, 0, 0], &["new 0", "new 0", "new 0", "new give up"]);
        // The interval is exceeded strictly.
        check(strategy(1), &[0, 1], &["new 0", "new give up"]);
    }

    #[test]
    fn exponential_delay_allows_its_attempts_and_not_one_more() {
        let mut state = RestartState::new(exponential(1, 3, 1.2, 10, 0.25, Some(13)));
        let mut random = Random::new(1);
        for round in 0..14u64 {
            let verdict = state.on_failure(Millis(round * 4), &mut random);
            assert!(verdict.is_new_attempt, "round {round}");
            // Flink asks before it notifies; here the 14th failure itself is the one too many.
            assert_eq!(!verdict.can_restart, round == 13, "round {round}");
        }
    }

    #[test]
    fn exponential_delay_begins_with_the_initial_one() {
        check(exponential(42, 45, 2.0, 8, 0.0, None), &[0], &["new 42"]);
    }

    #[test]
    fn exponential_delay_grows_up_to_the_longest_one() {
        for seed in 0..100 {
            let mut state = RestartState::new(exponential(1, 6, 2.0, 8, 0.25, None));
            let mut random = Random::new(seed);
            for _ in 0..10 {
                let verdict = state.on_failure(Millis(0), &mut random);
                assert!(verdict.can_restart && verdict.backoff_ms <= 6, "{verdict:?}");
            }
        }
    }

    #[test]
    fn exponential_delay_begins_anew_after_a_time_without_failures_that_counts_from_the_end_of_the_delay()
     {
        check(exponential(1, 5, 2.0, 8, 0.25, None), &[0, 8], &["new 1", "new 2"]);
        check(exponential(1, 5, 2.0, 8, 0.25, None), &[0, 9], &["new 1", "new 1"]);
    }

    #[test]
    fn exponential_delay_merges_failures_up_to_the_end_of_the_delay() {
        check(
            exponential(10, 100, 2.0, 1000, 0.0, None),
            &[0, 4, 10, 11],
            &["new 10", "merged 6", "merged 0", "new 20"],
        );
    }

    /// With a delay below a millisecond's resolution six restarts used to count as one.
    #[test]
    fn a_failure_of_the_new_attempt_counts_even_within_the_same_millisecond() {
        let strategy = exponential(1, 1, 1.0, 1000, 0.0, Some(2));
        for is_merging in [false, true] {
            let mut state = RestartState::new(strategy.clone()).merging(is_merging);
            let mut random = Random::new(0);
            let mut fail = |state: &mut RestartState, ms| state.on_failure(Millis(ms), &mut random);
            assert!(fail(&mut state, 5).is_new_attempt);
            assert!(!fail(&mut state, 6).is_new_attempt, "the restart is pending");
            state.on_restarted();
            assert_eq!(fail(&mut state, 6), verdict(true, true, 1));
            state.on_restarted();
            assert!(!fail(&mut state, 7).can_restart, "two attempts are used up");
        }
    }

    #[test]
    fn exponential_delay_stays_within_its_bounds_after_thousands_of_failures() {
        let mut state = RestartState::new(exponential(1_000, 60_000, 1.5, 3_600_000, 0.1, None));
        let mut random = Random::new(3);
        let mut now = 0;
        for _ in 0..5_000 {
            now += 60_001;
            let verdict = state.on_failure(Millis(now), &mut random);
            assert!(verdict.can_restart);
            assert!((1_000..=60_000).contains(&verdict.backoff_ms), "{verdict:?}");
        }
    }
}
