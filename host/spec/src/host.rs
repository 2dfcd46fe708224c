//! Reads settings for every job of a host: a `cofferdam.toml`, or an existing `flink-conf.yaml` or
//! `config.yaml` as it is, older spellings included. `flink-conf.yaml` never was YAML: Flink reads it
//! line by line, and so it is here.
//!
//! Settings of a job come before those of the host, and those before the defaults. What Flink has
//! and a key that is ignored is reported with the reason; an unknown key is an error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use cofferdam_settings::{AnySetting, Code, Problem, closest};

use super::{flink::MEANINGLESS, tables};

/// The settings of a host, as the text of a TOML document.
#[derive(Debug, Clone)]
pub struct HostSettings {
    pub(super) path: PathBuf,
    pub(super) text: String,
    /// Whether the lines of `text` are those of the file.
    pub(super) has_lines: bool,
    /// Whose jobs are read with it.
    pub(super) tenant: Option<String>,
    /// What was left out, and why.
    pub warnings: Vec<String>,
}

/// What `state.backend.type` may be in Flink, in lower case, and what it is here.
const BACKENDS: &[(&str, &str)] = &[
    ("filesystem", "hashmap"),
    ("jobmanager", "hashmap"),
    ("org.apache.flink.runtime.state.filesystem.fsstatebackendfactory", "hashmap"),
    ("org.apache.flink.runtime.state.hashmap.hashmapstatebackendfactory", "hashmap"),
    ("org.apache.flink.runtime.state.memory.memorystatebackendfactory", "hashmap"),
    ("org.apache.flink.contrib.streaming.state.embeddedrocksdbstatebackendfactory", "rocksdb"),
    ("org.apache.flink.contrib.streaming.state.rocksdbstatebackendfactory", "rocksdb"),
    ("org.apache.flink.state.rocksdb.embeddedrocksdbstatebackendfactory", "rocksdb"),
    ("org.apache.flink.state.forst.forststatebackendfactory", "forst"),
];

/// What begins so is kept even where no row has it: the manifest's reader says what is wrong with it.
const RESTART: &str = "restart-strategy.";

/// The name that an older one of Flink's has here.
fn renamed(given: &str) -> Option<&'static str> {
    let rows = tables::of_host().map(AnySetting::row);
    rows.into_iter().find(|row| row.aliases.contains(&given)).map(|row| row.key)
}

impl HostSettings {
    /// Reads a file: one called `flink-conf*` as Flink up to 1.20 does, `.yaml` and `.yml` as YAML,
    /// everything else as TOML.
    ///
    /// # Errors
    /// Where it cannot be read, is not of its format, or has a key that nobody knows.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        let text = super::read_text(path).map_err(|error| {
            Problem::new(
                Code::ManifestUnreadable,
                format!("cannot read the host's settings {}", path.display()),
            )
            .because(&error)
        })?;
        Self::parse(path, text)
    }

    fn parse(path: &Path, text: String) -> Result<Self, Problem> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_yaml = path.extension().is_some_and(|end| end == "yaml" || end == "yml");
        match is_yaml {
            true if name.starts_with("flink-conf") => Self::from_lines(path, &text),
            true => Self::from_yaml(path, &text),
            false => Ok(Self { text, has_lines: true, ..Self::empty(path) }),
        }
    }

    fn empty(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            text: String::new(),
            has_lines: false,
            tenant: None,
            warnings: Vec::new(),
        }
    }

    /// The same for the jobs of a tenant: what the host grants it by a table of its own counts, too.
    #[must_use]
    pub fn for_tenant(self, name: String) -> Self {
        Self { tenant: Some(name), ..self }
    }

    /// A line is a key, a colon with a space behind it, and a value; what follows a `#` is no part of it.
    /// Of a key that is there twice the last counts.
    fn from_lines(path: &Path, text: &str) -> Result<Self, Problem> {
        let mut settings = Self::empty(path);
        let mut pairs = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            match line.split_once(": ").map(|(key, value)| (key.trim(), value.trim())) {
                Some((key, value)) if !key.is_empty() && !value.is_empty() => {
                    pairs.push((key.to_owned(), value.to_owned()));
                }
                _ if line.is_empty() => {}
                _ => settings.warnings.push(format!(
                    "{}:{number}: `{line}` is ignored, as in Flink: a setting is a key, a colon, a space and a value",
                    path.display()
                )),
            }
        }
        settings.take_all(&pairs)?;
        Ok(settings)
    }

    fn from_yaml(path: &Path, text: &str) -> Result<Self, Problem> {
        let document: serde_json::Value = serde_saphyr::from_str(text).map_err(|error| {
            Problem::new(Code::ManifestSyntax, format!("{} is not YAML", path.display()))
                .because(&error)
        })?;
        let mut flat = Vec::new();
        flatten("", &document, &mut flat);
        let mut settings = Self::empty(path);
        settings.take_all(&flat)?;
        Ok(settings)
    }

    /// An older spelling counts where the newer one is not there.
    fn take_all(&mut self, pairs: &[(String, String)]) -> Result<(), Problem> {
        let mut taken: BTreeMap<String, String> = BTreeMap::new();
        let is_old = |key: &str| renamed(key).is_some();
        let (old, new): (Vec<_>, Vec<_>) = pairs.iter().partition(|(key, _)| is_old(key));
        let mut problems = Vec::new();
        for (given, value) in old.into_iter().chain(new) {
            match self.take(given, value) {
                Ok(of_ours) => taken.extend(of_ours),
                Err(problem) => problems.push(problem),
            }
        }
        if let Some(all) = Problem::all(problems) {
            return Err(all);
        }
        for (key, value) in &taken {
            self.text.push_str(&super::setting_line(key, value));
        }
        Ok(())
    }

    /// What a setting is here, if it is anything.
    fn take(&mut self, given: &str, value: &str) -> Result<Option<(String, String)>, Problem> {
        let key = renamed(given).unwrap_or(given);
        if tables::of_host().any(|setting| setting.row().key == key) || key.starts_with(RESTART) {
            let backend = BACKENDS.iter().find(|(name, _)| value.eq_ignore_ascii_case(name));
            let value = match backend.filter(|_| key == "state.backend.type") {
                Some((_, here)) => {
                    self.warnings.push(format!(
                        "{}: `{given}` = \"{value}\" is taken for \"{here}\"",
                        self.path.display()
                    ));
                    here
                }
                None => value,
            };
            return Ok(Some((key.to_owned(), value.to_owned())));
        }
        let begins = |prefix: &str| {
            key.strip_prefix(prefix)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
        };
        if let Some((_, why)) = MEANINGLESS.iter().find(|(prefix, _)| begins(prefix)) {
            self.warnings.push(format!("{}: `{given}` is ignored: {why}", self.path.display()));
            return Ok(None);
        }
        let problem = Problem::new(Code::UnknownKey, format!("unknown key `{given}`"))
            .detail(format!("{}: {given}", self.path.display()));
        Err(match closest(given, tables::of_host().map(|setting| setting.row().key)) {
            Some(meant) => problem.hint(format!("did you mean `{meant}`?")),
            None => problem.hint("`cofferdam check --effective` lists the settings there are"),
        })
    }
}

fn flatten(prefix: &str, value: &serde_json::Value, flat: &mut Vec<(String, String)>) {
    match value {
        serde_json::Value::Object(entries) => {
            for (key, value) in entries {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, flat);
            }
        }
        serde_json::Value::String(text) => flat.push((prefix.to_owned(), text.clone())),
        serde_json::Value::Null => {}
        other => flat.push((prefix.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<HostSettings, Problem> {
        HostSettings::parse(Path::new("config.yaml"), text.to_owned())
    }

    fn lines(text: &str) -> HostSettings {
        HostSettings::parse(Path::new("flink-conf.yaml"), text.to_owned()).expect("read")
    }

    #[test]
    fn flink_conf_is_read_line_by_line() {
        let settings = lines(
            "env.java.opts: -Dx=a: b\ns3.secret-key: @abc\n# nothing\n\
             restart-strategy.fixed-delay.attempts: 010 # ten\n\
             execution.checkpointing.interval: 5 s\nexecution.checkpointing.interval: 7 s\n\
             execution.checkpointing.num-retained: 3\nstate.checkpoints.num-retained: 9\n\
             state.backend: filesystem\nexecution.checkpointing.timeout:9s\n",
        );
        let mut lines: Vec<&str> = settings.text.lines().collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "execution.checkpointing.interval = \"7 s\"",
                "execution.checkpointing.num-retained = 3",
                "restart-strategy.fixed-delay.attempts = 10",
                "state.backend.type = \"hashmap\"",
            ]
        );
        let warned = |what: &str| settings.warnings.iter().any(|warning| warning.contains(what));
        for what in ["env.java.opts", "s3.secret-key", "flink-conf.yaml:10: `exec", "taken for"] {
            assert!(warned(what), "{what}: {:?}", settings.warnings);
        }
    }

    #[test]
    fn keys_of_flink_that_mean_nothing_are_warned_about() {
        for key in [
            "zookeeper.sasl.disable",
            "resourcemanager.taskmanager-timeout",
            "jobstore.cache-size",
            "plugin.classloader.parent-first-patterns.default",
            "containerized.heap-cutoff-ratio",
            "external-resources",
            "external-resource.gpu.amount",
            "traces.reporters",
            "events.reporters",
            "user.artifacts.base-dir",
            "flink.hadoop.dfs.replication",
            "execution.sorted-inputs.enabled",
            "state.backend.async",
            "state.backend.rocksdb.memory.managed",
        ] {
            let settings = lines(&format!("{key}: 1"));
            assert_eq!((settings.warnings.len(), settings.text.as_str()), (1, ""), "{key}");
        }
    }

    #[test]
    fn old_and_new_spellings_flat_and_nested_are_the_same() {
        let flat = yaml(
            "restart-strategy: fixed-delay\nrestart-strategy.fixed-delay.attempts: 3\n\
             state.checkpoints.num-retained: 2\nstate.checkpoints.dir: file:///var/ck\n",
        );
        let nested = yaml(
            "restart-strategy:\n  type: fixed-delay\n  fixed-delay:\n    attempts: 3\n\
             execution:\n  checkpointing:\n    num-retained: 2\n    dir: file:///var/ck\n",
        );
        let lines = |settings: Result<HostSettings, Problem>| {
            let mut lines: Vec<String> =
                settings.expect("read").text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(lines(flat), lines(nested));
    }

    #[test]
    fn what_means_nothing_is_told_with_the_reason_and_what_is_unknown_is_refused() {
        let settings =
            yaml("taskmanager.memory.process.size: 4g\nrest.port: 8081\n").expect("read");
        assert!(settings.text.is_empty());
        assert_eq!(settings.warnings.len(), 2);
        assert!(settings.warnings.iter().any(|warning| warning.contains("no task manager")));
        let problem = yaml("execution.checkpointing.intervall: 1s\n").expect_err("unknown");
        assert_eq!(
            problem.hint.as_deref(),
            Some("did you mean `execution.checkpointing.interval`?")
        );
        let problem = yaml("checkpointing.interval: 1s\n").expect_err("unknown");
        assert_eq!(problem.code, Code::UnknownKey);
    }
}
