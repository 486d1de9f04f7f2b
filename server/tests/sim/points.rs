//! The crash test in two passes: a scenario is run once to count its durable points, then again for each of them, with
//! the power cut right before and right after it. Everything is judged each time.

use std::rc::Rc;

use volley_server::platform::sim::{CrashPoint, RunLimits, SimStop};

use crate::model::After;
use crate::node::{Node, NodeSettings};
use crate::report::Report;
use crate::run::Run;

/// Throws of the guests' die: each is one kind of request (see `Guests::request`).
const READ: u64 = 0;
const WRITE: u64 = 30;
const FLUSH: u64 = 58;
const ZERO: u64 = 66;
const DISCARD: u64 = 71;
const FETCH: u64 = 77;
const ATTACH: u64 = 87;
const DETACH: u64 = 90;
const RATE: u64 = 97;
const RESUME: u64 = 98;
const DELETE: u64 = 99;

/// A life: requests in order, on a node of so many shards, ended by a clean stop.
struct Life {
    shards: usize,
    volumes: usize,
    requests: &'static [u64],
}

/// What a scenario is and the seed of its ranges and contents.
pub struct Scenario {
    seed: u64,
    lives: &'static [Life],
}

/// Guests that write and flush; volumes that hydrate; a restart with more shards; deletion.
pub const WRITES_AND_FLUSHES: Scenario = Scenario {
    seed: 1001,
    lives: &[
        Life {
            shards: 1,
            volumes: 2,
            requests: &[WRITE, WRITE, FLUSH, WRITE, READ, WRITE, FLUSH, ATTACH, WRITE, FLUSH, FETCH, WRITE, DETACH],
        },
        Life { shards: 3, volumes: 1, requests: &[WRITE, READ, FLUSH, RESUME, WRITE, FLUSH, DELETE, DELETE, DELETE] },
        Life { shards: 2, volumes: 0, requests: &[WRITE, FLUSH, READ] },
    ],
};

/// Holes, fetches of all kinds and changes of the rate.
pub const HOLES_AND_FETCHES: Scenario = Scenario {
    seed: 1002,
    lives: &[
        Life {
            shards: 2,
            volumes: 3,
            requests: &[DISCARD, FETCH, FETCH, FLUSH, ZERO, WRITE, FETCH, DISCARD, FLUSH, RATE, FETCH, FETCH, ZERO],
        },
        Life { shards: 1, volumes: 0, requests: &[FETCH, DISCARD, FLUSH, READ, DELETE, DELETE, DELETE, WRITE, FLUSH] },
    ],
};

const LIMITS: RunLimits = RunLimits { steps: 5_000_000, virtual_time: std::time::Duration::from_secs(3600) };

/// Runs both passes; returns how many crash points there were.
pub fn every_durable_point(scenario: &Scenario) -> Report {
    let mut report = Report::default();
    let (mut whole, end) = pass(scenario, None);
    assert_eq!(end, Ok(()), "the first pass runs to its end");
    let points = whole.world.syncs() - whole.set_up_syncs;
    whole.world.crash();
    whole.judge("the whole scenario", After::PowerCut);
    for point in 1..=points {
        for when in [CrashPoint::Before, CrashPoint::After] {
            let (mut run, end) = pass(scenario, Some((point, when)));
            assert_eq!(end, Err(SimStop::Crashed), "{when:?} durable point {point} of {points}");
            run.judge(&format!("{when:?} durable point {point} of {points}"), After::PowerCut);
            run.final_life();
            let mut done = run.report();
            *done.happened.entry("power cut".into()).or_default() += 1;
            report.add(&done);
        }
    }
    report
}

/// One run of the scenario up to a crash point.
fn pass(scenario: &Scenario, crash: Option<(u64, CrashPoint)>) -> (Run, Result<(), SimStop>) {
    let run = Run::prepare(scenario.seed, crash);
    for life in scenario.lives {
        let ended = run.world.run_within(LIMITS, live(&run, life));
        run.world.on_step(None);
        if ended.is_err() {
            return (run, ended);
        }
        run.guests.forget_attachments();
    }
    (run, Ok(()))
}

async fn live(run: &Run, life: &Life) {
    let settings = NodeSettings { shards: life.shards, ..NodeSettings::default() };
    let node = Node::start(&run.world.platform(), &run.objects, settings).await.expect("nothing fails here");
    let node = Rc::new(node);
    crate::inspector::watch(&run.world, 1, &node, &run.guests);
    for _ in 0..life.volumes {
        run.guests.create(&node).await;
    }
    for dice in life.requests {
        run.guests.request(&node, *dice).await;
    }
    node.stop().await;
}
