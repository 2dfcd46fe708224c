//! What is open below the directory, and when a call has to fail.

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_long},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

/// A descriptor of a file or directory below the root.
#[derive(Debug, Clone)]
pub(crate) struct Open {
    /// Descriptors are counted, so that those from before an error are known.
    number: u64,
    pub(crate) path: Vec<u8>,
    pub(crate) inode: u64,
    pub(crate) is_dir: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Once,
    Reopen,
    Gone,
    Torn,
}

/// How a call is to fail.
pub(crate) struct Strike {
    pub(crate) errno: c_int,
    /// After half of what it had to write.
    pub(crate) is_torn: bool,
}

#[derive(Debug)]
pub(crate) struct State {
    root: Vec<u8>,
    fail_at: u64,
    mode: Mode,
    errno: c_int,
    report: Option<c_int>,
    trace: Option<c_int>,
    open: HashMap<c_int, Open>,
    opened: u64,
    calls: u64,
    /// The last descriptor that was open when a call was made to fail.
    broken: Option<u64>,
}

static STATE: OnceLock<Option<Mutex<State>>> = OnceLock::new();

/// What there is to do, if anything is.
pub(crate) fn state() -> Option<MutexGuard<'static, State>> {
    let state = STATE.get_or_init(|| State::from_environment().map(Mutex::new)).as_ref()?;
    Some(state.lock().unwrap_or_else(PoisonError::into_inner))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn open_for_appending(path: &str) -> Option<c_int> {
    let path = std::ffi::CString::new(path).ok()?;
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
    // SAFETY: the path ends with a zero and lives through the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o600 as c_long)
    };
    // High up, where nothing that counts on the numbers of descriptors looks.
    // SAFETY: duplicates a descriptor that was opened just now.
    let high = unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, 900) };
    (0 <= high).then_some(high as c_int)
}

fn write_all(fd: c_int, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are those of a slice.
        let written = unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) };
        // A trace with a hole would prove nothing.
        assert!(0 < written, "write the trace");
        bytes = &bytes[written as usize..];
    }
}

/// What `/proc` says of a descriptor.
pub(crate) fn path_of(fd: c_int) -> Option<Vec<u8>> {
    let link = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).ok()?;
    let mut path = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the link ends with a zero, and the buffer is as long as is said.
    let len = unsafe {
        libc::syscall(
            libc::SYS_readlinkat,
            libc::AT_FDCWD,
            link.as_ptr(),
            path.as_mut_ptr(),
            path.len(),
        )
    };
    path.truncate(usize::try_from(len).ok()?);
    Some(path)
}

extern "C" fn report_calls() {
    if let Some(state) = state() {
        state.report(&format!("calls {}\n", state.calls));
    }
}

impl State {
    fn from_environment() -> Option<Self> {
        let root = variable("DISK_ROOT")?.into_bytes();
        let number = |name: &str| variable(name).and_then(|text| text.parse().ok());
        let mode = match variable("DISK_MODE").as_deref() {
            Some("reopen") => Mode::Reopen,
            Some("gone") => Mode::Gone,
            Some("torn") => Mode::Torn,
            _ => Mode::Once,
        };
        let report = variable("DISK_REPORT").and_then(|path| open_for_appending(&path));
        if report.is_some() {
            // SAFETY: the function is there as long as the program.
            unsafe { libc::atexit(report_calls) };
        }
        Some(Self {
            root,
            fail_at: number("DISK_FAIL").unwrap_or(0),
            mode,
            errno: number("DISK_ERRNO").map_or(libc::EIO, |errno| errno as c_int),
            report,
            trace: variable("DISK_TRACE").and_then(|path| open_for_appending(&path)),
            open: HashMap::new(),
            opened: 0,
            calls: 0,
            broken: None,
        })
    }

    fn report(&self, line: &str) {
        if let Some(report) = self.report {
            write_all(report, line.as_bytes());
        }
    }

    /// Whether a path lies below the root, or is it.
    pub(crate) fn is_ours(&self, path: &[u8]) -> bool {
        path.strip_prefix(self.root.as_slice())
            .is_some_and(|rest| rest.first().is_none_or(|next| *next == b'/'))
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.trace.is_some()
    }

    pub(crate) fn record(&self, record: &[u8]) {
        if let Some(trace) = self.trace {
            write_all(trace, record);
        }
    }

    /// Notes a descriptor that was opened just now, if it is ours.
    pub(crate) fn opened(&mut self, fd: c_int) -> Option<&Open> {
        let path = path_of(fd)?;
        if !self.is_ours(&path) {
            self.open.remove(&fd);
            return None;
        }
        // SAFETY: all zeros are a valid `stat`.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is that of a `stat`, which the call fills.
        unsafe { libc::syscall(libc::SYS_fstat, fd, &raw mut stat) };
        self.opened += 1;
        let is_dir = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let open = Open { number: self.opened, path, inode: stat.st_ino, is_dir };
        self.open.insert(fd, open);
        self.open.get(&fd)
    }

    pub(crate) fn duplicated(&mut self, from: c_int, to: c_int) {
        match self.open.get(&from).cloned() {
            Some(open) => self.open.insert(to, open),
            None => self.open.remove(&to),
        };
    }

    pub(crate) fn closed(&mut self, fd: c_int) {
        self.open.remove(&fd);
    }

    pub(crate) fn open(&self, fd: c_int) -> Option<&Open> {
        self.open.get(&fd)
    }

    /// The absolute path that a call means.
    pub(crate) fn absolute(&self, dir: c_int, path: *const c_char) -> Vec<u8> {
        if path.is_null() {
            return Vec::new();
        }
        // SAFETY: the program gives the C library a path that ends with a zero.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        let base = match (path.first(), dir) {
            (Some(b'/'), _) => Vec::new(),
            (_, libc::AT_FDCWD) => std::env::current_dir()
                .map(|it| it.into_os_string().into_encoded_bytes())
                .unwrap_or_default(),
            _ => path_of(dir).unwrap_or_default(),
        };
        let mut absolute: Vec<u8> = Vec::new();
        for piece in base.split(|byte| *byte == b'/').chain(path.split(|byte| *byte == b'/')) {
            match piece {
                b"" | b"." => {}
                b".." => {
                    let end = absolute.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                    absolute.truncate(end);
                }
                piece => {
                    absolute.push(b'/');
                    absolute.extend_from_slice(piece);
                }
            }
        }
        absolute
    }

    /// Counts a call below the root, and says whether it has to fail.
    pub(crate) fn strike(&mut self, call: &str, path: &[u8], fd: Option<c_int>) -> Option<Strike> {
        self.calls += 1;
        let failing = |is_torn| Some(Strike { errno: self.errno, is_torn });
        if self.calls == self.fail_at {
            self.broken = match self.mode {
                Mode::Reopen => Some(self.opened),
                Mode::Gone => Some(u64::MAX),
                Mode::Once | Mode::Torn => None,
            };
            let at = String::from_utf8_lossy(path).into_owned();
            self.report(&format!("struck {call} {at}\n"));
            return failing(self.mode == Mode::Torn);
        }
        let broken = self.broken?;
        let is_broken = match fd.and_then(|fd| self.open.get(&fd)) {
            Some(open) => open.number <= broken,
            None => broken == u64::MAX,
        };
        if is_broken { failing(false) } else { None }
    }
}
