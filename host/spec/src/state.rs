//! What a manifest says about where declared state is kept while the job runs.

use cofferdam_settings::{AnySetting, Section, Setting, table::Key};

use super::{SledBackend, StateBackend};

/// Below this a cache or buffer would hold next to nothing.
const BYTES_MIN: u64 = 4 << 10;

fn too_small(bytes: &u64) -> Option<&'static str> {
    (*bytes < BYTES_MIN).then_some("it must be at least 4 KiB")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Hashmap,
    Sled,
    /// Flink's backends on disk do what sled does here.
    Rocksdb,
    Forst,
}

static TYPE: Setting<Name> = Key::choice(
    "state.backend.type",
    &[
        ("hashmap", Name::Hashmap),
        ("sled", Name::Sled),
        ("rocksdb", Name::Rocksdb),
        ("forst", Name::Forst),
    ],
    "`hashmap`: in the guest; `sled`: on disk, by the host; `rocksdb` and `forst` stand for `sled`",
)
.aliases(&["state.backend"])
.or(Name::Hashmap);

static CACHE: Setting<u64> =
    Key::bytes("state.backend.sled.cache", "the database's cache, for all tasks of the job")
        .unless(too_small)
        .or(256 << 20);
static WRITE_BUFFER: Setting<u64> =
    Key::bytes("state.backend.sled.write-buffer", "of each task: changes that are not on disk yet")
        .unless(too_small)
        .or(64 << 20);
static GUEST_CACHE: Setting<u64> = Key::bytes(
    "state.backend.sled.guest-cache",
    "of each instance: what it keeps in its own memory, at most a quarter of `limits.memory`",
)
.unless(too_small)
.or(16 << 20);

pub(super) static ROWS: &[&dyn AnySetting] = &[&TYPE, &CACHE, &WRITE_BUFFER, &GUEST_CACHE];

pub(super) fn read_sled(root: &Section<'_>) -> SledBackend {
    SledBackend {
        cache_bytes: root.get(&CACHE),
        write_buffer_bytes: root.get(&WRITE_BUFFER),
        guest_cache_bytes: root.get(&GUEST_CACHE),
    }
}

pub(super) fn read(root: &Section<'_>, warnings: &mut Vec<String>) -> StateBackend {
    let name = root.get(&TYPE);
    let backend = read_sled(root);
    let given = match name {
        Name::Hashmap => {
            root.document().forget(|key| key.starts_with("state.backend.sled."));
            return StateBackend::Hashmap;
        }
        Name::Sled => return StateBackend::Sled(backend),
        Name::Rocksdb => "rocksdb",
        Name::Forst => "forst",
    };
    root.document().amend(TYPE.row().key, "sled");
    warnings.push(format!(
        "`state.backend.type` = \"{given}\" is taken for \"sled\", the state on disk that there is here"
    ));
    StateBackend::Sled(backend)
}
