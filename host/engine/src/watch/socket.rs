//! The local socket of a running job, through which other processes of its user ask for savepoints and its end.
//!
//! It lies in the job's state directory, in a folder that only its owner may enter. A request is a
//! line of JSON, and so is its answer.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cofferdam_settings::{Code, Problem};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::oneshot,
    task::JoinSet,
};

use super::control::KeptCheckpoint;
use crate::handle::JobHandle;

const FOLDER: &str = "control";
const SOCKET: &str = "socket";
/// How long the last answers may take once the job has ended.
const ANSWER_TIME: Duration = Duration::from_millis(50);

/// What can be asked of a running job.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// A savepoint in a new folder of `target`.
    Savepoint {
        /// The directory for it; `None`: the one that the job names.
        target: Option<PathBuf>,
    },
    /// A savepoint, and the end of the job.
    Stop {
        /// The directory for it; `None`: the one that the job names.
        target: Option<PathBuf>,
        /// Sources end first, and everything that waits in the job is emitted.
        drain: bool,
    },
    /// The end of the job at once.
    Cancel,
    /// What completed checkpoints there are.
    Checkpoints,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// The savepoint and where it is.
    Saved {
        /// Its directory.
        savepoint: PathBuf,
        /// Its checkpoint.
        checkpoint: u64,
    },
    /// The completed checkpoints, oldest first.
    Kept {
        /// The checkpoints.
        checkpoints: Vec<KeptCheckpoint>,
    },
    /// It will be done.
    Accepted {
        /// True.
        accepted: bool,
    },
    /// Why not.
    Refused {
        /// What the job says.
        error: String,
        /// The number of the operating system's error that lies behind it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        os_error: Option<i32>,
    },
}

/// A listening socket, which is removed when the job ends.
pub struct Server {
    listener: UnixListener,
    _folder: Folder,
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // The next run rebuilds it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Server {
    /// Listens in a state directory, which this process has locked.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn bind(state_dir: &Path) -> io::Result<Self> {
        let folder = state_dir.join(FOLDER);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&folder)?;
        let listener = UnixListener::bind(short_path(&File::open(&folder)?))?;
        fs::set_permissions(folder.join(SOCKET), fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, _folder: Folder(folder) })
    }

    /// Answers requests until `ended` is gone and everybody who had asked by then has the answer.
    pub async fn serve(self, job: JobHandle, ended: oneshot::Receiver<()>) {
        let mut conversations = JoinSet::new();
        tokio::pin!(ended);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = &mut ended => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let job = job.clone();
                    conversations.spawn(async move {
                        if let Err(error) = converse(stream, &job).await {
                            tracing::debug!(%error, "a request on the control socket");
                        }
                    });
                    while conversations.try_join_next().is_some() {}
                }
                Err(error) => {
                    tracing::warn!(%error, "the control socket is closed");
                    break;
                }
            }
        }
        // Somebody may have connected without asking anything.
        let _ = tokio::time::timeout(ANSWER_TIME, conversations.join_all()).await;
    }
}

/// Addresses of sockets have at most 107 bytes, and directories may be longer: the folder is named
/// by its descriptor.
fn short_path(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}

/// Of a request.
const REQUEST_BYTES_MAX: u64 = 64 << 10;

async fn converse(stream: UnixStream, job: &JobHandle) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(REQUEST_BYTES_MAX)).read_line(&mut line).await?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => answer(request, job).await,
        Err(error) => Answer::Refused { error: format!("not a request: {error}"), os_error: None },
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    writer.write_all(text.as_bytes()).await
}

async fn answer(request: Request, job: &JobHandle) -> Answer {
    let (target, stop) = match request {
        Request::Cancel => {
            job.cancel();
            return Answer::Accepted { accepted: true };
        }
        Request::Checkpoints => return Answer::Kept { checkpoints: job.checkpoints() },
        Request::Savepoint { target } => (target, None),
        Request::Stop { target, drain } => (target, Some(drain)),
    };
    let Some(target) = target.or_else(|| job.spec().savepoint_dir) else {
        let error = "there is no place for the savepoint: give --savepoint-path DIR, \
                     or set execution.checkpointing.savepoint-dir"
            .to_owned();
        return Answer::Refused { error, os_error: None };
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let dir = target.join(format!("savepoint-{}-{now:x}", job.name()));
    let saved = match stop {
        None => job.savepoint(dir.clone()).await,
        Some(drain) => job.stop_with_savepoint(dir.clone(), drain).await,
    };
    match saved {
        Ok(checkpoint) => Answer::Saved { savepoint: dir, checkpoint },
        Err(problem) => Answer::Refused { error: problem.message, os_error: problem.os_error },
    }
}

/// An answer to something that was not asked.
#[must_use]
pub fn other_answer() -> Problem {
    Problem::new(Code::HostBug, "the job answered another question")
}

/// Asks the job that runs in a state directory.
///
/// # Errors
/// Where none runs there, or it is another user's.
pub async fn ask(state_dir: &Path, request: &Request) -> Result<Answer, Problem> {
    let not_running = |detail: String| {
        Problem::new(Code::NotRunning, format!("no job runs in {}", state_dir.display()))
            .detail(detail)
            .hint(
                "name the manifest or the state directory of a job that `cofferdam run` is running",
            )
    };
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let message = format!("the job in {} is another user's", state_dir.display());
            Problem::new(Code::RequestRefused, message)
                .because(&error)
                .hint("ask as the user who runs it")
        }
        _ => not_running(error.to_string()).with_os_error(error.raw_os_error()),
    };
    let folder = File::open(state_dir.join(FOLDER)).map_err(failed)?;
    let mut stream = UnixStream::connect(short_path(&folder)).await.map_err(failed)?;
    let mut text = serde_json::to_string(request)
        .map_err(|error| Problem::new(Code::HostBug, error.to_string()))?;
    text.push('\n');
    stream.write_all(text.as_bytes()).await.map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await.map_err(failed)?;
    serde_json::from_str(&line).map_err(|_| not_running("it ended without an answer".to_owned()))
}
