//! The fetch queue: single flight, promotion, merging, reserved slots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::{ChunkSource, FetchClass, FetchQueue, GateLimits, GetPlan, Next, QueueLimits};
use crate::platform::Time;
use crate::snapshot::{ChunkEntry, Encoding};
use crate::transfer::ledger::Origin;

const GATE: GateLimits =
    GateLimits { gets_max: 4, gets_background_max: 2, bytes_per_second: None, gets_per_second: None };
const LIMITS: QueueLimits = QueueLimits { gate: GATE, get_bytes_max: 400, share: true };
const NOW: Time = Time(0);

/// The next GET, if one may start.
fn next<W>(queue: &mut FetchQueue<W>) -> Option<GetPlan> {
    match queue.next_get(NOW) {
        Next::Start(plan) => Some(plan),
        Next::After(_) | Next::Idle => None,
    }
}

/// Chunk `n` of 100 stored bytes in a pack of 50.
fn source(n: u64) -> ChunkSource {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&n.to_le_bytes());
    let (pack, offset, stored_len) = ((n / 50) as u32, n % 50 * 100, 100);
    let entry = ChunkEntry::Stored { pack, offset, stored_len, encoding: Encoding::Raw, digest };
    ChunkSource {
        pack_key: Arc::from(format!("packs/p/{pack}")),
        entry,
        digest,
        offset,
        stored_len,
        chunk_len: 100,
        origin: Arc::new(Origin { snapshot: Arc::from("s"), batch: None }),
    }
}

fn number(source: &ChunkSource) -> u64 {
    u64::from_le_bytes(source.digest[..8].try_into().unwrap())
}

fn numbers(plan: &GetPlan) -> Vec<u64> {
    plan.sources.iter().map(number).collect()
}

#[test]
fn neighbours_are_merged_up_to_the_limit_and_never_across_packs() {
    let mut queue = FetchQueue::new(LIMITS, NOW);
    (47..54).for_each(|n| assert!(!queue.push(source(n), FetchClass::Background, n, NOW)));
    assert_eq!(numbers(&next(&mut queue).unwrap()), [47, 48, 49]);
    let second = next(&mut queue).unwrap();
    assert_eq!((numbers(&second), second.range.clone(), second.slice(2)), (vec![50, 51, 52, 53], 0..400, 200..300));
}

#[test]
fn priority_jumps_the_queue_and_has_reserved_slots() {
    let mut queue = FetchQueue::new(LIMITS, NOW);
    [0, 10, 20, 30].into_iter().for_each(|n| assert!(!queue.push(source(n), FetchClass::Background, n, NOW)));
    assert_eq!(numbers(&next(&mut queue).unwrap()), [0]);
    assert_eq!(numbers(&next(&mut queue).unwrap()), [10]);
    assert_eq!(next(&mut queue), None, "background is at its bound");
    assert!(!queue.push(source(40), FetchClass::Priority, 40, NOW));
    assert_eq!(numbers(&next(&mut queue).unwrap()), [40], "the reserved slot is priority's");
    queue.gate.done(FetchClass::Background);
    assert_eq!(numbers(&next(&mut queue).unwrap()), [20]);
}

#[test]
fn joining_promotes_a_queued_fetch_and_adds_a_waiter_to_one_in_flight() {
    let mut queue = FetchQueue::new(LIMITS, NOW);
    [0, 10, 20].into_iter().for_each(|n| assert!(!queue.push(source(n), FetchClass::Background, n, NOW)));
    assert!(queue.push(source(20), FetchClass::Priority, 999, NOW));
    let plan = next(&mut queue).unwrap();
    assert_eq!((numbers(&plan), plan.class), (vec![20], FetchClass::Priority));
    assert!(!queue.is_promoted(&source(20).digest), "started as priority: nothing to inherit");
    let other = next(&mut queue).unwrap();
    assert!(queue.push(other.sources[0].clone(), FetchClass::Priority, 7, NOW));
    assert!(queue.is_promoted(&other.sources[0].digest));
    assert!(queue.push(source(20), FetchClass::Priority, 1000, NOW), "in flight: joined, not fetched again");
    assert_eq!(queue.take_waiters(&source(20).digest), [20, 999, 1000]);
    assert!(!queue.push(source(20), FetchClass::Background, 5, NOW), "ended: a new request is a new fetch");
}

proptest! {
    /// Any interleaving: one flight per chunk at a time, every waiter answered exactly once, bounds kept.
    #[test]
    fn single_flight_and_no_waiter_lost(ops in prop::collection::vec((0_u64..120, 0_u8..5), 1..400)) {
        let mut queue = FetchQueue::new(LIMITS, NOW);
        let mut flying: Vec<GetPlan> = Vec::new();
        let mut waiting: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
        let end = |queue: &mut FetchQueue<usize>, plan: GetPlan, waiting: &mut BTreeMap<u64, BTreeSet<usize>>| {
            for source in &plan.sources {
                let answered: BTreeSet<usize> = queue.take_waiters(&source.digest).into_iter().collect();
                assert_eq!(Some(answered), waiting.remove(&number(source)));
            }
            queue.gate.done(plan.class);
        };
        for (id, (n, op)) in ops.into_iter().enumerate() {
            match op {
                0 | 1 => {
                    let class = if op == 0 { FetchClass::Priority } else { FetchClass::Background };
                    let joined = queue.push(source(n), class, id, NOW);
                    prop_assert_eq!(joined, waiting.contains_key(&n));
                    waiting.entry(n).or_default().insert(id);
                }
                2 if !flying.is_empty() => { let plan = flying.remove(n as usize % flying.len()); end(&mut queue, plan, &mut waiting); }
                _ => if let Some(plan) = next(&mut queue) {
                    prop_assert!(plan.range.end - plan.range.start <= 400);
                    flying.push(plan);
                }
            }
            prop_assert!(flying.len() <= 4);
            prop_assert!(flying.iter().filter(|p| p.class != FetchClass::Priority).count() <= 2);
            let mut all: Vec<u64> = flying.iter().flat_map(numbers).collect();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len(), count, "a chunk is in two GETs");
        }
        loop {
            while let Some(plan) = next(&mut queue) { flying.push(plan); }
            let Some(plan) = flying.pop() else { break };
            end(&mut queue, plan, &mut waiting);
        }
        prop_assert!(waiting.is_empty(), "waiters never answered: {waiting:?}");
    }
}
