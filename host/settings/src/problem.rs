//! Problems that people can act on: each has a code, says what and where, and what to do next.

use std::{error::Error, fmt, ops::Range};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use cofferdam_core::failure::{FailureCause, Obstacle, os_error};

macro_rules! codes {
    ($($name:ident = $number:literal, $exit:literal, $title:literal;)*) => {
        /// What kind of problem it is; `docs/errors.md` has a section for each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $title] $name,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The number, as it is printed: `C0003`.
            #[must_use]
            pub fn number(self) -> &'static str {
                match self { $(Self::$name => $number,)* }
            }

            /// What the code stands for, in one line.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// The exit code of a program that ends because of it: 1 the job failed, 2 bad usage
            /// or manifest, 70 a bug of the host.
            #[must_use]
            pub fn exit_code(self) -> u8 {
                match self { $(Self::$name => $exit,)* }
            }
        }
    };
}

codes! {
    ManifestUnreadable = "C0001", 2, "The manifest cannot be read";
    ManifestSyntax = "C0002", 2, "The manifest is not TOML";
    UnknownKey = "C0003", 2, "The manifest has an unknown key";
    BadValue = "C0004", 2, "A setting has an invalid value";
    MissingKey = "C0005", 2, "A required setting is missing";
    DuplicateName = "C0006", 2, "Two operators have the same name";
    UnknownInput = "C0007", 2, "An input is unknown";
    Cycle = "C0008", 2, "The inputs form a cycle";
    ForwardParallelism = "C0009", 2, "A forward edge joins different parallelisms";
    HashWithoutKey = "C0010", 2, "A hash edge carries records without keys";
    FormatMismatch = "C0011", 2, "The two ends of an edge disagree on the format";
    ComponentUnreadable = "C0012", 2, "A component's file cannot be read";
    NotAComponent = "C0013", 2, "A file is not a WebAssembly component";
    CannotCheckpoint = "C0014", 2, "A component cannot be checkpointed";
    OtherWorld = "C0015", 2, "A component is not an operator";
    SourceUnreadable = "C0016", 2, "A source has nothing to read";
    OutputUnwritable = "C0017", 2, "A sink's output directory cannot be used";
    StateUnusable = "C0018", 2, "The state directory cannot be used";
    StateInUse = "C0019", 2, "The state directory belongs to another run";
    StateMismatch = "C0020", 2, "The checkpoint does not fit the job";
    StoreDamaged = "C0021", 2, "No checkpoint in the state directory is intact";
    Excluded = "C0022", 2, "Two settings exclude each other";
    CannotStart = "C0023", 2, "The program cannot start";
    BuildFailed = "C0024", 2, "An operator crate cannot be built";
    ProjectExists = "C0025", 2, "The directory of the new project is taken";
    NotRunning = "C0026", 2, "The job is not running";
    InputChanged = "C0027", 1, "The input of a source has changed";
    OutputTaken = "C0028", 2, "An output is in use or was modified";
    OutputDiverged = "C0029", 2, "The state is older than the output";
    StoreInDoubt = "C0030", 1, "It is unknown whether a checkpoint is complete";
    CheckpointsMissing = "C0031", 2, "The newest checkpoints are missing";
    SchemaMismatch = "C0032", 2, "Declared state has another schema";
    StateWithoutKeys = "C0033", 2, "Declared state on records without keys";
    NotOurs = "C0034", 2, "The directory is not a state directory";
    AlreadyFinished = "C0035", 0, "The job has finished";
    OtherFinished = "C0036", 2, "The job has ended and does not restart by itself";
    CompileLimit = "C0037", 2, "A component takes too much to compile";
    NotGranted = "C0038", 2, "The host does not grant it";
    Trapped = "C0101", 1, "A task trapped and the job gave up";
    LimitExceeded = "C0102", 1, "A task exceeded a limit and the job gave up";
    Rejected = "C0103", 1, "A task rejected its input and the job gave up";
    Environment = "C0104", 1, "The environment failed and the job gave up";
    CheckpointsFailed = "C0105", 1, "Too many checkpoints failed and the job gave up";
    RequestRefused = "C0106", 1, "The running job refused the request";
    BadRecord = "C0107", 1, "A source cannot parse a record";
    OpenRefused = "C0108", 1, "An operator refuses to open";
    ForeignKey = "C0109", 1, "State is stored under a key that is not a record key of its task";
    HostBug = "C0170", 70, "An invariant of the host broke";
}

/// A place in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The document's file.
    pub path: String,
    /// Its line, from 1 on, if its lines are those of the file.
    pub line: Option<usize>,
    /// Its column, from 1 on, in characters.
    pub column: usize,
    /// The line's text; of a long one, a part with the place.
    pub text: String,
    /// The bytes of the text that are meant.
    pub marked: Range<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}:{}: {}", self.path, self.column, self.text),
            None => write!(f, "{}: {}", self.path, self.text),
        }
    }
}

impl Place {
    /// The line, with what is meant marked below it.
    fn drawn(&self) -> String {
        if self.text[..self.marked.start].chars().count() + 1 < self.column {
            return format!(" --> {self}");
        }
        let snippet = Snippet::source(&self.text)
            .path(&self.path)
            .line_start(self.line.unwrap_or(1))
            .annotation(AnnotationKind::Primary.span(self.marked.clone()));
        Renderer::plain().render(&[Group::with_level(Level::ERROR).element(snippet)])
    }
}

/// A problem with everything that is known about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind it is.
    pub code: Code,
    /// What, on what: lower case, no final dot.
    pub message: String,
    /// Where in a document it is.
    pub place: Option<Box<Place>>,
    /// Where else, and what the machine says about it.
    pub details: Vec<String>,
    /// The number of the operating system's error that lies behind it.
    pub os_error: Option<i32>,
    /// What to do next.
    pub hint: Option<String>,
    /// What else is wrong, of its own.
    pub more: Vec<Problem>,
}

impl Problem {
    /// A problem with nothing but its message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            place: None,
            details: Vec::new(),
            os_error: None,
            hint: None,
            more: Vec::new(),
        }
    }

    /// Says where in a document it is.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(Box::new(place));
        self
    }

    /// The same without what stands at its place, which is not to be shown.
    #[must_use]
    pub fn without_line(mut self) -> Self {
        if let Some(place) = &mut self.place {
            (place.text, place.marked) = (String::from("..."), 0..0);
        }
        self
    }

    /// Everything that is known about it, each on lines of its own.
    #[must_use]
    pub fn all_details(&self) -> Vec<String> {
        let place = self.place.iter().map(ToString::to_string);
        place.chain(self.details.iter().cloned()).collect()
    }

    /// Adds where it is, or why.
    #[must_use]
    pub fn detail(mut self, detail: impl fmt::Display) -> Self {
        self.details.push(detail.to_string());
        self
    }

    /// Adds an error that lies behind it, and remembers what the operating system says.
    #[must_use]
    pub fn because(self, error: &(dyn Error + 'static)) -> Self {
        self.with_os_error(os_error(error)).detail(error)
    }

    /// Remembers what the operating system says, by its number.
    #[must_use]
    pub fn with_os_error(mut self, number: Option<i32>) -> Self {
        self.os_error = self.os_error.or(number);
        self
    }

    /// Several problems as one: the first, with the others behind it.
    pub fn all(problems: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut problems = problems.into_iter();
        let mut first = problems.next()?;
        first.more.extend(problems);
        Some(first)
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// How much of a record a message shows.
const SHOWN_BYTES: usize = 120;

/// The beginning of a record, on one line.
#[must_use]
pub fn shown(record: &[u8]) -> String {
    let text = String::from_utf8_lossy(&record[..record.len().min(SHOWN_BYTES)]);
    let cut = if SHOWN_BYTES < record.len() { "..." } else { "" };
    format!("`{}{cut}`", text.escape_debug())
}

impl From<&FailureCause> for Code {
    fn from(cause: &FailureCause) -> Self {
        match cause {
            FailureCause::Trap { .. } => Self::Trapped,
            FailureCause::LimitExceeded { .. } => Self::LimitExceeded,
            FailureCause::Rejected { .. } => Self::Rejected,
            FailureCause::Environment { .. } => Self::Environment,
            FailureCause::CheckpointsFailed { .. } => Self::CheckpointsFailed,
            FailureCause::Permanent { obstacle, .. } => match obstacle {
                Obstacle::StateMismatch => Self::StateMismatch,
                Obstacle::InputChanged => Self::InputChanged,
                Obstacle::BadRecord => Self::BadRecord,
                Obstacle::ForeignKey => Self::ForeignKey,
                Obstacle::OpenRefused => Self::OpenRefused,
                Obstacle::OutputTaken => Self::OutputTaken,
                Obstacle::StoreDamaged => Self::StoreDamaged,
                Obstacle::StoreInDoubt { .. } => Self::StoreInDoubt,
                Obstacle::Limit(_) => Self::LimitExceeded,
            },
            FailureCause::HostBug { .. } => Self::HostBug,
        }
    }
}

impl Problem {
    /// What to do next: what helps against an error of the operating system, before anything else.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let Some(remedy) = self.os_error.and_then(remedy_of) else { return self.hint.clone() };
        // A job says what has become of its checkpoints; anyone who has not begun has nothing to add.
        let is_job = *"C0100" < *self.code.number();
        match &self.hint {
            Some(hint) if is_job => Some(format!("{remedy}; {hint}")),
            _ => Some(remedy.to_owned()),
        }
    }
}

/// What helps against an error of the operating system, by its number on Linux.
fn remedy_of(os_error: i32) -> Option<&'static str> {
    Some(match os_error {
        5 => "the disk or its connection fails: check the kernel log",
        // Where threads are started. A pipe that is full has the same number, and does not say it.
        11 => "raise the limit of processes and threads (`ulimit -u`)",
        12 => "free memory, or raise the limit of address space (`ulimit -v`)",
        23 => "the machine has no file handles left: raise fs.file-max",
        24 => "raise the limit of open files (`ulimit -n`)",
        27 => "raise the limit of the size of a file (`ulimit -f`)",
        28 => "make room on the disk",
        30 => "the file system is read-only: mount it for writing, or choose another",
        122 => "raise the quota of the disk, or make room",
        _ => return None,
    })
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code.number(), self.message)?;
        if let Some(place) = &self.place {
            write!(f, "\n{}", place.drawn())?;
        }
        for detail in &self.details {
            for (place, line) in detail.lines().enumerate() {
                let label = if place == 0 { "detail:" } else { "       " };
                write!(f, "\n  {label} {line}")?;
            }
        }
        if let Some(advice) = self.advice() {
            write!(f, "\n  hint: {advice}")?;
        }
        write!(f, "\n  more: cofferdam explain {}", self.code.number())?;
        self.more.iter().try_for_each(|other| write!(f, "\n{other}"))
    }
}

impl Error for Problem {}

/// An error with all that it stands on.
#[must_use]
pub fn with_sources(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", with_sources(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_helps_against_what_the_operating_system_says() {
        let problem = |code: Code, number: i32| {
            let error = std::io::Error::from_raw_os_error(number);
            Problem::new(code, "it cannot be used").because(&error).hint("choose another path")
        };
        let advice = |problem: Problem| problem.advice().expect("there is some");
        assert_eq!(
            advice(problem(Code::StateUnusable, 24)),
            "raise the limit of open files (`ulimit -n`)"
        );
        let room = problem(Code::Environment, 28);
        assert_eq!(advice(room), "make room on the disk; choose another path");
        assert_eq!(advice(problem(Code::StateUnusable, 13)), "choose another path");
        let text = Problem::new(Code::StateUnusable, "it is (os error 28)").hint("look at it");
        assert_eq!(advice(text), "look at it", "a text is no fact");
    }
}
