//! Reads from the cache's disk: who joins one lends it urgency, and a large chunk lets others in between.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{Fetched, Tier, Transfer};
use crate::cache::disk::{DiskCacheConfig, DiskTier, Owner};
use crate::cache::{RamLimits, Rank};
use crate::error::Result;
use crate::platform::sim::{DiskOp, Sim, SimObjects, SimWorld};
use crate::platform::{Platform, Queue};
use crate::snapshot::{ChunkEntry, EncodedChunk, encode_chunk};
use crate::transfer::ledger::Origin;
use crate::transfer::{ChunkSource, FetchClass, QueueLimits, RetryPolicy};

/// Content of which half compresses.
fn chunk(len: usize) -> (Vec<u8>, EncodedChunk) {
    let mut raw = vec![0; len];
    blake3::Hasher::new().update(b"chunk").finalize_xof().fill(&mut raw);
    raw.chunks_mut(64).for_each(|line| line[32..].fill(b' '));
    let encoded = encode_chunk(&raw, 1);
    (raw, encoded)
}

fn source(encoded: &EncodedChunk, len: usize) -> ChunkSource {
    let stored_len = encoded.stored.len() as u32;
    let (encoding, digest) = (encoded.encoding, encoded.digest);
    ChunkSource {
        pack_key: "packs/1".into(),
        entry: ChunkEntry::Stored { pack: 0, offset: 32, stored_len, encoding, digest },
        digest,
        offset: 32,
        stored_len,
        chunk_len: len as u32,
        origin: Arc::new(Origin::image("img")),
    }
}

/// A disk tier that holds the chunk.
async fn disk_with(platform: Sim, source: &ChunkSource, encoded: &EncodedChunk) -> DiskTier<Sim> {
    let config = DiskCacheConfig { dir: "/cache".into(), bytes: 64 << 20 };
    let owner = Owner { node_id: 1, shard: 0, shards: 1 };
    let disk = DiskTier::open(platform, &config, owner, Rc::default()).await.expect("opened");
    disk.offer(source, encoded.encoding, &encoded.stored);
    disk.settled().await;
    assert!(disk.holds(&source.digest));
    disk
}

#[test]
fn a_read_that_somebody_urgent_joins_goes_on_among_what_is_urgent() {
    for joined in [FetchClass::Background, FetchClass::BootSet, FetchClass::Priority] {
        let world = SimWorld::new(1);
        let objects = SimObjects::new(&world);
        world.block_on(async {
            let platform = world.platform();
            let (raw, encoded) = chunk(256 << 10);
            let source = source(&encoded, raw.len());
            let transfer = Transfer::new(
                platform.clone(),
                objects.clone(),
                RamLimits { bytes: 1 << 20, pin_waves: Duration::ZERO },
                QueueLimits::default(),
                RetryPolicy::default(),
                Rc::default(),
                Rc::default(),
            );
            transfer.use_disk(disk_with(platform.clone(), &source, &encoded).await);
            world.slow_disk("/cache", DiskOp::Read, Duration::from_millis(100)..Duration::from_millis(101));
            let (reply, answers) = flume::bounded::<Result<Fetched>>(2);
            transfer.fetch(vec![(source.clone(), reply.clone())], FetchClass::Background, false);
            platform.sleep(Duration::from_millis(50)).await;
            let before = world.served();
            transfer.fetch(vec![(source.clone(), reply)], joined, false);
            for _ in 0..2 {
                let fetched = answers.recv_async().await.expect("answered").expect("there");
                assert_eq!((&fetched.data[..], fetched.story.tier), (&raw[..], Tier::Disk));
            }
            assert_eq!(world.served() - before, u64::from(joined != FetchClass::Background), "{joined:?}");
            assert_eq!(objects.stats().gets, 0);
            assert_eq!(transfer.check_invariants(), Ok(()));
        });
    }
}

#[test]
fn a_large_chunk_from_the_disk_lets_others_in_between() {
    for (len, lets_in) in [(512 << 10, false), (4 << 20, true)] {
        let world = SimWorld::new(2);
        world.block_on(async {
            let platform = world.platform();
            let (raw, encoded) = chunk(len);
            let source = source(&encoded, len);
            let disk = disk_with(platform.clone(), &source, &encoded).await;
            let loaded = disk.load(&source, Rank::Normal).await.expect("there");
            let (turns, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
            let (counted, until, other) = (turns.clone(), ended.clone(), platform.clone());
            platform.spawn(Queue::Serve, async move {
                while !until.get() {
                    counted.set(counted.get() + 1);
                    other.yield_now().await;
                }
            });
            let data = disk.verify(&source, loaded, true).await.expect("sound");
            ended.set(true);
            assert_eq!(data[..], raw);
            assert_eq!(turns.get() > 4, lets_in, "{} turns of another task in {len} bytes", turns.get());
            assert!(lets_in || turns.get() == 0);
        });
    }
}
