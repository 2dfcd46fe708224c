//! Connectors whose calls block until somebody opens a gate: they hold up neither another job of the engine nor the
//! end of their own.

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use cofferdam_connector::{
    Answer, Catalog, Result, Sink, Source, TaskContext,
    blocking::{BlockingSink, BlockingSource, OffThread, ReadOutcome},
    catalog::{
        Formats, NodeContext, OutputContext, SinkConnector, SinkPlan, SinkSpec, SourceConnector,
        SourcePlan, SourceSpec,
    },
    ready,
    sink::Guarantee,
};
use cofferdam_connectors::builtin;
use cofferdam_contract::{Batch, Format};
use cofferdam_core::{checkpoint::Purpose, ids::CheckpointId, job::Outcome};
use cofferdam_engine::{Engine, EngineOptions, JobHandle, job::JobOptions};
use cofferdam_settings::{AnySetting, Problem, Section};
use cofferdam_spec::JobSpec;
use cofferdam_tests::guest;

/// Whoever comes waits until it is open.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_open: bool,
    waiting: usize,
}

impl Gate {
    fn wait(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        state.waiting += 1;
        let state = self.changed.wait_while(state, |state| !state.is_open).expect("not poisoned");
        drop(state);
    }

    fn waiting(&self) -> usize {
        self.state.lock().expect("not poisoned").waiting
    }

    fn open(&self) {
        self.state.lock().expect("not poisoned").is_open = true;
        self.changed.notify_all();
    }
}

/// Opens the gate when the test ends, however it ends: its runtime waits for what blocks.
struct OpensAtEnd(Arc<Gate>);

impl Drop for OpensAtEnd {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Source, sink and what both are made of.
#[derive(Debug, Clone)]
struct Blocked(Arc<Gate>);

impl BlockingSource for Blocked {
    fn read(&mut self) -> Result<ReadOutcome> {
        self.0.wait();
        Ok(ReadOutcome::Wait(Duration::from_millis(1)))
    }

    fn position(&mut self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }
}

impl BlockingSink for Blocked {
    fn write(&mut self, _: &Batch) -> Result<()> {
        self.0.wait();
        Ok(())
    }

    fn pre_commit(&mut self, _: CheckpointId, _: Purpose) -> Result<Vec<u8>> {
        self.0.wait();
        Ok(Vec::new())
    }

    fn commit(&mut self, _: CheckpointId) -> Result<()> {
        self.0.wait();
        Ok(())
    }
}

impl SourceConnector for Blocked {
    fn name(&self) -> &'static str {
        "blocked"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        &[]
    }

    fn read(&self, _: &Section<'_>, _: &Path) -> std::result::Result<Arc<dyn SourceSpec>, Problem> {
        Ok(Arc::new(self.clone()))
    }
}

impl SourceSpec for Blocked {
    fn formats(&self) -> Formats {
        Formats { key: None, value: Format::Text }
    }

    fn is_bounded(&self) -> bool {
        false
    }

    fn prepare(&self, _: NodeContext<'_>) -> std::result::Result<Arc<dyn SourcePlan>, Problem> {
        Ok(Arc::new(self.clone()))
    }
}

impl SourcePlan for Blocked {
    fn open(&self, task: &TaskContext, _: Option<Vec<u8>>) -> Answer<'static, Box<dyn Source>> {
        ready(Ok(Box::new(OffThread::new(self.clone(), task.blocking.clone()))))
    }

    fn redistribute<'a>(
        &'a self,
        _: &'a [&'a [u8]],
        parallelism: usize,
    ) -> Answer<'a, Vec<Vec<u8>>> {
        ready(Ok(vec![Vec::new(); parallelism]))
    }
}

impl SinkConnector for Blocked {
    fn name(&self) -> &'static str {
        "blocked"
    }

    fn settings(&self) -> &'static [&'static dyn AnySetting] {
        &[]
    }

    fn read(&self, _: &Section<'_>, _: &Path) -> std::result::Result<Arc<dyn SinkSpec>, Problem> {
        Ok(Arc::new(self.clone()))
    }
}

impl SinkSpec for Blocked {
    fn guarantee(&self) -> Guarantee {
        Guarantee::AtLeastOnce
    }

    fn claim(&self, _: OutputContext<'_>) -> std::result::Result<Box<dyn SinkPlan>, Problem> {
        Ok(Box::new(self.clone()))
    }
}

impl SinkPlan for Blocked {
    fn open(&self, task: &TaskContext, _: Option<Vec<u8>>) -> Answer<'static, Box<dyn Sink>> {
        ready(Ok(Box::new(OffThread::new(self.clone(), task.blocking.clone()))))
    }
}

async fn submit(engine: &Engine, catalog: &Catalog, dir: &Path, text: &str) -> JobHandle {
    std::fs::create_dir_all(dir).expect("a directory");
    let path = dir.join("job.toml");
    let spec = JobSpec::parse(&path, text, None, catalog).expect("a job");
    let checked = engine.check(spec).await.expect("it can run");
    engine.submit(checked, JobOptions::default()).await.expect("it begins")
}

const STUCK: &str = r#"
[job]
name = "stuck"
parallelism = 4
[execution.checkpointing]
interval = "10ms"
"#;

const FINE: &str = r#"
[job]
name = "fine"
parallelism = 2
[[source]]
name = "in"
connector = "generator"
count = 20000
[[sink]]
name = "out"
connector = "discard"
inputs = ["in"]
"#;

/// More calls block than the runtime has threads. On the same threads another job runs to its end; and jobs whose
/// calls never return are canceled all the same, half a minute later: their calls are given that long to end.
#[test]
fn calls_that_block_hold_up_neither_another_job_of_the_engine_nor_their_own_end() {
    let source = "[[source]]\nname = \"in\"\nconnector = \"blocked\"\n";
    let sink = "[[sink]]\nname = \"out\"\nconnector = \"blocked\"\ninputs = [\"in\"]\n";
    let generator = "[[source]]\nname = \"in\"\nconnector = \"generator\"\n";
    let discard = "[[sink]]\nname = \"out\"\nconnector = \"discard\"\ninputs = [\"in\"]\n";
    let gate = Arc::<Gate>::default();
    let blocked = Blocked(gate.clone());
    let catalog = builtin().source(blocked.clone()).sink(blocked);
    let dir = tempfile::tempdir().expect("a directory");
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().expect("a runtime");
    let _opens = OpensAtEnd(gate.clone());
    runtime.block_on(async {
        let cache_dir = Some(guest::root().join("target/tests-cache"));
        let engine = Engine::new(EngineOptions { cache_dir, ..EngineOptions::default() })
            .expect("an engine");
        let mut stuck = Vec::new();
        for (number, nodes) in
            [[source, discard], [generator, sink], [source, sink]].iter().enumerate()
        {
            let text = format!("{STUCK}{}{}", nodes[0], nodes[1]);
            let dir = dir.path().join(number.to_string());
            stuck.push(submit(&engine, &catalog, &dir, &text).await);
        }
        // Four tasks each; of the third job the sinks have nothing to write.
        let deadline = Instant::now() + Duration::from_secs(20);
        while gate.waiting() < 12 {
            assert!(Instant::now() < deadline, "only {} calls block", gate.waiting());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let fine = submit(&engine, &catalog, &dir.path().join("fine"), FINE).await;
        let ended = tokio::time::timeout(Duration::from_secs(20), fine.ended()).await;
        assert_eq!(ended.expect("the other job is held up"), Ok(Outcome::Finished));

        stuck.iter().for_each(JobHandle::cancel);
        let began = Instant::now();
        for job in &stuck {
            let ended = tokio::time::timeout(Duration::from_secs(60), job.ended()).await;
            let ended = ended.expect("its own end is held up");
            assert!(matches!(ended, Ok(Outcome::Canceled { .. })), "{ended:?}");
        }
        assert!(Duration::from_secs(20) < began.elapsed(), "nothing has blocked");
    });
}
