//! Secrets that a host's file names and the operators of jobs may be granted. They never stand in a manifest.

use std::{
    collections::BTreeMap,
    io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use cofferdam_files::read_regular;
use cofferdam_settings::{Code, Problem};
use toml::de::{DeTable, DeValue};

type Result<T> = std::result::Result<T, Problem>;

/// The table of a host's file.
pub(super) const TABLE: &str = "secrets";

/// The most that one may have.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// Where a secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// In a file; a newline at its end does not count.
    File(PathBuf),
    /// In a variable of the host's environment.
    Env(String),
}

impl SecretSource {
    /// The secret, as it is now: a file may be exchanged while a job runs.
    ///
    /// # Errors
    /// Where it is not there, or is no secret: it has more than 64 KiB.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Env(name) => match std::env::var_os(name) {
                Some(secret) if secret.len() as u64 <= SECRET_BYTES_MAX => Ok(secret.into_vec()),
                Some(_) => {
                    Err(io::Error::other(format!("it has more than {SECRET_BYTES_MAX} bytes")))
                }
                None => Err(io::Error::other(format!("{name} is not set"))),
            },
            Self::File(path) => {
                let mut secret = read_regular(path, SECRET_BYTES_MAX)?;
                if secret.last() == Some(&b'\n') {
                    secret.pop();
                }
                Ok(secret)
            }
        }
    }
}

/// Secrets by name.
pub(super) type Secrets = BTreeMap<String, SecretSource>;

/// Reads the tables of all and of one tenant, whose own come before those of all.
pub(super) fn read(
    secrets: &DeValue<'_>,
    tenant: Option<&str>,
    host_file: &Path,
) -> Result<Secrets> {
    let base_dir = host_file.parent().unwrap_or_else(|| Path::new(""));
    // The line is not shown: it may be the secret itself that stands there.
    let wrong = |what: String| {
        Problem::new(Code::BadValue, what).detail(host_file.display()).hint(
            "secrets are in [secrets.default], or in [secrets.NAME] for a tenant: \
             api-key = { file = \"/run/secrets/api-key\" }, or { env = \"API_KEY\" }",
        )
    };
    let DeValue::Table(tables) = secrets else {
        return Err(wrong("`secrets` must be a table".to_owned()));
    };
    let mut known = Secrets::new();
    for of in ["default"].into_iter().chain(tenant) {
        let Some(table) = tables.get(of) else { continue };
        let DeValue::Table(table) = table.get_ref() else {
            return Err(wrong(format!("`secrets.{of}` must be a table")));
        };
        for (name, place) in table {
            let name = name.get_ref().as_ref();
            let source = source_of(place.get_ref(), base_dir);
            let what = || format!("`secrets.{of}.{name}` names neither a file nor a variable");
            let source = source.ok_or_else(|| wrong(what()))?;
            known.insert(name.to_owned(), source);
        }
    }
    Ok(known)
}

fn source_of(value: &DeValue<'_>, base_dir: &Path) -> Option<SecretSource> {
    let DeValue::Table(table) = value else { return None };
    let text = |table: &DeTable<'_>, key: &str| match table.get(key)?.get_ref() {
        DeValue::String(text) if !text.is_empty() => Some(text.to_string()),
        _ => None,
    };
    match (table.len(), text(table, "file"), text(table, "env")) {
        (1, Some(file), None) => Some(SecretSource::File(base_dir.join(file))),
        (1, None, Some(name)) => Some(SecretSource::Env(name)),
        _ => None,
    }
}
