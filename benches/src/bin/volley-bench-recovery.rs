//! What a restart costs: from the start of `volleyd` until a volume is attached, with thousands of volumes and journals
//! that are as long as they ever get; the checkpoint that bounds them; memory. Start it with `tools/bench recovery`.
//!
//! The data directories are written with the server's own parts: identity, volume files, and journals with full logs.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use glommio::{LocalExecutorBuilder, Placement};
use volley_benches::figure::{Figure, Pair, conclude, runs};
use volley_benches::process::{Result, Server, run, sibling, work_folder};
use volley_server::bootstrap::JOURNAL_DIR;
use volley_server::config::StoreConfig;
use volley_server::datadir::{DataDir, VOLUMES_DIR};
use volley_server::journal::{self, CHECKPOINT_LOG_BYTES_MIN, CHECKPOINT_LOG_FACTOR, Journal, Record};
use volley_server::platform::glommio::Glommio;
use volley_server::types::{ChunkResidency, HydrationRate, Lineage, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

/// A system disk, half of whose 512 KiB chunks are in the volume.
const VOLUME_BYTES: u64 = 10 << 30;
const CHUNK_BYTES: u32 = 512 << 10;
/// Records of one commit while a log is filled.
const COMMIT_RECORDS: u64 = 256;

/// Measures how long a node takes to come back, and what its checkpoints cost.
#[derive(Debug, Parser)]
#[command(name = "tools/bench recovery")]
struct Args {
    /// Write the figures as a JSON array into FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Numbers of volumes.
    #[arg(long, value_delimiter = ',', default_value = "6000,100000")]
    volumes: Vec<u32>,
    /// Runs of each figure; the median is published.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Shards of the server; 0: every core.
    #[arg(long, default_value_t = 0)]
    cores: usize,
    /// Work there: a folder on a disk with direct I/O. Removed afterwards.
    #[arg(long, default_value = ".cache/bench", value_name = "DIR")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    conclude("recovery", measure(&args), args.json.as_deref())
}

fn measure(args: &Args) -> Result<Vec<Figure>> {
    let (_files, dir) = work_folder(&args.dir)?;
    let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
    std::fs::create_dir(dir.join("objects")).map_err(|e| e.to_string())?;
    println!("{}", volley_benches::process::machine());
    let mut figures = Vec::new();
    for &count in &args.volumes {
        let node = Node::make(args, &dir, sockets.path(), count)?;
        node.checkpoints(&mut figures)?;
        node.restarts(&mut figures)?;
        std::fs::remove_dir_all(&node.data).map_err(|e| e.to_string())?;
    }
    Ok(figures)
}

/// A data directory with `count` volumes.
struct Node<'a> {
    args: &'a Args,
    dir: &'a Path,
    sockets: &'a Path,
    data: PathBuf,
    count: u32,
    shards: usize,
}

impl Node<'_> {
    fn make<'a>(args: &'a Args, dir: &'a Path, sockets: &'a Path, count: u32) -> Result<Node<'a>> {
        let data = dir.join(format!("node-{count}"));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = if args.cores == 0 { cores } else { args.cores };
        let node = Node { args, dir, sockets, data, count, shards };
        let store = node.data.join("store");
        let stores = [StoreConfig { base_percent: 0, ..StoreConfig::new("default", store.clone()) }];
        drop(DataDir::open(&node.data, &stores).map_err(|e| e.to_string())?);
        for number in 0..count {
            let path = store.join(VOLUMES_DIR).join(format!("{}.raw", spec(number).id));
            let file = std::fs::File::create(&path).and_then(|file| file.set_len(VOLUME_BYTES));
            file.map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(node)
    }

    /// A journal with every volume: what its checkpoint writes and how long it takes, beside a plain write of as much.
    fn checkpoints(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut seconds, mut bytes, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in self.runs("checkpoint") {
            let dir = self.dir.join("checkpoint");
            std::fs::create_dir(&dir).map_err(|e| e.to_string())?;
            let (count, journal_dir) = (self.count, dir.clone());
            let took = on_executor(move |platform| async move {
                let states = || (0..count).map(state);
                let journal = Journal::create(&platform, &journal_dir, 1, 0, states()).await?;
                let mut dump = states();
                let begun = Instant::now();
                journal.checkpoint(|| dump.next()).await?;
                let took = begun.elapsed().as_secs_f64();
                journal.close().await?;
                Ok(took)
            })?;
            let len = dir_bytes(&dir)?;
            std::fs::remove_dir_all(&dir).map_err(|e| e.to_string())?;
            let rate = |seconds: f64| len as f64 / seconds / 1e6;
            pairs.push(Pair { ours: rate(took), peer: rate(self.plain_write(len)?) });
            seconds.push(took);
            bytes.push(len as f64);
        }
        let count = self.count;
        figures.push(Figure::alone(&format!("checkpoint_{count}_seconds"), "s", &seconds));
        figures.push(Figure::alone(&format!("checkpoint_{count}_bytes"), "B", &bytes));
        let peer = "dd of as many bytes to a new file, bs=1M oflag=direct conv=fdatasync";
        figures.push(Figure::against(&format!("checkpoint_{count}_vs_dd"), "MB/s", peer, &pairs));
        Ok(())
    }

    fn plain_write(&self, len: u64) -> Result<f64> {
        let file = self.dir.join("plain");
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", "bs=1M", "oflag=direct", "conv=fdatasync", "status=none"]);
        command.arg(format!("count={}", len.div_ceil(1 << 20))).arg(format!("of={}", file.display()));
        let begun = Instant::now();
        run(&mut command)?;
        let took = begun.elapsed().as_secs_f64();
        std::fs::remove_file(&file).map_err(|e| e.to_string())?;
        Ok(took)
    }

    /// From the start of the program until the attach of a volume is answered, as after a kill: logs full, not closed.
    fn restarts(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (mut seconds, mut resident, mut journal_bytes, mut pairs) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in self.runs("recovery") {
            self.write_journals()?;
            let len = dir_bytes(&self.data.join(JOURNAL_DIR))?;
            let read = self.plain_read()?;
            let mut command = Command::new(sibling("volleyd")?);
            command.arg("--data").arg(&self.data);
            command.arg("--object-store").arg(format!("file:{}", self.dir.join("objects").display()));
            command.arg("--listen").arg(format!("unix:{}", self.sockets.join("data.sock").display()));
            command.args(["--http", "127.0.0.1:0", "--cores", &self.shards.to_string(), "--log", "error"]);
            let begun = Instant::now();
            let server = Server::start(command, "volleyd: ready")?;
            attach(&server.ready_word("data")?, &spec(self.count - 1).name)?;
            let took = begun.elapsed().as_secs_f64();
            seconds.push(took);
            resident.push(server.resident_bytes()? as f64);
            journal_bytes.push(len as f64);
            pairs.push(Pair { ours: len as f64 / took / 1e6, peer: len as f64 / read / 1e6 });
            // Killed when dropped.
            drop(server);
        }
        let count = self.count;
        figures.push(Figure::alone(&format!("recovery_{count}_seconds"), "s", &seconds));
        figures.push(Figure::alone(&format!("recovery_{count}_journal_bytes"), "B", &journal_bytes));
        let peer = "cat of the same journals, page cache cold";
        figures.push(Figure::against(&format!("recovery_{count}_vs_cat"), "MB/s", peer, &pairs));
        figures.push(Figure::alone(&format!("recovery_{count}_rss_bytes"), "B", &resident));
        Ok(())
    }

    /// The journals were written past the page cache: nothing of them is in it.
    fn plain_read(&self) -> Result<f64> {
        let mut command = Command::new("sh");
        command.args(["-c", "cat \"$0\"/* | tail -c 1"]).arg(self.data.join(JOURNAL_DIR));
        let begun = Instant::now();
        run(&mut command)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// The journals of a node that is killed right before its checkpoints are due.
    fn write_journals(&self) -> Result<()> {
        let dir = self.data.join(JOURNAL_DIR);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).map_err(|e| e.to_string())?;
        }
        let (count, shards) = (self.count, self.shards);
        on_executor(move |platform| async move {
            let epoch = journal::recover(&platform, &dir).await?.epoch + 1;
            for shard in 0..shards {
                let own = || (0..count).map(state).filter(move |state| state.spec.id.owner(shards) == shard);
                let journal = Journal::create(&platform, &dir, epoch, shard, own()).await?;
                fill_log(&journal, &own().collect::<Vec<_>>()).await?;
            }
            journal::commit_epoch(&platform, &dir, epoch, shards).await?;
            Ok(())
        })
    }

    fn runs(&self, what: &str) -> impl Iterator<Item = u32> + use<> {
        runs(&format!("{what}, {} volumes", self.count), self.args.runs)
    }
}

/// Appends what guests cause (bitmaps of written chunks, attaches) until one more commit would make a checkpoint due.
async fn fill_log(journal: &Journal<Glommio>, volumes: &[VolumeState]) -> volley_server::error::Result<()> {
    let state_bytes = volumes.iter().map(|state| 200 + 24 * state.residency.len() as u64).sum::<u64>();
    let limit = CHECKPOINT_LOG_BYTES_MIN.max(CHECKPOINT_LOG_FACTOR * state_bytes);
    let mut next = 0;
    while journal.log_bytes() + (64 << 10) < limit && !journal.checkpoint_due() {
        let mut last = journal::Lsn::default();
        for _ in 0..COMMIT_RECORDS {
            let spec = &volumes[next % volumes.len()].spec;
            let chunk = u32::try_from(next / volumes.len() % 1000).expect("small") + 1;
            let written = ChunkResidency::Partial(Box::new([1 << (next % 64), 0]));
            let record = match next % 8 {
                0 => Record::Generation { volume: spec.id, generation: next as u64 },
                _ => Record::Residency { volume: spec.id, chunks: vec![(chunk, written)] },
            };
            last = journal.append(&record);
            next += 1;
        }
        journal.commit(last).await?;
    }
    Ok(())
}

fn spec(number: u32) -> VolumeSpec {
    let name = format!("web-{number}");
    VolumeSpec {
        id: VolumeId::new(&name, u64::from(number)),
        name: name.into(),
        size_bytes: VOLUME_BYTES,
        chunk_bytes: CHUNK_BYTES,
        snapshot: Some(SnapshotRef { name: "debian-12".into(), id: 7 }),
        store: "default".into(),
        // Nothing is hydrated behind the measurement's back: there is no such snapshot.
        rate: HydrationRate::None,
        batch: Some(1),
        created_unix_ms: 1_700_000_000_000,
    }
}

/// Every other volume is hydrated; the rest have some chunks whole and some written in part.
fn state(number: u32) -> VolumeState {
    let spec = spec(number);
    let hydrated = number.is_multiple_of(2);
    let residency = |chunk: u32| match chunk % 16 {
        0 => (chunk, ChunkResidency::Partial(Box::new([u64::from(number) | 1, 0]))),
        _ => (chunk, ChunkResidency::Resident),
    };
    let residency = if hydrated { Vec::new() } else { (0..128).map(residency).collect() };
    VolumeState { spec, generation: 1, residency, hydrated, lineage: Lineage::new(None) }
}

/// Runs a task on an executor of its own, with the server's direct I/O.
fn on_executor<T: Send + 'static, F: Future<Output = volley_server::error::Result<T>> + 'static>(
    task: impl FnOnce(Glommio) -> F + Send + 'static,
) -> Result<T> {
    let run = move || async move {
        let platform = Glommio::new().map_err(|e| e.to_string())?;
        task(platform).await.map_err(|e| e.to_string())
    };
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(run).map_err(|e| e.to_string())?;
    executor.join().map_err(|e| e.to_string())?
}

fn attach(address: &str, name: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let say = |e: volley_client::Error| e.to_string();
        let client = volley_client::Client::connect(address, volley_client::Options::default()).await.map_err(say)?;
        client.attach(name).await.map(drop).map_err(say)
    })
}

fn dir_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
        let metadata = entry.and_then(|entry| entry.metadata());
        bytes += metadata.map_err(|e| format!("{}: {e}", dir.display()))?.len();
    }
    Ok(bytes)
}
