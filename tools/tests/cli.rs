//! The real `volley` against the real `volleyd`: output, JSON, exit codes, and how the server starts and stops.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A server on free ports with an empty object store.
struct Server {
    process: Child,
    http: String,
    dir: tempfile::TempDir,
}

fn volleyd() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_volley")).with_file_name("volleyd");
    assert!(path.exists(), "{} is missing: run `cargo build -p volley-server --bin volleyd`", path.display());
    path
}

/// Direct I/O needs a real file system, which `/tmp` may not be.
fn directory() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

fn server_command(dir: &Path) -> Command {
    std::fs::create_dir_all(dir.join("objects")).unwrap();
    let mut command = Command::new(volleyd());
    command.env_remove("VOLLEY_OBJECT_STORE").env_remove("NOTIFY_SOCKET");
    command.arg("--data").arg(dir.join("node"));
    command.arg("--object-store").arg(format!("file:{}", dir.join("objects").display()));
    command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--cores", "2"]);
    command
}

impl Server {
    fn start() -> Server {
        Server::start_in(directory())
    }

    fn start_in(dir: tempfile::TempDir) -> Server {
        let mut process = server_command(dir.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let http = ready.split("http ").nth(1).unwrap_or_else(|| panic!("not ready: {ready:?}"));
        let http = http.split(',').next().unwrap().to_string();
        Server { process, http, dir }
    }

    fn volley(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_volley")).args(args).env("VOLLEY_SERVER", &self.http).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.volley(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }

    /// The one line of an error.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.volley(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
        one_line(&output)
    }

    fn stop(mut self) -> (ExitStatus, tempfile::TempDir) {
        signal(&self.process, libc::SIGTERM);
        let begun = Instant::now();
        let status = self.process.wait().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        let kept = std::mem::replace(&mut self.dir, directory());
        (status, kept)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn signal(process: &Child, signal: i32) {
    let pid = i32::try_from(process.id()).unwrap();
    // SAFETY: kill takes no pointers; the process is our child and not yet waited for, so the pid is its own.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

fn one_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    text
}

fn refused(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    let text = String::from_utf8(output.stderr).unwrap();
    let last = text.trim_end().lines().last().unwrap_or_default().to_string();
    assert!(last.starts_with("volleyd: error: "), "{text}");
    last
}

#[test]
fn volumes_are_created_listed_changed_and_deleted() {
    let server = Server::start();
    let created = server.json(&["volume", "create", "--size", "1MiB", "--count", "3", "--name-prefix", "v"]);
    assert_eq!(created["volumes"].as_array().unwrap().len(), 3);
    let line = server.ok(&["volume", "create", "blank", "--size", "8MiB", "--rate", "none"]);
    assert!(line.starts_with("created blank, 8 MiB, in"), "{line}");
    let listed = server.json(&["volume", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 4);
    let listed = server.json(&["volume", "list", "--prefix", "v"]);
    assert_eq!(listed.as_array().unwrap().len(), 3);
    let table = server.ok(&["volume", "list"]);
    assert!(table.lines().next().unwrap().starts_with("NAME"), "{table}");
    let shown = server.ok(&["volume", "show", "blank"]);
    assert!(shown.contains("8 MiB (8388608 bytes)"), "{shown}");
    server.ok(&["volume", "rate", "v1", "2MiB/s"]);
    assert_eq!(server.json(&["volume", "show", "v1"])["rate"], "2097152");
    server.ok(&["volume", "set", "v1", "v2", "--rate", "unlimited"]);
    assert_eq!(server.json(&["volume", "show", "v2"])["rate"], "unlimited");
    let waited = server.ok(&["volume", "wait", "v0", "blank", "--hydrated", "--timeout", "10s"]);
    assert_eq!(waited, "v0 is hydrated\nblank is hydrated\n");
    let batches = server.ok(&["batch", "list"]);
    assert_eq!(batches.lines().count(), 3, "{batches}");
    let batch = server.json(&["batch", "show", created["batch"].as_str().unwrap()]);
    assert_eq!((&batch["volumes"], &batch["volumes_hydrated"]), (&3.into(), &3.into()));
    assert!(server.ok(&["store", "list"]).contains("default"));
    assert_eq!(server.json(&["store", "show", "default"])["volumes"], 4);
    assert_eq!(server.json(&["node", "show"])["shards"].as_array().unwrap().len(), 2);
    assert!(server.ok(&["node", "show"]).contains("127.0.0.1:"));
    assert_eq!(server.ok(&["volume", "delete", "v0", "v1", "v2"]), "deleted v0\ndeleted v1\ndeleted v2\n");
    assert_eq!(server.json(&["volume", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn mistakes_get_one_line_and_exit_code_1() {
    let server = Server::start();
    server.ok(&["volume", "create", "a", "--size", "1MiB"]);
    for (args, says) in [
        (&["volume", "create", "a", "--size", "1MiB"][..], "\"a\""),
        (&["volume", "create", "b", "--snapshot", "none"], "\"none\""),
        (&["volume", "create", "b"], "snapshot or size"),
        (&["volume", "create", "b/c", "--size", "1MiB"], "b/c"),
        (&["volume", "create", "b", "--size", "1000"], "multiple of 512"),
        (&["volume", "create", "b", "--size", "1MiB", "--store", "x"], "\"x\""),
        (&["volume", "show", "b"], "\"b\""),
        (&["volume", "show", "../node"], "../node"),
        (&["volume", "wait", "b", "--hydrated"], "\"b\""),
        (&["volume", "rate", "b", "none"], "\"b\""),
        (&["batch", "show", "0"], "\"0\""),
        (&["store", "show", "x"], "\"x\""),
    ] {
        let line = server.fails(args);
        assert!(line.contains(says), "{args:?}: {line}");
    }
    let line = server.fails(&["volume", "delete", "b", "a", "c"]);
    assert!(line.contains("\"b\"") && line.contains("\"c\""), "{line}");
    assert_eq!(server.json(&["volume", "list"]).as_array().unwrap().len(), 0, "a was deleted all the same");
    let line = server.fails(&["volume", "show", "b", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["error"]["code"], "unknown_volume");
    for usage in [&["volume", "create", "b", "--size", "much"][..], &["volume", "rate", "a", "fast"], &["volume"]] {
        assert_eq!(server.volley(usage).status.code(), Some(2), "{usage:?}");
    }
}

#[test]
fn an_image_is_warmed_shown_pinned_and_dropped() {
    let server = Server::start();
    let image = server.dir.path().join("image.raw");
    let content: Vec<u8> = (0_u32..4 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 15) as u8 | 1).collect();
    std::fs::write(&image, content).unwrap();
    let url = format!("file:{}", server.dir.path().join("objects").display());
    server.ok(&["image", "import", image.to_str().unwrap(), "--name", "img", "--object-store", &url]);
    let line = server.ok(&["cache", "warm", "img", "--pin"]);
    assert_eq!(line, "img: 8 of 8 chunks are in the cache, 8 of them pinned\n");
    let table = server.ok(&["cache", "show"]);
    assert!(table.starts_with("TIER") && table.contains("\nram ") && table.contains("warmed img: 8 of 8"), "{table}");
    let shown = server.json(&["cache", "show"]);
    assert_eq!((&shown["ram"]["pinned_bytes"], &shown["disk"]), (&Value::from(4 << 20), &Value::Null));
    assert_eq!(server.ok(&["cache", "unpin", "img"]), "img: 8 chunks unpinned\n");
    assert_eq!(server.ok(&["cache", "drop", "img"]), "img: dropped 8 chunks from RAM and 0 from the disk\n");
    assert_eq!(server.json(&["cache", "show"])["ram"]["used_bytes"], 0);
    for args in [["cache", "warm", "none"], ["cache", "drop", "none"]] {
        assert!(server.fails(&args).contains("\"none\""), "{args:?}");
    }
}

#[test]
fn a_missing_server_is_named() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_volley"));
    let output = command.args(["volume", "list", "--server", &free]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(line.contains(&free) && line.contains("is volleyd running?"), "{line}");
}

#[test]
fn a_stop_is_clean_and_a_restart_finds_everything() {
    let server = Server::start();
    server.ok(&["volume", "create", "--size", "1MiB", "--count", "10", "--name-prefix", "v"]);
    let node = server.json(&["node", "show"])["node_id"].clone();
    let (status, dir) = server.stop();
    assert_eq!(status.code(), Some(0));
    let server = Server::start_in(dir);
    assert_eq!(server.json(&["volume", "list"]).as_array().unwrap().len(), 10);
    assert_eq!(server.json(&["node", "show"])["node_id"], node);
}

#[test]
fn a_server_that_cannot_start_says_why_in_one_line() {
    let server = Server::start();
    let locked = refused(server_command(server.dir.path()));
    assert!(locked.contains("is locked by a running volleyd") && locked.contains("--data"), "{locked}");
    let other = directory();
    let mut command = Command::new(volleyd());
    command.args(["--http", &server.http, "--listen", "127.0.0.1:0"]).arg("--data").arg(other.path().join("n"));
    command.arg("--object-store").arg(format!("file:{}", server.dir.path().join("objects").display()));
    let line = refused(command);
    assert!(line.contains(&server.http), "{line}");
    let mut command = Command::new(volleyd());
    command.env_remove("VOLLEY_OBJECT_STORE").arg("--data").arg(other.path().join("m"));
    assert!(refused(command).contains("--object-store"));
    assert!(!other.path().join("m").exists(), "nothing is made by a start that can't be");
    let usage = Command::new(volleyd()).arg("--colour").output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn the_printed_configuration_is_one() {
    let dir = directory();
    let file = dir.path().join("volley.toml");
    let print = |args: &[&str]| {
        let mut command = Command::new(volleyd());
        let output = command.env_remove("VOLLEY_OBJECT_STORE").args(args).arg("--print-config").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = print(&["--cores", "3", "--store", "a=/a"]);
    std::fs::write(&file, &printed).unwrap();
    assert_eq!(print(&["--config", file.to_str().unwrap()]), printed);
    assert!(printed.contains("\ncores = 3\n"), "{printed}");
}

#[test]
fn the_service_manager_is_told() {
    let dir = directory();
    // The path of a unix socket is short.
    let sockets = tempfile::tempdir().unwrap();
    let path = sockets.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut command = server_command(dir.path());
    let mut process = command.env("NOTIFY_SOCKET", &path).stdout(Stdio::piped()).spawn().unwrap();
    let heard = || {
        let mut buffer = [0; 64];
        let len = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).to_string()
    };
    assert_eq!(heard(), "READY=1");
    signal(&process, libc::SIGINT);
    assert_eq!(heard(), "STOPPING=1");
    assert_eq!(process.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    process.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("volleyd: ready: data 127.0.0.1:"), "{said}");
}

#[test]
fn placement_is_shown_before_and_after() {
    let server = Server::start();
    let table = server.ok(&["place", "--dry-run", "--size", "1MiB", "--count", "3"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("STORE    DOMAIN   VOLUMES  ROOM FOR"), "{table}");
    assert!(lines[1].starts_with("default  default  3 "), "{table}");
    assert!(lines[2].starts_with("3 volumes of 1 MiB fit"), "{table}");
    let placed = server.json(&["place", "--dry-run", "--size", "1MiB", "--count", "3", "--spread", "domain"]);
    assert_eq!((&placed["fits"], &placed["stores"][0]["volumes"]), (&true.into(), &3.into()));
    assert_eq!(server.json(&["volume", "list"]).as_array().unwrap().len(), 0);

    let huge = ["--size", "10TiB", "--count", "100000"];
    let refused = server.volley(&[&["place", "--dry-run"], &huge[..]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(one_line(&refused).contains("100000 volumes of 10 TiB do not fit"), "{}", one_line(&refused));
    let error = server.fails(&[&["volume", "create", "--name-prefix", "v"], &huge[..]].concat());
    assert!(
        error.contains("100000 volumes of 10 TiB do not fit: there is room for ") && error.contains("overcommit 1"),
        "{error}"
    );
    assert_eq!(server.json(&["volume", "list"]).as_array().unwrap().len(), 0);
    // More than there is only when it is said.
    server.ok(&["volume", "create", "big", "--size", "15TiB", "--overcommit", "unlimited", "--spread", "store"]);
    let shown = server.ok(&["volume", "show", "big"]);
    assert!(shown.contains("placement         the only store that takes volumes; load "), "{shown}");
    assert!(server.ok(&["store", "list"]).contains("15 TiB"));
    let usage = server.volley(&["place", "--size", "1MiB"]);
    assert_eq!(usage.status.code(), Some(2));
}
