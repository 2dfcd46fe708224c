//! What is in the generations of a store: which checkpoints, and what is damaged.

use crate::{
    Generation, Result, Storage, StorageError,
    head::{Head, Kept},
    key::metadata_key,
    metadata::{CheckpointMetadata, unseal},
};

/// What opening a store has found.
#[derive(Debug, Default)]
pub struct OpenedStore {
    /// The metadata that are whole, oldest first.
    pub checkpoints: Vec<CheckpointMetadata>,
    /// Checkpoints that were complete and cannot be used, and whatever else is wrong.
    pub damaged: Vec<String>,
    /// Nobody knows what the store has held: its head is lost.
    pub is_headless: bool,
}

/// An open generation.
pub(crate) struct OpenGeneration {
    pub(crate) number: u64,
    pub(crate) generation: Box<dyn Generation>,
    /// The checkpoints whose metadata are in it, ascending.
    pub(crate) checkpoints: Vec<u64>,
}

/// Opens the generations that the head names for reading, and compares each of their metadata with
/// what it says.
pub(crate) fn open_generations(
    storage: &dyn Storage,
    head: &Head,
    found: &mut OpenedStore,
) -> Result<Vec<OpenGeneration>> {
    let mut generations: Vec<OpenGeneration> = Vec::new();
    for Kept { checkpoint, generation: number, checksum, .. } in &head.checkpoints {
        let opened = match generations.iter().position(|opened| opened.number == *number) {
            Some(index) => &mut generations[index],
            None => {
                match storage.read(*number, head.end_of(*number)) {
                    Ok(generation) => {
                        let checkpoints = Vec::new();
                        generations.push(OpenGeneration {
                            number: *number,
                            generation,
                            checkpoints,
                        });
                        let last = generations.len() - 1;
                        &mut generations[last]
                    }
                    // What cannot be read now may be whole: an older one must not be taken for it.
                    Err(error) if error.may_pass() => return Err(error),
                    Err(error) => {
                        found.damaged.push(format!("checkpoint {checkpoint}: {error}"));
                        continue;
                    }
                }
            }
        };
        match read_metadata_as_stored(&*opened.generation, &metadata_key(*checkpoint)) {
            Ok((metadata, found_checksum)) if found_checksum == *checksum => {
                opened.checkpoints.push(*checkpoint);
                found.checkpoints.push(metadata);
            }
            Ok(_) => found.damaged.push(format!("checkpoint {checkpoint}: it is another one")),
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => found.damaged.push(format!("checkpoint {checkpoint}: {error}")),
        }
    }
    found.checkpoints.sort_by_key(|metadata| metadata.checkpoint);
    generations.retain(|opened| !opened.checkpoints.is_empty());
    Ok(generations)
}

/// A store whose head is lost: what its generations say has to do.
///
/// # Errors
/// Where one cannot be read now: what is in it may be whole, so it is no damage.
pub(crate) fn head_of_generations(
    storage: &dyn Storage,
    numbers: &[u64],
    found: &mut OpenedStore,
) -> Result<Head> {
    let mut head = Head::default();
    for &number in numbers {
        let metadata = storage.read(number, 0).and_then(|generation| {
            let keys = generation.keys(b"m")?;
            let read = |key: &Vec<u8>| read_metadata_as_stored(&*generation, key);
            Ok(keys.iter().map(read).collect::<Vec<_>>())
        });
        match metadata {
            Ok(metadata) => {
                for metadata in metadata {
                    match metadata {
                        Ok((CheckpointMetadata { checkpoint, .. }, checksum)) => {
                            head.checkpoints.retain(|kept| kept.checkpoint != checkpoint);
                            head.checkpoints.push(Kept {
                                checkpoint,
                                generation: number,
                                end: 0,
                                checksum,
                            });
                        }
                        Err(error) if error.may_pass() => return Err(error),
                        Err(error) => found.damaged.push(error.to_string()),
                    }
                }
            }
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => found.damaged.push(format!("generation {number}: {error}")),
        }
    }
    head.generation = numbers.last().copied().unwrap_or(0);
    head.highest_id = head.checkpoints.iter().map(|kept| kept.checkpoint).max().unwrap_or(0);
    Ok(head)
}

pub(crate) fn metadata_checksum(metadata: &CheckpointMetadata) -> Result<u64> {
    Ok(twox_hash::XxHash3_64::oneshot(&metadata.encode()?))
}

pub(crate) fn read_metadata(generation: &dyn Generation, key: &[u8]) -> Result<CheckpointMetadata> {
    read_metadata_as_stored(generation, key).map(|(metadata, _)| metadata)
}

/// The metadata, and the checksum of its bytes, which may be of an earlier format.
pub(crate) fn read_metadata_as_stored(
    generation: &dyn Generation,
    key: &[u8],
) -> Result<(CheckpointMetadata, u64)> {
    let checkpoint = key.last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    let name = format!("the metadata of checkpoint {checkpoint}");
    let Some(framed) = generation.get(key)? else {
        return Err(StorageError::damaged(name, "it is not there"));
    };
    let bytes = unseal(&name, key, &framed)?;
    Ok((CheckpointMetadata::decode(&name, bytes)?, twox_hash::XxHash3_64::oneshot(bytes)))
}

#[cfg(test)]
mod tests {
    use std::io;

    use crate::SnapshotStore;

    use super::*;

    /// A store that has lost its head, and whose generation cannot be read.
    struct Headless {
        os_error: i32,
    }

    impl Storage for Headless {
        fn generations(&self) -> Result<Vec<u64>> {
            Ok(vec![1])
        }

        fn open(&mut self, _: u64, _: u64) -> Result<Box<dyn Generation>> {
            unreachable!("nothing is written")
        }

        fn read(&self, _: u64, _: u64) -> Result<Box<dyn Generation>> {
            Err(StorageError::store("open", io::Error::from_raw_os_error(self.os_error)))
        }

        fn heads(&self) -> Result<Vec<Vec<u8>>> {
            Ok(Vec::new())
        }

        fn write_head(&mut self, _: usize, _: &[u8]) -> Result<()> {
            unreachable!("nothing is written")
        }

        fn remove_heads(&mut self) -> Result<()> {
            unreachable!("nothing is removed")
        }

        fn location(&self) -> String {
            "here".to_owned()
        }

        fn remove(&mut self, _: u64) -> Result<()> {
            unreachable!("nothing is removed")
        }
    }

    #[test]
    fn what_cannot_be_read_now_is_no_damage_of_a_store_without_its_head() {
        let error =
            SnapshotStore::look(Box::new(Headless { os_error: 24 })).map(|(_, found)| found);
        assert_eq!(error.expect_err("too many open files").os_error(), Some(24));
        let gone = SnapshotStore::look(Box::new(Headless { os_error: 2 }));
        let (_, found) = gone.expect("it is looked into");
        assert!(found.is_headless);
        assert!(found.damaged.iter().any(|damage| damage.contains("generation 1")), "{found:?}");
    }
}
