//! What paths lead to: files of others, links, pipes and devices; and checkpoints that somebody has changed.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Result, ensure};

use super::{Attack, Laid, pipe};
use crate::{
    disk::copy_dir,
    guest,
    job::{after_checkpoints, run_manifest},
};

const REFUSED: &[&str] = &["C0038"];

/// A tenant's manifest asks for what the host does not grant: what is exchanged in it, for what, and by what it is
/// stopped.
const NAMED: &[(&str, &str, &str)] = &[
    ("reads a file of the host", "in/*.txt", "/etc/passwd"),
    ("reads the environment of the host", "in/*.txt", "/proc/self/environ"),
    ("reads a device", "in/*.txt", "/dev/mem"),
    ("reads beside its directory", "in/*.txt", "in/../secret/*.txt"),
    ("reads above its directory by a pattern", "in/*.txt", "in/.?/.?/etc/passwd"),
    ("reads through a link to a directory", "in/*.txt", "in/link/*.txt"),
    ("reads through a link to a file", "in/*.txt", "in/*.link"),
    ("writes beside its directory", "\"out/lines\"", "\"out/../secret/lines\""),
    ("writes through a link", "\"out/lines\"", "\"out/link/lines\""),
    ("writes where it may only read", "\"out/lines\"", "\"in/lines\""),
    ("keeps its state beside its directory", "\"out/state\"", "\"secret/state\""),
    ("keeps its state in the root", "\"out/state\"", "\"/\""),
    (
        "keeps its checkpoints in a bucket",
        "storage = \"sled\"\ndir = \"out/state\"",
        "storage = \"filesystem\"\ndir = \"s3://other/bucket\"",
    ),
    ("writes savepoints elsewhere", "interval =", "savepoint-dir = \"/tmp\"\ninterval ="),
    ("loads a component of somebody else", "outside.wasm\"", "../secret/outside.wasm\""),
    ("raises its memory", "limits.call = \"1 s\"", "limits.memory = \"2 GiB\""),
    ("raises its time", "limits.call = \"1 s\"", "limits.call = \"1 h\""),
    ("raises its log", "limits.call = \"1 s\"", "limits.log = \"1 GiB\""),
    ("gives its guest a directory of the host", "read = [\"in\"]", "read = [\"/etc\"]"),
    ("gives its guest the root", "read = [\"in\"]", "read = [\"/\"]"),
    ("gives its guest a directory beside", "read = [\"in\"]", "read = [\"in/../secret\"]"),
    ("gives its guest a directory by a link", "read = [\"in\"]", "read = [\"in/link\"]"),
    ("gives its guest more room", "scratch = \"64 KiB\"", "scratch = \"1 TiB\""),
    ("gives its guest the host's environment", "secrets =", "env = [\"PATH\"], secrets ="),
    ("gives its guest a secret of others", "secrets = [\"own\"]", "secrets = [\"own\", \"other\"]"),
];

/// What a guest does with what it was granted: the line that it obeys, and what it must say.
const DONE: &[(&str, &str, &str)] = &[
    ("reads beside its directory", "read in/../secret/a.txt", "PermissionDenied"),
    ("reads through a link", "read in/a.link", "PermissionDenied"),
    ("reads a file of the host", "read /etc/passwd", "NotFound"),
    ("reads a pipe", "read in/pipe", "PermissionDenied"),
    ("writes where it may only read", "write in/b.txt 1", "PermissionDenied"),
    ("fills the disk", "write /scratch/a 100000", "Uncategorized"),
    ("makes a file of a terabyte", "far /scratch/log 1000000000000", "Uncategorized"),
    ("makes a million files", "many /scratch 1000000", "StorageFull"),
    ("keeps room by removing what is open", "remove /scratch/log", "ResourceBusy"),
    ("makes links", "link /scratch/log /scratch/other", "PermissionDenied"),
    ("reads the environment", "env PATH", "unset"),
    ("asks for a secret of others", "secret other", "none"),
];

type Change = fn(&Path) -> Result<()>;

/// What is done to the state of a job before it resumes.
const CHANGED: &[(&str, &str, &[&str], Change)] = &[
    ("flips bits of both heads", "checksums", &["C0021", "C0030", "C0031", "C0018"], |dir| {
        each(dir, "HEAD", |path| flip(path, 9))
    }),
    ("cuts both heads off", "checksums", &["C0021", "C0030", "C0031", "C0018"], |dir| {
        each(dir, "HEAD", |path| cut(path, 7))
    }),
    ("empties both heads", "checksums", &["C0021", "C0030", "C0031", "C0018"], |dir| {
        each(dir, "HEAD", |path| cut(path, 0))
    }),
    (
        "flips a bit in every 500 bytes of the packs",
        "checksums",
        &["C0021", "C0030", "C0031"],
        |dir| each(dir, "pack", |path| flip(path, fs::metadata(path)?.len() as usize / 500)),
    ),
    ("cuts every pack in half", "checksums", &["C0021", "C0030", "C0031"], |dir| {
        each(dir, "pack", |path| cut(path, fs::metadata(path)?.len() / 2))
    }),
    (
        "makes every pack a sparse file of a terabyte",
        "sizes are checked",
        &["C0021", "C0030", "C0031", "finished"],
        |dir| each(dir, "pack", |path| cut(path, 1 << 40)),
    ),
    (
        "makes the record of the job endless",
        "only regular files of some size are read",
        &["C0018", "C0034"],
        |dir| {
            fs::remove_file(dir.join("JOB"))?;
            Ok(symlink("/dev/zero", dir.join("JOB"))?)
        },
    ),
    (
        "makes the record of the job a pipe",
        "only regular files of some size are read",
        &["C0018", "C0034"],
        |dir| {
            fs::remove_file(dir.join("JOB"))?;
            pipe(&dir.join("JOB"))
        },
    ),
    (
        "writes nonsense into the record of the job",
        "the record is checked",
        &["C0018", "C0034"],
        |dir| Ok(fs::write(dir.join("JOB"), "\u{1b}[2J")?),
    ),
    ("takes the record of the job away", "the marker of a state", &["C0018", "C0034"], |dir| {
        Ok(fs::remove_file(dir.join("JOB"))?)
    }),
];

/// Does something to each file whose name begins so.
fn each(dir: &Path, name: &str, mut act: impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let (mut waiting, mut count) = (vec![dir.to_owned()], 0);
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.file_name().is_some_and(|it| it.to_string_lossy().starts_with(name)) {
                act(&path)?;
                count += 1;
            }
        }
    }
    ensure!(0 < count, "no {name} in the state");
    Ok(())
}

fn flip(path: &Path, count: usize) -> Result<()> {
    let mut bytes = fs::read(path)?;
    ensure!(count < bytes.len(), "{} is too short", path.display());
    let step = bytes.len() / count;
    (0..count).for_each(|n| bytes[n * step + step / 2] ^= 1);
    Ok(fs::write(path, bytes)?)
}

fn cut(path: &Path, len: u64) -> Result<()> {
    Ok(File::options().write(true).open(path)?.set_len(len)?)
}

/// A host that grants two directories, and a tenant's job in them.
fn tenant(dir: &Path, lines: &str, from: &str, to: &str) -> Result<Laid> {
    for name in ["in", "out", "secret"] {
        fs::create_dir(dir.join(name))?;
    }
    fs::write(dir.join("secret/a.txt"), "the secret of somebody else\n")?;
    fs::write(dir.join("in/a.txt"), lines)?;
    fs::write(dir.join("key"), "key")?;
    symlink(dir.join("secret"), dir.join("in/link"))?;
    symlink(dir.join("secret"), dir.join("out/link"))?;
    symlink(dir.join("secret/a.txt"), dir.join("in/a.link"))?;
    let component = guest::probe().with_file_name("outside.wasm");
    fs::create_dir(dir.join("tenant"))?;
    fs::copy(&component, dir.join("tenant/outside.wasm"))?;
    fs::copy(&component, dir.join("secret/outside.wasm"))?;
    let host = "[grants.default]\nread = [\"in\"]\nwrite = [\"out\"]\nscratch = \"64 KiB\"\nsecrets = [\"own\"]\n\
                [secrets.default]\nown = { file = \"key\" }\nother = { file = \"key\" }\n";
    fs::write(dir.join("cofferdam.toml"), host)?;
    let text = "[job]\nname = \"tenant\"\n[restart-strategy]\ntype = \"none\"\n\
        [execution.checkpointing]\nstorage = \"sled\"\ndir = \"out/state\"\ninterval = \"1h\"\n\
        [[source]]\nname = \"in\"\nconnector = \"file\"\npath = \"in/*.txt\"\nkey = \"^\"\n\
        [[operator]]\nname = \"outside\"\ncomponent = \"outside.wasm\"\ninputs = [{ from = \"in\", partition = \"global\" }]\n\
        limits.call = \"1 s\"\nconfig = { log = \"/scratch/log\" }\ngrants = { read = [\"in\"], scratch = \"64 KiB\", secrets = [\"own\"] }\n\
        [[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"out/lines\"\nline = \"value\"\ninputs = [\"outside\"]\n";
    ensure!(text.contains(from), "{from} is not in the manifest");
    let here = format!("{}/", dir.display());
    let text = text.replacen(from, to, 1);
    // Paths of the tenant begin at its own directory.
    let text =
        text.replace("\"in/", &format!("\"{here}in/")).replace("\"out/", &format!("\"{here}out/"));
    let text = text
        .replace("\"in\"]", "\"@\"]")
        .replace("read = [\"@\"]", &format!("read = [\"{here}in\"]"));
    let text = text.replace("\"@\"]", "\"in\"]").replace("\"secret/", &format!("\"{here}secret/"));
    fs::write(dir.join("tenant/job.toml"), text)?;
    Ok(Laid { manifest: dir.join("tenant/job.toml"), host: Some(dir.join("cofferdam.toml")) })
}

/// The state of a job that was stopped in the middle, and its manifest.
fn stopped() -> &'static Path {
    static STOPPED: OnceLock<PathBuf> = OnceLock::new();
    STOPPED.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory").keep();
        let component = guest::probe();
        let text = format!(
            "[job]\nname = \"kept\"\n[execution.checkpointing]\ninterval = \"20ms\"\n\
             [[source]]\nname = \"in\"\nconnector = \"generator\"\ncount = 200000\nrate = 40000\n\
             [[operator]]\nname = \"probe\"\ncomponent = {component:?}\ninputs = [{{ from = \"in\", partition = \"hash\" }}]\nconfig = {{ quiet = true }}\n\
             [[sink]]\nname = \"out\"\nconnector = \"file\"\npath = \"out\"\nline = \"value\"\ninputs = [\"probe\"]\n"
        );
        fs::write(dir.join("job.toml"), text).expect("written");
        let manifest = dir.join("job.toml");
        // It makes a runtime of its own.
        let run = move || run_manifest(&manifest, |job| after_checkpoints(job, 5, |job| job.stop()));
        let ran = std::thread::spawn(run).join().expect("it runs");
        ran.outcome.expect("it stops");
        dir
    })
}

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (deed, from, to) in NAMED {
        attacks.push(Attack {
            category: "a tenant's manifest",
            deed: (*deed).to_owned(),
            place: "check",
            stopped_by: "`[grants.default]`",
            expected: REFUSED,
            says: "grant",
            strike: Box::new(|dir| tenant(dir, "env PATH\n", from, to)),
        });
    }
    for (deed, line, says) in DONE {
        let line: &'static str = line;
        let strike = move |dir: &Path| {
            let own = |word: &str| match word.starts_with("in/") {
                true => format!("{}/{word}", dir.display()),
                false => word.to_owned(),
            };
            let words: Vec<String> = line.split(' ').map(own).collect();
            let log = "log = \"/scratch/log\"";
            // What it says goes to the log as well.
            let laid =
                tenant(dir, &(words.join(" ") + "\n"), log, &format!("{log}, print = true"))?;
            pipe(&dir.join("in/pipe"))?;
            Ok(laid)
        };
        attacks.push(Attack {
            category: "a guest with files",
            deed: (*deed).to_owned(),
            place: "process",
            stopped_by: "what it was granted",
            expected: &["finished"],
            says,
            strike: Box::new(strike),
        });
    }
    for (deed, stopped_by, expected, change) in CHANGED {
        let strike = move |dir: &Path| {
            copy_dir(stopped(), dir)?;
            change(&dir.join("kept.cofferdam"))?;
            Ok(Laid { manifest: dir.join("job.toml"), host: None })
        };
        attacks.push(Attack {
            category: "a changed checkpoint",
            deed: (*deed).to_owned(),
            place: "resume",
            stopped_by,
            expected,
            says: "",
            strike: Box::new(strike),
        });
    }
    attacks
}
