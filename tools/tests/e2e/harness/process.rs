//! A server process: its output lines, its log for failed tests, and its end with the test.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Lines of a log that a failed test prints.
const LOG_LINES_SHOWN: usize = 120;

pub(crate) struct Process {
    name: String,
    child: Child,
    lines: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Process {
    pub(crate) fn spawn(name: &str, mut command: Command) -> Process {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_the_test(&mut command);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("start {name} ({command:?}): {e}"));
        let (sender, lines) = channel();
        let log = Arc::new(Mutex::new(Vec::new()));
        follow(child.stdout.take().expect("piped"), sender.clone(), log.clone());
        follow(child.stderr.take().expect("piped"), sender, log.clone());
        Process { name: name.to_string(), child, lines, log }
    }

    /// The first line from now on that `wanted` accepts. Panics when the process ends or the time is over.
    pub(crate) fn wait_line(&mut self, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if wanted(&line) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("{}: no such line within {limit:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => panic!("{}: ended without that line", self.name),
            }
        }
    }

    /// Everything printed so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("log").join("\n")
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("reap");
    }

    /// SIGTERM; panics if the process is still there after `limit`.
    pub(crate) fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait(limit)
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("pid");
        // SAFETY: kill only sends a signal; the child is not reaped yet, so the pid is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "signal {signal}");
    }

    /// How the process ended; panics if it is still there after `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        // Its output ends when the process does: no polling.
        while let Ok(_line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {}
        match self.child.try_wait().expect("wait") {
            Some(status) => status,
            None if Instant::now() < end => self.child.wait().expect("wait"),
            None => panic!("{} is still running after {limit:?}", self.name),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = self.log.lock().map(|l| l.clone()).unwrap_or_default();
            let shown = &log[log.len().saturating_sub(LOG_LINES_SHOWN)..];
            eprintln!("--- {} ({} of {} lines)\n{}", self.name, shown.len(), log.len(), shown.join("\n"));
        }
    }
}

/// The kernel kills the process when the thread of the test ends, also when the test runner is killed.
pub(crate) fn die_with_the_test(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches nothing but the new process.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

fn follow(stream: impl Read + Send + 'static, sender: Sender<String>, log: Arc<Mutex<Vec<String>>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            log.lock().expect("log").push(line.clone());
            // Nobody waits for lines any more: keep draining, so that the process never blocks on its output.
            sender.send(line).ok();
        }
    });
}
