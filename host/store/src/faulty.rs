//! A storage that fails at one chosen operation, to prove that no failure of any operation loses
//! or doubles anything.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{Generation, Result, Storage, StorageError};

/// When to fail. Cloning it gives the same countdown.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Countdown>);

#[derive(Debug, Default)]
struct Countdown {
    operations: AtomicU64,
    fail_at: AtomicU64,
    has_struck: AtomicBool,
}

impl Faults {
    /// Fails at the operation with this number, counted from 1, and at no other; 0: at none.
    #[must_use]
    pub fn at(operation: u64) -> Self {
        let faults = Self::default();
        faults.0.fail_at.store(operation, Ordering::Relaxed);
        faults
    }

    /// How many operations there were.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.operations.load(Ordering::Relaxed)
    }

    /// Whether one has failed.
    #[must_use]
    pub fn has_struck(&self) -> bool {
        self.0.has_struck.load(Ordering::Relaxed)
    }

    /// Puts the faults between a storage and its user.
    #[must_use]
    pub fn around(&self, storage: Box<dyn Storage>) -> Box<dyn Storage> {
        Box::new(FaultyStorage { storage, faults: self.clone() })
    }

    fn check(&self, doing: &'static str) -> Result<()> {
        let number = self.0.operations.fetch_add(1, Ordering::Relaxed) + 1;
        if number != self.0.fail_at.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.0.has_struck.store(true, Ordering::Relaxed);
        Err(StorageError::store(doing, format!("operation {number} was made to fail")))
    }
}

struct FaultyStorage {
    storage: Box<dyn Storage>,
    faults: Faults,
}

impl Storage for FaultyStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        self.faults.check("list the generations")?;
        self.storage.generations()
    }

    fn open(&mut self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        self.faults.check("open a generation")?;
        let generation = self.storage.open(number, end)?;
        let faults = self.faults.clone();
        Ok(Box::new(FaultyGeneration { generation, faults, is_broken: false }))
    }

    fn read(&self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        self.faults.check("read a generation")?;
        self.storage.read(number, end)
    }

    fn heads(&self) -> Result<Vec<Vec<u8>>> {
        self.faults.check("read the head")?;
        self.storage.heads()
    }

    fn write_head(&mut self, copy: usize, bytes: &[u8]) -> Result<()> {
        self.faults.check("write the head")?;
        self.storage.write_head(copy, bytes)
    }

    fn set_aside(&mut self, number: u64) -> Result<()> {
        self.faults.check("set a generation aside")?;
        self.storage.set_aside(number)
    }

    fn remove(&mut self, number: u64) -> Result<()> {
        self.faults.check("remove a generation")?;
        self.storage.remove(number)
    }

    fn remove_heads(&mut self) -> Result<()> {
        self.faults.check("remove the head")?;
        self.storage.remove_heads()
    }

    fn location(&self) -> String {
        self.storage.location()
    }
}

struct FaultyGeneration {
    generation: Box<dyn Generation>,
    faults: Faults,
    /// As sled is after its first error: nothing works until it is opened again.
    is_broken: bool,
}

impl FaultyGeneration {
    fn check(&mut self, doing: &'static str) -> Result<()> {
        if self.is_broken {
            return Err(StorageError::store(doing, "it has failed before"));
        }
        self.faults.check(doing).inspect_err(|_| self.is_broken = true)
    }

    fn check_read(&self, doing: &'static str) -> Result<()> {
        if self.is_broken {
            return Err(StorageError::store(doing, "it has failed before"));
        }
        self.faults.check(doing)
    }
}

impl Generation for FaultyGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.check("write")?;
        self.generation.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.check_read("read")?;
        self.generation.get(key)
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.check("delete")?;
        self.generation.delete(key)
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.check_read("list the keys")?;
        self.generation.keys(prefix)
    }

    fn flush(&mut self) -> Result<()> {
        self.check("flush")?;
        self.generation.flush()
    }

    fn reopen(&mut self) -> Result<()> {
        self.is_broken = false;
        self.generation.reopen()
    }

    fn end(&self) -> u64 {
        self.generation.end()
    }
}
