//! The crash test in two passes: a scenario is run once to count its durable points, then again for each of them, with
//! the power cut right before and right after it. Everything is judged each time.

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use volley_server::platform::Platform;
use volley_server::platform::sim::{CrashPoint, SimStop};

use crate::model::After;
use crate::node::{Node, NodeSettings};
use crate::report::Report;
use crate::run::{LIMITS, Run};

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
const SCATTER: u64 = 100;

/// A life: requests in order, on a node of so many shards, ended by a clean stop.
struct Life {
    shards: usize,
    /// How many volumes each request to create some creates.
    creates: &'static [usize],
    /// At any moment of each of these requests a checkpoint starts.
    checkpoints: bool,
    requests: &'static [u64],
}

/// What a scenario is and the seeds of its ranges, its contents and what its crashes keep.
pub struct Scenario {
    /// As in the test's name.
    pub name: &'static str,
    seeds: Range<u64>,
    lives: &'static [Life],
}

/// Guests that write and flush; volumes that hydrate; a restart with more shards; deletion.
pub const WRITES_AND_FLUSHES: Scenario = Scenario {
    name: "writes_and_flushes",
    seeds: 1001..1002,
    lives: &[
        Life {
            shards: 1,
            creates: &[2, 4],
            checkpoints: false,
            requests: &[WRITE, WRITE, FLUSH, WRITE, READ, WRITE, FLUSH, ATTACH, WRITE, FLUSH, FETCH, WRITE, DETACH],
        },
        Life {
            shards: 3,
            creates: &[1],
            checkpoints: false,
            requests: &[WRITE, READ, FLUSH, RESUME, WRITE, FLUSH, DELETE, DELETE, DELETE],
        },
        Life { shards: 2, creates: &[], checkpoints: false, requests: &[WRITE, FLUSH, READ] },
    ],
};

/// Holes, fetches of all kinds and changes of the rate.
pub const HOLES_AND_FETCHES: Scenario = Scenario {
    name: "holes_and_fetches",
    seeds: 1002..1003,
    lives: &[
        Life {
            shards: 2,
            creates: &[3, 3],
            checkpoints: false,
            requests: &[DISCARD, FETCH, FETCH, FLUSH, ZERO, WRITE, FETCH, DISCARD, FLUSH, RATE, FETCH, FETCH, ZERO],
        },
        Life {
            shards: 1,
            creates: &[],
            checkpoints: false,
            requests: &[FETCH, DISCARD, FLUSH, READ, DELETE, DELETE, DELETE, WRITE, FLUSH],
        },
    ],
};

/// Flushes whose journal records span several disk sectors, each of which a crash may tear.
pub const FRAGMENTS: Scenario = Scenario {
    name: "fragments",
    seeds: 1003..1004,
    lives: &[
        Life {
            shards: 1,
            creates: &[4, 3],
            checkpoints: false,
            requests: &[FLUSH, FLUSH, FLUSH, FLUSH, FLUSH, FLUSH, SCATTER, SCATTER, SCATTER, SCATTER, SCATTER],
        },
        Life { shards: 2, creates: &[], checkpoints: false, requests: &[SCATTER, SCATTER, DISCARD, SCATTER] },
    ],
};

/// Many volumes at once: journal batches of several records over several disk sectors.
pub const BATCHES: Scenario = Scenario {
    name: "batches",
    seeds: 1004..1020,
    lives: &[Life { shards: 1, creates: &[8], checkpoints: false, requests: &[] }],
};

/// Checkpoints in the middle of creations: what is being committed belongs in them.
pub const CREATIONS_AND_CHECKPOINTS: Scenario = Scenario {
    name: "creations_and_checkpoints",
    seeds: 1020..1032,
    lives: &[Life { shards: 1, creates: &[1, 2, 2, 1, 2], checkpoints: true, requests: &[] }],
};

/// The longest wait before such a checkpoint: a creation takes about as long.
const CHECKPOINT_DELAY_MAX_US: u64 = 3000;

/// Runs both passes for every seed; returns how many crash points there were.
pub fn every_durable_point(scenario: &Scenario) -> Report {
    let mut report = Report::default();
    scenario.seeds.clone().for_each(|seed| both_passes(scenario, seed, &mut report));
    report
}

fn both_passes(scenario: &Scenario, seed: u64, report: &mut Report) {
    let (mut whole, end) = pass(scenario, seed, None);
    assert_eq!(end, Ok(()), "the first pass runs to its end");
    let points = whole.world.syncs() - whole.set_up_syncs;
    whole.world.crash();
    whole.judge("the whole scenario", After::PowerCut);
    for point in 1..=points {
        for when in [CrashPoint::Before, CrashPoint::After] {
            let (mut run, end) = pass(scenario, seed, Some((point, when)));
            if end == Ok(()) && when == CrashPoint::After {
                // Nobody waits for a sync behind the last fill: the device was still at it when the last life ended.
                run.world.crash();
            } else {
                assert_eq!(end, Err(SimStop::Crashed), "{when:?} durable point {point} of {points}");
            }
            run.judge(&format!("{when:?} durable point {point} of {points}"), After::PowerCut);
            run.final_life();
            let mut done = run.report();
            *done.happened.entry("power cut".into()).or_default() += 1;
            report.add(&done);
        }
    }
}

/// One run of the scenario up to a crash point.
fn pass(scenario: &Scenario, seed: u64, crash: Option<(u64, CrashPoint)>) -> (Run, Result<(), SimStop>) {
    let replay = format!("cargo test -p volley-server --test sim every_durable_point_of_{}", scenario.name);
    let run = Run::prepare(seed, crash, replay);
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
    for count in life.creates {
        let checkpoint = async {
            if life.checkpoints {
                let delay = run.guests.below(CHECKPOINT_DELAY_MAX_US);
                run.world.platform().sleep(Duration::from_micros(delay)).await;
                node.shards[0].checkpoint_now().await;
            }
        };
        futures::join!(run.guests.create(&node, *count), checkpoint);
    }
    for dice in life.requests {
        run.guests.request(&node, *dice).await;
    }
    node.stop().await;
}
