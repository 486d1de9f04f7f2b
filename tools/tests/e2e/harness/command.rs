//! Commands that end: run within a bound, with what they printed.

use std::path::Path;
use std::process::Command;

use super::process::die_with_the_test;

/// No command of a test runs longer than this; `timeout` ends it and the test fails with its output.
const COMMAND_SECONDS_MAX: &str = "150";
/// What `timeout` exits with when it had to end the command.
const TIMED_OUT: i32 = 124;

/// A command that ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) command: String,
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// What it printed; panics if it failed.
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code, 0, "{} failed:\n{}{}", self.command, self.stdout, self.stderr);
        self.stdout
    }

    /// The error line; panics if it succeeded, hung, panicked, or printed more than one line to stderr.
    pub(crate) fn failure(self) -> String {
        let Outcome { command, code, stdout, stderr } = self;
        assert!(
            code > 0 && code != TIMED_OUT,
            "{command} exited with {code}, an error was expected:\n{stdout}{stderr}"
        );
        assert!(!stderr.contains("panicked"), "{command} panicked:\n{stderr}");
        // Wrong usage (exit code 2) comes with a hint on further lines.
        assert!(code == 2 || stderr.trim_end().lines().count() == 1, "{command}: not one line:\n{stderr}");
        stderr.trim_end().to_string()
    }

    /// The error, which must contain each of `parts`.
    pub(crate) fn fails_naming(self, parts: &[&str]) {
        let command = self.command.clone();
        let message = self.failure();
        for part in parts {
            assert!(message.contains(part), "{command}: no {part:?} in: {message}");
        }
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: Command) -> Outcome {
    let mut bounded = Command::new("timeout");
    bounded.args(["-k", "5", COMMAND_SECONDS_MAX]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        bounded.current_dir(dir);
    }
    die_with_the_test(&mut bounded);
    let output = bounded.output().unwrap_or_else(|e| panic!("run {command:?}: {e}"));
    Outcome {
        command: format!("{command:?}"),
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs `program` with `args` in `dir`.
pub(crate) fn run_in(dir: &Path, program: &str, args: &[&str]) -> Outcome {
    let mut command = Command::new(program);
    command.args(args).current_dir(dir);
    run(command)
}

/// Runs a Python script, a file of `dir`, in libnbd's shell: its scope has the module `nbd`.
pub(crate) fn nbdsh(dir: &Path, script: &str, environment: &[(&str, &str)]) -> Outcome {
    let mut command = Command::new("nbdsh");
    command
        .args(["-n", "-c", &format!("exec(compile(open('{script}').read(), '{script}', 'exec'))")])
        .envs(environment.iter().copied())
        .current_dir(dir);
    // System paths first: nbdsh is a script of the system's Python, and another one before it lacks the module.
    command.env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()));
    run(command)
}

/// Whether every one of these programs is installed. In CI a missing one is a failure; elsewhere the test says that it
/// is skipped.
pub(crate) fn available(programs: &[&str]) -> bool {
    let paths = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let missing = programs.iter().find(|p| !std::env::split_paths(&paths).any(|dir| dir.join(p).exists()));
    match missing {
        None => true,
        Some(program) => skip(&format!("{program} is not installed; tools/test installs it")),
    }
}

/// Says why a test is skipped; in CI it fails instead.
pub(crate) fn skip(why: &str) -> bool {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}: nothing may be skipped in CI");
    eprintln!("skipped: {why}");
    false
}
