//! The record that makes a checkpoint complete, and the frame around every stored value.
//!
//! `docs/checkpoint-format.md` draws both byte by byte.

use cofferdam_connector::identity::Lineage;
use cofferdam_core::fit::{self, OperatorState, StateName};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::{Result, StorageError};

/// The version of everything in a generation. Changes with any change of the format.
pub const FORMAT: u16 = 7;

const MAGIC: [u8; 4] = *b"CFDM";

/// A completed checkpoint: what each task's snapshot consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMetadata {
    /// The job's name.
    pub job: String,
    /// Which job it is, and which course of its events.
    pub lineage: Lineage,
    /// The checkpoint's id.
    pub checkpoint: u64,
    /// When it was written, in milliseconds since 1970-01-01 UTC.
    pub written_at_ms: u64,
    /// One for each task; its place is its number in the keys of its snapshots.
    pub tasks: Vec<TaskMetadata>,
}

/// One task's part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskMetadata {
    /// What the task is.
    pub identity: TaskIdentity,
    /// The snapshots that make up its state, in the order they are applied: a full one, then
    /// increments. Snapshots are named by the checkpoint they were taken for.
    pub chain: Vec<u64>,
    /// What its newest snapshot has cost.
    pub stats: SnapshotStats,
}

/// What one task's snapshot has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStats {
    /// From the trigger to the task's first barrier, in microseconds.
    pub start_delay_us: u64,
    /// From the first barrier to the last, in microseconds.
    pub alignment_us: u64,
    /// How long the task was held up, in microseconds.
    pub sync_us: u64,
    /// From then on until the snapshot was durable, in microseconds.
    pub async_us: u64,
    /// What was written for it, after compression.
    pub bytes: u64,
    /// Records in it that the barrier had overtaken, in bytes.
    pub in_flight_bytes: u64,
    /// The barrier has overtaken.
    pub is_unaligned: bool,
}

/// What a task's state belongs to. State of another identity is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskIdentity {
    /// The operator's name in the manifest.
    pub operator: String,
    /// What its state is matched by: the name, unless the manifest says otherwise.
    pub uid: String,
    /// The task's place among the operator's tasks.
    pub index: u32,
    /// How many tasks the operator had.
    pub parallelism: u32,
    /// How many key groups it had; 0 for sources and sinks.
    pub max_parallelism: u32,
    /// The component's digest; `None` for sources and sinks.
    pub digest: Option<[u8; 16]>,
    /// Whether linear memory is in the snapshots.
    pub has_memory: bool,
    /// Whether declared state is in the snapshots.
    pub has_declared: bool,
    /// Whether the host keeps the declared state: linear memory then holds a cache of it.
    pub has_host_state: bool,
    /// Whether it is a sink.
    pub is_sink: bool,
    /// The connector of a source or a sink, whose state only it can read; `None` also in formats before 7, which do
    /// not have it.
    #[serde(skip)]
    pub connector: Option<String>,
    /// The names of the directories that an operator finds, one a line; `None`: it has none. Stored in the place of a
    /// connector, which no operator has.
    #[serde(skip)]
    pub directories: Option<String>,
    /// The checksum of what its instances are opened with.
    pub config: u64,
    /// Whether records come to the tasks by their key, so that declared state lies with them.
    pub is_keyed: bool,
    /// Its declared states, in the order of their numbers.
    pub states: Vec<StateIdentity>,
}

impl TaskIdentity {
    /// `operator/index`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.operator, self.index)
    }

    /// Whether its connector's state is that of another kind than this, which may be no connector at all; false where
    /// its kind is not known.
    #[must_use]
    pub fn is_of_another_kind(&self, connector: Option<&str>, is_sink: bool) -> bool {
        let is_other = |own: &str| self.is_sink != is_sink || connector != Some(own);
        self.connector.as_deref().is_some_and(is_other)
    }

    /// Its operator, as far as state goes.
    #[must_use]
    pub fn state(&self) -> OperatorState {
        let name = |state: &StateIdentity| StateName {
            name: state.name.clone(),
            renamed_from: state.renamed_from.clone(),
        };
        OperatorState {
            parallelism: self.parallelism,
            max_parallelism: self.max_parallelism,
            is_keyed: self.is_keyed,
            has_memory: self.has_memory,
            has_declared: self.has_declared,
            has_host_state: self.has_host_state,
            component: self.digest,
            directories: self.directories.clone(),
            source: self.connector.clone().filter(|_| !self.is_sink),
            states: self.states.iter().map(name).collect(),
        }
    }
}

/// What a declared state is matched by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateIdentity {
    /// Its name.
    pub name: String,
    /// A name that it had before.
    pub renamed_from: Option<String>,
    /// What its values look like.
    pub schema: String,
}

impl StateIdentity {
    /// Whether a state of a checkpoint is this one: by its name, or, if none has that, by the one that
    /// it had before.
    pub fn find<'s>(&self, known: &'s [Self]) -> Option<&'s Self> {
        let renamed_from = self.renamed_from.as_deref();
        fit::origin(&self.name, renamed_from, known, |it| &it.name).map(|place| &known[place])
    }
}

impl CheckpointMetadata {
    /// Whether another one is of the same checkpoint, wherever it lies.
    pub fn is_that_of(&self, other: &Self) -> bool {
        self.lineage == other.lineage && self.checkpoint == other.checkpoint
    }

    /// The bytes as they are stored.
    ///
    /// # Errors
    /// Where it cannot be encoded, which would be a bug.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let outside = |it: &TaskMetadata| {
            let identity = &it.identity;
            identity.connector.clone().or_else(|| identity.directories.clone())
        };
        let connectors: Vec<Option<String>> = self.tasks.iter().map(outside).collect();
        postcard::to_extend(self, beginning(MAGIC))
            .and_then(|bytes| postcard::to_extend(&connectors, bytes))
            .map_err(|error| StorageError::store("encode the metadata", error))
    }

    /// Reads what `encode` wrote.
    ///
    /// # Errors
    /// Where the bytes are of another version, or are no metadata.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self> {
        let damaged = |error| StorageError::damaged(name, error);
        let (mut metadata, rest): (Self, _) =
            postcard::take_from_bytes(behind_beginning(name, MAGIC, bytes)?).map_err(damaged)?;
        if !rest.is_empty() {
            let connectors: Vec<Option<String>> = postcard::from_bytes(rest).map_err(damaged)?;
            if connectors.len() != metadata.tasks.len() {
                return Err(StorageError::damaged(name, "it does not have one connector a task"));
            }
            for (task, connector) in metadata.tasks.iter_mut().zip(connectors) {
                match task.identity.digest {
                    None => task.identity.connector = connector,
                    Some(_) => task.identity.directories = connector,
                }
            }
        }
        Ok(metadata)
    }
}

/// Whether this program reads what has this version. Format 5 is like format 6 without pages that are
/// carried forward; format 6 is like format 7 without connectors and without packs of their state.
pub(super) fn is_readable(version: u16) -> bool {
    (5..=FORMAT).contains(&version)
}

/// What a record of its own kind begins with: four letters and the version.
pub(super) fn beginning(magic: [u8; 4]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes
}

/// What follows the beginning of a record of this version.
pub(super) fn behind_beginning<'b>(
    name: &str,
    magic: [u8; 4],
    bytes: &'b [u8],
) -> Result<&'b [u8]> {
    let Some(rest) = bytes.strip_prefix(&magic) else {
        return Err(StorageError::damaged(name, "it does not begin like one"));
    };
    let Some((version, rest)) = rest.split_first_chunk::<2>() else {
        return Err(StorageError::damaged(name, "it ends before its version"));
    };
    match u16::from_le_bytes(*version) {
        version if is_readable(version) => Ok(rest),
        found => Err(StorageError::Format { what: name.to_owned(), found, known: FORMAT }),
    }
}

/// Puts a checksum of key and payload before the payload: a value under another key is as wrong
/// as one with a flipped bit.
#[must_use]
pub fn seal(key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(8 + payload.len());
    seal_into(&mut framed, key, |framed| framed.extend_from_slice(payload));
    framed
}

/// The same in place: `fill` appends the payload to a buffer that is emptied first.
pub(super) fn seal_into(framed: &mut Vec<u8>, key: &[u8], fill: impl FnOnce(&mut Vec<u8>)) {
    framed.clear();
    framed.extend_from_slice(&[0; 8]);
    fill(framed);
    let sum = checksum(key, &framed[8..]);
    framed[..8].copy_from_slice(&sum.to_le_bytes());
}

/// Checks and takes off what `seal` put on.
///
/// # Errors
/// Where the checksum is wrong.
pub fn unseal<'a>(name: &str, key: &[u8], framed: &'a [u8]) -> Result<&'a [u8]> {
    let Some((stored, payload)) = framed.split_first_chunk::<8>() else {
        return Err(StorageError::damaged(name, "it is shorter than its checksum"));
    };
    if u64::from_le_bytes(*stored) != checksum(key, payload) {
        return Err(StorageError::damaged(name, "its checksum is wrong"));
    }
    Ok(payload)
}

fn checksum(key: &[u8], payload: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(XxHash3_64::oneshot(key), payload)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn metadata() -> CheckpointMetadata {
        let identity = TaskIdentity {
            operator: "count".to_owned(),
            uid: "count-1".to_owned(),
            index: 1,
            parallelism: 2,
            max_parallelism: 128,
            digest: Some([7; 16]),
            has_memory: true,
            has_declared: true,
            has_host_state: true,
            is_sink: false,
            connector: None,
            directories: Some("/srv/in".to_owned()),
            config: 0,
            is_keyed: true,
            states: vec![StateIdentity {
                name: "counts".to_owned(),
                renamed_from: None,
                schema: "u64".to_owned(),
            }],
        };
        let stats = SnapshotStats { sync_us: 300, is_unaligned: true, ..SnapshotStats::default() };
        let task = TaskMetadata { identity, chain: vec![3, 4, 9], stats };
        let lineage = Lineage::new().fork(4);
        CheckpointMetadata {
            job: "words".to_owned(),
            lineage,
            checkpoint: 9,
            written_at_ms: 1,
            tasks: vec![task],
        }
    }

    #[test]
    fn metadata_is_read_as_it_was_written() {
        let metadata = metadata();
        let bytes = metadata.encode().expect("encodes");
        assert_eq!(CheckpointMetadata::decode("m", &bytes).expect("decodes"), metadata);
    }

    #[test]
    fn a_state_is_that_of_its_connector_alone() {
        let identity = |connector: Option<&str>, is_sink| {
            let mut identity = metadata().tasks.remove(0).identity;
            (identity.digest, identity.directories) = (None, None);
            (identity.connector, identity.is_sink) = (connector.map(str::to_owned), is_sink);
            identity
        };
        let rows = [
            (Some("file"), false, Some("file"), false, false),
            (Some("file"), false, Some("generator"), false, true),
            // A source and a sink of one name are two connectors.
            (Some("file"), false, Some("file"), true, true),
            (Some("file"), true, Some("file"), false, true),
            (Some("file"), true, None, false, true),
            // Of an operator, or from before format 7.
            (None, false, Some("file"), false, false),
        ];
        for (before, was_sink, now, is_sink, is_other) in rows {
            let known = identity(before, was_sink);
            assert_eq!(known.is_of_another_kind(now, is_sink), is_other, "{before:?}, {now:?}");
        }
    }

    #[test]
    fn other_version_is_refused_with_words() {
        let mut bytes = metadata().encode().expect("encodes");
        bytes[4] = 99;
        let error = CheckpointMetadata::decode("the metadata of checkpoint 9", &bytes)
            .expect_err("another version");
        assert_eq!(
            error.to_string(),
            "the metadata of checkpoint 9 has format 99, this program reads format 7"
        );
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = CheckpointMetadata::decode("m", &bytes);
            let _ = unseal("m", b"key", &bytes);
        }

        #[test]
        fn flipped_bit_is_detected(payload in proptest::collection::vec(any::<u8>(), 0..100), at in any::<usize>()) {
            let mut framed = seal(b"key", &payload);
            prop_assert_eq!(unseal("v", b"key", &framed).expect("whole"), &payload[..]);
            prop_assert!(unseal("v", b"yek", &framed).is_err());
            let bit = at % (framed.len() * 8);
            framed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(unseal("v", b"key", &framed).is_err());
        }
    }
}
