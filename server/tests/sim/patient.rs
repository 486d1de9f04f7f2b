//! What the control thread and tools use: an object store that tries again, and a clock that can be put forward.

use std::ops::Range;
use std::time::Duration;

use volley_server::object_store::{ObjectBytes, ObjectError, ObjectMeta, ObjectStore};
use volley_server::platform::Platform;
use volley_server::platform::sim::{Sim, SimObjects};
use volley_server::snapshot::gc::Clock;

const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(5);

/// As the client of a real object store: what may pass is tried again, and a conditional put knows its own object.
#[derive(Clone)]
pub struct Patient {
    pub objects: SimObjects,
    pub sim: Sim,
}

impl Patient {
    async fn patiently<T>(&self, attempt: impl AsyncFn() -> Result<T, ObjectError>) -> Result<T, ObjectError> {
        for _ in 1..ATTEMPTS {
            match attempt().await {
                Err(error) if error.may_pass() => self.sim.sleep(PAUSE).await,
                result => return result,
            }
        }
        attempt().await
    }
}

impl ObjectStore for Patient {
    async fn get(&self, key: &str) -> Result<Vec<u8>, ObjectError> {
        self.patiently(async || self.objects.get(key).await).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<ObjectBytes, ObjectError> {
        self.patiently(async || self.objects.get_range(key, range.clone()).await).await
    }

    async fn put(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        self.patiently(async || self.objects.put(key, data).await).await
    }

    async fn put_if_absent(&self, key: &str, data: &[u8]) -> Result<(), ObjectError> {
        // No two of these tests put the same bytes: they name their owner.
        let ours = || self.objects.peek(key).is_some_and(|found| found == data);
        self.patiently(async || match self.objects.put_if_absent(key, data).await {
            Err(ObjectError::AlreadyExists(_)) if ours() => Ok(()),
            result => result,
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, ObjectError> {
        self.patiently(async || self.objects.list(prefix).await).await
    }

    async fn delete(&self, key: &str) -> Result<(), ObjectError> {
        self.patiently(async || self.objects.delete(key).await).await
    }
}

/// The machine's clock, and how far it was put forward.
pub struct SimClock {
    pub sim: Sim,
    pub forward_ms: u64,
}

impl Clock for SimClock {
    fn now_ms(&self) -> u64 {
        self.sim.wall_clock_ms() + self.forward_ms
    }

    fn random_u64(&self) -> u64 {
        self.sim.random_u64()
    }
}
