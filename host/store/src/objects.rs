//! Generations as objects: in a directory that many hosts may share, or in an object store.
//!
//! An object cannot be changed, so a generation is a log of segments. What is put is collected and
//! becomes the next segment, with an index behind it; what is deleted is named in the newest one.
//! A segment of which less than half still counts is emptied into the next and removed, as in the
//! log-structured file system of Rosenblum and Ousterhout (1992). `docs/checkpoint-format.md` draws
//! a segment byte by byte.
//!
//! Nothing locks an object store. A segment is written only where none of its number is: of two
//! runs that write to the same place one fails with words, and what the other has acked stays.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Display,
    path::Path,
    sync::{Arc, mpsc},
};

use cofferdam_files::{FOR_ALL, make_dir};
use cofferdam_settings::problem::with_sources;
use futures::TryStreamExt;
use object_store::{
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload, aws::AmazonS3Builder,
    local::LocalFileSystem, path::Path as ObjectPath,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use twox_hash::XxHash3_64;

use crate::{
    Generation, Result, Storage, StorageError,
    manifest::{FORMAT, is_readable},
    open::{GENERATION, SEGMENT},
};

/// A segment is written when it has this many bytes, or at a flush.
const SEGMENT_BYTES: usize = 8 << 20;
/// Segments that may be on their way at once.
const UPLOADS_MAX: usize = 4;

/// In a generation that is being removed: whatever else is left of it does not count.
const REMOVED: &str = "removed";
const MAGIC: [u8; 4] = *b"CFDS";
/// The end of a segment: length of the index, its checksum, version, magic.
const TAIL_BYTES: usize = 4 + 8 + 2 + 4;

/// A place in a file system or an object store with a folder for each generation.
pub struct ObjectStorage {
    objects: Objects,
    location: String,
}

/// The number in the name of a generation or a segment.
fn number_of(path: &ObjectPath, prefix: &str) -> Option<u64> {
    path.filename()?.strip_prefix(prefix)?.parse().ok()
}

/// The way to the objects from a thread that may block.
#[derive(Clone)]
struct Objects {
    store: Arc<dyn ObjectStore>,
    root: ObjectPath,
    runtime: Arc<Threads>,
}

/// A runtime that may be dropped anywhere.
struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn failed(doing: &'static str) -> impl Fn(object_store::Error) -> StorageError {
    move |error| match error {
        object_store::Error::NotFound { path, .. } => {
            StorageError::damaged(path, "it is not there")
        }
        error => StorageError::Unreachable { doing, reason: with_sources(&error) },
    }
}

impl Objects {
    fn start<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        if let Some(runtime) = &self.runtime.0 {
            runtime.spawn(async move {
                // Whoever has asked may have gone.
                let _ = sender.send(future.await);
            });
        }
        receiver
    }

    fn wait<T: Send + 'static>(
        &self,
        doing: &'static str,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T> {
        let answer = self.start(future).recv();
        answer.map_err(|error| StorageError::store(doing, error))?.map_err(failed(doing))
    }

    fn list(&self, folder: ObjectPath) -> Result<Vec<ObjectMeta>> {
        let store = self.store.clone();
        let list = async move { store.list(Some(&folder)).try_collect::<Vec<_>>().await };
        self.wait("list objects", list)
    }

    fn read(&self, path: ObjectPath, from: u64, len: u64) -> Result<Vec<u8>> {
        let store = self.store.clone();
        let read = async move { store.get_range(&path, from..from + len).await };
        Ok(self.wait("read an object", read)?.to_vec())
    }

    fn put(&self, path: ObjectPath) -> Result<()> {
        let store = self.store.clone();
        let put = async move { store.put(&path, PutPayload::new()).await.map(|_| ()) };
        self.wait("write an object", put)
    }

    fn delete(&self, path: ObjectPath) -> Result<()> {
        let store = self.store.clone();
        let delete = async move {
            match store.delete(&path).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                other => other,
            }
        };
        self.wait("delete an object", delete)
    }
}

impl ObjectStorage {
    /// Checkpoints at `location`: a directory, or a URL that begins with `file://`, `s3://` or
    /// `s3a://`. The credentials of S3, its region and another endpoint are in the environment
    /// variables that all its tools read (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` and so on).
    ///
    /// # Errors
    /// Where the URL is of another kind, or the directory cannot be made.
    pub fn new(location: &str) -> Result<Self> {
        // The first one to ask decides for the process; it makes no difference who that is.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let wrong = |error: &dyn Display| {
            StorageError::store("open the checkpoints", format!("{location}: {error}"))
        };
        let (store, root): (Arc<dyn ObjectStore>, ObjectPath) = match location.split_once("://") {
            None | Some(("file", _)) => {
                let dir = Path::new(location.strip_prefix("file://").unwrap_or(location));
                make_dir(dir, FOR_ALL).map_err(|error| wrong(&error))?;
                let store = LocalFileSystem::new_with_prefix(dir).map_err(|error| wrong(&error))?;
                let store = store.with_fsync(true).with_automatic_cleanup(true);
                (Arc::new(store), ObjectPath::default())
            }
            Some(("s3" | "s3a", rest)) => {
                let store = AmazonS3Builder::from_env().with_url(location).build();
                let store = store.map_err(|error| wrong(&with_sources(&error)))?;
                let folder = rest.split_once('/').map_or("", |(_, folder)| folder);
                (Arc::new(store), ObjectPath::parse(folder).map_err(|error| wrong(&error))?)
            }
            Some((scheme, _)) => {
                return Err(wrong(&format!("{scheme}:// is not known, file:// and s3:// are")));
            }
        };
        Self::over(store, root, location)
    }

    fn over(store: Arc<dyn ObjectStore>, root: ObjectPath, location: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("cofferdam-objects")
            .enable_all()
            .build()
            .map_err(|error| StorageError::store("start the threads of an object store", error))?;
        let runtime = Arc::new(Threads(Some(runtime)));
        Ok(Self { objects: Objects { store, root, runtime }, location: location.to_owned() })
    }

    /// Removes what there is of a generation that is marked as removed, and last the mark.
    fn remove_objects(&self, number: u64, objects: Vec<ObjectMeta>) -> Result<()> {
        let mark = self.folder(number).join(REMOVED);
        let others = objects.into_iter().map(|object| object.location);
        others.filter(|path| *path != mark).try_for_each(|path| self.objects.delete(path))?;
        self.objects.delete(mark)
    }

    fn head(&self, copy: usize) -> ObjectPath {
        self.objects.root.clone().join(format!("HEAD-{copy}"))
    }

    fn folder(&self, number: u64) -> ObjectPath {
        self.objects.root.clone().join(format!("{GENERATION}{number:08}"))
    }
}

impl Storage for ObjectStorage {
    fn generations(&self) -> Result<Vec<u64>> {
        let (store, root) = (self.objects.store.clone(), self.objects.root.clone());
        let list = async move { store.list_with_delimiter(Some(&root)).await };
        let listed = self.objects.wait("list the generations", list)?;
        let folders = listed.common_prefixes.iter();
        let mut numbers: Vec<u64> = folders.filter_map(|it| number_of(it, GENERATION)).collect();
        numbers.sort_unstable();
        let mut whole = Vec::with_capacity(numbers.len());
        for number in numbers {
            let objects = self.objects.list(self.folder(number))?;
            match objects.iter().any(|object| object.location.filename() == Some(REMOVED)) {
                true => self.remove_objects(number, objects)?,
                // A directory in which a write has failed, or that a crash has left.
                false if objects.is_empty() => {}
                false => whole.push(number),
            }
        }
        Ok(whole)
    }

    fn open(&mut self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        let generation = ObjectGeneration::open(self.objects.clone(), self.folder(number))?;
        generation.check_end(end)?;
        Ok(Box::new(generation))
    }

    fn read(&self, number: u64, end: u64) -> Result<Box<dyn Generation>> {
        let generation = ObjectGeneration::open(self.objects.clone(), self.folder(number))?;
        generation.check_end(end)?;
        Ok(Box::new(generation))
    }

    fn heads(&self) -> Result<Vec<Vec<u8>>> {
        let mut heads = Vec::new();
        for copy in 0..2 {
            let (store, path) = (self.objects.store.clone(), self.head(copy));
            let read = async move {
                match store.get(&path).await {
                    Ok(found) => Ok(Some(found.bytes().await?.to_vec())),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            };
            heads.extend(self.objects.wait("read the head", read)?);
        }
        Ok(heads)
    }

    fn write_head(&mut self, copy: usize, bytes: &[u8]) -> Result<()> {
        let (store, path) = (self.objects.store.clone(), self.head(copy % 2));
        let bytes = bytes.to_vec();
        let put = async move { store.put(&path, PutPayload::from(bytes)).await.map(|_| ()) };
        self.objects.wait("write the head", put)
    }

    fn remove(&mut self, number: u64) -> Result<()> {
        self.objects.put(self.folder(number).join(REMOVED))?;
        let objects = self.objects.list(self.folder(number))?;
        self.remove_objects(number, objects)
    }

    fn remove_heads(&mut self) -> Result<()> {
        (0..2).try_for_each(|copy| self.objects.delete(self.head(copy)))
    }

    fn location(&self) -> String {
        self.location.clone()
    }
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    segment: u64,
    offset: u64,
    len: u64,
}

/// What lies behind the values of a segment.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    /// Each value's key, offset and length.
    entries: Vec<(Vec<u8>, u64, u64)>,
    /// Keys in this segment or older ones that were deleted, each with the newest segment it is in.
    deleted: Vec<(Vec<u8>, u64)>,
}

/// A segment that is being filled, or on its way.
#[derive(Debug, Default)]
struct Segment {
    pub(crate) number: u64,
    values: Arc<Vec<u8>>,
    /// What lies behind the values, once it is on its way.
    tail: bytes::Bytes,
    entries: Vec<(Vec<u8>, u64, u64)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Size {
    bytes: u64,
    live: u64,
}

struct ObjectGeneration {
    objects: Objects,
    folder: ObjectPath,
    index: BTreeMap<Vec<u8>, Place>,
    deleted: BTreeMap<Vec<u8>, u64>,
    /// Every segment that is written or being filled.
    sizes: BTreeMap<u64, Size>,
    filling: Segment,
    uploads: VecDeque<(Segment, mpsc::Receiver<object_store::Result<()>>)>,
    /// Segments that could not be written.
    lost: Vec<Segment>,
    /// Something was deleted since the last segment was cut.
    has_deleted: bool,
    /// Another run has written to the same place: nothing is written any more.
    is_fenced: bool,
}

impl ObjectGeneration {
    fn open(objects: Objects, folder: ObjectPath) -> Result<Self> {
        let mut generation = Self {
            index: BTreeMap::new(),
            deleted: BTreeMap::new(),
            sizes: BTreeMap::new(),
            filling: Segment::default(),
            uploads: VecDeque::new(),
            lost: Vec::new(),
            has_deleted: false,
            is_fenced: false,
            objects,
            folder,
        };
        let listed = generation.objects.list(generation.folder.clone())?;
        let segment =
            |object: &ObjectMeta| Some((number_of(&object.location, SEGMENT)?, object.size));
        let mut segments: Vec<(u64, u64)> = listed.iter().filter_map(segment).collect();
        segments.sort_unstable();
        for (segment, bytes) in &segments {
            generation.sizes.insert(*segment, Size { bytes: *bytes, live: 0 });
            let Index { entries, deleted } = generation.read_index(*segment, *bytes)?;
            for (key, offset, len) in entries {
                generation.insert(key, Place { segment: *segment, offset, len });
            }
            generation.deleted = deleted.into_iter().collect();
        }
        for key in generation.deleted.keys() {
            if let Some(place) = generation.index.remove(key) {
                release(&mut generation.sizes, place);
            }
        }
        generation.fill(segments.last().map_or(1, |(last, _)| last + 1));
        Ok(generation)
    }

    /// Refuses a generation whose newest segments are missing.
    fn check_end(&self, end: u64) -> Result<()> {
        let found = self.end();
        if found < end {
            let path = self.path(found + 1);
            return Err(StorageError::damaged(path, "it is not there"));
        }
        Ok(())
    }

    fn path(&self, segment: u64) -> ObjectPath {
        self.folder.clone().join(format!("{SEGMENT}{segment:08}"))
    }

    fn read_index(&self, segment: u64, bytes: u64) -> Result<Index> {
        let path = self.path(segment);
        let damaged = |why: &str| StorageError::damaged(&path, why);
        let body =
            bytes.checked_sub(TAIL_BYTES as u64).ok_or_else(|| damaged("it is cut short"))?;
        let tail = self.objects.read(path.clone(), body, TAIL_BYTES as u64)?;
        let (len, rest) =
            tail.split_first_chunk::<4>().ok_or_else(|| damaged("it is cut short"))?;
        let (checksum, rest) =
            rest.split_first_chunk::<8>().ok_or_else(|| damaged("it is cut short"))?;
        let Some((version, magic)) = rest.split_first_chunk::<2>() else {
            return Err(damaged("it is cut short"));
        };
        if magic != MAGIC {
            return Err(damaged("it does not end like a segment"));
        }
        let found = u16::from_le_bytes(*version);
        if !is_readable(found) {
            return Err(StorageError::Format { what: path.to_string(), found, known: FORMAT });
        }
        let len = u64::from(u32::from_le_bytes(*len));
        let from = body.checked_sub(len).ok_or_else(|| damaged("its index is longer than it"))?;
        let index = self.objects.read(path.clone(), from, len)?;
        if XxHash3_64::oneshot(&index) != u64::from_le_bytes(*checksum) {
            return Err(damaged("the checksum of its index is wrong"));
        }
        let index: Index =
            postcard::from_bytes(&index).map_err(|error| damaged(&error.to_string()))?;
        let is_inside = |(_, offset, len): &(Vec<u8>, u64, u64)| {
            offset.checked_add(*len).is_some_and(|end| end <= from)
        };
        match index.entries.iter().all(is_inside) {
            true => Ok(index),
            false => Err(damaged("its index points out of it")),
        }
    }

    /// The newest place of a key counts.
    fn insert(&mut self, key: Vec<u8>, place: Place) {
        self.sizes.entry(place.segment).or_default().live += place.len;
        if let Some(old) = self.index.insert(key, place) {
            release(&mut self.sizes, old);
        }
    }

    fn fill(&mut self, number: u64) {
        self.sizes.insert(number, Size::default());
        self.filling = Segment { number, ..Segment::default() };
    }

    /// Sends what was collected on its way, and begins the next segment.
    fn cut(&mut self) -> Result<()> {
        if self.is_fenced {
            return Err(fenced());
        }
        let next = self.filling.number + 1;
        let segment = std::mem::take(&mut self.filling);
        self.fill(next);
        self.has_deleted = false;
        self.upload(segment)?;
        while UPLOADS_MAX < self.uploads.len() {
            self.settle_oldest()?;
        }
        Ok(())
    }

    fn upload(&mut self, mut segment: Segment) -> Result<()> {
        let index = Index {
            entries: segment.entries.clone(),
            deleted: self.deleted.iter().map(|(key, newest)| (key.clone(), *newest)).collect(),
        };
        let index = postcard::to_stdvec(&index)
            .map_err(|error| StorageError::store("encode an index", error))?;
        let mut tail = Vec::with_capacity(index.len() + TAIL_BYTES);
        tail.extend_from_slice(&index);
        tail.extend_from_slice(&(index.len() as u32).to_le_bytes());
        tail.extend_from_slice(&XxHash3_64::oneshot(&index).to_le_bytes());
        tail.extend_from_slice(&FORMAT.to_le_bytes());
        tail.extend_from_slice(&MAGIC);
        let bytes = (segment.values.len() + tail.len()) as u64;
        self.sizes.entry(segment.number).or_default().bytes = bytes;
        let values = bytes::Bytes::from_owner(SharedValues(segment.values.clone()));
        segment.tail = tail.into();
        let payload = PutPayload::from_iter([values, segment.tail.clone()]);
        let (store, path) = (self.objects.store.clone(), self.path(segment.number));
        let answer = self.objects.start(async move {
            store.put_opts(&path, payload, PutMode::Create.into()).await.map(|_| ())
        });
        self.uploads.push_back((segment, answer));
        Ok(())
    }

    /// Waits for the upload that began first.
    fn settle_oldest(&mut self) -> Result<()> {
        let Some((segment, answer)) = self.uploads.pop_front() else { return Ok(()) };
        let error = match answer.recv() {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(object_store::Error::AlreadyExists { .. })) => {
                // It may have been this one all the same, if an answer was lost on its way.
                let path = self.path(segment.number);
                let bytes = (segment.values.len() + segment.tail.len()) as u64;
                let found = self.objects.read(path, 0, bytes).unwrap_or_default();
                if found.starts_with(&segment.values)
                    && found[segment.values.len()..] == segment.tail
                {
                    return Ok(());
                }
                self.is_fenced = true;
                fenced()
            }
            Ok(Err(error)) => failed("write a segment")(error),
            Err(error) => StorageError::store("write a segment", error),
        };
        self.lost.push(segment);
        Err(error)
    }

    /// What could not be written is tried again, under a new number: it may be there all the same.
    fn retry_lost(&mut self) {
        // What was deleted by then is not told yet.
        self.has_deleted |= !self.lost.is_empty();
        for segment in std::mem::take(&mut self.lost) {
            for (key, offset, len) in segment.entries {
                let place = Place { segment: segment.number, offset, len };
                if self.index.get(&key) == Some(&place) {
                    self.append(&key, &segment.values[offset as usize..(offset + len) as usize]);
                }
            }
            // It may be there, so it is removed like one of which nothing counts.
        }
    }

    fn append(&mut self, key: &[u8], value: &[u8]) {
        let offset = self.filling.values.len() as u64;
        let place = Place { segment: self.filling.number, offset, len: value.len() as u64 };
        Arc::make_mut(&mut self.filling.values).extend_from_slice(value);
        self.filling.entries.push((key.to_vec(), place.offset, place.len));
        self.deleted.remove(key);
        self.insert(key.to_vec(), place);
    }

    /// Empties segments of which less than half counts into the one that is being filled.
    fn empty_segments(&mut self) -> Result<()> {
        let is_sparse = |(number, size): (&u64, &Size)| {
            let is_written = *number != self.filling.number;
            (is_written && 0 < size.live && size.live < size.bytes / 2).then_some(*number)
        };
        let sparse: Vec<u64> = self.sizes.iter().filter_map(is_sparse).collect();
        for number in sparse {
            let is_in = |(_, place): &(&Vec<u8>, &Place)| place.segment == number;
            let keys: Vec<Vec<u8>> =
                self.index.iter().filter(is_in).map(|(key, _)| key.clone()).collect();
            for key in keys {
                if let Some(value) = self.get(&key)? {
                    self.put(&key, &value)?;
                }
            }
        }
        Ok(())
    }

    /// Removes segments of which nothing counts. The newest stays: it says what was deleted.
    fn remove_empty_segments(&mut self) {
        let newest = self.sizes.keys().filter(|number| **number != self.filling.number).max();
        let Some(newest) = newest.copied() else { return };
        let empty: Vec<u64> = self
            .sizes
            .iter()
            .filter(|(number, size)| **number < newest && size.live == 0)
            .map(|(number, _)| *number)
            .collect();
        for number in empty {
            match self.objects.delete(self.path(number)) {
                Ok(()) => {
                    self.sizes.remove(&number);
                }
                // It is tried again with the next flush.
                Err(error) => tracing::warn!(number, %error, "remove an empty segment"),
            }
        }
        let oldest = self.sizes.keys().next().copied().unwrap_or(0);
        self.deleted.retain(|_, newest| oldest <= *newest);
    }
}

/// The values of a segment, shared with its upload.
struct SharedValues(Arc<Vec<u8>>);

impl AsRef<[u8]> for SharedValues {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn fenced() -> StorageError {
    StorageError::store("write a segment", "another run writes to the same place")
}

fn release(sizes: &mut BTreeMap<u64, Size>, place: Place) {
    if let Some(size) = sizes.get_mut(&place.segment) {
        size.live = size.live.saturating_sub(place.len);
    }
}

impl Generation for ObjectGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.append(key, value);
        if SEGMENT_BYTES <= self.filling.values.len() { self.cut() } else { Ok(()) }
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.index.get(key) else { return Ok(None) };
        let waiting = self.uploads.iter().map(|(segment, _)| segment).chain(&self.lost);
        let held = [&self.filling].into_iter().chain(waiting);
        if let Some(segment) = held.into_iter().find(|held| held.number == place.segment) {
            let range = place.offset as usize..(place.offset + place.len) as usize;
            return Ok(segment.values.get(range).map(<[u8]>::to_vec));
        }
        if place.len == 0 {
            return Ok(Some(Vec::new()));
        }
        self.objects.read(self.path(place.segment), place.offset, place.len).map(Some)
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        if let Some(place) = self.index.remove(key) {
            release(&mut self.sizes, place);
            self.deleted.insert(key.to_vec(), place.segment);
            self.has_deleted = true;
        }
        Ok(())
    }

    fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
        let from = self.index.range(prefix.to_vec()..);
        Ok(from.map(|(key, _)| key.clone()).take_while(|key| key.starts_with(prefix)).collect())
    }

    fn flush(&mut self) -> Result<()> {
        if self.is_fenced {
            return Err(fenced());
        }
        self.retry_lost();
        self.empty_segments()?;
        if !self.filling.entries.is_empty() || self.has_deleted {
            self.cut()?;
        }
        let mut first_error = None;
        while !self.uploads.is_empty() {
            if let Err(error) = self.settle_oldest() {
                first_error.get_or_insert(error);
            }
        }
        if let Some(error) = first_error {
            return Err(error);
        }
        self.remove_empty_segments();
        Ok(())
    }

    fn end(&self) -> u64 {
        self.filling.number - 1
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use proptest::prelude::*;

    use std::fs;

    use super::*;

    fn over(store: &Arc<dyn ObjectStore>) -> ObjectStorage {
        ObjectStorage::over(store.clone(), ObjectPath::from("jobs/words"), "memory").expect("made")
    }

    fn bytes_in(store: &Arc<dyn ObjectStore>) -> u64 {
        let listed = over(store).objects.list(ObjectPath::default());
        listed.expect("listed").iter().map(|object| object.size).sum()
    }

    #[test]
    fn values_are_there_after_a_flush_and_for_whoever_opens_it_next() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let mut storage = over(&store);
        let mut generation = storage.open(3, 0).expect("opened");
        generation.put(b"a", b"one").expect("put");
        generation.put(b"b", &[7; 20 << 20]).expect("put");
        assert_eq!(generation.get(b"a").expect("readable").as_deref(), Some(&b"one"[..]));
        generation.flush().expect("flush");
        generation.put(b"a", b"two").expect("put");
        generation.delete(b"b").expect("delete");
        generation.put(b"c", b"").expect("put");
        generation.flush().expect("flush");
        generation.put(b"d", b"never flushed").expect("put");
        drop(generation);
        let mut again = over(&store);
        assert_eq!(again.generations().expect("listed"), [3]);
        let generation = again.open(3, 0).expect("opened");
        assert_eq!(generation.keys(b"").expect("listed"), [b"a", b"c"]);
        assert_eq!(generation.get(b"a").expect("readable").as_deref(), Some(&b"two"[..]));
        assert_eq!(generation.get(b"c").expect("readable").as_deref(), Some(&b""[..]));
        assert!(bytes_in(&store) < 1_000, "the space of what was deleted is given back");
        drop(generation);
        again.remove(3).expect("removed");
        assert_eq!((again.generations().expect("listed"), bytes_in(&store)), (Vec::new(), 0));
    }

    #[test]
    fn second_run_at_the_same_place_fails_and_harms_nothing() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let (mut first, mut second) = (over(&store), over(&store));
        let mut one = first.open(1, 0).expect("opened");
        let mut two = second.open(1, 0).expect("opened");
        one.put(b"k", b"first").expect("put");
        one.flush().expect("flush");
        two.put(b"k", b"second").expect("put");
        let error = two.flush().expect_err("somebody else was here").to_string();
        assert!(error.contains("another run writes to the same place"), "{error}");
        two.put(b"k", b"again").expect("collected");
        assert!(two.flush().is_err(), "it stays so");
        let generation = over(&store).open(1, 0).expect("opened");
        assert_eq!(generation.get(b"k").expect("readable").as_deref(), Some(&b"first"[..]));
    }

    #[test]
    fn removal_that_was_cut_short_is_finished_and_nothing_of_it_counts() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let mut storage = over(&store);
        for number in [1, 2] {
            let mut generation = storage.open(number, 0).expect("opened");
            generation.put(b"k", b"v").expect("put");
            generation.flush().expect("flush");
        }
        storage.objects.put(storage.folder(1).join(REMOVED)).expect("marked");
        assert_eq!(over(&store).generations().expect("listed"), [2]);
        let left = storage.objects.list(storage.folder(1)).expect("listed");
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn damaged_index_is_found_and_named() {
        let dir = tempfile::tempdir().expect("dir");
        let mut storage = ObjectStorage::new(&dir.path().display().to_string()).expect("made");
        let mut generation = storage.open(1, 0).expect("opened");
        generation.put(b"key", &[1; 100]).expect("put");
        generation.flush().expect("flush");
        drop(generation);
        let path = dir.path().join("gen-00000001/segment-00000001");
        let whole = fs::read(&path).expect("there");
        for (cut, why) in [(whole.len() - 3, "does not end"), (10, "cut short")] {
            fs::write(&path, &whole[..cut]).expect("written");
            let error = storage.open(1, 0).err().expect("damaged").to_string();
            assert!(error.contains(why) && error.contains("segment-00000001"), "{error}");
        }
        for place in 100..whole.len() {
            let mut flipped = whole.clone();
            flipped[place] ^= 16;
            fs::write(&path, &flipped).expect("written");
            assert!(storage.open(1, 0).is_err(), "byte {place}");
        }
    }

    #[test]
    fn unknown_places_are_refused() {
        let error = ObjectStorage::new("gopher://host/words").err().expect("unknown").to_string();
        assert!(error.contains("gopher:// is not known, file:// and s3:// are"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Against a map: whatever is put, deleted, flushed and opened again.
        #[test]
        fn generation_is_a_map(steps in proptest::collection::vec((0u8..5, 0u8..12, 0usize..60_000), 1..80)) {
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let mut storage = over(&store);
            let mut generation = storage.open(1, 0).expect("opened");
            let mut expected = BTreeMap::<Vec<u8>, Vec<u8>>::new();
            // What was put since the last flush lies in the newest segment, deleted since or not.
            let mut newest = 0;
            for (what, key, len) in steps {
                match what {
                    0..=1 => {
                        let value = vec![key ^ len as u8; len];
                        generation.put(&[key], &value).expect("put");
                        newest += len as u64;
                        expected.insert(vec![key], value);
                    }
                    2 => {
                        generation.delete(&[key]).expect("delete");
                        expected.remove(&[key][..]);
                    }
                    3 => {
                        generation.flush().expect("flush");
                        newest = 0;
                    }
                    _ => {
                        generation.flush().expect("flush");
                        newest = 0;
                        generation = storage.open(1, 0).expect("opened");
                    }
                }
                let keys: Vec<Vec<u8>> = expected.keys().cloned().collect();
                prop_assert_eq!(generation.keys(b"").expect("listed"), keys);
            }
            generation.flush().expect("flush");
            for (key, value) in &expected {
                let found = generation.get(key).expect("readable");
                prop_assert_eq!(found.as_ref(), Some(value));
            }
            let live: u64 = expected.values().map(|value| value.len() as u64).sum();
            let stored = bytes_in(&store);
            prop_assert!(stored <= 2 * live + newest + 40_000, "{stored} bytes for {live}");
        }
    }
}
