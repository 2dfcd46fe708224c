//! What a failure leads to, script by script.

use super::*;
use crate::exchange::ExchangeType;

#[test]
fn restart_waits_for_metadata_in_doubt() {
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
fn host_bug_is_never_restarted() {
    check(
        fixed_delay(9),
        "0: started @0 ->
         1: bug a @0   -> cancel @0
         2: stopped @0 -> fail host-bug",
    );
}

#[test]
fn other_regions_go_on_undisturbed_but_pending_checkpoints_end() {
    check_with(
        two_regions(),
        "0: started @0        ->
         100: tick            -> barrier #1
         101: ack a @0 #1     ->
         102: ack b @0 #1     ->
         103: ack c @0 #1     -> persist #1
         104: durable #1      -> complete #1
         204: tick            -> barrier #2
         205: trap a @0       -> discard #2 restarted, cancel a@0 b@0, restart in 50
         206: ack c @0 #2     ->
         207: stopped a@0 b@0 ->
         255: tick            -> start a@1 b@1 from #1
         256: started a@1     ->
         400: tick            ->
         401: started b@1     ->
         501: tick            -> barrier #3
         502: ack a @0 #3     ->
         503: ack a @1 #3     ->
         504: ack b @1 #3     ->
         505: ack c @0 #3     -> persist #3",
    );
}

#[test]
fn failovers_without_a_checkpoint_escalate_to_every_task_and_then_to_the_job() {
    let settings = JobSettings { escalates_after: Some(1), ..two_regions() };
    check_with(
        settings,
        "0: started @0        ->
         1: trap c @0         -> cancel c@0, restart in 50
         2: stopped c@0       ->
         51: tick             -> start c@1 empty
         52: started c@1      ->
         152: tick            -> barrier #1
         153: ack a @0 #1     ->
         154: ack b @0 #1     ->
         155: ack c @1 #1     -> persist #1
         156: durable #1      -> complete #1
         157: trap c @1       -> cancel c@1, restart in 50
         158: stopped c@1     ->
         207: tick            -> start c@2 from #1
         208: started c@2     ->
         209: trap c @2       -> cancel a@0 b@0 c@2, restart in 50
         210: stopped a@0 b@0 c@2 ->
         259: tick            -> start a@1 b@1 c@3 from #1
         260: started a@1 b@1 c@3 ->
         261: trap c @3       -> cancel a@1 b@1 c@3
         262: stopped a@1 b@1 c@3 -> fail trap",
    );
}

/// `a` sends to `b`, which may lose records.
fn approximate() -> JobSettings {
    let graph = graph(&["a", "b"], &[(0, 1, ExchangeType::PipelinedApproximate)]);
    JobSettings { graph, ..settings(fixed_delay(10)) }
}

#[test]
fn reader_of_an_approximate_exchange_restarts_alone_and_checkpoints_go_on() {
    check_with(
        approximate(),
        "0: started @0        ->
         100: tick            -> barrier #1
         101: ack a @0 #1     ->
         102: ack b @0 #1     -> persist #1
         103: durable #1      -> complete #1
         104: trap b @0       -> cancel b@0, restart in 50
         105: stopped b@0     ->
         154: tick            -> start b@1 from #1
         155: started b@1     ->
         255: tick            -> barrier #2
         256: ack b @1 #2     ->
         257: ack a @0 #2     -> persist #2
         258: durable #2      -> complete #2, discard #1 subsumed
         259: trap a @0       -> cancel a@0 b@1, restart in 50
         260: stopped a@0 b@1 ->
         309: tick            -> start a@1 b@2 from #2",
    );
}

#[test]
fn reader_of_an_approximate_exchange_restarts_with_its_producer_if_that_fails_meanwhile() {
    check_with(
        approximate(),
        "0: started @0        ->
         1: trap b @0         -> cancel b@0, restart in 50
         2: trap a @0         -> cancel a@0, restart in 50
         3: stopped b@0       ->
         51: tick             ->
         52: stopped a@0      -> start @1 empty
         53: started a@1 b@1  ->
         54: trap b @1        -> cancel b@1, restart in 50
         104: stopped b@1     -> start b@2 empty",
    );
}

#[test]
fn reader_waits_for_each_that_it_reads_from_whatever_restarts_first() {
    let edges =
        [(0, 2, ExchangeType::PipelinedApproximate), (1, 2, ExchangeType::PipelinedApproximate)];
    let settings =
        JobSettings { graph: graph(&["a", "b", "c"], &edges), ..settings(fixed_delay(10)) };
    check_with(
        settings,
        "0: started @0        ->
         100: tick            -> barrier #1
         101: ack a @0 #1     ->
         102: ack b @0 #1     ->
         103: ack c @0 #1     -> persist #1
         104: durable #1      -> complete #1
         105: trap a @0       -> cancel a@0 c@0, restart in 50
         106: trap b @0       -> cancel b@0, restart in 50
         107: stopped c@0     ->
         108: stopped b@0     ->
         160: tick            -> start b@1 from #1
         161: stopped a@0 c@0 -> start a@1 c@1 from #1",
    );
}

#[test]
fn approximate_exchanges_are_those_of_a_stream() {
    check_with(
        approximate(),
        "0: started @0        ->
         1: savepoint         -> barrier #1 savepoint
         2: ack a @0 #1       ->
         3: ack b @0 #1       -> save #1
         4: saved #1          -> saved #1
         5: drained a @0      ->
         6: drained b @0      -> barrier #2 last",
    );
}

#[test]
fn failovers_that_may_lose_records_escalate_to_those_that_do_not() {
    let settings = JobSettings { escalates_after: Some(1), ..approximate() };
    check_with(
        settings,
        "0: started @0        ->
         1: trap b @0         -> cancel b@0, restart in 50
         2: stopped b@0       ->
         51: tick             -> start b@1 empty
         52: started b@1      ->
         53: trap b @1        -> cancel a@0 b@1, restart in 50
         54: stopped a@0 b@1  ->
         103: tick            -> start a@1 b@2 empty
         104: started a@1 b@2 ->
         105: trap b @2       -> cancel a@1 b@2, restart in 50
         106: stopped a@1 b@2 ->
         155: tick            -> start a@2 b@3 empty
         156: started a@2 b@3 ->
         157: trap b @3       -> cancel a@2 b@3
         158: stopped a@2 b@3 -> fail trap",
    );
}

#[test]
fn simultaneous_failures_of_two_regions_are_handled_independently() {
    check_with(
        two_regions(),
        "0: started @0        ->
         1: trap a @0         -> cancel a@0 b@0, restart in 50
         20: trap c @0        -> cancel c@0, restart in 50
         21: stopped c@0      ->
         22: stopped a@0 b@0  ->
         51: tick             -> start a@1 b@1 empty
         70: tick             -> start c@1 empty
         71: started a@1 b@1  ->
         72: started c@1      ->
         172: tick            -> barrier #1",
    );
}

#[test]
fn failure_while_its_region_is_cancelled_is_ignored_and_one_after_the_restart_is_not() {
    check_with(
        two_regions(),
        "0: started @0        ->
         1: trap a @0         -> cancel a@0 b@0, restart in 50
         2: trap b @0         ->
         3: stopped a@0 b@0   ->
         51: tick             -> start a@1 b@1 empty
         52: trap b @0        ->
         53: trap b @1        -> cancel a@1 b@1, restart in 50",
    );
}

/// `handleGlobalFailureWithLocalFailure`: exactly one restart of each task.
#[test]
fn global_failure_supersedes_a_local_one_that_is_under_way() {
    check_with(
        two_regions(),
        "0: started @0        ->
         1: trap c @0         -> cancel c@0, restart in 50
         2: stopped c@0       ->
         10: global           -> cancel a@0 b@0, restart in 50
         51: tick             ->
         52: stopped a@0 b@0  ->
         60: tick             -> start @1 empty",
    );
}

#[test]
fn restart_of_one_region_waits_for_metadata_in_doubt() {
    check_with(
        two_regions(),
        "0: started @0        ->
         100: tick            -> barrier #1
         101: ack a @0 #1     ->
         102: ack b @0 #1     ->
         103: ack c @0 #1     -> persist #1
         104: trap c @0       -> cancel c@0, restart in 50
         105: stopped c@0     ->
         160: tick            ->
         161: durable #1      -> complete #1, start c@1 from #1",
    );
}
