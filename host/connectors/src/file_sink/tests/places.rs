//! Parts of other jobs, of forks, and in directories that have moved.

use cofferdam_connector::{catalog::Conflicts, identity::Lineage};

use super::*;

/// It never started: the parts were looked for at the new path.
#[test]
fn what_was_written_elsewhere_is_committed_there_and_new_parts_go_to_the_new_place() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    drop((sink, output));
    let other = setup.dir.path().join("other");
    let output = setup.run_in(&other, IfExists::Fail, Some((1, &[&state]))).expect("begins");
    let mut sink = setup.open(&output, 0, Some(&state));
    write(&mut sink, "two");
    barrier(&mut sink, 2, Purpose::Periodic);
    sink.commit(CheckpointId(2)).expect("committed");
    assert_eq!(
        (visible(&setup.out()), visible(&other)),
        (vec!["one".to_owned()], vec!["two".to_owned()])
    );
}

#[test]
fn parts_are_found_where_their_directory_was_moved() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    drop((sink, output));
    let moved = setup.dir.path().join("moved");
    fs::rename(setup.out(), &moved).expect("moved");
    let output = setup.run_in(&moved, IfExists::Fail, Some((1, &[&state]))).expect("begins");
    setup.open(&output, 0, Some(&state));
    assert_eq!(visible(&moved), ["one"]);
}

/// 5,057 lines, 4,000 of them distinct, exit code 0.
#[test]
fn a_state_that_is_older_than_the_output_is_refused_unless_somebody_says_what_to_do() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let savepoint = barrier(&mut sink, 1, Purpose::Savepoint);
    for checkpoint in 2..5 {
        write(&mut sink, &format!("later {checkpoint}"));
        barrier(&mut sink, checkpoint, Purpose::Periodic);
        sink.commit(CheckpointId(checkpoint)).expect("committed");
    }
    drop((sink, output));
    fs::write(setup.out().join("part-list.txt"), "a stranger's").expect("written");
    let before = visible(&setup.out());
    setup.lineage = setup.lineage.fork(1);
    let problem = setup.run(Some((1, &[&savepoint]))).expect_err("it would come twice");
    assert_eq!(problem.code, Code::OutputDiverged);
    assert!(problem.details[0].contains("3 parts"), "{problem}");
    assert_eq!(visible(&setup.out()), before, "nothing has changed");
    let elsewhere = setup.dir.path().join("elsewhere");
    setup.run_in(&elsewhere, IfExists::Fail, Some((1, &[&savepoint]))).expect("another place");
    setup.conflicts.discard_output = true;
    let taken = visible_files(&setup.out())
        .pop()
        .map(|_| files(&setup.out(), |name| name.contains("-00000003-")).remove(0))
        .expect("a part");
    let content = fs::read(&taken).expect("there");
    fs::remove_file(&taken).expect("taken");
    let problem = setup.run(Some((1, &[&savepoint]))).expect_err("it cannot be taken back");
    assert!(problem.details.iter().any(|it| it.contains("were removed or modified")), "{problem}");
    fs::write(&taken, content).expect("given back");
    let output = setup.run(Some((1, &[&savepoint]))).expect("what diverges is removed");
    let mut sink = setup.open(&output, 0, Some(&savepoint));
    write(&mut sink, "other");
    barrier(&mut sink, 2, Purpose::Periodic);
    sink.commit(CheckpointId(2)).expect("committed");
    let mut now = visible(&setup.out());
    now.sort();
    assert_eq!(now, ["a stranger's", "one", "other"]);
    drop((sink, output));
    setup.conflicts.discard_output = false;
    setup.run(Some((2, &[]))).expect("this timeline's own past is no conflict");
}

#[test]
fn the_output_of_another_job_is_not_gone_on_with() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    drop((sink, output));
    setup.lineage = Lineage::new();
    let problem = setup.run(Some((1, &[&state]))).expect_err("another job's");
    assert_eq!(problem.code, Code::OutputTaken);
    assert!(problem.message.contains("job \"j\""), "{problem}");
}

/// The hint of C0029, another path, led to C0028.
#[test]
fn parts_that_a_reader_has_taken_are_known_from_another_place_as_well() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let savepoint = barrier(&mut sink, 1, Purpose::Savepoint);
    barrier(&mut sink, 2, Purpose::Periodic);
    sink.commit(CheckpointId(2)).expect("committed");
    drop((sink, output));
    fs::remove_file(visible_files(&setup.out()).remove(0)).expect("taken");
    fs::remove_dir_all(setup.dir.path().join("state")).expect("another state directory");
    setup.lineage = setup.lineage.fork(1);
    let elsewhere = setup.dir.path().join("elsewhere");
    setup.run_in(&elsewhere, IfExists::Fail, Some((1, &[&savepoint]))).expect("begins there");
}

/// The job had gone on in another directory, of which the first one knew nothing.
#[test]
fn a_fork_commits_nothing_where_the_job_has_left_and_gone_on_elsewhere() {
    let mut setup = Setup::new();
    let (other, third) = (setup.dir.path().join("other"), setup.dir.path().join("third"));
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "zero");
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    write(&mut sink, "one");
    let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
    drop((sink, output));
    let output = setup.run_in(&other, IfExists::Fail, Some((1, &[&first]))).expect("elsewhere");
    let mut sink = setup.open(&output, 0, Some(&first));
    // Nothing was committed there yet, so the way back is open.
    drop((sink, output));
    drop(setup.run(Some((1, &[&first]))).expect("back"));
    let output = setup.run_in(&other, IfExists::Fail, Some((1, &[&first]))).expect("elsewhere");
    sink = setup.open(&output, 0, Some(&first));
    write(&mut sink, "one");
    let newer = barrier(&mut sink, 3, Purpose::Periodic);
    sink.commit(CheckpointId(3)).expect("committed");
    drop((sink, output));
    let lineage = setup.lineage.clone();
    setup.lineage = lineage.fork(2);
    let problem = setup.run_in(&third, IfExists::Fail, Some((2, &[&savepoint])));
    assert_eq!(problem.expect_err("one would come twice").code, Code::OutputDiverged);
    setup.lineage = lineage;
    setup.run(Some((3, &[&newer]))).expect("the job itself may come back");
}

/// The fork committed "two" where the job had written it again.
#[test]
fn a_fork_into_another_place_commits_nothing_where_the_job_has_gone_on() {
    let mut setup = Setup::new();
    let elsewhere = setup.dir.path().join("elsewhere");
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    write(&mut sink, "two");
    let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
    drop(sink);
    let mut sink = setup.open(&output, 0, Some(&first));
    let lineage = setup.lineage.clone();
    let fork = |setup: &mut Setup| {
        setup.lineage = lineage.fork(2);
        let result = setup.run_in(&elsewhere, IfExists::Fail, Some((2, &[&savepoint])));
        setup.lineage = lineage.clone();
        result
    };
    let problem = fork(&mut setup).expect_err("the job runs");
    assert_eq!(problem.code, Code::OutputTaken);
    write(&mut sink, "two");
    barrier(&mut sink, 3, Purpose::Periodic);
    sink.commit(CheckpointId(3)).expect("committed");
    drop((sink, output));
    let problem = fork(&mut setup).expect_err("two would come twice");
    assert_eq!(problem.code, Code::OutputDiverged);
    assert_eq!(visible(&setup.out()), ["one", "two"]);
}

#[test]
fn a_job_sees_what_a_fork_of_it_has_committed() {
    let mut setup = Setup::new();
    let elsewhere = setup.dir.path().join("elsewhere");
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    write(&mut sink, "one");
    let savepoint = barrier(&mut sink, 2, Purpose::Savepoint);
    drop((sink, output));
    let lineage = setup.lineage.clone();
    setup.lineage = lineage.fork(2);
    let output = setup.run_in(&elsewhere, IfExists::Fail, Some((2, &[&savepoint])));
    let output = output.expect("nobody has gone on");
    setup.open(&output, 0, Some(&savepoint));
    assert_eq!(visible(&setup.out()), ["one"]);
    drop(output);
    setup.lineage = lineage;
    let problem = setup.run(Some((1, &[&first]))).expect_err("one would come twice");
    assert_eq!(problem.code, Code::OutputDiverged);
}

/// The log of the directory went with the directory, and that of the job was not asked.
#[test]
fn output_that_was_moved_away_still_counts() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let first = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    write(&mut sink, "two");
    barrier(&mut sink, 2, Purpose::Periodic);
    sink.commit(CheckpointId(2)).expect("committed");
    drop((sink, output));
    fs::rename(setup.out(), setup.dir.path().join("old")).expect("moved");
    // Checkpoint 2 is damaged.
    setup.lineage = setup.lineage.fork(1);
    let problem = setup.run(Some((1, &[&first]))).expect_err("two would come twice");
    assert_eq!(problem.code, Code::OutputDiverged);
    // A flipped bit in the copy of the log is no reason to refuse what is right.
    for log in fs::read_dir(setup.dir.path().join("state")).expect("listed").flatten() {
        let mut bytes = fs::read(log.path()).expect("readable");
        bytes[3] ^= 0x80;
        fs::write(log.path(), bytes).expect("damaged");
    }
    setup.run_in(&setup.dir.path().join("new"), IfExists::Fail, Some((1, &[&first]))).expect("new");
}

/// Another job ran in the emptied directory, and the first one never began again.
#[test]
fn a_directory_that_another_job_has_used_and_left_empty_is_as_good_as_new() {
    let mut setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    drop((sink, output));
    let take =
        || visible_files(&setup.out()).iter().for_each(|it| fs::remove_file(it).expect("taken"));
    take();
    let (lineage, other) = (setup.lineage.clone(), Lineage::new());
    let (dir, rolling) = (tempfile::tempdir().expect("a directory"), Rolling::default());
    let stranger = Setup { dir, lineage: other, rolling, conflicts: Conflicts::default() };
    let output = stranger.run_in(&setup.out(), IfExists::Fail, None).expect("it is empty");
    let mut sink = stranger.open(&output, 0, None);
    write(&mut sink, "a stranger's");
    barrier(&mut sink, 1, Purpose::Periodic);
    sink.commit(CheckpointId(1)).expect("committed");
    drop((sink, output));
    take();
    setup.lineage = lineage;
    let output = setup.run(Some((1, &[&state]))).expect("nothing of anybody is there");
    setup.open(&output, 0, Some(&state));
    assert!(visible(&setup.out()).is_empty());
}

#[test]
fn parts_lie_where_the_run_is_and_not_where_it_was_copied_from() {
    let setup = Setup::new();
    let output = setup.run(None).expect("begins");
    let mut sink = setup.open(&output, 0, None);
    write(&mut sink, "one");
    let state = barrier(&mut sink, 1, Purpose::Periodic);
    drop((sink, output));
    let copy = setup.dir.path().join("copy");
    let copied = std::process::Command::new("cp").arg("-r").args([&setup.out(), &copy]).status();
    assert!(copied.expect("cp").success());
    let output = setup.run_in(&copy, IfExists::Fail, Some((1, &[&state]))).expect("begins");
    setup.open(&output, 0, Some(&state));
    assert_eq!(visible(&copy), ["one"]);
    assert!(visible(&setup.out()).is_empty(), "the original is untouched");
}
