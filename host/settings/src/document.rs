//! The documents that settings are read from, with the mistakes that were found in them.

use std::{cell::RefCell, ops::Range, path::Path};

use toml::de::DeTable;

use crate::problem::{Code, Place, Problem};
type Result<T> = std::result::Result<T, Problem>;

/// The texts that settings come from. Spans go through all of them, one behind the other.
#[derive(Debug)]
pub struct Document<'a> {
    files: Vec<File<'a>>,
    /// Every setting that was read, in the order of reading.
    pub(super) effective: RefCell<Vec<Effective>>,
    /// What is wrong, with the key that it was found at.
    pub(super) mistakes: RefCell<Vec<(String, Problem)>>,
}

/// A setting as it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// Its whole key. Of a node it begins with kind and name: `operator.count.snapshot`.
    pub key: String,
    /// Its value, for people.
    pub value: String,
    /// Where it was set; `None`: nowhere.
    pub place: Option<String>,
}

#[derive(Debug)]
struct File<'a> {
    path: &'a Path,
    text: &'a str,
    /// Whether its lines are those of the file that people see.
    has_lines: bool,
    /// Where its spans begin.
    start: usize,
    /// Where each of its lines begins.
    lines: Vec<usize>,
}

/// So many mistakes are noted: the rest mostly follows from them, and nobody reads them all.
pub(super) const MISTAKES_MAX: usize = 100;

/// Of a line that is longer than this, only what is around the place is shown.
const LINE_BYTES_MAX: usize = 200;

impl<'a> Document<'a> {
    /// The document that `text` is; `path` is what messages call it.
    #[must_use]
    pub fn new(path: &'a Path, text: &'a str) -> Self {
        let file = File { path, text, has_lines: true, start: 0, lines: line_starts(text) };
        Self { files: vec![file], effective: RefCell::default(), mistakes: RefCell::default() }
    }

    /// Adds a file behind the others; gives where its spans begin.
    pub fn add(&mut self, path: &'a Path, text: &'a str, has_lines: bool) -> usize {
        let start = self.files.iter().map(|file| file.start + file.text.len() + 1).max();
        let start = start.unwrap_or(0);
        self.files.push(File { path, text, has_lines, start, lines: line_starts(text) });
        start
    }

    /// Parses the TOML of one of its files, whose spans begin at `start`.
    ///
    /// # Errors
    /// Where it is not TOML.
    pub fn parse<'t>(&self, text: &'t str, start: usize) -> Result<DeTable<'t>> {
        DeTable::parse(text).map(toml::Spanned::into_inner).map_err(|error| {
            let span = error.span().map_or(start..start, |span| shifted(span, start));
            self.problem(Code::ManifestSyntax, &span, format!("not TOML: {}", error.message()))
        })
    }

    /// Every setting that was read, as it counts, in the order of reading.
    #[must_use]
    pub fn effective(&self) -> Vec<Effective> {
        self.effective.borrow().clone()
    }

    /// Changes what counts of a setting that was read: it follows from others. What was not read is added.
    pub fn amend(&self, key: &str, value: impl Into<String>) {
        let (mut effective, value) = (self.effective.borrow_mut(), value.into());
        match effective.iter_mut().find(|known| known.key == key) {
            Some(known) => known.value = value,
            None => {
                // Behind the others of its node, or of its table.
                let parent = key.rsplit_once('.').map_or("", |(parent, _)| parent);
                let is_beside = |known: &Effective| {
                    known.key.strip_prefix(parent).is_some_and(|rest| rest.starts_with('.'))
                };
                let last = effective.iter().rposition(is_beside);
                let index = last.map_or(effective.len(), |last| last + 1);
                effective.insert(index, Effective { key: key.to_owned(), value, place: None });
            }
        }
    }

    /// Forgets settings that do not count, such as those of a strategy that was not chosen.
    pub fn forget(&self, is_meant: impl Fn(&str) -> bool) {
        self.effective.borrow_mut().retain(|known| !is_meant(&known.key));
    }

    /// What was read, if it could be: what is wrong with it is noted, and reading continues.
    pub fn noted<T>(&self, read: Result<T>) -> Option<T> {
        match read {
            Ok(read) => Some(read),
            Err(problem) => {
                self.mistake(problem);
                None
            }
        }
    }

    /// Notes a mistake; reading continues.
    pub fn mistake(&self, problem: Problem) {
        // A key is not missed where its value was wrong.
        let mut mistakes = self.mistakes.borrow_mut();
        if !problem.message.is_empty() && mistakes.len() < MISTAKES_MAX {
            mistakes.push((String::new(), problem));
        }
    }

    /// All that is wrong so far, as one problem.
    ///
    /// # Errors
    /// If anything is.
    pub fn mistakes(&self) -> Result<()> {
        let mut problems: Vec<Problem> =
            self.mistakes.take().into_iter().map(|(_, problem)| problem).collect();
        // In the order of the document; what has no place comes last.
        problems.sort_by_key(|problem| {
            let place = problem.place.as_ref();
            place.map_or((true, 0, 0), |place| {
                (false, place.line.unwrap_or(usize::MAX), place.marked.start)
            })
        });
        Problem::all(problems).map_or(Ok(()), Err)
    }

    pub(super) fn has_mistake(&self, key: &str) -> bool {
        self.mistakes.borrow().iter().any(|(known, _)| known == key)
    }

    /// A problem at a place in the text.
    pub fn problem(&self, code: Code, span: &Range<usize>, message: impl Into<String>) -> Problem {
        let problem = Problem::new(code, message);
        match self.located(span) {
            Some(place) => problem.at(place),
            None => problem,
        }
    }

    fn located(&self, span: &Range<usize>) -> Option<Place> {
        let file = self.files.iter().rev().find(|file| file.start <= span.start)?;
        let at = (span.start - file.start).min(file.text.len());
        let line = file.lines.partition_point(|start| *start <= at);
        let line_start = line.checked_sub(1).and_then(|line| file.lines.get(line)).copied()?;
        let line_end = file.lines.get(line).map_or(file.text.len(), |next| next - 1);
        let whole = file.text[line_start..line_end].trim_end();
        let from = (at - line_start).min(whole.len());
        let to = (span.end - file.start).saturating_sub(line_start).clamp(from, whole.len());
        let shown = window(whole, from);
        let mark = |at: usize| at.clamp(shown.start, shown.end) - shown.start;
        Some(Place {
            path: file.path.display().to_string(),
            line: file.has_lines.then_some(line),
            column: whole[..from].chars().count() + 1,
            marked: mark(from)..mark(to),
            text: whole[shown].to_owned(),
        })
    }

    /// A place in the text, with its line.
    #[must_use]
    pub fn place(&self, span: &Range<usize>) -> String {
        self.located(span).map_or_else(String::new, |place| place.to_string())
    }
}

/// Where the lines of a text begin.
fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
}

/// The part of a line that is shown: all of it, or what is around a place in it.
fn window(line: &str, at: usize) -> Range<usize> {
    if line.len() <= LINE_BYTES_MAX {
        return 0..line.len();
    }
    let start = line.floor_char_boundary(at.saturating_sub(LINE_BYTES_MAX / 2));
    start..line.floor_char_boundary((start + LINE_BYTES_MAX).min(line.len()))
}

pub(super) fn shifted(span: Range<usize>, by: usize) -> Range<usize> {
    span.start + by..span.end + by
}
