//! Files that a guest was granted: directories to read, and one of its own to write, with a bound on what is in it.
//!
//! wasmtime-wasi keeps paths within their directories. What is added here: pipes and devices are not opened, listings are
//! bounded, the scratch directory has a size, and all work is done on the guest's own thread, so that it counts as the
//! guest's. A thread that waits for the disk meanwhile lets another one run ([`Host::wait_for_disk`]).
//!
//! **Invariant:** the counted size of a scratch directory is never below what lies in it. Sizes change only by what passes
//! here; what is open is neither removed nor replaced; nothing there has two names; and a directory that has grown by its
//! entries counts with what it has grown by.

use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Component, Path},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::{
    FsPerms, OpenMode, async_trait,
    filesystem::{Descriptor, Dir, WasiFilesystemCtx, WasiFilesystemCtxView},
    p2::{
        DynInputStream, DynOutputStream, FsError, FsResult, InputStream, OutputStream, Pollable,
        StreamError, StreamResult,
        bindings::filesystem::{
            preopens,
            types::{
                self, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry,
                DirectoryEntryStream, ErrorCode, HostDescriptor, HostDirectoryEntryStream,
                MetadataHashValue, NewTimestamp, OpenFlags, PathFlags,
            },
        },
    },
};

use crate::{Capabilities, Host, Level};

/// What each file and directory counts beside its bytes: file systems have one for so many bytes by default.
const ENTRY_BYTES: u64 = 16 << 10;

/// What a directory has without entries.
const DIRECTORY_BYTES: u64 = 4096;

/// How deep directories may lie in a scratch directory: what removes it goes down as deep.
const DEPTH_MAX: usize = 32;

/// A directory of more entries is not listed: the list is made at once.
const ENTRIES_MAX: usize = 10_000;

/// How many listings a guest may hold at a time.
const LISTINGS_MAX: usize = 8;

/// Where a guest finds its scratch directory.
pub const SCRATCH: &str = "/scratch";

/// The files of one instance.
pub(crate) struct Files {
    read: Vec<(String, File)>,
    scratch: Option<File>,
    usage: Arc<Usage>,
    /// What is open in the scratch directory, by its number in the file system.
    open: HashMap<u64, Weak<OpenFile>>,
    /// The same, by handle.
    handles: HashMap<u32, Arc<OpenFile>>,
    /// How deep the directories of handles lie.
    depths: HashMap<u32, usize>,
    /// What each directory has grown by, by its number.
    grown: HashMap<u64, u64>,
    /// Listings and streams with a place in their file, each of which holds one: no snapshot has their places.
    places: Arc<()>,
    listings: usize,
}

impl Files {
    pub(crate) fn new(capabilities: &mut Capabilities, host: Arc<dyn Host>) -> Self {
        let (scratch, bytes_max) = match capabilities.scratch.take() {
            Some((dir, bytes_max)) => (Some(dir), bytes_max),
            None => (None, 0),
        };
        let used = Mutex::new(Used { bytes: 0, was_full: false });
        Self {
            read: std::mem::take(&mut capabilities.read),
            scratch,
            usage: Arc::new(Usage { used, bytes_max, host }),
            open: HashMap::new(),
            handles: HashMap::new(),
            depths: HashMap::new(),
            grown: HashMap::new(),
            places: Arc::default(),
            listings: 0,
        }
    }

    /// Whether the guest holds something that knows a place in a file or in a list, which a fresh instance would not.
    pub(crate) fn has_places(&self) -> bool {
        1 < Arc::strong_count(&self.places) || 0 < self.listings
    }
}

/// How much of a scratch directory is used.
struct Usage {
    used: Mutex<Used>,
    bytes_max: u64,
    host: Arc<dyn Host>,
}

struct Used {
    bytes: u64,
    /// Whether it was reported that nothing more fits.
    was_full: bool,
}

impl Usage {
    fn lock(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: u64) -> Result<(), ErrorCode> {
        let mut used = self.lock();
        match used.bytes.checked_add(bytes).filter(|sum| *sum <= self.bytes_max) {
            Some(sum) => {
                used.bytes = sum;
                Ok(())
            }
            None => {
                if !std::mem::replace(&mut used.was_full, true) {
                    let bytes_max = self.bytes_max;
                    let message = format!(
                        "{SCRATCH} is full: `grants.scratch` is {bytes_max} bytes, and each entry counts {ENTRY_BYTES} more"
                    );
                    self.host.log(Level::Warn, &message);
                }
                Err(ErrorCode::InsufficientSpace)
            }
        }
    }

    /// So many bytes are there, whether they may be or not.
    fn has_grown(&self, bytes: u64) {
        let mut used = self.lock();
        used.bytes = used.bytes.saturating_add(bytes);
    }

    fn give_back(&self, bytes: u64) {
        let mut used = self.lock();
        used.bytes = used.bytes.saturating_sub(bytes);
    }
}

/// A file or a directory of a scratch directory while something has it open.
struct OpenFile {
    usage: Arc<Usage>,
    bytes: AtomicU64,
}

impl OpenFile {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// It is to have at least so many bytes.
    fn grow_to(&self, end: u64) -> Result<(), ErrorCode> {
        let more = end.saturating_sub(self.bytes());
        self.usage.take(more)?;
        self.bytes.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    /// It has so many bytes, and no more.
    fn was_cut_to(&self, end: u64) {
        let less = self.bytes().saturating_sub(end);
        self.usage.give_back(less);
        self.bytes.fetch_sub(less, Ordering::Relaxed);
    }
}

/// The files of an instance during a call.
pub(crate) struct View<'a> {
    /// Does every operation on the thread that calls it.
    pub(crate) wasi: &'a mut WasiFilesystemCtx,
    pub(crate) files: &'a mut Files,
    pub(crate) table: &'a mut ResourceTable,
}

/// The type by which wasmtime finds them.
pub(crate) struct HasFiles;

impl HasData for HasFiles {
    type Data<'a> = View<'a>;
}

type Handle = Resource<Descriptor>;

fn again(handle: &Handle) -> Handle {
    Resource::new_borrow(handle.rep())
}

/// How many steps down a path may lead.
fn steps(path: &str) -> usize {
    Path::new(path).components().filter(|it| matches!(it, Component::Normal(_))).count()
}

/// The directory that a path's last name is in, seen from where the path begins.
fn parent(path: &str) -> String {
    let path = path.trim_end_matches('/');
    path.rsplit_once('/').map_or(".", |(parent, _)| parent).to_owned()
}

/// Does an operation of wasmtime-wasi, which waits for nothing but the disk.
fn done<T>(host: &Arc<dyn Host>, operation: impl Future<Output = T>) -> wasmtime::Result<T> {
    let mut operation = Some(operation);
    let mut result = None;
    host.wait_for_disk(&mut || {
        result = operation.take().and_then(FutureExt::now_or_never);
    });
    result.ok_or_else(|| wasmtime::Error::msg("an operation on a file waits for another thread"))
}

/// The same within a function that gives errors of files.
macro_rules! disk {
    ($view:expr, $method:ident ( $($argument:expr),* )) => {{
        let host = $view.files.usage.host.clone();
        done(&host, HostDescriptor::$method(&mut $view.wasi(), $($argument),*))
            .map_err(FsError::trap)?
    }};
}

impl View<'_> {
    fn wasi(&mut self) -> WasiFilesystemCtxView<'_> {
        WasiFilesystemCtxView { ctx: self.wasi, table: self.table }
    }

    /// Only the scratch directory, and what is in it, may be written.
    fn is_scratch(&self, handle: &Handle) -> FsResult<bool> {
        let perms = match self.table.get(handle)? {
            Descriptor::File(file) => file.perms,
            Descriptor::Dir(dir) => dir.perms,
        };
        Ok(!perms.write_not_permitted())
    }

    fn check_scratch(&self, handle: &Handle) -> FsResult<()> {
        match self.is_scratch(handle)? {
            true => Ok(()),
            false => Err(ErrorCode::NotPermitted.into()),
        }
    }

    /// The file that a handle is of, if it may be written.
    fn writable(&self, handle: &Handle) -> FsResult<&Arc<OpenFile>> {
        match self.table.get(handle)? {
            Descriptor::Dir(_) => Err(ErrorCode::BadDescriptor.into()),
            Descriptor::File(file) if !file.open_mode.contains(OpenMode::WRITE) => {
                Err(ErrorCode::BadDescriptor.into())
            }
            Descriptor::File(_) => {
                let known = self.files.handles.get(&handle.rep());
                known.ok_or_else(|| ErrorCode::NotPermitted.into())
            }
        }
    }

    /// How deep a path may lead.
    fn depth(&self, dir: &Handle, path: &str) -> usize {
        self.files.depths.get(&dir.rep()).copied().unwrap_or(0) + steps(path)
    }

    /// How the file or the directory of a handle is.
    fn metadata(&self, handle: &Handle) -> FsResult<Metadata> {
        Ok(match self.table.get(handle)? {
            Descriptor::File(file) => file.file.metadata()?,
            Descriptor::Dir(dir) => dir.dir.metadata()?,
        })
    }

    /// Something was opened in the scratch directory. `is_cut`: a file lost what it had by that.
    fn opened(&mut self, handle: &Handle, is_cut: bool, bytes_before: u64) -> FsResult<()> {
        let number = self.metadata(handle)?.ino();
        let known = self.files.open.get(&number).and_then(Weak::upgrade);
        let file = known.unwrap_or_else(|| {
            let bytes = AtomicU64::new(bytes_before);
            Arc::new(OpenFile { usage: self.files.usage.clone(), bytes })
        });
        if is_cut {
            file.was_cut_to(0);
        }
        self.files.open.retain(|_, known| 0 < known.strong_count());
        self.files.open.insert(number, Arc::downgrade(&file));
        self.files.handles.insert(handle.rep(), file);
        Ok(())
    }

    /// What is at a path. Opened for a moment: the number of a file is not in what WASI says of it.
    fn look(&mut self, dir: &Handle, path: &str) -> FsResult<Metadata> {
        let (none, read) = (PathFlags::empty(), DescriptorFlags::READ);
        let opened =
            disk!(self, open_at(again(dir), none, path.to_owned(), OpenFlags::empty(), read))?;
        let metadata = self.metadata(&opened);
        self.table.delete(opened)?;
        metadata
    }

    /// Nothing may have what is removed or replaced open.
    fn check_closed(&self, removed: &Metadata) -> FsResult<()> {
        match self.files.open.get(&removed.ino()) {
            Some(open) if 0 < open.strong_count() => Err(ErrorCode::Busy.into()),
            _ => Ok(()),
        }
    }

    /// An entry came to a directory, or went: many file systems do not give back what a directory has grown by.
    fn count_directory(&mut self, dir: &Handle, path: &str) -> FsResult<()> {
        let directory = self.look(dir, &parent(path))?;
        let now = directory.len().saturating_sub(DIRECTORY_BYTES);
        let before = self.files.grown.insert(directory.ino(), now).unwrap_or(0);
        self.files.usage.has_grown(now.saturating_sub(before));
        self.files.usage.give_back(before.saturating_sub(now));
        Ok(())
    }
}

impl preopens::Host for View<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Handle, String)>> {
        let mut directories = Vec::new();
        let Files { read, scratch, .. } = &*self.files;
        for (name, dir) in read {
            let dir = Dir::new(dir.try_clone()?, FsPerms::ReadOnly, OpenMode::READ, true);
            directories.push((self.table.push(Descriptor::Dir(dir))?, name.clone()));
        }
        if let Some(dir) = scratch {
            let mode = OpenMode::READ | OpenMode::WRITE;
            let dir = Dir::new(dir.try_clone()?, FsPerms::ReadWrite, mode, true);
            let handle = self.table.push(Descriptor::Dir(dir))?;
            self.files.depths.insert(handle.rep(), 0);
            directories.push((handle, SCRATCH.to_owned()));
        }
        Ok(directories)
    }
}

impl types::Host for View<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        types::Host::convert_error_code(&mut self.wasi(), error)
    }

    fn filesystem_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<ErrorCode>> {
        types::Host::filesystem_error_code(&mut self.wasi(), error)
    }
}

/// What wasmtime-wasi does is right as it is.
macro_rules! as_it_is {
    ($( fn $name:ident($($argument:ident: $type:ty),*) -> $answer:ty; )*) => {
        $(
            async fn $name(&mut self, $($argument: $type),*) -> FsResult<$answer> {
                disk!(self, $name($($argument),*))
            }
        )*
    };
}

impl HostDescriptor for View<'_> {
    as_it_is! {
        fn advise(fd: Handle, offset: u64, len: u64, advice: types::Advice) -> ();
        fn sync_data(fd: Handle) -> ();
        fn get_flags(fd: Handle) -> DescriptorFlags;
        fn get_type(fd: Handle) -> DescriptorType;
        fn set_times(fd: Handle, accessed: NewTimestamp, modified: NewTimestamp) -> ();
        fn read(fd: Handle, len: u64, offset: u64) -> (Vec<u8>, bool);
        fn sync(fd: Handle) -> ();
        fn stat(fd: Handle) -> DescriptorStat;
        fn stat_at(fd: Handle, flags: PathFlags, path: String) -> DescriptorStat;
        fn set_times_at(
            fd: Handle, flags: PathFlags, path: String, accessed: NewTimestamp, modified: NewTimestamp
        ) -> ();
        fn readlink_at(fd: Handle, path: String) -> String;
        fn metadata_hash(fd: Handle) -> MetadataHashValue;
        fn metadata_hash_at(fd: Handle, flags: PathFlags, path: String) -> MetadataHashValue;
    }

    async fn is_same_object(&mut self, left: Handle, right: Handle) -> wasmtime::Result<bool> {
        let host = self.files.usage.host.clone();
        done(&host, HostDescriptor::is_same_object(&mut self.wasi(), left, right))?
    }

    async fn set_size(&mut self, fd: Handle, bytes: u64) -> FsResult<()> {
        let file = self.writable(&fd)?.clone();
        file.grow_to(bytes)?;
        disk!(self, set_size(fd, bytes))?;
        file.was_cut_to(bytes);
        Ok(())
    }

    async fn write(&mut self, fd: Handle, bytes: Vec<u8>, offset: u64) -> FsResult<u64> {
        self.writable(&fd)?.grow_to(offset.saturating_add(bytes.len() as u64))?;
        disk!(self, write(fd, bytes, offset))
    }

    async fn read_directory(&mut self, fd: Handle) -> FsResult<Resource<DirectoryEntryStream>> {
        if LISTINGS_MAX <= self.files.listings {
            return Err(ErrorCode::InsufficientMemory.into());
        }
        if let Descriptor::Dir(dir) = self.table.get(&fd)? {
            let mut count = Ok(0);
            self.files.usage.host.wait_for_disk(&mut || {
                let entries = rustix::fs::Dir::read_from(&dir.dir);
                count = entries.map(|entries| entries.take(ENTRIES_MAX + 1).count());
            });
            if ENTRIES_MAX < count.map_err(io::Error::from)? {
                return Err(ErrorCode::Overflow.into());
            }
        }
        let listing = disk!(self, read_directory(fd))?;
        self.files.listings += 1;
        Ok(listing)
    }

    async fn create_directory_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        self.check_scratch(&fd)?;
        if DEPTH_MAX < self.depth(&fd, &path) {
            return Err(ErrorCode::NameTooLong.into());
        }
        let usage = self.files.usage.clone();
        usage.take(ENTRY_BYTES)?;
        let made = disk!(self, create_directory_at(again(&fd), path.clone()));
        made.inspect_err(|_| usage.give_back(ENTRY_BYTES))?;
        self.count_directory(&fd, &path)
    }

    async fn link_at(
        &mut self,
        _: Handle,
        _: PathFlags,
        _: String,
        _: Handle,
        _: String,
    ) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn symlink_at(&mut self, _: Handle, _: String, _: String) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn open_at(
        &mut self,
        fd: Handle,
        path_flags: PathFlags,
        path: String,
        open_flags: OpenFlags,
        flags: DescriptorFlags,
    ) -> FsResult<Handle> {
        let is_scratch = self.is_scratch(&fd)?;
        let before = disk!(self, stat_at(again(&fd), path_flags, path.clone())).ok();
        let known =
            [DescriptorType::RegularFile, DescriptorType::Directory, DescriptorType::SymbolicLink];
        // Opening a pipe waits for its other end, and a device may do anything.
        if before.as_ref().is_some_and(|stat| !known.contains(&stat.type_)) {
            return Err(ErrorCode::NotPermitted.into());
        }
        let usage = self.files.usage.clone();
        let is_made = is_scratch && before.is_none() && open_flags.contains(OpenFlags::CREATE);
        if is_made {
            usage.take(ENTRY_BYTES)?;
        }
        let opened = disk!(self, open_at(again(&fd), path_flags, path.clone(), open_flags, flags));
        let opened = opened.inspect_err(|_| {
            if is_made {
                usage.give_back(ENTRY_BYTES);
            }
        })?;
        if is_scratch {
            let depth = self.depth(&fd, &path);
            self.files.depths.insert(opened.rep(), depth);
            let is_cut = open_flags.contains(OpenFlags::TRUNCATE);
            self.opened(&opened, is_cut, before.map_or(0, |stat| stat.size))?;
            if is_made {
                self.count_directory(&fd, &path)?;
            }
        }
        Ok(opened)
    }

    fn drop(&mut self, fd: Handle) -> wasmtime::Result<()> {
        self.files.handles.remove(&fd.rep());
        self.files.depths.remove(&fd.rep());
        HostDescriptor::drop(&mut self.wasi(), fd)
    }

    async fn remove_directory_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        self.check_scratch(&fd)?;
        let removed = self.look(&fd, &path)?;
        self.check_closed(&removed)?;
        disk!(self, remove_directory_at(again(&fd), path.clone()))?;
        let grown = self.files.grown.remove(&removed.ino()).unwrap_or(0);
        self.files.usage.give_back(ENTRY_BYTES + grown);
        self.count_directory(&fd, &path)
    }

    /// Files alone are moved: what lies below a directory would lie deeper.
    async fn rename_at(
        &mut self,
        from: Handle,
        old: String,
        to: Handle,
        new: String,
    ) -> FsResult<()> {
        self.check_scratch(&from)?;
        self.check_scratch(&to)?;
        let moved = self.look(&from, &old)?;
        if !moved.is_file() {
            return Err(ErrorCode::NotPermitted.into());
        }
        let mut given_back = 0;
        if disk!(self, stat_at(again(&to), PathFlags::empty(), new.clone())).is_ok() {
            let replaced = self.look(&to, &new)?;
            if replaced.ino() != moved.ino() {
                self.check_closed(&replaced)?;
                given_back = replaced.len() + ENTRY_BYTES;
            }
        }
        disk!(self, rename_at(again(&from), old.clone(), again(&to), new.clone()))?;
        self.files.usage.give_back(given_back);
        self.count_directory(&from, &old)?;
        self.count_directory(&to, &new)
    }

    async fn unlink_file_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        self.check_scratch(&fd)?;
        let removed = self.look(&fd, &path)?;
        self.check_closed(&removed)?;
        disk!(self, unlink_file_at(again(&fd), path.clone()))?;
        self.files.usage.give_back(removed.len() + ENTRY_BYTES);
        self.count_directory(&fd, &path)
    }

    fn read_via_stream(&mut self, fd: Handle, place: u64) -> FsResult<Resource<DynInputStream>> {
        let Descriptor::File(file) = self.table.get(&fd)? else {
            return Err(ErrorCode::IsDirectory.into());
        };
        let stream: DynInputStream = Box::new(Reading {
            file: file.file.clone(),
            place,
            host: self.files.usage.host.clone(),
            _open: self.files.handles.get(&fd.rep()).cloned(),
            _place: self.files.places.clone(),
        });
        Ok(self.table.push(stream)?)
    }

    fn write_via_stream(&mut self, fd: Handle, offset: u64) -> FsResult<Resource<DynOutputStream>> {
        self.writer(&fd, Some(offset))
    }

    fn append_via_stream(&mut self, fd: Handle) -> FsResult<Resource<DynOutputStream>> {
        self.writer(&fd, None)
    }
}

impl View<'_> {
    fn writer(&mut self, fd: &Handle, place: Option<u64>) -> FsResult<Resource<DynOutputStream>> {
        let open = self.writable(fd)?.clone();
        let Descriptor::File(file) = self.table.get(fd)? else {
            return Err(ErrorCode::BadDescriptor.into());
        };
        let stream: DynOutputStream = Box::new(Writing {
            open,
            file: file.file.clone(),
            place,
            _place: place.map(|_| self.files.places.clone()),
        });
        Ok(self.table.push(stream)?)
    }
}

impl HostDirectoryEntryStream for View<'_> {
    async fn read_directory_entry(
        &mut self,
        stream: Resource<DirectoryEntryStream>,
    ) -> FsResult<Option<DirectoryEntry>> {
        self.wasi().read_directory_entry(stream).await
    }

    fn drop(&mut self, stream: Resource<DirectoryEntryStream>) -> wasmtime::Result<()> {
        HostDirectoryEntryStream::drop(&mut self.wasi(), stream)?;
        self.files.listings -= 1;
        Ok(())
    }
}

/// Reads a file from a place on. One of the scratch directory stays open meanwhile.
struct Reading {
    file: Arc<File>,
    place: u64,
    host: Arc<dyn Host>,
    _open: Option<Arc<OpenFile>>,
    _place: Arc<()>,
}

/// What one read gives.
const READ_BYTES_MAX: usize = 64 << 10;

#[async_trait]
impl Pollable for Reading {
    async fn ready(&mut self) {}
}

impl InputStream for Reading {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        let mut bytes = BytesMut::zeroed(size.min(READ_BYTES_MAX));
        if bytes.is_empty() {
            return Ok(Bytes::new());
        }
        let mut read = Ok(0);
        self.host.wait_for_disk(&mut || read = self.file.read_at(&mut bytes, self.place));
        match read {
            Ok(0) => Err(StreamError::Closed),
            Ok(count) => {
                self.place += count as u64;
                bytes.truncate(count);
                Ok(bytes.freeze())
            }
            Err(error) => Err(StreamError::LastOperationFailed(error.into())),
        }
    }
}

/// Writes a file of the scratch directory. What a call writes is written when it returns, so what is counted is never
/// behind.
struct Writing {
    open: Arc<OpenFile>,
    file: Arc<File>,
    /// Where the next byte goes; `None`: to the end.
    place: Option<u64>,
    _place: Option<Arc<()>>,
}

/// What one write takes.
const WRITE_BYTES_MAX: usize = 1 << 20;

#[async_trait]
impl Pollable for Writing {
    async fn ready(&mut self) {}
}

impl OutputStream for Writing {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        let from = self.place.unwrap_or_else(|| self.open.bytes());
        let end = from.saturating_add(bytes.len() as u64);
        let failed = |error: io::Error| StreamError::LastOperationFailed(error.into());
        let full =
            |_| failed(io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()));
        self.open.grow_to(end).map_err(full)?;
        let mut written = Ok(());
        let mut write = || written = self.file.write_all_at(&bytes, from);
        self.open.usage.host.wait_for_disk(&mut write);
        written.map_err(failed)?;
        self.place = self.place.map(|_| end);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BYTES_MAX)
    }
}
