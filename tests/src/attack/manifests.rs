//! What a manifest and a host's file do to whatever reads them.

use std::{fmt::Write, fs, path::Path};

use anyhow::Result;

use super::{Attack, Laid, laid};

type Lay = fn(&Path) -> Result<Laid>;

const GRAPH: &str = "[[source]]\nname = \"in\"\nconnector = \"generator\"\ncount = 1\n\
                     [[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n";

const VALUE: &[&str] = &["C0004"];

const ATTACKS: &[(&str, &str, &[&str], &str, Lay)] = &[
    ("has 4 billion tasks", "the number of tasks", VALUE, "", |dir| {
        of_job(dir, "parallelism = 4000000000\n")
    }),
    ("has a billion channels", "the number of channels", VALUE, "", |dir| {
        of_job(dir, "parallelism = 32768\n")
    }),
    ("has 5,000 nodes", "the number of nodes", VALUE, "at most 1000", |dir| {
        let mut text = "[job]\nname = \"a\"\n".to_owned();
        for n in 0..5_000 {
            let _ = write!(text, "[[source]]\nname = \"s{n}\"\nconnector = \"generator\"\n");
        }
        laid(dir, &text)
    }),
    ("has 20,000 inputs of one node", "the number of inputs", VALUE, "at most 256", |dir| {
        let inputs = "\"in\", ".repeat(20_000);
        laid(
            dir,
            &format!("[job]\nname = \"a\"\n{}", GRAPH.replace("[\"in\"]", &format!("[{inputs}]"))),
        )
    }),
    ("has 2 MiB", "the size of a manifest", &["C0001"], "more than", |dir| {
        of_job(dir, &format!("# {}\n", "x".repeat(2 << 20)))
    }),
    ("is a file without end", "the size of a manifest", &["C0001"], "", |_| {
        Ok(Laid { manifest: "/dev/zero".into(), host: None })
    }),
    ("nests arrays 100,000 deep", "the reader of TOML", &["C0002"], "", |dir| {
        of_job(dir, &format!("a = {}{}\n", "[".repeat(100_000), "]".repeat(100_000)))
    }),
    ("nests tables 10,000 deep", "the reader of TOML", &["C0002", "C0003"], "", |dir| {
        of_job(dir, &format!("a = {}1{}\n", "{ a = ".repeat(10_000), " }".repeat(10_000)))
    }),
    ("has keys of 10,000 dots", "the reader of TOML", &["C0002", "C0003"], "", |dir| {
        of_job(dir, &format!("{}a = 1\n", "a.".repeat(10_000)))
    }),
    ("has 50,000 unknown keys", "a hundred mistakes at most", &["C0003"], "", |dir| {
        let keys: String = (0..50_000).map(|n| format!("k{n} = 1\n")).collect();
        of_job(dir, &keys)
    }),
    ("has 50,000 settings for an operator", "the number of keys", &["C0004", "C0003"], "", |dir| {
        let keys: String = (0..50_000).map(|n| format!("k{n} = 1\n")).collect();
        let operator = "[[operator]]\nname = \"o\"\ncomponent = \"none.wasm\"\ninputs = [\"in\"]\n[operator.config]\n";
        laid(dir, &format!("[job]\nname = \"a\"\n{GRAPH}{operator}{keys}"))
    }),
    (
        "has one line of 900,000 characters with a mistake",
        "lines are cut",
        &["C0002", "C0003", "C0004"],
        "",
        |dir| of_job(dir, &format!("wrong = [{}1]\n", "1, ".repeat(300_000))),
    ),
    ("has escape sequences in a key", "texts are escaped", &["C0002", "C0003"], "", |dir| {
        of_job(dir, "\"\\u001b[2J\\u001b]0;owned\\u0007\" = 1\n")
    }),
    ("has escape sequences in a name", "texts are escaped", VALUE, "", |dir| {
        laid(dir, &format!("[job]\nname = \"\\u001b[2J\\n\\u202e\"\n{GRAPH}"))
    }),
    ("has raw escape sequences", "texts are escaped", &["C0002"], "", |dir| {
        of_job(dir, "x = \"\u{1b}[2J\"\n")
    }),
    ("is not UTF-8", "the reader", &["C0001", "C0002"], "", |dir| {
        fs::write(dir.join("job.toml"), b"[job]\nname = \"\xff\xfe\"\n")?;
        Ok(Laid { manifest: dir.join("job.toml"), host: None })
    }),
    ("has a name that leads elsewhere", "what a name may be", VALUE, "", |dir| {
        laid(dir, &format!("[job]\nname = \"../../elsewhere\"\n{GRAPH}"))
    }),
    ("has a name of 100,000 letters", "the size of a name", VALUE, "", |dir| {
        laid(dir, &format!("[job]\nname = \"{}\"\n{GRAPH}", "a".repeat(100_000)))
    }),
    ("has amounts beyond all numbers", "amounts are checked", &["C0004", "C0002"], "", |dir| {
        let operator = "[[operator]]\nname = \"o\"\ncomponent = \"none.wasm\"\ninputs = [\"in\"]\nlimits.memory = \"99999999999999999999 TiB\"\nlimits.call = \"1e400 s\"\n";
        laid(dir, &format!("[job]\nname = \"a\"\n{GRAPH}{operator}"))
    }),
    ("has inputs that form a cycle", "the graph is checked", &["C0008"], "", |dir| {
        let operator = |name: &str, from: &str| {
            format!(
                "[[operator]]\nname = \"{name}\"\ncomponent = \"none.wasm\"\ninputs = [\"{from}\"]\n"
            )
        };
        laid(
            dir,
            &format!("[job]\nname = \"a\"\n{GRAPH}{}{}", operator("x", "y"), operator("y", "x")),
        )
    }),
    (
        "has a regular expression that takes exponential time",
        "the library has none",
        &["C0107"],
        "",
        |dir| {
            fs::write(dir.join("in.txt"), format!("{}!\n", "a".repeat(50_000)))?;
            let source = "[[source]]\nname = \"in\"\nconnector = \"file\"\npath = \"in.txt\"\nkey = \"(a+)+$\"\n";
            let sink = "[[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n";
            laid(dir, &format!("[job]\nname = \"a\"\n{source}{sink}"))
        },
    ),
    ("has a regular expression of gigabytes", "the size of an expression", VALUE, "", |dir| {
        let source = "[[source]]\nname = \"in\"\nconnector = \"file\"\npath = \"in.txt\"\nkey = \"((a{1000}){1000}){1000}\"\n";
        let sink = "[[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n";
        laid(dir, &format!("[job]\nname = \"a\"\n{source}{sink}"))
    }),
    (
        "has a host's file whose YAML names itself again and again",
        "the reader of YAML",
        &["C0002"],
        "",
        |dir| {
            let mut yaml = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
            for n in 1..12 {
                let before = vec![format!("*a{}", n - 1); 10].join(", ");
                let _ = writeln!(yaml, "a{n}: &a{n} [{before}]");
            }
            with_host(dir, "config.yaml", &yaml)
        },
    ),
    ("has a host's file whose YAML is 100,000 deep", "the reader of YAML", &["C0002"], "", |dir| {
        with_host(
            dir,
            "config.yaml",
            &format!("a: {}{}\n", "[".repeat(100_000), "]".repeat(100_000)),
        )
    }),
    (
        "has a host's file of 100,000 lines",
        "nothing is harmed",
        &["finished", "C0003"],
        "",
        |dir| {
            let lines: String = (0..40_000).map(|n| format!("env.java.opts.x{n}: 1\n")).collect();
            with_host(dir, "flink-conf.yaml", &lines)
        },
    ),
];

fn of_job(dir: &Path, lines: &str) -> Result<Laid> {
    laid(
        dir,
        &format!(
            "[job]\nname = \"a\"\n{lines}{}",
            GRAPH.replace("[\"in\"]", "[{ from = \"in\", partition = \"rebalance\" }]")
        ),
    )
}

fn with_host(dir: &Path, name: &str, text: &str) -> Result<Laid> {
    fs::write(dir.join(name), text)?;
    let laid = laid(dir, &format!("[job]\nname = \"a\"\n{GRAPH}"))?;
    Ok(Laid { host: Some(dir.join(name)), ..laid })
}

pub(super) fn attacks() -> Vec<Attack> {
    let attack = |(deed, stopped_by, expected, says, lay): &(
        &str,
        &'static str,
        &'static [&'static str],
        &'static str,
        Lay,
    )| {
        Attack {
            category: "a manifest",
            deed: (*deed).to_owned(),
            place: "check",
            stopped_by,
            expected,
            says,
            strike: Box::new(*lay),
        }
    };
    ATTACKS.iter().map(attack).collect()
}
