//! An object store in memory in which every request is one step, a clock that is set, and those who work on the store.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::executor::block_on;
use futures::task::noop_waker;

use crate::object_store::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore};
use crate::snapshot::claim::{Claim, ClaimError, StoredPacks};
use crate::snapshot::gc::{ABANDONED_MS, Clock, GcOptions, GcReport, collect};
use crate::snapshot::{
    CatalogError, ChunkEntry, EncodedChunk, Manifest, PACK_PREFIX, PackBuilder, SnapshotInfo, catalog, decode_chunk,
    deletion, encode_chunk, manifest_key, pack_key, reference_key,
};

pub(super) const CHUNK: u32 = 64 << 10;
const LABELS: std::ops::RangeInclusive<u8> = 1..=40;

/// When requests begin to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Never,
    /// From this request on nothing happens any more.
    Gone(u64),
    /// This request happens, but its answer is lost; nothing happens after it.
    AnswerLost(u64),
    /// From this request on nothing is written or deleted.
    ReadOnly(u64),
}

#[derive(Clone)]
pub(super) struct MemStore {
    objects: Rc<RefCell<BTreeMap<String, Vec<u8>>>>,
    requests: Rc<Cell<u64>>,
    fault: Fault,
    /// Every request waits to be polled once more.
    stepped: bool,
    once: bool,
}

/// Pending the first time it is polled.
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        context.waker().wake_by_ref();
        if std::mem::replace(&mut self.0, true) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl MemStore {
    pub(super) fn new() -> MemStore {
        let (objects, requests) = (Rc::default(), Rc::default());
        MemStore { objects, requests, fault: Fault::Never, stepped: false, once: true }
    }

    /// The same objects, for one that takes turns with others.
    pub(super) fn stepped(&self) -> MemStore {
        MemStore { stepped: true, ..self.clone() }
    }

    /// The same objects, for one whose requests fail.
    pub(super) fn failing(&self, fault: Fault) -> MemStore {
        MemStore { fault, requests: Rc::default(), ..self.clone() }
    }

    /// The same objects, in a store without conditional puts.
    pub(super) fn weak(&self) -> MemStore {
        MemStore { once: false, ..self.clone() }
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// A copy of all objects.
    pub(super) fn fork(&self) -> MemStore {
        let objects = Rc::new(RefCell::new(self.objects.borrow().clone()));
        MemStore { objects, requests: Rc::default(), ..self.clone() }
    }

    pub(super) fn keys(&self, prefix: &str) -> Vec<String> {
        self.objects.borrow().keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    async fn request<T>(
        &self,
        writes: bool,
        act: impl FnOnce(&mut BTreeMap<String, Vec<u8>>) -> Result<T, ObjectError>,
    ) -> Result<T, ObjectError> {
        if self.stepped {
            Turn(false).await;
        }
        let number = self.requests.get();
        self.requests.set(number + 1);
        let gone = || Err(ObjectError::Retry("the store went away".to_owned()));
        match self.fault {
            Fault::Gone(from) if number >= from => gone(),
            Fault::AnswerLost(at) if number > at => gone(),
            Fault::AnswerLost(at) if number == at => act(&mut self.objects.borrow_mut()).and_then(|_| gone()),
            Fault::ReadOnly(from) if writes && number >= from => Err(ObjectError::Fatal("read only".to_owned())),
            _ => act(&mut self.objects.borrow_mut()),
        }
    }
}

impl ObjectStore for MemStore {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.request(false, |objects| objects.get(key).cloned().ok_or_else(|| ObjectError::NotFound(key.to_owned())))
            .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        self.request(false, |objects| {
            let object = objects.get(key).ok_or_else(|| ObjectError::NotFound(key.to_owned()))?;
            let part = object.get(range.start as usize..range.end as usize);
            part.map(|part| part.to_vec().into()).ok_or_else(|| ObjectError::Corrupt(format!("{key}: too short")))
        })
        .await
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.request(true, |objects| {
            objects.insert(key.to_owned(), data.to_vec());
            Ok(())
        })
        .await
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.request(true, |objects| {
            if objects.contains_key(key) {
                return Err(ObjectError::AlreadyExists(key.to_owned()));
            }
            objects.insert(key.to_owned(), data.to_vec());
            Ok(())
        })
        .await
    }

    fn puts_once(&self) -> bool {
        self.once
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        self.request(false, |objects| {
            let found = objects.iter().filter(|(key, _)| key.starts_with(prefix));
            Ok(found.map(|(key, data)| ObjectMeta { key: key.clone(), size_bytes: data.len() as u64 }).collect())
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        self.request(true, |objects| {
            objects.remove(key);
            Ok(())
        })
        .await
    }
}

#[derive(Clone, Default)]
pub(super) struct TestClock {
    ms: Rc<Cell<u64>>,
    random: Rc<Cell<u64>>,
}

impl TestClock {
    /// From here on other numbers.
    pub(super) fn skip_random(&self, numbers: u64) {
        self.random.set(self.random.get() + numbers);
    }

    pub(super) fn advance(&self, ms: u64) {
        self.ms.set(self.ms.get() + ms);
    }
}

impl Clock for TestClock {
    fn now_ms(&self) -> u64 {
        1_700_000_000_000 + self.ms.get()
    }

    fn random_u64(&self) -> u64 {
        self.random.set(self.random.get() + 1);
        // Ids differ in the bits that timed ids keep.
        self.random.get().wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Where chunks are, by digest.
type Places = BTreeMap<[u8; 32], (String, u64, Rc<EncodedChunk>)>;

fn add_places(places: &mut Places, manifest: &Manifest, reusable: &hashbrown::HashMap<&str, u64>) {
    for index in 0..manifest.chunk_count() {
        let ChunkEntry::Stored { pack, offset, digest, .. } = manifest.chunk(index) else { continue };
        let key = manifest.pack_key(pack);
        if reusable.contains_key(key) {
            let label = LABELS.clone().find(|label| chunk(*label).digest == digest).unwrap();
            places.insert(digest, (key.to_owned(), offset, chunk(label)));
        }
    }
}

/// A store with its clock.
#[derive(Clone)]
pub(super) struct World {
    pub(super) store: MemStore,
    pub(super) clock: TestClock,
    /// Names whose deletion was reported.
    pub(super) deleted: Rc<RefCell<BTreeSet<&'static str>>>,
    /// Names that were made and that nobody deletes.
    pub(super) made: Rc<RefCell<BTreeSet<&'static str>>>,
}

impl World {
    pub(super) fn new() -> World {
        World { store: MemStore::new(), clock: TestClock::default(), deleted: Rc::default(), made: Rc::default() }
    }

    /// The same objects and clock behind a store of another kind.
    pub(super) fn with(&self, store: MemStore) -> World {
        World { store, ..self.clone() }
    }

    /// Makes a snapshot whose chunks have these contents (0: zeroes), sharing what may be shared, as an import does.
    pub(super) async fn take(&self, name: &str, labels: &[u8]) -> Result<(), ClaimError> {
        self.take_on_top(name, labels, None).await
    }

    /// The same with what a manifest in memory says in place of what all manifests say, as a snapshot of a volume does.
    pub(super) async fn take_on_top(
        &self,
        name: &str,
        labels: &[u8],
        parent: Option<&Manifest>,
    ) -> Result<(), ClaimError> {
        let store = &self.store;
        let claim = Claim::begin(store, name, self.clock.timed_id()).await?;
        let mut places = self.known(parent).await.map_err(|e| match e {
            CatalogError::Store(e) => ClaimError::Store(e),
            e => panic!("{e}"),
        })?;
        let mut next = store.list(&crate::snapshot::pack_prefix(claim.id)).await?.len();
        for label in labels.iter().filter(|label| **label != 0) {
            let chunk = chunk(*label);
            if places.contains_key(&chunk.digest) {
                continue;
            }
            // One pack for two chunks, so that packs are shared in part.
            let mate = labels.iter().find(|mate| **mate > *label && !places.contains_key(&self::chunk(**mate).digest));
            let key = pack_key(claim.id, u32::try_from(next).unwrap());
            let mut pack = PackBuilder::new(claim.id, u32::try_from(next).unwrap());
            next += 1;
            for chunk in [Some(chunk), mate.map(|mate| self::chunk(*mate))].into_iter().flatten() {
                let offset = u64::from(pack.push(&chunk));
                places.insert(chunk.digest, (key.clone(), offset, chunk));
            }
            store.put_if_absent(&key, &pack.finish()).await?;
        }
        claim.commit(store, &self.manifest(name, claim.id, labels, &places)).await
    }

    async fn known(&self, parent: Option<&Manifest>) -> Result<Places, CatalogError> {
        let stored = StoredPacks::load(&self.store).await?;
        let reusable = stored.reusable();
        let mut places = BTreeMap::new();
        if let Some(parent) = parent {
            add_places(&mut places, parent, &reusable);
            return Ok(places);
        }
        for name in catalog::names(&self.store).await? {
            let manifest = match catalog::load(&self.store, &name).await {
                Ok(manifest) => manifest,
                Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => continue,
                Err(e) => return Err(e),
            };
            add_places(&mut places, &manifest, &reusable);
        }
        Ok(places)
    }

    fn manifest(&self, name: &str, id: u128, labels: &[u8], places: &Places) -> Manifest {
        let mut keys: Vec<String> = Vec::new();
        let mut entry = |label: &u8| {
            if *label == 0 {
                return ChunkEntry::Zero;
            }
            let (key, offset, chunk) = &places[&chunk(*label).digest];
            let pack = keys.iter().position(|k| k == key).unwrap_or_else(|| {
                keys.push(key.clone());
                keys.len() - 1
            });
            ChunkEntry::Stored {
                pack: u32::try_from(pack).unwrap(),
                offset: *offset,
                stored_len: u32::try_from(chunk.stored.len()).unwrap(),
                encoding: chunk.encoding,
                digest: chunk.digest,
            }
        };
        let entries: Vec<ChunkEntry> = labels.iter().map(&mut entry).collect();
        let info = SnapshotInfo {
            id,
            name: name.to_owned(),
            size_bytes: labels.len() as u64 * u64::from(CHUNK),
            chunk_bytes: CHUNK,
            parent: None,
            created_unix_ms: self.clock.now_ms(),
        };
        Manifest::new(info, keys, &entries).unwrap()
    }

    /// Creates a volume as a node does: reference, intention, manifest. `None` when refused.
    pub(super) async fn create_volume(&self, name: &str, node: &str) -> Result<Option<Manifest>, CatalogError> {
        let store = &self.store;
        store.put(&reference_key(name, node), b"").await?;
        let intention = deletion::intention(store, name).await?;
        let manifest = match catalog::load(store, name).await {
            Ok(manifest) if intention.is_none_or(|i| !deletion::concerns(&i, manifest.id)) => Some(manifest),
            Ok(_) | Err(CatalogError::Unknown(_) | CatalogError::Incomplete(_)) => None,
            Err(e) => return Err(e),
        };
        if manifest.is_none() {
            self.let_go(name, node).await?;
        }
        Ok(manifest)
    }

    pub(super) async fn let_go(&self, name: &str, node: &str) -> Result<(), CatalogError> {
        Ok(self.store.delete(&reference_key(name, node)).await?)
    }

    /// Reads every chunk by a manifest in memory.
    pub(super) async fn read(&self, manifest: &Manifest) -> Result<(), String> {
        for index in 0..manifest.chunk_count() {
            let entry = manifest.chunk(index);
            let ChunkEntry::Stored { pack, offset, stored_len, .. } = entry else { continue };
            let range = offset..offset + u64::from(stored_len);
            let stored = self.store.get_range(manifest.pack_key(pack), range).await.map_err(|e| e.to_string())?;
            decode_chunk(&entry, &stored, CHUNK).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    pub(super) async fn gc(&self, grace_ms: u64) -> Result<GcReport, CatalogError> {
        let grace = Duration::from_millis(grace_ms);
        collect(&self.store, &self.clock, &GcOptions { grace, ..GcOptions::default() }).await
    }

    pub(super) async fn rewrite(&self, below: u8) -> Result<GcReport, CatalogError> {
        let options = GcOptions { grace: Duration::ZERO, rewrite_below_percent: Some(below), ..GcOptions::default() };
        collect(&self.store, &self.clock, &options).await
    }

    pub(super) async fn delete(&self, name: &str) -> Result<deletion::Outcome, CatalogError> {
        deletion::delete(&self.store, &self.clock, name, false).await
    }

    /// Every snapshot can be read wholly; gives their names and the labels of their chunks.
    #[track_caller]
    pub(super) fn verify(&self) -> BTreeMap<String, Vec<u8>> {
        let store = &self.store;
        let contents = |name: String| {
            let manifest = block_on(catalog::load(store, &name)).unwrap();
            if let Err(why) = block_on(self.read(&manifest)) {
                panic!("snapshot {name:?} is damaged: {why}; there are {:#?}", store.keys(""));
            }
            let label = |index| match manifest.digest(index) {
                None => 0,
                Some(digest) => LABELS.clone().find(|label| chunk(*label).digest == digest).unwrap(),
            };
            (name, (0..manifest.chunk_count()).map(label).collect())
        };
        block_on(catalog::names(store)).unwrap().into_iter().map(contents).collect()
    }

    /// After all is over and time has passed, collections leave what the manifests reference, and nothing else.
    #[track_caller]
    pub(super) fn settle(&self) {
        self.clock.advance(ABANDONED_MS);
        for _ in 0..2 {
            block_on(self.gc(0)).unwrap();
        }
        self.verify();
        let manifests = block_on(catalog::names(&self.store)).unwrap();
        let used: BTreeSet<String> = manifests
            .iter()
            .flat_map(|name| block_on(catalog::load(&self.store, name)).unwrap().pack_keys().to_vec())
            .collect();
        assert_eq!(self.store.keys(PACK_PREFIX), used.into_iter().collect::<Vec<_>>());
        let names = manifests.iter().map(|name| manifest_key(name));
        let others = self.store.keys("").into_iter().filter(|key| !key.starts_with(PACK_PREFIX));
        assert_eq!(others.collect::<Vec<_>>(), names.collect::<Vec<_>>());
    }
}

/// Noise, encoded once for all tests of a thread.
pub(super) fn chunk(label: u8) -> Rc<EncodedChunk> {
    thread_local! {
        static CHUNKS: RefCell<BTreeMap<u8, Rc<EncodedChunk>>> = const { RefCell::new(BTreeMap::new()) };
    }
    CHUNKS.with_borrow_mut(|chunks| {
        let encode = || {
            let mut raw = vec![0; CHUNK as usize];
            blake3::Hasher::new().update(&[label]).finalize_xof().fill(&mut raw);
            Rc::new(encode_chunk(&raw, 1))
        };
        chunks.entry(label).or_insert_with(encode).clone()
    })
}

/// One that works on the store.
pub(super) type Actor = Pin<Box<dyn Future<Output = ()>>>;

/// Lets the actors take turns, one request each, until all are done: `next` chooses among those that are left, by
/// number; past the end it chooses one to be killed.
pub(super) fn interleave(actors: Vec<Actor>, mut next: impl FnMut(&[usize]) -> Turns) {
    let mut actors: Vec<Option<Actor>> = actors.into_iter().map(Some).collect();
    let waker = noop_waker();
    let mut context = Context::from_waker(&waker);
    loop {
        let left: Vec<usize> = (0..actors.len()).filter(|index| actors[*index].is_some()).collect();
        if left.is_empty() {
            return;
        }
        match next(&left) {
            Turns::Step(index) => {
                let actor = actors[index].as_mut().expect("chosen among those that are left");
                if actor.as_mut().poll(&mut context).is_ready() {
                    actors[index] = None;
                }
            }
            Turns::Kill(index) => actors[index] = None,
        }
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Turns {
    Step(usize),
    Kill(usize),
}
