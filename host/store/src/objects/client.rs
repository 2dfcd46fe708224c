//! Requests to an object store, on threads of their own.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, mpsc},
};

use futures::TryStreamExt;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, path::Path as ObjectPath};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::{Result, StorageError};

/// The number in the name of a generation or a segment.
pub(crate) fn number_of(path: &ObjectPath, prefix: &str) -> Option<u64> {
    path.filename()?.strip_prefix(prefix)?.parse().ok()
}

/// The way to the objects from a thread that may block.
#[derive(Clone)]
pub(crate) struct Objects {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) root: ObjectPath,
    pub(super) runtime: Handle,
}

/// The threads for all requests of the process: one job more takes none.
pub(super) fn threads() -> io::Result<Handle> {
    static THREADS: Mutex<Option<Runtime>> = Mutex::new(None);
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = &*threads {
        return Ok(runtime.handle().clone());
    }
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).thread_name("cofferdam-objects").enable_all();
    Ok(threads.insert(builder.build()?).handle().clone())
}

pub(crate) fn failed(doing: &'static str) -> impl Fn(object_store::Error) -> StorageError {
    move |error| match error {
        object_store::Error::NotFound { path, .. } => {
            StorageError::damaged(path, "it is not there")
        }
        error => StorageError::Unreachable { doing, cause: error.into() },
    }
}

impl Objects {
    pub(crate) fn start<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            // The caller may have gone.
            let _ = sender.send(future.await);
        });
        receiver
    }

    pub(crate) fn wait<T: Send + 'static>(
        &self,
        doing: &'static str,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T> {
        let answer = self.start(future).recv();
        answer.map_err(|error| StorageError::store(doing, error))?.map_err(failed(doing))
    }

    pub(crate) fn list(&self, folder: ObjectPath) -> Result<Vec<ObjectMeta>> {
        let store = self.store.clone();
        let list = async move { store.list(Some(&folder)).try_collect::<Vec<_>>().await };
        self.wait("list objects", list)
    }

    pub(crate) fn read(&self, path: ObjectPath, from: u64, len: u64) -> Result<Vec<u8>> {
        let store = self.store.clone();
        let read = async move { store.get_range(&path, from..from + len).await };
        Ok(self.wait("read an object", read)?.to_vec())
    }

    pub(crate) fn put(&self, path: ObjectPath) -> Result<()> {
        let store = self.store.clone();
        let put = async move { store.put(&path, PutPayload::new()).await.map(|_| ()) };
        self.wait("write an object", put)
    }

    pub(crate) fn delete(&self, path: ObjectPath) -> Result<()> {
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
