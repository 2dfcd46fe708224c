//! The head of a store: which checkpoints are complete, and how far their generation reaches.
//!
//! It lies beside the generations, in two copies that are written in turns, each synced before
//! anything is promised that it says. So a store that has lost its newest checkpoints never looks like
//! one that never had them: **a checkpoint is complete when the head names it, and not before.**

use serde::{Deserialize, Serialize};

use crate::{
    Result, StorageError,
    metadata::{beginning, behind_beginning, seal, unseal},
};

const MAGIC: [u8; 4] = *b"CFDH";
const KEY: &[u8] = b"HEAD";

/// What is known of a store without looking into it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Ascends with each writing: of two copies the higher one counts.
    pub sequence: u64,
    /// The generation that is written to. Later ones were never finished.
    pub generation: u64,
    /// No checkpoint has ever had a higher id.
    pub highest_id: u64,
    /// Every checkpoint that is kept, oldest first.
    pub checkpoints: Vec<Kept>,
}

/// A completed checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its id.
    pub checkpoint: u64,
    /// Where its metadata is.
    pub generation: u64,
    /// How far that reached then.
    pub end: u64,
    /// The checksum of its metadata.
    pub checksum: u64,
}

/// What the checksum of a head begins with: magic and version, so that one version is not taken for another; before
/// format 7 a fixed word.
fn key_of(bytes: &[u8]) -> &[u8] {
    match bytes.get(4..6) {
        Some([5 | 6, 0]) => KEY,
        _ => bytes.get(..6).unwrap_or(bytes),
    }
}

impl Head {
    /// How far a generation reached at its newest checkpoint.
    pub(super) fn end_of(&self, generation: u64) -> u64 {
        let of = self.checkpoints.iter().filter(|kept| kept.generation == generation);
        of.map(|kept| kept.end).max().unwrap_or(0)
    }

    /// The bytes of a copy.
    ///
    /// # Errors
    /// Where it cannot be encoded, which would be a bug.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let payload = postcard::to_stdvec(self)
            .map_err(|error| StorageError::store("encode the head", error))?;
        let mut bytes = beginning(MAGIC);
        let sealed = seal(key_of(&bytes), &payload);
        bytes.extend(sealed);
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let name = "the head of the store";
        let rest = behind_beginning(name, MAGIC, bytes)?;
        postcard::from_bytes(unseal(name, key_of(bytes), rest)?)
            .map_err(|error| StorageError::damaged(name, error))
    }

    /// The newest of the copies that are whole; `None` where there is none at all.
    ///
    /// # Errors
    /// Where there are copies and none is whole.
    pub fn newest(copies: &[Vec<u8>]) -> Result<Option<Self>> {
        let decoded: Vec<Result<Self>> = copies.iter().map(|bytes| Self::decode(bytes)).collect();
        let mut error = None;
        let mut newest: Option<Self> = None;
        for copy in decoded {
            match copy {
                Ok(head) if newest.as_ref().is_none_or(|it| it.sequence < head.sequence) => {
                    newest = Some(head);
                }
                Ok(_) => {}
                Err(other) => error = Some(other),
            }
        }
        match (newest, error) {
            (None, Some(error)) => Err(error),
            (newest, _) => Ok(newest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_copy_counts_and_a_damaged_one_does_not() {
        let head = |sequence| Head { sequence, generation: 3, ..Head::default() };
        let bytes = |sequence| head(sequence).encode().expect("encodes");
        assert_eq!(Head::newest(&[]).expect("none"), None);
        let newest = |copies: &[Vec<u8>]| Head::newest(copies).ok().flatten().map(|h| h.sequence);
        assert_eq!(newest(&[bytes(4), bytes(5)]), Some(5));
        assert_eq!(newest(&[bytes(6), bytes(5)]), Some(6));
        let whole = bytes(7);
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert_eq!(newest(&[flipped.clone(), bytes(6)]), Some(6), "byte {at}");
            assert!(Head::newest(&[flipped]).is_err());
            assert!(Head::newest(&[whole[..at].to_vec()]).is_err());
        }
    }
}
