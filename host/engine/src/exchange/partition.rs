//! Result partitions: what a task produces for an edge whose readers come later, or come again.
//!
//! A partition is one file of one attempt: blocks of elements, each for one reader and with a checksum
//! of its own. Which blocks there are is kept in memory, because a job that reads partitions starts from the beginning
//! when its process has ended. A reader may begin before its producer has finished, and then waits
//! for blocks; what it finds damaged or missing is a lost partition, never wrong records.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cofferdam_core::{
    failover::topology::PartitionId,
    failure::{EnvironmentError, FailureCause, LimitKind},
    ids::{Attempt, TaskId},
    job::Event,
};
use cofferdam_store::{
    in_flight::InFlight,
    metadata::{seal, unseal},
};
use tokio::sync::Notify;

use super::{Element, Sender};
use crate::{failure::storage_error, watch::monitor::Monitor};

/// What all readers of a partition have waiting in memory, at most: the rest is on disk.
const BUFFERED_BYTES_MAX: usize = 8 << 20;
/// A block of one reader.
const BLOCK_BYTES: std::ops::RangeInclusive<usize> = (16 << 10)..=(256 << 10);

/// The partitions of one run.
#[derive(Debug)]
pub(crate) struct Partitions {
    dir: PathBuf,
    /// Those of the newest attempt of each producer.
    known: Mutex<BTreeMap<PartitionId, Arc<Partition>>>,
}

/// One task's output for one edge, in one attempt.
#[derive(Debug)]
pub(crate) struct Partition {
    path: PathBuf,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// By reader, in the order they were written.
    blocks: Vec<Vec<Block>>,
    is_finished: bool,
}

#[derive(Debug, Clone, Copy)]
struct Block {
    offset: u64,
    len: u32,
}

/// What a reader finds at a place.
enum BlockLookup {
    Block(Block),
    /// There are no more.
    End,
    NotYet,
}

impl Partitions {
    /// An empty directory for them.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub(crate) fn new(dir: &Path) -> io::Result<Self> {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), known: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PartitionId, Arc<Partition>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A producer begins a partition for so many readers, of so many bytes at most; one of an earlier
    /// attempt is removed.
    pub(crate) fn begin(
        &self,
        id: PartitionId,
        attempt: Attempt,
        readers: usize,
        bytes_max: u64,
    ) -> PartitionWriter {
        let TaskId { node, index } = id.producer;
        let name = format!("{}-{}-{index}-{}", id.edge, node.0, attempt.0);
        let partition = Arc::new(Partition {
            path: self.dir.join(name),
            state: Mutex::new(State { blocks: vec![Vec::new(); readers], is_finished: false }),
            changed: Notify::new(),
        });
        let before = self.lock().insert(id, partition.clone());
        before.iter().for_each(|partition| partition.remove());
        let block_bytes =
            (BUFFERED_BYTES_MAX / readers.max(1)).clamp(*BLOCK_BYTES.start(), *BLOCK_BYTES.end());
        let (file, failure) = match File::create_new(&partition.path) {
            Ok(file) => (Some(file), None),
            Err(error) => (None, Some(not_written(&partition.path, error))),
        };
        let waiting = (0..readers).map(|_| Waiting::default()).collect();
        PartitionWriter { partition, file, offset: 0, bytes_max, waiting, block_bytes, failure }
    }

    /// The partition of the producer's newest attempt.
    pub(crate) fn get(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.lock().get(&id).cloned()
    }

    /// Everybody has read it.
    pub(crate) fn release(&self, id: PartitionId) {
        if let Some(partition) = self.lock().remove(&id) {
            partition.remove();
        }
    }
}

impl Drop for Partitions {
    /// What is left if this fails is removed by the next run.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Partition {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "remove a partition");
        }
    }

    fn find(&self, reader: usize, place: usize) -> BlockLookup {
        let state = self.lock();
        match state.blocks.get(reader).and_then(|blocks| blocks.get(place)) {
            Some(block) => BlockLookup::Block(*block),
            None if state.is_finished => BlockLookup::End,
            None => BlockLookup::NotYet,
        }
    }

    /// The elements of a block.
    fn read(
        &self,
        reader: usize,
        place: usize,
        block: Block,
    ) -> Result<Vec<InFlight>, EnvironmentError> {
        let name = || format!("block {place} of {}", self.path.display());
        let mut framed = vec![0; block.len as usize];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut framed, block.offset))
            .map_err(|error| EnvironmentError::of(format_args!("read {}", name()), error))?;
        let payload = unseal(&name(), &block_key(reader, place), &framed).map_err(storage_error)?;
        let elements: Vec<InFlight> =
            postcard::from_bytes(payload).map_err(|error| EnvironmentError::of(name(), error))?;
        let malformed = |what| EnvironmentError::new(format!("{}: {what}", name()));
        elements.iter().try_for_each(InFlight::check).map_err(malformed)?;
        Ok(elements)
    }
}

/// What a block's checksum covers beside its content: one that lies elsewhere is as wrong as one with
/// a flipped bit.
fn block_key(reader: usize, place: usize) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&(reader as u64).to_le_bytes());
    key[8..].copy_from_slice(&(place as u64).to_le_bytes());
    key
}

/// The producer's side.
#[derive(Debug)]
pub(crate) struct PartitionWriter {
    partition: Arc<Partition>,
    /// Closed when it is finished, or has failed.
    file: Option<File>,
    offset: u64,
    bytes_max: u64,
    waiting: Vec<Waiting>,
    block_bytes: usize,
    /// Why something is missing.
    failure: Option<FailureCause>,
}

/// What becomes the next block of a reader.
#[derive(Debug, Default)]
struct Waiting {
    elements: Vec<InFlight>,
    bytes: usize,
}

impl PartitionWriter {
    /// Takes an element for a reader. Barriers and ends have no place in a partition: its readers
    /// begin when its producer has ended, or are told by its finish.
    pub(super) fn write(&mut self, reader: usize, element: Element) {
        let (element, bytes) = match element {
            Element::Records(batch) => {
                let bytes = batch.byte_count();
                (InFlight::Records(batch), bytes)
            }
            Element::Watermark(watermark) => (InFlight::Watermark(watermark), 8),
            Element::Barrier(..) | Element::EndOfInput | Element::Idle => return,
        };
        let waiting = &mut self.waiting[reader];
        waiting.elements.push(element);
        waiting.bytes += bytes;
        if self.block_bytes <= waiting.bytes {
            self.flush(reader);
        }
    }

    fn flush(&mut self, reader: usize) {
        let Waiting { elements, .. } = std::mem::take(&mut self.waiting[reader]);
        let Some(file) = self.file.as_mut().filter(|_| !elements.is_empty()) else { return };
        let place = self.partition.lock().blocks[reader].len();
        let written =
            postcard::to_stdvec(&elements).map_err(io::Error::other).and_then(|payload| {
                let framed = seal(&block_key(reader, place), &payload);
                let len = u32::try_from(framed.len()).map_err(io::Error::other)?;
                file.write_all(&framed)?;
                Ok(Block { offset: self.offset, len })
            });
        let written = match written {
            Ok(block) if self.bytes_max < block.offset + u64::from(block.len) => {
                let message = format!("a result is larger than {} bytes", self.bytes_max);
                Err(FailureCause::LimitExceeded { limit: LimitKind::Partition, message })
            }
            Ok(block) => Ok(block),
            Err(error) => Err(not_written(&self.partition.path, error)),
        };
        match written {
            Ok(block) => {
                self.offset += u64::from(block.len);
                self.partition.lock().blocks[reader].push(block);
                self.partition.changed.notify_waiters();
            }
            Err(cause) => (self.file, self.failure) = (None, Some(cause)),
        }
    }

    /// Whether everything could be written up to here.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check(&self) -> Result<(), FailureCause> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Nothing follows.
    ///
    /// # Errors
    /// Where something could not be written; the partition is then never finished.
    pub(super) fn finish(&mut self) -> Result<(), FailureCause> {
        (0..self.waiting.len()).for_each(|reader| self.flush(reader));
        self.check()?;
        self.file = None;
        self.partition.lock().is_finished = true;
        self.partition.changed.notify_waiters();
        Ok(())
    }
}

fn not_written(path: &Path, error: io::Error) -> FailureCause {
    let doing = format_args!("write {}", path.display());
    FailureCause::Environment(EnvironmentError::of(doing, error))
}

/// What one task reads of partitions: for each of its channels that begins at one, where that is.
pub(crate) struct PartitionReader {
    pub(crate) task: TaskId,
    pub(crate) attempt: Attempt,
    pub(crate) channels: Vec<PartitionChannel>,
}

/// A channel that a partition feeds.
pub(crate) struct PartitionChannel {
    pub(crate) sender: Sender,
    pub(crate) id: PartitionId,
    /// `None`: it was released, which must not happen while somebody reads it.
    pub(crate) partition: Option<Arc<Partition>>,
    /// The task's place among the readers.
    pub(crate) reader: usize,
}

impl PartitionReader {
    /// Feeds one channel after the other; a partition that cannot be read is reported as lost.
    pub(crate) async fn run(self, monitor: Arc<Monitor>) {
        for channel in self.channels {
            if let Err(error) = channel.feed().await {
                let cause = FailureCause::Environment(error);
                let task = Some((self.task, self.attempt));
                return monitor.report(Event::TaskFailed { task, cause, lost: Some(channel.id) });
            }
        }
    }
}

impl PartitionChannel {
    async fn feed(&self) -> Result<(), EnvironmentError> {
        let Some(partition) = &self.partition else {
            return Err(EnvironmentError::new("the result partition is not there any more"));
        };
        for place in 0.. {
            let block = loop {
                let changed = partition.changed.notified();
                tokio::pin!(changed);
                // From here on no news is missed.
                changed.as_mut().enable();
                match partition.find(self.reader, place) {
                    BlockLookup::Block(block) => break block,
                    BlockLookup::End => {
                        self.sender.send(Element::EndOfInput);
                        return Ok(());
                    }
                    BlockLookup::NotYet => changed.await,
                }
            };
            let (reading, reader) = (partition.clone(), self.reader);
            let elements =
                tokio::task::spawn_blocking(move || reading.read(reader, place, block)).await;
            let panicked = |error| EnvironmentError::of("read a result partition", error);
            for element in elements.map_err(panicked)?? {
                self.sender.wait_for_credit().await;
                self.sender.send(match element {
                    InFlight::Records(batch) => Element::Records(batch),
                    InFlight::Watermark(watermark) => Element::Watermark(watermark),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_contract::{Batch, RecordRef};
    use cofferdam_core::ids::NodeId;

    use super::*;
    use crate::exchange::Gate;

    const ID: PartitionId = PartitionId { edge: 3, producer: TaskId { node: NodeId(1), index: 2 } };

    fn records(value: &[u8]) -> Element {
        let mut batch = Batch::empty();
        batch.push(RecordRef { key: None, value, timestamp: None });
        Element::Records(batch)
    }

    fn channel(partitions: &Partitions, gate: &Arc<Gate>, reader: usize) -> PartitionChannel {
        let partition = partitions.get(ID);
        PartitionChannel { sender: Sender::new(gate, 0), id: ID, partition, reader }
    }

    /// The sizes of the values that came, until the end.
    async fn read(partitions: &Partitions, reader: usize) -> Result<Vec<usize>, String> {
        let gate = Gate::new(1);
        let channel = channel(partitions, &gate, reader);
        let feeding = tokio::spawn(async move { channel.feed().await });
        let mut sizes = Vec::new();
        loop {
            let is_over = feeding.is_finished();
            match gate.try_next() {
                Some((_, Element::Records(batch))) => sizes.push(batch.values.len()),
                Some((_, Element::EndOfInput)) => {
                    feeding.await.expect("no panic").map_err(|error| error.to_string())?;
                    return Ok(sizes);
                }
                Some(_) => {}
                None if is_over => {
                    feeding.await.expect("no panic").map_err(|error| error.to_string())?;
                    return Ok(sizes);
                }
                None => tokio::task::yield_now().await,
            }
        }
    }

    #[tokio::test]
    async fn each_reader_gets_what_is_its_own_again_and_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = Partitions::new(&dir.path().join("partitions")).expect("made");
        let mut writer = partitions.begin(ID, Attempt(0), 2, u64::MAX);
        for size in 1..200usize {
            writer.write(size % 2, records(&vec![7; size * 100]));
        }
        writer.finish().expect("written");
        let odd: Vec<usize> = (1..200).filter(|n| n % 2 == 1).map(|n| n * 100).collect();
        let even: Vec<usize> = (1..200).filter(|n| n % 2 == 0).map(|n| n * 100).collect();
        for _ in 0..2 {
            assert_eq!(read(&partitions, 0).await.expect("whole"), even);
            assert_eq!(read(&partitions, 1).await.expect("whole"), odd);
        }
        assert!(2 < partitions.get(ID).expect("known").lock().blocks[0].len(), "several blocks");
    }

    #[tokio::test]
    async fn a_reader_may_come_before_the_end_and_waits_for_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = Arc::new(Partitions::new(&dir.path().join("partitions")).expect("made"));
        let mut writer = partitions.begin(ID, Attempt(0), 1, u64::MAX);
        let reading = tokio::spawn({
            let partitions = partitions.clone();
            async move { read(&partitions, 0).await }
        });
        for _ in 0..40 {
            writer.write(0, records(&[1; 50_000]));
            tokio::task::yield_now().await;
        }
        assert!(!reading.is_finished());
        writer.finish().expect("written");
        assert_eq!(reading.await.expect("no panic").expect("whole").len(), 40);
    }

    #[tokio::test]
    async fn damaged_cut_and_removed_files_are_found_and_never_give_wrong_records() {
        for harm in ["flip", "cut", "swap", "remove"] {
            let dir = tempfile::tempdir().expect("a directory");
            let partitions = Partitions::new(&dir.path().join("partitions")).expect("made");
            let mut writer = partitions.begin(ID, Attempt(0), 1, u64::MAX);
            (0..60).for_each(|_| writer.write(0, records(&[1; 20_000])));
            writer.finish().expect("written");
            let path = partitions.get(ID).expect("known").path.clone();
            let mut bytes = fs::read(&path).expect("readable");
            match harm {
                "flip" => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                }
                "cut" => bytes.truncate(bytes.len() - 1),
                "swap" => {
                    let block = partitions.get(ID).expect("known").lock().blocks[0][0].len as usize;
                    let (first, rest) = bytes.split_at_mut(block);
                    first.swap_with_slice(&mut rest[..block]);
                }
                _ => {}
            }
            match harm {
                "remove" => fs::remove_file(&path).expect("removed"),
                _ => fs::write(&path, bytes).expect("written"),
            }
            let error = read(&partitions, 0).await.expect_err(harm);
            assert!(error.contains("block "), "{harm}: {error}");
        }
    }

    #[tokio::test]
    async fn a_new_attempt_replaces_the_partition_of_the_one_before() {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = Partitions::new(&dir.path().join("partitions")).expect("made");
        for attempt in 0..3 {
            let mut writer = partitions.begin(ID, Attempt(attempt), 1, u64::MAX);
            writer.write(0, records(&vec![1; 1 + attempt as usize]));
            if attempt != 1 {
                writer.finish().expect("written");
            }
        }
        assert_eq!(read(&partitions, 0).await.expect("whole"), [3]);
        assert_eq!(fs::read_dir(&partitions.dir).expect("listed").count(), 1);
        partitions.release(ID);
        assert_eq!(fs::read_dir(&partitions.dir).expect("listed").count(), 0);
        assert!(read(&partitions, 0).await.is_err());
    }

    #[test]
    fn a_partition_has_a_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = Partitions::new(&dir.path().join("partitions")).expect("made");
        let mut writer = partitions.begin(ID, Attempt(0), 1, 1 << 20);
        let written = (0..100).take_while(|_| {
            writer.write(0, records(&[1; 50_000]));
            writer.check().is_ok()
        });
        let written = written.count();
        assert!((15..=24).contains(&written), "it is found while it is written: {written}");
        let error = writer.finish().expect_err("too large");
        assert!(matches!(error, FailureCause::LimitExceeded { .. }), "{error}");
        let size = fs::metadata(&partitions.get(ID).expect("known").path).expect("there").len();
        assert!(size <= (1 << 20) + (512 << 10), "{size}");
    }

    #[test]
    fn what_could_not_be_written_is_told_at_once_and_when_it_is_to_be_finished() {
        let dir = tempfile::tempdir().expect("a directory");
        let partitions = Partitions::new(&dir.path().join("partitions")).expect("made");
        fs::remove_dir_all(&partitions.dir).expect("removed");
        let mut writer = partitions.begin(ID, Attempt(0), 1, u64::MAX);
        writer.write(0, records(&[1]));
        assert!(writer.check().is_err());
        let error = writer.finish().expect_err("there is no directory");
        assert!(matches!(error, FailureCause::Environment { .. }), "{error}");
        assert!(!partitions.get(ID).expect("known").lock().is_finished);
    }
}
