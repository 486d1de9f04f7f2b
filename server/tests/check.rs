//! `volley check`: one damaged data directory for each kind of damage, and what the check says of it.
//!
//! The directories are made with the server's own parts (identity, journals, import), so they are what a stopped node
//! leaves; the damage is done with plain file calls.
#![allow(clippy::disallowed_methods)] // The test stands outside of the node, as an operator does.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use futures::FutureExt;
use futures::executor::block_on;
use volley_server::check::{CheckError, Kind, Options, Report, Severity, check};
use volley_server::config::StoreConfig;
use volley_server::datadir::DataDir;
use volley_server::import::{self, ImportOptions};
use volley_server::journal::{self, Journal, Record};
use volley_server::object_store::any::StoreChoice;
use volley_server::object_store::dir::DirStore;
use volley_server::platform::blocking::Blocking;
use volley_server::types::{ChunkResidency, HydrationRate, Lineage, SnapshotRef, VolumeId, VolumeSpec, VolumeState};

const CHUNK: u64 = 64 << 10;
/// The last chunk is short, and ends inside a sector.
const IMAGE_BYTES: u64 = 15 * CHUNK + 5 * 4096 + 512;
/// Chunks of the image without data.
const ZERO_CHUNKS: [u64; 2] = [3, 7];
const SHARDS: usize = 2;

/// A stopped node with volumes of every sort.
struct Lab {
    dir: tempfile::TempDir,
    image: Vec<u8>,
    volumes: Vec<VolumeState>,
}

fn image() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..IMAGE_BYTES as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    for chunk in ZERO_CHUNKS {
        bytes[(chunk * CHUNK) as usize..((chunk + 1) * CHUNK) as usize].fill(0);
    }
    bytes
}

impl Lab {
    fn new() -> Lab {
        let dir = tempfile::tempdir().expect("directory");
        let image = image();
        let mut lab = Lab { dir, image, volumes: Vec::new() };
        let snapshot = lab.import("debian-12");
        let data = DataDir::open(&lab.data(), &[lab.store_config()]).and_then(|mut data| {
            data.remember_journal()?;
            Ok(data)
        });
        drop(data.expect("data directory"));
        lab.add("whole", Some(&snapshot), 0, Resident::All);
        lab.add("half", Some(&snapshot), 0, Resident::Chunks(8));
        lab.add("used", Some(&snapshot), 2, Resident::All);
        lab.add("blank", None, 0, Resident::All);
        lab.add("fresh", Some(&snapshot), 0, Resident::Chunks(0));
        // What guests do: chunk 5 written, chunk 6 discarded.
        let used = lab.open("used");
        used.write_all_at(&[0xab; 4096], 5 * CHUNK + 8192).expect("write");
        punch(&used, 6 * CHUNK, CHUNK);
        lab.write_journals();
        lab
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    fn store_config(&self) -> StoreConfig {
        StoreConfig { base_percent: 0, ..StoreConfig::new("main", self.dir.path().join("main")) }
    }

    fn volumes_dir(&self) -> PathBuf {
        self.dir.path().join("main/volumes")
    }

    fn objects(&self) -> PathBuf {
        self.dir.path().join("objects")
    }

    fn import(&self, name: &str) -> SnapshotRef {
        let file = self.dir.path().join("image.raw");
        fs::write(&file, &self.image).expect("image");
        let store = block_on(DirStore::create(Blocking, self.objects())).expect("object store");
        let options =
            ImportOptions { image: file, name: name.into(), chunk_bytes: CHUNK as u32, format: None, threads: Some(1) };
        let report = import::import(&store, &options, |_, _| {}).expect("import");
        SnapshotRef { name: name.into(), id: u128::from_str_radix(&report.id, 16).expect("id") }
    }

    fn add(&mut self, name: &str, snapshot: Option<&SnapshotRef>, generation: u64, resident: Resident) {
        let spec = VolumeSpec {
            id: VolumeId::new(name, self.volumes.len() as u64 + 1),
            name: name.into(),
            size_bytes: IMAGE_BYTES,
            chunk_bytes: CHUNK as u32,
            snapshot: snapshot.cloned(),
            store: "main".into(),
            rate: HydrationRate::Unlimited,
            batch: None,
            created_unix_ms: 1,
        };
        let file = File::create_new(self.volumes_dir().join(format!("{}.raw", spec.id))).expect("volume file");
        file.set_len(IMAGE_BYTES.next_multiple_of(4096)).expect("length");
        let (hydrated, chunks) = match resident {
            Resident::All => (true, u64::from(spec.chunks())),
            Resident::Chunks(chunks) => (false, chunks),
        };
        for chunk in (0..chunks).filter(|chunk| snapshot.is_some() && !ZERO_CHUNKS.contains(chunk)) {
            let end = IMAGE_BYTES.min((chunk + 1) * CHUNK);
            file.write_all_at(&self.image[(chunk * CHUNK) as usize..end as usize], chunk * CHUNK).expect("write");
        }
        let residency = match hydrated {
            true => Vec::new(),
            false => (0..chunks as u32).map(|chunk| (chunk, ChunkResidency::Resident)).collect(),
        };
        self.volumes.push(VolumeState { spec, generation, residency, hydrated, lineage: Lineage::new(None) });
    }

    /// One journal closed in good order, one as a kill leaves it, with a log behind its checkpoint.
    fn write_journals(&self) {
        let dir = self.data().join("journal");
        block_on(journal::recover(&Blocking, &dir)).expect("first start");
        for shard in 0..SHARDS {
            let own = self.volumes.iter().filter(|state| state.spec.id.owner(SHARDS) == shard).cloned();
            let journal = now(Journal::create(&Blocking, &dir, 1, shard, own)).expect("create");
            for round in 0..3 {
                let record = Record::Rate { volume: VolumeId(round), rate: HydrationRate::None };
                now(journal.commit(journal.append(&record))).expect("commit");
            }
            if shard == 0 {
                now(journal.close()).expect("close");
            }
        }
        block_on(journal::commit_epoch(&Blocking, &dir, 1, SHARDS)).expect("commit");
    }

    fn path(&self, name: &str) -> PathBuf {
        let state = self.volumes.iter().find(|state| &*state.spec.name == name).expect("a volume");
        self.volumes_dir().join(format!("{}.raw", state.spec.id))
    }

    fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(name)).expect("volume file")
    }

    fn segment(&self, shard: usize) -> PathBuf {
        self.data().join(format!("journal/0000000001-{shard:04}-0000000000.vj"))
    }

    fn plain(&self) -> Report {
        check(&self.data(), &Options::default()).expect("checked")
    }

    fn against_snapshots(&self, quick: bool) -> Report {
        let object_store = Some(StoreChoice::Dir(self.objects()));
        check(&self.data(), &Options { object_store, quick, ..Options::default() }).expect("checked")
    }
}

enum Resident {
    All,
    /// The first so many chunks.
    Chunks(u64),
}

/// Futures of the blocking platform are ready at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("ready")
}

fn punch(file: &File, offset: u64, len: u64) {
    use std::os::fd::AsRawFd;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; the call touches no memory of ours.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("write");
}

fn worse_than_notes(report: &Report) -> Vec<(Kind, &Path)> {
    let found = report.findings.iter().filter(|finding| finding.severity > Severity::Note);
    found.map(|finding| (finding.kind, finding.path.as_path())).collect()
}

/// The only thing found besides notes is `kind` at `path`, in one line that names `words` and says what to do.
fn finds(report: &Report, kind: Kind, path: &Path, words: &[&str]) {
    assert_eq!(worse_than_notes(report), [(kind, path)], "{:#?}", report.findings);
    assert!(!report.is_clean());
    notes(report, kind, path, words);
}

/// Among the findings is `kind` at `path`.
fn notes(report: &Report, kind: Kind, path: &Path, words: &[&str]) {
    let found = report.findings.iter().find(|finding| finding.kind == kind && finding.path == path);
    let line = found.unwrap_or_else(|| panic!("no {kind:?} in {:#?}", report.findings)).to_string();
    assert!(!line.contains('\n') && line.contains(found.expect("found").advice[1..].trim()), "{line}");
    words.iter().for_each(|word| assert!(line.contains(word), "no {word:?} in {line}"));
}

#[test]
fn a_sound_directory_is_clean_with_and_without_the_object_store() {
    let lab = Lab::new();
    for report in [lab.plain(), lab.against_snapshots(false), lab.against_snapshots(true)] {
        assert!(report.is_clean(), "{:#?}", report.findings);
        notes(&report, Kind::NotClosed, &lab.data().join("journal"), &["killed"]);
        assert_eq!((report.volumes, report.volumes_hydrated, report.journals, report.epoch), (5, 3, 2, 1));
        assert_eq!((report.stores, report.chunks_resident), (1, 3 * 16 + 8));
    }
    let report = lab.against_snapshots(false);
    assert_eq!((report.chunks_verified, report.chunks_changed, report.chunks_discarded), (16 + 8 + 14, 1, 1));
    let before: Vec<_> = walk(lab.dir.path());
    lab.against_snapshots(false);
    assert_eq!(walk(lab.dir.path()), before, "a check writes nothing");
}

fn walk(dir: &Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("list") {
        let path = entry.expect("entry").path();
        let metadata = fs::metadata(&path).expect("stat");
        if metadata.is_dir() {
            found.extend(walk(&path));
        }
        found.push((path, metadata.len(), metadata.modified().expect("time")));
    }
    found.sort();
    found
}

#[test]
fn a_directory_in_use_and_one_that_is_no_node_are_not_judged() {
    let lab = Lab::new();
    let running = DataDir::open(&lab.data(), &[lab.store_config()]).expect("a server's lock");
    let error = check(&lab.data(), &Options::default()).expect_err("locked").to_string();
    assert!(error.contains("is locked by a running volleyd") && error.contains("stop it first"), "{error}");
    drop(running);
    // Several may look at once, but no server starts meanwhile.
    let looking = volley_server::datadir::lock_shared(&lab.data()).expect("lock").expect("a lock file");
    assert!(lab.plain().is_clean());
    assert!(DataDir::open(&lab.data(), &[lab.store_config()]).is_err());
    drop(looking);

    let empty = lab.dir.path().join("empty");
    assert!(matches!(check(&empty, &Options::default()), Err(CheckError::Io { .. })));
    fs::create_dir(&empty).expect("mkdir");
    assert!(matches!(check(&empty, &Options::default()), Err(CheckError::NoNode(_))));
    let newer = fs::read_to_string(lab.data().join("node.toml")).expect("read").replace("format = 1", "format = 9");
    fs::write(lab.data().join("node.toml"), newer).expect("write");
    assert!(matches!(check(&lab.data(), &Options::default()), Err(CheckError::DataDir(_))));
}

#[test]
fn a_lost_or_damaged_identity_is_found() {
    let lab = Lab::new();
    let path = lab.data().join("node.toml");
    let text = fs::read_to_string(&path).expect("read");
    fs::write(&path, &text[..text.len() / 4]).expect("write");
    let report = lab.plain();
    assert!(worse_than_notes(&report).contains(&(Kind::NodeLost, &*path)), "{:#?}", report.findings);
    fs::remove_file(&path).expect("remove");
    let (report, data) = (lab.plain(), lab.data());
    assert!(worse_than_notes(&report).contains(&(Kind::NodeLost, &*data)), "{:#?}", report.findings);
}

#[test]
fn a_lost_journal_is_found() {
    let lab = Lab::new();
    let journal = lab.data().join("journal");
    fs::remove_dir_all(&journal).expect("remove");
    finds(&lab.plain(), Kind::JournalLost, &journal, &["the journal is gone"]);
}

#[test]
fn damaged_journals_are_found_where_they_are_and_the_others_are_still_read() {
    let lab = Lab::new();
    // In the checkpoint; in the log (not its last batch); the header; a whole segment; the superblock.
    let (checkpoint, log) = (4096 + 60, 3 * 4096 + 50);
    for (path, at) in [(lab.segment(0), checkpoint), (lab.segment(1), log), (lab.segment(0), 20)] {
        flip(&path, at);
        let report = lab.plain();
        finds(&report, Kind::JournalDamaged, &path, &["at byte"]);
        assert!(report.volumes > 0 && report.volumes < 5, "{}", report.volumes);
        flip(&path, at);
    }
    let current = lab.data().join("journal/CURRENT");
    flip(&current, 16);
    finds(&lab.plain(), Kind::JournalDamaged, &current, &["checksum"]);
    flip(&current, 16);
    fs::remove_file(lab.segment(1)).expect("remove");
    finds(&lab.plain(), Kind::JournalDamaged, &lab.data().join("journal"), &["journal of shard 1 is missing"]);
}

#[test]
fn a_torn_tail_and_what_else_a_crash_leaves_are_notes() {
    let lab = Lab::new();
    // The last batch of the journal that was not closed.
    let len = fs::metadata(lab.segment(1)).expect("stat").len();
    let bytes = fs::read(lab.segment(1)).expect("read");
    let last = (0..len / 4096).rev().map(|block| block * 4096).find(|at| bytes[*at as usize] != 0).expect("a batch");
    flip(&lab.segment(1), last + 50);
    let leftovers = [
        lab.data().join("node.tmp"),
        lab.data().join("journal/CURRENT.tmp"),
        lab.data().join("journal/0000000001-0000-0000000001.vj.tmp"),
        lab.data().join("journal/0000000002-0000-0000000000.vj"),
        lab.dir.path().join("main/volley-store.tmp"),
    ];
    leftovers.iter().for_each(|path| fs::write(path, b"x").expect("write"));
    let base = lab.volumes_dir().with_file_name("base");
    fs::create_dir(&base).expect("mkdir");
    fs::write(base.join("0.chunks"), b"whatever an earlier life left").expect("write");
    let foreign = [
        lab.data().join("notes"),
        lab.data().join("journal/x.vj"),
        lab.volumes_dir().join("cat.jpg"),
        base.join("x.chunks"),
    ];
    foreign.iter().for_each(|path| fs::write(path, b"x").expect("write"));
    let unsized_file = lab.path("fresh");
    File::create(&unsized_file).expect("truncate");
    let unfinished = lab.volumes_dir().join("00000000000000aa.raw");
    File::create(&unfinished).expect("create").set_len(1 << 20).expect("length");
    let half_deleted = lab.path("blank").with_extension("deleted");
    fs::rename(lab.path("blank"), &half_deleted).expect("rename");
    let deleted = lab.volumes_dir().join("00000000000000bb.deleted");
    fs::write(&deleted, b"x").expect("write");

    let report = lab.plain();
    assert!(report.is_clean(), "{:#?}", report.findings);
    notes(&report, Kind::TornTail, &lab.segment(1), &["nothing of it was acknowledged"]);
    leftovers.iter().for_each(|path| notes(&report, Kind::Leftover, path, &[]));
    foreign.iter().for_each(|path| notes(&report, Kind::Foreign, path, &[]));
    notes(&report, Kind::FileUnsized, &unsized_file, &["never written"]);
    notes(&report, Kind::CreationUnfinished, &unfinished, &[]);
    notes(&report, Kind::DeletionUnfinished, &half_deleted, &["\"blank\"", "cut short"]);
    notes(&report, Kind::DeletionUnfinished, &deleted, &[]);
}

#[test]
fn a_missing_file_is_found() {
    let lab = Lab::new();
    fs::remove_file(lab.path("half")).expect("remove");
    finds(&lab.plain(), Kind::FileMissing, &lab.path("half"), &["\"half\"", "Restore the file"]);
}

#[test]
fn truncated_and_grown_files_are_found() {
    let lab = Lab::new();
    let whole = IMAGE_BYTES.next_multiple_of(4096);
    for name in ["half", "whole"] {
        lab.open(name).set_len(whole - 4096).expect("truncate");
        finds(&lab.plain(), Kind::FileShort, &lab.path(name), &[name, "4096 are lost"]);
        lab.open(name).set_len(whole).expect("grow");
    }
    lab.open("used").set_len(whole + 512).expect("grow");
    finds(&lab.plain(), Kind::FileLong, &lab.path("used"), &["512 more than the volume"]);
}

#[test]
fn something_else_in_the_place_of_a_file_is_found() {
    let lab = Lab::new();
    fs::remove_file(lab.path("whole")).expect("remove");
    fs::create_dir(lab.path("whole")).expect("mkdir");
    finds(&lab.plain(), Kind::FileUnreadable, &lab.path("whole"), &["not a file"]);
}

#[test]
fn two_files_of_one_volume_are_found() {
    let lab = Lab::new();
    fs::write(lab.path("whole").with_extension("deleted"), b"x").expect("write");
    finds(&lab.plain(), Kind::FileAmbiguous, &lab.path("whole"), &[".deleted"]);
}

#[test]
fn a_file_with_data_that_no_volume_has_is_found() {
    let lab = Lab::new();
    let orphan = lab.volumes_dir().join("00000000000000cc.raw");
    fs::write(&orphan, vec![1; 8192]).expect("write");
    finds(&lab.plain(), Kind::FileOrphaned, &orphan, &["no volume"]);
}

#[test]
fn a_resident_chunk_that_is_a_hole_is_found() {
    let lab = Lab::new();
    // Zero chunks are holes by right; what a guest discarded is one too.
    punch(&lab.open("half"), 2 * CHUNK, CHUNK);
    punch(&lab.open("half"), 5 * CHUNK, 2 * CHUNK);
    for quick in [false, true] {
        let report = lab.against_snapshots(quick);
        finds(&report, Kind::ChunkHole, &lab.path("half"), &["\"half\"", "3 of its resident chunks", "2, 5, 6"]);
    }
    punch(&lab.open("used"), 0, 2 * CHUNK);
    assert_eq!(lab.against_snapshots(true).chunks_discarded, 3);
}

#[test]
fn a_resident_chunk_that_is_not_the_snapshots_is_found() {
    let lab = Lab::new();
    flip(&lab.path("whole"), 9 * CHUNK + 1000);
    // And data in a zero chunk.
    lab.open("whole").write_all_at(b"x", ZERO_CHUNKS[0] * CHUNK + 5000).expect("write");
    let report = lab.against_snapshots(false);
    finds(&report, Kind::ChunkDiffers, &lab.path("whole"), &["\"whole\"", "2 of its resident chunks", "3, 9"]);
    assert!(lab.against_snapshots(true).is_clean(), "a quick check reads no content");
}

#[test]
fn a_file_without_any_data_is_found_even_without_the_object_store() {
    let lab = Lab::new();
    punch(&lab.open("whole"), 0, IMAGE_BYTES.next_multiple_of(4096));
    finds(&lab.plain(), Kind::NoData, &lab.path("whole"), &["16 chunks are resident", "--object-store"]);
}

#[test]
fn a_lost_snapshot_matters_to_volumes_that_need_it() {
    let lab = Lab::new();
    fs::remove_file(lab.objects().join("snapshots/debian-12")).expect("remove");
    let check = |lab: &Lab| {
        let report = lab.against_snapshots(false);
        let mut expected = [(Kind::SnapshotLost, lab.path("half")), (Kind::SnapshotLost, lab.path("fresh"))];
        expected.sort_by(|a, b| a.1.cmp(&b.1));
        let found: Vec<_> = worse_than_notes(&report).iter().map(|(kind, path)| (*kind, path.to_path_buf())).collect();
        assert_eq!(found, expected, "{:#?}", report.findings);
    };
    check(&lab);
    // Another one of the same name is no help.
    lab.import("debian-12");
    check(&lab);
}

#[test]
fn lost_foreign_and_swapped_stores_are_found() {
    let lab = Lab::new();
    let (main, file) = (lab.dir.path().join("main"), lab.dir.path().join("main/volley-store.toml"));
    let text = fs::read_to_string(&file).expect("read");
    let foreign: Vec<String> = text
        .lines()
        .map(|line| match line.starts_with("node_id") {
            true => format!("node_id = \"{:032x}\"", 7),
            false => line.to_owned(),
        })
        .collect();
    let foreign = foreign.join("\n");
    for (damaged, word) in [
        (text.replace("label = \"main\"", "label = \"other\""), "label"),
        (foreign, "belongs to node"),
        (String::from("format = 1"), "not readable"),
    ] {
        fs::write(&file, damaged).expect("write");
        let report = lab.plain();
        assert!(worse_than_notes(&report).contains(&(Kind::StoreLost, &*main)), "{word}: {:#?}", report.findings);
        notes(&report, Kind::StoreLost, &main, &[word]);
    }
    fs::write(&file, text).expect("write");
    let moved = lab.dir.path().join("moved");
    fs::rename(&main, &moved).expect("rename");
    let report = lab.plain();
    assert_eq!(worse_than_notes(&report).len(), 2, "{:#?}", report.findings);
    notes(&report, Kind::StoreLost, &main, &["mount its filesystem"]);
    notes(&report, Kind::StoreUnknown, &lab.data(), &["5 volumes were not checked"]);
    let stores = vec![("main".to_owned(), moved)];
    assert!(check(&lab.data(), &Options { stores, ..Options::default() }).expect("checked").is_clean());
}

#[test]
fn volumes_that_contradict_each_other_are_found() {
    let mut lab = Lab::new();
    let mut twin = lab.volumes[0].clone();
    twin.spec.id = VolumeId::new(&twin.spec.name, 77);
    fs::copy(lab.path("whole"), lab.volumes_dir().join(format!("{}.raw", twin.spec.id))).expect("copy");
    lab.volumes.push(twin);
    let mut lost = lab.volumes[3].clone();
    lost.spec.id = VolumeId::new("another name", 78);
    lost.spec.name = "misplaced".into();
    File::create(lab.volumes_dir().join(format!("{}.raw", lost.spec.id)))
        .and_then(|file| file.set_len(IMAGE_BYTES.next_multiple_of(4096)))
        .expect("create");
    lab.volumes.push(lost);
    let journal = lab.data().join("journal");
    fs::remove_dir_all(&journal).expect("remove");
    lab.write_journals();
    let report = lab.plain();
    let kinds: Vec<_> = worse_than_notes(&report).iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds.len(), 2, "{:#?}", report.findings);
    notes(&report, Kind::VolumeDuplicate, &journal, &["\"whole\""]);
    notes(&report, Kind::VolumeMisplaced, &journal, &["\"misplaced\""]);
}
