//! Those attacks that take little time; `cargo xtask attack` does all of them.

use std::time::Duration;

use cofferdam_tests::{
    attack::{Arena, all},
    guest,
};

#[test]
fn manifests_files_and_checkpoints_of_attackers_do_no_harm() {
    let quick = ["a manifest", "a tenant's manifest", "a guest with files", "a changed checkpoint"];
    let attacks = all().into_iter().filter(|attack| quick.contains(&attack.category));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let failures: Vec<String> = runtime.expect("a runtime").block_on(async {
        let arena = Arena::new().await.expect("a host");
        let mut failures = Vec::new();
        for attack in attacks {
            let struck = arena.strike(&attack, Duration::ZERO).await.expect("laid out");
            failures.extend(attack.failure(&struck));
        }
        assert!(0 < arena.end().await.expect("the neighbour has lost nothing"));
        failures
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The table is written by a run; what was added since is missing in it.
#[test]
fn the_table_of_attacks_has_each_of_them() {
    let text = std::fs::read_to_string(guest::root().join("docs/security.md")).expect("readable");
    let attacks = all();
    assert!(200 < attacks.len());
    for attack in attacks {
        let row = format!("| {} |", attack.deed);
        assert!(text.contains(&row), "{row} is not there: BLESS=1 cargo xtask attack");
    }
}
