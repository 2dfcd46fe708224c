//! A host's file says what the manifests of others may open: everything else is refused before it is opened.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::job::{CheckedJob, Job, JobOptions};
use cofferdam_settings::{Code, Problem};
use cofferdam_spec::{JobSpec, host::HostSettings};
use cofferdam_tests::{guest, job::sandbox};

/// A host with directories that it grants and one that it does not.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let it = Self { dir: tempfile::tempdir().expect("a directory") };
        for name in ["granted/in", "granted/out", "secret", "jobs"] {
            fs::create_dir_all(it.path(name)).expect("made");
        }
        fs::write(it.path("granted/in/a.txt"), "one\n").expect("written");
        fs::write(it.path("secret/a.txt"), "secret\n").expect("written");
        fs::copy(guest::probe(), it.path("jobs/probe.wasm")).expect("copied");
        let host = "[grants.default]\nread = [\"granted/in\"]\nwrite = [\"granted/out\"]\nlimits.call = \"2 s\"\n";
        fs::write(it.path("cofferdam.toml"), host).expect("written");
        it
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The manifest of a tenant, with another text in the place of one.
    fn manifest(&self, from: &str, to: &str) -> PathBuf {
        let text = "[job]\nname = \"tenant\"\n[restart-strategy]\ntype = \"none\"\n[execution.checkpointing]\ninterval = \"10s\"\ndir = \"../granted/out/state\"\n\
             [[source]]\nname = \"in\"\nconnector = \"file\"\npath = \"../granted/in/*.txt\"\nkey = \"[a-z]+\"\n\
             [[operator]]\nname = \"probe\"\ncomponent = \"probe.wasm\"\n\
             inputs = [{ from = \"in\", partition = \"rebalance\" }]\nlimits.call = \"1 s\"\n\
             [[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"../granted/out/lines\"\nline = \"value\"\ninputs = [\"in\"]\n";
        assert!(text.contains(from), "{from}");
        let path = self.path("jobs/job.toml");
        fs::write(&path, text.replacen(from, to, 1)).expect("written");
        path
    }

    fn run(&self, manifest: &Path) -> Result<Outcome, Problem> {
        let host = HostSettings::read(&self.path("cofferdam.toml"))?;
        let spec = JobSpec::read_with(manifest, Some(&host), &builtin())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let checked = CheckedJob::new(spec, sandbox()).await?;
            Job::prepare(checked, &JobOptions::default(), Arc::new(()))?.run().await
        })
    }

    fn output(&self) -> String {
        let Ok(parts) = fs::read_dir(self.path("granted/out/lines")) else { return String::new() };
        parts.flatten().filter_map(|part| fs::read_to_string(part.path()).ok()).collect()
    }
}

#[test]
fn a_job_that_asks_for_what_is_granted_runs() {
    let world = World::new();
    assert_eq!(world.run(&world.manifest("tenant", "tenant")), Ok(Outcome::Finished));
    assert_eq!(world.output(), "one\n");
}

#[test]
fn what_the_host_does_not_grant_is_refused_before_it_is_opened() {
    let world = World::new();
    symlink(world.path("secret"), world.path("granted/in/link")).expect("linked");
    symlink(world.path("secret"), world.path("granted/out/link")).expect("linked");
    fs::copy(guest::probe(), world.path("secret/probe.wasm")).expect("copied");
    for (from, to, says) in [
        ("../granted/in/*.txt", "../secret/*.txt", "source \"in\" reads"),
        ("../granted/in/*.txt", "/etc/passwd", "source \"in\" reads"),
        ("../granted/in/*.txt", "../granted/in/link/*.txt", "source \"in\" reads"),
        ("../granted/in/*.txt", "../granted/in/../../secret/*.txt", "source \"in\" reads"),
        ("../granted/out/lines", "../secret/lines", "sink \"out\" writes to"),
        ("../granted/out/lines", "../granted/out/link/lines", "sink \"out\" writes to"),
        ("../granted/out/lines", "../granted/in/lines", "sink \"out\" writes to"),
        ("../granted/out/state", "../secret/state", "the job keeps its state in"),
        (
            "dir = \"../granted/out/state\"",
            "storage = \"filesystem\"\ndir = \"s3://bucket/x\"",
            "its checkpoints in",
        ),
        ("interval =", "savepoint-dir = \"../secret\"\ninterval =", "savepoints go to"),
        ("../granted/out/lines", "../granted/out/none/../link/x", "sink \"out\" writes to"),
        ("../granted/out/state", "../granted/out/none/../link/x", "the job keeps its state in"),
        ("../granted/in/*.txt", "../granted/in/.?/.?/secret/*.txt", "source \"in\" finds files"),
        (
            "[[source]]",
            "[state.backend]\ntype = \"sled\"\nsled.write-buffer = \"1 GiB\"\n[[source]]",
            "`state.backend.sled.write-buffer`",
        ),
        ("probe.wasm", "../secret/probe.wasm", "loads its component from"),
        ("limits.call = \"1 s\"", "limits.call = \"3 s\"", "it wants 3000, and may have 2000"),
        ("limits.call = \"1 s\"", "limits.memory = \"1 GiB\"", "limits.memory"),
        ("limits.call = \"1 s\"", "limits.state = \"1 TiB\"", "limits.state"),
    ] {
        let refused = world.run(&world.manifest(from, to)).expect_err(to);
        assert!(refused.to_string().contains(says), "{to}: {refused}");
        assert_eq!(refused.code, Code::NotGranted, "{to}");
        assert!(!world.path("granted/out/state").exists(), "{to}");
        assert!(
            !world.path("secret/state").exists() && !world.path("secret/lines").exists(),
            "{to}"
        );
    }
}

/// What a pattern finds within a directory that is granted may lead out of it.
#[test]
fn a_link_among_granted_files_gives_nothing_of_what_it_leads_to() {
    for pattern in
        ["../granted/in/*.txt", "../granted/in/*/a.txt", "../granted/in/*/../../../secret/a.txt"]
    {
        let world = World::new();
        fs::create_dir(world.path("granted/in/sub")).expect("made");
        symlink(world.path("secret/a.txt"), world.path("granted/in/b.txt")).expect("linked");
        symlink(world.path("secret"), world.path("granted/in/link")).expect("linked");
        let refused =
            world.run(&world.manifest("../granted/in/*.txt", pattern)).expect_err(pattern);
        assert_eq!(refused.code, Code::NotGranted, "{pattern}: {refused}");
        assert!(!world.output().contains("secret"), "{pattern}");
    }
}

/// A tenant that has laid links where the job writes would have the host write elsewhere.
#[test]
fn links_where_a_job_writes_are_refused() {
    let world = World::new();
    let manifest = world.manifest("tenant", "tenant");
    for (dir, link) in
        [("state", "state/outputs"), ("lines", "lines/.cofferdam"), ("lines", "lines/part-0-0")]
    {
        let dir = world.path("granted/out").join(dir);
        fs::create_dir_all(&dir).expect("made");
        symlink(world.path("secret"), world.path("granted/out").join(link)).expect("linked");
        let refused = world.run(&manifest).expect_err(link);
        assert_eq!(refused.code, Code::NotGranted, "{link}: {refused}");
        fs::remove_dir_all(dir).expect("removed");
    }
    assert_eq!(fs::read_dir(world.path("secret")).expect("listed").count(), 1);
    assert_eq!(world.run(&manifest), Ok(Outcome::Finished));
}

#[test]
fn grants_are_the_hosts_and_their_mistakes_are_told() {
    let world = World::new();
    let own = world.manifest("[job]", "[grants.default]\nread = [\"/\"]\n[job]");
    assert_eq!(world.run(&own).expect_err("of a manifest").code, Code::UnknownKey);
    for (host, says) in [
        ("grants = 1", "`grants`: it is a table"),
        ("[grants.default]\nreed = [\"/\"]", "unknown key `grants.default.reed`"),
        ("[grants.default]\nread = \"/\"", "must be an array"),
        ("[grants.default]\nread = [1]", "a path is a text"),
        ("[grants.other]\nreed = [\"/\"]", "unknown key `grants.other.reed`"),
        ("[grants]\nread = [\"/\"]", "`read` must be a table"),
        // What is granted to another tenant alone, and to none.
        ("[grants.other]\nread = [\"/\"]\nwrite = [\"/\"]", "does not grant"),
        ("[grants]", "does not grant"),
    ] {
        fs::write(world.path("cofferdam.toml"), format!("{host}\n")).expect("written");
        let refused = world.run(&world.manifest("tenant", "tenant")).expect_err(host);
        assert!(refused.to_string().contains(says), "{host}: {refused}");
    }
    // A host that says nothing of grants grants what manifests name.
    fs::write(world.path("cofferdam.toml"), "[job]\nparallelism = 1\n").expect("written");
    assert_eq!(world.run(&world.manifest("tenant", "tenant")), Ok(Outcome::Finished));
}
