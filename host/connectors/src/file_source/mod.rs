//! Reads lines of files, in pieces that tasks share, from byte positions.
//!
//! Files are cut into splits. A line belongs to the split in which it begins, so that every line is
//! read once whatever the size of the splits. Which files there are, and how much of each is to be
//! read, is found out when the job begins, and is part of the position from then on: a file that
//! grows, a new one or one that was read and removed changes nothing.
//!
//! **Invariant:** a position is given out only for bytes that are still in their file. Each split has
//! the checksum of what was read of it, and wherever a file was touched its content is compared.

mod line;
mod plan;
mod spec;

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    path::Path,
    sync::Arc,
    time::Duration,
};

use cofferdam_connector::{
    Step,
    blocking::{BlockingSource, ReadOutcome},
    catalog::NodeContext,
    pace::Pace,
    state::{decode_all, encode_all, unreadable},
};
use cofferdam_contract::{BATCH_BYTES_MAX, BATCH_RECORDS_MAX, Batch, RecordRef};
use cofferdam_core::failure::{FailureCause, Obstacle};
use cofferdam_settings::{Code, Problem, problem::shown};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::spec::{FileSourceSpec, LineFormat, OnBadRecord, TimeFormat};
use self::{
    line::{Fields, LineReader, Unread},
    plan::{FileId, LineNumbers, Listing, Stamp, byte_order_mark},
};
pub(crate) use self::{plan::checksum, spec::FILE_SOURCE};
use crate::changed::{Changed, unreadable as unreadable_now};

const BUFFER_BYTES: usize = 256 << 10;

/// A source as all of its tasks see it: where its files lie, and which are there now.
#[derive(Debug, Clone)]
pub(crate) struct FilePlan {
    name: String,
    spec: FileSourceSpec,
    listing: Listing,
}

/// Where a task stands.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Position {
    /// The files of which there is something left to read, in the order of their names.
    files: Vec<FileId>,
    /// What is left, in the order of reading.
    rest: VecDeque<Split>,
    /// What was read of files that are not done, to recognise them by.
    done: Vec<(u32, Progress)>,
    /// The latest event time so far.
    latest: Option<i64>,
    /// Every file of the job with its size, at the first task alone.
    known: BTreeMap<String, u64>,
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Split {
    /// Its place in `files`.
    file: u32,
    start: u64,
    end: u64,
    /// `None`: nothing was read of it.
    progress: Option<Progress>,
}

/// Bytes of a file that were read.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Progress {
    /// The first line of the split.
    begin: u64,
    /// Behind the last byte that was read.
    next: u64,
    /// The checksum of all between.
    checksum: u32,
}

/// Shares what is left to read out among another number of tasks, in the order of the files: so what was
/// in order stays in order.
pub(super) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    let old = decode_all::<Position>(old)?;
    let mut splits: Vec<(FileId, Split)> = Vec::new();
    let mut done: Vec<(String, Progress)> = Vec::new();
    let mut known = BTreeMap::new();
    // Event time is behind the slowest task that has something left.
    let reading = old.iter().filter(|position| !position.rest.is_empty());
    let slowest = reading.map(|position| position.latest).min();
    let latest = slowest.unwrap_or_else(|| old.iter().filter_map(|it| it.latest).max());
    for position in old {
        let file = |number: u32| position.files.get(number as usize).cloned();
        for split in &position.rest {
            let file = file(split.file).ok_or("a split without its file")?;
            splits.push((file, *split));
        }
        for (number, progress) in &position.done {
            done.push((file(*number).ok_or("a split without its file")?.name, *progress));
        }
        known.extend(position.known);
    }
    splits.sort_by(|(left, left_split), (right, right_split)| {
        (&left.name, left_split.start).cmp(&(&right.name, right_split.start))
    });
    let mut shares: Vec<Position> = vec![Position { latest, ..Position::default() }; parallelism];
    for (place, (file, mut split)) in splits.into_iter().enumerate() {
        let share = &mut shares[place % parallelism];
        split.file = share.number_of(file);
        share.rest.push_back(split);
    }
    for share in &mut shares {
        let own = |name: &String| share.files.iter().position(|file| file.name == *name);
        let own = |(name, progress): &(String, Progress)| Some((own(name)? as u32, *progress));
        share.done = done.iter().filter_map(own).collect();
    }
    if let Some(first) = shares.first_mut() {
        first.known = known;
    }
    encode_all(&shares)
}

impl Position {
    /// The place of a file, which is added if it is new.
    fn number_of(&mut self, file: FileId) -> u32 {
        let known = self.files.iter().rposition(|known| known.name == file.name);
        let number = known.unwrap_or_else(|| {
            self.files.push(file);
            self.files.len() - 1
        });
        number as u32
    }

    /// Forgets files of which nothing is left.
    fn forget_read(&mut self) {
        let mut numbers = vec![None; self.files.len()];
        let mut files = Vec::new();
        for split in &mut self.rest {
            let number = &mut numbers[split.file as usize];
            split.file = *number.get_or_insert_with(|| {
                files.push(self.files[split.file as usize].clone());
                files.len() as u32 - 1
            });
        }
        self.files = files;
        self.done.retain_mut(|(file, _)| match numbers[*file as usize] {
            Some(number) => {
                *file = number;
                true
            }
            None => false,
        });
    }
}

impl FilePlan {
    pub(crate) fn new(node: NodeContext<'_>, spec: &FileSourceSpec) -> Result<Self, Problem> {
        let listing = Listing::new(node, spec)?;
        Ok(Self { name: node.name.to_owned(), spec: spec.clone(), listing })
    }

    pub(crate) fn idle_after(&self) -> Option<Duration> {
        self.spec.idle_timeout_ms.map(Duration::from_millis)
    }

    /// Refuses to begin where there is nothing to read.
    pub(crate) fn check_fresh(&self) -> Result<(), Problem> {
        self.listing.check(&self.name)
    }

    /// Refuses positions of files that are not there as they were; says what will not be read.
    pub(crate) fn check_positions(&self, positions: &[&[u8]]) -> Result<Vec<String>, Problem> {
        let changed = |what: String| {
            let message = format!("source \"{}\" cannot resume from its position", self.name);
            Problem::new(Code::InputChanged, message).detail(what).hint(
                "restore the original files, or start over with another state directory and output",
            )
        };
        let refused = |error: Changed| match error {
            Changed::Content(what) => changed(what),
            Changed::Unreadable(error) => {
                let message = format!("source \"{}\" cannot read its files", self.name);
                Problem::new(Code::SourceUnreadable, message).because(&error)
            }
        };
        let positions = decode_all::<Position>(positions).map_err(|error| {
            let message = format!("the position of source \"{}\" cannot be read", self.name);
            Problem::new(Code::StateMismatch, message).detail(error)
        })?;
        let mut known = BTreeMap::new();
        for position in &positions {
            for (number, file) in (0..).zip(&position.files) {
                let opened = file.open(&self.listing);
                let (opened, touched) = opened.map_err(&refused)?;
                if touched.is_some() {
                    self.compare(position, number, &opened).map_err(&refused)?;
                }
            }
            known.extend(&position.known);
        }
        Ok(self.left_out(&known))
    }

    /// Compares what was read of a file with what it has there now.
    fn compare(&self, position: &Position, number: u32, file: &File) -> Result<(), Changed> {
        let name = position.files.get(number as usize).map_or("", |file| &file.name);
        let path = self.listing.root.join(name);
        let done = position.done.iter().filter(|(file, _)| *file == number);
        let begun = position.rest.iter().filter(|split| split.file == number);
        let read = done.map(|(_, read)| read).chain(begun.flat_map(|split| &split.progress));
        for Progress { begin, next, checksum: expected } in read {
            let found = checksum(file, *begin, *next);
            if found.map_err(|error| Changed::unread(&path, error))? != Some(*expected) {
                let what = format!("bytes {begin} to {next} have changed since they were read");
                return Err(Changed::content(&path, what));
            }
        }
        Ok(())
    }

    /// What is there now and was not when the job began.
    fn left_out(&self, known: &BTreeMap<&String, &u64>) -> Vec<String> {
        let mut new: Vec<&str> = Vec::new();
        let mut grown: Vec<&str> = Vec::new();
        for (name, size) in &self.listing.files {
            match known.get(name) {
                None => new.push(name),
                Some(before) if **before < *size => grown.push(name),
                Some(_) => {}
            }
        }
        let words = |names: &[&str], what: &str| {
            let first = names.first()?;
            let others = match names.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} others"),
            };
            let place = self.listing.root.join(first);
            Some(format!("source \"{}\": {}{others} {what}", self.name, place.display()))
        };
        let new = words(&new, "was not there when the job started and will not be read");
        let grown = words(&grown, "has grown since the job started: the new data will not be read");
        new.into_iter().chain(grown).collect()
    }

    fn first_position(&self, index: u32, parallelism: u32) -> Result<Position, FailureCause> {
        let mut position = Position::default();
        let mut number = 0;
        for (name, size) in &self.listing.files {
            let mut start = 0;
            let mut found: Option<FileId> = None;
            while start < *size {
                let end = (*size).min(start + self.spec.split_bytes);
                if number % parallelism == index {
                    let path = self.listing.root.join(name);
                    let file = match found.take() {
                        Some(file) => Some(file),
                        None => FileId::of(&self.listing, name.clone(), *size)
                            .map_err(|error| environment(&path, error))?,
                    };
                    let Some(file) = file else {
                        let path = path.display();
                        let what = format!("{path}: it has shrunk since the job started");
                        return Err(input_changed(what));
                    };
                    found = Some(file.clone());
                    let file = position.number_of(file);
                    position.rest.push_back(Split { file, start, end, progress: None });
                }
                number += 1;
                start = end;
            }
        }
        if index == 0 {
            position.known = self.listing.files.clone();
        }
        Ok(position)
    }
}

pub(crate) struct FileSource {
    plan: Arc<FilePlan>,
    position: Position,
    open: Option<OpenFile>,
    line: Vec<u8>,
    lines: LineNumbers,
    pace: Pace,
}

/// The file of the split that is being read.
struct OpenFile {
    reader: BufReader<File>,
    fields: LineReader,
    /// Of what was read of the split, up to `recent`.
    checksum: crc32fast::Hasher,
    /// From where on nothing was compared with the file since it was read, and its checksum.
    recent: (u64, crc32fast::Hasher),
}

/// What `read_line` has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// The split is done.
    End,
    Whole,
    /// Only its beginning is there.
    TooLong,
}

impl FileSource {
    pub(crate) fn open(
        plan: &Arc<FilePlan>,
        index: u32,
        parallelism: u32,
        position: Option<&[u8]>,
    ) -> Result<Self, FailureCause> {
        let position: Position = match position {
            Some(bytes) => postcard::from_bytes(bytes).map_err(unreadable_position)?,
            None => plan.first_position(index, parallelism)?,
        };
        let pace = Pace::new(plan.spec.rate, parallelism);
        let lines = LineNumbers::default();
        Ok(Self { plan: plan.clone(), position, open: None, line: Vec::new(), lines, pace })
    }

    fn file(&self, split: &Split) -> Result<&FileId, FailureCause> {
        let file = self.position.files.get(split.file as usize);
        file.ok_or_else(|| unreadable_position("a split without its file"))
    }

    fn path(&self, split: &Split) -> String {
        let name = self.position.files.get(split.file as usize).map_or("", |file| &file.name);
        self.plan.listing.root.join(name).display().to_string()
    }

    /// Opens the split where the position says; a line that began before it is not its own.
    fn open_split(&mut self) -> Result<bool, FailureCause> {
        let Some(split) = self.position.rest.front().copied() else { return Ok(false) };
        let path = self.path(&split);
        let failed = |error: std::io::Error| environment(Path::new(&path), error);
        let opened = self.file(&split)?.open(&self.plan.listing);
        let (file, touched) = opened.map_err(changed)?;
        if let Some(stamp) = touched {
            self.plan.compare(&self.position, split.file, &file).map_err(changed)?;
            self.renew(split.file, stamp);
        }
        let mark = byte_order_mark(&file).map_err(failed)?;
        let fields = LineReader::new(&self.plan.spec, &file).map_err(|error| match error {
            Unread::Header(what) => bad_record(&path, &what),
            Unread::Io(error) => failed(error),
        })?;
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
        let progress = match split.progress {
            Some(progress) => {
                reader.seek(SeekFrom::Start(progress.next)).map_err(failed)?;
                progress
            }
            None => {
                let mut at = split.start;
                if 0 < at {
                    reader.seek(SeekFrom::Start(at - 1)).map_err(failed)?;
                    at = at - 1 + skip_line(&mut reader).map_err(failed)?;
                } else if self.plan.spec.has_header {
                    at = skip_line(&mut reader).map_err(failed)?;
                } else {
                    reader.seek(SeekFrom::Start(mark)).map_err(failed)?;
                    at = mark;
                }
                Progress { begin: at, next: at, checksum: 0 }
            }
        };
        let read = progress.next - progress.begin;
        let checksum = crc32fast::Hasher::new_with_initial_len(progress.checksum, read);
        self.set_progress(progress);
        let recent = (progress.next, crc32fast::Hasher::new());
        self.open = Some(OpenFile { reader, fields, checksum, recent });
        Ok(true)
    }

    fn progress(&self) -> Option<Progress> {
        self.position.rest.front().and_then(|split| split.progress)
    }

    fn set_progress(&mut self, progress: Progress) {
        if let Some(split) = self.position.rest.front_mut() {
            split.progress = Some(progress);
        }
    }

    fn renew(&mut self, number: u32, stamp: Stamp) {
        if let Some(known) = self.position.files.get_mut(number as usize) {
            known.renew(stamp);
        }
    }

    /// Reads one line into `self.line`, without its end.
    fn read_line(&mut self) -> Result<Line, FailureCause> {
        let (Some(split), Some(progress)) = (self.position.rest.front().copied(), self.progress())
        else {
            return Ok(Line::End);
        };
        if split.end <= progress.next {
            return Ok(Line::End);
        }
        let failed = |source: &Self, error: std::io::Error| {
            environment(Path::new(&source.path(&split)), error)
        };
        let bytes_max = self.plan.spec.record_bytes_max;
        // What was added to the file since the job began is none of its lines' end.
        let left = self.file(&split)?.size.saturating_sub(progress.next);
        let Some(open) = &mut self.open else { return Ok(Line::End) };
        self.line.clear();
        let limited = Read::take(&mut open.reader, left.min(bytes_max as u64 + 1));
        let read = { limited }.read_until(b'\n', &mut self.line);
        let mut read = read.map_err(|error| failed(self, error))? as u64;
        let Some(open) = &mut self.open else { return Ok(Line::End) };
        open.recent.1.update(&self.line);
        let is_ended = self.line.last() == Some(&b'\n');
        let is_too_long = bytes_max < self.line.len() && !is_ended;
        if is_too_long {
            let OpenFile { reader, recent: (_, recent), .. } = open;
            let mut rest = Read::take(reader, left.saturating_sub(read));
            let skipped = skip_line_with(&mut rest, |bytes| recent.update(bytes));
            read += skipped.map_err(|error| failed(self, error))?;
        } else if !is_ended && progress.next + read < split.end {
            let size = progress.next + read;
            let message = format!(
                "{}: it ends at byte {size}, but had {} bytes when the job started",
                self.path(&split),
                self.file(&split)?.size
            );
            return Err(input_changed(message));
        }
        if is_ended {
            self.line.pop();
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
        }
        self.set_progress(Progress { next: progress.next + read, ..progress });
        Ok(if is_too_long { Line::TooLong } else { Line::Whole })
    }

    /// Makes sure that what was read of the open split is what its file has there: it may have been
    /// written to meanwhile. Notes the checksum.
    fn check_open(&mut self) -> Result<(), FailureCause> {
        let (Some(split), Some(progress)) = (self.position.rest.front().copied(), self.progress())
        else {
            return Ok(());
        };
        let Some(open) = &self.open else { return Ok(()) };
        let path = self.path(&split);
        let failed = |error: std::io::Error| environment(Path::new(&path), error);
        let file = open.reader.get_ref();
        let known = self.file(&split)?;
        let touched = known.touched(file).map_err(failed)?;
        let (from, recent) = &open.recent;
        let mut whole = open.checksum.clone();
        whole.combine(recent);
        let mut is_compared = touched.is_none();
        if let Some(stamp) = &touched
            && known.has_only_grown(file, stamp).map_err(failed)?
        {
            // What was read before was compared before.
            let found = checksum(file, *from, progress.next).map_err(failed)?;
            is_compared = found == Some(recent.clone().finalize());
        }
        self.set_progress(Progress { checksum: whole.clone().finalize(), ..progress });
        if !is_compared && let Some(open) = &self.open {
            let file = open.reader.get_ref();
            self.plan.compare(&self.position, split.file, file).map_err(changed)?;
        }
        if let Some(open) = &mut self.open {
            open.checksum = whole;
            open.recent = (progress.next, crc32fast::Hasher::new());
        }
        touched.into_iter().for_each(|stamp| self.renew(split.file, stamp));
        Ok(())
    }

    fn end_split(&mut self) -> Result<(), FailureCause> {
        self.check_open()?;
        self.open = None;
        if let Some(split) = self.position.rest.pop_front() {
            match self.position.rest.iter().any(|other| other.file == split.file) {
                true => self.position.done.extend(split.progress.map(|read| (split.file, read))),
                false => self.position.forget_read(),
            }
        }
        Ok(())
    }

    /// Where a line begins, for people.
    fn place_of(&mut self, offset: u64) -> (String, u64) {
        let Some(split) = self.position.rest.front().copied() else { return Default::default() };
        let line = self.open.as_ref().map_or(0, |open| {
            self.lines.line_of(split.file, open.reader.get_ref(), offset).unwrap_or(0)
        });
        (self.path(&split), line)
    }

    /// What becomes of a line that cannot be used.
    fn on_bad_line(
        &mut self,
        offset: u64,
        what: &str,
        letters: &mut Batch,
    ) -> Result<(), FailureCause> {
        if self.plan.spec.on_bad_record == OnBadRecord::Skip {
            return Ok(());
        }
        let (file, line) = self.place_of(offset);
        if self.plan.spec.on_bad_record == OnBadRecord::Fail {
            let place = format!("line {line} of {file} (byte {offset})");
            return Err(bad_record(&place, &format!("{what}: {}", shown(&self.line))));
        }
        let mut letter = serde_json::Map::new();
        match std::str::from_utf8(&self.line) {
            Ok(text) => letter.insert("value".to_owned(), text.into()),
            Err(_) => {
                use base64::{Engine, prelude::BASE64_STANDARD};
                let text = BASE64_STANDARD.encode(&self.line);
                letter.insert("value_base64".to_owned(), text.into())
            }
        };
        letter.extend([
            ("source".to_owned(), Value::from(self.plan.name.as_str())),
            ("file".to_owned(), Value::from(file)),
            ("line".to_owned(), json!(line)),
            ("offset".to_owned(), json!(offset)),
            ("class".to_owned(), Value::from("rejected")),
            ("message".to_owned(), Value::from(what)),
        ]);
        let value = Value::Object(letter).to_string();
        letters.push(RecordRef { key: None, value: value.as_bytes(), timestamp: None });
        Ok(())
    }

    fn push_line(&mut self, batch: &mut Batch, fields: &Fields) {
        self.position.latest = self.position.latest.max(fields.timestamp);
        batch.push(RecordRef {
            key: fields.key.as_deref(),
            value: &self.line,
            timestamp: fields.timestamp,
        });
    }
}

impl BlockingSource for FileSource {
    fn read(&mut self) -> Result<ReadOutcome, FailureCause> {
        let allowed = match self.pace.allowance() {
            Ok(allowed) => allowed.min(BATCH_RECORDS_MAX as u64) as usize,
            Err(wait) => return Ok(ReadOutcome::Wait(wait)),
        };
        let (mut batch, mut letters, mut bad) = (Batch::empty(), Batch::empty(), 0);
        let is_text = self.plan.spec.format == LineFormat::Text;
        while batch.record_count() + bad < allowed
            && batch.byte_count() + letters.byte_count() < BATCH_BYTES_MAX
        {
            if self.open.is_none() && !self.open_split()? {
                break;
            }
            let offset = self.progress().map_or(0, |progress| progress.next);
            let fields = match self.read_line()? {
                Line::End => {
                    self.end_split()?;
                    continue;
                }
                // An empty line is neither a document nor a row, but a file may well end with one.
                Line::Whole if !is_text && self.line.is_empty() => continue,
                Line::Whole => match &self.open {
                    Some(open) => open.fields.read(&self.line),
                    None => continue,
                },
                Line::TooLong => {
                    let bytes_max = self.plan.spec.record_bytes_max;
                    Err(format!("it is longer than {bytes_max} bytes (`max-record-size`)"))
                }
            };
            match fields {
                Ok(fields) => self.push_line(&mut batch, &fields),
                Err(what) => {
                    bad += 1;
                    self.on_bad_line(offset, &what, &mut letters)?;
                }
            }
        }
        if batch.value_ends.is_empty() && bad == 0 {
            return Ok(ReadOutcome::Step(Step::End));
        }
        self.pace.give(batch.record_count() + bad);
        let lag = i64::try_from(self.plan.spec.out_of_orderness_ms).unwrap_or(i64::MAX);
        // Records as late as that may still come, and of the latest time, too.
        let watermark = self.position.latest.map(|at| at.saturating_sub(lag).saturating_sub(1));
        let letters = (0 < letters.record_count()).then(|| Box::new(letters));
        Ok(ReadOutcome::Step(Step::Records { batch, letters, bad: bad as u64, watermark }))
    }

    fn position(&mut self) -> Result<Vec<u8>, FailureCause> {
        self.check_open()?;
        postcard::to_stdvec(&self.position).map_err(|error| FailureCause::HostBug {
            message: format!("encode the position of a source: {error}"),
        })
    }
}

fn unreadable_position(error: impl std::fmt::Display) -> FailureCause {
    unreadable("position of a source", error)
}

fn environment(path: &Path, error: std::io::Error) -> FailureCause {
    FailureCause::Environment(unreadable_now(path, error))
}

fn changed(why: Changed) -> FailureCause {
    why.into_cause(Obstacle::InputChanged)
}

fn input_changed(message: String) -> FailureCause {
    FailureCause::Permanent { obstacle: Obstacle::InputChanged, message }
}

fn bad_record(place: &str, what: &str) -> FailureCause {
    let message = format!("{place}: {what}");
    FailureCause::Permanent { obstacle: Obstacle::BadRecord, message }
}

/// Reads up to and including the next line's end; gives the number of bytes.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
    skip_line_with(reader, |_| {})
}

fn skip_line_with(reader: &mut impl BufRead, mut each: impl FnMut(&[u8])) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(skipped);
        }
        let (len, is_end) = match memchr::memchr(b'\n', buffer) {
            Some(at) => (at + 1, true),
            None => (buffer.len(), false),
        };
        each(&buffer[..len]);
        reader.consume(len);
        skipped += len as u64;
        if is_end {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests;
