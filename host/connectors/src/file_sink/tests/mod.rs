//! The life of a part, case by case.

mod places;

use cofferdam_connector::{catalog::Conflicts, identity::Lineage};
use cofferdam_contract::RecordRef;

use super::*;

/// A job's sink in a directory, with a state directory beside it.
struct Setup {
    dir: tempfile::TempDir,
    lineage: Lineage,
    rolling: Rolling,
    conflicts: Conflicts,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (lineage, rolling) = (Lineage::new(), Rolling::default());
        Self { dir, lineage, rolling, conflicts: Conflicts::default() }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// A run begins, from a checkpoint and the states of its tasks, or from the beginning.
    fn run_in(
        &self,
        dir: &Path,
        if_exists: IfExists,
        restored: Option<(u64, &[&[u8]])>,
    ) -> Result<Arc<Output>, Problem> {
        let context = Claimant {
            job: "j".to_owned(),
            lineage: self.lineage.clone(),
            restored: restored.map(|(checkpoint, _)| checkpoint),
            record_dir: Some(self.dir.path().join("state")),
            conflicts: self.conflicts,
            own_parts: names_of(restored.map_or(&[], |(_, states)| states)),
        };
        let mut output = Output::claim("out", dir, if_exists, context, Claim::Take)?;
        let kept = check_states(&output, restored.map_or(&[], |(_, states)| states))?;
        let claimed = BTreeSet::new();
        kept.elsewhere
            .iter()
            .try_for_each(|dir| output.claim_before(dir, &claimed, Claim::Take))?;
        output.begin(if_exists, &kept.names).expect("begins");
        Ok(Arc::new(output))
    }

    fn run(&self, restored: Option<(u64, &[&[u8]])>) -> Result<Arc<Output>, Problem> {
        self.run_in(&self.out(), IfExists::Fail, restored)
    }

    fn open(&self, output: &Arc<Output>, index: u32, state: Option<&[u8]>) -> FileSink {
        self.try_open(output, index, state).expect("opens")
    }

    fn try_open(
        &self,
        output: &Arc<Output>,
        index: u32,
        state: Option<&[u8]>,
    ) -> Result<FileSink, FailureCause> {
        let spec = FileSinkSpec {
            path: self.out(),
            line: LineContent::Value,
            if_exists: IfExists::Fail,
            rolling: self.rolling.clone(),
        };
        FileSink::open(output.clone(), &spec, index, state)
    }
}

fn batch(value: &str) -> Batch {
    let mut batch = Batch::empty();
    batch.push(RecordRef { key: Some(b"k"), value: value.as_bytes(), timestamp: None });
    batch
}

fn write(sink: &mut FileSink, value: &str) {
    sink.write(&batch(value)).expect("written");
}

fn barrier(sink: &mut FileSink, checkpoint: u64, purpose: Purpose) -> Vec<u8> {
    sink.pre_commit(CheckpointId(checkpoint), purpose).expect("durable")
}

fn files(dir: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("listed").flatten();
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| is_wanted(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

fn visible_files(dir: &Path) -> Vec<PathBuf> {
    files(dir, |name| !name.starts_with('.'))
}

/// The lines that a reader sees.
fn visible(dir: &Path) -> Vec<String> {
    let text = |path: &PathBuf| fs::read_to_string(path).expect("readable");
    visible_files(dir)
        .iter()
        .flat_map(|path| text(path).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

fn hidden_count(dir: &Path) -> usize {
    files(dir, |name| name.starts_with(".part-")).len()
}

#[test]
fn nothing_is_visible_before_its_checkpoint_completes() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    assert!(visible(&setup.out()).is_empty());
    barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "two");
    assert!(visible(&setup.out()).is_empty());
    sink.commit(CheckpointId(1)).expect("committed");
    assert_eq!(visible(&setup.out()), ["one"]);
}

#[test]
fn restore_commits_what_the_checkpoint_holds_and_removes_the_rest() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 3, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "two");
    barrier(&mut sink, 2, Purpose::Periodic);
    drop(sink);
    for _ in 0..2 {
        let mut sink = setup.open(&output, 3, Some(&state));
        assert_eq!(visible(&setup.out()), ["one"]);
        assert_eq!(hidden_count(&setup.out()), 0);
        write(&mut sink, "two again");
        barrier(&mut sink, 3, Purpose::Periodic);
    }
}

/// Every restart failed once a loader had moved what was finished.
#[test]
fn what_was_committed_is_the_readers_and_may_be_gone_at_any_time() {
    for is_log_gone in [false, true] {
        let setup = Setup::new();
        let output = setup.run(None).expect("begins");
        let mut sink = setup.open(&output, 0, None);
        write(&mut sink, "one");
        let state = barrier(&mut sink, 1, Purpose::Periodic);
        sink.commit(CheckpointId(1)).expect("committed");
        visible_files(&setup.out()).iter().for_each(|path| fs::remove_file(path).expect("taken"));
        setup.open(&output, 0, Some(&state));
        drop((sink, output));
        if is_log_gone {
            fs::remove_dir_all(setup.out()).expect("taken");
        }
        let output = setup.run(Some((1, &[&state]))).expect("a run after it, too");
        setup.open(&output, 0, Some(&state));
        assert!(visible(&setup.out()).is_empty());
    }
}

#[test]
fn a_part_that_was_never_committed_and_is_gone_is_an_error() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    let pending = files(&setup.out(), |name| name.ends_with(".pending")).remove(0);
    let whole = fs::read(&pending).expect("there");
    for bytes in [None, Some(b"onf\n".as_slice()), Some(b"one"), Some(b"one\ntwo\n")] {
        match bytes {
            Some(bytes) => fs::write(&pending, bytes).expect("spoilt"),
            None => fs::remove_file(&pending).expect("removed"),
        }
        let cause = setup.try_open(&output, 0, Some(&state)).err().expect("refused");
        let is_taken =
            matches!(cause, FailureCause::Permanent { obstacle: Obstacle::OutputTaken, .. });
        assert!(is_taken, "{cause}");
    }
    fs::remove_file(&pending).expect("removed");
    drop((sink, output));
    let problem = setup.run(Some((1, &[&state]))).expect_err("refused before it begins");
    assert_eq!(problem.code, Code::OutputTaken);
    assert!(visible(&setup.out()).is_empty());
    setup.conflicts.assume_committed = true;
    let output = setup.run(Some((1, &[&state]))).expect("somebody knows better");
    setup.open(&output, 0, Some(&state));
    drop(output);
    setup.conflicts = Conflicts::default();
    fs::write(&pending, whole).expect("put back");
    let output = setup.run(Some((1, &[&state]))).expect("put back");
    setup.open(&output, 0, Some(&state));
    assert_eq!(visible(&setup.out()), ["one"]);
}

/// The restart deleted the part of the savepoint and wrote another of the same name, which the restore
/// then published: 10,116 of 200,000 records were missing.
#[test]
fn a_savepoint_keeps_its_part_whatever_the_job_does_after_it() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    write(&mut sink, "two");
    let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
    write(&mut sink, "three");
    drop(sink);
    // A trap: the job resumes from checkpoint 1, writes "two" again, and is cancelled.
    let mut sink = setup.open(&output, 0, Some(&first));
    write(&mut sink, "two");
    barrier(&mut sink, 3, Purpose::Periodic);
    drop((sink, output));
    setup.lineage = setup.lineage.fork(2);
    let output = setup.run(Some((2, &[&savepoint]))).expect("nothing was committed since");
    let sink = setup.open(&output, 0, Some(&savepoint));
    assert_eq!(visible(&setup.out()), ["one", "two"]);
    drop((sink, output));
    // And once more, from the same savepoint, in another place.
    setup.lineage = setup.lineage.fork(2);
    let elsewhere = setup.dir.path().join("elsewhere");
    let output = setup.run_in(&elsewhere, IfExists::Fail, Some((2, &[&savepoint])));
    setup.open(&output.expect("begins"), 0, Some(&savepoint));
}

#[test]
fn a_directory_belongs_to_one_running_sink() {
    let setup = Setup::new();
    let first = setup.run(None).expect("begins");
    for if_exists in [IfExists::Fail, IfExists::Replace] {
        let problem = setup.run_in(&setup.out(), if_exists, None).expect_err("it is taken");
        assert_eq!(problem.code, Code::OutputTaken);
    }
    drop(first);
    setup.run(None).expect("free again");
}

/// `replace` took every file whose name begins with `part-`, before the job was known to start.
#[test]
fn earlier_output_is_kept_unless_it_may_be_replaced_and_other_files_always_are() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "old");
    barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    write(&mut sink, "never committed");
    barrier(&mut sink, 2, Purpose::Periodic);
    drop((sink, output));
    for name in ["part-list.txt", "part-0-1-2-3", "part-of-something", ".part-x.pending"] {
        fs::write(setup.out().join(name), "a stranger's").expect("written");
    }
    setup.lineage = Lineage::new();
    let problem = setup.run(None).expect_err("it is not empty");
    assert_eq!(problem.code, Code::OutputUnwritable);
    assert_eq!(visible(&setup.out()).len(), 4);
    setup.run_in(&setup.out(), IfExists::Replace, None).expect("replaced");
    assert_eq!(visible(&setup.out()), ["a stranger's"; 3]);
    assert!(setup.out().join(".part-x.pending").exists());
    assert_eq!(hidden_count(&setup.out()), 1);
}

#[test]
fn parts_of_tasks_that_are_no_more_are_committed_by_others() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut states: Vec<Vec<u8>> = Vec::new();
    for index in 0..3 {
        let mut sink = setup.open(&output, index, None);
        write(&mut sink, &format!("of {index}"));
        states.push(barrier(&mut sink, 1, Purpose::Periodic));
    }
    let share = |states: &[Vec<u8>], parallelism| {
        let old: Vec<&[u8]> = states.iter().map(Vec::as_slice).collect();
        share(&old, parallelism).expect("shared")
    };
    let one = share(&states, 1);
    let mut sink = setup.open(&output, 0, Some(&one[0]));
    assert_eq!(visible(&setup.out()), ["of 0", "of 1", "of 2"]);
    let state = barrier(&mut sink, 2, Purpose::Periodic);
    let three = share(&[state], 3);
    let mut sink = setup.open(&output, 2, Some(&three[2]));
    write(&mut sink, "again");
    barrier(&mut sink, 3, Purpose::Periodic);
    sink.commit(CheckpointId(3)).expect("committed");
    assert_eq!(visible(&setup.out()).len(), 4, "nothing was written over");
}

/// One part for each checkpoint made 86,400 files a day.
#[test]
fn a_part_goes_on_over_checkpoints_until_it_is_long_enough() {
    let mut setup = Setup::new();
    setup.rolling = Rolling { size: Some(20), interval: None };
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    let mut states = vec![Vec::new()];
    for checkpoint in 1..=10 {
        write(&mut sink, &format!("line {checkpoint}"));
        states.push(barrier(&mut sink, checkpoint, Purpose::Periodic));
        sink.commit(CheckpointId(checkpoint)).expect("committed");
    }
    assert_eq!(visible_files(&setup.out()).len(), 3, "three lines each");
    assert_eq!(visible(&setup.out()).len(), 9);
    write(&mut sink, "never in a checkpoint");
    drop(sink);
    // What was written up to the checkpoint is seen, and nothing behind it.
    let mut sink = setup.open(&output, 0, Some(&states[10]));
    let lines: Vec<String> = (1..=10).map(|n| format!("line {n}")).collect();
    assert_eq!(visible(&setup.out()), lines);
    write(&mut sink, "line 11");
    let savepoint = barrier(&mut sink, 11, Purpose::Savepoint);
    drop(sink);
    setup.open(&output, 0, Some(&savepoint));
    assert_eq!(visible(&setup.out()).len(), 11, "a savepoint holds no part that goes on");
}

#[test]
fn what_a_writer_leaves_is_known_as_its_own_however_long_it_has_written() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    let mut state = Vec::new();
    for checkpoint in 1..2_000 {
        // Nothing waits for a reader: only the log grows.
        let part = Part {
            dir: output.dir.clone(),
            task: 0,
            number: 9_000 + checkpoint,
            writer: sink.writer,
            timeline: setup.lineage.timeline,
            checkpoint,
            bytes: 0,
            checksum: 0,
            is_open: false,
        };
        sink.logs.commit([&part; 8].into_iter()).expect("noted");
        state = barrier(&mut sink, checkpoint, Purpose::Periodic);
    }
    write(&mut sink, "one");
    barrier(&mut sink, 2_000, Purpose::Periodic);
    assert_eq!(hidden_count(&setup.out()), 1);
    // The process ends here.
    drop((sink, output));
    let output = setup.run(Some((1_999, &[&state]))).expect("goes on");
    setup.open(&output, 0, Some(&state));
    assert_eq!(hidden_count(&setup.out()), 0, "it was written after the checkpoint");
}

#[test]
fn a_log_that_has_failed_is_opened_again() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    barrier(&mut sink, 1, Purpose::Periodic);
    let log = setup.out().join(".cofferdam/out-0.log");
    sink.logs.fail();
    // As where a log is shortened, and cannot be opened after it was renamed.
    let lines = fs::read(&log).expect("there");
    fs::remove_file(&log).expect("removed");
    fs::write(&log, lines).expect("written");
    sink.commit(CheckpointId(1)).expect("committed");
    assert!(fs::read_to_string(&log).expect("there").contains("part-0-00000001"));
}

#[test]
fn a_restart_writes_to_no_log_but_each_attempt_is_a_writer_of_its_own() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut writers = BTreeSet::new();
    let mut sink = setup.open(&output, 0, None);
    let log = || fs::read(setup.out().join(".cofferdam/out-0.log")).expect("there");
    for round in 1..=10 {
        assert!(writers.insert(sink.writer));
        let before = log();
        sink = setup.open(&output, 0, None);
        assert!(log() == before || round % 4 == 0, "restart {round} has written");
        let text = String::from_utf8(log()).expect("text");
        assert!(text.contains(&sink.writer.to_string()), "and it is known");
    }
}

#[test]
fn a_short_log_remembers_up_to_where_parts_went() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let savepoint = barrier(&mut sink, 1, Purpose::Savepoint);
    let mut part = Part {
        checkpoint: 0,
        ..postcard::from_bytes::<State>(&savepoint).expect("a state").parts.remove(0)
    };
    for checkpoint in 2..12_000 {
        part.checkpoint = checkpoint;
        sink.logs.commit([&part].into_iter()).expect("noted");
    }
    drop((sink, output));
    let log = fs::read_dir(setup.out().join(".cofferdam")).expect("listed").flatten();
    let bytes: u64 = log.map(|entry| entry.metadata().expect("there").len()).sum();
    assert!(bytes < 2 << 20, "{bytes}");
    setup.lineage = setup.lineage.fork(1);
    let problem = setup.run(Some((1, &[&savepoint]))).expect_err("it diverges");
    assert_eq!(problem.code, Code::OutputDiverged);
}

/// A part that was still open at the checkpoint before was cut and published under another name.
#[test]
fn a_savepoint_of_a_part_that_was_open_before_it_stays_whole() {
    let mut setup = Setup::new();
    setup.rolling = Rolling { size: Some(1 << 20), interval: None };
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let open = barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "two");
    let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
    drop(sink);
    // A trap, or kill -9: the job resumes from checkpoint 1.
    let mut sink = setup.open(&output, 0, Some(&open));
    assert_eq!(visible(&setup.out()), ["one"]);
    write(&mut sink, "two");
    let newer = barrier(&mut sink, 3, Purpose::Last);
    sink.commit(CheckpointId(3)).expect("committed");
    drop((sink, output));
    assert_eq!(visible(&setup.out()), ["one", "two"]);
    setup.run(Some((3, &[&newer]))).expect("its own past");
    setup.lineage = setup.lineage.fork(2);
    let problem = setup.run(Some((2, &[&savepoint]))).expect_err("two is there already");
    assert_eq!(problem.code, Code::OutputDiverged);
    setup.conflicts.discard_output = true;
    let output = setup.run(Some((2, &[&savepoint]))).expect("the savepoint is whole");
    setup.open(&output, 0, Some(&savepoint));
    assert_eq!(visible(&setup.out()), ["one", "two"]);
    // What was discarded is so whichever log is read first.
    setup.conflicts.discard_output = false;
    drop(output);
    setup.run(Some((2, &[&savepoint]))).expect("it is its own past now");
}

/// The same restart twice: the cut part was published once more, or was in the way of itself.
#[test]
fn a_cut_part_is_committed_once_whether_or_not_a_reader_has_taken_it() {
    for is_taken in [false, true] {
        let mut setup = Setup::new();
        setup.rolling = Rolling { size: Some(1 << 20), interval: None };
        let output = setup.run(None).expect("begins");
        let mut sink = setup.open(&output, 0, None);
        write(&mut sink, "one");
        let open = barrier(&mut sink, 1, Purpose::Periodic);
        write(&mut sink, "two");
        let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
        drop((sink, output));
        let restart = || {
            let output = setup.run(Some((1, &[&open]))).expect("its own past");
            setup.open(&output, 0, Some(&open));
        };
        restart();
        assert_eq!(visible(&setup.out()), ["one"]);
        if is_taken {
            fs::remove_file(visible_files(&setup.out()).remove(0)).expect("taken");
        }
        restart();
        assert_eq!(visible(&setup.out()).len(), usize::from(!is_taken));
        setup.lineage = setup.lineage.fork(2);
        let problem = setup.run(Some((2, &[&savepoint]))).expect_err("one would come twice");
        assert_eq!(problem.code, Code::OutputDiverged);
    }
}

/// The hints led to C0028, and those of that to 6,778 lost records.
#[test]
fn a_part_that_was_committed_longer_becomes_what_the_older_checkpoint_holds() {
    let mut setup = Setup::new();
    setup.rolling = Rolling { size: Some(20), interval: None };
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "line one");
    let open = barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "line two is long enough");
    barrier(&mut sink, 2, Purpose::Periodic);
    sink.commit(CheckpointId(2)).expect("committed");
    drop((sink, output));
    // Checkpoint 2 is damaged.
    setup.lineage = setup.lineage.fork(1);
    let problem = setup.run(Some((1, &[&open]))).expect_err("line two would come twice");
    assert_eq!(problem.code, Code::OutputDiverged);
    setup.conflicts.discard_output = true;
    let output = setup.run(Some((1, &[&open]))).expect("line two is removed");
    setup.open(&output, 0, Some(&open));
    assert_eq!(visible(&setup.out()), ["line one"]);
}

/// Killed between the log and the rename: nobody has seen the part.
#[test]
fn a_part_that_was_written_down_and_not_renamed_is_no_output() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "one");
    barrier(&mut sink, 2, Purpose::Periodic);
    let hidden = files(&setup.out(), |name| name.starts_with(".part-")).remove(0);
    sink.commit(CheckpointId(2)).expect("committed");
    drop((sink, output));
    fs::rename(visible_files(&setup.out()).remove(0), hidden).expect("not renamed yet");
    setup.lineage = setup.lineage.fork(1);
    let output = setup.run(Some((1, &[&first]))).expect("nothing was seen");
    let mut sink = setup.open(&output, 0, Some(&first));
    write(&mut sink, "one");
    barrier(&mut sink, 3, Purpose::Periodic);
    sink.commit(CheckpointId(3)).expect("committed");
    assert_eq!(visible(&setup.out()), ["one"]);
}
