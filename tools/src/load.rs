//! Load on the data port of a node, for `volley-load`: loops of requests through the client or on the wire itself, and the
//! replay of a trace.
//!
//! Everything here is bounded in time and in number. Through the client, latencies are measured around its call, so they
//! include its queue: what a hypervisor's agent would see.

pub mod addresses;
pub mod cpu;
pub mod create;
pub mod curves;
pub mod histogram;
pub mod nbd;
pub mod replay;
pub mod report;
pub mod storm;
pub mod trace;
pub mod wire;
pub mod workload;

use std::sync::Barrier;
use std::time::Duration;

use volley_client::{Client, Options};

/// What servers log.
const CLIENT_NAME: &str = concat!("volley-load ", env!("CARGO_PKG_VERSION"));

/// How clients of a load are made.
#[derive(Clone, Debug)]
pub struct Target {
    /// Data port: `host:port` or `unix:PATH`.
    pub server: String,
    /// After this a request counts as failed.
    pub deadline: Duration,
    /// Requests in flight on one connection.
    pub depth: u32,
}

impl Target {
    /// A client with connections of its own.
    ///
    /// # Errors
    /// A sentence that names the server.
    pub async fn connect(&self) -> Result<Client, String> {
        let defaults = Options::default();
        let client_name = CLIENT_NAME.to_owned();
        let in_flight_max = defaults.in_flight_max.max(self.depth);
        let options = Options { client_name, deadline: self.deadline, in_flight_max, ..defaults };
        let client = Client::connect(&self.server, options).await;
        client.map_err(|error| format!("can't reach the node at {}: {error}", self.server))
    }
}

/// # Errors
/// A sentence when there are not 1 to `connections` threads: each works on connections of its own.
fn check_threads(threads: u32, connections: u32) -> Result<(), String> {
    match (1..=connections).contains(&threads) {
        true => Ok(()),
        false => Err(format!("--threads {threads} must be 1 to the number of connections, {connections}")),
    }
}

/// Runs a load on threads with a runtime each: what every one prepares, and, once all are ready, makes of it.
///
/// # Errors
/// The first thread's that could not prepare; then none runs to an end that counts.
fn on_threads<T, R: Send>(
    threads: u32,
    prepare: impl AsyncFn(u32) -> Result<T, String> + Sync,
    run: impl AsyncFn(T) -> R + Sync,
) -> Result<Vec<R>, String> {
    let ready = Barrier::new(threads as usize);
    let on_thread = |thread| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let prepared = runtime.map_err(|error| format!("can't start a runtime: {error}")).and_then(|runtime| {
            let prepared = runtime.block_on(prepare(thread))?;
            Ok((runtime, prepared))
        });
        // Also a thread that failed arrives here, or the others would wait for ever.
        ready.wait();
        let (runtime, prepared) = prepared?;
        Ok(runtime.block_on(run(prepared)))
    };
    std::thread::scope(|scope| {
        let on_thread = &on_thread;
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || on_thread(thread))).collect();
        let panicked = |_| Err("a load thread panicked".to_owned());
        running.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}

/// A block of bytes that is never all zeroes and differs by place and by `tag`, so that neither zero elision nor a
/// misplaced write goes unnoticed. `offset` is a multiple of 8, as is `len`.
#[must_use]
pub fn pattern(offset: u64, len: usize, tag: u64) -> Vec<u8> {
    let word = |place: u64| ((place / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ tag.rotate_left(17)) | 1;
    (0..len as u64 / 8).flat_map(|i| word(offset + i * 8).to_le_bytes()).collect()
}

/// xorshift: the same numbers for the same seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Random {
        // Never zero, and close seeds are far apart.
        Random(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `count`, which is not 0.
    pub fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }

    /// At least 0 and less than 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::pattern;

    #[test]
    fn patterns_depend_on_place_and_tag_and_have_no_zero_word() {
        let whole = pattern(4096, 1024, 7);
        assert_eq!(whole.len(), 1024);
        assert_eq!(whole[512..], pattern(4608, 512, 7), "any part can be made alone");
        assert_ne!(whole[..512], whole[512..]);
        assert_ne!(whole, pattern(4096, 1024, 8));
        assert!(whole.chunks(8).all(|word| word != [0; 8]));
    }
}
