//! Every setting of a job as it counts, for `check --effective`.

use cofferdam_core::restart::RestartStrategy;

use super::{
    BACKLOG_LAG, FileSinkSpec, FileSourceSpec, GeneratorContent, GeneratorSpec, IfExists, JobSpec,
    LineContent, LineFormat, NodeKind, NodeSpec, OnBadRecord, OperatorSpec, SinkSpec, SnapshotMode,
    SourceSpec, StateBackend, StorageSpec, TimeFormat, partitioner_name,
};

type Rows = Vec<(String, String)>;

fn ms(ms: u64) -> String {
    format!("{ms} ms")
}

fn bytes(bytes: u64) -> String {
    format!("{bytes} bytes")
}

fn or<T>(value: Option<T>, none: &str, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| none.to_owned(), show)
}

impl JobSpec {
    /// Every setting with its value: those of the whole job under their keys, then those of each node
    /// as `operator.NAME.KEY`.
    #[must_use]
    pub fn effective(&self) -> Vec<(String, String)> {
        let mut rows = self.effective_execution();
        if let StateBackend::Sled(backend) = &self.state_backend {
            for (key, value) in [
                ("cache", backend.cache_bytes),
                ("write-buffer", backend.write_buffer_bytes),
                ("guest-cache", backend.guest_cache_bytes),
            ] {
                rows.push((format!("state.backend.sled.{key}"), bytes(value)));
            }
        }
        let (name, values) = strategy_settings(&self.restart.strategy);
        for (key, value) in values {
            rows.push((format!("restart-strategy.{name}.{key}"), value));
        }
        self.nodes.iter().for_each(|node| self.effective_node(node, &mut rows));
        rows
    }

    fn effective_execution(&self) -> Rows {
        let settings = &self.checkpoint;
        let (storage, dir) = match &self.storage {
            StorageSpec::Sled(dir) => ("sled", dir.display().to_string()),
            StorageSpec::Objects { location, .. } => ("filesystem", location.clone()),
            StorageSpec::Memory => ("memory", "none".to_owned()),
        };
        let mode = if self.is_exactly_once { "EXACTLY_ONCE" } else { "AT_LEAST_ONCE" };
        let savepoint_dir = self.savepoint_dir.as_ref();
        let savepoint_dir = or(savepoint_dir, "none", |dir| dir.display().to_string());
        let backlog = or(settings.backlog_interval_ms, "as at other times", ms);
        let (strategy, _) = strategy_settings(&self.restart.strategy);
        let checkpointing = |key: &str| format!("execution.checkpointing.{key}");
        vec![
            ("job.parallelism".to_owned(), self.parallelism.to_string()),
            ("execution.runtime-mode".to_owned(), self.runtime_mode.to_owned()),
            ("execution.batch-shuffle-mode".to_owned(), self.batch_shuffle_mode.to_owned()),
            (checkpointing("interval"), or(settings.interval_ms, "none", ms)),
            (checkpointing("mode"), mode.to_owned()),
            (checkpointing("interval-during-backlog"), backlog),
            (checkpointing("timeout"), ms(settings.timeout_ms)),
            (checkpointing("min-pause"), ms(settings.min_pause_ms)),
            (checkpointing("max-concurrent-checkpoints"), settings.concurrent_max.to_string()),
            (
                checkpointing("tolerable-failed-checkpoints"),
                or(settings.tolerable_failures, "any", |number| number.to_string()),
            ),
            (checkpointing("num-retained"), settings.retained_max.to_string()),
            (checkpointing("unaligned.enabled"), settings.unaligned_after_ms.is_some().to_string()),
            (checkpointing("aligned-checkpoint-timeout"), ms(self.aligned_timeout_ms)),
            (checkpointing("snapshot-compression"), self.is_compressing.to_string()),
            (checkpointing("externalized-checkpoint-retention"), self.retention.name().to_owned()),
            (checkpointing("storage"), storage.to_owned()),
            (checkpointing("dir"), dir),
            (checkpointing("savepoint-dir"), savepoint_dir),
            (BACKLOG_LAG.to_owned(), or(self.backlog_lag_ms, "none", ms)),
            ("state.backend.type".to_owned(), self.state_backend.name().to_owned()),
            (
                "execution.state-recovery.approximate-local-recovery".to_owned(),
                self.is_approximate.to_string(),
            ),
            ("jobmanager.execution.failover-strategy".to_owned(), self.failover.name().to_owned()),
            (
                "jobmanager.execution.failover-escalation".to_owned(),
                or(self.escalates_after, "none", |failovers| failovers.to_string()),
            ),
            (
                "restart-strategy.merge-failures".to_owned(),
                self.restart.is_merging_failures.to_string(),
            ),
            ("restart-strategy.type".to_owned(), strategy.to_owned()),
        ]
    }

    fn effective_node(&self, node: &NodeSpec, rows: &mut Rows) {
        let (kind, own) = match &node.kind {
            NodeKind::Source(SourceSpec::File(source)) => ("source", file_source(source)),
            NodeKind::Source(SourceSpec::Generator(source)) => ("source", generator(source)),
            NodeKind::Operator(operator) => ("operator", self.operator(operator)),
            NodeKind::Sink(sink) => ("sink", sink_rows(sink)),
        };
        let id = self.nodes.iter().position(|other| other.name == node.name).unwrap_or(0);
        let of_graph = self.graph.operators().nth(id).map(|(_, it)| it.parallelism);
        let common = [
            ("uid".to_owned(), node.uid.clone()),
            ("parallelism".to_owned(), of_graph.unwrap_or(0).to_string()),
        ];
        let inputs = node.inputs.iter().enumerate().map(|(place, input)| {
            let producer = &self.node(input.from).name;
            let output = input.output.as_ref().map_or(String::new(), |output| format!(".{output}"));
            let partition = partitioner_name(input.partitioner);
            let edge =
                self.graph.edges().iter().find(|edge| {
                    self.node(edge.to).name == node.name && edge.input as usize == place
                });
            let exchange = edge.map_or("", |edge| edge.exchange.name());
            (format!("inputs[{place}]"), format!("{producer}{output}, {partition}, {exchange}"))
        });
        for (key, value) in common.into_iter().chain(inputs).chain(own) {
            rows.push((format!("{kind}.{}.{key}", node.name), value));
        }
    }

    fn operator(&self, operator: &OperatorSpec) -> Rows {
        let snapshot = match operator.snapshot {
            SnapshotMode::Memory => "memory",
            SnapshotMode::Declared => "declared",
            SnapshotMode::Both => "both",
        };
        let limits = &operator.limits;
        let mut rows = vec![
            ("component".to_owned(), operator.component.display().to_string()),
            ("max-parallelism".to_owned(), operator.max_parallelism.to_string()),
            ("snapshot".to_owned(), snapshot.to_owned()),
            (
                "on-trap".to_owned(),
                operator.dead_letter_after.map_or("fail", |_| "dead-letter").to_owned(),
            ),
            ("limits.memory".to_owned(), bytes(limits.memory_bytes_max)),
            ("limits.call".to_owned(), format!("{} ms", limits.call_max.as_millis())),
            ("limits.output".to_owned(), bytes(limits.output_bytes_max)),
            ("limits.handles".to_owned(), limits.handles_max.to_string()),
            ("limits.table-elements".to_owned(), limits.table_elements_max.to_string()),
            ("limits.state".to_owned(), bytes(limits.state_bytes_max)),
            ("limits.partition".to_owned(), bytes(limits.partition_bytes_max)),
            (
                "limits.log".to_owned(),
                format!("{} a second", bytes(limits.log_bytes_per_second_max)),
            ),
        ];
        if let Some(traps) = operator.dead_letter_after {
            rows.push(("dead-letter-after".to_owned(), traps.to_string()));
        }
        if matches!(self.state_backend, StateBackend::Sled(_)) {
            rows.push(("state-cache".to_owned(), bytes(operator.state_cache_bytes)));
        }
        let config = operator.config.iter();
        rows.extend(config.map(|(key, value)| (format!("config.{key}"), value.clone())));
        rows
    }
}

fn file_source(source: &FileSourceSpec) -> Rows {
    let format = match source.format {
        LineFormat::Text => "text",
        LineFormat::Json => "json",
        LineFormat::Csv => "csv",
    };
    let times = match &source.timestamp_format {
        TimeFormat::Millis => "millis",
        TimeFormat::Seconds => "seconds",
        TimeFormat::Rfc3339 => "rfc3339",
        TimeFormat::Pattern(pattern) => pattern,
    };
    let on_bad_record = match source.on_bad_record {
        OnBadRecord::Fail => "fail",
        OnBadRecord::Skip => "skip",
        OnBadRecord::DeadLetter => "dead-letter",
    };
    let mut rows = vec![
        ("connector", "file".to_owned()),
        ("path", source.path.clone()),
        ("format", format.to_owned()),
        ("key", or(source.key.clone(), "none", |key| key)),
        ("timestamp", or(source.timestamp.clone(), "none", |timestamp| timestamp)),
        ("timestamp-format", times.to_owned()),
        ("max-out-of-orderness", ms(source.out_of_orderness_ms)),
        ("idle-timeout", or(source.idle_timeout_ms, "none", ms)),
        ("max-record-size", bytes(source.record_bytes_max as u64)),
        ("on-bad-record", on_bad_record.to_owned()),
        ("split-size", bytes(source.split_bytes)),
        ("rate", or(source.rate, "none", |rate| rate.to_string())),
    ];
    if source.format == LineFormat::Csv {
        rows.push(("header", source.has_header.to_string()));
        rows.push(("delimiter", char::from(source.delimiter).escape_default().to_string()));
    }
    named(rows)
}

fn generator(source: &GeneratorSpec) -> Rows {
    let mut rows = vec![
        ("connector", "generator".to_owned()),
        ("count", or(source.count, "none", |count| count.to_string())),
        ("rate", or(source.rate, "none", |rate| rate.to_string())),
        ("seed", source.seed.to_string()),
        ("timestamps", source.has_timestamps.to_string()),
    ];
    match &source.content {
        GeneratorContent::Words { vocabulary, exponent } => {
            rows.push(("content", "words".to_owned()));
            rows.push(("vocabulary", vocabulary.to_string()));
            rows.push(("exponent", exponent.to_string()));
        }
        GeneratorContent::Sequence => rows.push(("content", "sequence".to_owned())),
    }
    named(rows)
}

fn sink_rows(sink: &SinkSpec) -> Rows {
    let content = |line: LineContent| match line {
        LineContent::Value => "value".to_owned(),
        LineContent::KeyValue => "key-value".to_owned(),
    };
    named(match sink {
        SinkSpec::File(FileSinkSpec { path, line, if_exists, rolling }) => {
            let if_exists = match if_exists {
                IfExists::Fail => "fail",
                IfExists::Replace => "replace",
            };
            let interval = rolling.interval;
            vec![
                ("connector", "file".to_owned()),
                ("path", path.display().to_string()),
                ("line", content(*line)),
                ("if-exists", if_exists.to_owned()),
                ("roll-size", or(rolling.size, "none", bytes)),
                ("roll-interval", or(interval, "none", |it| format!("{} ms", it.as_millis()))),
            ]
        }
        SinkSpec::Stdout { line } => {
            vec![("connector", "stdout".to_owned()), ("line", content(*line))]
        }
        SinkSpec::Discard => vec![("connector", "discard".to_owned())],
    })
}

fn named(rows: Vec<(&str, String)>) -> Rows {
    rows.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The strategy's name, and what is set of it.
pub(super) fn strategy_settings(
    strategy: &RestartStrategy,
) -> (&'static str, Vec<(&'static str, String)>) {
    match strategy {
        RestartStrategy::None => ("none", Vec::new()),
        RestartStrategy::FixedDelay { attempts, delay_ms } => {
            ("fixed-delay", vec![("attempts", attempts.to_string()), ("delay", ms(*delay_ms))])
        }
        RestartStrategy::FailureRate { failures_per_interval_max, interval_ms, delay_ms } => (
            "failure-rate",
            vec![
                ("max-failures-per-interval", failures_per_interval_max.to_string()),
                ("failure-rate-interval", ms(*interval_ms)),
                ("delay", ms(*delay_ms)),
            ],
        ),
        RestartStrategy::ExponentialDelay(settings) => (
            "exponential-delay",
            vec![
                ("initial-backoff", ms(settings.initial_backoff_ms)),
                ("max-backoff", ms(settings.backoff_ms_max)),
                ("backoff-multiplier", settings.backoff_multiplier.to_string()),
                ("reset-backoff-threshold", ms(settings.reset_threshold_ms)),
                ("jitter-factor", settings.jitter_factor.to_string()),
                (
                    "attempts-before-reset-backoff",
                    settings.attempts_max.map_or("infinite".to_owned(), |max| max.to_string()),
                ),
            ],
        ),
    }
}
