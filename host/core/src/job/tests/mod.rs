//! The laws of a job's life, each as a script of events and the effects they lead to.

mod ending;
mod failover;

use super::*;
use crate::{
    checkpoint::CheckpointSettings,
    exchange::ExchangeType,
    failure::EnvironmentError,
    graph::{Edge, JobGraph, Node, Partitioner},
    ids::NodeId,
    restart::RestartStrategy,
};

const A: TaskId = TaskId { node: NodeId(0), index: 0 };
const B: TaskId = TaskId { node: NodeId(1), index: 0 };

const C: TaskId = TaskId { node: NodeId(2), index: 0 };

/// Operators `a`, `b` and `c`, as many as there are names, and edges between them.
fn graph(names: &[&str], edges: &[(u32, u32, ExchangeType)]) -> JobGraph {
    let operators =
        names.iter().map(|name| Node { name: (*name).to_owned(), parallelism: 1 }).collect();
    let edge = |&(from, to, exchange): &(u32, u32, ExchangeType)| Edge {
        from: NodeId(from),
        output: 0,
        to: NodeId(to),
        input: 0,
        partitioner: Partitioner::Hash,
        exchange,
    };
    JobGraph::new(operators, edges.iter().map(edge).collect()).expect("a job")
}

fn settings(restart: RestartStrategy) -> JobSettings {
    let checkpoint = CheckpointSettings {
        interval_ms: Some(100),
        min_pause_ms: 100,
        timeout_ms: 1_000,
        ..CheckpointSettings::default()
    };
    let graph = graph(&["a", "b"], &[(0, 1, ExchangeType::PipelinedBounded)]);
    JobSettings {
        graph,
        failover: FailoverStrategy::Region,
        checkpoint,
        restart,
        is_merging_failures: false,
        escalates_after: None,
        seed: 1,
    }
}

fn fixed_delay(attempts: u64) -> RestartStrategy {
    RestartStrategy::FixedDelay { attempts, delay_ms: 50 }
}

/// Runs `time: event -> effects` lines on a job of one region, `a` and `b`.
fn check(restart: RestartStrategy, script: &str) {
    check_with(settings(restart), script);
}

/// An attempt of all tasks is written `@n`, one of a task `a@n`, a checkpoint `#n`.
fn check_with(settings: JobSettings, script: &str) {
    let names = ["a", "b", "c"];
    let all: Vec<TaskId> = settings.graph.tasks().into_iter().collect();
    let mut job = Job::new(settings, Resume::default()).0;
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (input, expected) = line.split_once("->").expect("event -> effects");
        let (time, event) = input.split_once(':').expect("time: event");
        let now = Millis(time.trim().parse().expect("a time"));
        let mut effects = Vec::new();
        job.step(now, event_of(event.trim(), &all), &mut effects);
        let effects: Vec<String> = effects.iter().map(|effect| show(effect, &all)).collect();
        assert_eq!(effects.join(", "), expected.trim(), "{line}");
    }
    assert!(all.len() <= names.len());
}

fn task_of(name: &str) -> TaskId {
    match name {
        "a" => A,
        "b" => B,
        _ => C,
    }
}

/// `@1` is every task, `a@1 b@2` are those.
fn tasks_of(words: &[&str], all: &[TaskId]) -> Vec<TaskAttempt> {
    let one = |word: &&str| {
        let (name, attempt) = word.split_once('@').expect("task@attempt");
        let attempt = Attempt(attempt.parse().expect("attempt"));
        let named = |task: &&TaskId| name.is_empty() || **task == task_of(name);
        all.iter().filter(named).map(|task| (*task, attempt)).collect::<Vec<_>>()
    };
    words.iter().flat_map(one).collect()
}

fn event_of(text: &str, all: &[TaskId]) -> Event {
    let words: Vec<&str> = text.split_whitespace().collect();
    let attempt = |text: &str| Attempt(text.trim_start_matches('@').parse().expect("attempt"));
    let id = |text: &str| CheckpointId(text.trim_start_matches('#').parse().expect("checkpoint"));
    let fail = |who: &str, at: &str, cause| Event::TaskFailed {
        task: Some((task_of(who), attempt(at))),
        cause,
        lost: None,
    };
    match words.as_slice() {
        ["tick"] => Event::Tick,
        ["cleaned"] => Event::CheckpointCleaned,
        ["started", tasks @ ..] => Event::TasksStarted { tasks: tasks_of(tasks, all) },
        ["stopped", tasks @ ..] => Event::TasksStopped { tasks: tasks_of(tasks, all) },
        ["drained", who, at] => Event::TaskDrained { task: task_of(who), attempt: attempt(at) },
        ["ack", who, at, checkpoint] => Event::SnapshotAcked {
            task: task_of(who),
            attempt: attempt(at),
            checkpoint: id(checkpoint),
        },
        ["decline", who, at, checkpoint] => Event::SnapshotDeclined {
            task: task_of(who),
            attempt: attempt(at),
            checkpoint: id(checkpoint),
            reason: AbortReason::Declined { task: Some(task_of(who)), message: "no".to_owned() },
        },
        ["durable", checkpoint] => Event::MetadataDurable { checkpoint: id(checkpoint) },
        ["lost", checkpoint] => {
            Event::MetadataLost { checkpoint: id(checkpoint), error: EnvironmentError::new("disk") }
        }
        ["saved", checkpoint] => Event::SavepointDurable { checkpoint: id(checkpoint) },
        ["unsaved", checkpoint] => Event::SavepointLost {
            checkpoint: id(checkpoint),
            error: EnvironmentError::new("disk"),
        },
        ["trap", who, at] => fail(
            who,
            at,
            FailureCause::Trap { message: "unreachable".to_owned(), backtrace: Vec::new() },
        ),
        ["bug", who, at] => {
            fail(who, at, FailureCause::HostBug { message: "impossible".to_owned() })
        }
        ["global"] => Event::TaskFailed {
            task: None,
            cause: FailureCause::Environment(EnvironmentError::new("disk")),
            lost: None,
        },
        ["finished", who, at] => Event::TaskFinished { task: task_of(who), attempt: attempt(at) },
        ["checkpoint"] => Event::CheckpointRequested { ticket: 5 },
        ["savepoint"] => Event::SavepointRequested { ticket: 7 },
        ["stop"] => Event::StopRequested { savepoint: None, drain: false },
        ["stop", "savepoint"] => Event::StopRequested { savepoint: Some(7), drain: false },
        ["drain"] => Event::StopRequested { savepoint: Some(7), drain: true },
        ["cancel"] => Event::CancelRequested,
        other => panic!("{other:?}"),
    }
}

fn show_tasks(tasks: &[TaskAttempt], all: &[TaskId]) -> String {
    let first = tasks[0].1;
    if tasks.len() == all.len() && tasks.iter().all(|(_, attempt)| *attempt == first) {
        return format!("@{first}");
    }
    let name = |task: TaskId| ["a", "b", "c"][task.node.0 as usize];
    let shown = tasks.iter().map(|(task, attempt)| format!("{}@{attempt}", name(*task)));
    shown.collect::<Vec<_>>().join(" ")
}

fn show_checkpoint(checkpoint: Option<CheckpointId>) -> String {
    checkpoint.map_or_else(|| "none".to_owned(), |id| format!("#{id}"))
}

fn show(effect: &Effect, all: &[TaskId]) -> String {
    let suffix = |purpose: &Purpose| match purpose {
        Purpose::Last => " last",
        Purpose::Savepoint => " savepoint",
        Purpose::Periodic => "",
    };
    match effect {
        Effect::StartTasks { tasks, restore_from: Some(id), .. } => {
            format!("start {} from #{id}", show_tasks(tasks, all))
        }
        Effect::StartTasks { tasks, restore_from: None, .. } => {
            format!("start {} empty", show_tasks(tasks, all))
        }
        Effect::InjectBarrier { checkpoint, purpose } => {
            format!("barrier #{checkpoint}{}", suffix(purpose))
        }
        Effect::EndInput => "end input".to_owned(),
        Effect::PersistMetadata { checkpoint } => format!("persist #{checkpoint}"),
        Effect::PersistSavepoint { checkpoint, .. } => format!("save #{checkpoint}"),
        Effect::NotifyComplete { checkpoint, purpose } => {
            format!("complete #{checkpoint}{}", suffix(purpose))
        }
        Effect::Discard { checkpoint, reason, .. } => {
            let reason = match reason {
                AbortReason::Expired { .. } => "expired",
                AbortReason::Declined { .. } => "declined",
                AbortReason::NotFinalized { .. } => "lost",
                AbortReason::FailoverRegion => "restarted",
                other => other.name(),
            };
            format!("discard #{checkpoint} {reason}")
        }
        Effect::Subsume { checkpoint, .. } => format!("discard #{checkpoint} subsumed"),
        Effect::Answer { result: Ok(checkpoint), .. } => format!("saved #{checkpoint}"),
        Effect::Answer { result: Err(reason), .. } => {
            format!("not saved: {}", reason.name())
        }
        Effect::CancelTasks { tasks } => format!("cancel {}", show_tasks(tasks, all)),
        Effect::ReleasePartitions { .. } => "release".to_owned(),
        Effect::AnnounceRestart { delay_ms, .. } => format!("restart in {delay_ms}"),
        Effect::Finish { outcome } => match outcome {
            Outcome::Finished => "finish".to_owned(),
            Outcome::Stopped { checkpoint, is_last, .. } => {
                let last = if *is_last { "" } else { " not last" };
                format!("stop at {}{last}", show_checkpoint(*checkpoint))
            }
            Outcome::Canceled { checkpoint } => {
                format!("canceled at {}", show_checkpoint(*checkpoint))
            }
            Outcome::Failed { cause, .. } => format!("fail {}", cause.class()),
        },
    }
}

/// Two regions of which one runs, the other in each state that is not running. Where a task has
/// ended it stays and answers, so the rows with finished tasks have nothing to be planned here.
#[test]
fn no_checkpoint_begins_while_a_task_does_not_run() {
    check_with(
        two_regions(),
        "0: savepoint         -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING
         1: started @0        ->
         2: trap c @0         -> cancel c@0, restart in 50
         3: savepoint         -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING
         4: stopped c@0       ->
         5: savepoint         -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING
         52: tick             -> start c@1 empty
         53: savepoint        -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING
         54: started c@1      ->
         55: savepoint        -> barrier #1 savepoint",
    );
}

#[test]
fn sinks_commit_only_after_the_metadata_is_durable() {
    check(
        fixed_delay(1),
        "0: started @0    ->
         99: tick         ->
         100: tick        -> barrier #1
         101: ack a @0 #1 ->
         102: ack b @0 #1 -> persist #1
         110: durable #1  -> complete #1
         209: tick        ->
         210: tick        -> barrier #2
         211: ack a @0 #2 ->
         212: ack b @0 #2 -> persist #2
         213: durable #2  -> complete #2, discard #1 subsumed",
    );
}

#[test]
fn acks_of_an_earlier_attempt_complete_nothing() {
    check(
        fixed_delay(1),
        "0: started @0     ->
         100: tick         -> barrier #1
         101: ack a @0 #1  ->
         102: trap b @0    -> discard #1 restarted, cancel @0, restart in 50
         103: stopped @0   ->
         152: tick         -> start @1 empty
         153: started @1   ->
         253: tick         -> barrier #2
         254: ack a @0 #2  ->
         255: ack b @1 #2  ->
         256: ack a @1 #1  ->
         257: ack a @1 #2  -> persist #2",
    );
}

#[test]
fn end_of_input_leads_to_a_last_checkpoint_and_its_commit() {
    check(
        fixed_delay(1),
        "0: started @0     ->
         10: drained a @0  ->
         11: drained b @0  -> barrier #1 last
         12: ack a @0 #1   ->
         13: ack b @0 #1   -> persist #1
         14: durable #1    -> complete #1 last
         15: finished a @0 ->
         16: finished b @0 -> finish",
    );
}

#[test]
fn last_checkpoint_waits_for_the_one_in_flight() {
    check(
        fixed_delay(1),
        "0: started @0     ->
         100: tick         -> barrier #1
         101: drained a @0 ->
         102: drained b @0 ->
         103: ack a @0 #1  ->
         104: ack b @0 #1  -> persist #1
         105: durable #1   -> complete #1, barrier #2 last",
    );
}

#[test]
fn failure_to_commit_the_last_checkpoint_restores_from_it() {
    check(
        fixed_delay(1),
        "0: started @0    ->
         1: drained a @0  ->
         2: drained b @0  -> barrier #1 last
         3: ack a @0 #1   ->
         4: ack b @0 #1   -> persist #1
         5: durable #1    -> complete #1 last
         6: finished a @0 ->
         7: trap b @0     -> cancel b@0, restart in 50
         8: stopped b@0   ->
         57: tick         -> start @1 from #1
         58: started @1   ->
         59: drained a @1 ->
         60: drained b @1 -> barrier #2 last",
    );
}

#[test]
fn stop_takes_a_last_checkpoint() {
    check(
        fixed_delay(1),
        "0: started @0    ->
         5: stop          -> barrier #1 last
         6: ack a @0 #1   ->
         7: ack b @0 #1   -> persist #1
         8: durable #1    -> complete #1 last
         9: finished a @0 ->
         10: finished b @0 -> stop at #1",
    );
}

#[test]
fn stop_ends_the_job_even_if_its_checkpoint_fails() {
    check(
        fixed_delay(1),
        "0: started @0      ->
         5: stop            -> barrier #1 last
         6: decline a @0 #1 -> discard #1 declined, cancel @0
         7: stopped @0      -> stop at none not last",
    );
}

#[test]
fn stop_during_a_restart_ends_at_the_last_completed_checkpoint() {
    check(
        fixed_delay(1),
        "0: started @0  ->
         5: trap a @0   -> cancel @0, restart in 50
         6: stop        ->
         7: stopped @0  -> stop at none not last",
    );
}

#[test]
fn expired_checkpoint_fails_the_job_unless_tolerated() {
    check(
        fixed_delay(1),
        "0: started @0    ->
         100: tick        -> barrier #1
         101: ack a @0 #1 ->
         1099: tick       ->
         1100: tick       -> discard #1 expired, cancel @0, restart in 50
         1101: ack b @0 #1 ->
         1102: stopped @0 ->
         1150: tick       -> start @1 empty",
    );
}

/// A source of a few records ended before the slowest task had opened. Its event was taken for one
/// of another phase and dropped, and the job waited for ever for a task that had drained already.
#[test]
fn task_may_drain_before_the_last_one_has_started() {
    check(
        fixed_delay(1),
        "0: drained a @0 ->
         1: started @0   ->
         2: drained b @0 -> barrier #1 last",
    );
}

#[test]
fn failure_while_stopping_stops_at_the_last_completed_checkpoint() {
    check(
        fixed_delay(1),
        "0: started @0 ->
         5: stop       -> barrier #1 last
         6: trap a @0  -> discard #1 CHECKPOINT_COORDINATOR_SHUTDOWN, cancel @0
         7: stopped @0 -> stop at none not last",
    );
}

/// A failed periodic checkpoint left a time to try the last one again, although no last one was
/// wanted: the deadline lay in the past for ever and the driver span.
#[test]
fn failed_periodic_checkpoint_leaves_no_deadline_in_the_past() {
    let checkpoint = CheckpointSettings {
        interval_ms: Some(60_000),
        tolerable_failures: Some(5),
        ..CheckpointSettings::default()
    };
    let settings = JobSettings { checkpoint, ..settings(RestartStrategy::None) };
    let mut job = Job::new(settings, Resume::default()).0;
    let (mut effects, all) = (Vec::new(), [A, B]);
    let mut step = |now, event: &str| {
        job.step(Millis(now), event_of(event, &all), &mut effects);
        job.next_deadline()
    };
    step(0, "started @0");
    step(60_000, "tick");
    step(60_001, "decline a @0 #1");
    let deadline = step(62_000, "tick");
    assert!(deadline.is_some_and(|at| Millis(62_000) < at), "{deadline:?}");
}

fn two_regions() -> JobSettings {
    let graph = graph(&["a", "b", "c"], &[(0, 1, ExchangeType::PipelinedBounded)]);
    JobSettings { graph, ..settings(fixed_delay(5)) }
}

#[test]
fn failure_while_closing_restarts_all_from_the_last_checkpoint() {
    check_with(
        two_regions(),
        "0: started @0        ->
         1: drained a @0      ->
         2: drained b @0      ->
         3: drained c @0      -> barrier #1 last
         4: ack a @0 #1       ->
         5: ack b @0 #1       ->
         6: ack c @0 #1       -> persist #1
         7: durable #1        -> complete #1 last
         8: finished c @0     ->
         9: trap a @0         -> cancel a@0 b@0, restart in 50
         10: stopped a@0 b@0  ->
         59: tick             -> start @1 from #1",
    );
}

/// `cancelWhileRestartingShouldWait`.
#[test]
fn cancel_while_restarting_waits_for_the_tasks() {
    check_with(
        two_regions(),
        "0: started @0        ->
         1: trap a @0         -> cancel a@0 b@0, restart in 50
         2: cancel            -> cancel c@0
         3: stopped a@0 b@0   ->
         4: stopped c@0       -> canceled at none
         5: cancel            ->",
    );
}

#[test]
fn requested_checkpoint_is_answered_when_it_is_complete_and_committed_as_any() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: checkpoint        -> barrier #1
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> persist #1
         8: durable #1        -> saved #1, complete #1",
    );
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: checkpoint        -> barrier #1
         6: trap a @0         -> discard #1 restarted, not saved: JOB_FAILOVER_REGION, cancel @0, restart in 50
         7: checkpoint        -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING",
    );
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop              -> barrier #1 last
         6: checkpoint        -> not saved: CHECKPOINT_COORDINATOR_SHUTDOWN",
    );
}
