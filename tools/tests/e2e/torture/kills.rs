//! kill -9 of the server and of the agent, again and again, at any moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Arena, Disk, FileSystem, all_well, environment, seed};
use crate::harness::{Agent, NodeOptions, Site, available, run_in};

/// Kills of the server per file system; two file systems make more than fifty.
const ROUNDS: u64 = 30;
/// So many rounds share their volumes, which are then compared and replaced; the first has another number of cores.
const ROUNDS_PER_GENERATION: u64 = 10;
const VOLUMES: u32 = 2;
/// The server lives up to so long in a round.
const LIFE_MAX: Duration = Duration::from_millis(700);
const AGENT_ROUNDS: u64 = 12;
const FIO: Fio = Fio { iops: 1500, bytes: "8M" };

#[test]
fn nothing_is_lost_when_the_server_is_killed_on_ext4() {
    kill_the_server(FileSystem::Ext4);
}

#[test]
fn nothing_is_lost_when_the_server_is_killed_on_xfs() {
    kill_the_server(FileSystem::Xfs);
}

fn kill_the_server(file_system: FileSystem) {
    if !available(&["fio"]) {
        return;
    }
    let Some(disk) = Disk::new(file_system, 1 << 30) else { return };
    let mut arena = Arena::new(Some(disk), "6MiB/s", seed());
    let agent = {
        let node = arena.site.start(&arena.options);
        node.create(&arena.site, "debian-12", 1, "fio-");
        let agent = arena.site.agent("agent", &[]);
        node.kill();
        agent
    };
    let rounds = environment("VOLLEY_TORTURE_ROUNDS", ROUNDS);
    let (done, mut generation) = (AtomicBool::new(false), 0);
    let uri = agent.uri("fio-0");
    std::thread::scope(|threads| {
        let _done = SetAtEnd(&done);
        let fio = threads.spawn(|| verify_with_fio(&uri, &done, &FIO));
        let mut left = rounds;
        while left > 0 {
            generation += 1;
            let count = left.min(ROUNDS_PER_GENERATION);
            generation_of_kills(&mut arena, &agent, generation, count);
            left -= count;
            // The last node's volumes are judged; the guests of fio wait for one that answers.
        }
        let node = arena.site.start(&arena.options);
        done.store(true, Ordering::SeqCst);
        let runs = fio.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let answered = arena.answered.load(Ordering::SeqCst);
        println!("torture, {file_system:?}: {rounds} kills, {answered} requests judged, {runs} runs of fio verified");
        drop(node);
    });
}

/// Kills with the same volumes, then the comparison with the raw files.
fn generation_of_kills(arena: &mut Arena, agent: &Agent, generation: u64, rounds: u64) {
    let prefix = format!("g{generation}-");
    let node = arena.site.start(&arena.options);
    let mut workers = arena.populate(&node, agent, &prefix, VOLUMES);
    arena.some_time(LIFE_MAX);
    node.kill();
    for round in 1..rounds {
        let cores = if round == ROUNDS_PER_GENERATION / 2 { 1 + 2 * (generation as usize % 2) } else { 2 };
        let node = arena.site.start(&NodeOptions { cores, ..arena.options.clone() });
        arena.some_time(LIFE_MAX);
        all_well(&mut workers);
        node.kill();
    }
    let node = arena.site.start(&arena.options);
    arena.judge(node, workers);
    let node = arena.site.start(&arena.options);
    for n in 0..VOLUMES {
        node.volley(&arena.site, &["volume", "delete", &format!("{prefix}{n}"), "--force"]).success();
    }
    node.kill();
}

/// What fio does until it verifies.
pub(crate) struct Fio {
    pub(crate) iops: u32,
    pub(crate) bytes: &'static str,
}

/// fio writes, and verifies what it wrote, until told to end; returns how often it did.
pub(crate) fn verify_with_fio(uri: &str, done: &AtomicBool, fio: &Fio) -> u64 {
    let dir = Site::new();
    let uri = format!("--uri={uri}");
    let mut runs = 0;
    while !done.load(Ordering::SeqCst) || runs == 0 {
        runs += 1;
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=16",
            "--size=32M",
            &format!("--io_size={}", fio.bytes),
            &format!("--rate_iops={}", fio.iops),
            "--verify=crc32c",
            "--verify_fatal=1",
            "--fsync=32",
            &format!("--randseed={runs}"),
        ];
        let text = run_in(&dir.path(""), "fio", &args).success();
        assert!(text.contains("err= 0"), "{text}");
    }
    runs
}

/// Set when the test goes on and when it fails.
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn what_was_flushed_is_there_when_the_agent_is_killed_and_when_both_are() {
    let mut arena = Arena::new(None, "8MiB/s", seed());
    let mut node = arena.site.start(&arena.options);
    let mut agent = arena.site.agent("agent", &[]);
    let mut workers = arena.populate(&node, &agent, "web-", VOLUMES);
    for round in 0..AGENT_ROUNDS {
        arena.some_time(LIFE_MAX);
        all_well(&mut workers);
        // The server alone, after an agent died: what the dead agent had to send again is gone with it.
        match round % 3 {
            0 => {
                agent.kill();
                arena.agents_killed.fetch_add(1, Ordering::SeqCst);
            }
            1 => {
                agent.kill();
                arena.agents_killed.fetch_add(1, Ordering::SeqCst);
                node.kill();
                node = arena.site.start(&arena.options);
            }
            _ => {
                node.kill();
                agent.kill();
                arena.agents_killed.fetch_add(1, Ordering::SeqCst);
                node = arena.site.start(&arena.options);
            }
        }
        agent = arena.site.agent("agent", &[]);
    }
    let begun = Instant::now();
    let before = arena.answered.load(Ordering::SeqCst);
    // Every worker is at work again before the end.
    while arena.answered.load(Ordering::SeqCst) < before + 100 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the workers don't come back");
        all_well(&mut workers);
        std::thread::sleep(Duration::from_millis(10));
    }
    arena.judge(node, workers);
    println!("torture: {AGENT_ROUNDS} kills of the agent, {} requests judged", arena.answered.load(Ordering::SeqCst));
}
