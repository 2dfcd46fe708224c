//! Reads lines of files, in pieces that tasks share, from byte positions.
//!
//! Files are cut into splits. A line belongs to the split in which it begins, so that every line is
//! read once whatever the size of the splits. Which splits there are is found out when the program
//! starts, and a checkpoint remembers it by their number and sizes: files that change under a job
//! are told, not read wrongly.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_core::failure::FailureCause;
use cofferdam_sandbox::Batch;
use serde::{Deserialize, Serialize};

use super::{Source, Step, pace::Pace, unreadable_position};
use crate::{
    batch::{BatchExt, RecordRef},
    exchange::writer::{BATCH_BYTES_MAX, BATCH_RECORDS_MAX},
    problem::{Code, Problem},
    restore::{decode_states, encode_states},
    spec::{FileSourceSpec, LINE_BYTES_MAX, LineFormat},
};

const BUFFER_BYTES: usize = 256 << 10;

#[derive(Debug, Clone)]
pub(crate) struct FilePlan {
    spec: FileSourceSpec,
    splits: Arc<Vec<Split>>,
    /// Names and sizes of all files, and the size of splits, as one number.
    fingerprint: u64,
}

#[derive(Debug)]
struct Split {
    path: PathBuf,
    start: u64,
    end: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Position {
    fingerprint: u64,
    /// The splits that are not done, by number, each with its next byte; 0: its beginning.
    rest: VecDeque<(u32, u64)>,
}

/// Shares the splits that no task has done out among another number of tasks.
pub(super) fn share(old: &[&[u8]], parallelism: usize) -> Result<Vec<Vec<u8>>, String> {
    let mut shares: Vec<Position> = Vec::new();
    let mut place = 0;
    for position in decode_states::<Position>(old)? {
        if shares.is_empty() {
            let fingerprint = position.fingerprint;
            shares = vec![Position { fingerprint, rest: VecDeque::new() }; parallelism];
        }
        for split in position.rest {
            shares[place % parallelism].rest.push_back(split);
            place += 1;
        }
    }
    encode_states(&shares)
}

impl FilePlan {
    pub(crate) fn new(name: &str, spec: &FileSourceSpec, base_dir: &Path) -> Result<Self, Problem> {
        let pattern = base_dir.join(&spec.path);
        let pattern = pattern.to_string_lossy();
        let unreadable = |what: String| Problem::new(Code::SourceUnreadable, what);
        let found = glob::glob(&pattern)
            .map_err(|error| unreadable(format!("source \"{name}\": {error}")))?;
        let mut files: Vec<PathBuf> = found.flatten().filter(|path| path.is_file()).collect();
        files.sort();
        if files.is_empty() {
            return Err(unreadable(format!("source \"{name}\" has nothing to read"))
                .detail(format!("no file matches {pattern}"))
                .hint("relative paths begin at the manifest's directory"));
        }
        let mut splits = Vec::new();
        let mut names = String::new();
        for path in files {
            let size = File::open(&path).and_then(|file| file.metadata()).map_err(|error| {
                unreadable(format!("source \"{name}\" cannot read {}", path.display()))
                    .detail(error)
            })?;
            let size = size.len();
            names.push_str(&format!("{}\0{size}\0", path.display()));
            let mut start = 0;
            while start < size {
                let end = size.min(start + spec.split_bytes);
                splits.push(Split { path: path.clone(), start, end });
                start = end;
            }
        }
        // Positions name splits by number.
        names.push_str(&spec.split_bytes.to_string());
        let fingerprint = twox_hash::XxHash3_64::oneshot(names.as_bytes());
        Ok(Self { spec: spec.clone(), splits: Arc::new(splits), fingerprint })
    }
}

pub(crate) struct FileSource {
    plan: FilePlan,
    position: Position,
    reader: Option<BufReader<File>>,
    line: Vec<u8>,
    pace: Pace,
}

impl FileSource {
    pub(crate) fn open(
        plan: &FilePlan,
        index: u32,
        parallelism: u32,
        position: Option<&[u8]>,
    ) -> Result<Self, FailureCause> {
        let position: Position = match position {
            Some(bytes) => postcard::from_bytes(bytes).map_err(unreadable_position)?,
            None => {
                let all = 0..plan.splits.len() as u32;
                let own = all.skip(index as usize).step_by(parallelism as usize);
                let rest = own.map(|split| (split, 0)).collect();
                Position { fingerprint: plan.fingerprint, rest }
            }
        };
        if position.fingerprint != plan.fingerprint {
            let message = format!(
                "the files of {} are not those of the checkpoint (their names or sizes, or split-size, have changed)",
                plan.spec.path
            );
            return Err(FailureCause::Permanent { message });
        }
        let pace = Pace::new(plan.spec.rate, parallelism);
        Ok(Self { plan: plan.clone(), position, reader: None, line: Vec::new(), pace })
    }

    /// The split that is being read.
    fn split(&self) -> Option<&Split> {
        let (number, _) = self.position.rest.front()?;
        self.plan.splits.get(*number as usize)
    }

    /// The next byte of the split that is being read.
    fn offset(&self) -> u64 {
        self.position.rest.front().map_or(0, |(_, offset)| *offset)
    }

    fn set_offset(&mut self, offset: u64) {
        if let Some((_, next)) = self.position.rest.front_mut() {
            *next = offset;
        }
    }

    /// Opens the split where the position says; a line that began before it is not its own.
    fn open_split(&mut self) -> Result<bool, FailureCause> {
        let Some(split) = self.split() else { return Ok(false) };
        let failed = |error: std::io::Error| environment(&split.path, &error);
        let offset = split.start.max(self.offset());
        let mut reader =
            BufReader::with_capacity(BUFFER_BYTES, File::open(&split.path).map_err(failed)?);
        let mut at = offset;
        if offset == split.start && 0 < offset {
            reader.seek(SeekFrom::Start(offset - 1)).map_err(failed)?;
            at = offset - 1;
            at += skip_line(&mut reader).map_err(failed)?;
        } else {
            reader.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        self.set_offset(at);
        self.reader = Some(reader);
        Ok(true)
    }

    /// Reads one line into `self.line`, without its end; false at the end of the split.
    fn read_line(&mut self) -> Result<bool, FailureCause> {
        let Some(split) = self.split() else { return Ok(false) };
        if split.end <= self.offset() {
            return Ok(false);
        }
        let path = split.path.clone();
        let Some(reader) = &mut self.reader else { return Ok(false) };
        self.line.clear();
        let mut limited = std::io::Read::take(&mut *reader, LINE_BYTES_MAX as u64 + 1);
        let read = limited
            .read_until(b'\n', &mut self.line)
            .map_err(|error| environment(&path, &error))?;
        if LINE_BYTES_MAX < self.line.len() && self.line.last() != Some(&b'\n') {
            let message = format!(
                "a line longer than {LINE_BYTES_MAX} bytes begins at byte {} of {}",
                self.offset(),
                path.display()
            );
            return Err(FailureCause::Permanent { message });
        }
        self.set_offset(self.offset() + read as u64);
        if self.line.last() == Some(&b'\n') {
            self.line.pop();
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
        }
        Ok(0 < read)
    }

    fn push_line(&self, batch: &mut Batch, latest: &mut Option<i64>) -> Result<(), FailureCause> {
        if self.plan.spec.format == LineFormat::Text {
            batch.push(RecordRef { key: None, value: &self.line, timestamp: None });
            return Ok(());
        }
        let rejected = |what: String| {
            let place =
                self.split().map_or(String::new(), |split| split.path.display().to_string());
            let message = format!("{what}, in the line before byte {} of {place}", self.offset());
            FailureCause::Rejected { message }
        };
        let document: serde_json::Value = serde_json::from_slice(&self.line)
            .map_err(|error| rejected(format!("not JSON: {error}")))?;
        let field = |pointer: &str| {
            document.pointer(pointer).ok_or_else(|| rejected(format!("there is no {pointer}")))
        };
        let key = match &self.plan.spec.key {
            Some(pointer) => Some(match field(pointer)? {
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            }),
            None => None,
        };
        let timestamp = match &self.plan.spec.timestamp {
            Some(pointer) => {
                let number = field(pointer)?.as_i64();
                Some(number.ok_or_else(|| {
                    rejected(format!("{pointer} is no whole number of milliseconds"))
                })?)
            }
            None => None,
        };
        *latest = (*latest).max(timestamp);
        batch.push(RecordRef {
            key: key.as_ref().map(String::as_bytes),
            value: &self.line,
            timestamp,
        });
        Ok(())
    }
}

impl Source for FileSource {
    fn next(&mut self) -> Result<Step, FailureCause> {
        let allowed = match self.pace.allowance() {
            Ok(allowed) => allowed.min(BATCH_RECORDS_MAX as u64) as usize,
            Err(wait) => return Ok(Step::Wait(wait)),
        };
        let mut batch = Batch::empty();
        let mut latest = None;
        while batch.record_count() < allowed && batch.byte_count() < BATCH_BYTES_MAX {
            if self.reader.is_none() && !self.open_split()? {
                break;
            }
            if self.read_line()? {
                // An empty line is no JSON document, but a file may well end with one.
                if !(self.line.is_empty() && self.plan.spec.format == LineFormat::Json) {
                    self.push_line(&mut batch, &mut latest)?;
                }
            } else {
                self.reader = None;
                self.position.rest.pop_front();
            }
        }
        if batch.value_ends.is_empty() {
            return Ok(Step::End);
        }
        self.pace.give(batch.record_count());
        Ok(Step::Records { batch, watermark: latest })
    }

    fn position(&self) -> Vec<u8> {
        postcard::to_stdvec(&self.position).unwrap_or_default()
    }
}

fn environment(path: &Path, error: &std::io::Error) -> FailureCause {
    FailureCause::Environment { message: format!("read {}: {error}", path.display()) }
}

/// Reads up to and including the next line's end; gives the number of bytes.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
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
        reader.consume(len);
        skipped += len as u64;
        if is_end {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(dir: &Path, split_bytes: u64, format: LineFormat) -> FilePlan {
        let spec = FileSourceSpec {
            path: "*.txt".to_owned(),
            format,
            key: (format == LineFormat::Json).then(|| "/id".to_owned()),
            timestamp: (format == LineFormat::Json).then(|| "/at".to_owned()),
            split_bytes,
            rate: None,
        };
        FilePlan::new("lines", &spec, dir).expect("files")
    }

    /// Every line that a task reads; with `stop`, restored from its position after that many steps.
    fn lines(plan: &FilePlan, index: u32, parallelism: u32) -> Vec<String> {
        let mut out = Vec::new();
        let mut source = FileSource::open(plan, index, parallelism, None).expect("opens");
        while let Step::Records { batch, .. } = source.next().expect("reads") {
            out.extend(
                batch.records().map(|record| String::from_utf8_lossy(record.value).into_owned()),
            );
            source = FileSource::open(plan, index, parallelism, Some(&source.position()))
                .expect("opens");
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_line_is_read_once_whatever_the_splits(
            files in proptest::collection::vec("([a-c]{0,5}\n){0,40}[a-c]{0,3}", 1..4),
            split_bytes in 1u64..60,
            parallelism in 1u32..4,
        ) {
            let dir = tempfile::tempdir().expect("a directory");
            let mut expected = Vec::new();
            for (number, text) in files.iter().enumerate() {
                std::fs::write(dir.path().join(format!("{number}.txt")), text).expect("written");
                expected.extend(text.lines().map(str::to_owned));
            }
            let plan = plan(dir.path(), split_bytes, LineFormat::Text);
            let mut read: Vec<String> = (0..parallelism).flat_map(|index| lines(&plan, index, parallelism)).collect();
            read.sort();
            expected.sort();
            prop_assert_eq!(read, expected);
        }
    }

    #[test]
    fn changed_files_are_told() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("a.txt"), "one\ntwo\n").expect("written");
        let before = plan(dir.path(), 1 << 20, LineFormat::Text);
        let position = FileSource::open(&before, 0, 1, None).expect("opens").position();
        std::fs::write(dir.path().join("b.txt"), "three\n").expect("written");
        let after = plan(dir.path(), 1 << 20, LineFormat::Text);
        let error = FileSource::open(&after, 0, 1, Some(&position)).err().expect("refused");
        assert!(matches!(error, FailureCause::Permanent { .. }), "{error}");
    }

    #[test]
    fn json_lines_have_keys_and_times_and_bad_ones_are_rejected_with_their_place() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(
            dir.path().join("a.txt"),
            "{\"id\":\"x\",\"at\":5}\n{\"id\":7,\"at\":6}\n\n",
        )
        .expect("written");
        let mut source = FileSource::open(&plan(dir.path(), 1 << 20, LineFormat::Json), 0, 1, None)
            .expect("opens");
        let Ok(Step::Records { batch, watermark }) = source.next() else { panic!("records") };
        let keys: Vec<_> = batch.records().map(|record| (record.key, record.timestamp)).collect();
        assert_eq!(keys, [(Some(b"x".as_slice()), Some(5)), (Some(b"7".as_slice()), Some(6))]);
        assert_eq!(watermark, Some(6));
        for (text, what) in [
            ("{", "not JSON"),
            ("{\"at\":1}", "no /id"),
            ("{\"id\":1,\"at\":\"x\"}", "whole number"),
        ] {
            std::fs::write(dir.path().join("a.txt"), text).expect("written");
            let mut source =
                FileSource::open(&plan(dir.path(), 1 << 20, LineFormat::Json), 0, 1, None)
                    .expect("opens");
            let error = source.next().err().expect("rejected").to_string();
            assert!(error.contains(what) && error.contains("a.txt"), "{error}");
        }
    }
}
