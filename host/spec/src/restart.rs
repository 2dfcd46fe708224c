//! What a manifest says about failures: when a job restarts, and what of it.

use cofferdam_core::{
    failover::FailoverStrategy,
    restart::{ExponentialDelay, RestartStrategy},
};
use cofferdam_settings::{AnySetting, Located, Optional, Section, Setting, table::Key};

use super::{RestartSpec, execution::FLINK_INT_MAX};

fn is_zero(ms: &u64) -> Option<&'static str> {
    (*ms == 0).then_some("it must be at least 1 ms")
}

static MERGE_FAILURES: Setting<bool> = Key::boolean(
    "restart-strategy.merge-failures",
    "failures of one incident count as one, with every strategy (not Flink's)",
)
.or(false);

static TYPE: Optional<StrategyName> = Key::choice(
    "restart-strategy.type",
    &[
        ("none", StrategyName::None),
        ("off", StrategyName::None),
        ("disable", StrategyName::None),
        ("fixed-delay", StrategyName::FixedDelay),
        ("fixeddelay", StrategyName::FixedDelay),
        ("failure-rate", StrategyName::FailureRate),
        ("failurerate", StrategyName::FailureRate),
        ("exponential-delay", StrategyName::ExponentialDelay),
        ("exponentialdelay", StrategyName::ExponentialDelay),
    ],
    "when a job restarts after a failure, and when it gives up",
)
.aliases(&["restart-strategy"])
.or_none("`exponential-delay` with checkpoints, `none` without");

static FIXED_ATTEMPTS: Setting<u64> = Key::integer(
    "restart-strategy.fixed-delay.attempts",
    0,
    u64::MAX,
    "restarts before the job fails",
)
.or(1);
static FIXED_DELAY: Setting<u64> =
    Key::duration("restart-strategy.fixed-delay.delay", "time before each restart").or(1_000);
static RATE_FAILURES: Setting<u64> = Key::integer(
    "restart-strategy.failure-rate.max-failures-per-interval",
    1,
    u32::MAX as u64,
    "failures within the interval that still lead to a restart",
)
.or(1);
static RATE_INTERVAL: Setting<u64> = Key::duration(
    "restart-strategy.failure-rate.failure-rate-interval",
    "the interval in which failures are counted",
)
.unless(|ms| (*ms == 0).then_some("it must be above 0"))
.or(60_000);
static RATE_DELAY: Setting<u64> =
    Key::duration("restart-strategy.failure-rate.delay", "time before each restart").or(1_000);
static INITIAL_BACKOFF: Setting<u64> = Key::duration(
    "restart-strategy.exponential-delay.initial-backoff",
    "time before the first restart",
)
.unless(is_zero)
.or(1_000);
static MAX_BACKOFF: Setting<u64> = Key::duration(
    "restart-strategy.exponential-delay.max-backoff",
    "the longest time before a restart",
)
.unless(is_zero)
.or(60_000);
static MULTIPLIER: Setting<f64> = Key::number(
    "restart-strategy.exponential-delay.backoff-multiplier",
    "the factor by which the time grows with each failure; above 1",
)
.unless(|factor| (*factor <= 1.0).then_some("it must be above 1"))
.or(1.5);
static RESET_THRESHOLD: Setting<u64> = Key::duration(
    "restart-strategy.exponential-delay.reset-backoff-threshold",
    "after this time without a failure the time before a restart is the initial one again",
)
.unless(is_zero)
.or(3_600_000);
static JITTER: Setting<f64> = Key::number(
    "restart-strategy.exponential-delay.jitter-factor",
    "the share of the time that is random, from 0 to 1",
)
.unless(|share| (!(0.0..=1.0).contains(share)).then_some("it must be from 0 to 1"))
.or(0.1);
static RESET_ATTEMPTS: Optional<u64> = Key::integer(
    "restart-strategy.exponential-delay.attempts-before-reset-backoff",
    1,
    u64::MAX,
    "restarts before the job fails, if the time was not reset between them",
)
.or_none("infinite");

static FAILOVER: Setting<FailoverStrategy> = Key::choice(
    "jobmanager.execution.failover-strategy",
    &[
        (FailoverStrategy::Region.name(), FailoverStrategy::Region),
        (FailoverStrategy::Full.name(), FailoverStrategy::Full),
    ],
    "`full`: every task restarts; `region`: only those of the regions concerned",
)
.or(FailoverStrategy::Region);

static ESCALATION: Optional<u64> = Key::integer(
    "jobmanager.execution.failover-escalation",
    1,
    FLINK_INT_MAX as u64,
    "after this many failovers in a row without a completed checkpoint more restarts: readers of approximate \
     exchanges with all that they read from; then every task; then the job fails (not Flink's)",
)
.or_none("none");

pub(super) static ROWS: &[&dyn AnySetting] = &[
    &TYPE,
    &FIXED_ATTEMPTS,
    &FIXED_DELAY,
    &RATE_FAILURES,
    &RATE_INTERVAL,
    &RATE_DELAY,
    &INITIAL_BACKOFF,
    &MAX_BACKOFF,
    &MULTIPLIER,
    &RESET_THRESHOLD,
    &JITTER,
    &RESET_ATTEMPTS,
    &MERGE_FAILURES,
    &FAILOVER,
    &ESCALATION,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StrategyName {
    None,
    FixedDelay,
    FailureRate,
    ExponentialDelay,
}

/// The restart strategy. Those that are not chosen are read all the same: a mistake in them is one.
pub(super) fn read(root: &Section<'_>) -> Strategies {
    let chosen = root.find(&TYPE).map(|choice| choice.value);
    Strategies {
        chosen,
        fixed_delay: RestartStrategy::FixedDelay {
            attempts: root.get(&FIXED_ATTEMPTS),
            delay_ms: root.get(&FIXED_DELAY),
        },
        failure_rate: RestartStrategy::FailureRate {
            failures_per_interval_max: u32::try_from(root.get(&RATE_FAILURES)).unwrap_or(u32::MAX),
            interval_ms: root.get(&RATE_INTERVAL),
            delay_ms: root.get(&RATE_DELAY),
        },
        exponential: read_exponential(root),
        is_merging_failures: root.get(&MERGE_FAILURES),
    }
}

/// What a manifest says of each strategy.
pub(super) struct Strategies {
    chosen: Option<StrategyName>,
    fixed_delay: RestartStrategy,
    failure_rate: RestartStrategy,
    exponential: ExponentialDelay,
    is_merging_failures: bool,
}

impl Strategies {
    /// The one that counts: without a choice it depends on whether there are checkpoints. Of the others
    /// nothing is listed among what counts.
    pub(super) fn resolve(self, root: &Section<'_>, is_checkpointed: bool) -> RestartSpec {
        let default = match is_checkpointed {
            true => StrategyName::ExponentialDelay,
            false => StrategyName::None,
        };
        let (name, strategy) = match self.chosen.unwrap_or(default) {
            StrategyName::None => ("none", RestartStrategy::None),
            StrategyName::FixedDelay => ("fixed-delay", self.fixed_delay),
            StrategyName::FailureRate => ("failure-rate", self.failure_rate),
            StrategyName::ExponentialDelay => {
                ("exponential-delay", RestartStrategy::ExponentialDelay(self.exponential))
            }
        };
        root.document().amend(TYPE.row().key, name);
        let own = format!("restart-strategy.{name}.");
        root.document().forget(|key| {
            let of_strategy =
                key.strip_prefix("restart-strategy.").is_some_and(|it| it.contains('.'));
            of_strategy && !key.starts_with(&own)
        });
        RestartSpec { strategy, is_merging_failures: self.is_merging_failures }
    }
}

fn read_exponential(root: &Section<'_>) -> ExponentialDelay {
    let initial_backoff_ms = root.get(&INITIAL_BACKOFF);
    let backoff_ms_max = root.get(&MAX_BACKOFF);
    if backoff_ms_max < initial_backoff_ms {
        let span = root.span_of(&MAX_BACKOFF).or_else(|| root.span_of(&INITIAL_BACKOFF));
        let span = span.unwrap_or_else(|| root.span.clone());
        root.refuse(&MAX_BACKOFF, &span, "it is below initial-backoff");
    }
    ExponentialDelay {
        initial_backoff_ms,
        backoff_ms_max,
        backoff_multiplier: root.get(&MULTIPLIER),
        reset_threshold_ms: root.get(&RESET_THRESHOLD),
        jitter_factor: root.get(&JITTER),
        attempts_max: root.find(&RESET_ATTEMPTS).map(|number| number.value),
    }
}

/// What restarts when a task fails, and after how many failovers more does.
pub(super) fn read_failover(root: &Section<'_>) -> (FailoverStrategy, Option<Located<u64>>) {
    (root.get(&FAILOVER), root.find(&ESCALATION))
}

/// The bound of failovers, which counts from checkpoint to checkpoint.
pub(super) fn resolve_escalation(
    root: &Section<'_>,
    bound: Option<Located<u64>>,
    is_checkpointed: bool,
) -> Option<u32> {
    let Located { value, span } = bound?;
    if !is_checkpointed {
        let why = "it counts from checkpoint to checkpoint: set an interval for them";
        root.refuse(&ESCALATION, &span, why);
    }
    u32::try_from(value).ok()
}
