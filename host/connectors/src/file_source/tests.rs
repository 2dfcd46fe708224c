//! What a position promises, case by case.

use std::path::PathBuf;

use cofferdam_files::Grants;
use proptest::prelude::*;

use super::{spec::TimeFormat, *};

/// A source of text, one split a file unless somebody says otherwise.
fn spec(format: LineFormat) -> FileSourceSpec {
    FileSourceSpec {
        path: "*.txt".to_owned(),
        format,
        key: (format == LineFormat::Json).then(|| "/id".to_owned()),
        timestamp: (format == LineFormat::Json).then(|| "/at".to_owned()),
        timestamp_format: TimeFormat::Millis,
        out_of_orderness_ms: 0,
        idle_timeout_ms: None,
        has_header: format == LineFormat::Csv,
        delimiter: b',',
        record_bytes_max: 16 << 20,
        on_bad_record: OnBadRecord::Fail,
        split_bytes: 1 << 20,
        rate: None,
    }
}

fn node<'a>(name: &'a str, base_dir: &'a Path, grants: &'a Grants) -> NodeContext<'a> {
    NodeContext { name, base_dir, grants }
}

fn planned(dir: &Path, spec: &FileSourceSpec) -> Arc<FilePlan> {
    Arc::new(FilePlan::new(node("lines", dir, &Grants::default()), spec).expect("files"))
}

fn plan(dir: &Path, split_bytes: u64, format: LineFormat) -> Arc<FilePlan> {
    planned(dir, &FileSourceSpec { split_bytes, ..spec(format) })
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("written");
    path
}

fn numbers(range: std::ops::Range<u32>) -> String {
    range.map(|n| format!("line {n:06}\n")).collect()
}

/// One step: the records, or none at the end.
fn step(source: &mut FileSource) -> Vec<String> {
    match source.read().expect("reads") {
        ReadOutcome::Step(Step::Records { batch, .. }) => texts(&batch),
        ReadOutcome::Step(Step::End) => Vec::new(),
        other => panic!("nothing is to be waited for: {other:?}"),
    }
}

fn texts(batch: &Batch) -> Vec<String> {
    batch.records().map(|record| String::from_utf8_lossy(record.value).into_owned()).collect()
}

fn rest(mut source: FileSource) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        match step(&mut source) {
            lines if lines.is_empty() => return all,
            lines => all.extend(lines),
        }
    }
}

fn position(source: &mut FileSource) -> Vec<u8> {
    source.position().expect("a position")
}

/// Every line that a task reads; with `stop`, restored from its position after that many steps.
fn lines(plan: &Arc<FilePlan>, index: u32, parallelism: u32) -> Vec<String> {
    let mut out = Vec::new();
    let mut source = FileSource::open(plan, index, parallelism, None).expect("opens");
    while let ReadOutcome::Step(Step::Records { batch, .. }) = source.read().expect("reads") {
        out.extend(
            batch.records().map(|record| String::from_utf8_lossy(record.value).into_owned()),
        );
        let position = position(&mut source);
        source = FileSource::open(plan, index, parallelism, Some(&position)).expect("opens");
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

/// A task in the middle of a file of 3,000 lines, with its position.
fn half_way(dir: &Path) -> (Arc<FilePlan>, PathBuf, FileSource, Vec<u8>) {
    let path = write(dir, "a.txt", &numbers(0..3_000));
    let plan = plan(dir, 4096, LineFormat::Text);
    let mut source = FileSource::open(&plan, 0, 1, None).expect("opens");
    assert_eq!(step(&mut source).len(), BATCH_RECORDS_MAX);
    let position = position(&mut source);
    (plan, path, source, position)
}

fn input_is_other(cause: Option<FailureCause>) -> String {
    match cause {
        Some(FailureCause::Permanent { obstacle: Obstacle::InputChanged, message }) => message,
        other => panic!("{other:?}"),
    }
}

/// What copytruncate does: the end of the file was taken for its end, and 45,552 of 60,010 records
/// came, one of them glued together from two halves.
#[test]
fn a_file_that_is_truncated_while_it_is_read_is_an_error_and_not_its_end() {
    let dir = tempfile::tempdir().expect("a directory");
    for text in ["", "line 9\n"] {
        let (_, path, mut source, _) = half_way(dir.path());
        std::fs::write(&path, text).expect("truncated");
        let mut cause = None;
        while cause.is_none() {
            match source.read() {
                Ok(ReadOutcome::Step(Step::Records { .. })) => {}
                Ok(_) => panic!("it is not over"),
                Err(error) => cause = Some(error),
            }
        }
        let message = input_is_other(cause);
        assert!(message.contains("a.txt"), "{message}");
    }
}

#[test]
fn no_position_is_given_out_for_bytes_that_are_not_there_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_, path, mut source, _) = half_way(dir.path());
    // As long as before, and other lines.
    std::fs::write(&path, numbers(5_000..8_000)).expect("written over");
    let message = input_is_other(source.position().err());
    assert!(message.contains("have changed since they were read"), "{message}");
}

/// Names and sizes were all that was compared: 42,845 records came of one file, 157,155 of the other.
#[test]
fn a_file_that_was_replaced_by_another_of_the_same_size_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_, path, _, position) = half_way(dir.path());
    let mut text = numbers(0..3_000).into_bytes();
    for (place, what) in
        [(0, "changed"), (9_000, "have changed since they were read"), (35_900, "changed")]
    {
        let before = std::mem::replace(&mut text[place], b'#');
        std::fs::write(&path, &text).expect("replaced");
        text[place] = before;
        let plan = plan(dir.path(), 4096, LineFormat::Text);
        let problem = plan.check_positions(&[&position]).expect_err("it is another file");
        assert_eq!(problem.code, Code::InputChanged);
        assert!(problem.details[0].contains("a.txt"), "{problem}");
        assert!(problem.details[0].contains(what), "{problem}");
        let mut source = FileSource::open(&plan, 0, 1, Some(&position)).expect("opens");
        input_is_other(source.read().err());
    }
}

/// Whatever does not concern the bytes that a position speaks of.
#[test]
fn positions_hold_wherever_the_files_lie_and_whatever_else_comes() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = dir.path().join("first [x]");
    std::fs::create_dir(&first).expect("made");
    write(&first, "0.txt", "read before the rest\n");
    let (_, path, source, _) = {
        let (plan, path, mut source, _) = half_way(&first);
        let position = position(&mut source);
        (plan, path, source, position)
    };
    let mut source = source;
    let at = position(&mut source);
    let expected = rest(source);
    assert_eq!(expected.len(), 3_001 - BATCH_RECORDS_MAX);
    // A log that grows, a new file, and one that was read and removed.
    let mut text = std::fs::read_to_string(&path).expect("there");
    text.push_str("what came later\n");
    std::fs::write(&path, text).expect("grown");
    write(&first, "b.txt", "new\n");
    std::fs::remove_file(first.join("0.txt")).expect("removed");
    let second = dir.path().join("second");
    std::fs::rename(&first, &second).expect("moved");
    for (base, pattern) in [
        (second.clone(), "*.txt".to_owned()),
        (second.join("../second/."), "./*.txt".to_owned()),
        (dir.path().to_owned(), second.join("*.txt").display().to_string()),
    ] {
        let plan = planned(
            &base,
            &FileSourceSpec { path: pattern, split_bytes: 99_999, ..spec(LineFormat::Text) },
        );
        let warnings = plan.check_positions(&[&at]).expect("they are the same");
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("b.txt") && warnings[1].contains("a.txt"), "{warnings:?}");
        let source = FileSource::open(&plan, 0, 1, Some(&at)).expect("opens");
        assert_eq!(rest(source), expected);
    }
}

#[test]
fn a_stranger_beside_the_directory_is_not_read() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["a*", "ab"] {
        std::fs::create_dir(dir.path().join(name)).expect("made");
        write(&dir.path().join(name), "x.txt", name);
    }
    let plan = plan(&dir.path().join("a*"), 4096, LineFormat::Text);
    assert_eq!(lines(&plan, 0, 1), ["a*"]);
}

#[test]
fn a_pipe_is_refused_whether_alone_or_among_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let pipe = dir.path().join("b.txt");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("runs mkfifo");
    assert!(made.success());
    std::fs::create_dir(dir.path().join("c.txt")).expect("a directory");
    for (path, is_refused) in [("b.txt", true), ("*.txt", true), ("-", true), ("[ac].txt", false)] {
        std::fs::write(dir.path().join("a.txt"), "one\n").expect("written");
        let plan = FilePlan::new(
            node("s", dir.path(), &Grants::default()),
            &FileSourceSpec { path: path.to_owned(), ..spec(LineFormat::Text) },
        );
        let checked = plan.expect("listed").check_fresh();
        assert_eq!(checked.is_err(), is_refused, "{path}: {checked:?}");
    }
}

#[test]
fn what_is_left_is_dealt_out_in_order() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), "a.txt", &numbers(0..20_000));
    let plan = plan(dir.path(), 8192, LineFormat::Text);
    let mut read = Vec::new();
    let mut run = |positions: Vec<Option<Vec<u8>>>, is_last: bool| -> Vec<Vec<u8>> {
        let parallelism = positions.len() as u32;
        (0..)
            .zip(positions)
            .map(|(index, at)| {
                let mut source =
                    FileSource::open(&plan, index, parallelism, at.as_deref()).expect("opens");
                let mut own = Vec::new();
                for _ in 0..if is_last { usize::MAX } else { 2 + index as usize } {
                    match step(&mut source) {
                        lines if lines.is_empty() => break,
                        lines => own.extend(lines),
                    }
                }
                assert!(own.is_sorted(), "sorted input stays sorted at each task");
                read.extend(own);
                position(&mut source)
            })
            .collect()
    };
    let mut positions = run(vec![None; 2], false);
    for (parallelism, is_last) in [(5, false), (3, false), (1, true)] {
        let old: Vec<&[u8]> = positions.iter().map(Vec::as_slice).collect();
        let shared = share(&old, parallelism).expect("shared");
        positions = run(shared.into_iter().map(Some).collect(), is_last);
    }
    read.sort();
    assert!(read.iter().map(|line| format!("{line}\n")).collect::<String>() == numbers(0..20_000));
}

fn records(plan: &Arc<FilePlan>) -> Result<(Batch, Batch, Option<i64>), FailureCause> {
    match FileSource::open(plan, 0, 1, None).expect("opens").read()? {
        ReadOutcome::Step(Step::Records { batch, letters, watermark, .. }) => {
            Ok((batch, letters.map_or_else(Batch::empty, |letters| *letters), watermark))
        }
        _ => panic!("records"),
    }
}

#[test]
fn json_lines_have_keys_and_times_and_bad_ones_are_refused_with_their_place() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), "a.txt", "{\"id\":\"x\",\"at\":5}\n{\"id\":7,\"at\":6}\n\n");
    let (batch, _, watermark) =
        records(&plan(dir.path(), 1 << 20, LineFormat::Json)).expect("records");
    let keys: Vec<_> = batch.records().map(|record| (record.key, record.timestamp)).collect();
    assert_eq!(keys, [(Some(b"x".as_slice()), Some(5)), (Some(b"7".as_slice()), Some(6))]);
    // Another record of that time may still come.
    assert_eq!(watermark, Some(5));
    for (text, what) in
        [("{", "not JSON"), ("{\"at\":1}", "no /id"), ("{\"id\":1,\"at\":\"x\"}", "milliseconds")]
    {
        write(dir.path(), "a.txt", &format!("{{\"id\":1,\"at\":1}}\n{text}"));
        let error = records(&plan(dir.path(), 1 << 20, LineFormat::Json)).expect_err("refused");
        let is_bad = matches!(error, FailureCause::Permanent { obstacle: Obstacle::BadRecord, .. });
        let message = error.to_string();
        assert!(is_bad && message.contains(what), "{message}");
        assert!(message.contains("line 2 of ") && message.contains("a.txt (byte 16)"), "{message}");
        assert!(message.contains(text.get(..1).expect("a character")), "{message}");
    }
}

#[test]
fn bad_records_are_skipped_or_become_letters_and_the_good_ones_stay() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = format!("good 1\n{}\nbad\ngood 2\n", "x".repeat(9_000));
    write(dir.path(), "a.txt", &text);
    for policy in [OnBadRecord::Skip, OnBadRecord::DeadLetter] {
        let spec = FileSourceSpec {
            key: Some("^good (.)".to_owned()),
            record_bytes_max: 100,
            on_bad_record: policy,
            ..spec(LineFormat::Text)
        };
        let (batch, letters, _) = records(&planned(dir.path(), &spec)).expect("records");
        let keys: Vec<_> = batch.records().filter_map(|record| record.key).collect();
        assert_eq!(keys, [b"1", b"2"]);
        let letters: Vec<Value> = letters
            .records()
            .map(|letter| serde_json::from_slice(letter.value).expect("JSON"))
            .collect();
        if policy == OnBadRecord::Skip {
            assert!(letters.is_empty());
            continue;
        }
        let places: Vec<_> = letters.iter().map(|it| (&it["line"], &it["offset"])).collect();
        assert_eq!(places, [(&json!(2), &json!(7)), (&json!(3), &json!(9_008))]);
        assert_eq!(letters[0]["value"], json!("x".repeat(101)));
        assert!(letters[0]["message"].to_string().contains("max-record-size"), "{letters:?}");
        assert_eq!(letters[1]["value"], json!("bad"));
    }
}

#[test]
fn rows_have_keys_and_times_by_the_names_of_their_columns() {
    let dir = tempfile::tempdir().expect("a directory");
    write(
        dir.path(),
        "a.txt",
        "id,\"time, local\",value\r\nx,2013-01-01 05:00:00,1\r\n\"y\"\"\",2013-01-01 05:00:01,2\r\n",
    );
    write(dir.path(), "b.txt", "\"time, local\",id\n2013-01-01 04:00:00,z\n");
    let spec = FileSourceSpec {
        key: Some("id".to_owned()),
        timestamp: Some("time, local".to_owned()),
        timestamp_format: TimeFormat::Pattern("%Y-%m-%d %H:%M:%S".to_owned()),
        out_of_orderness_ms: 3_600_000,
        split_bytes: 20,
        ..spec(LineFormat::Csv)
    };
    let (batch, _, watermark) = records(&planned(dir.path(), &spec)).expect("records");
    let found: Vec<_> = batch.records().map(|it| (it.key, it.timestamp)).collect();
    let base = 1_357_016_400_000;
    assert_eq!(
        found,
        [
            (Some(b"x".as_slice()), Some(base)),
            (Some(b"y\"".as_slice()), Some(base + 1_000)),
            (Some(b"z".as_slice()), Some(base - 3_600_000)),
        ]
    );
    assert_eq!(watermark, Some(base + 1_000 - 3_600_000 - 1));
    let error =
        records(&planned(dir.path(), &FileSourceSpec { key: Some("no".to_owned()), ..spec }))
            .expect_err("no such column");
    assert!(error.to_string().contains("there is no column \"no\""), "{error}");
}

/// A writer that sets the time back, as `cp -p` and `rsync --inplace -t` do.
#[test]
fn a_file_that_was_written_over_with_its_time_set_back_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (plan, path, _, position) = half_way(dir.path());
    let time = std::fs::metadata(&path).expect("a file").modified().expect("a time");
    let mut text = numbers(0..3_000).into_bytes();
    text[9_000] = b'X';
    let file = File::options().write(true).open(&path).expect("opens");
    std::os::unix::fs::FileExt::write_all_at(&file, &text, 0).expect("written over");
    file.set_modified(time).expect("set back");
    let mut source = FileSource::open(&plan, 0, 1, Some(&position)).expect("opens");
    let message = input_is_other(source.read().err());
    assert!(message.contains("have changed since they were read"), "{message}");
}

#[test]
fn a_file_that_grows_while_the_job_begins_is_read_as_far_as_it_reached_then() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = write(dir.path(), "a.txt", &(numbers(0..2_000) + "unfinish"));
    let plan = plan(dir.path(), 4096, LineFormat::Text);
    let append = |text: &str| {
        use std::io::Write;
        let mut file = File::options().append(true).open(&path).expect("opens");
        file.write_all(text.as_bytes()).expect("appended");
    };
    append("ed\nmore\n");
    let mut source = FileSource::open(&plan, 0, 1, None).expect("opens");
    let mut read = step(&mut source);
    append("and more\n");
    let position = position(&mut source);
    append("and more\n");
    read.extend(rest(FileSource::open(&plan, 0, 1, Some(&position)).expect("it has only grown")));
    assert_eq!(read.len(), 2_001);
    assert_eq!(read.last().map(String::as_str), Some("unfinish"));
}

#[test]
fn a_byte_order_mark_belongs_to_no_record() {
    let dir = tempfile::tempdir().expect("a directory");
    write(dir.path(), "a.txt", "\u{feff}first\nsecond\n");
    let text = plan(dir.path(), 1 << 20, LineFormat::Text);
    assert_eq!(lines(&text, 0, 1), ["first", "second"]);
    write(dir.path(), "a.txt", "\u{feff}id,at\nx,1\n");
    let columns = FileSourceSpec { key: Some("id".to_owned()), ..spec(LineFormat::Csv) };
    let mut source = FileSource::open(&planned(dir.path(), &columns), 0, 1, None).expect("opens");
    let ReadOutcome::Step(Step::Records { batch, .. }) = source.read().expect("reads") else {
        panic!("a record")
    };
    assert_eq!(batch.records().next().expect("a record").key, Some(&b"x"[..]));
}

#[test]
fn an_integer_that_json_cannot_hold_is_no_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let spec = FileSourceSpec { timestamp: None, ..spec(LineFormat::Json) };
    for (id, is_good) in [
        ("18446744073709551615", true),
        ("18446744073709551616", false),
        ("-9223372036854775808", true),
        ("-92233720368547758080", false),
        ("0.5", true),
    ] {
        write(dir.path(), "a.txt", &format!("{{\"id\":{id}}}\n"));
        let mut source = FileSource::open(&planned(dir.path(), &spec), 0, 1, None).expect("opens");
        assert_eq!(source.read().is_ok(), is_good, "{id}");
    }
}
