//! Snapshots of guest memory: the pages that changed, and whole images to restore from.
//!
//! An [`Image`] lives in memory files. Restoring from it maps the files privately into a fresh
//! instance, which takes microseconds at any size; pages are copied when the guest writes to them.
//! Applying a later snapshot to an image that a running guest has mapped is sound, because every
//! page of that snapshot was written by the guest and is therefore its own copy already.
#![allow(unsafe_code, reason = "copies pages out of guest memory that nobody is using")]

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    fs::File,
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::fs::{MemfdFlags, memfd_create};

use super::{PAGE_BYTES, Region, track::PageRange};

/// Pages that are copied into one buffer.
const CHUNK_PAGES: usize = 256;
const CHUNK_BYTES: usize = CHUNK_PAGES * PAGE_BYTES;

/// Buffers for snapshots. One from the operating system costs a page fault for every 4 KiB, four times
/// what copying them costs, and the guest waits for it: so they are used again, as many as were in use at
/// once, and those that a first snapshot will need are made beforehand.
#[derive(Debug)]
struct Pool {
    idle: Vec<Box<[u8]>>,
    in_use: usize,
    /// The most that were in use at once since none was.
    peak: usize,
    /// And the time before.
    peak_before: usize,
    /// Whether any was taken since [`Pool::age`] asked last.
    is_used: bool,
}

/// So many idle buffers are kept in any case.
const IDLE_CHUNKS_MIN: usize = 128;
/// No more are made beforehand.
const PREPARED_BYTES_MAX: usize = 1 << 30;
/// Or at once.
const PREPARED_CHUNKS: usize = 4;
/// What nobody has needed for so many ticks, a minute, is given back.
const AGE_TICKS: u64 = 6_000;

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// Bytes of memories that no snapshot has copied yet.
static EXPECTED_BYTES: AtomicUsize = AtomicUsize::new(0);

impl Pool {
    const fn new() -> Self {
        Self { idle: Vec::new(), in_use: 0, peak: 0, peak_before: 0, is_used: false }
    }

    fn take(&mut self) -> Option<Box<[u8]>> {
        self.is_used = true;
        self.in_use += 1;
        self.peak = self.peak.max(self.in_use);
        self.idle.pop()
    }

    /// Takes a buffer back; what is too many.
    fn give_back(&mut self, buffer: Box<[u8]>) -> Vec<Box<[u8]>> {
        self.idle.push(buffer);
        self.in_use = self.in_use.saturating_sub(1);
        let too_many = self.too_many();
        if self.in_use == 0 {
            self.peak_before = std::mem::take(&mut self.peak);
        }
        too_many
    }

    fn too_many(&mut self) -> Vec<Box<[u8]>> {
        let kept = IDLE_CHUNKS_MIN.max(self.peak).max(self.peak_before).max(expected_chunks());
        self.idle.split_off(kept.min(self.idle.len()))
    }

    /// What was needed at once is not needed any more if none was since this was asked last; gives what
    /// is too many then.
    fn age(&mut self) -> Vec<Box<[u8]>> {
        if !std::mem::take(&mut self.is_used) && self.in_use == 0 {
            (self.peak, self.peak_before) = (0, 0);
        }
        self.too_many()
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn expected_chunks() -> usize {
    EXPECTED_BYTES.load(Ordering::Relaxed).min(PREPARED_BYTES_MAX).div_ceil(CHUNK_BYTES)
}

/// Snapshots will copy so many bytes more, or fewer, than was known.
pub(super) fn expect(more: usize, fewer: usize) {
    EXPECTED_BYTES.fetch_add(more, Ordering::Relaxed);
    EXPECTED_BYTES.fetch_sub(fewer, Ordering::Relaxed);
}

/// Makes some of the buffers that a first snapshot will need, and gives back those that nobody has needed
/// for long. To be called at every tick, which are counted from 0.
pub(crate) fn prepare(tick: u64) {
    if tick % AGE_TICKS == AGE_TICKS - 1 {
        let _too_many = pool().age();
    }
    for _ in 0..PREPARED_CHUNKS {
        if expected_chunks() <= pool().idle.len() {
            return;
        }
        // Not of zeros: those would not be there until somebody writes to them.
        let buffer = vec![1; CHUNK_BYTES].into_boxed_slice();
        pool().idle.push(buffer);
    }
}

/// A buffer of `CHUNK_BYTES` that goes back to the idle ones when it is dropped.
#[derive(Debug)]
struct Chunk(Box<[u8]>);

impl Chunk {
    fn take() -> Self {
        let idle = pool().take();
        Self(idle.unwrap_or_else(|| vec![0; CHUNK_BYTES].into_boxed_slice()))
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // What is too many is freed when the pool is no longer locked.
        let _too_many = pool().give_back(std::mem::take(&mut self.0));
    }
}

/// The pages of one linear memory that changed since the snapshot before.
#[derive(Debug, Default)]
pub struct MemoryDelta {
    size_bytes: u64,
    pages: Vec<u32>,
    chunks: Vec<Chunk>,
}

impl MemoryDelta {
    /// An empty change of a memory that is this large.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, ..Self::default() }
    }

    /// The size of the whole memory.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How many pages changed.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Every changed page with its number, in the order it was added.
    pub fn pages(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let chunks = self.chunks.iter().flat_map(|chunk| chunk.0.chunks_exact(PAGE_BYTES));
        self.pages.iter().copied().zip(chunks)
    }

    /// Adds a page. A page that is added again counts as it was added last.
    ///
    /// # Panics
    /// If `bytes` is not one page.
    pub fn push(&mut self, page: u32, bytes: &[u8]) {
        let place = self.pages.len() % CHUNK_PAGES;
        if place == 0 {
            self.chunks.push(Chunk::take());
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.0[place * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(bytes);
            self.pages.push(page);
        }
    }

    /// Copies the pages out of a region.
    ///
    /// # Safety
    /// No guest code may run during the call.
    pub(crate) unsafe fn copy(region: &Region, ranges: &[PageRange]) -> Self {
        let mut delta = Self::new(region.size_bytes() as u64);
        // SAFETY: the caller's promise.
        let bytes = unsafe { region.bytes() };
        for page in ranges.iter().cloned().flatten() {
            delta.push(page, &bytes[page as usize * PAGE_BYTES..][..PAGE_BYTES]);
        }
        delta
    }
}

/// What changed in all memories of an instance, and what else belongs to its state.
#[derive(Debug, Default)]
pub struct MemorySnapshot {
    /// One for each linear memory, in the order of instantiation.
    pub memories: Vec<MemoryDelta>,
    /// Every mutable global, as bits.
    pub globals: Vec<i64>,
    /// The guest's monotonic clock, in nanoseconds, which must not run backwards.
    pub monotonic_ns: u64,
}

impl MemorySnapshot {
    /// What snapshots that follow each other have changed, as of the last; `None` where there are none. Of a
    /// page that is in several the last one's counts. Copies each page once.
    #[must_use]
    pub fn merged<'a>(snapshots: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let snapshots: Vec<&Self> = snapshots.into_iter().collect();
        let last = snapshots.last()?;
        let memories = last.memories.iter().enumerate().map(|(index, newest)| {
            let mut pages = BTreeMap::new();
            for snapshot in &snapshots {
                pages.extend(snapshot.memories.get(index).into_iter().flat_map(MemoryDelta::pages));
            }
            let mut merged = MemoryDelta::new(newest.size_bytes());
            pages.into_iter().for_each(|(page, bytes)| merged.push(page, bytes));
            merged
        });
        let (globals, monotonic_ns) = (last.globals.clone(), last.monotonic_ns);
        Some(Self { memories: memories.collect(), globals, monotonic_ns })
    }

    /// How many bytes of pages changed.
    #[must_use]
    pub fn changed_bytes(&self) -> u64 {
        let pages: usize = self.memories.iter().map(MemoryDelta::page_count).sum();
        (pages * PAGE_BYTES) as u64
    }

    /// How large the memories are.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.memories.iter().map(MemoryDelta::size_bytes).sum()
    }
}

/// The whole memory of an instance at one checkpoint, ready to be mapped.
#[derive(Debug, Default)]
pub struct Image {
    pub(crate) memories: Vec<MemoryImage>,
    pub(crate) globals: Vec<i64>,
    pub(crate) monotonic_ns: u64,
}

#[derive(Debug)]
pub(crate) struct MemoryImage {
    pub(crate) file: File,
    pub(crate) size_bytes: u64,
}

impl Image {
    /// The image of an instance that has no memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The image of snapshots that follow each other; each goes when it is in there.
    ///
    /// # Errors
    /// Where the operating system has no memory left.
    pub fn of(
        snapshots: impl IntoIterator<Item = impl Borrow<MemorySnapshot>>,
    ) -> io::Result<Self> {
        let mut image = Self::new();
        snapshots.into_iter().try_for_each(|snapshot| image.apply(snapshot.borrow()))?;
        Ok(image)
    }

    /// True before the first snapshot was applied.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.memories.is_empty() && self.globals.is_empty()
    }

    /// The size of all memories.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.memories.iter().map(|memory| memory.size_bytes).sum()
    }

    /// Another image of the same content. Costs a copy of all of it.
    ///
    /// # Errors
    /// Where the operating system has no memory left.
    pub fn copy(&self) -> io::Result<Self> {
        let copies = self.memories.iter().map(MemoryImage::copy);
        let memories = copies.collect::<io::Result<_>>()?;
        Ok(Self { memories, globals: self.globals.clone(), monotonic_ns: self.monotonic_ns })
    }

    /// Brings the image forward by one snapshot.
    ///
    /// # Errors
    /// Where the operating system has no memory left; the image is then not usable any more.
    pub fn apply(&mut self, snapshot: &MemorySnapshot) -> io::Result<()> {
        while self.memories.len() < snapshot.memories.len() {
            let file = memfd_create("cofferdam-image", MemfdFlags::CLOEXEC)?;
            self.memories.push(MemoryImage { file: File::from(file), size_bytes: 0 });
        }
        for (image, delta) in self.memories.iter_mut().zip(&snapshot.memories) {
            image.apply(delta)?;
        }
        self.globals.clone_from(&snapshot.globals);
        self.monotonic_ns = snapshot.monotonic_ns;
        Ok(())
    }
}

impl MemoryImage {
    fn copy(&self) -> io::Result<Self> {
        use std::os::unix::fs::FileExt;
        let file = File::from(memfd_create("cofferdam-image", MemfdFlags::CLOEXEC)?);
        file.set_len(self.size_bytes)?;
        let mut bytes = vec![0; CHUNK_PAGES * PAGE_BYTES];
        for start in (0..self.size_bytes).step_by(bytes.len()) {
            let len = bytes.len().min((self.size_bytes - start) as usize);
            self.file.read_exact_at(&mut bytes[..len], start)?;
            // What was never written stays a hole.
            if bytes[..len].iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes[..len], start)?;
            }
        }
        Ok(Self { file, size_bytes: self.size_bytes })
    }

    fn apply(&mut self, delta: &MemoryDelta) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        if self.size_bytes < delta.size_bytes {
            self.file.set_len(delta.size_bytes)?;
            self.size_bytes = delta.size_bytes;
        }
        for (pages, chunk) in delta.pages.chunks(CHUNK_PAGES).zip(&delta.chunks) {
            let mut first = 0;
            for run in pages.chunk_by(|left, right| left + 1 == *right) {
                let bytes = &chunk.0[first * PAGE_BYTES..(first + run.len()) * PAGE_BYTES];
                self.file.write_all_at(bytes, u64::from(run[0]) * PAGE_BYTES as u64)?;
                first += run.len();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn image_is_the_sum_of_its_snapshots() {
        let mut image = Image::new();
        let page = |byte: u8| vec![byte; PAGE_BYTES];
        let snapshot = |size: u64, pages: &[(u32, u8)]| {
            let mut delta = MemoryDelta::new(size);
            for (number, byte) in pages {
                delta.push(*number, &page(*byte));
            }
            MemorySnapshot { memories: vec![delta], globals: vec![7], monotonic_ns: 0 }
        };
        image.apply(&snapshot(8 * 4096, &[(1, 1), (2, 2), (5, 5)])).expect("memory");
        image.apply(&snapshot(9 * 4096, &[(2, 9), (8, 8)])).expect("memory");
        let mut bytes = vec![0; image.size_bytes() as usize];
        image.memories[0].file.read_exact_at(&mut bytes, 0).expect("readable");
        let firsts: Vec<u8> = bytes.chunks(PAGE_BYTES).map(|page| page[PAGE_BYTES - 1]).collect();
        assert_eq!(firsts, [0, 1, 9, 0, 0, 5, 0, 0, 8]);
        let older = snapshot(8 * 4096, &[(1, 1), (2, 2), (5, 5)]);
        let newer = snapshot(9 * 4096, &[(2, 9), (8, 8)]);
        let mut of_merged = Image::new();
        let merged = MemorySnapshot::merged([&older, &newer]).expect("two");
        of_merged.apply(&merged).expect("memory");
        let mut same = vec![0; of_merged.size_bytes() as usize];
        of_merged.memories[0].file.read_exact_at(&mut same, 0).expect("readable");
        assert!(same == bytes, "merged, they do what they do one after the other");
        let copy = image.copy().expect("memory");
        image.apply(&snapshot(9 * 4096, &[(2, 4)])).expect("memory");
        let mut copied = vec![0; copy.size_bytes() as usize];
        copy.memories[0].file.read_exact_at(&mut copied, 0).expect("readable");
        assert!(copied == bytes, "a copy is not changed with what it was made of");
    }

    #[test]
    fn as_many_buffers_are_kept_as_were_in_use_at_once() {
        let mut pool = Pool::new();
        let mut round = |count: usize| {
            let taken: Vec<_> = (0..count).map(|_| pool.take().unwrap_or_default()).collect();
            taken.into_iter().for_each(|buffer| drop(pool.give_back(buffer)));
            pool.idle.len()
        };
        assert_eq!(round(3 * IDLE_CHUNKS_MIN), 3 * IDLE_CHUNKS_MIN);
        assert_eq!(round(2), 3 * IDLE_CHUNKS_MIN, "the next may need them again");
        assert_eq!(round(2), IDLE_CHUNKS_MIN, "but not for ever");
        assert_eq!(round(3 * IDLE_CHUNKS_MIN), 3 * IDLE_CHUNKS_MIN);
        assert!(pool.age().is_empty(), "they were used");
        assert_eq!(pool.age().len(), 2 * IDLE_CHUNKS_MIN, "and not since");
    }

    #[test]
    fn delta_keeps_its_order_over_many_chunks() {
        let mut delta = MemoryDelta::new(0);
        for number in 0..700u32 {
            delta.push(number, &vec![(number % 251) as u8; PAGE_BYTES]);
        }
        assert_eq!(delta.page_count(), 700);
        assert!(delta.pages().all(|(number, bytes)| bytes[17] == (number % 251) as u8));
    }
}
