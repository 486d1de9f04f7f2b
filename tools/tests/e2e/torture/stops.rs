//! Processes that stand still for seconds, and a server that stays away longer than the agent's patience.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Arena, all_well, seed};
use crate::faults::eventually;
use crate::harness::{Agent, Node};

const ROUNDS: u64 = 4;
const STANDSTILL: Duration = Duration::from_secs(2);
/// Patience of the agent in the test of deadlines.
const DEADLINE: Duration = Duration::from_secs(3);

#[test]
fn a_standstill_of_either_is_a_pause_and_nothing_else() {
    let mut arena = Arena::new(None, "6MiB/s", seed());
    let node = arena.site.start(&arena.options);
    let agent = arena.site.agent("agent", &[]);
    let mut workers = arena.populate(&node, &agent, "web-", 2);
    for round in 0..ROUNDS {
        arena.some_time(Duration::from_millis(500));
        let stopped: &dyn Stopped = if round % 2 == 0 { &node } else { &agent };
        stopped.signal(libc::SIGSTOP);
        // The length of the standstill is what is tested.
        std::thread::sleep(STANDSTILL);
        stopped.signal(libc::SIGCONT);
        let before = arena.answered.load(Ordering::SeqCst);
        eventually("the guests go on", || arena.answered.load(Ordering::SeqCst) > before + 50);
        all_well(&mut workers);
    }
    arena.judge(node, workers);
    println!("torture: {ROUNDS} standstills, {} requests judged", arena.answered.load(Ordering::SeqCst));
}

trait Stopped {
    fn signal(&self, signal: libc::c_int);
}

impl Stopped for Node {
    fn signal(&self, signal: libc::c_int) {
        self.process().signal(signal);
    }
}

impl Stopped for Agent {
    fn signal(&self, signal: libc::c_int) {
        self.process().signal(signal);
    }
}

#[test]
fn guests_see_errors_past_the_deadline_and_not_before() {
    let mut arena = Arena::new(None, "6MiB/s", seed());
    let mut node = arena.site.start(&arena.options);
    let agent = arena.site.agent("agent", &["--deadline", &format!("{}s", DEADLINE.as_secs())]);
    let mut workers = arena.populate(&node, &agent, "web-", 2);
    // Away for less than the deadline: nobody notices (no error is tolerated yet).
    arena.some_time(Duration::from_millis(500));
    node.kill();
    node = arena.site.start(&arena.options);
    all_well(&mut workers);
    // Away until guests saw errors: each only after the deadline (`Tolerance::check`).
    arena.tolerance.deadline_ms.store(DEADLINE.as_millis() as u64, Ordering::SeqCst);
    node.kill();
    eventually("a guest sees an error", || arena.tolerance.seen.load(Ordering::SeqCst) >= 4);
    node = arena.site.start(&arena.options);
    let before = arena.answered.load(Ordering::SeqCst);
    eventually("the guests go on", || arena.answered.load(Ordering::SeqCst) > before + 200);
    all_well(&mut workers);
    let errors = arena.tolerance.seen.load(Ordering::SeqCst);
    arena.judge(node, workers);
    println!("torture: {errors} errors, all past the deadline of {DEADLINE:?}");
}
