//! What a component's bytes do to whatever reads and compiles them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{Attack, HostileJob, pipe};
use crate::guest;

type Make = fn(&Path) -> Result<PathBuf>;

const ATTACKS: &[(&str, &str, &[&str], &str, Make)] = &[
    ("is a script", "the validator", &["C0013"], "", |dir| written(dir, b"#!/bin/sh\nrm -rf /\n")),
    ("is empty", "the validator", &["C0013"], "", |dir| written(dir, b"")),
    ("is cut off in the middle", "the validator", &["C0013"], "", |dir| {
        let bytes = hostile()?;
        written(dir, &bytes[..bytes.len() / 2])
    }),
    (
        "has a byte changed in the middle of its code",
        "the validator",
        &["C0013", "C0015", "C0014"],
        "",
        |dir| {
            let mut bytes = hostile()?;
            let middle = bytes.len() / 3;
            bytes[middle..middle + 8].fill(0xff);
            written(dir, &bytes)
        },
    ),
    ("is a core module", "the validator", &["C0013"], "", |dir| text(dir, "(module)")),
    ("is compiled code", "compiled code is never taken", &["C0013"], "", |dir| {
        written(dir, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0wasmtime")
    }),
    ("has 17 MiB", "the size of a component", &["C0037"], "more than 16 MiB", |dir| {
        let mut bytes = hostile()?;
        bytes.resize(17 << 20, 0);
        written(dir, &bytes)
    }),
    ("is a file without end", "only regular files are read", &["C0012"], "", |_| {
        Ok("/dev/zero".into())
    }),
    ("is a pipe that no one writes to", "only regular files are read", &["C0012"], "", |dir| {
        let path = dir.join("pipe.wasm");
        pipe(&path)?;
        Ok(path)
    }),
    ("is a directory", "only regular files are read", &["C0012"], "", |dir| Ok(dir.to_owned())),
    (
        "imports sockets",
        "imports are refused by name",
        &["C0014", "C0015"],
        "wasi:sockets",
        |dir| {
            text(
                dir,
                "(component (import \"wasi:sockets/instance-network@0.2.0\" (instance (export \"instance-network\" (func)))))",
            )
        },
    ),
    (
        "imports what there is not",
        "imports are refused by name",
        &["C0014", "C0015"],
        "evil:host",
        |dir| {
            text(
                dir,
                "(component (import \"evil:host/root\" (instance (export \"shell\" (func (param \"command\" string))))))",
            )
        },
    ),
    ("exports nothing", "the world of an operator", &["C0015"], "", |dir| text(dir, "(component)")),
    ("has a shared memory", "the validator", &["C0013", "C0014"], "", |dir| {
        module(dir, "(memory 1 1 shared)")
    }),
    ("has a memory of 64 bits", "the validator", &["C0013", "C0014"], "", |dir| {
        module(dir, "(memory i64 1)")
    }),
    ("has two memories in a module", "the validator", &["C0013", "C0014"], "", |dir| {
        module(dir, "(memory 1) (memory 1)")
    }),
    ("has garbage-collected types", "the validator", &["C0013", "C0014"], "", |dir| {
        module(dir, "(type (struct (field i32))) (memory 1)")
    }),
    ("has exceptions", "the validator", &["C0013", "C0014"], "", |dir| {
        module(dir, "(tag) (memory 1)")
    }),
    (
        "calls its accessors as the host calls its own",
        "names of a guest decide nothing",
        &["C0014", "C0015"],
        "",
        |dir| {
            module(
                dir,
                "(memory (export \"cofferdam-memory-0\") 1) (func (export \"cofferdam-grow-0\"))",
            )
        },
    ),
    ("takes core modules from outside", "the validator", &["C0014", "C0015"], "", |dir| {
        text(dir, "(component (import \"m\" (core module)))")
    }),
    (
        "hands a core module through a component in it",
        "the validator",
        &["C0014", "C0015"],
        "",
        |dir| {
            text(
                dir,
                "(component (component $c (core module $m (memory 1)) (export \"m\" (core module $m))) (instance $i (instantiate $c)) (alias export $i \"m\" (core module $m)) (core instance (instantiate $m)))",
            )
        },
    ),
    ("instantiates a module twice", "the validator", &["C0014", "C0015"], "", |dir| {
        text(
            dir,
            "(component (core module $m (memory 1) (global (mut i32) (i32.const 0))) (core instance (instantiate $m)) (core instance (instantiate $m)))",
        )
    }),
    ("has 30,000 components in it", "the validator", &["C0013", "C0037"], "", |dir| {
        text(dir, &format!("(component {})", "(component)".repeat(30_000)))
    }),
    ("nests components 1,000 deep", "the validator", &["C0013", "C0015", "C0037"], "", |dir| {
        // The text of so many would be refused by its own reader.
        let header = b"\0asm\x0d\0\x01\0";
        let around = |inner: Vec<u8>| [&header[..], &[4], &leb128(inner.len()), &inner].concat();
        written(dir, &(0..1_000).fold(header.to_vec(), |inner, _| around(inner)))
    }),
    ("nests 5,000 loops with 2,000 locals", "limits of the compiler", &["C0037"], "", |dir| {
        let locals = format!("(local {})", "i32 ".repeat(2_000));
        module(
            dir,
            &format!(
                "(memory 1) (func {locals} {} {})",
                "loop ".repeat(5_000),
                "end ".repeat(5_000)
            ),
        )
    }),
    ("has functions of 100,000 values", "limits of the compiler", &["C0037", "C0015"], "", |dir| {
        let body = "i32.const 1 i32.const 2 i32.add drop ".repeat(25_000);
        module(dir, &format!("(memory 1) {}", format!("(func {body})").repeat(20)))
    }),
    ("has 50,000 locals of 16 bytes", "the validator", &["C0013", "C0037", "C0015"], "", |dir| {
        module(dir, &format!("(memory 1) (func (local {}))", "v128 ".repeat(49_000)))
    }),
    ("has 200,000 functions", "limits of the compiler", &["C0013", "C0037", "C0015"], "", |dir| {
        module(dir, &format!("(memory 1) {}", "(func)".repeat(200_000)))
    }),
    (
        "branches to 100,000 places",
        "limits of the compiler",
        &["C0013", "C0037", "C0015"],
        "",
        |dir| {
            let targets = "0 ".repeat(100_000);
            module(dir, &format!("(memory 1) (func block i32.const 0 br_table {targets} end)"))
        },
    ),
];

/// A number as WebAssembly writes it.
fn leb128(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let rest = number >> 7;
        bytes.push((number & 0x7f) as u8 | if rest == 0 { 0 } else { 0x80 });
        number = rest;
        if number == 0 {
            return bytes;
        }
    }
}

fn hostile() -> Result<Vec<u8>> {
    Ok(fs::read(guest::probe().with_file_name("hostile.wasm"))?)
}

fn written(dir: &Path, bytes: &[u8]) -> Result<PathBuf> {
    let path = dir.join("hostile.wasm");
    fs::write(&path, bytes)?;
    Ok(path)
}

fn text(dir: &Path, text: &str) -> Result<PathBuf> {
    written(dir, &wat::parse_str(text)?)
}

fn module(dir: &Path, fields: &str) -> Result<PathBuf> {
    text(dir, &format!("(component (core module {fields}))"))
}

pub(super) fn attacks() -> Vec<Attack> {
    let attack = |(deed, stopped_by, expected, says, make): &(
        &str,
        &'static str,
        &'static [&'static str],
        &'static str,
        Make,
    )| {
        let make = *make;
        let strike = move |dir: &Path| {
            let component = make(dir)?;
            HostileJob { component: &component, config: "", tables: "", restarts: 0 }.lay(dir)
        };
        Attack {
            category: "a component's bytes",
            deed: (*deed).to_owned(),
            place: "check",
            stopped_by,
            expected,
            says,
            strike: Box::new(strike),
        }
    };
    ATTACKS.iter().map(attack).collect()
}
