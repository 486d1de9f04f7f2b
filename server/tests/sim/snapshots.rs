//! The snapshots that were taken, what each must hold, and whether the object store has just that.
//!
//! Half of the seeds have them. A snapshot that was reported is read back at once and after every life, chunk by chunk
//! with digests, until somebody deletes it; one that failed may be there or not, but never wrong.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use volley_server::platform::sim::{SimObjects, SimRng};
use volley_server::snapshot::gc::ABANDONED_MS;
use volley_server::snapshot::{ChunkEntry, MANIFEST_PREFIX, Manifest, decode_chunk, manifest_key};
use volley_server::types::SnapshotRef;

use crate::model::{Image, Moment};
use crate::node::Snapshot;

/// What all of them have in front of their numbers: images of the test have not.
pub const NAMES: &str = "taken-";

/// Whether the lives of a seed have snapshots.
pub fn take_part(seed: u64) -> bool {
    seed % 8 < 4
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was asked for: it may come to exist, or have failed.
    Maybe,
    Sure,
    /// Its deletion was asked for.
    Leaving,
}

pub struct Taken {
    pub name: Arc<str>,
    pub id: u128,
    pub state: State,
    moment: Moment,
    /// What it turned out to hold.
    image: Option<Rc<Image>>,
}

/// All that the test knows of snapshots; it outlives the node.
pub struct Snapshots {
    /// Whether there are any in this run.
    pub on: Cell<bool>,
    pub taken: RefCell<Vec<Taken>>,
    /// Those that were deleted: they never come back.
    gone: RefCell<BTreeSet<Arc<str>>>,
    /// Markers that nobody will come back for.
    pub interrupted: RefCell<Vec<String>>,
    pub rng: RefCell<SimRng>,
    next: Cell<u32>,
    pub forward_ms: Cell<u64>,
}

impl Snapshots {
    pub fn new(seed: u64) -> Snapshots {
        Snapshots {
            on: Cell::new(false),
            taken: RefCell::default(),
            gone: RefCell::default(),
            interrupted: RefCell::default(),
            rng: RefCell::new(SimRng::stream(seed, "snapshots")),
            next: Cell::new(0),
            forward_ms: Cell::new(0),
        }
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().below(bound)
    }

    pub fn new_name(&self) -> String {
        format!("{NAMES}{}", self.next.replace(self.next.get() + 1))
    }

    /// Between two lives hours may pass.
    pub fn let_time_pass(&self) {
        if self.on.get() && self.below(3) == 0 {
            self.forward_ms.set(self.forward_ms.get() + ABANDONED_MS + 1);
        }
    }

    pub fn begin(&self, name: &str, id: u128, moment: Moment) {
        self.taken.borrow_mut().push(Taken { name: name.into(), id, state: State::Maybe, moment, image: None });
    }

    fn with<T>(&self, name: &str, f: impl FnOnce(&mut Taken) -> T) -> Option<T> {
        self.taken.borrow_mut().iter_mut().find(|taken| &*taken.name == name).map(f)
    }

    /// It was reported: it is there, and right.
    pub fn committed(&self, objects: &SimObjects, name: &str) {
        self.with(name, |taken| {
            taken.look(objects).unwrap_or_else(|why| panic!("snapshot {name:?}, just taken: {why}"));
            taken.state = State::Sure;
        });
    }

    pub fn set(&self, name: &str, state: State) {
        self.with(name, |taken| taken.state = state);
    }

    /// Its deletion was reported.
    pub fn deleted(&self, name: &str) {
        self.taken.borrow_mut().retain(|taken| &*taken.name != name);
        self.gone.borrow_mut().insert(name.into());
    }

    /// Those that are there for sure, oldest first.
    pub fn known(&self) -> Vec<Snapshot> {
        let taken = self.taken.borrow();
        let sure = taken.iter().filter(|taken| taken.state == State::Sure);
        sure.filter_map(|taken| {
            let reference = SnapshotRef { name: taken.name.clone(), id: taken.id };
            Some(Snapshot { reference, image: taken.image.clone()? })
        })
        .collect()
    }

    /// All packs of those that are there for sure are there.
    pub fn check_packs(&self, objects: &SimObjects) {
        for taken in self.taken.borrow().iter().filter(|taken| taken.state == State::Sure) {
            let name = &taken.name;
            let bytes = objects.peek(&manifest_key(name)).unwrap_or_else(|| panic!("snapshot {name:?} is gone"));
            let manifest = Manifest::decode(&bytes).expect("a whole manifest");
            for pack in manifest.pack_keys() {
                assert!(objects.peek(pack).is_some(), "snapshot {name:?} has lost {pack}");
            }
        }
    }

    /// A life has ended: what is there is right, what was reported is there, and what was deleted is not.
    pub fn judge(&self, objects: &SimObjects) {
        let mut taken = self.taken.borrow_mut();
        taken.retain_mut(|taken| {
            let name = taken.name.clone();
            let there = objects.peek(&manifest_key(&name)).is_some();
            if !there {
                assert_ne!(taken.state, State::Sure, "snapshot {name:?} is gone");
                match taken.state {
                    State::Leaving => drop(self.gone.borrow_mut().insert(name)),
                    _ => self.interrupted.borrow_mut().push(name.to_string()),
                }
                return false;
            }
            taken.look(objects).unwrap_or_else(|why| panic!("snapshot {name:?} ({:?}): {why}", taken.state));
            if taken.state == State::Maybe {
                taken.state = State::Sure;
            }
            true
        });
        for name in objects.keys(MANIFEST_PREFIX).iter().filter_map(|key| key.strip_prefix(MANIFEST_PREFIX)) {
            let asked_for = !name.starts_with(NAMES) || taken.iter().any(|taken| &*taken.name == name);
            let gone = self.gone.borrow().contains(name);
            assert!(asked_for, "snapshot {name:?} is there, {}", if gone { "and was deleted" } else { "unasked" });
        }
    }
}

impl Taken {
    /// Reads it back and compares.
    fn look(&mut self, objects: &SimObjects) -> Result<(), String> {
        let (id, content) = read_back(objects, &self.name)?;
        if id != self.id {
            return Err(format!("it is another one, {id:032x}"));
        }
        match &self.image {
            Some(image) if image.bytes != content => Err("it holds something else than before".to_owned()),
            Some(_) => Ok(()),
            None => {
                self.moment.check(&content)?;
                self.image = Some(Rc::new(Image { bytes: content }));
                Ok(())
            }
        }
    }
}

/// Id and content of a snapshot, every chunk verified.
fn read_back(objects: &SimObjects, name: &str) -> Result<(u128, Vec<u8>), String> {
    let bytes = objects.peek(&manifest_key(name)).ok_or("there is no manifest")?;
    let manifest = Manifest::decode(&bytes).map_err(|e| e.to_string())?;
    let packs: Vec<Option<Vec<u8>>> = manifest.pack_keys().iter().map(|key| objects.peek(key)).collect();
    let mut content = vec![0; manifest.size_bytes as usize];
    for index in 0..manifest.chunk_count() {
        let entry = manifest.chunk(index);
        let ChunkEntry::Stored { pack, offset, stored_len, .. } = entry else { continue };
        let missing = || format!("chunk {index} is not in {}", manifest.pack_key(pack));
        let stored = packs[pack as usize].as_ref().ok_or_else(missing)?;
        let stored = stored.get(offset as usize..offset as usize + stored_len as usize).ok_or_else(missing)?;
        let len = manifest.chunk_len(index);
        let raw = decode_chunk(&entry, stored, len).map_err(|e| format!("chunk {index}: {e}"))?;
        let start = (u64::from(index) * u64::from(manifest.chunk_bytes)) as usize;
        content[start..start + len as usize].copy_from_slice(&raw[..len as usize]);
    }
    Ok((manifest.id, content))
}
