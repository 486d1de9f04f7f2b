//! Snapshots: what is captured is what the volume was at its cut, and what could not be leaves nothing behind.

use std::cell::Cell;
use std::time::Duration;

use volley_server::error::Status;
use volley_server::platform::Platform;
use volley_server::platform::sim::{DiskOp, SimRng};
use volley_server::shard::api::{Command, CutWanted};
use volley_server::types::HydrationRate;

use super::{Guest, capture, cut, cut_frozen, end, freeze, lab, lineage, staging_files, whole};
use crate::support::{CHUNK, Lab, Options, status_of};

/// Snapshots of a volume whose guest writes all the time, hydrating or not, on stores that share extents or not. Each builds on the one before.
fn snapshots_of_a_busy_volume(seed: u64) -> u64 {
    let lab = lab(seed);
    let mut rng = SimRng::stream(seed, "scenario");
    let shares = rng.coin();
    lab.world.share_extents(shares);
    let options = Options {
        shards: 1 + rng.index(2),
        hydration_bandwidth: rng.coin().then_some(2 << 20),
        base_bytes: if shares { 1 << 30 } else { 0 },
        ..Options::default()
    };
    let rate = if rng.coin() { HydrationRate::Unlimited } else { HydrationRate::None };
    let staged = lab.world.block_on(async {
        let node = lab.node(&options).await;
        node.create(node.spec("vm", &lab.image, rate)).await.expect("created");
        let volume = node.attach("vm").await.expect("attached");
        let guest = Guest::new(&lab.image.content);
        let mut writes = SimRng::stream(seed, "guest");
        let snapshots = async {
            let mut base = lab.image.content.clone();
            for number in 1..6 {
                node.platform.sleep(Duration::from_millis(rng.below(200))).await;
                let known = lineage(&node, "vm").await;
                freeze(&node, "vm", number).await.expect("frozen");
                let right = guest.contents();
                let made = cut_frozen(&node, "vm", number, false).await.expect("cut");
                assert!(made.known && made.base == known.lineage.base, "seed {seed}");
                let content = capture(&node, "vm", &made, number, &base).await.expect("captured");
                // Of a request that was on its way each sector is old or new, as after a power cut.
                let [before, after] = &right;
                let mut wrong = content.chunks(512).zip(before.chunks(512).zip(after.chunks(512)));
                let wrong = wrong.position(|(now, (old, new))| now != old && now != new);
                assert_eq!(wrong, None, "seed {seed}: snapshot {number} is not the volume at its cut");
                if rng.below(4) == 0 {
                    end(&node, "vm", &made, number, None).await;
                    continue;
                }
                let snapshot = lab.publish(&format!("s{number}"), &content, number);
                end(&node, "vm", &made, number, Some(snapshot)).await;
                base = content;
            }
            guest.stop.set(true);
        };
        futures::future::join(guest.run(&node, &volume, &mut writes), snapshots).await;
        assert!(whole(&node, &volume).await == guest.contents()[0], "seed {seed}");
        let mut staged = 0;
        for shard in 0..node.shards.len() {
            staged += node.counter(shard, "staged_bytes_total").await;
        }
        node.stop().await;
        staged
    });
    assert_eq!(staging_files(&lab.world), 0, "seed {seed}");
    staged
}

#[test]
fn a_snapshot_is_the_volume_at_its_cut_whatever_guests_write_meanwhile() {
    let staged: u64 = (0..60).map(snapshots_of_a_busy_volume).sum();
    assert!(staged > 50, "{staged} chunks were put aside in all: guests hardly came in the way");
}

#[test]
fn after_a_clean_stop_only_what_changed_is_read_and_after_a_crash_what_is_near_it() {
    let lab = Lab::of(300, 1536, 5, 3);
    let mut rng = SimRng::new(3);
    let mut content = lab.image.content.clone();
    for (life, crash) in [(1, false), (2, true), (3, false)] {
        lab.world.block_on(async {
            let node = lab.node(&Options::default()).await;
            if life == 1 {
                node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
                node.wait_hydrated("vm").await.expect("hydrated");
            }
            let made = cut(&node, "vm", life, false).await.expect("cut");
            assert!(made.known, "life {life}");
            let expected = match life {
                1 => vec![],
                2 => vec![4, 9],
                // Announced together.
                _ => (0..128).collect(),
            };
            assert_eq!(made.chunks, expected, "life {life}");
            let captured = capture(&node, "vm", &made, life, &content).await.expect("captured");
            let volume = node.attach("vm").await.expect("attached");
            assert!(captured == whole(&node, &volume).await, "life {life}");
            let snapshot = lab.publish(&format!("s{life}"), &captured, life);
            end(&node, "vm", &made, life, Some(snapshot)).await;
            content = captured;
            let volume = node.attach("vm").await.expect("attached");
            for chunk in [4, 9] {
                let mut data = vec![0; 4096];
                rng.fill(&mut data);
                node.write(&volume, u64::from(chunk * CHUNK) + 8192, data, false).await.expect("written");
            }
            if !crash {
                node.stop().await;
            }
        });
        if crash {
            lab.world.crash();
        }
    }
}

#[test]
fn one_snapshot_of_a_volume_at_a_time_and_a_volume_without_its_cut_thaws() {
    let lab = lab(5);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::None)).await.expect("created");
        let volume = node.attach("vm").await.expect("attached");
        let made = cut(&node, "vm", 1, false).await.expect("cut");
        assert_eq!(status_of(cut(&node, "vm", 2, false).await), Status::Conflict);
        let (id, chunk) = (made.volume, 0);
        let capture = |reply| Command::Capture { volume: id, cut: 2, chunk, reply };
        assert_eq!(status_of(node.command(0, capture).await), Status::Conflict, "of another cut");
        end(&node, "vm", &made, 2, None).await;
        assert_eq!(
            status_of(cut(&node, "vm", 2, false).await),
            Status::Conflict,
            "the end of another cut ends nothing"
        );
        end(&node, "vm", &made, 1, None).await;
        let names = vec!["vm".to_owned()];
        node.command(0, |reply| Command::Freeze { names, cut: 3, reply }).await.expect("frozen");
        let begun = node.platform.now();
        node.write(&volume, 0, vec![7; 4096], false).await.expect("goes on by itself");
        assert!(node.platform.now().since(begun) >= Duration::from_millis(900));
        let wanted = vec![CutWanted { name: "vm".to_owned(), all: false, also: None }];
        let late = node.command(0, |reply| Command::Cut { wanted, cut: 3, reply }).await;
        assert_eq!(status_of(late), Status::Busy);
        assert_eq!(status_of(cut(&node, "nobody", 4, false).await), Status::UnknownVolume);
    });
}

#[test]
fn volumes_of_a_group_are_cut_at_one_moment() {
    (0..20).for_each(a_group);
}

fn a_group(seed: u64) {
    {
        let lab = lab(seed);
        lab.world.block_on(async {
            let node = lab.node(&Options { shards: 2, ..Options::default() }).await;
            let names = ["data", "log"];
            let mut volumes = Vec::new();
            for name in names {
                node.create(node.spec(name, &lab.image, HydrationRate::None)).await.expect("created");
                volumes.push(node.attach(name).await.expect("attached"));
            }
            // First the log, then the data: no data without its log.
            let stop = Cell::new(false);
            let guest = async {
                let mut number = 0_u64;
                while !stop.get() {
                    number += 1;
                    for volume in [1, 0] {
                        let mut data = vec![0; 4096];
                        data[..8].copy_from_slice(&number.to_le_bytes());
                        node.write(&volumes[volume], 4096, data, false).await.expect("written");
                    }
                }
            };
            let group = async {
                node.platform.sleep(Duration::from_millis(20 + seed)).await;
                for name in names {
                    let frozen = vec![name.to_owned()];
                    node.command(node.owner(name), |reply| Command::Freeze { names: frozen, cut: 1, reply })
                        .await
                        .expect("frozen");
                }
                let mut found = Vec::new();
                for name in names {
                    let wanted = vec![CutWanted { name: name.to_owned(), all: false, also: None }];
                    let made = node
                        .command(node.owner(name), |reply| Command::Cut { wanted, cut: 1, reply })
                        .await
                        .expect("cut");
                    node.platform.sleep(Duration::from_millis(5)).await;
                    found.push(made[0].clone());
                }
                let mut numbers = Vec::new();
                for (name, made) in names.iter().zip(&found) {
                    let content = capture(&node, name, made, 1, &lab.image.content).await.expect("captured");
                    numbers.push(u64::from_le_bytes(content[4096..4104].try_into().expect("8 bytes")));
                }
                stop.set(true);
                numbers
            };
            let ((), numbers) = futures::future::join(guest, group).await;
            assert!(numbers[0] <= numbers[1] && numbers[1] <= numbers[0] + 1, "seed {seed}: {numbers:?}");
        });
    }
}

#[test]
fn a_full_staging_area_or_a_failing_one_ends_the_snapshot_and_no_write() {
    for full in [true, false] {
        let lab = lab(6);
        lab.world.block_on(async {
            let staging_bytes = if full { 3 * u64::from(CHUNK) } else { 1 << 30 };
            let node = lab.node(&Options { staging_bytes, ..Options::default() }).await;
            node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
            node.wait_hydrated("vm").await.expect("hydrated");
            let volume = node.attach("vm").await.expect("attached");
            let write = |chunk: u32, byte: u8| node.write(&volume, u64::from(chunk * CHUNK), vec![byte; 4096], false);
            for chunk in 0..8 {
                write(chunk, 1).await.expect("written");
            }
            let made = cut(&node, "vm", 1, false).await.expect("cut");
            assert_eq!(made.chunks, (0..8).collect::<Vec<_>>());
            if !full {
                lab.world.fail_disk("/node/store/staging", DiskOp::Write, 1_000_000);
            }
            for chunk in 0..8 {
                write(chunk, 2).await.expect("guests go on");
            }
            let failed = capture(&node, "vm", &made, 1, &lab.image.content).await;
            assert_eq!(status_of(failed), Status::Conflict);
            end(&node, "vm", &made, 1, None).await;
            lab.world.heal_disk();
            // Nothing was forgotten, and the next one works.
            let made = cut(&node, "vm", 2, false).await.expect("cut");
            let content = capture(&node, "vm", &made, 2, &lab.image.content).await.expect("captured");
            assert!(content == whole(&node, &volume).await);
            end(&node, "vm", &made, 2, None).await;
            assert!(node.events(0).await.iter().any(|event| event.contains("was given up")));
            node.stop().await;
        });
        assert_eq!(staging_files(&lab.world), 0);
    }
}

#[test]
fn what_a_crash_leaves_of_a_snapshot_is_removed() {
    let lab = lab(7);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        node.write(&volume, 0, vec![1; 4096], true).await.expect("written");
        cut(&node, "vm", 1, false).await.expect("cut");
        node.write(&volume, 0, vec![2; 4096], true).await.expect("written");
    });
    assert_eq!(staging_files(&lab.world), 1);
    lab.world.kill();
    lab.world.block_on(async { lab.node(&Options::default()).await.stop().await });
    assert_eq!(staging_files(&lab.world), 0);
}

/// A stop that could not write down what had changed must not look like one that did.
#[test]
fn a_stop_without_its_last_checkpoint_forgets_no_change() {
    let lab = lab(8);
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        node.create(node.spec("vm", &lab.image, HydrationRate::Unlimited)).await.expect("created");
        node.wait_hydrated("vm").await.expect("hydrated");
        let volume = node.attach("vm").await.expect("attached");
        node.write(&volume, u64::from(4 * CHUNK), vec![1; 4096], true).await.expect("written");
        // The segment of the next checkpoint; the journal itself can be written.
        lab.world.fail_disk("/node/journal/0000000001-0000-0000000001", DiskOp::Write, 1_000_000);
        node.stop().await;
        lab.world.heal_disk();
    });
    lab.world.block_on(async {
        let node = lab.node(&Options::default()).await;
        let made = cut(&node, "vm", 1, false).await.expect("cut");
        assert!(made.known && made.chunks.contains(&4), "{made:?}");
    });
}
