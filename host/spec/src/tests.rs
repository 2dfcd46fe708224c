//! Which strategy applies, row by row of Flink's own tests of its loaders.

use cofferdam_core::{graph::Edge, restart::ExponentialDelay};

use super::*;

fn spec(job: &str, host: Option<&str>) -> Result<JobSpec> {
    let text = format!(
        "[job]\nname = \"j\"\n\n[[source]]\nname = \"s\"\nconnector = \"generator\"\n\n{job}"
    );
    let host = host.map(|text| HostSettings {
        tenant: None,
        path: PathBuf::from("cofferdam.toml"),
        text: text.to_owned(),
        has_lines: true,
        warnings: Vec::new(),
    });
    JobSpec::parse(Path::new("job.toml"), &text, host.as_ref(), &cofferdam_connectors::builtin())
}

/// What counts of a setting.
fn counts(spec: &JobSpec, key: &str) -> String {
    let found = spec.effective.iter().find(|it| it.key == key);
    found.map_or_else(String::new, |it| it.value.clone())
}

fn strategy(job: Option<&str>, host: Option<&str>, is_checkpointed: bool) -> Result<String> {
    let lines = |name: &str| format!("[restart-strategy]\ntype = \"{name}\"\n");
    let interval = match is_checkpointed {
        true => "[execution.checkpointing]\ninterval = \"1s\"\n",
        false => "",
    };
    let job = job.map_or(String::new(), lines) + interval;
    let host = host.map(lines);
    spec(&job, host.as_deref()).map(|spec| counts(&spec, "restart-strategy.type"))
}

/// P for each edge that is pipelined and B for each that is blocking, in the order of the manifest.
fn exchanges(mode: &str, nodes: &str) -> String {
    let execution = format!(
        "[execution]\nruntime-mode = \"BATCH\"\nbatch-shuffle-mode = \"{mode}\"\n\n{nodes}"
    );
    let spec = spec(&execution, None).expect("a job");
    let letter = |edge: &Edge| if edge.exchange.must_be_pipelined() { 'P' } else { 'B' };
    spec.graph.edges().iter().map(letter).collect()
}

#[test]
fn approximate_local_recovery_is_for_streams_and_edges_that_say_nothing() {
    let nodes = operator("a", "{ from = \"s\", partition = \"hash\" }")
        + &operator("b", "\"a\"")
        + &operator("c", "{ from = \"b\", partition = \"hash\", exchange = \"pipelined\" }");
    let names = |lines: &str| -> Vec<&'static str> {
        let spec = spec(&format!("{lines}{nodes}"), None).expect("a job");
        spec.graph.edges().iter().map(|edge| edge.exchange.name()).collect()
    };
    let on = "[execution.state-recovery]\napproximate-local-recovery = true\n";
    assert_eq!(names(on), ["pipelined-approximate", "pipelined-bounded", "pipelined"]);
    let batch = format!("[execution]\nruntime-mode = \"BATCH\"\n{on}");
    assert_eq!(names(&batch), ["blocking", "pipelined-bounded", "pipelined"]);
    assert_eq!(names(""), ["pipelined-bounded", "pipelined-bounded", "pipelined"]);
}

fn operator(name: &str, inputs: &str) -> String {
    format!("[[operator]]\nname = \"{name}\"\ncomponent = \"c.wasm\"\ninputs = [{inputs}]\n\n")
}

const MODES: [&str; 4] = ["PIPELINED_FORCED", "PIPELINED", "BATCH", "BATCH_FORCED"];

#[test]
fn a_shuffle_mode_says_which_edges_of_a_chain_block() {
    // To a map, a filter, by key to a reduce, to a sink; without the combiner, which is none here.
    let nodes = [
        operator("map", "\"s\""),
        operator("filter", "\"map\""),
        operator("reduce", "{ from = \"filter\", partition = \"hash\" }"),
        "[[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"reduce\"]\n".to_owned(),
    ];
    let found = MODES.map(|mode| exchanges(mode, &nodes.concat()));
    assert_eq!(found, ["PPPP", "PPPP", "PPBP", "BBBB"]);
}

#[test]
fn branches_that_meet_again_break_the_pipeline_once() {
    let nodes = [
        operator("left", "\"s\""),
        operator("right", "{ from = \"s\", partition = \"hash\" }"),
        operator("join", "\"left\", \"right\""),
    ];
    let found = MODES.map(|mode| exchanges(mode, &nodes.concat()));
    assert_eq!(found, ["PPPP", "PPPB", "PBPB", "BBBB"]);
}

#[test]
fn the_restart_strategy_is_that_of_the_job_then_of_the_host_then_by_checkpointing() {
    let rows = [
        (Some("none"), Some("fixed-delay"), "none"),
        (Some("fixed-delay"), Some("exponential-delay"), "fixed-delay"),
        (Some("exponential-delay"), Some("failure-rate"), "exponential-delay"),
        (Some("failure-rate"), Some("fixed-delay"), "failure-rate"),
        (None, Some("none"), "none"),
        (None, Some("fixed-delay"), "fixed-delay"),
        (None, Some("exponential-delay"), "exponential-delay"),
        (None, Some("failure-rate"), "failure-rate"),
        (None, None, "none"),
    ];
    for (job, host, expected) in rows {
        assert_eq!(strategy(job, host, false).as_deref(), Ok(expected), "{job:?}, {host:?}");
    }
    for (job, host) in [(Some("invalid-strategy"), None), (None, Some("invalid-strategy"))] {
        let problem = strategy(job, host, false).expect_err("no such strategy");
        assert_eq!(problem.code, Code::BadValue);
    }
    let checkpointed = spec("[execution.checkpointing]\ninterval = \"1s\"\n", None);
    assert_eq!(
        checkpointed.expect("a job").restart.strategy,
        RestartStrategy::ExponentialDelay(ExponentialDelay {
            initial_backoff_ms: 1_000,
            backoff_ms_max: 60_000,
            backoff_multiplier: 1.5,
            reset_threshold_ms: 3_600_000,
            jitter_factor: 0.1,
            attempts_max: None,
        })
    );
}

#[test]
fn a_failover_strategy_is_known_by_its_name() {
    let load = |name: &str| {
        spec(&format!("[jobmanager.execution]\nfailover-strategy = \"{name}\"\n"), None)
            .map(|spec| spec.failover)
    };
    assert_eq!(load("full"), Ok(FailoverStrategy::Full));
    assert_eq!(load("region"), Ok(FailoverStrategy::Region));
    assert_eq!(spec("", None).map(|spec| spec.failover), Ok(FailoverStrategy::Region));
    assert_eq!(load("invalidStrategy").map_err(|problem| problem.code), Err(Code::BadValue));
}

#[test]
fn failures_may_merge_and_failovers_escalate() {
    let lines = "[execution.checkpointing]\ninterval = \"1s\"\n\
                 [restart-strategy]\nmerge-failures = true\n\
                 [jobmanager.execution]\nfailover-escalation = 3\n";
    let both = spec(lines, None).expect("a job");
    assert_eq!((both.restart.is_merging_failures, both.escalates_after), (true, Some(3)));
    let plain = spec("", None).expect("a job");
    assert_eq!((plain.restart.is_merging_failures, plain.escalates_after), (false, None));
    let unchecked = spec("[jobmanager.execution]\nfailover-escalation = 3\n", None);
    assert_eq!(unchecked.map_err(|problem| problem.code).err(), Some(Code::BadValue));
}

#[test]
fn settings_of_one_strategy_may_come_from_job_and_host() {
    let job = "[restart-strategy.fixed-delay]\nattempts = 7\n";
    let host = "[restart-strategy]\ntype = \"fixed-delay\"\nfixed-delay = { attempts = 2, delay = \"3s\" }\n";
    let spec = spec(job, Some(host)).expect("a job");
    assert_eq!(spec.restart.strategy, RestartStrategy::FixedDelay { attempts: 7, delay_ms: 3_000 });
    let is_delay = |it: &&Effective| it.key == "restart-strategy.fixed-delay.delay";
    let origin = &spec.effective.iter().find(is_delay).expect("it counts").place;
    assert!(
        origin.as_ref().is_some_and(|place| place.starts_with("cofferdam.toml:3:")),
        "{origin:?}"
    );
}

#[test]
fn host_cannot_have_nodes() {
    let problem = spec("", Some("[[sink]]\nname = \"x\"\n")).expect_err("a node");
    assert!(problem.message.contains("[[sink]]"), "{problem}");
}

#[test]
fn a_job_that_is_too_large_is_refused_before_anything_is_made_of_it() {
    let refused = |text: &str| spec(text, None).expect_err("too large").to_string();
    let sources: String = (0..1_000)
        .map(|n| format!("[[source]]\nname = \"s{n}\"\nconnector = \"generator\"\n"))
        .collect();
    assert!(refused(&sources).contains("nodes of the job: 1001, but at most 1000"));
    let inputs = vec!["\"s\""; 200_000].join(", ");
    let wide = format!("[[operator]]\nname = \"o\"\ncomponent = \"o.wasm\"\ninputs = [{inputs}]\n");
    assert!(refused(&wide).contains("inputs of one node: 200000"));
    let wide = |parallelism: u32, edge: &str| {
        format!(
            "[[source]]\nname = \"t\"\nconnector = \"generator\"\nparallelism = {parallelism}\n\
             [[operator]]\nname = \"o\"\ncomponent = \"o.wasm\"\nparallelism = {parallelism}\n\
             inputs = [{{ from = \"t\", partition = \"{edge}\" }}]\n"
        )
    };
    assert!(
        refused(&wide(32_768, "hash")).contains("channels between tasks of the job: 1073741824")
    );
    assert!(spec(&wide(1_000, "hash"), None).is_ok());
    assert!(spec(&wide(32_768, "forward"), None).is_ok());
    let many: String = ('a'..='d')
        .map(|n| {
            format!("[[source]]\nname = \"{n}\"\nconnector = \"generator\"\nparallelism = 32768\n")
        })
        .collect();
    assert!(refused(&many).contains("tasks of the job: 131073"));
}

/// A hundred thousand mistakes on one line of a megabyte took gigabytes to say.
#[test]
fn mistakes_are_counted_and_their_lines_are_cut() {
    let unknown: String = (0..50_000).map(|n| format!("k{n} = 1\n")).collect();
    let problem = spec(&unknown, None).expect_err("unknown keys");
    assert_eq!(problem.more.len() + 1, 100);
    let padding = "x".repeat(100_000);
    let text = format!("[[sink]]\nname = \"out\"\nlong = {{ pad = \"{padding}\", wrong = 1 }}\n");
    let problem = spec(&text, None).expect_err("unknown keys").to_string();
    assert!(problem.len() < 4_000, "{} bytes", problem.len());
}

#[test]
fn a_manifest_without_end_is_not_read_to_its_end() {
    let catalog = cofferdam_connectors::builtin();
    let refused = JobSpec::read_with(Path::new("/dev/zero"), None, &catalog);
    let refused = refused.expect_err("it never ends");
    assert_eq!(refused.code, Code::ManifestUnreadable);
    assert!(refused.to_string().contains("more than 1048576 bytes"), "{refused}");
}
