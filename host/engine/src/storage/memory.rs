//! Generations in memory, for throw-away runs and tests. A job whose process ends begins anew.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Generation, Result, Storage};

type Entries = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

/// A row of maps.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    generations: BTreeMap<u64, Entries>,
}

impl Storage for MemoryStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        Ok(self.generations.keys().copied().collect())
    }

    fn open(&mut self, number: u64) -> Result<Box<dyn Generation>> {
        let entries = self.generations.entry(number).or_default().clone();
        Ok(Box::new(MemoryGeneration { entries }))
    }

    fn remove(&mut self, number: u64) -> Result<()> {
        self.generations.remove(&number);
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
}
