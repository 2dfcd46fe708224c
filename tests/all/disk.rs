//! The disk beneath the program: calls that fail, and power cuts. `cargo xtask faults` and `cargo xtask
//! power` do more of it.

use cofferdam_tests::{faults, job::rounds, power};

#[test]
fn no_failing_call_of_the_disk_loses_or_doubles_a_record() {
    let wanted = rounds("DISK_FAULTS", 24);
    let tally =
        faults::run(wanted, 1, |_| {}).expect("every fault is survived, or told and resumed from");
    assert_eq!(tally.faults, wanted, "each has struck");
}

#[test]
fn no_power_cut_loses_what_was_complete() {
    let wanted = rounds("POWER_CUTS", 24);
    let tally =
        power::run(wanted, 1, |_| {}).expect("what was complete is there, and the job finishes");
    assert!(wanted <= tally.cuts && 0 < tally.lossy && 0 < tally.resumed, "{tally:?}");
}

/// Deleted objects came back without the mark of their removal, and the run from the savepoint of the job that they
/// had belonged to was refused.
#[test]
fn removal_of_a_generation_is_durable_before_its_mark_goes() {
    let removals = power::check_removals(1).expect("in this order");
    assert!(0 < removals, "none was removed");
}
