//! The node that is profiled: one core, volumes of its own, an object store in a directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Args;
use super::workload::Shape;
use crate::process::{Result, Server, on_core, run, sibling, volley, work_folder};
use crate::{creation, full_image};

/// What hydration wrote has left for the disk by then.
const SETTLE: Duration = Duration::from_secs(1);

/// The cores of the node and of the load.
///
/// # Errors
/// When this process is bound to a core that is not allowed, or the kernel does not say.
pub fn cores(args: &Args) -> Result<(usize, usize)> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map_or(vec![], cpu_list);
    let first = *allowed.first().ok_or("the kernel does not say which cores are allowed")?;
    let server = args.server_core.unwrap_or(first);
    // With one core both share it: the profile is of the node alone all the same.
    let other = allowed.iter().find(|core| **core != server).unwrap_or(&server);
    Ok((server, args.load_core.unwrap_or(*other)))
}

/// `0-2,5` is 0, 1, 2 and 5.
fn cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<usize>().ok()?..=to.parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// A folder for nodes and their images, which goes away with this.
pub struct Place {
    dir: PathBuf,
    core: usize,
    shards: u32,
    _files: tempfile::TempDir,
}

impl Place {
    /// Works in a new folder of the one given.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(args: &Args, core: usize) -> Result<Place> {
        let (files, dir) = work_folder(&args.dir)?;
        Ok(Place { dir, core, shards: args.shards, _files: files })
    }

    fn volley(&self, server: Option<&Server>, words: &[&str]) -> Result<()> {
        run(&mut volley(&self.objects(), server, words)?).map(drop)
    }

    fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    /// Puts so many images into the object store, `i0`, `i1` and so on; no two have a chunk in common.
    ///
    /// # Errors
    /// When an import fails.
    pub fn import(&self, images: u32, mib: u32) -> Result<()> {
        let file = self.dir.join("image.raw");
        for number in 0..images {
            full_image(&file, mib, (u64::from(number) << 32) + 1)?;
            self.volley(None, &["image", "import", path(&file)?, "--name", &format!("i{number}")])?;
        }
        std::fs::remove_file(&file).map_err(|e| format!("{}: {e}", file.display()))
    }

    /// Runs something on a new node, whose threads may use no other core.
    ///
    /// # Errors
    /// Those of what is run, or of the node.
    pub fn node<T>(&self, work: impl FnOnce(&Server) -> Result<T>) -> Result<T> {
        let data = self.dir.join("node");
        let mut command = on_core(Some(self.core), sibling("volleyd")?);
        command.arg("--data").arg(&data).args(["--object-store", &format!("file:{}", self.objects().display())]);
        command.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log", "error"]);
        command.args(["--cores", &self.shards.to_string()]);
        let server = Server::start(command, "volleyd: ready")?;
        let done = work(&server)?;
        server.stop()?;
        std::fs::remove_dir_all(&data).map_err(|e| format!("{}: {e}", data.display()))?;
        Ok(done)
    }

    /// Makes volumes of one image, and waits until all of them is there.
    ///
    /// # Errors
    /// When the node refuses.
    pub fn resident_volumes(&self, server: &Server, shape: &Shape) -> Result<()> {
        let count = shape.connections.to_string();
        let rate = ["--rate", "unlimited"];
        self.volley(Some(server), &[&creation("i0", "v", &count)[..], &rate].concat())?;
        for number in 0..shape.connections {
            self.volley(Some(server), &["volume", "wait", &format!("v{number}"), "--hydrated"])?;
        }
        std::thread::sleep(SETTLE);
        Ok(())
    }

    /// Makes a volume of each image; nothing comes unless it is asked for.
    ///
    /// # Errors
    /// When the node refuses.
    pub fn cold_volumes(&self, server: &Server, shape: &Shape) -> Result<()> {
        for number in 0..shape.connections {
            let (name, image) = (format!("v{number}"), format!("i{number}"));
            let words =
                ["volume", "create", &name, "--snapshot", &image, "--overcommit", "unlimited", "--rate", "none"];
            self.volley(Some(server), &words)?;
        }
        Ok(())
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::cpu_list;

    #[test]
    fn lists_of_cores_have_ranges() {
        assert_eq!(cpu_list("\t0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(cpu_list("3"), [3]);
        assert!(cpu_list("").is_empty());
    }
}
