//! Every scenario, under every interleaving with up to three switches of threads that nothing forces.

/// Tries a scenario.
fn explore(scenario: fn()) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(scenario);
}

#[test]
fn credit_comes_back() {
    explore(cofferdam_loom::credit_comes_back);
}

#[test]
fn two_channels_are_emptied() {
    explore(cofferdam_loom::two_channels_are_emptied);
}

#[test]
fn a_capture_holds_what_the_barrier_overtook() {
    explore(cofferdam_loom::a_capture_holds_what_the_barrier_overtook);
}

#[test]
fn a_capture_ends_when_the_barrier_of_each_channel_has_come() {
    explore(cofferdam_loom::a_capture_ends_when_the_barrier_of_each_channel_has_come);
}
