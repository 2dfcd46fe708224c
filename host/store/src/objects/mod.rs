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

mod client;
mod generation;
mod segment;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_files::{FOR_ALL, make_dir, sync_dir};
use object_store::{
    ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, aws::AmazonS3Builder,
    local::LocalFileSystem, path::Path as ObjectPath,
};

use self::{
    client::{Objects, number_of, threads},
    generation::ObjectGeneration,
};
use crate::{Generation, Result, Storage, StorageError, key::GENERATION, storage::Cause};

/// In a generation that is being removed: whatever else is left of it does not count.
const REMOVED: &str = "removed";
/// A place in a file system or an object store with a folder for each generation.
pub struct ObjectStorage {
    objects: Objects,
    /// The directory, where they lie in one.
    dir: Option<PathBuf>,
    location: String,
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
        let wrong = |cause: Cause| StorageError::at("open the checkpoints", location, cause);
        type Opened = (Arc<dyn ObjectStore>, ObjectPath, Option<PathBuf>);
        let (store, root, dir): Opened = match location.split_once("://") {
            None | Some(("file", _)) => {
                let dir = Path::new(location.strip_prefix("file://").unwrap_or(location));
                make_dir(dir, FOR_ALL)
                    .map_err(|error| StorageError::at("open the checkpoints", location, error))?;
                let store =
                    LocalFileSystem::new_with_prefix(dir).map_err(|error| wrong(error.into()))?;
                let store = store.with_fsync(true).with_automatic_cleanup(true);
                (Arc::new(store), ObjectPath::default(), Some(dir.to_owned()))
            }
            Some(("s3" | "s3a", rest)) => {
                let store = AmazonS3Builder::from_env().with_url(location).build();
                let store = store.map_err(|error| wrong(error.into()))?;
                let folder = rest.split_once('/').map_or("", |(_, folder)| folder);
                let root = ObjectPath::parse(folder).map_err(|error| wrong(error.into()))?;
                (Arc::new(store), root, None)
            }
            Some((scheme, _)) => {
                return Err(wrong(
                    format!("{scheme}:// is not known, file:// and s3:// are").into(),
                ));
            }
        };
        Self::over(store, root, dir, location)
    }

    fn over(
        store: Arc<dyn ObjectStore>,
        root: ObjectPath,
        dir: Option<PathBuf>,
        location: &str,
    ) -> Result<Self> {
        let runtime = threads()
            .map_err(|error| StorageError::store("start the threads of an object store", error))?;
        let objects = Objects { store, root, runtime };
        Ok(Self { objects, dir, location: location.to_owned() })
    }

    /// Removes what there is of a generation that is marked as removed, and last the mark: a power cut that brings
    /// something of it back brings the mark back, too.
    fn remove_objects(&self, number: u64, objects: Vec<ObjectMeta>) -> Result<()> {
        let mark = self.folder(number).join(REMOVED);
        let others = objects.into_iter().map(|object| object.location);
        others.filter(|path| *path != mark).try_for_each(|path| self.objects.delete(path))?;
        if let Some(dir) = &self.dir {
            // The library syncs what it writes, not what it deletes.
            match sync_dir(&dir.join(self.folder(number).as_ref())) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::store("remove a generation", error));
                }
                _ => {}
            }
        }
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
