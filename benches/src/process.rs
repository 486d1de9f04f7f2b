//! Programs that a benchmark starts: found beside this binary or on the PATH, ended with it, measured through /proc.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server says that it is ready within this.
const START_TIMEOUT: Duration = Duration::from_secs(60);

pub type Result<T, E = String> = std::result::Result<T, E>;

/// Kernel, processor, cores and memory: what the figures depend on.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let (cpu, memory) = (field(&read("/proc/cpuinfo"), "model name"), field(&read("/proc/meminfo"), "MemTotal"));
    format!("machine: {cores} cores of {cpu}, {memory}, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}

/// One of our own binaries, built in the same profile.
///
/// # Errors
/// When it was not built.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let path = own.with_file_name(name);
    if path.exists() {
        Ok(path)
    } else {
        Err(format!("{} is missing: start through tools/bench or tools/profile", path.display()))
    }
}

/// A new folder in the one given, which is made if it is not there; it goes away with the first of the two.
///
/// # Errors
/// When it can't be made.
pub fn work_folder(parent: &Path) -> Result<(tempfile::TempDir, PathBuf)> {
    let said = |e: std::io::Error| format!("{}: {e}", parent.display());
    std::fs::create_dir_all(parent).map_err(said)?;
    let folder = tempfile::tempdir_in(parent).map_err(said)?;
    let path = folder.path().canonicalize().map_err(said)?;
    Ok((folder, path))
}

/// A `volley` command with an object store in a directory, for a node if one is given.
///
/// # Errors
/// When the binary is not built.
pub fn volley(objects: &Path, server: Option<&Server>, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(sibling("volley")?);
    command.args(words).env("VOLLEY_OBJECT_STORE", format!("file:{}", objects.display())).env_remove("VOLLEY_SERVER");
    if let Some(server) = server {
        command.env("VOLLEY_SERVER", server.ready_word("http")?);
    }
    Ok(command)
}

/// The file of the one volume that is in a node's data directory.
///
/// # Errors
/// When there is none, or another.
pub fn only_volume_file(data: &Path) -> Result<PathBuf> {
    let dir = data.join("store/volumes");
    let mut entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    match (entries.next(), entries.next()) {
        (Some(Ok(entry)), None) => Ok(entry.path()),
        _ => Err(format!("{} does not hold exactly one volume", dir.display())),
    }
}

/// A program that runs on one core, or anywhere.
#[must_use]
pub fn on_core(core: Option<usize>, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let Some(core) = core else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &core.to_string()]).arg(program);
    command
}

/// Runs a command to its end; returns what it printed.
///
/// # Errors
/// When it can't be started or fails: with its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Like [`run`], timed.
///
/// # Errors
/// As [`run`].
pub fn timed(command: &mut Command) -> Result<f64> {
    let begun = Instant::now();
    run(command)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// A server of ours or a peer's; ended when dropped.
pub struct Server {
    child: Child,
    /// The line that said it was ready.
    pub ready: String,
}

impl Server {
    /// Starts a program and waits for a line of its standard output that contains `ready`.
    ///
    /// # Errors
    /// When it ends first.
    pub fn start(mut command: Command, ready: &str) -> Result<Server> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut server = Server::spawn(command)?;
        let stdout = server.child.stdout.take().expect("piped");
        let mut lines = BufReader::new(stdout).lines();
        for line in lines.by_ref() {
            let line = line.map_err(|e| format!("output of the server: {e}"))?;
            if line.contains(ready) {
                server.ready = line;
                // Whatever it says later must not block it.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(server);
            }
        }
        Err("the server ended before it was ready".into())
    }

    /// Starts a program that says nothing and waits until its socket is there.
    ///
    /// # Errors
    /// When it ends first, or takes too long.
    pub fn start_silent(command: Command, socket: &Path) -> Result<Server> {
        let mut server = Server::spawn(command)?;
        let begun = Instant::now();
        while !socket.exists() {
            if let Ok(Some(status)) = server.child.try_wait() {
                return Err(format!("the server of {} ended: {status}", socket.display()));
            }
            if begun.elapsed() > START_TIMEOUT {
                return Err(format!("no socket {} within {START_TIMEOUT:?}", socket.display()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn spawn(mut command: Command) -> Result<Server> {
        // SAFETY: prctl is async-signal-safe and touches nothing but the new process.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        Ok(Server { child, ready: String::new() })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time that its threads have taken, in nanoseconds: of those that have not ended.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_ns(&self) -> Result<u64> {
        volley_tools::load::cpu::process_ns(self.child.id())
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
        kib.map(|kib| kib * 1024).ok_or_else(|| format!("{path} has no VmRSS"))
    }

    /// The word behind `key` in the line that said it was ready.
    ///
    /// # Errors
    /// When there is none.
    pub fn ready_word(&self, key: &str) -> Result<String> {
        let at = self.ready.find(key).ok_or_else(|| format!("no {key:?} in {:?}", self.ready))?;
        let rest = self.ready[at + key.len()..].trim_start_matches(['=', ':', ' ', '/']);
        Ok(rest.split([' ', ',']).next().unwrap_or_default().trim_end_matches('/').to_owned())
    }

    /// A counter of a node of ours, over all shards.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let said = |e: std::io::Error| format!("metrics: {e}");
        let mut stream = std::net::TcpStream::connect(self.ready_word("http")?).map_err(said)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n").map_err(said)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(said)?;
        let samples =
            answer.lines().filter(|line| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']));
        let values = samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok());
        values.reduce(|a, b| a + b).ok_or_else(|| format!("the node's metrics have no {name}"))
    }

    /// SIGTERM, and the end.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub fn stop(mut self) -> Result<()> {
        // SAFETY: a signal to a child that has not been waited for: the pid is still its own.
        unsafe { libc::kill(i32::try_from(self.child.id()).expect("pids fit"), libc::SIGTERM) };
        self.child.wait().map_err(|e| format!("wait: {e}"))?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
