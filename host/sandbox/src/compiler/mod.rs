//! Compiles components: in a child process that has limits and no rights, or in this one.
//!
//! A component of a few kilobytes can keep a compiler busy for minutes and fill the memory, and the parsers and the
//! compiler are a million lines that work on what somebody else has written. So a program that loads components of
//! others lets a child parse, check, rewrite and compile them: [`serve`] is all of it.

mod confine;
mod protocol;

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{Condvar, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use wasmtime::Engine;

use self::protocol::{ANSWER_HEAD_BYTES, Answer, Request};
pub use crate::limits::{CompileLimit, CompileLimits};
use crate::{
    config::compiling_config,
    rewrite::{ComponentError, rewrite},
};

/// Where components are compiled.
#[derive(Debug, Clone, Default)]
pub enum Compiler {
    /// In this process: for components that are trusted like the program itself.
    #[default]
    InProcess,
    /// In a child process for each component.
    Child {
        /// The program to start, whose `main` calls [`serve`] when it is given these arguments.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<OsString>,
        /// What it may use.
        limits: CompileLimits,
    },
}

/// The compiled code of a component, for `engine`.
pub(crate) fn compile(
    compiler: &Compiler,
    engine: &Engine,
    without_signals: bool,
    bytes: &[u8],
) -> Result<Vec<u8>, ComponentError> {
    match compiler {
        Compiler::InProcess => compile_for(engine, bytes),
        Compiler::Child { program, arguments, limits } => {
            if limits.component_bytes_max < bytes.len() as u64 {
                let bytes_max = limits.component_bytes_max;
                return Err(ComponentError::Limit(CompileLimit::Component { bytes_max }));
            }
            let _turn = Turn::wait();
            let mut command = Command::new(program);
            command.args(arguments);
            Dialog::begin(command, &Request { limits: *limits, without_signals }, bytes)
                .map_err(ComponentError::NoCompiler)?
                .end()
        }
    }
}

fn compile_for(engine: &Engine, bytes: &[u8]) -> Result<Vec<u8>, ComponentError> {
    let instrumented = rewrite(bytes)?;
    let refused = |error: wasmtime::Error| ComponentError::Compile(error.into_boxed_dyn_error());
    engine.precompile_component(&instrumented).map_err(refused)
}

/// At most as many compilers at a time as there are cores.
struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Turn {
    fn wait() -> Self {
        let max = thread::available_parallelism().map_or(1, usize::from);
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let running = ENDED.wait_while(running, |running| max <= *running);
        *running.unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}

/// What a compiler says about its end is cut after this.
const LAST_WORDS_MAX: u64 = 16 << 10;

/// The conversation with a child, which ends with it.
struct Dialog {
    child: Child,
    limits: CompileLimits,
    until: Instant,
    answer: mpsc::Receiver<Vec<u8>>,
    last_words: mpsc::Receiver<Vec<u8>>,
}

impl Drop for Dialog {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Dialog {
    fn begin(mut command: Command, request: &Request, bytes: &[u8]) -> io::Result<Self> {
        let limits = request.limits;
        // It has no use for what is ours: no environment, no directory, no open file.
        command.env_clear().env("RAYON_NUM_THREADS", threads()).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn()?;
        let until = Instant::now() + limits.wall_max;
        let (to_answer, answer) = mpsc::channel();
        let (to_last_words, last_words) = mpsc::channel();
        let mut it = Self { child, limits, until, answer, last_words };
        let pipes = (it.child.stdin.take(), it.child.stdout.take(), it.child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(io::Error::other("a child without pipes"));
        };
        let mut question = request.encode();
        question.extend_from_slice(bytes);
        // A child that has died does not read on; its answer says so.
        let ask = move || drop(stdin.write_all(&question));
        thread::Builder::new().name("cofferdam-ask".to_owned()).spawn(ask)?;
        read_up_to(stdout, limits.code_bytes_max + ANSWER_HEAD_BYTES, to_answer)?;
        read_up_to(stderr, LAST_WORDS_MAX, to_last_words)?;
        Ok(it)
    }

    fn end(mut self) -> Result<Vec<u8>, ComponentError> {
        let left = self.until.saturating_duration_since(Instant::now());
        let Ok(answer) = self.answer.recv_timeout(left) else {
            return Err(ComponentError::Limit(CompileLimit::Wall { max: self.limits.wall_max }));
        };
        if self.limits.code_bytes_max < answer.len() as u64 {
            let bytes_max = self.limits.code_bytes_max;
            return Err(ComponentError::Limit(CompileLimit::Code { bytes_max }));
        }
        match Answer::decode(answer) {
            Some(answer) => answer.into_result(),
            None => Err(self.autopsy()),
        }
    }

    /// Why there is no answer. The child has closed its pipes, so it is about to end.
    fn autopsy(&mut self) -> ComponentError {
        let limits = self.limits;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < self.until => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => return ComponentError::Limit(CompileLimit::Wall { max: limits.wall_max }),
            }
        };
        let last_words = self.last_words.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
        let last_words = String::from_utf8_lossy(&last_words).into_owned();
        cause_of_death(status, &last_words, limits)
    }
}

/// Reads a pipe to its end, or up to a number of bytes, beside the caller.
fn read_up_to(
    pipe: impl Read + Send + 'static,
    bytes_max: u64,
    to: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let read = move || {
        let mut bytes = Vec::new();
        // What a broken pipe leaves is judged like any other.
        let _ = pipe.take(bytes_max).read_to_end(&mut bytes);
        let _ = to.send(bytes);
    };
    thread::Builder::new().name("cofferdam-answer".to_owned()).spawn(read).map(drop)
}

/// A child that could not begin ends by this: it says nothing about the component.
const CANNOT_BEGIN: u8 = 75;

const SIGXCPU: i32 = 24;

fn cause_of_death(status: ExitStatus, last_words: &str, limits: CompileLimits) -> ComponentError {
    if last_words.contains("memory allocation of") || last_words.contains("Cannot allocate memory")
    {
        let bytes_max = limits.memory_bytes_max;
        return ComponentError::Limit(CompileLimit::Memory { bytes_max });
    }
    if status.code() == Some(i32::from(CANNOT_BEGIN)) {
        return ComponentError::NoCompiler(io::Error::other(last_words.trim().to_owned()));
    }
    if status.signal() == Some(SIGXCPU) {
        let max = limits.processor_max;
        return ComponentError::Limit(CompileLimit::Processor { max });
    }
    let words = last_words.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    ComponentError::Crashed { how: format!("{status}: {words:.400}") }
}

/// A compiler uses at most four cores.
fn threads() -> String {
    thread::available_parallelism().map_or(1, usize::from).min(4).to_string()
}

/// Answers one request on standard input: the `main` of a child. It takes all of its rights from itself first.
#[must_use]
pub fn serve() -> ExitCode {
    let mut stdin = io::stdin().lock();
    let request = match Request::read(&mut stdin) {
        Ok(request) => request,
        Err(error) => return failed(&error),
    };
    if let Err(error) = confine::confine(&request.limits) {
        return failed(&error);
    }
    let mut bytes = Vec::new();
    let component_max = request.limits.component_bytes_max;
    if let Err(error) = stdin.take(component_max).read_to_end(&mut bytes) {
        return failed(&error);
    }
    // Its threads are made by the first component, and have the filters of this one.
    let engine = Engine::new(&compiling_config(request.without_signals));
    let compiled = match engine {
        Ok(engine) => compile_for(&engine, &bytes),
        Err(error) => return failed(&io::Error::other(format!("{error:#}"))),
    };
    match Answer::of(compiled).write(&mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &io::Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "{error}");
    ExitCode::from(CANNOT_BEGIN)
}
