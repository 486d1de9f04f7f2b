//! An S3 server of ours and nodes on it, one after the other: what the benchmarks of cold and warm volumes measure on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::origin::{Manners, Origin};
use crate::process::{Result, Server, run, sibling, work_folder};

/// Nobody waits for the object store's manners while images are put there.
const AT_ONCE: Manners = Manners { first_byte: Duration::ZERO, bytes_per_second: 10 << 30 };

/// Where to work, and how the object store answers while it is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct SiteArgs {
    /// Delay of the object store before each answer, in milliseconds.
    #[arg(long, default_value_t = 20)]
    pub first_byte_ms: u64,
    /// Bandwidth of each connection to the object store, in MiB/s.
    #[arg(long, default_value_t = 100)]
    pub connection_mib: u64,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    pub dir: PathBuf,
}

/// A folder for everything, which goes away with this, and the object store.
pub struct Site {
    dir: PathBuf,
    origin: Origin,
    /// Data ports of nodes are here; `None`: on TCP.
    sockets: Option<tempfile::TempDir>,
    _files: tempfile::TempDir,
}

impl Site {
    /// Works in a new folder of the one given.
    ///
    /// # Errors
    /// When the folder can't be made or the object store can't listen.
    pub fn new(args: &SiteArgs) -> Result<Site> {
        let (files, dir) = work_folder(&args.dir)?;
        let origin = Origin::start(AT_ONCE).map_err(|e| format!("object store: {e}"))?;
        Ok(Site { dir, origin, sockets: None, _files: files })
    }

    /// From now on nodes have their data ports at unix sockets, where hosts on the same machine reach them.
    ///
    /// # Errors
    /// When there is no place for temporary files.
    pub fn use_unix_sockets(&mut self) -> Result<()> {
        self.sockets = Some(tempfile::tempdir().map_err(|e| e.to_string())?);
        Ok(())
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// From now on the object store answers so; `None`: as fast as it can.
    pub fn answer(&self, args: Option<&SiteArgs>) {
        self.origin.set_manners(args.map_or(AT_ONCE, |args| Manners {
            first_byte: Duration::from_millis(args.first_byte_ms),
            bytes_per_second: args.connection_mib << 20,
        }));
    }

    /// A `volley` command, for a node if one is given.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn volley(&self, server: Option<&Server>, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(sibling("volley")?);
        command.args(words).env_remove("VOLLEY_SERVER");
        self.use_origin(&mut command);
        if let Some(server) = server {
            command.env("VOLLEY_SERVER", server.ready_word("http")?);
        }
        Ok(command)
    }

    fn use_origin(&self, command: &mut Command) {
        command.env("VOLLEY_OBJECT_STORE", "s3://bench/volley").env("AWS_ENDPOINT_URL", self.origin.endpoint());
        command.env("AWS_ACCESS_KEY_ID", "bench").env("AWS_SECRET_ACCESS_KEY", "bench").env("AWS_REGION", "us-east-1");
    }

    /// Puts an image into the object store; its file is removed.
    ///
    /// # Errors
    /// When the import fails.
    pub fn import(&self, image: &Path, name: &str) -> Result<()> {
        run(&mut self.volley(None, &["image", "import", &image.display().to_string(), "--name", name])?)?;
        std::fs::remove_file(image).map_err(|e| e.to_string())
    }

    /// Starts `volley-agent` for a node; its NBD socket is at the path.
    ///
    /// # Errors
    /// When it does not start.
    pub fn agent(&self, server: &Server, socket: &Path) -> Result<Server> {
        let mut command = Command::new(sibling("volley-agent")?);
        command.args(["--server", &server.ready_word("data")?, "--log", "warn"]);
        command.arg("--nbd").arg(format!("unix:{}", socket.display()));
        Server::start(command, "ready")
    }

    /// Starts a new node with lines of configuration, measures on it, stops it, and removes what it stored.
    ///
    /// # Errors
    /// Those of the measurement, or of the node.
    pub fn node<T>(&self, config: &str, measure: impl FnOnce(&Server) -> Result<T>) -> Result<T> {
        let (data, file) = (self.dir.join("node"), self.dir.join("node.toml"));
        std::fs::write(&file, config).map_err(|e| e.to_string())?;
        let mut command = Command::new(sibling("volleyd")?);
        command.arg("--config").arg(&file).arg("--data").arg(&data);
        let socket = self.sockets.as_ref().map(|dir| format!("unix:{}", dir.path().join("data.sock").display()));
        command.arg("--listen").arg(socket.as_deref().unwrap_or("127.0.0.1:0"));
        command.args(["--http", "127.0.0.1:0", "--log", "warn"]);
        self.use_origin(&mut command);
        let server = Server::start(command, "volleyd: ready")?;
        let measured = measure(&server)?;
        server.stop()?;
        std::fs::remove_dir_all(&data).map_err(|e| e.to_string())?;
        Ok(measured)
    }
}
