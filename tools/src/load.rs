//! Load on the data port of a node, for `volley-load`: closed loops of one kind of request, and the replay of a trace.
//!
//! Everything here is bounded in time and in number. Latencies are measured around the client's call, so they include
//! its queue: what a hypervisor's agent would see.

pub mod histogram;
pub mod replay;
pub mod report;
pub mod trace;
pub mod workload;

use std::time::Duration;

use volley_client::{Client, Options};

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
        let client_name = format!("volley-load {}", env!("CARGO_PKG_VERSION"));
        let in_flight_max = defaults.in_flight_max.max(self.depth);
        let options = Options { client_name, deadline: self.deadline, in_flight_max, ..defaults };
        let client = Client::connect(&self.server, options).await;
        client.map_err(|error| format!("can't reach the node at {}: {error}", self.server))
    }
}

/// A block of bytes that is never all zeroes and differs by place and by `tag`, so that neither zero elision nor a
/// misplaced write goes unnoticed. `offset` is a multiple of 8, as is `len`.
#[must_use]
pub fn pattern(offset: u64, len: usize, tag: u64) -> Vec<u8> {
    let word = |place: u64| ((place / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ tag.rotate_left(17)) | 1;
    (0..len as u64 / 8).flat_map(|i| word(offset + i * 8).to_le_bytes()).collect()
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
