//! Finds the files of a source, and recognises each of them again.
//!
//! A file is named relative to the fixed part of its pattern, so a position holds wherever the
//! directory lies and however its path was typed. Whether a file is still the one that was read is
//! told by its inode, size and times of change; where one of these differs, by its content.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use cofferdam_connector::catalog::NodeContext;
use cofferdam_core::failure::os_error;
use cofferdam_files::Grants;
use cofferdam_settings::{Code, Problem};

use super::spec::{FileSourceSpec, fixed_part};
use crate::changed::Changed;

/// How much of the beginning and of the end of a file tells it apart from others.
const SAMPLE_BYTES: u64 = 4096;

/// What is known of a file without reading it whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileId {
    /// Relative to the root of its source.
    pub(super) name: String,
    /// How much of it there is to read: its size when it was found.
    pub(super) size: u64,
    stamp: Stamp,
    /// The checksum of its first and last bytes, as far as `size` goes.
    sample: u32,
}

/// What changes with the content, or with the place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed_s: i64,
    changed_ns: i64,
    /// When the system has last seen a change: nobody can set it back.
    noted_s: i64,
    noted_ns: i64,
}

impl Stamp {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed_s: metadata.mtime(),
            changed_ns: metadata.mtime_nsec(),
            noted_s: metadata.ctime(),
            noted_ns: metadata.ctime_nsec(),
        })
    }
}

impl FileId {
    /// A file of which the first `size` bytes are to be read: it may have grown since it was found.
    /// `None`: it has become shorter.
    pub(super) fn of(listing: &Listing, name: String, size: u64) -> io::Result<Option<Self>> {
        let file = listing.grants.open(&listing.root.join(&name))?;
        let stamp = Stamp::of(&file)?;
        if stamp.size < size {
            return Ok(None);
        }
        let sample = sample(&file, size)?;
        Ok(Some(Self { name, size, stamp, sample }))
    }

    /// Opens the file and makes sure that it begins and ends as it did. Gives its stamp where it was
    /// touched, so that what was read of it has to be compared.
    pub(super) fn open(&self, listing: &Listing) -> Result<(File, Option<Stamp>), Changed> {
        let path = listing.root.join(&self.name);
        let unread = |error: io::Error| Changed::unread(&path, error);
        let file = listing.grants.open(&path).map_err(unread)?;
        let stamp = Stamp::of(&file).map_err(unread)?;
        if stamp == self.stamp {
            return Ok((file, None));
        }
        if stamp.size < self.size {
            let what = format!("it has {} bytes, but had {} before", stamp.size, self.size);
            return Err(Changed::content(&path, what));
        }
        if sample(&file, self.size).map_err(unread)? != self.sample {
            return Err(Changed::content(&path, "its content has changed"));
        }
        Ok((file, Some(stamp)))
    }

    /// The stamp of an open file, if somebody has written to it since it was found: its content has to
    /// be compared.
    pub(super) fn touched(&self, file: &File) -> io::Result<Option<Stamp>> {
        let stamp = Stamp::of(file)?;
        Ok((stamp != self.stamp).then_some(stamp))
    }

    /// Whether the file has grown since it was found, and begins and ends as it did as far as it is to be
    /// read. A file that is always written to is not compared from its beginning each time.
    pub(super) fn has_only_grown(&self, file: &File, stamp: &Stamp) -> io::Result<bool> {
        let is_longer = self.stamp.size < stamp.size
            && (self.stamp.device, self.stamp.inode) == (stamp.device, stamp.inode);
        Ok(is_longer && sample(file, self.size)? == self.sample)
    }

    /// The file was compared after it had this stamp, and is the same as far as it was read.
    pub(super) fn renew(&mut self, stamp: Stamp) {
        self.stamp = stamp;
    }
}

fn sample(file: &File, size: u64) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let first = SAMPLE_BYTES.min(size);
    let mut bytes = vec![0; SAMPLE_BYTES as usize];
    for (start, len) in [(0, first), (size - first, first)] {
        let bytes = &mut bytes[..len as usize];
        file.read_exact_at(bytes, start)?;
        hasher.update(bytes);
    }
    Ok(hasher.finalize())
}

/// The checksum of some bytes of a file; `None` where it ends before them.
pub(crate) fn checksum(file: &File, start: u64, end: u64) -> io::Result<Option<u32>> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut at = start;
    while at < end {
        let wanted = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        match file.read_at(&mut buffer[..wanted], at)? {
            0 => return Ok(None),
            read => {
                hasher.update(&buffer[..read]);
                at += read as u64;
            }
        }
    }
    Ok(Some(hasher.finalize()))
}

/// How long the mark is with which some programs begin a file of UTF-8: it belongs to no record.
pub(super) fn byte_order_mark(file: &File) -> io::Result<u64> {
    const MARK: [u8; 3] = [0xEF, 0xBB, 0xBF];
    let mut begin = [0; MARK.len()];
    Ok(if file.read_at(&mut begin, 0)? == MARK.len() && begin == MARK { 3 } else { 0 })
}

/// The line that a byte of a file is in, counted from 1. Counts on from where it was asked last.
#[derive(Debug, Default)]
pub(super) struct LineNumbers {
    file: u32,
    at: u64,
    lines: u64,
}

impl LineNumbers {
    pub(super) fn line_of(&mut self, number: u32, file: &File, offset: u64) -> io::Result<u64> {
        if self.file != number || offset < self.at {
            *self = Self { file: number, at: 0, lines: 0 };
        }
        let mut buffer = vec![0; 256 << 10];
        while self.at < offset {
            let wanted = buffer.len().min(usize::try_from(offset - self.at).unwrap_or(usize::MAX));
            let read = file.read_at(&mut buffer[..wanted], self.at)?;
            if read == 0 {
                break;
            }
            self.lines += memchr::memchr_iter(b'\n', &buffer[..read]).count() as u64;
            self.at += read as u64;
        }
        Ok(self.lines + 1)
    }
}

/// The files of a source as they are now.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    pub(super) root: PathBuf,
    pattern: String,
    /// Which of them may be opened.
    grants: Grants,
    /// What matches and is neither a regular file nor a directory.
    others: Vec<PathBuf>,
    /// The sizes of the files, by name.
    pub(super) files: BTreeMap<String, u64>,
}

/// Names nothing of what was found there.
fn outside(source: &str, pattern: &str) -> Problem {
    let message = format!("source \"{source}\" finds files that lead out of what the host grants");
    Problem::new(Code::NotGranted, message).detail(pattern)
}

impl Listing {
    /// Looks for the files of a source.
    pub(super) fn new(node: NodeContext<'_>, spec: &FileSourceSpec) -> Result<Self, Problem> {
        let NodeContext { name, base_dir, grants } = node;
        let unreadable = |what: String| Problem::new(Code::SourceUnreadable, what);
        let (root, rest) = fixed_part(base_dir, &spec.path);
        let leads_up = |part: &str| {
            part == ".."
                || glob::Pattern::new(part).is_ok_and(|it| it.matches("..") || it.matches("."))
        };
        if !grants.is_all() && rest.split('/').any(leads_up) {
            return Err(outside(name, &spec.path));
        }
        // Only what the manifest says is a pattern: the directory it lies in may be called anything.
        let pattern = match rest.as_str() {
            "" => glob::Pattern::escape(&root.to_string_lossy()),
            rest => format!("{}/{rest}", glob::Pattern::escape(&root.to_string_lossy())),
        };
        let found = glob::glob(&pattern)
            .map_err(|error| unreadable(format!("source \"{name}\": {error}")))?;
        let root = match rest.as_str() {
            "" => root.parent().map(Path::to_owned).unwrap_or_default(),
            _ => root,
        };
        let (mut files, mut others) = (BTreeMap::new(), Vec::new());
        for path in found {
            let cannot = |path: &Path, error: &io::Error| {
                unreadable(format!("source \"{name}\" cannot list its files"))
                    .with_os_error(os_error(error))
                    .detail(format!("{}: {error}", path.display()))
            };
            let path = path.map_err(|error| cannot(error.path(), error.error()))?;
            if !grants.may_read(&path) {
                return Err(outside(name, &spec.path));
            }
            let metadata = std::fs::metadata(&path).map_err(|error| cannot(&path, &error))?;
            if !metadata.is_file() {
                // A pattern such as `logs/*` means the files.
                if !metadata.is_dir() || rest.is_empty() {
                    others.push(path);
                }
                continue;
            }
            let name = path.strip_prefix(&root).unwrap_or(&path);
            let Some(name) = name.to_str() else {
                let problem = unreadable(format!(
                    "source \"{name}\" matches a file with an unsupported name",
                    name = name.display()
                ));
                return Err(problem.detail("its name is not UTF-8"));
            };
            files.insert(name.to_owned(), metadata.len());
        }
        Ok(Self { root, pattern, grants: grants.clone(), others, files })
    }

    /// Refuses to begin without anything to read.
    pub(super) fn check(&self, name: &str) -> Result<(), Problem> {
        // A pipe among files would be left out without a word.
        if !self.files.is_empty() && self.others.is_empty() {
            return Ok(());
        }
        let problem = match self.files.is_empty() {
            true => format!("source \"{name}\" has nothing to read"),
            false => format!("source \"{name}\" cannot read everything that its path matches"),
        };
        let problem = Problem::new(Code::SourceUnreadable, problem);
        Err(match self.others.first() {
            Some(other) => problem
                .detail(format!("{} is not a regular file", other.display()))
                .hint("a source needs files that it can read again from any position"),
            None if self.pattern.ends_with("/-") => problem
                .detail("standard input cannot be read again from a position")
                .hint("write it to a file first"),
            None => problem
                .detail(format!("no file matches {}", self.pattern))
                .hint("relative paths begin at the manifest's directory"),
        })
    }
}
