//! The real shard on the simulated platform, one scenario per promise: exact counts, no timing.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use futures::future::join_all;
use volley_server::cache::disk::DiskCacheConfig;
use volley_server::error::Status;
use volley_server::platform::sim::{DiskOp, ObjectFaults, SimObjects, SimWorld};
use volley_server::platform::{File, OpenMode, Platform};
use volley_server::shard::api::{Command, ConnectionId, FetchUntil, Handler, Reply, Request};
use volley_server::types::{HydrationRate, VolumeSpec};

use crate::support::{self, CHUNK, Image, Node, Options, STORE, pack_gets, prefetch, status_of};

fn world(seed: u64, chunks: u32) -> (SimWorld, SimObjects, Image) {
    support::world("img", chunks, 512 * 3, 5, seed)
}

#[test]
fn twenty_volumes_on_three_shards_fetch_each_chunk_once_and_become_the_image() {
    let (world, objects, img) = world(1, 23);
    let options = Options { shards: 3, ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        let names: Vec<String> = (0..20).map(|i| format!("web-{i}")).collect();
        for name in &names {
            node.create(node.spec(name, &img, HydrationRate::Unlimited)).await.unwrap();
        }
        for name in &names {
            let status = node.wait_hydrated(name).await.unwrap();
            assert_eq!((status.remaining_bytes, status.eta_seconds), (0, Some(0.0)));
            let file = PathBuf::from(STORE).join("volumes").join(format!("{}.raw", status.id));
            let bytes = world.file_bytes(&file).unwrap();
            assert!(bytes.starts_with(&img.content), "{name} is a plain raw image");
            assert!(bytes[img.content.len()..].iter().all(|b| *b == 0) && bytes.len() % 4096 == 0);
        }
        let stored = img.content.chunks(CHUNK as usize).enumerate().filter(|(i, _)| i % 5 != 0).count() as u64;
        let mut fetched = BTreeSet::new();
        for ((key, start, end), times) in &objects.stats().ranges {
            assert!(!key.starts_with("packs/") || *times == 1, "{key} {start}..{end} fetched {times} times");
            if key.starts_with("packs/") {
                assert!((*start..*end).all(|byte| fetched.insert(byte)), "ranges overlap at {start}..{end}");
            }
        }
        assert!(pack_gets(&objects) < stored, "neighbours share GETs: {} for {stored}", pack_gets(&objects));
    });
}

#[test]
fn a_read_miss_is_answered_from_memory_and_fills_the_volume_behind() {
    let (world, objects, img) = world(2, 4);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        // No write to the volume can succeed: the answer does not depend on the fill.
        world.fail_disk(STORE, DiskOp::Write, 1_000_000);
        let at = u64::from(CHUNK) + 512;
        assert_eq!(node.read(&volume, at, 1024).await.unwrap(), img.content[at as usize..at as usize + 1024]);
        world.heal_disk();
        node.read(&volume, at, 512).await.unwrap();
        while node.status("v").await.unwrap().resident_bytes < 2 * u64::from(CHUNK) {
            node.platform.sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(pack_gets(&objects), 1, "later misses come from the cache");
    });
}

#[test]
fn zero_chunks_writes_and_discards_fetch_nothing() {
    let (world, objects, img) = world(3, 11);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        let chunk = u64::from(CHUNK);
        assert_eq!(node.read(&volume, 0, CHUNK).await.unwrap(), vec![0; CHUNK as usize]);
        objects.outage(Duration::from_secs(3600));
        node.write(&volume, chunk + 4096, vec![7; 8192], true).await.unwrap();
        let (id, generation) = (volume.volume, volume.generation);
        let zero = Request::WriteZeroes { volume: id, generation, offset: 2 * chunk, len: chunk, fua: true };
        node.request(0, zero).await.unwrap();
        let discard = Request::Discard { volume: id, generation, offset: 3 * chunk, len: chunk };
        node.request(0, discard).await.unwrap();
        node.flush(&volume).await.unwrap();
        assert_eq!(node.read(&volume, chunk + 4096, 8192).await.unwrap(), vec![7; 8192]);
        assert_eq!(node.read(&volume, 2 * chunk, 2 * CHUNK).await.unwrap(), vec![0; 2 * CHUNK as usize]);
        let residency = Request::Residency { volume: id, offset: chunk, len: chunk };
        let Reply::Residency { extents, .. } = node.request(0, residency).await.unwrap() else { panic!() };
        let seen: Vec<_> = extents.iter().map(|e| (e.len_bytes, e.resident, e.hole)).collect();
        assert_eq!(seen, [(4096, false, false), (8192, true, false), (chunk - 12288, false, false)]);
        assert_eq!(pack_gets(&objects), 0);
    });
}

#[test]
fn hydration_never_overwrites_what_the_guest_wrote_meanwhile() {
    for seed in 10..40 {
        let (world, objects, img) = world(seed, 6);
        world.block_on(async {
            let node = Rc::new(Node::start(world.platform(), &objects, &Options::default()).await.unwrap());
            node.create(node.spec("v", &img, HydrationRate::Unlimited)).await.unwrap();
            let volume = node.attach("v").await.unwrap();
            let mut expected = img.content.clone();
            let mut writes = Vec::new();
            for i in 0..40_usize {
                let (offset, len) = (i * 7919 * 512 % (expected.len() - 8192) / 512 * 512, 512 * (1 + i % 9));
                let data = vec![i as u8 + 1; len];
                expected[offset..offset + len].copy_from_slice(&data);
                writes.push((offset as u64, data));
            }
            for (offset, data) in writes {
                node.write(&volume, offset, data, false).await.unwrap();
            }
            node.wait_hydrated("v").await.unwrap();
            let read = join_all((0..expected.len() / 512).map(|i| node.read(&volume, i as u64 * 512, 512))).await;
            let read: Vec<u8> = read.into_iter().flat_map(Result::unwrap).collect();
            assert!(read == expected, "seed {seed}");
        });
    }
}

#[test]
fn a_priority_fetch_jumps_the_queue_of_the_background() {
    let (world, objects, img) = world(4, 200);
    let slow = ObjectFaults { latency: Duration::from_millis(50)..Duration::from_millis(51), ..Default::default() };
    objects.set_faults(slow);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::Unlimited)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        let last = 199 * u64::from(CHUNK);
        node.request(0, prefetch(&volume, last, 512, FetchUntil::Readable)).await.unwrap();
        let status = node.status("v").await.unwrap();
        assert!(status.remaining_bytes > status.size_bytes / 2, "answered while most is missing: {status:?}");
        let hits = node.counter(0, "priority_fetch_hits_total").await;
        node.request(0, prefetch(&volume, last, 512, FetchUntil::Resident)).await.unwrap();
        node.request(0, prefetch(&volume, last, 512, FetchUntil::Durable)).await.unwrap();
        node.request(0, prefetch(&volume, last, 512, FetchUntil::Durable)).await.unwrap();
        assert!(node.counter(0, "priority_fetch_hits_total").await > hits, "resident and durable: one look-up");
    });
}

#[test]
fn a_durable_priority_fetch_survives_a_power_cut() {
    let (world, objects, img) = world(5, 4);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        node.request(0, prefetch(&volume, u64::from(CHUNK), 512, FetchUntil::Durable)).await.unwrap();
    });
    world.crash();
    objects.outage(Duration::from_secs(1_000_000));
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        let (from, to) = (CHUNK as usize, 2 * CHUNK as usize);
        assert_eq!(node.read(&volume, u64::from(CHUNK), CHUNK).await.unwrap(), img.content[from..to]);
    });
}

#[test]
fn corrupt_data_is_dropped_counted_fetched_again_and_never_served() {
    let (world, objects, img) = world(6, 30);
    objects.set_faults(ObjectFaults { corrupt_ppm: 300_000, ..Default::default() });
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        // The manifest travels the same way: creation may have to be asked again.
        while let Err(error) = node.create(node.spec("v", &img, HydrationRate::Unlimited)).await {
            assert_eq!(error.status, Status::Corrupt, "{error}");
        }
        let volume = node.attach("v").await.unwrap();
        for i in 0..29_u32 {
            let at = (i * CHUNK) as usize;
            match node.read(&volume, at as u64, CHUNK).await {
                Ok(data) => assert_eq!(data, img.content[at..at + CHUNK as usize]),
                Err(error) => assert_eq!(error.status, Status::Corrupt, "{error}"),
            }
        }
        node.wait_hydrated("v").await.unwrap();
        assert!(node.counter(0, "corrupt_chunks_total").await > 0);
        assert!(node.events(0).await.iter().any(|e| e.contains("corrupt chunk in packs/")));
    });
}

#[test]
fn a_lost_object_store_costs_an_error_past_the_deadline_and_nothing_else() {
    let (world, objects, img) = world(7, 5);
    let options = Options { guest_deadline: Duration::from_secs(2), ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::Unlimited)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        objects.outage(Duration::from_secs(60));
        let before = node.platform.now();
        let last = (img.content.len() - 512) as u64;
        assert_eq!(status_of(node.read(&volume, last, 512).await), Status::DeadlineExceeded);
        assert!(node.platform.now().since(before) < Duration::from_secs(3));
        assert!(node.events(0).await.iter().any(|e| e.contains("no data from the object store within 2000 ms")));
        node.platform.sleep(Duration::from_secs(60)).await;
        assert_eq!(node.read(&volume, last, 512).await.unwrap(), img.content[last as usize..]);
        node.wait_hydrated("v").await.unwrap();
    });
}

#[test]
fn a_hanging_store_does_not_hang_the_guest() {
    let (world, objects, img) = world(8, 6);
    let options = Options { guest_deadline: Duration::from_secs(2), ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        let hang = Duration::from_secs(100);
        objects.set_faults(ObjectFaults { hang_ppm: 1_000_000, hang, ..Default::default() });
        assert_eq!(status_of(node.read(&volume, u64::from(CHUNK), 512).await), Status::DeadlineExceeded);
        objects.set_faults(ObjectFaults::default());
        node.platform.sleep(hang).await;
        node.read(&volume, u64::from(CHUNK), 512).await.unwrap();
    });
}

#[test]
fn a_newer_attach_fences_the_older_one_across_a_restart() {
    let (world, objects, img) = world(9, 3);
    let options = Options { shards: 2, ..Options::default() };
    let (old, new) = world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let old = node.attach("v").await.unwrap();
        let new = node.attach("v").await.unwrap();
        assert!(new.generation > old.generation);
        assert_eq!(status_of(node.write(&old, 0, vec![1; 512], false).await), Status::StaleGeneration);
        assert_eq!(status_of(node.flush(&old).await), Status::StaleGeneration);
        assert_eq!(status_of(node.read(&old, 0, 512).await), Status::StaleGeneration);
        node.write(&new, 0, vec![2; 512], true).await.unwrap();
        (old, new)
    });
    world.crash();
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        let resume = |g: u64| Request::Attach { name: "v".into(), resume_generation: Some(g) };
        assert_eq!(status_of(node.request(0, resume(old.generation)).await), Status::StaleGeneration);
        assert_eq!(status_of(node.read(&new, 0, 512).await), Status::NotAttached);
        node.request(0, resume(new.generation)).await.unwrap();
        assert_eq!(node.read(&new, 0, 512).await.unwrap(), vec![2; 512]);
    });
}

#[test]
fn a_full_disk_is_an_error_and_heals() {
    let (world, objects, img) = world(11, 12);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        node.write(&volume, 0, vec![9; 4096], true).await.unwrap();
        world.set_disk_capacity(Some(256 << 10));
        let mut offset = 1 << 16;
        let error = loop {
            match node.write(&volume, offset, vec![1; 64 << 10], true).await {
                Ok(()) => offset += 64 << 10,
                Err(error) => break error,
            }
        };
        assert_eq!(error.status, Status::NoSpace, "{error}");
        let read = node.read(&volume, 9 * u64::from(CHUNK), 512).await.unwrap();
        assert_eq!(read, img.content[9 * CHUNK as usize..9 * CHUNK as usize + 512], "misses are served still");
        world.set_disk_capacity(None);
        node.write(&volume, offset, vec![1; 64 << 10], true).await.unwrap();
        assert_eq!(node.read(&volume, 0, 4096).await.unwrap(), vec![9; 4096]);
    });
}

#[test]
fn a_failed_sync_acknowledges_nothing_until_a_restart() {
    let (world, objects, img) = world(12, 3);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        node.write(&volume, 0, vec![9; 4096], false).await.unwrap();
        world.fail_disk_nth(STORE, DiskOp::Sync, 1);
        assert_eq!(status_of(node.flush(&volume).await), Status::Io);
        assert_eq!(status_of(node.flush(&volume).await), Status::Io, "the second sync would lie");
        assert_eq!(status_of(node.write(&volume, 0, vec![1; 512], false).await), Status::Io);
    });
}

#[test]
fn a_rate_is_kept_and_none_means_none() {
    let (world, objects, img) = world(13, 160);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("slow", &img, HydrationRate::BytesPerSecond(1 << 20))).await.unwrap();
        node.create(node.spec("none", &img, HydrationRate::None)).await.unwrap();
        node.platform.sleep(Duration::from_secs(4)).await;
        let status = node.status("slow").await.unwrap();
        let zero: u64 = 32 * u64::from(CHUNK);
        let copied = status.resident_bytes - zero;
        // One run of 4 MiB may start on the burst.
        assert!((3 << 20..=9 << 20).contains(&copied), "{copied} bytes in 4 s at 1 MiB/s");
        assert!(status.eta_seconds.is_some_and(|eta| eta > 0.5), "{status:?}");
        assert_eq!(node.status("none").await.unwrap().resident_bytes, zero);
        let command = |reply| Command::SetRate { name: "none".into(), rate: HydrationRate::Unlimited, reply };
        node.command(0, command).await.unwrap();
        node.wait_hydrated("none").await.unwrap();
    });
}

#[test]
fn misses_beyond_the_stores_share_are_answered_and_filled_later() {
    let (world, objects, img) = world(14, 64);
    let options = Options { hydration_bandwidth: Some(256 << 10), ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let volume = node.attach("v").await.unwrap();
        let before = node.platform.now();
        for i in 0..63_u32 {
            let at = (i * CHUNK) as usize;
            assert_eq!(node.read(&volume, at as u64, 4096).await.unwrap(), img.content[at..at + 4096]);
        }
        assert!(node.platform.now().since(before) < Duration::from_secs(3), "guests do not wait for the share");
        assert!(node.counter(0, "fills_deferred_total").await > 0);
        while node.status("v").await.unwrap().remaining_bytes > u64::from(CHUNK) {
            node.platform.sleep(Duration::from_millis(200)).await;
        }
        assert!(node.platform.now().since(before) > Duration::from_secs(8), "the fills kept to the share");
    });
}

#[test]
fn creation_is_all_or_nothing_and_names_are_unique() {
    let (world, objects, img) = world(15, 3);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("a", &img, HydrationRate::None)).await.unwrap();
        let specs = vec![node.spec("b", &img, HydrationRate::None), node.spec("a", &img, HydrationRate::None)];
        let result = node.command(0, |reply| Command::CreateVolumes { specs, reply }).await;
        assert_eq!(status_of(result), Status::NameTaken);
        assert_eq!(status_of(node.status("b").await.map(|s| s.name)), Status::UnknownVolume);
        node.create(node.spec("b", &img, HydrationRate::None)).await.unwrap();
        let gone = Image { snapshot: volley_server::types::SnapshotRef { name: "gone".into(), id: 1 }, ..img.clone() };
        assert_eq!(status_of(node.create(node.spec("c", &gone, HydrationRate::None)).await), Status::UnknownSnapshot);
        node.attach("a").await.unwrap();
        let delete = |force| move |reply| Command::DeleteVolume { name: "a".into(), force, reply };
        assert_eq!(status_of(node.command(0, delete(false)).await), Status::Conflict);
        node.command(0, delete(true)).await.unwrap();
        node.create(node.spec("a", &img, HydrationRate::None)).await.unwrap();
        node.stop().await;
        let node = Node::start(world.platform(), &objects, &Options { shards: 3, ..Options::default() }).await.unwrap();
        for name in ["a", "b"] {
            node.attach(name).await.unwrap();
        }
    });
}

#[test]
fn a_file_that_an_unfinished_creation_left_is_taken_over_and_one_with_data_never() {
    let (world, objects, img) = world(13, 3);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        let [fresh, kept] = ["fresh", "kept"].map(|name| node.spec(name, &img, HydrationRate::Unlimited));
        let path = |spec: &VolumeSpec| PathBuf::from(STORE).join("volumes").join(format!("{}.raw", spec.id));
        for (spec, data) in [(&fresh, false), (&kept, true)] {
            let file = node.platform.open(&path(spec), OpenMode::CreateNew).await.unwrap();
            file.set_len(8192).await.unwrap();
            if data {
                let mut bytes = node.platform.alloc(4096);
                bytes.fill(7);
                file.write_at(4096, bytes).await.unwrap();
            }
            file.close().await.unwrap();
        }
        node.create(fresh).await.unwrap();
        let status = node.wait_hydrated("fresh").await.unwrap();
        assert_eq!(status.remaining_bytes, 0);
        let refused = node.create(kept.clone()).await.unwrap_err();
        assert!(refused.message.contains("exist"), "{refused}");
        let bytes = world.file_bytes(&path(&kept)).unwrap();
        assert!(bytes.len() == 8192 && bytes[4096..].iter().all(|byte| *byte == 7), "somebody's data stays");
    });
}

#[test]
fn a_reconnected_writer_is_not_overtaken_by_its_old_connection() {
    let (world, objects, img) = world(16, 3);
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &Options::default()).await.unwrap();
        node.create(node.spec("v", &img, HydrationRate::None)).await.unwrap();
        let (old, new) = (ConnectionId::new(0, 1), ConnectionId::new(0, 2));
        let shard = &node.shards[0];
        let attach = |resume_generation| Request::Attach { name: "v".into(), resume_generation };
        let Reply::Attached(info) = shard.handle(attach(None), old).await.unwrap() else { panic!() };
        let (volume, generation) = (info.volume, info.generation);
        let write = |byte| Request::Write { volume, generation, offset: 512, data: vec![byte; 512], fua: false };
        // An unaligned write waits for the object store: the connection is lost and resumed before it gets there.
        let slow = ObjectFaults { latency: Duration::from_secs(1)..Duration::from_secs(2), ..Default::default() };
        objects.set_faults(slow);
        let late = Request::Write { volume, generation, offset: CHUNK as u64 + 512, data: vec![1; 512], fua: false };
        let resumed = async {
            node.platform.sleep(Duration::from_millis(100)).await;
            shard.handle(attach(Some(generation)), new).await.unwrap();
            shard.handle(write(2), new).await.unwrap();
        };
        let (late, ()) = futures::join!(shard.handle(late, old), resumed);
        assert_eq!(status_of(late), Status::NotAttached);
        assert_eq!(status_of(shard.handle(write(3), old).await), Status::NotAttached);
        let read = Request::Read { volume, generation, offset: 512, len: 512 };
        let Reply::Data(data) = shard.handle(read, new).await.unwrap() else { panic!() };
        assert_eq!(data[..], [2; 512]);
        shard.connection_lost(volume, old);
        assert!(node.status("v").await.unwrap().attached, "the old connection has nothing left to lose");
        shard.connection_lost(volume, new);
        assert!(!node.status("v").await.unwrap().attached);
    });
}

#[test]
fn a_cache_disk_that_hangs_costs_one_wait_and_no_error() {
    let (world, objects, img) = world(30, 8);
    let dir = PathBuf::from("/node/cache");
    let disk_cache = Some(DiskCacheConfig { dir, bytes: 8 << 20 });
    // No RAM cache: every miss asks the disk.
    let options = Options { cache_bytes: 0, disk_cache, ..Options::default() };
    world.block_on(async {
        let node = Node::start(world.platform(), &objects, &options).await.unwrap();
        for name in ["a", "b"] {
            node.create(node.spec(name, &img, HydrationRate::None)).await.unwrap();
        }
        let chunk = u64::from(CHUNK);
        let first = node.attach("a").await.unwrap();
        assert_eq!(node.read(&first, chunk, CHUNK).await.unwrap(), img.content[CHUNK as usize..2 * CHUNK as usize]);
        node.platform.sleep(Duration::from_secs(1)).await;
        assert_eq!(node.counter(0, "cache_insertions_total{tier=\"disk\"}").await, 1);
        world.slow_disk("/node/cache", DiskOp::Read, Duration::from_secs(3600)..Duration::from_secs(3601));
        let second = node.attach("b").await.unwrap();
        let before = node.platform.now();
        assert_eq!(node.read(&second, chunk, CHUNK).await.unwrap(), img.content[CHUNK as usize..2 * CHUNK as usize]);
        let took = node.platform.now().since(before);
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert_eq!((pack_gets(&objects), node.counter(0, "cache_errors_total{tier=\"disk\"}").await), (2, 1));
        assert!(node.events(0).await.iter().any(|event| event.contains("left alone")));
    });
}
