//! Stops, drains and savepoints, script by script.

use super::*;

#[test]
fn savepoint_is_written_answered_and_committed_by_nobody() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: savepoint         -> barrier #1 savepoint
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> save #1
         8: trap a @0         -> cancel @0, restart in 50
         9: stopped @0        ->
         58: tick             -> start @1 empty
         59: saved #1         -> saved #1",
    );
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: savepoint         -> barrier #1 savepoint
         6: decline a @0 #1   -> discard #1 declined, not saved: CHECKPOINT_DECLINED
         100: tick            -> barrier #2",
    );
}

#[test]
fn stop_with_savepoint_commits_and_ends() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> save #1
         8: saved #1          -> persist #1
         9: durable #1        -> complete #1 last
         10: finished a @0    ->
         11: finished b @0    -> saved #1, stop at #1",
    );
}

/// `StopWithSavepointTerminationHandlerImplTest`: the request fails, the job continues.
#[test]
fn stop_whose_savepoint_fails_leaves_the_job_running() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> save #1
         8: unsaved #1        -> discard #1 lost, not saved: FINALIZE_CHECKPOINT_FAILURE
         107: tick            ->
         108: tick            -> barrier #2",
    );
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: trap b @0         -> discard #1 restarted, not saved: JOB_FAILOVER_REGION, cancel @0, restart in 50
         7: stop savepoint    -> not saved: NOT_ALL_REQUIRED_TASKS_RUNNING
         8: stopped @0        ->
         56: tick             -> start @1 empty",
    );
}

#[test]
fn failed_drain_restarts_from_before_it() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: drain             -> end input
         6: drained a @0      ->
         101: tick            ->
         102: drained b @0    -> barrier #1 last
         103: ack a @0 #1     ->
         104: ack b @0 #1     -> save #1
         105: unsaved #1      -> discard #1 lost, not saved: FINALIZE_CHECKPOINT_FAILURE, cancel @0, restart in 50
         106: stopped @0      ->
         155: tick            -> start @1 empty
         156: started @1      ->
         256: tick            -> barrier #2",
    );
}

/// `StopWithSavepointTerminationHandlerImplTest`, StopWithSavepointStoppingException. The stop used to
/// succeed on both sides while a sink had failed to commit, and the checkpoints were removed.
#[test]
fn a_failed_commit_of_a_stop_is_answered_and_the_job_recovers() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> save #1
         8: saved #1          -> persist #1
         9: durable #1        -> complete #1 last
         10: trap a @0        -> not saved: STOP_WITH_SAVEPOINT_STOPPING, cancel @0, restart in 50
         11: stopped @0       ->
         60: tick             -> start @1 from #1
         61: started @1       ->
         161: tick            -> barrier #2",
    );
    check(
        RestartStrategy::None,
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: ack a @0 #1       ->
         7: ack b @0 #1       -> save #1
         8: saved #1          -> persist #1
         9: durable #1        -> complete #1 last
         10: finished a @0    ->
         11: trap b @0        -> not saved: STOP_WITH_SAVEPOINT_STOPPING, cancel b@0
         12: stopped b@0      -> fail trap",
    );
}

/// The answer was the id of the last checkpoint, and a savepoint that nobody had written.
#[test]
fn a_stop_that_meets_a_job_at_its_end_has_no_savepoint() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         1: drained a @0      ->
         2: drained b @0      -> barrier #1 last
         3: stop savepoint    ->
         4: ack a @0 #1       ->
         5: ack b @0 #1       -> persist #1
         6: durable #1        -> not saved: CHECKPOINT_COORDINATOR_SHUTDOWN, complete #1 last
         7: finished a @0     ->
         8: finished b @0     -> finish",
    );
}

/// The stop was forgotten, and the caller that waited for its savepoint waited until the job had ended.
#[test]
fn a_stop_with_a_savepoint_outlives_the_failure_of_a_last_checkpoint_before_it() {
    let mut settings = settings(fixed_delay(1));
    settings.checkpoint.tolerable_failures = None;
    check_with(
        settings,
        "0: started @0        ->
         1: drained a @0      ->
         2: drained b @0      -> barrier #1 last
         3: stop savepoint    ->
         4: decline a @0 #1   -> discard #1 declined
         1004: tick           -> barrier #2 last
         1005: ack a @0 #2    ->
         1006: ack b @0 #2    -> save #2
         1007: saved #2       -> persist #2
         1008: durable #2     -> complete #2 last
         1009: finished a @0  ->
         1010: finished b @0  -> saved #2, finish",
    );
}

/// A savepoint that waited was begun when the job had ended by the last checkpoint, which had expired.
#[test]
fn nothing_begins_beside_a_last_checkpoint_that_has_expired() {
    let mut settings = settings(fixed_delay(1));
    settings.checkpoint.unaligned_after_ms = Some(0);
    check_with(
        settings,
        "0: started @0        ->
         5: savepoint         -> barrier #1 savepoint
         6: decline a @0 #1   -> discard #1 declined, not saved: CHECKPOINT_DECLINED
         7: savepoint         -> barrier #2 savepoint
         8: decline a @0 #2   -> discard #2 declined, not saved: CHECKPOINT_DECLINED
         9: savepoint         ->
         10: stop             -> barrier #3 last
         11: cleaned          ->
         12: cleaned          ->
         1010: tick           -> discard #3 expired, not saved: CHECKPOINT_COORDINATOR_SUSPEND, cancel @0",
    );
}

#[test]
fn second_stop_ends_the_job_even_if_the_savepoint_fails() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: stop savepoint    -> barrier #1 last
         6: stop              ->
         7: ack a @0 #1       ->
         8: ack b @0 #1       -> save #1
         9: unsaved #1        -> discard #1 lost, not saved: FINALIZE_CHECKPOINT_FAILURE
         1009: tick           -> barrier #2 last",
    );
}

#[test]
fn a_stop_is_not_forgotten_where_the_commit_of_its_savepoint_fails() {
    check(
        fixed_delay(1),
        "0: started @0         ->
         1: stop savepoint     -> barrier #1 last
         2: stop               ->
         3: ack a @0 #1        ->
         4: ack b @0 #1        -> save #1
         5: saved #1           -> persist #1
         6: durable #1         -> complete #1 last
         7: trap b @0          -> not saved: STOP_WITH_SAVEPOINT_STOPPING, cancel @0
         8: stopped @0         -> stop at #1 not last",
    );
}

#[test]
fn a_failed_drain_that_is_stopped_takes_no_checkpoint_of_the_end_of_the_input() {
    check(
        fixed_delay(1),
        "0: started @0         ->
         1: drain              -> end input
         2: drained a @0       ->
         3: stop               -> barrier #1 last
         4: decline b @0 #1    -> discard #1 declined, not saved: CHECKPOINT_DECLINED, cancel @0
         5: stopped @0         -> stop at none not last",
    );
}

#[test]
fn drain_ends_the_sources_and_finishes() {
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: drain             -> end input
         6: drained a @0      ->
         7: drained b @0      -> barrier #1 last
         8: ack a @0 #1       ->
         9: ack b @0 #1       -> save #1
         10: saved #1         -> persist #1
         11: durable #1       -> complete #1 last
         12: finished a @0    ->
         13: finished b @0    -> saved #1, finish",
    );
    check(
        fixed_delay(1),
        "0: started @0        ->
         5: drain             -> end input
         6: trap a @0         -> cancel @0, restart in 50
         7: stopped @0        ->
         56: tick             -> start @1 empty
         57: started @1       -> end input",
    );
}

/// The sources had ended, and the job that "went on as before" finished without the rest of their input.
#[test]
fn a_drain_that_was_given_up_and_whose_savepoint_fails_restarts_from_before_it() {
    check(
        fixed_delay(1),
        "0: started @0         ->
         1: drain              -> end input
         2: stop savepoint     -> not saved: CHECKPOINT_COORDINATOR_SHUTDOWN, barrier #1 last
         3: decline b @0 #1    -> discard #1 declined, not saved: CHECKPOINT_DECLINED, cancel @0, restart in 50
         4: stopped @0         ->
         53: tick              -> start @1 empty",
    );
}

/// A failure ended the job in the middle of deciding about its restart, which was announced all the same.
#[test]
fn a_failure_that_ends_the_job_announces_no_restart() {
    check(
        fixed_delay(1),
        "0: started @0         ->
         1: drain              -> end input
         2: stop               -> barrier #1 last
         3: trap b @0          -> discard #1 restarted, not saved: JOB_FAILOVER_REGION, cancel @0
         4: stopped @0         -> stop at none not last",
    );
}
