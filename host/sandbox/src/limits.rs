//! What a guest may use. Every limit binds by default; each default is a named constant.

use std::{fmt, time::Duration};

use wasmtime::ResourceLimiter;

/// How often a guest is interrupted, to look at its time and to let others run.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// Linear memory of one instance: four times what a keyed operator with a million keys needs.
const MEMORY_BYTES_MAX: u64 = 256 << 20;
/// Run time of one call: ten thousand times what a batch usually takes.
const CALL_MAX: Duration = Duration::from_secs(1);
/// What one call may wait: for a clock, as nothing else can be waited for.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// What one call may give back: a thousand times the batch it was given.
const OUTPUT_BYTES_MAX: u64 = 64 << 20;
/// Handles to host resources held at a time. Standard output and error need four.
const HANDLES_MAX: u32 = 64;
/// Elements of all tables: function pointers. A large component has ten thousand.
const TABLE_ELEMENTS_MAX: u64 = 100_000;
/// Memories of all its modules. Each is an open file of the host's, and a component of one language has one.
const MEMORIES_MAX: usize = 4;
/// What a guest may write to the log in a second; the rest is dropped and counted.
const LOG_BYTES_PER_SECOND_MAX: u64 = 64 << 10;

/// The limits of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of linear memory, all memories together. Default: 256 MiB.
    pub memory_bytes_max: u64,
    /// Processor time that one call may take, what the host does for it included. Default: 1 s.
    pub call_max: Duration,
    /// Time that one call may wait for something to happen, and not for its turn. Default: 10 s.
    pub wait_max: Duration,
    /// Bytes that one call may give back. Default: 64 MiB.
    pub output_bytes_max: u64,
    /// Handles to host resources held at a time. Default: 64.
    pub handles_max: u32,
    /// Elements of all tables together. Default: 100,000.
    pub table_elements_max: u64,
    /// Bytes of log messages a second; what is beyond is dropped. Default: 64 KiB.
    pub log_bytes_per_second_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes_max: MEMORY_BYTES_MAX,
            call_max: CALL_MAX,
            wait_max: WAIT_MAX,
            output_bytes_max: OUTPUT_BYTES_MAX,
            handles_max: HANDLES_MAX,
            table_elements_max: TABLE_ELEMENTS_MAX,
            log_bytes_per_second_max: LOG_BYTES_PER_SECOND_MAX,
        }
    }
}

/// A limit that a guest has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::memory_bytes_max`].
    Memory {
        /// What it asked for.
        wanted_bytes: u64,
        /// What it may have.
        bytes_max: u64,
    },
    /// [`Limits::call_max`].
    Call {
        /// What a call may take.
        max: Duration,
    },
    /// [`Limits::wait_max`].
    Wait {
        /// What a call may wait.
        max: Duration,
    },
    /// [`Limits::output_bytes_max`].
    Output {
        /// What a call may give back.
        bytes_max: u64,
    },
    /// [`Limits::handles_max`].
    Handles {
        /// How many it may hold.
        max: u32,
    },
    /// [`Limits::table_elements_max`].
    Table {
        /// How many elements it may have.
        elements_max: u64,
    },
    /// Declared state that the host keeps, which the [`Host`](crate::Host) bounds.
    State {
        /// What it would have.
        wanted_bytes: u64,
        /// What it may have.
        bytes_max: u64,
    },
    /// The stack of the guest's calls.
    Stack,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { wanted_bytes, bytes_max } => {
                write!(f, "it wants {wanted_bytes} bytes of memory, and may have {bytes_max}")
            }
            Self::Call { max } => {
                write!(f, "a call ran longer than {} ms", max.as_millis())
            }
            Self::Wait { max } => {
                write!(f, "a call waited longer than {} ms", max.as_millis())
            }
            Self::Output { bytes_max } => {
                write!(f, "a call gave back more than {bytes_max} bytes")
            }
            Self::Handles { max } => {
                write!(f, "it holds more than {max} resources of the host")
            }
            Self::Table { elements_max } => {
                write!(f, "its tables want more than {elements_max} elements")
            }
            Self::State { wanted_bytes, bytes_max } => {
                write!(f, "it wants {wanted_bytes} bytes of state, and may have {bytes_max}")
            }
            Self::Stack => write!(f, "its calls are nested too deeply (stack overflow)"),
        }
    }
}

impl std::error::Error for Limit {}

/// Answers wasmtime's questions during a call, and remembers what was refused: a guest that gets
/// no memory traps in its own allocator, and that trap is then really a limit.
#[derive(Debug)]
pub(crate) struct Meter {
    memory_bytes_max: u64,
    memory_bytes: u64,
    table_elements_max: u64,
    table_elements: u64,
    refused: Option<Limit>,
}

impl Meter {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            memory_bytes_max: limits.memory_bytes_max,
            memory_bytes: 0,
            table_elements_max: limits.table_elements_max,
            table_elements: 0,
            refused: None,
        }
    }

    /// Forgets earlier refusals: a new call begins.
    pub(crate) fn begin_call(&mut self) {
        self.refused = None;
    }

    pub(crate) fn refused(&self) -> Option<Limit> {
        self.refused
    }
}

impl ResourceLimiter for Meter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let wanted_bytes = self.memory_bytes + (desired - current) as u64;
        if self.memory_bytes_max < wanted_bytes {
            self.refused = Some(Limit::Memory { wanted_bytes, bytes_max: self.memory_bytes_max });
            return Ok(false);
        }
        self.memory_bytes = wanted_bytes;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let wanted = self.table_elements + (desired - current) as u64;
        if self.table_elements_max < wanted {
            self.refused = Some(Limit::Table { elements_max: self.table_elements_max });
            return Ok(false);
        }
        self.table_elements = wanted;
        Ok(true)
    }

    fn instances(&self) -> usize {
        64
    }

    fn tables(&self) -> usize {
        64
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}

/// What compiling one component may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CompileLimits {
    /// Bytes of the component. Default: 64 MiB.
    pub component_bytes_max: u64,
    /// Bytes of memory. Default: 2 GiB.
    pub memory_bytes_max: u64,
    /// Bytes of compiled code. Default: 256 MiB.
    pub code_bytes_max: u64,
    /// Processor time of all its threads. Default: 60 s, a hundred times what an operator of 1 MB takes.
    pub processor_max: Duration,
    /// Time from its start to its answer. Default: 120 s.
    pub wall_max: Duration,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            component_bytes_max: 64 << 20,
            memory_bytes_max: 2 << 30,
            code_bytes_max: 256 << 20,
            processor_max: Duration::from_secs(60),
            wall_max: Duration::from_secs(120),
        }
    }
}

/// A limit that compiling a component has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompileLimit {
    /// [`CompileLimits::component_bytes_max`].
    Component {
        /// How many it may have.
        bytes_max: u64,
    },
    /// [`CompileLimits::memory_bytes_max`].
    Memory {
        /// How many it may have.
        bytes_max: u64,
    },
    /// [`CompileLimits::code_bytes_max`].
    Code {
        /// How many there may be.
        bytes_max: u64,
    },
    /// [`CompileLimits::processor_max`].
    Processor {
        /// What it may take.
        max: Duration,
    },
    /// [`CompileLimits::wall_max`].
    Wall {
        /// What it may take.
        max: Duration,
    },
}

impl fmt::Display for CompileLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        match self {
            Self::Component { bytes_max } => {
                write!(f, "it has more than {} MiB", mib(*bytes_max))
            }
            Self::Memory { bytes_max } => {
                write!(f, "compiling it takes more than {} MiB of memory", mib(*bytes_max))
            }
            Self::Code { bytes_max } => {
                write!(f, "its compiled code has more than {} MiB", mib(*bytes_max))
            }
            Self::Processor { max } => {
                write!(f, "compiling it takes more than {} s of processor time", max.as_secs())
            }
            Self::Wall { max } => write!(f, "compiling it takes more than {} s", max.as_secs()),
        }
    }
}
