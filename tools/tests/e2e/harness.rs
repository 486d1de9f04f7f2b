//! One test's world: its files, its `volleyd` and `volley-agent` processes, and the `volley` command line.
//!
//! Folders lie in the target directory and not in /tmp, which is a tmpfs on many machines: volume files need direct I/O.
//! Sockets lie in /tmp, because the path of a unix socket may have only 107 bytes.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) use command::{Outcome, available, nbdsh, run, run_in, skip};
pub(crate) use process::{Process, die_with_the_test};
pub(crate) use random::Random;

mod command;
mod process;
mod random;

/// A server says that it is ready within this, also on a busy two-core machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The files of one test.
pub(crate) struct Site {
    files: TempDir,
    sockets: TempDir,
}

/// How a node is started.
#[derive(Clone)]
pub(crate) struct NodeOptions {
    pub(crate) cores: usize,
    /// TOML beyond the addresses and paths, e.g. `[deadlines]\nguest_read = "2s"`.
    pub(crate) config: String,
    /// Rate of volumes that name none.
    pub(crate) default_rate: &'static str,
    /// Folder of the node's data; `None` is the site's own.
    pub(crate) data: Option<PathBuf>,
    /// URL of the object store; `None` is the site's directory.
    pub(crate) object_store: Option<String>,
    /// Data port; `None` is the site's unix socket.
    pub(crate) listen: Option<String>,
    /// Process in whose mount namespace the server runs (root only).
    pub(crate) namespace: Option<u32>,
}

impl Default for NodeOptions {
    fn default() -> NodeOptions {
        NodeOptions {
            cores: 2,
            config: String::new(),
            default_rate: "none",
            data: None,
            object_store: None,
            listen: None,
            namespace: None,
        }
    }
}

/// A running `volleyd`.
pub(crate) struct Node {
    process: Process,
    /// `host:port` of the HTTP API.
    pub(crate) http: String,
    /// Address of the data port of shard 0.
    pub(crate) data: String,
}

/// A running `volley-agent`.
pub(crate) struct Agent {
    process: Process,
    socket: PathBuf,
}

impl Site {
    pub(crate) fn new() -> Site {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(target).expect("target tmp folder");
        Site {
            files: tempfile::tempdir_in(target).expect("temporary folder"),
            sockets: tempfile::tempdir().expect("temporary folder for sockets"),
        }
    }

    /// A path inside the test's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.path("objects")
    }

    pub(crate) fn objects_url(&self) -> String {
        format!("file:{}", self.objects().display())
    }

    /// Where the node keeps its data.
    pub(crate) fn data(&self) -> PathBuf {
        self.path("node")
    }

    /// The data port: a unix socket, so that tests never compete for ports.
    pub(crate) fn data_address(&self) -> String {
        format!("unix:{}", self.sockets.path().join("data.sock").display())
    }

    /// Runs `volley` against this site's object store, without a server.
    pub(crate) fn volley(&self, args: &[&str]) -> Outcome {
        run(self.volley_command(args))
    }

    pub(crate) fn volley_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
        command.args(args).env("VOLLEY_OBJECT_STORE", self.objects_url()).env_remove("VOLLEY_SERVER");
        command
    }

    /// The command line of a node of this site; [`Site::start`] runs it.
    pub(crate) fn node_command(&self, options: &NodeOptions) -> Command {
        let data = options.data.clone().unwrap_or_else(|| self.data());
        let config = self.path("volley.toml");
        let text = format!(
            "hydration.default_rate = \"{}\"\nplacement.overcommit = \"unlimited\"\n{}\n",
            options.default_rate, options.config
        );
        std::fs::write(&config, text).expect("write the configuration");
        let mut args: Vec<String> = vec![volleyd().display().to_string()];
        args.extend(["--config".into(), config.display().to_string()]);
        args.extend(["--data".into(), data.display().to_string()]);
        args.extend(["--object-store".into(), options.object_store.clone().unwrap_or_else(|| self.objects_url())]);
        args.extend(["--listen".into(), options.listen.clone().unwrap_or_else(|| self.data_address())]);
        args.extend(["--http".into(), "127.0.0.1:0".into()]);
        args.extend(["--cores".into(), options.cores.to_string()]);
        let mut command = match options.namespace {
            None => Command::new(&args[0]),
            Some(pid) => {
                let mut enter = Command::new("nsenter");
                enter.args([&format!("--mount=/proc/{pid}/ns/mnt"), &args[0]]);
                enter
            }
        };
        command.args(&args[1..]);
        command
    }

    /// Starts a node and waits until it says that it is ready.
    pub(crate) fn start(&self, options: &NodeOptions) -> Node {
        Site::start_command(self.node_command(options))
    }

    /// Like [`Site::start`], of a command line with an environment of its own.
    pub(crate) fn start_command(command: Command) -> Node {
        let mut process = Process::spawn("volleyd", command);
        let ready = process.wait_line(START_TIMEOUT, |line| line.starts_with("volleyd: ready"));
        Node { http: word_after(&ready, "http"), data: word_after(&ready, "data"), process }
    }

    /// A node with two shards whose volumes are not hydrated behind the test's back.
    pub(crate) fn start_default(&self) -> Node {
        self.start(&NodeOptions::default())
    }

    /// Starts an agent on the node's data port and waits until it listens.
    pub(crate) fn agent(&self, name: &str, args: &[&str]) -> Agent {
        self.agent_of(&self.data_address(), name, args)
    }

    /// Starts an agent of the node at `server`.
    pub(crate) fn agent_of(&self, server: &str, name: &str, args: &[&str]) -> Agent {
        let socket = self.sockets.path().join(format!("{name}.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_volley-agent"));
        command.args(["--server", server]).args(["--nbd", &format!("unix:{}", socket.display())]);
        command.args(args);
        let mut process = Process::spawn(name, command);
        process.wait_line(START_TIMEOUT, |line| line.contains("ready"));
        Agent { process, socket }
    }

    /// Imports `file` as snapshot `name`.
    pub(crate) fn import(&self, file: &Path, name: &str) {
        self.volley(&["image", "import", &file.display().to_string(), "--name", name]).success();
    }
}

impl Node {
    /// Runs `volley` against this node.
    pub(crate) fn volley(&self, site: &Site, args: &[&str]) -> Outcome {
        let mut command = site.volley_command(args);
        command.env("VOLLEY_SERVER", &self.http);
        run(command)
    }

    /// Runs `volley … --json` and parses what it prints.
    pub(crate) fn json(&self, site: &Site, args: &[&str]) -> Value {
        let text = self.volley(site, &[args, &["--json"]].concat()).success();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("volley {args:?} printed no JSON ({e}):\n{text}"))
    }

    /// Creates volumes of a snapshot: `prefix0`, `prefix1`, …
    pub(crate) fn create(&self, site: &Site, snapshot: &str, count: u32, prefix: &str) {
        let count = count.to_string();
        self.volley(site, &["volume", "create", "--snapshot", snapshot, "--count", &count, "--name-prefix", prefix])
            .success();
    }

    /// `volley volume show`.
    pub(crate) fn volume(&self, site: &Site, name: &str) -> Value {
        self.json(site, &["volume", "show", name])
    }

    /// Waits until the volume is hydrated, within `limit` (such as `60s`).
    pub(crate) fn wait_hydrated(&self, site: &Site, name: &str, limit: &str) {
        self.volley(site, &["volume", "wait", name, "--hydrated", "--timeout", limit]).success();
    }

    /// Body of a GET of the HTTP API.
    pub(crate) fn get(&self, path: &str) -> String {
        let mut response = ureq::get(format!("http://{}{path}", self.http)).call().expect(path);
        response.body_mut().read_to_string().expect("response body")
    }

    /// `kill -9`, as a crash of the process.
    pub(crate) fn kill(mut self) {
        self.crash();
    }

    /// Like [`Node::kill`], of one that is replaced afterwards.
    pub(crate) fn crash(&mut self) {
        self.process.kill();
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// SIGTERM, and how the process ended.
    pub(crate) fn stop(mut self) -> (ExitStatus, Duration) {
        let begun = Instant::now();
        let status = self.process.terminate(Duration::from_secs(60));
        (status, begun.elapsed())
    }
}

impl Agent {
    /// NBD URI of a volume, for libnbd, QEMU and fio.
    pub(crate) fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.socket.display())
    }

    /// The volume as a QEMU `-drive file=`.
    pub(crate) fn qemu_file(&self, volume: &str) -> String {
        format!("nbd:unix:{}:exportname={volume}", self.socket.display())
    }

    /// The unix socket that serves NBD.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.process.kill();
    }

    /// SIGTERM, and how the process ended.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.process.terminate(Duration::from_secs(30))
    }
}

/// The binary of another package of the workspace, built beside ours (`cargo nextest run --workspace` and tools/test do).
pub(crate) fn volleyd() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_volley")).with_file_name("volleyd");
    assert!(path.exists(), "{} is missing: run `cargo build -p volley-server --bin volleyd`", path.display());
    path
}

/// Size and residency numbers are JSON integers.
pub(crate) fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no number {key:?} in {value}"))
}

/// The word behind `key=` or `key ` in a line.
fn word_after(line: &str, key: &str) -> String {
    let at = line.find(key).unwrap_or_else(|| panic!("no {key:?} in the line {line:?}"));
    let rest = line[at + key.len()..].trim_start_matches(['=', ':', ' ']).trim_start_matches("//");
    rest.split([' ', ',']).next().expect("a word").trim_end_matches('/').to_string()
}
