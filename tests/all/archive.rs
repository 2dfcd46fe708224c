//! What earlier versions have written is resumed from.

use std::fs;

use cofferdam_store::metadata::FORMAT;
use cofferdam_tests::archive;

#[test]
fn what_every_version_has_written_is_resumed_from() {
    let mut versions: Vec<_> = fs::read_dir(archive::folder())
        .expect("the archive")
        .flatten()
        .map(|it| it.path())
        .collect();
    versions.sort();
    assert!(
        versions.iter().any(|version| version.ends_with(format!("format-{FORMAT}"))),
        "the archive has what this version writes: `cargo xtask archive`"
    );
    for version in versions {
        archive::check(&version).expect("it is resumed from");
    }
}
