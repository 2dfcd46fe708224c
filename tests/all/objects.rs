//! Checkpoints as objects: in a directory, and in a server that speaks S3.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Output, Stdio},
};

use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    job::JobOptions,
    restore::{RestoreFrom, open_named},
};
use cofferdam_tests::{
    guest,
    job::{
        Harness, after_checkpoints, check_counts, committed, run_manifest, run_with, wait_for_lines,
    },
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};

const COUNT: u64 = 60_000;

fn with_dir(dir: &str) -> Harness {
    let checkpointing = format!(
        "storage = \"filesystem\"\ndir = {dir:?}\n\
         externalized-checkpoint-retention = \"RETAIN_ON_CANCELLATION\""
    );
    Harness {
        count: COUNT,
        rate: Some(120_000),
        interval_ms: 20,
        checkpointing,
        ..Harness::default()
    }
}

#[test]
fn job_goes_on_from_objects_in_a_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let harness = with_dir("checkpoints");
    let manifest = harness.write(dir.path());
    let ran = run_manifest(&manifest, |job| after_checkpoints(job, 3, |job| job.cancel()));
    assert!(matches!(ran.outcome, Ok(Outcome::Canceled { .. })), "{:?}", ran.outcome);
    let place = dir.path().join("checkpoints/probe");
    let (store, newest) = open_named(&place).expect("a directory is known by what is in it");
    assert!(store.checkpoints().contains(&newest.checkpoint));
    let config = r#"do = "trap", at = 12000, attempts = 2"#.to_owned();
    let ran = Harness { config, ..harness }.run_in(dir.path());
    assert_eq!(ran.outcome, Ok(Outcome::Finished));
    assert_eq!(ran.restored().first(), Some(&newest.checkpoint));
    check_counts(&committed(&dir.path().join("output")), COUNT).expect("exactly once");
    let left = fs::read_dir(&place).expect("the folder").count();
    assert_eq!(left, 0, "a job that has finished leaves nothing");
}

#[test]
fn other_job_begins_from_objects_and_owns_them_if_it_claims() {
    for claim in [true, false] {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("file://{}", dir.path().join("checkpoints").display());
        let harness = with_dir(&url);
        let manifest = harness.write(dir.path());
        let _ = run_manifest(&manifest, |job| after_checkpoints(job, 3, |job| job.cancel()));
        let from = RestoreFrom {
            dir: format!("{url}/probe").into(),
            claim,
            ignore_unclaimed_state: false,
        };
        let text = fs::read_to_string(&manifest).expect("readable");
        fs::write(&manifest, text.replace("storage = \"filesystem\"", "storage = \"sled\""))
            .expect("written");
        let options = JobOptions {
            from: Some(from),
            state_dir: Some(dir.path().join("other.cofferdam")),
            ..JobOptions::default()
        };
        let ran = run_with(&manifest, &options, |_| {});
        assert_eq!(ran.outcome, Ok(Outcome::Finished), "claim: {claim}");
        check_counts(&committed(&dir.path().join("output")), COUNT).expect("exactly once");
        let is_left = dir.path().join("checkpoints/probe/gen-00000001").exists();
        assert_eq!(is_left, !claim, "claim: {claim}");
    }
}

/// Serves the folders of `root` as buckets.
fn serve_s3(root: &Path) -> SocketAddr {
    let files = s3s_fs::FileSystem::new(root).expect("a folder of buckets");
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single("tester", "a-secret"));
    let service = builder.build();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            sender.send(listener.local_addr().expect("an address")).expect("the test waits");
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let service = service.clone();
                tokio::spawn(async move {
                    let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    // A client that was killed ends its connection as it likes.
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
    });
    receiver.recv().expect("the server runs")
}

fn program(address: SocketAddr, arguments: &[&str]) -> Command {
    let mut command = Command::new(guest::program());
    command
        .args(arguments)
        .env("AWS_ACCESS_KEY_ID", "tester")
        .env("AWS_SECRET_ACCESS_KEY", "a-secret")
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ENDPOINT_URL", format!("http://{address}"))
        .env("AWS_ALLOW_HTTP", "true")
        .stdin(Stdio::null());
    command
}

fn call(address: SocketAddr, arguments: &[&str]) -> Output {
    program(address, arguments).output().expect("the program runs")
}

#[test]
fn job_that_was_killed_goes_on_from_s3() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(dir.path().join("buckets/tenants")).expect("a bucket");
    let address = serve_s3(&dir.path().join("buckets"));
    let harness = Harness { rate: Some(30_000), ..with_dir("s3://tenants/checkpoints") };
    let manifest = harness.write(dir.path()).display().to_string();
    let mut child = program(address, &["run", &manifest, "--no-progress"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program runs");
    let output = dir.path().join("output");
    wait_for_lines(&output, 10_000);
    let saved = call(address, &["savepoint", &manifest, "s3://tenants/savepoints", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&saved.stdout).expect("one object");
    let savepoint = answer["savepoint"].as_str().expect("a place").to_owned();
    assert!(savepoint.starts_with("s3://tenants/savepoints/savepoint-probe-"), "{savepoint}");
    child.kill().expect("it runs");
    child.wait().expect("it has ended");
    let url = "s3://tenants/checkpoints/probe";
    let listed = call(address, &["checkpoints", "list", url]);
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(text.starts_with("checkpoint ") && text.contains("\"probe\""), "{listed:?}");
    let verified = call(address, &["checkpoints", "verify", &manifest]);
    assert!(verified.status.success(), "{verified:?}");
    let ran = call(address, &["run", &manifest, "--no-progress", "--log", "info"]);
    let log = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success() && log.contains("from checkpoint"), "{log}");
    check_counts(&committed(&output), COUNT).expect("exactly once");

    // The savepoint outlives the job and its checkpoints.
    assert!(!call(address, &["checkpoints", "verify", url]).status.success());
    let verified = call(address, &["checkpoints", "verify", &savepoint]);
    assert!(verified.status.success(), "{verified:?}");
}
