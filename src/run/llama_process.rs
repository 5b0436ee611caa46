//! A server program as a child process: it is started with an adapter and a free port, waited for until it is healthy, and ended
//! with the run in every case. It does not depend on the model or on what is asked of it. Read `llama_cpp.rs` for its user.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::invalid;
use crate::reward::source::endpoint::Endpoint;
use crate::reward::source::retry::Failure;

/// How often a wait for the server looks at it.
const GLANCE: Duration = Duration::from_millis(20);
/// Longest wait for a reply about its health.
const HEALTH: Duration = Duration::from_secs(5);
/// Time for the server to exit by itself before it is killed: llama.cpp's waits for requests that it has begun to answer.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long after a failed request a server may be found to have ended: its sockets close before it does.
const DYING: Duration = Duration::from_millis(300);
/// What is quoted of its log, and of one that does not stay.
const QUOTED_LINES: [usize; 2] = [6, 20];

/// A server that was started. Dropping it ends it.
#[derive(Debug)]
pub(super) struct ServerProcess {
    child: Mutex<Child>,
    /// Its program, for messages.
    pub(super) name: String,
    /// Its address.
    pub(super) url: String,
    log: PathBuf,
    /// Whether its log stays where it is for whoever reads a message.
    log_stays: AtomicBool,
}

impl ServerProcess {
    /// Starts `command` with `--lora`, `--host` and `--port` behind its own arguments, and what it writes in the file `log`, anew.
    /// To be called by a thread that lives as long as the run: on Linux the kernel ends the server when that thread ends, however
    /// that is.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn start(command: &[String], lora: &Path, log: &Path) -> Result<Self> {
        let [program, arguments @ ..] = command else { return Err(invalid!("server names no program")) };
        let file = File::create(log).with_context(|| log.display().to_string())?;
        let port = free_port()?;
        let mut command = Command::new(program);
        command.args(arguments).arg("--lora").arg(lora).args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        without_key(&mut command);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        with_this_process(&mut command);
        let child = command.spawn().map_err(|error| cannot_start(program, &error.to_string()))?;
        let url = format!("http://127.0.0.1:{port}");
        Ok(Self { child: child.into(), name: program.clone(), url, log: log.into(), log_stays: true.into() })
    }

    /// Whether its log stays: messages name it then, and quote more of it if it does not.
    pub(super) fn set_log_stays(&self, stays: bool) {
        self.log_stays.store(stays, Ordering::Relaxed);
    }

    /// Waits until it is healthy.
    ///
    /// # Errors
    /// If it ends, is not healthy within `timeout`, or `abandoned` says that nobody waits any more.
    pub(super) fn wait(&self, timeout: Duration, abandoned: &dyn Fn() -> bool) -> Result<(), Failure> {
        let (began, health) =
            (Instant::now(), Endpoint::new(format!("{}/health", self.url), None, HEALTH.min(timeout)));
        loop {
            let last = match health.get() {
                Ok(_) => return Ok(()),
                Err(Failure::Final(text) | Failure::Passing(text) | Failure::Unscored(text)) => text,
            };
            if let Some(text) = self.ended(Duration::ZERO) {
                return Err(Failure::Final(text));
            }
            if abandoned() {
                return Err(Failure::Final("nobody waits for it any more".into()));
            }
            if began.elapsed() >= timeout {
                return Err(Failure::Final(format!(
                    "it was not healthy within timeout_seconds = {} ({last}); raise it{}",
                    timeout.as_secs_f64(),
                    self.quoted()
                )));
            }
            thread::sleep(GLANCE);
        }
    }

    /// That it has ended, or does so within `wait`, with the last lines of its log.
    pub(super) fn ended(&self, wait: Duration) -> Option<String> {
        let began = Instant::now();
        loop {
            match self.child().try_wait() {
                Ok(Some(status)) => return Some(format!("it ended ({status}){}", self.quoted())),
                Ok(None) if began.elapsed() < wait => {}
                _ => return None,
            }
            thread::sleep(GLANCE);
        }
    }

    /// A request's failure, which is final where the server has ended.
    pub(super) fn cause(&self, failure: Failure) -> Failure {
        self.ended(DYING).map_or(failure, Failure::Final)
    }

    /// Ends it and waits for its end.
    pub(super) fn end(&self) {
        let mut child = self.child();
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        let began = Instant::now();
        terminate(&child);
        while began.elapsed() < EXIT_TIMEOUT && matches!(child.try_wait(), Ok(None)) {
            thread::sleep(GLANCE);
        }
        kill(&mut child);
        let _ = child.wait();
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands behind a message: the last lines of its log, and where it is if it stays.
    fn quoted(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let stays = self.log_stays.load(Ordering::Relaxed);
        let last = &lines[lines.len().saturating_sub(QUOTED_LINES[usize::from(!stays)])..];
        let last: String = last.iter().map(|line| format!("\n  {}", line.trim_end())).collect();
        match (stays, last.is_empty()) {
            (true, false) => format!("; see its log {}, which ends:{last}", self.log.display()),
            (true, true) => format!("; its log {} is empty", self.log.display()),
            (false, false) => format!("; its log ends:{last}"),
            (false, true) => "; its log is empty".into(),
        }
    }
}

/// Ports below those that a system gives to connections and to listeners that name none (Linux: from 32768 on; others: from 49152).
const PORTS: Range<u16> = 20_000..30_000;

/// A port that nobody listens at, one of [`PORTS`] if it can be: no other process is given it before the server binds it.
fn free_port() -> Result<u16> {
    let first = RandomState::new().build_hasher().finish();
    let some = (0..50).map(|i| PORTS.start + (first.wrapping_add(i * 7919) % PORTS.len() as u64) as u16);
    let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|free| free.local_addr());
    Ok(some.chain([0]).find_map(|port| free(port).ok()).context("finding a free port")?.port())
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.end();
    }
}

fn cannot_start(program: &str, why: &str) -> anyhow::Error {
    invalid!("server = [{program:?}, …] cannot be started: {why}; install it, or give its path")
}

/// Checks what can be known of a command before it is started: that its program is there, and where that is llama-server the model
/// file, too. A script may start it elsewhere.
///
/// # Errors
/// If one of them is not.
pub(super) fn check(command: &[String]) -> Result<()> {
    let [program, arguments @ ..] = command else { return Err(invalid!("server names no program")) };
    let at = Path::new(program);
    if at.components().count() > 1 || at.is_absolute() {
        fs::metadata(at).map_err(|error| cannot_start(program, &error.to_string()))?;
    } else if let Some(folders) = std::env::var_os("PATH") {
        let names = [program.clone(), format!("{program}{}", std::env::consts::EXE_SUFFIX)];
        let is_in = |folder: PathBuf| names.iter().any(|name| folder.join(name).is_file());
        if !std::env::split_paths(&folders).any(is_in) {
            return Err(cannot_start(program, "it is in no folder of PATH"));
        }
    }
    match model_file(program, arguments) {
        Some(file) if !Path::new(file).is_file() => {
            Err(invalid!("server: its model file, {file}, is not there; name the GGUF file of [base]"))
        }
        _ => Ok(()),
    }
}

/// The file that llama-server is told to load, by `-m FILE`, `--model FILE` or `--model=FILE`; `None` of another program.
pub(super) fn model_file<'c>(program: &str, arguments: &'c [String]) -> Option<&'c str> {
    if Path::new(program).file_stem().is_none_or(|name| name != "llama-server") {
        return None;
    }
    let after = arguments.iter().position(|word| word == "-m" || word == "--model");
    let file = after.and_then(|at| arguments.get(at + 1)).map(String::as_str);
    file.or_else(|| arguments.iter().find_map(|word| word.strip_prefix("--model=")))
}

/// Takes the key out of the child's environment: requests to it have none.
fn without_key(command: &mut Command) {
    command.env_remove("LLAMA_API_KEY");
}

/// Has the child end with this process, even if that is killed, and lead a group of its own: Ctrl-C in a terminal reaches this
/// process alone, which then ends the child.
#[cfg(unix)]
fn with_this_process(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        let tie = move || {
            // SAFETY: both calls only pass numbers, and may be made between fork and exec.
            let (tied, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
            match tied {
                0 if now as u32 == parent => Ok(()),
                0 => Err(std::io::Error::from(ErrorKind::Interrupted)),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: the closure makes two system calls and allocates nothing.
        unsafe { command.pre_exec(tie) };
    }
}

#[cfg(not(unix))]
fn with_this_process(_: &mut Command) {}

/// Asks the child and what it started to end.
#[cfg(unix)]
fn terminate(child: &Child) {
    // SAFETY: the call only passes numbers; the child leads the group and was not waited for, so the number is still its own.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGTERM) };
}

#[cfg(not(unix))]
fn terminate(_: &Child) {}

/// Kills the child and what it started.
#[cfg(unix)]
fn kill(child: &mut Child) {
    // SAFETY: the call only passes numbers. A group keeps its number while it has a member, and without one there is nobody to
    // kill.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
}

#[cfg(not(unix))]
fn kill(child: &mut Child) {
    let _ = child.kill();
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn start(script: &str, folder: &Path) -> ServerProcess {
        let command = ["/bin/sh", "-c", script].map(String::from);
        ServerProcess::start(&command, Path::new("x.gguf"), &folder.join("log")).unwrap()
    }

    #[test]
    fn a_command_whose_program_or_model_file_is_not_there_is_refused_before_it_is_started() {
        let folder = tempfile::tempdir().unwrap();
        let of = |words: &[&str]| check(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        let server = folder.path().join("llama-server");
        let (program, file) = (server.to_str().unwrap(), folder.path().join("base.gguf"));
        let model = file.to_str().unwrap();
        assert!(of(&["sh", "-c", "x"]).is_ok() && of(&["/bin/sh", "-m", "none.gguf"]).is_ok());
        for (words, said) in [
            (&["no-such-llama-server", "-m", model][..], "it is in no folder of PATH; install it"),
            (&[program, "-m", model], "cannot be started: No such file"),
        ] {
            let error = of(words).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        fs::write(&server, "").unwrap();
        let equals = format!("--model={model}");
        for words in [&[program, "-m", model][..], &[program, "--model", model], &[program, &equals]] {
            let error = of(words).unwrap_err().to_string();
            assert!(error.contains(&format!("its model file, {model}, is not there")), "{error}");
        }
        fs::write(&file, "").unwrap();
        for words in [&[program, "-m", model][..], &[program, "--model", model], &[program, &equals], &[program]] {
            of(words).unwrap();
        }
    }

    fn lives(pid: i32) -> bool {
        // SAFETY: signal 0 reaches nobody.
        unsafe { libc::kill(pid, 0) == 0 }
    }

    #[test]
    fn it_is_given_adapter_and_address_and_its_last_lines_are_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let process = start("echo \"$0 $*\"; for i in 1 2 3 4 5 6; do echo line $i >&2; done; exit 3", folder.path());
        let Err(Failure::Final(text)) = process.wait(Duration::from_secs(60), &|| false) else { panic!("healthy") };
        assert!(text.contains("exit status: 3") && text.contains("which ends:\n  line 1\n"), "{text}");
        assert!(text.ends_with("line 6") && text.contains(&folder.path().join("log").display().to_string()), "{text}");
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        let port = process.url.rsplit(':').next().unwrap();
        assert!(log.starts_with(&format!("--lora x.gguf --host 127.0.0.1 --port {port}\n")), "{log}");
    }

    #[test]
    fn it_asks_for_no_key_that_this_process_has() {
        let mut command = Command::new("/bin/sh");
        command.env("LLAMA_API_KEY", "secret").args(["-c", "echo ${LLAMA_API_KEY-none}"]);
        without_key(&mut command);
        assert_eq!(command.output().unwrap().stdout, b"none\n");
    }

    #[test]
    fn it_and_what_it_started_end_with_it_at_once_or_after_a_while() {
        for (script, at_least) in
            [("sleep 600 & echo $!; wait", Duration::ZERO), ("trap '' TERM; sleep 600 & echo $!; wait", EXIT_TIMEOUT)]
        {
            let folder = tempfile::tempdir().unwrap();
            let process = start(script, folder.path());
            let pid = || fs::read_to_string(folder.path().join("log")).unwrap().trim().parse::<i32>().ok();
            let began = Instant::now();
            while pid().is_none() && began.elapsed() < Duration::from_secs(60) {
                thread::sleep(GLANCE);
            }
            let (of, own) = (pid().unwrap(), process.child().id() as i32);
            assert!(lives(of) && lives(own));
            let began = Instant::now();
            drop(process);
            assert!(began.elapsed() >= at_least, "{script}");
            // Its parent is gone: whoever adopted it may take a moment to wait for it.
            let began = Instant::now();
            while lives(of) && began.elapsed() < Duration::from_secs(10) {
                thread::sleep(GLANCE);
            }
            assert!(!lives(own), "{script}");
            assert!(!lives(of) || is_zombie(of), "{script}");
        }
    }

    /// Where nobody waits for orphans, as in some containers, they stay as zombies.
    fn is_zombie(pid: i32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    }

    #[test]
    fn one_that_is_never_healthy_is_said_and_one_that_nobody_waits_for_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let process = start("echo loading; exec sleep 600", folder.path());
        let Err(Failure::Final(text)) = process.wait(Duration::from_millis(300), &|| false) else { panic!("healthy") };
        assert!(text.contains("timeout_seconds = 0.3") && text.ends_with("loading"), "{text}");
        assert!(process.wait(Duration::from_secs(600), &|| true).is_err());
        assert_eq!(process.cause(Failure::Passing("slow".into())), Failure::Passing("slow".into()));
    }

    #[test]
    fn a_servers_port_is_none_that_the_system_may_give_to_another() {
        let ports: Vec<u16> = (0..20).map(|_| free_port().unwrap()).collect();
        assert!(ports.iter().all(|port| PORTS.contains(port)), "{ports:?}");
    }
}
