//! Tests of the simulator itself: what it must promise before it can judge anything else.

use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use volley_server::object_store::{ObjectError, ObjectStore};
use volley_server::platform::sim::{
    CrashPoint, DiskOp, ObjectFaults, RunLimits, Sim, SimConnection, SimObjects, SimRng, SimStop, SimWorld,
};
use volley_server::platform::{ByteReader, ByteWriter, Connection, File, OpenMode, Platform, Queue};

/// How many seeds a "happens in some seed" test tries.
const SEEDS: u64 = 60;

async fn write_block(sim: &Sim, path: &str, fill: u8) -> std::io::Result<()> {
    let file = sim.open(Path::new(path), OpenMode::ReadWrite).await?;
    let mut buf = sim.alloc(4096);
    buf.fill(fill);
    file.write_at(0, buf).await
}

/// A world with one durable 4 KiB file of 1s.
fn world_with_file(seed: u64) -> SimWorld {
    let world = SimWorld::new(seed);
    let sim = world.platform();
    world.block_on(async {
        sim.create_dir_all(Path::new("/d")).await.unwrap();
        sim.sync_dir(Path::new("/")).await.unwrap();
        let file = sim.open(Path::new("/d/f"), OpenMode::CreateNew).await.unwrap();
        let mut buf = sim.alloc(4096);
        buf.fill(1);
        file.write_at(0, buf).await.unwrap();
        file.datasync().await.unwrap();
        sim.sync_dir(Path::new("/d")).await.unwrap();
    });
    world
}

/// A busy program: tasks that race on a file, a channel, timers and an object store.
fn busy_program(seed: u64) -> u64 {
    let world = world_with_file(seed);
    let sim = world.platform();
    let objects = SimObjects::new(&world);
    objects.set_faults(ObjectFaults { retry_ppm: 200_000, ..ObjectFaults::default() });
    world.block_on(async {
        let (sender, receiver) = flume::unbounded();
        for task in 0..8u8 {
            let (sim, objects, sender) = (sim.clone(), objects.clone(), sender.clone());
            sim.clone().spawn(Queue::Background, async move {
                sim.sleep(Duration::from_micros(u64::from(task % 3) * 100)).await;
                let written = write_block(&sim, "/d/f", task).await.is_ok();
                let put = objects.put("packs/x", &[task]).await.is_ok();
                sim.yield_now().await;
                sender.send((task, written, put)).unwrap();
            });
        }
        drop(sender);
        while let Ok((task, written, put)) = receiver.recv_async().await {
            world.note("done", &[u64::from(task), u64::from(written), u64::from(put), sim.random_u64()]);
        }
    });
    world.trace_hash()
}

#[test]
fn same_seed_gives_the_same_run_to_the_last_event() {
    for seed in 0..20 {
        assert_eq!(busy_program(seed), busy_program(seed), "seed {seed}");
    }
}

#[test]
fn different_seeds_give_different_runs() {
    let hashes: std::collections::BTreeSet<u64> = (0..20).map(busy_program).collect();
    assert_eq!(hashes.len(), 20);
}

#[test]
fn what_a_failed_write_shows_is_on_the_disk_after_a_sync() {
    let mut torn = 0;
    for seed in 0..SEEDS {
        let world = world_with_file(seed);
        let sim = world.platform();
        world.fail_disk_nth("/d/f", DiskOp::Write, 1);
        let shown = world.block_on(async {
            assert!(write_block(&sim, "/d/f", 2).await.is_err());
            let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
            let shown = file.read_at(0, 4096).await.unwrap();
            file.datasync().await.unwrap();
            shown
        });
        torn += u32::from(shown.contains(&1) && shown.contains(&2));
        world.crash();
        let sim = world.platform();
        let found = world.block_on(async {
            sim.open(Path::new("/d/f"), OpenMode::Read).await.unwrap().read_at(0, 4096).await.unwrap()
        });
        assert!(found == shown, "seed {seed}: synced, and yet the power cut took it back");
    }
    assert!(torn > 0, "in some seed a part of the write happens");
}

#[test]
fn unsynced_write_is_old_new_or_torn_at_sectors_and_each_happens() {
    let (mut old, mut new, mut torn) = (0, 0, 0);
    for seed in 0..SEEDS {
        let world = world_with_file(seed);
        let sim = world.platform();
        world.block_on(async { write_block(&sim, "/d/f", 2).await.unwrap() });
        world.crash();
        let bytes = world.file_bytes(Path::new("/d/f")).unwrap();
        for sector in bytes.chunks(512) {
            assert!(sector == [1; 512] || sector == [2; 512], "seed {seed}: a sector is torn");
        }
        match (bytes.contains(&1), bytes.contains(&2)) {
            (true, false) => old += 1,
            (false, true) => new += 1,
            _ => torn += 1,
        }
    }
    assert!(old > 0 && new > 0 && torn > 0, "old {old}, new {new}, torn {torn}");
}

#[test]
fn synced_write_survives_every_crash() {
    for seed in 0..SEEDS {
        let world = world_with_file(seed);
        let sim = world.platform();
        world.block_on(async {
            let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
            file.write_at(0, vec![2; 4096]).await.unwrap();
            file.datasync().await.unwrap();
        });
        world.crash();
        assert_eq!(world.file_bytes(Path::new("/d/f")).unwrap(), vec![2; 4096], "seed {seed}");
    }
}

#[test]
fn an_unsynced_clone_is_torn_at_blocks_and_a_synced_one_needs_no_sync_of_its_source() {
    let (mut torn, mut whole) = (0, 0);
    for seed in 0..SEEDS {
        let world = world_with_file(seed);
        world.share_extents(true);
        let sim = world.platform();
        let synced = seed % 2 == 0;
        world.block_on(async {
            let source = sim.open(Path::new("/d/s"), OpenMode::CreateNew).await.unwrap();
            source.write_at(0, vec![2; 65536]).await.unwrap();
            let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
            file.set_len(65536).await.unwrap();
            file.datasync().await.unwrap();
            file.clone_range(8192, &source, 4096, 57344).await.unwrap();
            assert_eq!(file.read_at(8192, 57344).await.unwrap(), vec![2; 57344]);
            // Independent of its source from then on.
            source.write_at(4096, vec![3; 4096]).await.unwrap();
            assert_eq!(file.read_at(8192, 4096).await.unwrap(), vec![2; 4096]);
            if synced {
                file.datasync().await.unwrap();
            }
        });
        world.crash();
        let bytes = world.file_bytes(Path::new("/d/f")).unwrap();
        let blocks: Vec<bool> = bytes[8192..].chunks(4096).map(|block| block == [2; 4096]).collect();
        let intact = bytes[8192..].chunks(4096).all(|b| b == [2; 4096] || b == [1; 4096] || b == [0; 4096]);
        assert!(intact, "seed {seed}: a block is torn");
        match blocks.iter().all(|cloned| *cloned) {
            true => whole += 1,
            false => torn += 1,
        }
        assert!(!synced || blocks.iter().all(|cloned| *cloned), "seed {seed}: a synced clone is gone");
    }
    assert!(whole > SEEDS / 2 && torn > 0, "whole {whole}, torn {torn}");
}

#[test]
fn a_clone_is_refused_where_extents_are_not_shared_and_past_the_end_of_either_file() {
    let world = world_with_file(1);
    let sim = world.platform();
    world.block_on(async {
        let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
        let len = file.len().await.unwrap();
        let refused = async |to, from, len| file.clone_range(to, &file, from, len).await.map_err(|e| e.kind());
        assert_eq!(refused(0, 0, 4096).await, Err(std::io::ErrorKind::Unsupported));
        world.share_extents(true);
        assert_eq!(refused(len, 0, 4096).await, Err(std::io::ErrorKind::InvalidInput));
        assert_eq!(refused(0, len, 4096).await, Err(std::io::ErrorKind::InvalidInput));
        world.fail_disk_nth("/d/f", DiskOp::Write, 1);
        assert!(refused(0, 0, 4096).await.is_err());
    });
}

#[test]
fn write_in_flight_at_a_sync_is_not_covered_by_it() {
    let lost = (0..SEEDS).any(|seed| {
        let world = world_with_file(seed);
        world.slow_disk("/d/f", DiskOp::Write, Duration::from_secs(10)..Duration::from_secs(11));
        let sim = world.platform();
        world.block_on(async {
            let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
            let writer = file.clone();
            sim.spawn(Queue::Serve, async move {
                let _ = writer.write_at(0, vec![2; 4096]).await;
            });
            sim.sleep(Duration::from_secs(1)).await;
            file.datasync().await.unwrap();
        });
        world.crash();
        world.file_bytes(Path::new("/d/f")).unwrap().contains(&1)
    });
    assert!(lost);
}

#[test]
fn killed_process_loses_nothing_it_gave_to_the_disk() {
    for seed in 0..10 {
        let world = world_with_file(seed);
        let sim = world.platform();
        world.block_on(async { write_block(&sim, "/d/f", 2).await.unwrap() });
        world.kill();
        assert_eq!(world.file_bytes(Path::new("/d/f")).unwrap(), vec![2; 4096], "seed {seed}");
        assert!(world.block_on(write_block(&sim, "/d/f", 3)).is_err(), "the old life is over");
        assert!(world.block_on(write_block(&world.platform(), "/d/f", 3)).is_ok());
    }
}

#[test]
fn rename_is_atomic_and_may_be_lost_until_the_directory_is_synced() {
    let run = |seed: u64, sync: bool| {
        let world = world_with_file(seed);
        let sim = world.platform();
        world.block_on(async {
            sim.rename(Path::new("/d/f"), Path::new("/d/g")).await.unwrap();
            if sync {
                sim.sync_dir(Path::new("/d")).await.unwrap();
            }
        });
        world.crash();
        let (old, new) = (world.file_bytes(Path::new("/d/f")).ok(), world.file_bytes(Path::new("/d/g")).ok());
        assert!(old.is_some() != new.is_some(), "seed {seed}: both names or none");
        let renamed = new.is_some();
        assert_eq!(old.or(new), Some(vec![1; 4096]), "seed {seed}");
        renamed
    };
    let renamed = (0..SEEDS).filter(|&seed| run(seed, false)).count();
    assert!(renamed > 0 && renamed < SEEDS as usize, "{renamed} of {SEEDS}");
    assert!((0..SEEDS).all(|seed| run(seed, true)));
}

#[test]
fn names_follow_the_rules_of_a_file_system() {
    use std::io::ErrorKind::{AlreadyExists, NotFound};
    let world = world_with_file(1);
    let sim = world.platform();
    world.block_on(async {
        let kind = |r: std::io::Result<()>| r.unwrap_err().kind();
        let (f, g) = (Path::new("/d/f"), Path::new("/d/g"));
        assert_eq!(kind(sim.open(f, OpenMode::CreateNew).await.map(drop)), AlreadyExists);
        assert_eq!(kind(sim.open(g, OpenMode::Read).await.map(drop)), NotFound);
        assert_eq!(kind(sim.open(Path::new("/x/y"), OpenMode::CreateNew).await.map(drop)), NotFound);
        sim.hard_link(f, g).await.unwrap();
        assert_eq!(kind(sim.hard_link(f, g).await), AlreadyExists);
        sim.remove_file(f).await.unwrap();
        assert_eq!(kind(sim.remove_file(f).await), NotFound);
        sim.create_dir_all(Path::new("/d/a/b")).await.unwrap();
        let names: Vec<_> = sim.list_dir(Path::new("/d")).await.unwrap().into_iter().map(|e| (e.name, e.len)).collect();
        assert_eq!(names, [("a".to_owned(), 0), ("g".to_owned(), 4096)]);
    });
}

#[test]
fn full_disk_refuses_writes_and_takes_them_again_after_a_hole() {
    let world = world_with_file(3);
    world.set_disk_capacity(Some(64 << 10));
    let sim = world.platform();
    world.block_on(async {
        let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
        let error = file.write_at(0, vec![7; 128 << 10]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(sim.space(Path::new("/d")).await.unwrap().free_bytes, 0);
        file.deallocate(0, 8192).await.unwrap();
        assert_eq!(sim.space(Path::new("/d")).await.unwrap().free_bytes, 8192);
        assert_eq!(file.read_at(0, 8192).await.unwrap(), vec![0; 8192]);
        file.write_at(4096, vec![8; 4096]).await.unwrap();
    });
}

#[test]
fn injected_failures_strike_where_and_when_asked() {
    let world = world_with_file(4);
    let sim = world.platform();
    world.fail_disk_nth("/d/f", DiskOp::Sync, 2);
    world.block_on(async {
        let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
        assert!(file.datasync().await.is_ok());
        assert!(file.datasync().await.is_err());
        assert!(file.datasync().await.is_ok());
        world.fail_disk("/d/", DiskOp::Write, 1_000_000);
        assert!(file.write_at(0, vec![3; 4096]).await.is_err());
        world.heal_disk();
        assert!(file.write_at(0, vec![3; 4096]).await.is_ok());
        assert_eq!(file.read_at(0, 8192).await.unwrap(), vec![3; 4096], "a read ends at the end of the file");
    });
}

#[test]
#[should_panic(expected = "not aligned")]
fn misaligned_direct_io_is_a_bug_of_the_caller() {
    let world = world_with_file(5);
    let sim = world.platform();
    let _ = world.block_on(async {
        let file = sim.open(Path::new("/d/f"), OpenMode::Read).await.unwrap();
        file.read_at(512, 4096).await
    });
}

#[test]
fn crash_at_a_sync_happens_before_or_after_it() {
    let durable = |point| {
        let survived = (0..SEEDS).filter(|&seed| {
            let world = world_with_file(seed);
            let sim = world.platform();
            world.crash_at_sync(Some((world.syncs() + 1, point)));
            let stop = world.run(async {
                let file = sim.open(Path::new("/d/f"), OpenMode::ReadWrite).await.unwrap();
                file.write_at(0, vec![2; 4096]).await.unwrap();
                file.datasync().await.unwrap();
            });
            assert_eq!(stop, Err(SimStop::Crashed));
            world.file_bytes(Path::new("/d/f")).unwrap() == vec![2; 4096]
        });
        survived.count() as u64
    };
    assert_eq!(durable(CrashPoint::After), SEEDS);
    assert!(durable(CrashPoint::Before) < SEEDS);
}

#[test]
fn run_stops_after_steps_and_a_crash_ends_every_task() {
    let world = world_with_file(6);
    let sim = world.platform();
    let (sender, receiver) = flume::unbounded::<()>();
    sim.clone().spawn(Queue::Serve, async move {
        let _alive = sender;
        loop {
            sim.sleep(Duration::from_millis(1)).await;
        }
    });
    world.stop_after_steps(Some(100));
    assert_eq!(world.run(std::future::pending::<()>()), Err(SimStop::Stopped));
    assert!(!receiver.is_disconnected());
    world.crash();
    assert!(receiver.is_disconnected(), "the task and what it held are gone");
}

#[test]
fn deadlocks_and_endless_runs_are_named() {
    let world = SimWorld::new(7);
    let sim = world.platform();
    sim.spawn(Queue::Serve, std::future::pending());
    let Err(SimStop::Deadlock { parked }) = world.run(std::future::pending::<()>()) else { panic!("no deadlock") };
    assert!(parked[0].starts_with("1 x "), "{parked:?}");
    let limits = RunLimits { steps: 1000, virtual_time: Duration::from_secs(5) };
    let spin = async {
        while sim.now().0 > 0 {
            sim.yield_now().await;
        }
    };
    assert_eq!(world.run_within(limits, spin), Err(SimStop::StepLimit(1000)));
    let sleep = sim.sleep(Duration::from_secs(60));
    assert!(matches!(world.run_within(limits, sleep), Err(SimStop::TimeLimit { .. })));
}

#[test]
fn object_store_is_slow_flaky_down_and_lying_as_asked() {
    let world = SimWorld::new(8);
    let sim = world.platform();
    let objects = SimObjects::new(&world);
    objects.insert("packs/a", vec![5; 1000]);
    world.block_on(async {
        assert_eq!(objects.get_range("packs/a", 10..20).await.expect("a range")[..], [5; 10]);
        assert!(matches!(objects.get_range("packs/a", 10..1001).await, Err(ObjectError::Corrupt(_))));
        assert!(matches!(objects.get("packs/b").await, Err(ObjectError::NotFound(_))));
        objects.outage(Duration::from_secs(1));
        assert!(matches!(objects.get("packs/a").await, Err(ObjectError::Retry(_) | ObjectError::SlowDown(_))));
        sim.sleep(Duration::from_secs(1)).await;
        assert!(objects.get("packs/a").await.is_ok());
        objects.set_faults(ObjectFaults { corrupt_ppm: 1_000_000, ..ObjectFaults::default() });
        let lie = objects.get("packs/a").await.unwrap();
        assert_eq!(lie.iter().filter(|b| **b != 5).count(), 1);
    });
    let stats = objects.stats();
    assert_eq!((stats.gets, stats.corrupted, stats.failed), (3, 1, 1));
    assert_eq!(stats.ranges[&("packs/a".to_owned(), 10, 20)], 1);
}

#[test]
fn exactly_one_of_racing_conditional_puts_wins() {
    for seed in 0..SEEDS {
        let world = SimWorld::new(seed);
        let objects = SimObjects::new(&world);
        let puts = (0..5u8).map(|writer| {
            let objects = objects.clone();
            async move { objects.put_if_absent("snapshots/x", &[writer]).await.map(|()| writer) }
        });
        let winners: Vec<u8> = world.block_on(join_all(puts)).into_iter().flatten().collect();
        assert_eq!(winners.len(), 1, "seed {seed}");
        assert_eq!(objects.peek("snapshots/x"), Some(winners));
    }
}

#[test]
fn connection_delivers_every_byte_in_order_in_pieces() {
    for seed in 0..20 {
        let world = SimWorld::new(seed);
        let sim = world.platform();
        let (client, server) = SimConnection::pair(&world);
        let mut sent = vec![0; 600_000];
        SimRng::new(seed).fill(&mut sent);
        let (_client_reader, mut writer) = client.split();
        let data = sent.clone();
        sim.spawn(Queue::Serve, async move { writer.write_all(&data).await.unwrap() });
        let (received, reads) = world.block_on(async {
            let (mut reader, _writer) = server.split();
            let (mut received, mut reads) = (Vec::new(), 0);
            let mut buf = vec![0; 100_000];
            loop {
                let count = reader.read(&mut buf).await.unwrap();
                if count == 0 {
                    break (received, reads);
                }
                reads += 1;
                received.extend_from_slice(&buf[..count]);
            }
        });
        assert!(received == sent, "seed {seed}");
        assert!(reads > 6, "seed {seed}: {reads} reads");
    }
}

#[test]
fn killed_connection_fails_both_ends() {
    let world = SimWorld::new(9);
    let (client, server) = SimConnection::pair(&world);
    let kill = client.killer();
    world.block_on(async {
        let (_reader, mut writer) = client.split();
        let (mut reader, _writer) = server.split();
        writer.write_all(b"hello").await.unwrap();
        kill.kill();
        assert_eq!(reader.read(&mut [0; 8]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(writer.write_all(b"x").await.unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    });
}
