//! A simulated object store: it outlives crashes of the node, and it is slow, flaky, down or lying as a test asks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use super::executor::Executor;
use super::faults::nanos;
use super::random::SimRng;
use super::{Core, SimWorld};
use crate::object_store::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore};
use crate::platform::Time;

/// How the store behaves from now on. Probabilities are per request, in a million.
#[derive(Clone, Debug)]
pub struct ObjectFaults {
    pub latency: Range<Duration>,
    /// The request fails with `Retry`; a put may have taken effect all the same.
    pub retry_ppm: u32,
    /// The answer of a GET has one byte flipped.
    pub corrupt_ppm: u32,
    /// The request is answered only after `hang`.
    pub hang_ppm: u32,
    pub hang: Duration,
    /// Times at which nobody reaches the store.
    pub outages: Vec<Range<Time>>,
}

impl Default for ObjectFaults {
    fn default() -> ObjectFaults {
        ObjectFaults {
            latency: Duration::from_micros(500)..Duration::from_millis(20),
            retry_ppm: 0,
            corrupt_ppm: 0,
            hang_ppm: 0,
            hang: Duration::from_secs(120),
            outages: Vec::new(),
        }
    }
}

/// What the store was asked since the world began.
#[derive(Clone, Debug, Default)]
pub struct ObjectStats {
    pub gets: u64,
    pub get_bytes: u64,
    pub puts: u64,
    /// Answers given with a flipped byte.
    pub corrupted: u64,
    /// Requests that failed with `Retry`.
    pub failed: u64,
    /// Number of GETs of each key and byte range that were answered.
    pub ranges: BTreeMap<(String, u64, u64), u64>,
    /// Ranged GETs begun while another one for some of the same bytes was under way.
    pub overlapping: u64,
}

struct State {
    objects: BTreeMap<String, Rc<[u8]>>,
    faults: ObjectFaults,
    stats: ObjectStats,
    /// Ranged GETs under way.
    running: Vec<(String, Range<u64>)>,
    rng: SimRng,
}

/// A ranged GET under way, until it is answered or its caller is gone.
struct RunningGet<'a>(&'a SimObjects, (String, Range<u64>));

impl<'a> RunningGet<'a> {
    fn begin(objects: &'a SimObjects, key: &str, range: Range<u64>) -> RunningGet<'a> {
        let state = &mut *objects.state.borrow_mut();
        let overlaps = |(k, r): &(String, Range<u64>)| k == key && r.start < range.end && range.start < r.end;
        state.stats.overlapping += u64::from(state.running.iter().any(overlaps));
        state.running.push((key.to_owned(), range.clone()));
        RunningGet(objects, (key.to_owned(), range))
    }
}

impl Drop for RunningGet<'_> {
    fn drop(&mut self) {
        let running = &mut self.0.state.borrow_mut().running;
        let at = running.iter().position(|get| *get == self.1).expect("noted at the beginning");
        running.swap_remove(at);
    }
}

/// Clones are the same store.
#[derive(Clone)]
pub struct SimObjects {
    executor: Rc<Executor>,
    state: Rc<RefCell<State>>,
}

impl SimObjects {
    #[must_use]
    pub fn new(world: &SimWorld) -> SimObjects {
        let core: &Core = &world.core;
        let state = State {
            objects: BTreeMap::new(),
            faults: ObjectFaults::default(),
            stats: ObjectStats::default(),
            running: Vec::new(),
            rng: SimRng::stream(world.seed, "objects"),
        };
        SimObjects { executor: core.executor.clone(), state: Rc::new(RefCell::new(state)) }
    }

    /// A copy of the objects as they are now in another world, without faults.
    #[must_use]
    pub fn fork(&self, world: &SimWorld) -> SimObjects {
        let fork = SimObjects::new(world);
        fork.state.borrow_mut().objects = self.state.borrow().objects.clone();
        fork
    }

    /// Replaces the behaviour from now on.
    pub fn set_faults(&self, faults: ObjectFaults) {
        self.state.borrow_mut().faults = faults;
    }

    /// Nobody reaches the store for `duration` from now.
    pub fn outage(&self, duration: Duration) {
        let now = self.executor.now();
        self.state.borrow_mut().faults.outages.push(now..now.after(duration));
    }

    #[must_use]
    pub fn stats(&self) -> ObjectStats {
        self.state.borrow().stats.clone()
    }

    /// Puts an object at once, without time or faults.
    pub fn insert(&self, key: &str, data: Vec<u8>) {
        self.state.borrow_mut().objects.insert(key.to_owned(), data.into());
    }

    /// The object as it is now, without time or faults.
    #[must_use]
    pub fn peek(&self, key: &str) -> Option<Vec<u8>> {
        self.state.borrow().objects.get(key).map(|data| data.to_vec())
    }

    /// Keys that begin like this, sorted, without time or faults.
    #[must_use]
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        self.state.borrow().objects.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }

    /// The way to the store and its verdict on the request.
    async fn request(&self, op: &str, key: &str) -> Result<(), ObjectError> {
        let (latency, fails) = {
            let state = &mut *self.state.borrow_mut();
            let usual = nanos(state.faults.latency.start)..nanos(state.faults.latency.end);
            let hangs = state.rng.chance(state.faults.hang_ppm);
            let latency = if hangs { state.faults.hang } else { Duration::from_nanos(state.rng.within(usual)) };
            (latency, state.rng.chance(state.faults.retry_ppm))
        };
        self.executor.sleep_until(self.executor.now().after(latency)).await;
        let now = self.executor.now();
        let state = &mut *self.state.borrow_mut();
        let down = state.faults.outages.iter().any(|outage| outage.contains(&now));
        self.executor.note(op, &[u64::from(crc32fast::hash(key.as_bytes())), u64::from(fails), u64::from(down)]);
        if down || fails {
            state.stats.failed += 1;
            let text = format!("{key}: simulated {}", if down { "outage" } else { "failure" });
            return Err(if state.rng.coin() { ObjectError::SlowDown(text) } else { ObjectError::Retry(text) });
        }
        Ok(())
    }

    /// A put happens whole at one moment: on its way there or, if not yet, on its way back.
    async fn put_once(&self, key: &str, data: &[u8], must_be_new: bool) -> Result<(), ObjectError> {
        let early = self.state.borrow_mut().rng.coin();
        let early_result = if early { Some(self.store(key, data, must_be_new)) } else { None };
        self.request("put", key).await?;
        early_result.unwrap_or_else(|| self.store(key, data, must_be_new))
    }

    fn store(&self, key: &str, data: &[u8], must_be_new: bool) -> Result<(), ObjectError> {
        let state = &mut *self.state.borrow_mut();
        if must_be_new && state.objects.contains_key(key) {
            return Err(ObjectError::AlreadyExists(key.to_owned()));
        }
        state.stats.puts += 1;
        state.objects.insert(key.to_owned(), data.into());
        Ok(())
    }

    fn answer(&self, key: &str, range: Option<Range<u64>>) -> Result<Vec<u8>, ObjectError> {
        let state = &mut *self.state.borrow_mut();
        let Some(object) = state.objects.get(key) else { return Err(ObjectError::NotFound(key.to_owned())) };
        let range = range.unwrap_or(0..object.len() as u64);
        let bounds = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let Some(part) = bounds.and_then(|(start, end)| object.get(start..end)) else {
            return Err(ObjectError::Corrupt(format!("{key}: shorter than {range:?}")));
        };
        let mut data = part.to_vec();
        state.stats.gets += 1;
        state.stats.get_bytes += data.len() as u64;
        *state.stats.ranges.entry((key.to_owned(), range.start, range.end)).or_default() += 1;
        if !data.is_empty() && state.rng.chance(state.faults.corrupt_ppm) {
            state.stats.corrupted += 1;
            let at = state.rng.index(data.len());
            data[at] ^= 1 << state.rng.below(8);
        }
        Ok(data)
    }
}

impl ObjectStore for SimObjects {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.request("get", key).await?;
        self.answer(key, None)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        let _running = RunningGet::begin(self, key, range.clone());
        self.request("get_range", key).await?;
        self.answer(key, Some(range)).map(ObjectBytes::from)
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.put_once(key, data, false).await
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.put_once(key, data, true).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        self.request("list", prefix).await?;
        let state = self.state.borrow();
        let matching = state.objects.iter().filter(|(key, _)| key.starts_with(prefix));
        Ok(matching.map(|(key, data)| ObjectMeta { key: key.clone(), size_bytes: data.len() as u64 }).collect())
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        self.request("delete", key).await?;
        self.state.borrow_mut().objects.remove(key);
        Ok(())
    }
}
