//! Files that a guest was granted: directories to read, and one of its own to write, with a bound on what is in it.
//!
//! wasmtime-wasi keeps paths within their directories and files off the threads of guests. What is added here: pipes and
//! devices are not opened, a directory with very many entries is not listed, and the scratch directory has a size.
//!
//! **Invariant:** the counted size of a scratch directory is never below what lies in it. Sizes change only by what passes
//! here, a file that is open anywhere is neither removed nor replaced, and nothing there has two names.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
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

/// What each file and directory counts beside its bytes.
const ENTRY_BYTES: u64 = 4096;

/// A directory of more entries is not listed: the list is made at once.
const ENTRIES_MAX: usize = 100_000;

/// Where a guest finds its scratch directory.
pub(crate) const SCRATCH: &str = "/scratch";

/// The files of one instance.
pub(crate) struct Files {
    wasi: WasiFilesystemCtx,
    read: Vec<(String, File)>,
    scratch: Option<File>,
    usage: Arc<Usage>,
    /// What is open in the scratch directory, by its number in the file system.
    open: HashMap<u64, Weak<OpenFile>>,
    /// The same, by handle.
    handles: HashMap<u32, Arc<OpenFile>>,
}

impl Files {
    pub(crate) fn new(capabilities: &mut Capabilities, host: Arc<dyn Host>) -> Self {
        let (scratch, bytes_max) = match capabilities.scratch.take() {
            Some((dir, bytes_max)) => (Some(dir), bytes_max),
            None => (None, 0),
        };
        let used = Mutex::new(Used { bytes: 0, was_full: false });
        Self {
            wasi: WasiFilesystemCtx::default(),
            read: std::mem::take(&mut capabilities.read),
            scratch,
            usage: Arc::new(Usage { used, bytes_max, host }),
            open: HashMap::new(),
            handles: HashMap::new(),
        }
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

    fn give_back(&self, bytes: u64) {
        let mut used = self.lock();
        used.bytes = used.bytes.saturating_sub(bytes);
    }
}

/// A file of a scratch directory while something has it open.
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

impl View<'_> {
    fn wasi(&mut self) -> WasiFilesystemCtxView<'_> {
        WasiFilesystemCtxView { ctx: &mut self.files.wasi, table: self.table }
    }

    /// Only the scratch directory, and what is in it, may be written.
    fn is_scratch(&self, handle: &Handle) -> FsResult<bool> {
        let perms = match self.table.get(handle)? {
            Descriptor::File(file) => file.perms,
            Descriptor::Dir(dir) => dir.perms,
        };
        Ok(!perms.write_not_permitted())
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

    /// Something was opened in the scratch directory. `is_cut`: a file lost what it had by that.
    fn opened(&mut self, handle: &Handle, is_cut: bool, bytes_before: u64) -> FsResult<()> {
        let Descriptor::File(file) = self.table.get(handle)? else { return Ok(()) };
        let metadata = file.file.metadata()?;
        let known = self.files.open.get(&metadata.ino()).and_then(Weak::upgrade);
        let file = known.unwrap_or_else(|| {
            let bytes = AtomicU64::new(bytes_before);
            Arc::new(OpenFile { usage: self.files.usage.clone(), bytes })
        });
        if is_cut {
            file.was_cut_to(0);
        }
        self.files.open.retain(|_, known| 0 < known.strong_count());
        self.files.open.insert(metadata.ino(), Arc::downgrade(&file));
        self.files.handles.insert(handle.rep(), file);
        Ok(())
    }

    /// What is at a path, if it may go: its bytes.
    async fn removable(&mut self, dir: &Handle, path: &str) -> FsResult<u64> {
        let flags = PathFlags::empty();
        let stat = self.wasi().stat_at(again(dir), flags, path.to_owned()).await?;
        if stat.type_ != DescriptorType::RegularFile {
            return Ok(0);
        }
        // Its number is not in what WASI says of a file.
        let (none, read) = (OpenFlags::empty(), DescriptorFlags::READ);
        let opened = self.wasi().open_at(again(dir), flags, path.to_owned(), none, read).await?;
        let number = match self.table.get(&opened)? {
            Descriptor::File(file) => file.file.metadata()?.ino(),
            Descriptor::Dir(_) => 0,
        };
        self.table.delete(opened)?;
        match self.files.open.get(&number) {
            Some(open) if 0 < open.strong_count() => Err(ErrorCode::Busy.into()),
            _ => Ok(stat.size),
        }
    }
}

impl preopens::Host for View<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Handle, String)>> {
        let mut directories = Vec::new();
        let Files { read, scratch, .. } = &*self.files;
        for (name, dir) in read {
            let dir = Dir::new(dir.try_clone()?, FsPerms::ReadOnly, OpenMode::READ, false);
            directories.push((self.table.push(Descriptor::Dir(dir))?, name.clone()));
        }
        if let Some(dir) = scratch {
            let mode = OpenMode::READ | OpenMode::WRITE;
            let dir = Dir::new(dir.try_clone()?, FsPerms::ReadWrite, mode, false);
            directories.push((self.table.push(Descriptor::Dir(dir))?, SCRATCH.to_owned()));
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
            async fn $name(&mut self, $($argument: $type),*) -> $answer {
                HostDescriptor::$name(&mut self.wasi(), $($argument),*).await
            }
        )*
    };
}

impl HostDescriptor for View<'_> {
    as_it_is! {
        fn advise(fd: Handle, offset: u64, len: u64, advice: types::Advice) -> FsResult<()>;
        fn sync_data(fd: Handle) -> FsResult<()>;
        fn get_flags(fd: Handle) -> FsResult<DescriptorFlags>;
        fn get_type(fd: Handle) -> FsResult<DescriptorType>;
        fn set_times(fd: Handle, accessed: NewTimestamp, modified: NewTimestamp) -> FsResult<()>;
        fn read(fd: Handle, len: u64, offset: u64) -> FsResult<(Vec<u8>, bool)>;
        fn sync(fd: Handle) -> FsResult<()>;
        fn stat(fd: Handle) -> FsResult<DescriptorStat>;
        fn stat_at(fd: Handle, flags: PathFlags, path: String) -> FsResult<DescriptorStat>;
        fn set_times_at(
            fd: Handle, flags: PathFlags, path: String, accessed: NewTimestamp, modified: NewTimestamp
        ) -> FsResult<()>;
        fn readlink_at(fd: Handle, path: String) -> FsResult<String>;
        fn is_same_object(left: Handle, right: Handle) -> wasmtime::Result<bool>;
        fn metadata_hash(fd: Handle) -> FsResult<MetadataHashValue>;
        fn metadata_hash_at(
            fd: Handle, flags: PathFlags, path: String
        ) -> FsResult<MetadataHashValue>;
    }

    async fn set_size(&mut self, fd: Handle, bytes: u64) -> FsResult<()> {
        let file = self.writable(&fd)?.clone();
        file.grow_to(bytes)?;
        self.wasi().set_size(fd, bytes).await?;
        file.was_cut_to(bytes);
        Ok(())
    }

    async fn write(&mut self, fd: Handle, bytes: Vec<u8>, offset: u64) -> FsResult<u64> {
        self.writable(&fd)?.grow_to(offset.saturating_add(bytes.len() as u64))?;
        self.wasi().write(fd, bytes, offset).await
    }

    async fn read_directory(&mut self, fd: Handle) -> FsResult<Resource<DirectoryEntryStream>> {
        if let Descriptor::Dir(dir) = self.table.get(&fd)? {
            let entries = rustix::fs::Dir::read_from(&dir.dir).map_err(io::Error::from)?;
            if ENTRIES_MAX < entries.take(ENTRIES_MAX + 1).count() {
                return Err(ErrorCode::Overflow.into());
            }
        }
        self.wasi().read_directory(fd).await
    }

    async fn create_directory_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        let usage = self.files.usage.clone();
        if !self.is_scratch(&fd)? {
            return Err(ErrorCode::NotPermitted.into());
        }
        usage.take(ENTRY_BYTES)?;
        let made = self.wasi().create_directory_at(fd, path).await;
        made.inspect_err(|_| usage.give_back(ENTRY_BYTES))
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
        let before = self.wasi().stat_at(again(&fd), path_flags, path.clone()).await.ok();
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
        let opened = self.wasi().open_at(fd, path_flags, path, open_flags, flags).await;
        let opened = opened.inspect_err(|_| {
            if is_made {
                usage.give_back(ENTRY_BYTES);
            }
        })?;
        if is_scratch {
            let is_cut = open_flags.contains(OpenFlags::TRUNCATE);
            self.opened(&opened, is_cut, before.map_or(0, |stat| stat.size))?;
        }
        Ok(opened)
    }

    fn drop(&mut self, fd: Handle) -> wasmtime::Result<()> {
        self.files.handles.remove(&fd.rep());
        HostDescriptor::drop(&mut self.wasi(), fd)
    }

    async fn remove_directory_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        self.wasi().remove_directory_at(fd, path).await?;
        self.files.usage.give_back(ENTRY_BYTES);
        Ok(())
    }

    async fn rename_at(
        &mut self,
        from: Handle,
        old: String,
        to: Handle,
        new: String,
    ) -> FsResult<()> {
        if !self.is_scratch(&from)? || !self.is_scratch(&to)? {
            return Err(ErrorCode::NotPermitted.into());
        }
        let flags = PathFlags::empty();
        let replaced = self.wasi().metadata_hash_at(again(&to), flags, new.clone()).await.ok();
        let given_back = match replaced {
            None => 0,
            Some(replaced) => {
                let moved = self.wasi().metadata_hash_at(again(&from), flags, old.clone()).await?;
                // Onto itself: nothing happens.
                match (moved.lower, moved.upper) == (replaced.lower, replaced.upper) {
                    true => 0,
                    false => self.removable(&to, &new).await? + ENTRY_BYTES,
                }
            }
        };
        self.wasi().rename_at(from, old, to, new).await?;
        self.files.usage.give_back(given_back);
        Ok(())
    }

    async fn unlink_file_at(&mut self, fd: Handle, path: String) -> FsResult<()> {
        if !self.is_scratch(&fd)? {
            return Err(ErrorCode::NotPermitted.into());
        }
        let bytes = self.removable(&fd, &path).await?;
        self.wasi().unlink_file_at(fd, path).await?;
        self.files.usage.give_back(bytes + ENTRY_BYTES);
        Ok(())
    }

    fn read_via_stream(&mut self, fd: Handle, offset: u64) -> FsResult<Resource<DynInputStream>> {
        let file = self.files.handles.get(&fd.rep()).cloned();
        let stream = HostDescriptor::read_via_stream(&mut self.wasi(), fd, offset)?;
        let Some(file) = file else { return Ok(stream) };
        let inner = self.table.delete(stream)?;
        let held: DynInputStream = Box::new(Reading { inner, _file: file });
        Ok(self.table.push(held)?)
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
        let stream: DynOutputStream = Box::new(Writing { open, file: file.file.clone(), place });
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
        HostDirectoryEntryStream::drop(&mut self.wasi(), stream)
    }
}

/// Reads a file of the scratch directory, which stays open meanwhile.
struct Reading {
    inner: DynInputStream,
    _file: Arc<OpenFile>,
}

#[async_trait]
impl Pollable for Reading {
    async fn ready(&mut self) {
        self.inner.ready().await;
    }
}

#[async_trait]
impl InputStream for Reading {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        self.inner.read(size)
    }

    async fn cancel(&mut self) {
        self.inner.cancel().await;
    }
}

/// Writes a file of the scratch directory. What a call writes is written when it returns, so what is counted is never
/// behind.
struct Writing {
    open: Arc<OpenFile>,
    file: Arc<File>,
    /// Where the next byte goes; `None`: to the end.
    place: Option<u64>,
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
