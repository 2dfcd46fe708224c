//! Generations in memory, for throw-away runs and tests. A job whose process ends starts from the beginning.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Generation, Result, Storage, StorageError};

type Entries = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

/// A row of maps.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    generations: BTreeMap<u64, Entries>,
    heads: BTreeMap<usize, Vec<u8>>,
}

impl Storage for MemoryStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        Ok(self.generations.keys().copied().collect())
    }

    fn open(&mut self, number: u64, _: u64) -> Result<Box<dyn Generation>> {
        let entries = self.generations.entry(number).or_default().clone();
        Ok(Box::new(MemoryGeneration { entries }))
    }

    fn read(&self, number: u64, _: u64) -> Result<Box<dyn Generation>> {
        let entries = self.generations.get(&number).cloned();
        let why = || StorageError::damaged("the generation", "it is not there");
        Ok(Box::new(MemoryGeneration { entries: entries.ok_or_else(why)? }))
    }

    fn heads(&self) -> Result<Vec<Vec<u8>>> {
        Ok(self.heads.values().cloned().collect())
    }

    fn write_head(&mut self, copy: usize, bytes: &[u8]) -> Result<()> {
        self.heads.insert(copy, bytes.to_vec());
        Ok(())
    }

    fn remove(&mut self, number: u64) -> Result<()> {
        self.generations.remove(&number);
        Ok(())
    }

    fn remove_heads(&mut self) -> Result<()> {
        self.heads.clear();
        Ok(())
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}

struct MemoryGeneration {
    entries: Entries,
}

impl MemoryGeneration {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generation for MemoryGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.lock().insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.lock().get(key).cloned())
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.lock().remove(key);
        Ok(())
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        let entries = self.lock();
        let from = entries.range(prefix.to_vec()..);
        Ok(from.map(|(key, _)| key.clone()).take_while(|key| key.starts_with(prefix)).collect())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(&self) -> u64 {
        0
    }
}
