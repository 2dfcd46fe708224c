//! Power cuts. A run is recorded beneath the program; then the disk is made as a power cut at any moment
//! may leave it: what was synced is there, and any part of the rest.
//!
//! The model is stricter than common file systems. Of the writes and lengths of a file, those before its last
//! sync are kept; of the others any subset, cut at the borders of sectors. Of the names in a directory, those
//! before the last sync of that directory; of the others any subset, also where the file itself was synced.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Output,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use cofferdam_core::random::Random;

use crate::disk::{DiskJob, STOPPED, said, wait};

/// Power cuts in the trace of one run.
const CUTS_OF_A_RUN: u64 = 8;
/// Writes are kept or lost in pieces of this.
const SECTOR_BYTES: usize = 512;

/// What was tried.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Power cuts.
    pub cuts: u64,
    /// Of these, cuts that have lost something that was not synced.
    pub lossy: u64,
    /// Cuts after which the job resumed from a checkpoint.
    pub resumed: u64,
}

/// Lives through so many power cuts.
///
/// # Errors
/// Where a checkpoint that was complete is not there, or the output is wrong in the end, with the seed.
pub fn run(cuts: u64, seed: u64, mut on_cut: impl FnMut(&Tally)) -> Result<Tally> {
    let mut tally = Tally::default();
    for seed in seed.. {
        let mut random = Random::new(seed);
        let job = DiskJob::new(&mut random)?;
        record_and_cut(&job, &mut random, cuts, &mut tally, &mut on_cut)
            .with_context(|| format!("SEED={seed}, {}", job.variant))?;
        if cuts <= tally.cuts {
            break;
        }
    }
    Ok(tally)
}

/// Runs a job to its end whose checkpoints are objects in a directory. Gives how many of their generations were
/// removed.
///
/// # Errors
/// Where the mark of a removal went before it was certain that what it marks is gone: a power cut could bring back a
/// part of a generation, and nothing that says so.
pub fn check_removals(seed: u64) -> Result<usize> {
    let in_a_directory = (seed..).find_map(|seed| {
        let mut random = Random::new(seed);
        let job = DiskJob::new(&mut random);
        let is_meant = job.as_ref().map_or(true, |job| job.variant.contains("filesystem"));
        is_meant.then(|| job.map(|job| (job, random)))
    });
    let (job, mut random) = in_a_directory.context("a job")??;
    let Recorded { records, .. } = recorded(&job, "trace", Disk::default(), &mut random)?;
    let mut removals = 0;
    for (at, record) in records.iter().enumerate() {
        let Record::Remove(mark) = record else { continue };
        let Some(folder) = mark.strip_suffix(b"/removed") else { continue };
        let is_inside =
            |path: &[u8]| path.strip_prefix(folder).is_some_and(|it| it.starts_with(b"/"));
        let last = records[..at].iter().rev().find(|record| match record {
            Record::Remove(path) => is_inside(path),
            Record::SyncDir(path) => path == folder,
            _ => false,
        });
        ensure!(
            matches!(last, Some(Record::SyncDir(_))),
            "{} is removed after {last:?}",
            String::from_utf8_lossy(mark)
        );
        removals += 1;
    }
    Ok(removals)
}

fn record_and_cut(
    job: &DiskJob,
    random: &mut Random,
    cuts: u64,
    tally: &mut Tally,
    on_cut: &mut impl FnMut(&Tally),
) -> Result<()> {
    let first = recorded(job, "trace-0", Disk::default(), random)?;
    for cut in 0..CUTS_OF_A_RUN {
        if cuts <= tally.cuts {
            break;
        }
        let mut image = first.cut(random);
        put(&job.disk(), &image)?;
        tally.cuts += 1;
        tally.lossy += u64::from(image.has_lost);
        // A second one while the first is recovered from.
        if random.one_in(2) {
            let disk = Disk::read(&job.disk())?;
            let second = recorded(job, &format!("trace-{}", cut + 1), disk, random)
                .with_context(|| format!("after {}", image.words))?;
            let next = second.cut(random);
            // While it ends, a job removes what it does not need any more.
            let before = image.complete.filter(|_| !image.is_ending);
            let complete = next.complete.max(before);
            let words = format!("{}, then {}", image.words, next.words);
            image = Image { complete, words, ..next };
            put(&job.disk(), &image)?;
            tally.cuts += 1;
            tally.lossy += u64::from(image.has_lost);
        }
        check(job, &image, tally).with_context(|| image.words.clone())?;
        on_cut(tally);
    }
    Ok(())
}

fn check(job: &DiskJob, image: &Image, tally: &mut Tally) -> Result<()> {
    if let Some(complete) = image.complete
        && !image.has_ended
    {
        let mut list = job.command(&["checkpoints", "list", "disk/state", "--json"]);
        if job.disk().join("checkpoints").exists() {
            list = job.command(&["checkpoints", "list", "disk/checkpoints/disk", "--json"]);
        }
        let listed = wait(list.spawn()?)?;
        let newest = newest_of(&listed);
        ensure!(
            newest.is_some_and(|newest| complete <= newest) || image.is_ending,
            "checkpoint {complete} was complete, and {newest:?} is the newest: {}",
            said(&listed)
        );
        tally.resumed += 1;
    }
    job.finish()
}

fn newest_of(listed: &Output) -> Option<u64> {
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let id =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["checkpoint"].as_u64();
    text.lines().filter_map(id).max()
}

/// A run of the job to its end, and the disk before it.
struct Recorded {
    before: Disk,
    records: Vec<Record>,
}

fn recorded(job: &DiskJob, trace: &str, before: Disk, random: &mut Random) -> Result<Recorded> {
    let trace = job.beside(trace);
    let mut command = job.run_on_disk();
    command.env("DISK_TRACE", &trace);
    let run = command.spawn()?;
    let output = match random.one_in(3) {
        true => job.stop_after(run, Duration::from_millis(random.between(40, 260)))?,
        false => wait(run)?,
    };
    let is_stopped = said(&output).contains(STOPPED);
    ensure!(output.status.success() || is_stopped, "a recorded run: {}", said(&output));
    let records = parse(&fs::read(&trace).context("the trace")?, &job.disk())?;
    ensure!(records.iter().any(|it| matches!(it, Record::Said(_))), "nothing was recorded");
    Ok(Recorded { before, records })
}

/// A directory before a run that is recorded.
pub(crate) struct Before(Disk);

impl Before {
    /// Everything that is in it now.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        Disk::read(dir).map(Self)
    }

    /// Makes the directory what a power cut at a random moment of the run has left.
    pub(crate) fn cut(self, dir: &Path, trace: &Path, random: &mut Random) -> Result<String> {
        let records = parse(&fs::read(trace).context("the trace")?, &dir.canonicalize()?)?;
        let image = Recorded { before: self.0, records }.cut(random);
        put(dir, &image)?;
        Ok(image.words)
    }
}

/// Something that has happened to the disk. Paths are relative to it.
#[derive(Debug, Clone)]
enum Record {
    Create(u64, Vec<u8>),
    Write(u64, u64, Vec<u8>),
    Truncate(u64, u64),
    Punch(u64, u64, u64),
    Sync(u64),
    SyncDir(Vec<u8>),
    Rename(Vec<u8>, Vec<u8>),
    Link(Vec<u8>, Vec<u8>),
    Remove(Vec<u8>),
    MakeDir(Vec<u8>),
    Said(String),
}

fn parse(mut bytes: &[u8], root: &Path) -> Result<Vec<Record>> {
    let root = root.as_os_str().as_encoded_bytes();
    let relative = |path: &[u8]| -> Vec<u8> {
        let inner = path.strip_prefix(root).unwrap_or(path);
        inner.strip_prefix(b"/").unwrap_or(inner).to_vec()
    };
    let two = |bytes: &[u8]| -> Result<(Vec<u8>, Vec<u8>)> {
        let at = bytes.iter().position(|byte| *byte == 0).context("two paths")?;
        Ok((relative(&bytes[..at]), relative(&bytes[at + 1..])))
    };
    let mut records = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let (record, rest) = rest
            .split_at_checked(u32::from_le_bytes(*length) as usize)
            .context("a whole record")?;
        bytes = rest;
        let (kind, record) = record.split_first().context("a kind")?;
        let (first, record) = record.split_first_chunk::<8>().context("a number")?;
        let (second, content) = record.split_first_chunk::<8>().context("a number")?;
        let (first, second) = (u64::from_le_bytes(*first), u64::from_le_bytes(*second));
        records.push(match kind {
            b'c' => Record::Create(first, relative(content)),
            b'w' => Record::Write(first, second, content.to_vec()),
            b't' => Record::Truncate(first, second),
            b'p' => Record::Punch(first, second, u64::from_le_bytes(content.try_into()?)),
            b's' => Record::Sync(first),
            b'S' => Record::SyncDir(relative(content)),
            b'r' => two(content).map(|(from, to)| Record::Rename(from, to))?,
            b'l' => two(content).map(|(from, to)| Record::Link(from, to))?,
            b'u' | b'd' => Record::Remove(relative(content)),
            b'm' => Record::MakeDir(relative(content)),
            b'!' => Record::Said(String::from_utf8_lossy(content).into_owned()),
            other => anyhow::bail!("a record of kind {other}"),
        });
    }
    Ok(records)
}

/// A file or a directory, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    File(usize),
    Dir(usize),
}

type Names = BTreeMap<Vec<u8>, Node>;

#[derive(Debug, Clone, Default)]
struct File {
    synced: Vec<u8>,
    /// What was done to it since.
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
    Punch(usize, usize),
}

#[derive(Debug, Clone, Default)]
struct Dir {
    names: Names,
    synced: Names,
}

/// A change of names, in the order in which they were made.
#[derive(Debug, Clone)]
enum Naming {
    Set(usize, Vec<u8>, Node),
    Remove(usize, Vec<u8>),
    Move((usize, Vec<u8>), (usize, Vec<u8>), Node),
}

impl Naming {
    fn is_in(&self, dir: usize) -> bool {
        match self {
            Self::Set(at, ..) | Self::Remove(at, _) => *at == dir,
            Self::Move((from, _), (to, _), _) => *from == dir || *to == dir,
        }
    }

    fn sets(&self, place: &(usize, Vec<u8>)) -> bool {
        match self {
            Self::Set(dir, name, _) => (*dir, name) == (place.0, &place.1),
            Self::Move(_, to, _) => to == place,
            Self::Remove(..) => false,
        }
    }
}

/// What is on the disk for certain, and what may be.
#[derive(Debug, Clone)]
struct Disk {
    files: Vec<File>,
    dirs: Vec<Dir>,
    pending: Vec<Naming>,
    /// Files by the number that the kernel gave them.
    inodes: HashMap<u64, usize>,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            dirs: vec![Dir::default()],
            pending: Vec::new(),
            inodes: HashMap::new(),
        }
    }
}

impl Disk {
    /// A disk on which everything is as it is in a directory.
    fn read(dir: &Path) -> Result<Self> {
        let mut disk = Self::default();
        disk.read_into(dir, 0)?;
        Ok(disk)
    }

    fn read_into(&mut self, path: &Path, dir: usize) -> Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let name = entry.file_name().into_encoded_bytes();
            let node = if entry.file_type()?.is_dir() {
                self.dirs.push(Dir::default());
                let made = self.dirs.len() - 1;
                self.read_into(&entry.path(), made)?;
                Node::Dir(made)
            } else {
                let inode = entry.metadata()?.ino();
                let known = self.inodes.get(&inode).copied();
                Node::File(match known {
                    Some(file) => file,
                    None => {
                        let file = self.new_file(inode);
                        self.files[file].synced = fs::read(entry.path())?;
                        file
                    }
                })
            };
            self.dirs[dir].names.insert(name.clone(), node);
            self.dirs[dir].synced.insert(name, node);
        }
        Ok(())
    }

    fn new_file(&mut self, inode: u64) -> usize {
        self.files.push(File::default());
        self.inodes.insert(inode, self.files.len() - 1);
        self.files.len() - 1
    }

    /// The directory of a path and the name in it.
    fn place(&self, path: &[u8]) -> Result<(usize, Vec<u8>)> {
        let at = path.iter().rposition(|byte| *byte == b'/');
        let (parent, name) = match at {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        Ok((self.dir(parent)?, name.to_vec()))
    }

    fn dir(&self, path: &[u8]) -> Result<usize> {
        let mut dir = 0;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            dir = match self.dirs[dir].names.get(name) {
                Some(Node::Dir(dir)) => *dir,
                other => {
                    let path = String::from_utf8_lossy(path);
                    anyhow::bail!("{path}: {other:?} is no directory")
                }
            };
        }
        Ok(dir)
    }

    fn node(&self, place: &(usize, Vec<u8>)) -> Result<Node> {
        let node = self.dirs[place.0].names.get(&place.1);
        node.copied().with_context(|| format!("{} is not there", String::from_utf8_lossy(&place.1)))
    }

    fn name(&mut self, naming: Naming) {
        apply(&naming, &mut self.dirs, |dir| &mut dir.names);
        self.pending.push(naming);
    }

    fn change(&mut self, inode: u64, change: Change) -> Result<()> {
        // A file that never had a name leaves nothing behind.
        if let Some(file) = self.inodes.get(&inode) {
            self.files[*file].pending.push(change);
        }
        Ok(())
    }

    fn happens(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Create(inode, path) => {
                let (dir, name) = self.place(path)?;
                let file = self.new_file(*inode);
                self.name(Naming::Set(dir, name, Node::File(file)));
            }
            Record::Write(inode, at, bytes) => {
                self.change(*inode, Change::Write(*at as usize, bytes.clone()))?;
            }
            Record::Truncate(inode, length) => {
                self.change(*inode, Change::Truncate(*length as usize))?;
            }
            Record::Punch(inode, at, length) => {
                self.change(*inode, Change::Punch(*at as usize, *length as usize))?;
            }
            Record::Sync(inode) => {
                if let Some(file) = self.inodes.get(inode) {
                    let File { synced, pending } = &mut self.files[*file];
                    pending.drain(..).for_each(|change| change.apply(synced));
                }
            }
            Record::SyncDir(path) => {
                let dir = self.dir(path)?;
                let (durable, pending) =
                    std::mem::take(&mut self.pending).into_iter().partition(|it| it.is_in(dir));
                self.pending = pending;
                let durable: Vec<Naming> = durable;
                for naming in durable {
                    if let Naming::Move(from, ..) = &naming {
                        // A file that has certainly left a place does not come to it later.
                        self.pending.retain(|earlier| !earlier.sets(from));
                    }
                    apply(&naming, &mut self.dirs, |dir| &mut dir.synced);
                }
            }
            Record::Rename(from, to) => {
                let (from, to) = (self.place(from)?, self.place(to)?);
                let node = self.node(&from)?;
                self.name(Naming::Move(from, to, node));
            }
            Record::Link(from, to) => {
                let node = self.node(&self.place(from)?)?;
                let (dir, name) = self.place(to)?;
                self.name(Naming::Set(dir, name, node));
            }
            Record::Remove(path) => {
                let (dir, name) = self.place(path)?;
                self.name(Naming::Remove(dir, name));
            }
            Record::MakeDir(path) => {
                let (dir, name) = self.place(path)?;
                self.dirs.push(Dir::default());
                let made = Node::Dir(self.dirs.len() - 1);
                self.name(Naming::Set(dir, name, made));
            }
            Record::Said(_) => {}
        }
        Ok(())
    }
}

fn apply(naming: &Naming, dirs: &mut [Dir], names: impl Fn(&mut Dir) -> &mut Names) {
    match naming {
        Naming::Set(dir, name, node) => {
            names(&mut dirs[*dir]).insert(name.clone(), *node);
        }
        Naming::Remove(dir, name) => {
            names(&mut dirs[*dir]).remove(name);
        }
        Naming::Move((from, old), (to, new), node) => {
            names(&mut dirs[*from]).remove(old);
            names(&mut dirs[*to]).insert(new.clone(), *node);
        }
    }
}

impl Change {
    fn apply(self, content: &mut Vec<u8>) {
        match self {
            Self::Write(at, bytes) => {
                let end = at + bytes.len();
                content.resize(content.len().max(end), 0);
                content[at..end].copy_from_slice(&bytes);
            }
            Self::Truncate(length) => content.resize(length, 0),
            Self::Punch(at, length) => {
                let end = (at + length).min(content.len());
                content[at.min(end)..end].fill(0);
            }
        }
    }
}

/// What a power cut has left.
struct Image {
    disk: Disk,
    /// The contents of its files.
    contents: Vec<Vec<u8>>,
    /// Whether anything is not on it that was not synced.
    has_lost: bool,
    /// The newest checkpoint that was said to be complete.
    complete: Option<u64>,
    is_ending: bool,
    has_ended: bool,
    /// How it was made.
    words: String,
}

impl Recorded {
    /// The disk after a power cut at a random moment.
    fn cut(&self, random: &mut Random) -> Image {
        let at = random.between(0, self.records.len() as u64) as usize;
        let mut disk = self.before.clone();
        let mut said = String::new();
        for record in &self.records[..at] {
            // The model has to know everything that has happened.
            disk.happens(record).unwrap_or_else(|error| panic!("{record:?}: {error:#}"));
            if let Record::Said(words) = record {
                said.push_str(words);
            }
        }
        let keeps = [0, 50, 90, 100];
        let mut keep = || keeps[random.between(0, keeps.len() as u64 - 1) as usize];
        let (of_names, of_writes) = (keep(), keep());
        let mut kept = |percent: u64| random.between(0, 99) < percent;
        let mut has_lost = false;
        for naming in std::mem::take(&mut disk.pending) {
            match kept(of_names) {
                true => apply(&naming, &mut disk.dirs, |dir| &mut dir.synced),
                false => has_lost = true,
            }
        }
        let mut contents = Vec::new();
        for file in &mut disk.files {
            let mut content = std::mem::take(&mut file.synced);
            for change in std::mem::take(&mut file.pending) {
                for piece in change.pieces() {
                    match kept(of_writes) {
                        true => piece.apply(&mut content),
                        false => has_lost = true,
                    }
                }
            }
            contents.push(content);
        }
        let complete = said.lines().filter_map(|line| {
            let (_, rest) = line.split_once(" INFO checkpoint ")?;
            rest.split(':').next()?.parse().ok()
        });
        let complete = complete.max();
        let has_ended = said.contains(" finished after ") || said.contains(" stopped after ");
        // The last checkpoint is committed and removed before the end is said.
        let ends = self.records[at..].iter().filter(|record| match record {
            Record::Said(words) => words.contains(" INFO checkpoint "),
            _ => false,
        });
        let is_ending = ends.count() == 0;
        let words = format!(
            "cut at {at} of {}, with {of_names} % of the names and {of_writes} % of the writes",
            self.records.len()
        );
        Image { disk, contents, has_lost, complete, is_ending, has_ended, words }
    }
}

impl Change {
    /// What of a change may be there without the rest.
    fn pieces(self) -> Vec<Self> {
        let Self::Write(at, bytes) = self else { return vec![self] };
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < bytes.len() {
            let end = ((at + done) / SECTOR_BYTES + 1) * SECTOR_BYTES - at;
            let end = end.min(bytes.len());
            pieces.push(Self::Write(at + done, bytes[done..end].to_vec()));
            done = end;
        }
        pieces
    }
}

/// Replaces what is in a directory.
fn put(root: &Path, image: &Image) -> Result<()> {
    fs::remove_dir_all(root)?;
    fs::create_dir(root)?;
    let mut made = BTreeMap::new();
    put_dir(image, 0, root, &mut made, &mut BTreeSet::new())
}

fn put_dir(
    image: &Image,
    dir: usize,
    path: &Path,
    made: &mut BTreeMap<usize, std::path::PathBuf>,
    dirs: &mut BTreeSet<usize>,
) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    for (name, node) in &image.disk.dirs[dir].synced {
        let path = path.join(std::ffi::OsStr::from_bytes(name));
        match node {
            Node::File(file) => match made.get(file) {
                Some(first) => fs::hard_link(first, &path)?,
                None => {
                    fs::write(&path, &image.contents[*file])?;
                    made.insert(*file, path);
                }
            },
            // A directory has one name.
            Node::Dir(dir) if dirs.insert(*dir) => {
                fs::create_dir(&path)?;
                put_dir(image, *dir, &path, made, dirs)?;
            }
            Node::Dir(_) => {}
        }
    }
    Ok(())
}
