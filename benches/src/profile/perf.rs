//! `perf` and `strace` beside a running node.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options};
use inferno::flamegraph;

use super::counts::{self, Counts};
use super::inlined::{self, Program};
use crate::process::{Result, run};

/// `perf` says that it counts within this; opening each system call's event on each thread takes a second or two.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// strace does not say when it has attached to the threads.
const STRACE_ATTACHES: Duration = Duration::from_secs(1);
const TRACE_EVENTS: &str = "/sys/kernel/tracing/events";
/// The submission of one request of a ring: older kernels have the first, newer ones the second.
const SUBMISSIONS: [&str; 2] = ["io_uring_submit_sqe", "io_uring_submit_req"];
const COMPLETIONS: &str = "io_uring_complete";
/// Per cent of the picture; what is narrower is not drawn.
const WIDTH_MIN: f64 = 0.1;

/// What samples are taken by: cycles of the processor, or where a virtual machine does not count them a timer.
///
/// # Errors
/// When `perf` can't be run.
pub fn sampling_event() -> Result<&'static str> {
    let mut command = Command::new("perf");
    let output = command.args(["stat", "-x,", "-e", "cycles", "--", "true"]).output();
    let output = output.map_err(|e| format!("perf: {e}"))?;
    let counts = counts::of_perf_stat(&String::from_utf8_lossy(&output.stderr)).unwrap_or_default();
    Ok(if output.status.success() && !counts.is_empty() { "cycles" } else { "cpu-clock" })
}

/// Something that watches a process until it is told to stop.
struct Watcher {
    name: &'static str,
    child: Child,
}

impl Watcher {
    fn start(name: &'static str, mut command: Command) -> Result<Watcher> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        Ok(Watcher { name, child: child.map_err(|e| format!("{name}: {e}"))? })
    }

    /// Starts `perf`, and returns once its events are on.
    fn perf(name: &'static str, mut command: Command) -> Result<Watcher> {
        let dir = tempfile::tempdir().map_err(|e| format!("a folder for pipes: {e}"))?;
        let (control, answers) = (dir.path().join("control"), dir.path().join("answers"));
        run(Command::new("mkfifo").arg(&control).arg(&answers))?;
        let said = |e: std::io::Error| format!("{}: {e}", control.display());
        // Opened in both directions, a pipe waits for nobody.
        let open = |path: &Path| File::options().read(true).write(true).open(path).map_err(said);
        let (mut ask, mut answer) = (open(&control)?, open(&answers)?);
        command.args(["-D", "-1", &format!("--control=fifo:{},{}", control.display(), answers.display())]);
        let mut watcher = Watcher::start(name, command)?;
        ask.write_all(b"enable\n").map_err(said)?;
        let (done, wait) = mpsc::channel();
        // Still waiting when `perf` has ended: it goes with this process.
        std::thread::spawn(move || done.send(answer.read(&mut [0; 16])));
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(50);
        while wait.recv_timeout(step).is_err() {
            waited += step;
            let ended = watcher.child.try_wait().map_err(said)?.is_some();
            if ended || waited > READY_TIMEOUT {
                return Err(format!("{name} did not start: {}", watcher.stop().err().unwrap_or_default()));
            }
        }
        Ok(watcher)
    }

    fn stop(mut self) -> Result<()> {
        let mut said = String::new();
        if let Ok(None) = self.child.try_wait() {
            // SAFETY: a signal to a child that has not been waited for: the pid is still its own.
            unsafe { libc::kill(i32::try_from(self.child.id()).expect("pids fit"), libc::SIGINT) };
        }
        if let Some(stderr) = &mut self.child.stderr {
            // What it said is for a message only.
            let _ = stderr.read_to_string(&mut said);
        }
        let status = self.child.wait().map_err(|e| format!("{}: {e}", self.name))?;
        // Both tell by the signal that a signal ended them.
        let stopped = status.success() || status.signal() == Some(libc::SIGINT) || status.code() == Some(130);
        if stopped { Ok(()) } else { Err(format!("{}: {status}\n{}", self.name, said.trim())) }
    }
}

/// Runs a load while samples are taken of a process; returns its stacks, folded: outermost frame first, then a count.
///
/// # Errors
/// When `perf` fails, or the load.
pub fn sample<T>(
    pid: u32,
    (event, frequency): (&str, u32),
    dir: &Path,
    load: impl FnOnce() -> Result<T>,
) -> Result<(T, String)> {
    let binary = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(|e| format!("the node's program: {e}"))?;
    let mut program = Program::new(&binary)?;
    let data = dir.join("perf.data");
    let mut command = Command::new("perf");
    command.args(["record", "-q", "-e", event, "-F", &frequency.to_string(), "--call-graph", "fp"]);
    command.args(["-p", &pid.to_string(), "-o"]).arg(&data);
    let watcher = Watcher::perf("perf record", command)?;
    let loaded = load();
    watcher.stop()?;
    let loaded = loaded?;
    let mut command = Command::new("perf");
    command.args(["script", "--no-inline", "-F", "comm,pid,tid,time,event,ip,sym,dso", "-i"]).arg(&data);
    let said = |e: std::io::Error| format!("perf script: {e}");
    let script = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut script = script.map_err(said)?;
    let printed = BufReader::new(script.stdout.take().expect("piped"));
    let (expanded, writer) = std::io::pipe().map_err(said)?;
    let object = binary.display().to_string();
    // A thread of its own, so that a long profile is never in memory as a whole.
    let (inlined, folded) = std::thread::scope(|scope| {
        let folding = scope.spawn(|| fold(BufReader::new(expanded)));
        let inlined = inlined::expand(printed, &object, &mut program, BufWriter::new(writer));
        (inlined, folding.join().expect("no panic while stacks are folded"))
    });
    let status = script.wait().map_err(said)?;
    if !status.success() {
        return Err(format!("perf script: {status}"));
    }
    inlined.map_err(said)?;
    Ok((loaded, folded?))
}

/// Folds what `perf script` prints.
///
/// # Errors
/// When it is something else.
pub fn fold(script: impl std::io::BufRead) -> Result<String> {
    let mut options = Options::default();
    options.annotate_kernel = true;
    let mut folded = Vec::new();
    Folder::from(options).collapse(script, &mut folded).map_err(|e| format!("perf script: {e}"))?;
    String::from_utf8(folded).map_err(|e| format!("perf script: {e}"))
}

/// Draws folded stacks.
///
/// # Errors
/// When there are none, or the file can't be written.
pub fn draw(folded: &str, title: String, path: &Path) -> Result<()> {
    let mut options = flamegraph::Options::default();
    options.title = title;
    options.min_width = WIDTH_MIN;
    options.colors = flamegraph::color::Palette::Multi(flamegraph::color::MultiPalette::Rust);
    let file = File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
    flamegraph::from_lines(&mut options, folded.lines(), file).map_err(|e| format!("flame graph: {e}"))
}

/// What was counted of a process under a load, and what counted it.
pub struct Counted {
    pub syscalls: Counts,
    pub submissions: Option<u64>,
    pub completions: Option<u64>,
    pub by: &'static str,
}

/// Runs a load while system calls of a process are counted, and requests of its rings where the kernel traces them.
///
/// # Errors
/// When nothing can count them, or the load fails.
pub fn count<T>(pid: u32, dir: &Path, load: impl FnOnce() -> Result<T>) -> Result<(T, Counted)> {
    let has = |event: &str| Path::new(TRACE_EVENTS).join(event).join("id").exists();
    let report = dir.join("counts.txt");
    let read = || std::fs::read_to_string(&report).map_err(|e| format!("{}: {e}", report.display()));
    if !has("syscalls/sys_enter_read") {
        let mut command = Command::new("strace");
        command.args(["-c", "-f", "-q", "-p", &pid.to_string(), "-o"]).arg(&report);
        let watcher = Watcher::start("strace", command)?;
        std::thread::sleep(STRACE_ATTACHES);
        let loaded = load();
        watcher.stop()?;
        let syscalls = counts::of_strace(&read()?)?;
        return Ok((loaded?, Counted { syscalls, submissions: None, completions: None, by: "strace -c" }));
    }
    let of_ring = |name: &&'static str| has(&format!("io_uring/{name}"));
    let (submitted, completed) = (SUBMISSIONS.into_iter().find(of_ring), Some(COMPLETIONS).filter(of_ring));
    let mut events = vec!["syscalls:sys_enter_*".to_owned()];
    events.extend(submitted.into_iter().chain(completed).map(|name| format!("io_uring:{name}")));
    let mut command = Command::new("perf");
    command.args(["stat", "-x,", "-e", &events.join(","), "-p", &pid.to_string(), "-o"]).arg(&report);
    let watcher = Watcher::perf("perf stat", command)?;
    let loaded = load();
    watcher.stop()?;
    let counts = counts::of_perf_stat(&read()?)?;
    let of = |name: Option<&str>| counts.get(&format!("io_uring:{}", name?)).copied();
    let counted = Counted {
        syscalls: counts::syscalls(&counts),
        submissions: of(submitted),
        completions: of(completed),
        by: "perf stat",
    };
    Ok((loaded?, counted))
}

#[cfg(test)]
mod tests {
    use super::super::{stacks, stages};
    use super::*;

    /// Of a real run, with the stack of the decoder twice.
    const SCRIPT: &str = include_str!("samples/perf-script.txt");

    #[test]
    fn what_perf_script_prints_is_folded() {
        let folded = fold(SCRIPT.as_bytes()).expect("stacks");
        let stacks = stacks::parse(&folded).expect("stacks");
        let of = |function: &str| stacks.iter().find(|stack| stack.function() == function).expect(function);
        assert_eq!(stacks.iter().map(|stack| stack.samples).sum::<u64>(), 5);
        let decode = of("volley_protocol::decode::decode");
        assert_eq!((decode.frames[0], decode.samples, stages::of(decode).name), ("volley-0-2", 2, "decode"));
        assert_eq!(stages::of(of("tcp_sendmsg_locked_[k]")).name, "send", "the kernel's frames are marked");
        assert_eq!(stages::of(of("__memmove_avx512_unaligned_erms")).name, "look-up");
        let worker = of("ktime_get_[k]");
        assert_eq!((worker.frames[0], stages::of(worker).name), ("iou-wrk-10327", "disk"));
    }

    #[test]
    fn folded_stacks_become_a_flame_graph() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let folded = fold(SCRIPT.as_bytes()).expect("stacks");
        draw(&folded, "a title".to_owned(), file.path()).expect("drawn");
        let svg = std::fs::read_to_string(file.path()).expect("readable");
        assert!(
            svg.contains("<svg") && svg.contains("a title") && svg.contains("volley_protocol::decode::decode"),
            "{svg}"
        );
        assert!(draw("", String::new(), file.path()).is_err(), "nothing to draw");
    }
}
