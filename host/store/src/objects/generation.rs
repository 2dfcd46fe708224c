//! A generation of segments.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, mpsc},
};

use object_store::{ObjectMeta, ObjectStore, PutMode, PutPayload, path::Path as ObjectPath};
use twox_hash::XxHash3_64;

use super::{
    client::{Objects, failed, number_of},
    segment::{Index, MAGIC, Segment, SharedValues, Size, TAIL_BYTES, ValueLocation, release},
};
use crate::{
    Generation, Result, StorageError,
    key::SEGMENT,
    metadata::{FORMAT, is_readable},
};

/// A segment is written when it has this many bytes, or at a flush.
pub(crate) const SEGMENT_BYTES: usize = 8 << 20;

/// Segments that may be on their way at once.
pub(crate) const UPLOADS_MAX: usize = 4;

pub(crate) struct ObjectGeneration {
    objects: Objects,
    folder: ObjectPath,
    index: BTreeMap<Vec<u8>, ValueLocation>,
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
    pub(crate) fn open(objects: Objects, folder: ObjectPath) -> Result<Self> {
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
                generation.insert(key, ValueLocation { segment: *segment, offset, len });
            }
            generation.deleted = deleted.into_iter().collect();
        }
        for key in generation.deleted.keys() {
            if let Some(location) = generation.index.remove(key) {
                release(&mut generation.sizes, location);
            }
        }
        generation.fill(segments.last().map_or(1, |(last, _)| last + 1));
        Ok(generation)
    }

    /// Refuses a generation whose newest segments are missing.
    pub(crate) fn check_end(&self, end: u64) -> Result<()> {
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

    /// The newest location of a key counts.
    fn insert(&mut self, key: Vec<u8>, location: ValueLocation) {
        self.sizes.entry(location.segment).or_default().live += location.len;
        if let Some(old) = self.index.insert(key, location) {
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
            self.finish_oldest_upload()?;
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
    fn finish_oldest_upload(&mut self) -> Result<()> {
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
                let location = ValueLocation { segment: segment.number, offset, len };
                if self.index.get(&key) == Some(&location) {
                    self.append(&key, &segment.values[offset as usize..(offset + len) as usize]);
                }
            }
            // It may be there, so it is removed like one of which nothing counts.
        }
    }

    fn append(&mut self, key: &[u8], value: &[u8]) {
        let offset = self.filling.values.len() as u64;
        let location =
            ValueLocation { segment: self.filling.number, offset, len: value.len() as u64 };
        Arc::make_mut(&mut self.filling.values).extend_from_slice(value);
        self.filling.entries.push((key.to_vec(), location.offset, location.len));
        self.deleted.remove(key);
        self.insert(key.to_vec(), location);
    }

    /// Empties segments of which less than half counts into the one that is being filled.
    fn empty_segments(&mut self) -> Result<()> {
        let is_sparse = |(number, size): (&u64, &Size)| {
            let is_written = *number != self.filling.number;
            (is_written && 0 < size.live && size.live < size.bytes / 2).then_some(*number)
        };
        let sparse: Vec<u64> = self.sizes.iter().filter_map(is_sparse).collect();
        for number in sparse {
            let is_in = |(_, location): &(&Vec<u8>, &ValueLocation)| location.segment == number;
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

pub(crate) fn fenced() -> StorageError {
    StorageError::store("write a segment", "another run writes to the same place")
}

impl Generation for ObjectGeneration {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.append(key, value);
        if SEGMENT_BYTES <= self.filling.values.len() { self.cut() } else { Ok(()) }
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(location) = self.index.get(key) else { return Ok(None) };
        let waiting = self.uploads.iter().map(|(segment, _)| segment).chain(&self.lost);
        let held = [&self.filling].into_iter().chain(waiting);
        if let Some(segment) = held.into_iter().find(|held| held.number == location.segment) {
            let range = location.offset as usize..(location.offset + location.len) as usize;
            return Ok(segment.values.get(range).map(<[u8]>::to_vec));
        }
        if location.len == 0 {
            return Ok(Some(Vec::new()));
        }
        self.objects.read(self.path(location.segment), location.offset, location.len).map(Some)
    }

    fn delete(&mut self, key: &[u8]) -> Result<()> {
        if let Some(location) = self.index.remove(key) {
            release(&mut self.sizes, location);
            self.deleted.insert(key.to_vec(), location.segment);
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
            if let Err(error) = self.finish_oldest_upload() {
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
