//! The names of parts, pending and visible.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use cofferdam_connector::identity::Id;

/// A part's name once it is visible, or `None` for any other file. `part-TASK-CHECKPOINT-NUMBER-WRITER`.
pub(super) fn is_part(name: &str) -> bool {
    let numbers_and_writer = name.strip_prefix("part-").and_then(|rest| rest.rsplit_once('-'));
    numbers_and_writer.is_some_and(|(numbers, writer)| are_numbers(numbers, 3) && is_writer(writer))
}

/// A part as an earlier version has named it.
pub(super) fn is_older_part(name: &str) -> bool {
    name.strip_prefix("part-").is_some_and(|numbers| are_numbers(numbers, 2))
}

/// So many numbers, with `-` between them.
pub(super) fn are_numbers(text: &str, count: usize) -> bool {
    let is_number =
        |piece: &str| !piece.is_empty() && piece.bytes().all(|byte| byte.is_ascii_digit());
    text.split('-').count() == count && text.split('-').all(is_number)
}

pub(super) fn is_writer(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The writer of a part that is not committed: `.part-TASK-NUMBER-WRITER.pending`.
pub(crate) fn writer_of_pending(name: &str) -> Option<(u32, Id)> {
    let mut pieces = name.strip_prefix(".part-")?.strip_suffix(".pending")?.split('-');
    let task = pieces.next()?.parse().ok()?;
    pieces.next()?.parse::<u64>().ok()?;
    let writer = pieces.next().filter(|text| is_writer(text))?.parse().ok()?;
    pieces.next().is_none().then_some((task, writer))
}

pub(super) fn names_in(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
        entries => entries?,
    };
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// A part of the same file as one that is visible in a directory.
pub(crate) fn visible_of(dir: &Path, file: &str) -> Option<PathBuf> {
    let names = names_in(dir).ok()?;
    let is_it = |name: &String| is_part(name) && file_of(name).as_deref() == Some(file);
    names.into_iter().find(is_it).map(|name| dir.join(name))
}

/// What tells the file of a part from all others, by its visible name: task, number and writer.
pub(super) fn file_of(name: &str) -> Option<String> {
    let mut pieces = name.split('-').skip(1);
    let (task, _, number, writer) =
        (pieces.next()?, pieces.next()?, pieces.next()?, pieces.next()?);
    Some(format!("{task}-{number}-{writer}"))
}
