//! Which files somebody may open: what the host grants to the jobs of others.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use rustix::fs::OFlags;

use crate::resolved;

/// Files and directories that may be read and written, with all that is in them. The default: everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grants(Option<Roots>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Roots {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Grants {
    /// What is in these files and directories. What may be written may be read. Links among them are followed now.
    #[must_use]
    pub fn of(read: &[PathBuf], write: &[PathBuf]) -> Self {
        let real = |paths: &[PathBuf]| paths.iter().map(|path| resolved(path)).collect();
        Self(Some(Roots { read: real(read), write: real(write) }))
    }

    /// Whether everything is granted.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.0.is_none()
    }

    /// Whether what a path leads to, now, may be read.
    #[must_use]
    pub fn may_read(&self, path: &Path) -> bool {
        let Some(roots) = &self.0 else { return true };
        real(path).is_some_and(|real| roots.may_read(&real))
    }

    /// Whether what a path leads to, now, may be given to somebody to read: what may be written is not among it, as
    /// jobs keep their state there.
    #[must_use]
    pub fn may_lend(&self, path: &Path) -> bool {
        let Some(roots) = &self.0 else { return true };
        real(path).is_some_and(|real| is_within(&roots.read, &real))
    }

    /// Opens a directory to lend it. As [`open`](Self::open), and only what [`may_lend`](Self::may_lend) allows.
    ///
    /// # Errors
    /// Where it is no directory, cannot be opened, or is not granted.
    pub fn lend(&self, path: &Path) -> io::Result<File> {
        let flags = (OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let dir = File::options().read(true).custom_flags(flags).open(path)?;
        let itself = format!("/proc/self/fd/{}", dir.as_raw_fd());
        match &self.0 {
            Some(roots) if !is_within(&roots.read, &std::fs::read_link(itself)?) => {
                let message = "it is outside of what the host grants";
                Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
            }
            _ => Ok(dir),
        }
    }

    /// Whether what a path leads to, now, may be written. It need not be there.
    #[must_use]
    pub fn may_write(&self, path: &Path) -> bool {
        let Some(roots) = &self.0 else { return true };
        real(path).is_some_and(|real| is_within(&roots.write, &real))
    }

    /// Opens a file to read it. What counts is the file that was opened, and not what its path leads to at another
    /// time: a link that is exchanged meanwhile opens nothing.
    ///
    /// # Errors
    /// Where it cannot be opened, or is not granted: then nothing of it was touched.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let Some(roots) = &self.0 else { return File::open(path) };
        // Not opened yet, but held: opening a device would already act on it.
        let flags = (OFlags::PATH | OFlags::CLOEXEC).bits() as i32;
        let held = File::options().read(true).custom_flags(flags).open(path)?;
        let itself = format!("/proc/self/fd/{}", held.as_raw_fd());
        if !roots.may_read(&std::fs::read_link(&itself)?) {
            let message = "it is outside of what the host grants";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        File::open(itself)
    }
}

/// What a path leads to; `None`: that cannot be said before something on the way is made.
fn real(path: &Path) -> Option<PathBuf> {
    let mut known = path;
    while !known.exists() {
        let is_up = known.components().next_back() == Some(Component::ParentDir);
        if is_up || known.is_symlink() {
            return None;
        }
        known = known.parent()?;
        if known.as_os_str().is_empty() {
            break;
        }
    }
    Some(resolved(path))
}

/// A link in a directory or below it: what is written by such a name is written elsewhere.
#[must_use]
pub fn link_below(dir: &Path) -> Option<PathBuf> {
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_symlink() => return Some(entry.path()),
                Ok(kind) if kind.is_dir() => waiting.push(entry.path()),
                _ => {}
            }
        }
    }
    None
}

impl Roots {
    fn may_read(&self, real: &Path) -> bool {
        is_within(&self.read, real) || is_within(&self.write, real)
    }
}

fn is_within(roots: &[PathBuf], real: &Path) -> bool {
    roots.iter().any(|root| real.starts_with(root))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn what_is_granted_is_what_a_path_leads_to() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["in", "out", "other", "in-between"] {
            fs::create_dir(path(name)).expect("made");
            fs::write(path(name).join("file"), name).expect("written");
        }
        symlink(path("other"), path("in/link")).expect("linked");
        symlink(path("in"), path("entry")).expect("linked");
        symlink(path("other"), path("out/link")).expect("linked");
        symlink(path("other/new"), path("out/dangling")).expect("linked");
        assert_eq!(link_below(&path("in")), Some(path("in/link")));
        assert_eq!(link_below(&path("other")), None);
        let grants = Grants::of(&[path("in")], &[path("out")]);
        for (name, may_read, may_write) in [
            ("in/file", true, false),
            ("in/none", true, false),
            ("entry/file", true, false),
            ("out/file", true, true),
            ("out/new/part", true, true),
            ("other/file", false, false),
            ("in/link/file", false, false),
            ("in/../other/file", false, false),
            ("in/none/../../other/file", false, false),
            ("out/none/../link/file", false, false),
            ("out/dangling", false, false),
            ("out/dangling/file", false, false),
            ("in-between/file", false, false),
        ] {
            let path = path(name);
            assert_eq!(
                (grants.may_read(&path), grants.may_write(&path)),
                (may_read, may_write),
                "{name}"
            );
            assert_eq!(grants.open(&path).is_ok(), may_read && path.exists(), "{name}");
            let may_lend = may_read && !may_write;
            assert_eq!(grants.may_lend(&path), may_lend, "{name}");
            let folder = path.parent().expect("a folder");
            let is_lent = grants.may_lend(folder) && folder.is_dir();
            assert_eq!(grants.lend(folder).is_ok(), is_lent, "{name}");
            assert!(Grants::default().may_write(&path));
        }
        let error = grants.open(&path("in/link/file")).expect_err("it is outside").to_string();
        assert!(error.contains("what the host grants"), "{error}");
    }
}
