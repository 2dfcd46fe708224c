//! Does what its records say with files, variables and secrets, and says what came of it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
};

use cofferdam_sdk::{host, prelude::*};

/// Keeps a file open from one record to the next, if it is asked to.
#[operator]
#[derive(Default)]
pub struct Outside {
    held: Option<File>,
    prints: bool,
    lines: u64,
}

impl Operator for Outside {
    type Key<'a> = Text<'a>;
    type In<'a> = Text<'a>;
    type OutKey<'a> = Text<'a>;
    type Out<'a> = Text<'a>;

    fn open(&mut self, context: &Context) -> Result<()> {
        // The directories are handles, which are to be taken here.
        let _ = fs::metadata("/");
        self.prints = context.config.get_or("print", false)?;
        if let Some(path) = context.config.get("log") {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let mut file = file.map_err(|error| Error::failed(error.to_string()))?;
            // A stream is a handle, too, and the first write takes it.
            file.write_all(b"opened\n").map_err(|error| Error::failed(error.to_string()))?;
            self.held = Some(file);
        }
        Ok(())
    }

    fn process(&mut self, record: Record<'_, Self>, out: &mut Output<'_, Self>) -> Result<()> {
        self.lines += 1;
        let words: Vec<&str> = record.value.split(' ').collect();
        let said = match self.act(&words) {
            Ok(said) => said,
            Err(error) => format!("{:?}", error.kind()),
        };
        if self.prints {
            println!("{said}");
        }
        out.emit(Text(""), Text(&format!("{} {said}", words.join(" "))));
        Ok(())
    }
}

impl Outside {
    fn act(&mut self, words: &[&str]) -> io::Result<String> {
        let number = |at: usize| words.get(at).and_then(|it| it.parse::<u64>().ok()).unwrap_or(0);
        match *words {
            ["read", path] => fs::read_to_string(path),
            ["list", path] => Ok(fs::read_dir(path)?.count().to_string()),
            ["length", path] => Ok(fs::metadata(path)?.len().to_string()),
            ["write", path, _] => fs::write(path, vec![b'x'; number(2) as usize]).map(done),
            ["append", path, _] => {
                let mut file = OpenOptions::new().append(true).open(path)?;
                file.write_all(&vec![b'x'; number(2) as usize]).map(done)
            }
            ["cut", path, _] => {
                OpenOptions::new().write(true).open(path)?.set_len(number(2)).map(done)
            }
            ["far", path, _] => {
                let mut file = OpenOptions::new().write(true).open(path)?;
                file.seek(SeekFrom::Start(number(2)))?;
                file.write_all(b"x").map(done)
            }
            ["remove", path] => fs::remove_file(path).map(done),
            ["mkdir", path] => fs::create_dir(path).map(done),
            ["deep", path, _] => {
                let mut path = std::path::PathBuf::from(path);
                for _ in 0..number(2) {
                    path.push("d");
                    fs::create_dir(&path)?;
                }
                Ok("done".to_owned())
            }
            ["rmdir", path] => fs::remove_dir(path).map(done),
            ["move", from, to] => fs::rename(from, to).map(done),
            ["link", from, to] => fs::hard_link(from, to).map(done),
            ["many", path, _] => {
                for n in 0..number(2) {
                    File::create(format!("{path}/{n}"))?;
                }
                Ok("done".to_owned())
            }
            ["hold", path] => {
                self.held = Some(File::open(path)?);
                Ok("done".to_owned())
            }
            ["let-go"] => {
                self.held = None;
                Ok("done".to_owned())
            }
            ["held"] => {
                let mut text = String::new();
                let file = self.held.as_mut().ok_or(io::ErrorKind::NotFound)?;
                file.read_to_string(&mut text)?;
                Ok(text)
            }
            ["log"] => {
                let file = self.held.as_mut().ok_or(io::ErrorKind::NotFound)?;
                writeln!(file, "line {}", self.lines).map(done)
            }
            ["env", name] => Ok(std::env::var(name).unwrap_or_else(|_| "unset".to_owned())),
            ["secret", name] => Ok(match host::secret(name) {
                Some(secret) => format!("has {} bytes", secret.len()),
                None => "none".to_owned(),
            }),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

fn done(_: ()) -> String {
    "done".to_owned()
}
