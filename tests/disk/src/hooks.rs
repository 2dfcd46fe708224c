//! The functions of the C library that a program calls for its files. Each does what the kernel's call of
//! that name does, unless the call has to fail, and records what has changed.
//!
//! Safety of all: arguments are passed to the kernel as the program gave them, which answers for them as it
//! would have to the C library.

use std::{
    ffi::{c_char, c_int, c_long, c_uint, c_void},
    slice,
};

use libc::{iovec, mode_t, off_t, size_t, ssize_t};

use crate::{
    state::{Open, State, Strike, state},
    trace,
};

fn fail(strike: &Strike) -> c_long {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = strike.errno };
    -1
}

/// A call on a descriptor: fails, or is done and noted.
fn on_fd(
    call: &str,
    fd: c_int,
    act: impl FnOnce() -> c_long,
    half: impl FnOnce() -> c_long,
    note: impl FnOnce(&State, &Open, c_long),
) -> c_long {
    let Some(mut state) = state() else { return act() };
    let Some(open) = state.open(fd).cloned() else {
        drop(state);
        return act();
    };
    if let Some(strike) = state.strike(call, &open.path, Some(fd)) {
        if strike.is_torn {
            half();
        }
        return fail(&strike);
    }
    if !state.is_recording() {
        drop(state);
        return act();
    }
    // Under the lock: the order of the trace is that of the calls.
    let result = act();
    if 0 <= result {
        note(&state, &open, result);
    }
    result
}

/// A call on a path.
fn on_path(
    call: &str,
    dir: c_int,
    path: *const c_char,
    act: impl FnOnce() -> c_long,
    note: impl FnOnce(&State, &[u8]),
) -> c_long {
    let Some(mut state) = state() else { return act() };
    let absolute = state.absolute(dir, path);
    if !state.is_ours(&absolute) {
        drop(state);
        return act();
    }
    if let Some(strike) = state.strike(call, &absolute, None) {
        return fail(&strike);
    }
    if !state.is_recording() {
        drop(state);
        return act();
    }
    let result = act();
    if 0 <= result {
        note(&state, &absolute);
    }
    result
}

fn no_note(_: &State, _: &Open, _: c_long) {}

/// Notes what was written where: at a place, or where the descriptor has stood.
fn note_written(state: &State, open: &Open, bytes: &[u8], fd: c_int, offset: Option<off_t>) {
    let offset = offset.unwrap_or_else(|| {
        // SAFETY: asks for the place of a descriptor.
        let end = unsafe { libc::syscall(libc::SYS_lseek, fd, 0, libc::SEEK_CUR) };
        end - bytes.len() as c_long
    });
    state.record(&trace::record(trace::WRITE, open.inode, offset as u64, bytes));
}

fn exists(dir: c_int, path: *const c_char) -> bool {
    // SAFETY: the path is the program's.
    0 == unsafe { libc::syscall(libc::SYS_faccessat, dir, path, libc::F_OK) }
}

fn open_at(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: see above.
    let act =
        || unsafe { libc::syscall(libc::SYS_openat, dir, path, flags | libc::O_LARGEFILE, mode) };
    let Some(mut state) = state() else { return act() as c_int };
    let absolute = state.absolute(dir, path);
    if !state.is_ours(&absolute) {
        let fd = act() as c_int;
        if 0 <= fd {
            state.closed(fd);
        }
        return fd;
    }
    if let Some(strike) = state.strike("open", &absolute, None) {
        return fail(&strike) as c_int;
    }
    let is_new = flags & libc::O_CREAT != 0 && !exists(dir, path);
    let fd = act() as c_int;
    if fd < 0 {
        return fd;
    }
    if let Some(open) = state.opened(fd).cloned() {
        if is_new {
            state.record(&trace::record(trace::CREATE, open.inode, 0, &open.path));
        } else if flags & libc::O_TRUNC != 0 {
            state.record(&trace::record(trace::TRUNCATE, open.inode, 0, &[]));
        }
    }
    fd
}

/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// # Safety
/// As `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    open_at(dir, path, flags, mode)
}

/// # Safety
/// As `openat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    open_at(dir, path, flags, mode)
}

/// # Safety
/// As `close(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if let Some(mut state) = state() {
        state.closed(fd);
    }
    // SAFETY: see above.
    unsafe { libc::syscall(libc::SYS_close, fd) as c_int }
}

/// As `closedir(3)`, which closes its descriptor without a call that is seen here: what was opened next with the
/// same number used to be taken for the directory.
///
/// # Safety
/// As `closedir(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closedir(dir: *mut libc::DIR) -> c_int {
    type CloseDir = unsafe extern "C" fn(*mut libc::DIR) -> c_int;
    // SAFETY: the directory is open until it is closed below.
    let fd = unsafe { libc::dirfd(dir) };
    if let Some(mut state) = state() {
        state.closed(fd);
    }
    // SAFETY: the name ends with a zero.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"closedir".as_ptr()) };
    assert!(!next.is_null(), "the C library has no closedir");
    // SAFETY: that is what the C library has under this name.
    let next: CloseDir = unsafe { std::mem::transmute(next) };
    // SAFETY: the directory is the caller's.
    unsafe { next(dir) }
}

fn fcntl_of(fd: c_int, command: c_int, argument: c_long) -> c_int {
    // SAFETY: see above.
    let result = unsafe { libc::syscall(libc::SYS_fcntl, fd, command, argument) as c_int };
    if 0 <= result
        && matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
        && let Some(mut state) = state()
    {
        state.duplicated(fd, result);
    }
    result
}

/// # Safety
/// As `fcntl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: c_long) -> c_int {
    fcntl_of(fd, command, argument)
}

/// # Safety
/// As `fcntl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, argument: c_long) -> c_int {
    fcntl_of(fd, command, argument)
}

/// # Safety
/// As `write(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: see above.
    let act = |count: size_t| unsafe { libc::syscall(libc::SYS_write, fd, buffer, count) };
    if (fd == 1 || fd == 2)
        && let Some(state) = state()
        && state.is_recording()
    {
        let result = act(count);
        if 0 < result {
            // SAFETY: so many bytes were read from there just now.
            let bytes = unsafe { slice::from_raw_parts(buffer.cast(), result as usize) };
            state.record(&trace::record(trace::SAID, fd as u64, 0, bytes));
        }
        return result as ssize_t;
    }
    on_fd(
        "write",
        fd,
        || act(count),
        || act(count / 2),
        |state, open, written| {
            // SAFETY: so many bytes were read from there just now.
            let bytes = unsafe { slice::from_raw_parts(buffer.cast(), written as usize) };
            note_written(state, open, bytes, fd, None);
        },
    ) as ssize_t
}

fn write_at(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: see above.
    let act =
        |count: size_t| unsafe { libc::syscall(libc::SYS_pwrite64, fd, buffer, count, offset) };
    on_fd(
        "pwrite",
        fd,
        || act(count),
        || act(count / 2),
        |state, open, written| {
            // SAFETY: so many bytes were read from there just now.
            let bytes = unsafe { slice::from_raw_parts(buffer.cast(), written as usize) };
            note_written(state, open, bytes, fd, Some(offset));
        },
    ) as ssize_t
}

/// # Safety
/// As `pwrite(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(
    fd: c_int,
    buffer: *const c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    write_at(fd, buffer, count, offset)
}

/// # Safety
/// As `pwrite(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: c_int,
    buffer: *const c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    write_at(fd, buffer, count, offset)
}

/// # Safety
/// As `writev(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, buffers: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: see above.
    let act = |count: c_int| unsafe { libc::syscall(libc::SYS_writev, fd, buffers, count) };
    on_fd(
        "writev",
        fd,
        || act(count),
        || act(count / 2),
        |state, open, written| {
            let mut bytes = Vec::new();
            // SAFETY: the kernel has read so many buffers from there just now.
            for buffer in unsafe { slice::from_raw_parts(buffers, count as usize) } {
                // A buffer of no bytes may have no address.
                if 0 < buffer.iov_len {
                    let (base, len) = (buffer.iov_base.cast(), buffer.iov_len);
                    // SAFETY: and the bytes of each.
                    bytes.extend_from_slice(unsafe { slice::from_raw_parts(base, len) });
                }
            }
            note_written(state, open, &bytes[..written as usize], fd, None);
        },
    ) as ssize_t
}

/// # Safety
/// As `read(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_read, fd, buffer, count) };
    on_fd("read", fd, act, || 0, no_note) as ssize_t
}

fn read_at(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_pread64, fd, buffer, count, offset) };
    on_fd("pread", fd, act, || 0, no_note) as ssize_t
}

/// # Safety
/// As `pread(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    read_at(fd, buffer, count, offset)
}

/// # Safety
/// As `pread(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(
    fd: c_int,
    buffer: *mut c_void,
    count: size_t,
    offset: off_t,
) -> ssize_t {
    read_at(fd, buffer, count, offset)
}

fn note_synced(state: &State, open: &Open, _: c_long) {
    match open.is_dir {
        true => state.record(&trace::record(trace::SYNC_DIR, 0, 0, &open.path)),
        false => state.record(&trace::record(trace::SYNC, open.inode, 0, &[])),
    }
}

/// # Safety
/// As `fsync(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    // SAFETY: see above.
    on_fd("fsync", fd, || unsafe { libc::syscall(libc::SYS_fsync, fd) }, || 0, note_synced) as c_int
}

/// # Safety
/// As `fdatasync(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    // SAFETY: see above.
    on_fd("fdatasync", fd, || unsafe { libc::syscall(libc::SYS_fdatasync, fd) }, || 0, note_synced)
        as c_int
}

/// Promises nothing about a power cut, so a trace does not have it.
///
/// # Safety
/// As `sync_file_range(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sync_file_range(
    fd: c_int,
    offset: off_t,
    count: off_t,
    flags: c_uint,
) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_sync_file_range, fd, offset, count, flags) };
    on_fd("sync_file_range", fd, act, || 0, no_note) as c_int
}

fn truncate_to(fd: c_int, length: off_t) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_ftruncate, fd, length) };
    on_fd(
        "ftruncate",
        fd,
        act,
        || 0,
        |state, open, _| {
            state.record(&trace::record(trace::TRUNCATE, open.inode, length as u64, &[]));
        },
    ) as c_int
}

/// # Safety
/// As `ftruncate(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off_t) -> c_int {
    truncate_to(fd, length)
}

/// # Safety
/// As `ftruncate(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off_t) -> c_int {
    truncate_to(fd, length)
}

fn allocate(fd: c_int, mode: c_int, offset: off_t, length: off_t) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, length) };
    on_fd(
        "fallocate",
        fd,
        act,
        || 0,
        |state, open, _| {
            if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
                let length = (length as u64).to_le_bytes();
                state.record(&trace::record(trace::PUNCH, open.inode, offset as u64, &length));
            }
        },
    ) as c_int
}

/// # Safety
/// As `fallocate(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: off_t, length: off_t) -> c_int {
    allocate(fd, mode, offset, length)
}

/// # Safety
/// As `fallocate(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(
    fd: c_int,
    mode: c_int,
    offset: off_t,
    length: off_t,
) -> c_int {
    allocate(fd, mode, offset, length)
}

/// Says that it cannot, so that its caller reads and writes, which is seen here.
///
/// # Safety
/// As `copy_file_range(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_offset: *mut off_t,
    to: c_int,
    to_offset: *mut off_t,
    count: size_t,
    flags: c_uint,
) -> ssize_t {
    if state().is_some_and(|state| state.open(to).is_some() || state.open(from).is_some()) {
        // SAFETY: the location is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOSYS };
        return -1;
    }
    // SAFETY: see above.
    unsafe {
        libc::syscall(libc::SYS_copy_file_range, from, from_offset, to, to_offset, count, flags)
            as ssize_t
    }
}

fn send_file(to: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
    if state().is_some_and(|state| state.open(to).is_some() || state.open(from).is_some()) {
        // SAFETY: the location is this thread's own.
        unsafe { *libc::__errno_location() = libc::ENOSYS };
        return -1;
    }
    // SAFETY: see above.
    unsafe { libc::syscall(libc::SYS_sendfile, to, from, offset, count) as ssize_t }
}

/// Says that it cannot, as `copy_file_range`.
///
/// # Safety
/// As `sendfile(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile(
    to: c_int,
    from: c_int,
    offset: *mut off_t,
    count: size_t,
) -> ssize_t {
    send_file(to, from, offset, count)
}

/// Says that it cannot, as `copy_file_range`.
///
/// # Safety
/// As `sendfile(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile64(
    to: c_int,
    from: c_int,
    offset: *mut off_t,
    count: size_t,
) -> ssize_t {
    send_file(to, from, offset, count)
}

fn rename_at(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_uint,
) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_renameat2, from_dir, from, to_dir, to, flags) };
    on_path("rename", from_dir, from, act, |state, from| {
        let to = state.absolute(to_dir, to);
        state.record(&trace::record(trace::RENAME, 0, 0, &trace::two(from, &to)));
    }) as c_int
}

/// # Safety
/// As `rename(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    rename_at(libc::AT_FDCWD, from, libc::AT_FDCWD, to, 0)
}

/// # Safety
/// As `renameat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn renameat(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
) -> c_int {
    rename_at(from_dir, from, to_dir, to, 0)
}

/// # Safety
/// As `renameat2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn renameat2(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_uint,
) -> c_int {
    rename_at(from_dir, from, to_dir, to, flags)
}

fn link_at(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_linkat, from_dir, from, to_dir, to, flags) };
    on_path("link", to_dir, to, act, |state, to| {
        let from = state.absolute(from_dir, from);
        state.record(&trace::record(trace::LINK, 0, 0, &trace::two(&from, to)));
    }) as c_int
}

/// # Safety
/// As `link(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    link_at(libc::AT_FDCWD, from, libc::AT_FDCWD, to, 0)
}

/// # Safety
/// As `linkat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn linkat(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    flags: c_int,
) -> c_int {
    link_at(from_dir, from, to_dir, to, flags)
}

fn unlink_at(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_unlinkat, dir, path, flags) };
    on_path("unlink", dir, path, act, |state, path| {
        let kind = if flags & libc::AT_REMOVEDIR == 0 { trace::UNLINK } else { trace::RMDIR };
        state.record(&trace::record(kind, 0, 0, path));
    }) as c_int
}

/// # Safety
/// As `unlink(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    unlink_at(libc::AT_FDCWD, path, 0)
}

/// # Safety
/// As `unlinkat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    unlink_at(dir, path, flags)
}

/// # Safety
/// As `rmdir(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    unlink_at(libc::AT_FDCWD, path, libc::AT_REMOVEDIR)
}

fn make_dir(dir: c_int, path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_mkdirat, dir, path, mode) };
    on_path("mkdir", dir, path, act, |state, path| {
        state.record(&trace::record(trace::MKDIR, 0, 0, path));
    }) as c_int
}

/// # Safety
/// As `mkdir(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    make_dir(libc::AT_FDCWD, path, mode)
}

/// # Safety
/// As `mkdirat(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdirat(dir: c_int, path: *const c_char, mode: mode_t) -> c_int {
    make_dir(dir, path, mode)
}

/// # Safety
/// As `statx(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    found: *mut c_void,
) -> c_int {
    // SAFETY: see above.
    let act = || unsafe { libc::syscall(libc::SYS_statx, dir, path, flags, mask, found) };
    // SAFETY: a path that is not null ends with a zero.
    if path.is_null() || unsafe { *path } == 0 {
        return on_fd("stat", dir, act, || 0, no_note) as c_int;
    }
    on_path("stat", dir, path, act, |_, _| {}) as c_int
}
