//! What operators are granted outside of their sandbox: directories, a scratch directory, variables and secrets.

use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_connectors::builtin;
use cofferdam_core::job::Outcome;
use cofferdam_engine::{
    job::{CheckedJob, Job, JobOptions},
    problem::{Code, Problem},
};
use cofferdam_spec::{JobSpec, host::HostSettings};
use cofferdam_tests::{
    guest,
    job::{after_checkpoints, committed, sandbox},
};

/// A job of one operator, which does what its input says, line by line.
struct World {
    dir: tempfile::TempDir,
    /// Of the operator.
    grants: String,
    config: String,
    /// Records a second.
    rate: u64,
    /// The host's file, and whose job it is.
    host: Option<String>,
    tenant: Option<&'static str>,
    component: PathBuf,
    /// Only `grants` are asked for.
    is_bare: bool,
}

const SECRETS: &str = "[secrets.default]\nkey = { file = \"key\" }\n";

impl World {
    fn new(grants: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["lookup", "secret"] {
            fs::create_dir(dir.path().join(name)).expect("made");
            fs::write(dir.path().join(name).join("a.txt"), name).expect("written");
        }
        fs::write(dir.path().join("key"), "hunter2\n").expect("written");
        Self {
            dir,
            grants: grants.to_owned(),
            config: String::new(),
            rate: 1_000_000,
            host: Some(SECRETS.to_owned()),
            tenant: None,
            component: guest::probe().with_file_name("outside.wasm"),
            is_bare: false,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `LOOKUP` stands for the directory that is granted.
    fn text(&self, text: &str) -> String {
        text.replace("LOOKUP", &self.path("lookup").display().to_string())
    }

    fn spec(&self, lines: &[&str]) -> Result<JobSpec, Problem> {
        fs::write(self.path("in.txt"), self.text(&lines.join("\n")) + "\n").expect("written");
        let Self { config, rate, component, .. } = self;
        let mut grants = self.text(&self.grants);
        // Its component imports both, so it needs both.
        for (list, any) in [("secrets", "secrets = [\"key\"]"), ("scratch", "scratch = \"1 KiB\"")]
        {
            let is_there = grants.contains(list) || list == "scratch" && grants.contains("read");
            if !(self.is_bare || is_there) {
                grants = format!("{grants}{}{any}", if grants.is_empty() { "" } else { ", " });
            }
        }
        let text = format!(
            "[job]\nname = \"outside\"\n[restart-strategy]\ntype = \"none\"\n[execution.checkpointing]\ninterval = \"20ms\"\n\
             [[source]]\nname = \"in\"\nconnector = \"file\"\npath = \"in.txt\"\nkey = \"^\"\nrate = {rate}\n\
             [[operator]]\nname = \"outside\"\ncomponent = {component:?}\nsnapshot = \"memory\"\n\
             inputs = [{{ from = \"in\", partition = \"global\" }}]\nconfig = {{ {config} }}\ngrants = {{ {grants} }}\n\
             [[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"out\"\nline = \"value\"\ninputs = [\"outside\"]\n",
        );
        let manifest = self.path("job.toml");
        fs::write(&manifest, text).expect("written");
        let host = self.host.as_ref().map(|host| {
            let path = self.path("cofferdam.toml");
            fs::write(&path, self.text(host)).expect("written");
            let host = HostSettings::read(&path)?;
            Ok(match self.tenant {
                Some(tenant) => host.for_tenant(tenant.to_owned()),
                None => host,
            })
        });
        JobSpec::read_with(&manifest, host.transpose()?.as_ref(), &builtin())
    }

    fn run(&self, lines: &[&str], with: impl FnOnce(&Job)) -> Result<Outcome, Problem> {
        let spec = self.spec(lines)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let checked = CheckedJob::new(spec, sandbox()).await?;
            let job = Job::prepare(checked, &JobOptions::default(), Arc::new(()))?;
            with(&job);
            job.run().await
        })
    }

    /// What came of each line.
    fn said(&self, lines: &[&str]) -> Vec<String> {
        assert_eq!(self.run(lines, |_| {}), Ok(Outcome::Finished), "{lines:?}");
        let said = committed(&self.path("out"));
        let of_line = |line: &&str| {
            let line = self.text(line) + " ";
            let mut found = said.iter().filter_map(|said| said.strip_prefix(&line));
            found.next().map(str::to_owned).unwrap_or_else(|| "nothing".to_owned())
        };
        lines.iter().map(of_line).collect()
    }

    fn does(&self, rows: &[(&str, &str)]) {
        let lines: Vec<&str> = rows.iter().map(|(line, _)| *line).collect();
        let said = self.said(&lines);
        let rows = rows.iter().zip(&said).filter(|((_, expected), said)| expected != *said);
        let wrong: Vec<_> = rows.collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    fn refused(&self, says: &str) {
        let refused = self.run(&["list LOOKUP"], |_| {}).expect_err(says);
        assert!(refused.to_string().contains(says), "{says}: {refused}");
        assert_eq!(refused.code, Code::NotGranted, "{refused}");
        assert!(!self.path("outside.cofferdam").exists() && !self.path("out").exists());
    }
}

#[test]
fn a_guest_reads_the_directories_that_it_is_given_and_nothing_else() {
    let world = World::new("read = [\"LOOKUP\"]");
    symlink(world.path("secret/a.txt"), world.path("lookup/out.txt")).expect("linked");
    symlink(world.path("secret"), world.path("lookup/out")).expect("linked");
    symlink("a.txt", world.path("lookup/in.txt")).expect("linked");
    let fifo = world.path("lookup/fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("runs").success());
    let secret = format!("read {}", world.path("secret/a.txt").display());
    let rows = [
        ("read LOOKUP/a.txt", "lookup"),
        ("read LOOKUP/in.txt", "lookup"),
        ("length LOOKUP/a.txt", "6"),
        ("list LOOKUP", "5"),
        // What leads out, or is no file.
        ("read LOOKUP/out.txt", "PermissionDenied"),
        ("read LOOKUP/out/a.txt", "PermissionDenied"),
        ("read LOOKUP/../secret/a.txt", "PermissionDenied"),
        (secret.as_str(), "NotFound"),
        ("read /etc/passwd", "NotFound"),
        ("read /proc/self/environ", "NotFound"),
        ("read LOOKUP/fifo", "PermissionDenied"),
        // It is to be read alone.
        ("write LOOKUP/b.txt 1", "PermissionDenied"),
        ("append LOOKUP/a.txt 1", "PermissionDenied"),
        ("cut LOOKUP/a.txt 0", "PermissionDenied"),
        ("remove LOOKUP/a.txt", "PermissionDenied"),
        ("mkdir LOOKUP/b", "PermissionDenied"),
        ("rmdir LOOKUP", "PermissionDenied"),
        ("move LOOKUP/a.txt LOOKUP/b.txt", "PermissionDenied"),
        ("link LOOKUP/a.txt LOOKUP/c.txt", "PermissionDenied"),
        ("write /scratch/a 1", "NotFound"),
        ("env HOME", "unset"),
        ("secret other", "none"),
    ];
    world.does(&rows);
    assert_eq!(fs::read_to_string(world.path("lookup/a.txt")).expect("is there"), "lookup");
    assert_eq!(fs::read_dir(world.path("lookup")).expect("listed").count(), 5);
}

/// 128 KiB, of which each file takes 16 KiB and its bytes. The library of guests makes an I/O error of whatever a write to a
/// stream says.
#[test]
fn a_scratch_directory_holds_no_more_than_was_granted() {
    let mut world = World::new("scratch = \"128 KiB\"");
    world.config = "log = \"/scratch/log\"".to_owned();
    let rows = [
        ("write /scratch/a 30000", "done"),
        // 131,072 - 3 * 16,384 - 30,000 - 7 are left.
        ("write /scratch/b 51914", "Uncategorized"),
        ("length /scratch/b", "0"),
        ("append /scratch/b 51913", "done"),
        ("append /scratch/b 2", "Uncategorized"),
        ("log", "Uncategorized"),
        ("mkdir /scratch/e", "StorageFull"),
        ("write /scratch/c 0", "StorageFull"),
        ("far /scratch/b 1000000", "Uncategorized"),
        ("cut /scratch/b 1000000", "StorageFull"),
        ("cut /scratch/b 51912", "done"),
        ("append /scratch/b 1", "done"),
        // Written over, it is what it was before.
        ("far /scratch/b 0", "done"),
        ("remove /scratch/a", "done"),
        ("write /scratch/c 29999", "done"),
        ("append /scratch/c 2", "Uncategorized"),
        ("move /scratch/b /scratch/c", "done"),
        ("mkdir /scratch/d", "done"),
        ("many /scratch/d 100", "StorageFull"),
        ("list /scratch/d", "1"),
        ("list /scratch", "3"),
        ("rmdir /scratch/d", "Uncategorized"),
        ("remove /scratch/log", "ResourceBusy"),
        ("move /scratch/c /scratch/log", "ResourceBusy"),
        ("move /scratch/d /scratch/f", "PermissionDenied"),
        ("move /scratch/log /scratch/d/log", "done"),
        ("remove /scratch/d/log", "ResourceBusy"),
        ("link /scratch/c /scratch/e", "PermissionDenied"),
        ("read /scratch/../secret/a.txt", "PermissionDenied"),
        ("write /elsewhere 1", "NotFound"),
    ];
    world.does(&rows);
    assert!(!world.path("outside.cofferdam/scratch").exists(), "it went with its task");
    // What removes them goes down as deep as they lie.
    for (line, is_done) in [("deep /scratch 32", true), ("deep /scratch 33", false)] {
        let said = World::new("scratch = \"4 MiB\"").said(&[line]);
        assert_eq!(said[0] == "done", is_done, "{line}: {said:?}");
    }
}

#[test]
fn variables_and_secrets_are_given_by_name() {
    let mut world = World::new("env = [\"PATH\"], secrets = [\"key\", \"home\"]");
    let secrets = "[secrets.default]\nkey = { file = \"key\" }\nhome = { env = \"HOME\" }\nother = { file = \"key\" }\n";
    world.host = Some(secrets.to_owned());
    let home = std::env::var("HOME").expect("is set").len();
    let said = world.said(&["env PATH", "env HOME", "secret key", "secret home", "secret other"]);
    let path = std::env::var("PATH").expect("is set");
    assert_eq!(said, [path.as_str(), "unset", "has 7 bytes", &format!("has {home} bytes"), "none"]);
    let shown = format!("{:?}", world.spec(&[]).expect("read").effective);
    assert!(!shown.contains("hunter2"), "{shown}");
    // A secret that stands in the file is a mistake that is not repeated.
    for (host, says) in [
        ("[secrets.default]\nkey = \"hunter2\"\n", "names neither a file nor a variable"),
        ("[secrets.default]\nkey = { file = \"key\", env = \"hunter2\" }\n", "names neither"),
        ("secrets = \"hunter2\"\n", "`secrets` must be a table"),
        ("[secrets]\ndefault = \"hunter2\"\n", "must be a table"),
        ("", "the host's file has no secret `key`"),
    ] {
        world.host = Some(host.to_owned());
        let refused = world.spec(&[]).expect_err(host).to_string();
        assert!(refused.contains(says) && !refused.contains("hunter2"), "{host}: {refused}");
    }
    let mut world = World::new("secrets = [\"key\"]");
    for (place, says) in [
        ("file = \"none\"", "No such file"),
        ("file = \"/dev/zero\"", "not a regular file"),
        ("env = \"COFFERDAM_UNSET\"", "COFFERDAM_UNSET is not set"),
    ] {
        world.host = Some(format!("[secrets.default]\nkey = {{ {place} }}\n"));
        world.refused(says);
    }
    world.grants = "env = [\"COFFERDAM_UNSET\"]".to_owned();
    world.refused("grants.env: COFFERDAM_UNSET is not set");
}

#[test]
fn a_component_that_imports_what_it_is_not_granted_is_refused_by_the_import() {
    let mut world = World::new("secrets = [\"key\"]");
    world.is_bare = true;
    world.refused("wasi:filesystem/");
    world.grants = "scratch = \"1 MiB\"".to_owned();
    world.refused("cofferdam:operator/secrets@");
    world.grants = "scratch = \"1 MiB\"".to_owned();
    world.component = guest::probe();
    assert_eq!(world.run(&[], |_| {}), Ok(Outcome::Finished), "it need not use what it may");
    world.grants = "read = [\"lookup/a.txt\"], secrets = [\"key\"]".to_owned();
    world.component = guest::probe().with_file_name("outside.wasm");
    fs::remove_dir_all(world.path("outside.cofferdam")).expect("removed");
    fs::remove_dir_all(world.path("out")).expect("removed");
    world.refused("is no directory");
}

#[test]
fn a_host_grants_to_all_and_to_each_tenant() {
    const ALL: &str =
        "read = [\"LOOKUP\"], scratch = \"1 MiB\", env = [\"PATH\"], secrets = [\"key\"]";
    let mut world = World::new(ALL);
    fs::copy(&world.component, world.path("outside.wasm")).expect("copied");
    world.component = "outside.wasm".into();
    let secrets = SECRETS;
    let own = "read = [\"lookup\"]\nwrite = [\".\"]\nscratch = \"1 MiB\"\nenv = [\"PATH\"]\nsecrets = [\"key\"]\n";
    let write = "write = [\"out\"]\nread = [\"in.txt\"]\n";
    world.host = Some(format!("{secrets}[grants.default]\n{write}[grants.red]\n{own}"));
    world.is_bare = true;
    for (grants, says) in [
        (
            "read = [\"LOOKUP\"], scratch = \"1 KiB\"",
            "grants.scratch: it wants 1024, and may have 0",
        ),
        ("read = [\"LOOKUP\"], env = [\"PATH\"]", "grants.env: PATH"),
        ("read = [\"LOOKUP\"], secrets = [\"key\"]", "grants.secrets: key"),
        ("read = [\"LOOKUP\"]", "operator \"outside\" is to read"),
    ] {
        world.grants = grants.to_owned();
        for tenant in [None, Some("blue")] {
            world.tenant = tenant;
            world.refused(says);
        }
    }
    (world.grants, world.tenant) = (ALL.to_owned(), Some("red"));
    let said = world.said(&["read LOOKUP/a.txt", "write /scratch/a 1", "secret key"]);
    assert_eq!(said, ["lookup", "done", "has 7 bytes"]);
    // A tenant's own limit counts, whatever that of all is; a mistake of any table is said.
    let limits = |all: &str, red: &str| {
        format!(
            "{secrets}[grants.default]\n{own}limits.call = \"{all}\"\n[grants.red]\nlimits.call = \"{red}\"\n"
        )
    };
    world.host = Some(limits("2 s", "10 ms"));
    let refused = world.spec(&[]).expect_err("less").to_string();
    assert!(refused.contains("`grants.red.limits.call`"), "{refused}");
    world.host = Some(limits("10 ms", "2 s"));
    assert!(world.spec(&[]).is_ok());
    world.host = Some(limits("soon", "2 s"));
    let refused = world.spec(&[]).expect_err("no time").to_string();
    assert!(
        refused.contains("grants.default.limits.call") && refused.contains("cofferdam.toml:"),
        "{refused}"
    );
    world.host = Some(format!("[grants.default]\n{own}[grants.red]\nread = [1]\n"));
    let refused = world.spec(&[]).expect_err("no path").to_string();
    assert!(
        refused.contains("grants.red.read") && refused.contains("cofferdam.toml:8:9"),
        "{refused}"
    );
}

/// A handle in memory is that of a directory by its place: restored among others it would be that of another one.
#[test]
fn memory_fits_only_the_directories_that_it_was_written_with() {
    let mut world = World::new("read = [\"LOOKUP\"], scratch = \"1 MiB\"");
    world.rate = 100;
    let lines = ["read LOOKUP/a.txt"; 1_000];
    let stop = |job: &Job| after_checkpoints(job, 3, |job| job.stop());
    let stopped = world.run(&lines, stop);
    assert!(matches!(stopped, Ok(Outcome::Stopped { .. })), "{stopped:?}");
    for grants in ["read = [\"LOOKUP\"]", "read = [\"LOOKUP\", \"secret\"], scratch = \"1 MiB\""] {
        world.grants = grants.to_owned();
        let refused = world.run(&lines, |_| {}).expect_err(grants);
        assert_eq!(refused.code, Code::StateMismatch, "{refused}");
        assert!(refused.to_string().contains("/scratch"), "{refused}");
    }
    // How large it may be is in no memory.
    world.grants = "read = [\"LOOKUP\"], scratch = \"2 MiB\"".to_owned();
    let stopped = world.run(&lines, stop);
    assert!(matches!(stopped, Ok(Outcome::Stopped { .. })), "{stopped:?}");
    let said = committed(&world.path("out"));
    assert!(said.iter().all(|line| line.ends_with(" lookup")), "{said:?}");
}

/// What a guest holds is in no snapshot.
#[test]
fn a_file_that_is_held_across_a_checkpoint_declines_it() {
    let mut world = World::new("read = [\"LOOKUP\"]");
    world.rate = 200;
    let mut lines = vec!["hold LOOKUP/a.txt"];
    lines.extend(["held"; 200]);
    let began = Instant::now();
    let refused = world.run(&lines, |_| {}).expect_err("no checkpoint completes").to_string();
    assert!(refused.contains("in the middle of reading"), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(60));
    assert!(committed(&world.path("out")).is_empty());
}

/// The library of guests finds a directory by the longest of the names that it begins with.
#[test]
fn a_directory_is_found_by_the_name_in_the_manifest() {
    let mut world = World::new("read = [\"lookup/\", \"secret\"]");
    assert_eq!(world.said(&["read lookup/a.txt", "read secret/a.txt"]), ["lookup", "secret"]);
    for (grants, says) in [
        ("read = [\"lookup\", \"lookup/\"]", "twice"),
        ("read = [\"/scratch/a\"]", "own directory"),
        ("read = [1]", "a path is a text"),
        ("read = \"lookup\"", "must be an array"),
        ("scratch = -1", "grants.scratch"),
        ("http = [\"https://example.com\"]", "unknown key `operator.grants.http`"),
    ] {
        world.grants = grants.to_owned();
        let refused = world.spec(&[]).expect_err(grants).to_string();
        assert!(refused.contains(says), "{grants}: {refused}");
    }
}
