//! Takes from a compiler all that it has no use for: after this, a program that has taken it over can compute, and
//! answer its parent.

use std::io;

use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};

use super::CompileLimits;

/// Standard input, output and error, and a few that a library may open and close.
const FILES_MAX: u64 = 16;

/// # Errors
/// Where the system does not set a limit. Landlock and seccomp are left out where the kernel does not have them.
pub(super) fn confine(limits: &CompileLimits) -> io::Result<()> {
    let seconds = limits.processor_max.as_secs().max(1);
    for (resource, current, maximum) in [
        // Of the memory that it can write to: address space that is only reserved costs nobody anything.
        (Resource::Data, limits.memory_bytes_max, limits.memory_bytes_max),
        (Resource::Cpu, seconds, seconds + 1),
        (Resource::Nofile, FILES_MAX, FILES_MAX),
        (Resource::Fsize, 0, 0),
        (Resource::Core, 0, 0),
    ] {
        // What was inherited may be less, and cannot be raised.
        let inherited = getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let (current, maximum) = (current.min(inherited), maximum.min(inherited));
        setrlimit(resource, Rlimit { current: Some(current), maximum: Some(maximum) })?;
    }
    #[cfg(target_os = "linux")]
    {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        linux::without_files_and_network().map_err(io::Error::other)?;
        linux::without_system_calls()?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{collections::BTreeMap, io};

    use landlock::{
        ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
        RulesetError, Scope,
    };
    use seccompiler::{
        BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
        SeccompCondition, SeccompFilter, SeccompRule,
    };

    /// No file can be opened, whatever its name, and no port; no process outside of it can be reached.
    pub(super) fn without_files_and_network() -> Result<(), RulesetError> {
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V6))?
            .handle_access(AccessNet::from_all(ABI::V6))?
            .scope(Scope::from_all(ABI::V6))?;
        rules.create()?.restrict_self().map(drop)
    }

    /// What allocators, threads and pipes need. Everything else fails.
    const ALLOWED: &[libc::c_long] = &[
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_fstat,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_madvise,
        libc::SYS_membarrier,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_prctl,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_restart_syscall,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        libc::SYS_write,
        libc::SYS_writev,
    ];

    /// On processors for which there are no such filters nothing is done.
    pub(super) fn without_system_calls() -> io::Result<()> {
        let Ok(architecture) = std::env::consts::ARCH.try_into() else { return Ok(()) };
        let refused = io::Error::other::<BackendError>;
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
            ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
        // Threads, and no processes, which would have limits of their own. Of `clone3` the flags cannot be seen: a C
        // library takes this one where that one is not there.
        let thread = libc::CLONE_THREAD as u64;
        let is_thread = SeccompCmpOp::MaskedEq(thread);
        let is_thread = SeccompCondition::new(0, SeccompCmpArgLen::Qword, is_thread, thread);
        let is_thread = SeccompRule::new(vec![is_thread.map_err(refused)?]).map_err(refused)?;
        rules.insert(libc::SYS_clone, vec![is_thread]);
        // An abort signals its own process.
        let own = u64::from(std::process::id());
        let is_own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own);
        let is_own = SeccompRule::new(vec![is_own.map_err(refused)?]).map_err(refused)?;
        rules.insert(libc::SYS_tgkill, vec![is_own]);
        let refuse = SeccompAction::Errno(libc::ENOSYS as u32);
        let filter = SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture);
        let program: Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
        let program = program.map_err(io::Error::other)?;
        match seccompiler::apply_filter_all_threads(&program) {
            // The kernel has no such filters.
            Err(Error::Seccomp(error) | Error::Prctl(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)
                ) =>
            {
                Ok(())
            }
            other => other.map_err(io::Error::other),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{
        fs::File,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::net::UnixStream,
        process::Command,
    };

    use super::*;

    const CONFINED: &str = "COFFERDAM_TEST_CONFINED";

    /// The test is its own child: what a process has taken from itself it does not get back.
    #[test]
    fn a_confined_process_computes_and_does_nothing_else() {
        if std::env::var_os(CONFINED).is_some() {
            return confined();
        }
        let test = "compiler::confine::tests::a_confined_process_computes_and_does_nothing_else";
        let itself = std::env::current_exe().expect("a path");
        let mut child = Command::new(itself);
        let child = child.args(["--exact", test, "--nocapture"]).env(CONFINED, "1");
        let output = child.output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            said.contains("confined and alive"),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    #[allow(
        clippy::expect_used,
        clippy::print_stdout,
        reason = "a test fails by a panic, and says what it is"
    )]
    fn confined() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("before");
        let address = listener.local_addr().expect("an address");
        let limits = CompileLimits { memory_bytes_max: 256 << 20, ..CompileLimits::default() };
        confine(&limits).expect("confined");
        assert!(File::open("/etc/passwd").is_err());
        assert!(File::create("/tmp/cofferdam-confined").is_err());
        assert!(std::fs::read_dir("/").is_err());
        assert!(TcpStream::connect(address).is_err());
        assert!(TcpListener::bind("127.0.0.1:0").is_err());
        assert!(UdpSocket::bind("127.0.0.1:0").is_err());
        assert!(UnixStream::connect("/run/nothing").is_err());
        assert!(listener.accept().is_err());
        assert!(Command::new("/bin/true").spawn().is_err());
        assert!(rustix::process::test_kill_process(rustix::process::Pid::INIT).is_err());
        // Threads and memory, within its limits.
        assert_eq!(std::thread::spawn(|| vec![1_u8; 64 << 20].len()).join().ok(), Some(64 << 20));
        let mut much: Vec<u8> = Vec::new();
        assert!(much.try_reserve_exact(512 << 20).is_err());
        println!("confined and alive");
    }
}
