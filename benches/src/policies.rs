//! Eviction policies side by side, for the trace-driven comparison. Only the chosen one, S3-FIFO, lives in the server;
//! it is used from there, so that what is measured is what runs. Every chunk costs one.

mod fifo;
mod lru;
mod s3fifo;
mod sieve;

pub use fifo::Fifo;
pub use lru::Lru;
pub use s3fifo::S3;
pub use sieve::Sieve;

/// A chunk of the comparison.
pub type Key = u32;

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub key: Key,
    /// By background hydration, not by a guest or a boot.
    pub background: bool,
}

/// A cache of a fixed number of chunks.
pub trait Policy {
    /// A request for a chunk, which is cached afterwards; whether it was there.
    fn access(&mut self, access: Access) -> bool;
    /// Chunks held, for the tests.
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names and constructors of all that are compared.
pub type New = fn(usize) -> Box<dyn Policy>;
pub const ALL: [(&str, New); 5] = [
    ("fifo", |chunks| Box::new(Fifo::new(chunks))),
    ("lru", |chunks| Box::new(Lru::new(chunks))),
    ("sieve", |chunks| Box::new(Sieve::new(chunks))),
    ("s3fifo_one_rank", |chunks| Box::new(S3::new(chunks, false))),
    ("s3fifo", |chunks| Box::new(S3::new(chunks, true))),
];

#[cfg(test)]
mod tests {
    use super::{ALL, Access};

    #[test]
    fn every_policy_holds_at_most_its_size_and_what_was_asked_last() {
        for (name, new) in ALL {
            let mut cache = new(10);
            let mut state = 7_u32;
            for _ in 0..5000 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let access = Access { key: (state >> 20) % 40, background: state & 1024 == 0 };
                cache.access(access);
                assert!(cache.len() <= 10 && cache.access(access), "{name}");
            }
            assert_eq!(cache.len(), 10, "{name}");
        }
    }

    #[test]
    fn what_fits_is_never_missed_twice() {
        for (name, new) in ALL {
            let mut cache = new(20);
            let pass = |cache: &mut Box<dyn super::Policy>| {
                (0..20).filter(|key| cache.access(Access { key: *key, background: false })).count()
            };
            assert_eq!((pass(&mut cache), pass(&mut cache)), (0, 20), "{name}");
        }
    }
}
