//! S3-FIFO as the server has it, with or without the low rank of background fills.

use volley_server::cache::s3fifo::{Rank, S3Fifo};

use super::{Access, Key, Policy};

pub struct S3 {
    cache: S3Fifo<()>,
    ranks: bool,
}

impl S3 {
    #[must_use]
    pub fn new(size: usize, ranks: bool) -> S3 {
        S3 { cache: S3Fifo::new(size), ranks }
    }
}

impl Policy for S3 {
    fn access(&mut self, access: Access) -> bool {
        let digest = digest(access.key);
        let rank = if access.background && self.ranks { Rank::Low } else { Rank::Normal };
        if self.cache.get(&digest, rank).is_some() {
            return true;
        }
        drop(self.cache.make_room(1));
        self.cache.insert(digest, (), 1, rank);
        false
    }

    fn len(&self) -> usize {
        self.cache.len()
    }
}

fn digest(key: Key) -> [u8; 32] {
    let mut digest = [0; 32];
    digest[..4].copy_from_slice(&key.to_le_bytes());
    digest
}
