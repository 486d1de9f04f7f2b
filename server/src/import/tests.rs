//! Tests of import on real images made by qemu-img, real directories, and a store that fails on command.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::object_store::dir::DirStore;
use crate::object_store::{ObjectBytes, ObjectMeta};
use crate::snapshot::{ChunkEntry, IMPORT_PREFIX, PACK_PREFIX, catalog, deletion, gc, read};

pub(super) const CHUNK: usize = 64 << 10;
/// Noise of this length fills one pack and begins a second.
pub(super) const OVER_ONE_PACK: usize = crate::snapshot::PACK_BYTES_MAX as usize + CHUNK;

/// A scratch directory with an object store in it.
pub(super) struct Lab {
    dir: tempfile::TempDir,
    pub(super) store: Failing,
}

/// The directory store, failing every put after the first `puts_left`, like a process that was killed there.
#[derive(Clone)]
pub(super) struct Failing {
    inner: DirStore<Blocking>,
    puts_left: Arc<AtomicUsize>,
}

impl Failing {
    fn spend(&self) -> Result<(), ObjectError> {
        let spent = self.puts_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        spent.map(|_| ()).map_err(|_| ObjectError::Retry("the store went away".to_owned()))
    }
}

impl ObjectStore for Failing {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.inner.get(key).await
    }
    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<ObjectBytes, ObjectError> {
        self.inner.get_range(key, range).await
    }
    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.spend()?;
        self.inner.put(key, data).await
    }
    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.spend()?;
        self.inner.put_if_absent(key, data).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        self.inner.list(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        self.spend()?;
        self.inner.delete(key).await
    }
}

impl Lab {
    pub(super) fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let inner = block_on(DirStore::create(Blocking, dir.path().join("objects"))).unwrap();
        Lab { dir, store: Failing { inner, puts_left: Arc::new(AtomicUsize::new(usize::MAX)) } }
    }

    pub(super) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The store fails every put after so many.
    pub(super) fn allow_puts(&self, puts: usize) {
        self.store.puts_left.store(puts, Ordering::SeqCst);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn import(&self, image: &Path, name: &str) -> Result<ImportReport, ImportError> {
        self.import_as(image, name, None)
    }

    fn import_as(&self, image: &Path, name: &str, format: Option<ImageFormat>) -> Result<ImportReport, ImportError> {
        let options = ImportOptions {
            image: image.to_path_buf(),
            name: name.to_owned(),
            chunk_bytes: CHUNK as u32,
            format,
            threads: Some(3),
        };
        import(&self.store, &options, |done, total| assert!(done <= total))
    }

    pub(super) fn manifest(&self, name: &str) -> Manifest {
        block_on(catalog::load(&self.store, name)).unwrap()
    }

    pub(super) fn export(&self, name: &str) -> Vec<u8> {
        let mut out = Vec::new();
        read::export(&self.store, &self.manifest(name), Some(2), &mut out, |_, _| {}).unwrap();
        out
    }

    pub(super) fn keys(&self, prefix: &str) -> Vec<String> {
        block_on(self.store.list(prefix)).unwrap().into_iter().map(|o| o.key).collect()
    }

    fn qemu_img(&self, args: &[&str]) {
        let out =
            Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().expect("install qemu-utils");
        assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

/// Incompressible bytes, different for each seed.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// Noise, zeroes, text and a repetition: each kind of chunk.
pub(super) fn mixed() -> Vec<u8> {
    let text: Vec<u8> = b"all work and no play ".iter().copied().cycle().take(3 * CHUNK).collect();
    [noise(1, 5 * CHUNK), vec![0; 4 * CHUNK], text, noise(1, 2 * CHUNK), vec![0; 3 * CHUNK], noise(2, CHUNK / 2)]
        .concat()
}

fn padded(mut content: Vec<u8>) -> Vec<u8> {
    content.resize(content.len().next_multiple_of(512), 0);
    content
}

#[test]
fn every_size_comes_back_padded_to_512_and_says_so() {
    let lab = Lab::new();
    for (n, len) in [1, 511, 512, 4097, CHUNK, CHUNK + 512, 3 * CHUNK + 1].into_iter().enumerate() {
        let content = noise(7, len);
        let name = format!("s{n}");
        let report = lab.import(&lab.file("image", &content), &name).unwrap();
        assert_eq!(lab.export(&name), padded(content), "{len}");
        assert_eq!(report.image_bytes, len as u64);
        assert_eq!(report.notes.iter().any(|n| n.contains("padded")), len % 512 != 0, "{:?}", report.notes);
    }
}

#[test]
fn chunks_are_counted_by_where_they_came_from() {
    let lab = Lab::new();
    let content = mixed();
    let report = lab.import(&lab.file("image", &content), "a").unwrap();
    let counts = report.chunks;
    assert_eq!((counts.zero_chunks, counts.shared_chunks, counts.resumed_chunks), (7, 0, 0));
    assert_eq!(counts.chunks, counts.zero_chunks + counts.duplicate_chunks + counts.stored_chunks);
    assert_eq!(lab.export("a"), content);
    assert!(lab.keys(IMPORT_PREFIX).is_empty());

    // The same content again shares everything and stores nothing; other chunk sizes and names are no obstacle.
    let again = lab.import(&lab.file("image", &content), "b").unwrap();
    assert_eq!((again.chunks.stored_chunks, again.packs, again.stored_bytes), (0, 0, 0));
    assert_eq!(again.chunks.shared_chunks, counts.stored_chunks);
    assert_eq!(lab.export("b"), content);
    assert_eq!(lab.keys(PACK_PREFIX).len(), 1);
}

#[test]
fn an_image_of_zeroes_and_a_hole_store_nothing() {
    let lab = Lab::new();
    let sparse = lab.path("sparse");
    let file = fs::File::create(&sparse).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(b"x", (1 << 30) - 1).unwrap();
    let report = lab.import(&sparse, "sparse").unwrap();
    assert_eq!(report.chunks.zero_chunks, (1 << 30) / CHUNK as u32 - 1);
    let zero = lab.import(&lab.file("zero", &vec![0; 3 * CHUNK]), "zero").unwrap();
    assert_eq!((zero.packs, zero.chunks.zero_chunks), (0, 3));
    assert_eq!(lab.export("zero"), vec![0; 3 * CHUNK]);
}

#[test]
fn qcow2_in_its_kinds_equals_its_raw_image() {
    let lab = Lab::new();
    let content = mixed();
    lab.file("raw", &content);
    let kinds: [(&str, &[&str]); 5] = [
        ("plain", &[]),
        ("packed", &["-c"]),
        ("v2", &["-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=4k"]),
        ("big-packed", &["-c", "-o", "cluster_size=2M"]),
    ];
    for (name, options) in kinds {
        let args = [&["convert", "-f", "raw", "-O", "qcow2"], options, &["raw", name]].concat();
        lab.qemu_img(&args);
        let report = lab.import(&lab.path(name), name).unwrap();
        assert_eq!(report.format, ImageFormat::Qcow2);
        assert_eq!(lab.export(name), content, "{name}");
    }
}

#[test]
fn backing_files_are_included_and_named() {
    let lab = Lab::new();
    let mut content = mixed();
    lab.file("base.raw", &content);
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "mid.qcow2"]);
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "mid.qcow2", "top.qcow2"]);
    let write = Command::new("qemu-io").args(["-c", "write -P 0x5a 70000 3000"]).arg(lab.path("mid.qcow2")).output();
    assert!(write.unwrap().status.success());
    content[70_000..73_000].fill(0x5a);
    let report = lab.import(&lab.path("top.qcow2"), "top").unwrap();
    assert_eq!(lab.export("top"), content);
    let named = |file: &str| report.notes.iter().any(|note| note.contains(file));
    assert!(named("base.raw") && named("mid.qcow2"), "{:?}", report.notes);

    fs::remove_file(lab.path("base.raw")).unwrap();
    let error = lab.import(&lab.path("top.qcow2"), "again").unwrap_err().to_string();
    assert!(error.contains("base.raw"), "{error}");
}

#[test]
fn images_that_cannot_be_honoured_are_refused() {
    let lab = Lab::new();
    lab.file("raw", &mixed());
    lab.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "raw", "good.qcow2"]);
    let good = fs::read(lab.path("good.qcow2")).unwrap();
    let patched = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "zstd.qcow2", "1M"]);
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "external.qcow2", "1M"]);
    lab.qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "raw", "disk.vmdk"]);
    let loop_file = lab.path("loop.qcow2");
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "pool.qcow2", "loop.qcow2", "1M"]);
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", "loop.qcow2", "pool.qcow2", "1M"]);
    let cases = [
        (lab.file("empty", b""), "empty"),
        (lab.path("missing"), "No such file"),
        (lab.dir.path().to_path_buf(), "neither a file"),
        (lab.file("encrypted", &patched(35, 2)), "encrypted"),
        (lab.file("version", &patched(7, 9)), "version 9"),
        (lab.file("dirty", &patched(79, 1)), "qemu-img check"),
        (lab.file("clusters", &patched(23, 60)), "corrupt"),
        (lab.file("head", &good[..50]), "truncated"),
        (lab.file("half", &good[..good.len() / 2]), "truncated"),
        (lab.file("short", &good[..good.len() - 70_000]), "truncated"),
        (lab.path("zstd.qcow2"), "zstd"),
        (lab.path("external.qcow2"), "external"),
        (lab.path("disk.vmdk"), "VMDK"),
        (loop_file, "backing files"),
    ];
    for (image, why) in cases {
        let error = lab.import(&image, "x").unwrap_err().to_string();
        assert!(error.contains(why) && error.contains(image.to_str().unwrap()), "{why}: {error}");
        assert!(lab.keys("snapshots/").is_empty());
    }
    assert!(lab.import_as(&lab.path("raw"), "x", Some(ImageFormat::Qcow2)).is_err());
    lab.import_as(&lab.path("disk.vmdk"), "as-it-is", Some(ImageFormat::Raw)).unwrap();
}

#[test]
fn a_taken_name_is_refused_before_the_image_is_looked_at() {
    let lab = Lab::new();
    lab.import(&lab.file("image", b"x"), "a").unwrap();
    let error = lab.import(&lab.path("missing"), "a").unwrap_err();
    assert!(matches!(error, ImportError::NameTaken(_)), "{error}");
    assert!(matches!(lab.import(&lab.path("image"), "../a"), Err(ImportError::Invalid(_))));
}

/// P4: whichever object-store step is the last, there is no snapshot or a whole one, and the next run completes it.
#[test]
fn an_import_stopped_at_any_step_leaves_no_snapshot_and_can_be_resumed() {
    let content = noise(3, OVER_ONE_PACK);
    for puts in 0.. {
        let lab = Lab::new();
        let image = lab.file("image", &content);
        lab.store.puts_left.store(puts, Ordering::SeqCst);
        let first = lab.import(&image, "a");
        lab.store.puts_left.store(usize::MAX, Ordering::SeqCst);
        let committed = block_on(catalog::names(&lab.store)).unwrap() == ["a"];
        assert_eq!(first.is_ok(), committed, "{puts}");
        if committed {
            assert_eq!(lab.export("a"), content);
            assert!(
                block_on(gc::open_imports(&lab.store)).unwrap().is_empty(),
                "a marker that was left blocks nothing"
            );
            // Marker, two packs, manifest; then only the removal of the marker is left to fail.
            assert!(puts >= 4, "{puts}");
            if puts > 4 {
                break;
            }
            continue;
        }
        let report = lab.import(&image, "a").unwrap();
        assert_eq!(report.chunks.resumed_chunks > 0, puts >= 2, "{puts}: {:?}", report.chunks);
        assert_eq!(lab.export("a"), content);
        assert!(lab.keys(IMPORT_PREFIX).is_empty());
        let used: Vec<String> = lab.manifest("a").pack_keys().to_vec();
        assert_eq!(lab.keys(PACK_PREFIX).len(), used.len(), "no chunk is stored twice");
    }
}

#[test]
fn chunks_of_condemned_packs_are_stored_again() {
    let lab = Lab::new();
    let image = lab.file("image", &mixed());
    lab.import(&image, "a").unwrap();
    let manifest = block_on(lab.store.get("snapshots/a")).unwrap();
    block_on(deletion::delete(&lab.store, &Blocking, "a", false)).unwrap();
    // As it is for an import that lists manifests in the middle of a deletion.
    block_on(lab.store.put("snapshots/a", &manifest)).unwrap();
    lab.import(&image, "b").unwrap();
    assert_eq!(lab.keys(PACK_PREFIX).len(), 2, "nothing is shared");
    block_on(lab.store.delete("snapshots/a")).unwrap();
    let options = gc::GcOptions { grace: std::time::Duration::ZERO, ..Default::default() };
    assert_eq!(block_on(gc::collect(&lab.store, &Blocking, &options)).unwrap().packs_removed, 1);
    assert_eq!(lab.keys(PACK_PREFIX), lab.manifest("b").pack_keys());
    assert_eq!(lab.export("b"), padded(mixed()));
}

#[test]
fn a_damaged_pack_of_an_interrupted_import_is_not_reused() {
    let lab = Lab::new();
    let content = noise(3, OVER_ONE_PACK);
    let image = lab.file("image", &content);
    lab.store.puts_left.store(2, Ordering::SeqCst);
    lab.import(&image, "a").unwrap_err();
    lab.store.puts_left.store(usize::MAX, Ordering::SeqCst);
    let pack = lab.path("objects").join(&lab.keys(PACK_PREFIX)[0]);
    let whole = fs::read(&pack).unwrap();
    fs::write(&pack, &whole[..whole.len() - 1]).unwrap();
    let report = lab.import(&image, "a").unwrap();
    assert_eq!(report.chunks.resumed_chunks, 0);
    assert!(report.notes.iter().any(|n| n.contains("does not reuse packs/")), "{:?}", report.notes);
    assert_eq!(lab.export("a"), content);
}

#[test]
fn verify_names_every_damaged_chunk() {
    let lab = Lab::new();
    let content = noise(3, 6 * CHUNK);
    lab.import(&lab.file("image", &content), "a").unwrap();
    let manifest = lab.manifest("a");
    let pack = lab.path("objects").join(manifest.pack_key(0));
    let whole = fs::read(&pack).unwrap();
    let ChunkEntry::Stored { offset, .. } = manifest.chunk(2) else { panic!("noise is stored") };
    let verify = || read::verify(&lab.store, &manifest, None, |_, _| {}).unwrap().bad;
    assert!(verify().is_empty());

    let mut flipped = whole.clone();
    flipped[offset as usize + 100] ^= 1;
    fs::write(&pack, flipped).unwrap();
    let bad = verify();
    assert_eq!(bad.iter().map(|b| (b.chunk, b.offset)).collect::<Vec<_>>(), [(2, offset)]);
    assert_eq!(bad[0].pack, manifest.pack_key(0));
    let mut out = Vec::new();
    assert!(read::export(&lab.store, &manifest, None, &mut out, |_, _| {}).is_err());
    assert_eq!(out, content[..2 * CHUNK], "nothing unverified gets out");

    fs::write(&pack, &whole[..offset as usize + 5]).unwrap();
    assert_eq!(verify().iter().map(|b| b.chunk).collect::<Vec<_>>(), [2, 3, 4, 5]);
    // Neither a new import nor a dedup may build on what is truncated.
    lab.import(&lab.file("image", &content), "b").unwrap();
    assert_eq!(lab.export("b"), content);

    fs::remove_file(&pack).unwrap();
    assert!(verify().iter().all(|b| b.why.contains("missing")));
}

#[test]
fn an_image_that_changes_meanwhile_is_refused() {
    let lab = Lab::new();
    let image = lab.file("image", &mixed());
    let options = ImportOptions {
        image: image.clone(),
        name: "a".to_owned(),
        chunk_bytes: CHUNK as u32,
        format: None,
        threads: Some(1),
    };
    let touch = |_, _| fs::OpenOptions::new().append(true).open(&image).unwrap().set_len(1 << 21).unwrap();
    let error = import(&lab.store, &options, touch).unwrap_err();
    assert!(error.to_string().contains("changed while it was read"), "{error}");
    assert!(lab.keys("snapshots/").is_empty());
}
