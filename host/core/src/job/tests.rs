//! The laws of a job's life, each as a script of events and the effects they lead to.

use super::*;
use crate::ids::OperatorId;

const A: TaskId = TaskId { operator: OperatorId(0), index: 0 };
const B: TaskId = TaskId { operator: OperatorId(1), index: 0 };

fn job(restart: RestartStrategy) -> Job {
    let checkpoint = CheckpointSettings {
        interval_ms: Some(100),
        min_pause_ms: 100,
        timeout_ms: 1_000,
        tolerable_failures: 0,
    };
    let tasks = BTreeSet::from([A, B]);
    Job::new(JobSettings { tasks, checkpoint, restart, seed: 1 }, Resume::default()).0
}

fn fixed_delay(attempts: u64) -> RestartStrategy {
    RestartStrategy::FixedDelay { attempts, delay_ms: 50 }
}

/// Runs `time: event -> effects` lines; an attempt is written `@n`, a checkpoint `#n`.
fn check(restart: RestartStrategy, script: &str) {
    let mut job = job(restart);
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (input, expected) = line.split_once("->").expect("event -> effects");
        let (time, event) = input.split_once(':').expect("time: event");
        let now = Millis(time.trim().parse().expect("a time"));
        let mut effects = Vec::new();
        job.step(now, event_of(event.trim()), &mut effects);
        let effects: Vec<String> = effects.iter().map(show).collect();
        assert_eq!(effects.join(", "), expected.trim(), "{line}");
    }
}

fn event_of(text: &str) -> Event {
    let words: Vec<&str> = text.split_whitespace().collect();
    let task = |name: &str| if name == "a" { A } else { B };
    let attempt = |text: &str| Attempt(text.trim_start_matches('@').parse().expect("attempt"));
    let id = |text: &str| CheckpointId(text.trim_start_matches('#').parse().expect("checkpoint"));
    match words.as_slice() {
        ["tick"] => Event::Tick,
        ["started", at] => Event::TasksStarted { attempt: attempt(at) },
        ["drained", who, at] => Event::TaskDrained { task: task(who), attempt: attempt(at) },
        ["ack", who, at, checkpoint] => Event::SnapshotAcked {
            task: task(who),
            attempt: attempt(at),
            checkpoint: id(checkpoint),
        },
        ["decline", who, at, checkpoint] => Event::SnapshotDeclined {
            task: task(who),
            attempt: attempt(at),
            checkpoint: id(checkpoint),
            message: "no".to_owned(),
        },
        ["durable", checkpoint] => Event::ManifestDurable { checkpoint: id(checkpoint) },
        ["lost", checkpoint] => {
            Event::ManifestLost { checkpoint: id(checkpoint), message: "disk".to_owned() }
        }
        ["trap", who, at] => Event::TaskFailed {
            task: Some(task(who)),
            attempt: attempt(at),
            cause: FailureCause::Trap { message: "unreachable".to_owned(), backtrace: Vec::new() },
        },
        ["bug", who, at] => Event::TaskFailed {
            task: Some(task(who)),
            attempt: attempt(at),
            cause: FailureCause::HostBug { message: "impossible".to_owned() },
        },
        ["finished", who, at] => Event::TaskFinished { task: task(who), attempt: attempt(at) },
        ["stopped", at] => Event::TasksStopped { attempt: attempt(at) },
        ["stop"] => Event::StopRequested,
        other => panic!("{other:?}"),
    }
}

fn show(effect: &Effect) -> String {
    let last = |purpose: &Purpose| if *purpose == Purpose::Last { " last" } else { "" };
    match effect {
        Effect::StartTasks { attempt, restore_from: Some(id) } => {
            format!("start @{attempt} from #{id}")
        }
        Effect::StartTasks { attempt, restore_from: None } => format!("start @{attempt} empty"),
        Effect::InjectBarrier { checkpoint, purpose, .. } => {
            format!("barrier #{checkpoint}{}", last(purpose))
        }
        Effect::PersistManifest { checkpoint } => format!("persist #{checkpoint}"),
        Effect::NotifyComplete { checkpoint, purpose, .. } => {
            format!("complete #{checkpoint}{}", last(purpose))
        }
        Effect::Discard { checkpoint, reason } => {
            let reason = match reason {
                DiscardReason::Expired => "expired",
                DiscardReason::Declined { .. } => "declined",
                DiscardReason::ManifestLost { .. } => "lost",
                DiscardReason::TasksRestarted => "restarted",
                DiscardReason::Subsumed => "subsumed",
            };
            format!("discard #{checkpoint} {reason}")
        }
        Effect::CancelTasks { attempt } => format!("cancel @{attempt}"),
        Effect::AnnounceRestart { delay_ms, .. } => format!("restart in {delay_ms}"),
        Effect::Finish { outcome } => match outcome {
            Outcome::Finished => "finish".to_owned(),
            Outcome::Stopped { checkpoint, is_last } => {
                let checkpoint = checkpoint.map_or("none".to_owned(), |id| format!("#{id}"));
                format!("stop at {checkpoint}{}", if *is_last { "" } else { " not last" })
            }
            Outcome::Failed { cause, .. } => format!("fail {}", cause.class()),
        },
    }
}

#[test]
fn sinks_commit_only_after_the_manifest_is_durable() {
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
fn restart_waits_for_manifest_in_doubt() {
    let until_in_doubt = "0: started @0 ->
         100: tick        -> barrier #1
         101: ack a @0 #1 ->
         102: ack b @0 #1 -> persist #1
         103: trap a @0   -> cancel @0, restart in 50
         104: stopped @0  ->
         200: tick        ->";
    check(fixed_delay(1), &format!("{until_in_doubt}\n 201: durable #1 -> start @1 from #1"));
    check(
        fixed_delay(1),
        &format!("{until_in_doubt}\n 201: lost #1 -> discard #1 lost, start @1 empty"),
    );
}

#[test]
fn restart_waits_for_the_delay_and_for_the_tasks_to_end() {
    check(
        fixed_delay(1),
        "0: started @0  ->
         10: trap a @0  -> cancel @0, restart in 50
         60: tick       ->
         61: stopped @0 -> start @1 empty",
    );
    check(
        fixed_delay(1),
        "0: started @0  ->
         10: trap a @0  -> cancel @0, restart in 50
         11: stopped @0 ->
         59: tick       ->
         60: tick       -> start @1 empty",
    );
}

#[test]
fn failures_of_one_incident_cost_one_attempt() {
    check(
        fixed_delay(2),
        "0: started @0  ->
         10: trap a @0  -> cancel @0, restart in 50
         11: trap b @0  ->
         12: stopped @0 ->
         60: tick       -> start @1 empty
         61: trap b @0  ->
         62: started @1 ->
         63: trap b @1  -> cancel @1, restart in 50
         64: stopped @1 ->
         113: tick      -> start @2 empty
         114: trap a @2 -> cancel @2
         115: stopped @2 -> fail trap",
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
fn host_bug_is_never_restarted() {
    check(
        fixed_delay(9),
        "0: started @0 ->
         1: bug a @0   -> cancel @0
         2: stopped @0 -> fail host-bug",
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
         7: trap b @0     -> cancel @0, restart in 50
         8: stopped @0    ->
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
         6: trap a @0  -> discard #1 restarted, cancel @0
         7: stopped @0 -> stop at none not last",
    );
}

/// A failed periodic checkpoint left a time to try the last one again, although no last one was
/// wanted: the deadline lay in the past for ever and the driver span.
#[test]
fn failed_periodic_checkpoint_leaves_no_deadline_in_the_past() {
    let mut job = job(RestartStrategy::None);
    let mut effects = Vec::new();
    job.coordinator = Coordinator::new(
        CheckpointSettings {
            interval_ms: Some(60_000),
            tolerable_failures: 5,
            ..CheckpointSettings::default()
        },
        None,
        CheckpointId(1),
    );
    job.step(Millis(0), Event::TasksStarted { attempt: Attempt(0) }, &mut effects);
    job.step(Millis(60_000), Event::Tick, &mut effects);
    let declined = event_of("decline a @0 #1");
    job.step(Millis(60_001), declined, &mut effects);
    job.step(Millis(62_000), Event::Tick, &mut effects);
    assert!(job.next_deadline().is_some_and(|at| Millis(62_000) < at), "{:?}", job.next_deadline());
}
