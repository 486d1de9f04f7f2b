//! The mutation check: every deliberate bug must be caught, within a bounded number of seeds, by the same runs that pass
//! without it.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use volley_server::mutation::{self, Mutation};

use crate::deadlines;
use crate::points::{self, Scenario};
use crate::races;
use crate::run;

/// A bug that this many seeds and the two-pass crash tests do not catch is a hole in the proof.
const SEEDS_MAX: u64 = 40;

const SCENARIOS: [&Scenario; 5] = [
    &points::CREATIONS_AND_CHECKPOINTS,
    &points::BATCHES,
    &points::FRAGMENTS,
    &points::WRITES_AND_FLUSHES,
    &points::HOLES_AND_FETCHES,
];

/// Runs until something complains; returns after how many seeds, and the complaint.
fn caught(mutation: Mutation) -> Option<(String, String)> {
    let complaint = |run: &dyn Fn()| {
        let panic = catch_unwind(AssertUnwindSafe(|| mutation::with(mutation, run))).err()?;
        let text = panic.downcast_ref::<String>().cloned();
        Some(text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default())
    };
    let seeds = |mut seeds: Range<u64>| {
        seeds.find_map(|seed| Some((format!("seed {seed}"), complaint(&|| drop(run::seed(seed)))?)))
    };
    let points = |scenario: &Scenario| {
        let text = complaint(&|| drop(points::every_durable_point(scenario)))?;
        Some((format!("crash points of {}", scenario.name), text))
    };
    let order = || Some(("the order of deadlines".to_owned(), complaint(&deadlines::the_earliest_is_first)?));
    let races = || Some(("races with a snapshot".to_owned(), complaint(&races::others_come_in_between)?));
    // These two take no longer than a few seeds.
    let found = order().or_else(races).or_else(|| seeds(0..SEEDS_MAX));
    found.or_else(|| SCENARIOS.into_iter().find_map(points))
}

fn check(mutation: Mutation) {
    let Some((effort, text)) = caught(mutation) else {
        panic!("{mutation:?} is not caught by {SEEDS_MAX} seeds and the crash tests: a hole in the simulation");
    };
    let short: String = text.chars().take(160).collect();
    println!("mutation {mutation:?}: caught after {effort}: {}", short.replace('\n', " "));
}

macro_rules! mutations {
    ($($name:ident $mutation:ident)*) => {
        $(#[test] fn $name() { check(Mutation::$mutation); })*

        #[test]
        fn every_mutation_has_its_test() {
            let tested = [$(Mutation::$mutation),*];
            assert!(Mutation::ALL.iter().all(|mutation| tested.contains(mutation)));
        }
    };
}

mutations! {
    record_before_data RecordBeforeData
    flush_skips_map FlushSkipsMap
    flush_skips_datasync FlushSkipsDatasync
    first_flush_trusts_earlier_life FirstFlushTrustsEarlierLife
    fua_ignored FuaIgnored
    commit_without_sync CommitWithoutSync
    durable_fetch_not_synced DurableFetchNotSynced
    fill_ignores_sectors FillIgnoresSectors
    fill_decides_before_lock FillDecidesBeforeLock
    fill_without_lock FillWithoutLock
    resident_before_written ResidentBeforeWritten
    zero_without_punch ZeroWithoutPunch
    zero_rounds_outward ZeroRoundsOutward
    zero_fill_trusts_file ZeroFillTrustsFile
    edge_without_old_content EdgeWithoutOldContent
    fetch_ends_with_caller FetchEndsWithCaller
    single_flight_broken SingleFlightBroken
    digest_not_checked DigestNotChecked
    failed_fetch_is_zeroes FailedFetchIsZeroes
    stale_generation_accepted StaleGenerationAccepted
    old_connection_accepted OldConnectionAccepted
    claim_not_checked_again ClaimNotCheckedAgain
    attach_overtakes_writes AttachOvertakesWrites
    generation_not_journaled GenerationNotJournaled
    deletion_not_journaled DeletionNotJournaled
    deletion_before_its_name DeletionBeforeItsName
    directory_not_synced DirectoryNotSynced
    checkpoint_forgets_creating CheckpointForgetsCreating
    checkpoint_dumps_unsynced CheckpointDumpsUnsynced
    checkpoint_drops_appends CheckpointDropsAppends
    torn_batch_accepted TornBatchAccepted
    restart_loses_partition RestartLosesPartition
    superblock_not_synced SuperblockNotSynced
    slot_not_verified SlotNotVerified
    slot_of_another_chunk SlotOfAnotherChunk
    place_before_its_bytes PlaceBeforeItsBytes
    lent_place_punched LentPlacePunched
    latest_deadline_first LatestDeadlineFirst
    change_not_noted ChangeNotNoted
    changes_since_cut_forgotten ChangesSinceCutForgotten
    write_overtakes_capture WriteOvertakesCapture
    cut_does_not_wait_for_writes CutDoesNotWaitForWrites
    rollback_keeps_residency RollbackKeepsResidency
    change_not_announced ChangeNotAnnounced
    base_before_sync BaseBeforeSync
    second_chunk_overtakes_capture SecondChunkOvertakesCapture
    given_up_forgets_changes GivenUpForgetsChanges
    checkpoint_forgets_changes CheckpointForgetsChanges
    rollback_overtakes_fills RollbackOvertakesFills
    cut_of_another_volume CutOfAnotherVolume
    deletion_during_rollback DeletionDuringRollback
    collection_ignores_imports CollectionIgnoresImports
    deletion_ignores_references DeletionIgnoresReferences
}

/// The same runs pass when no mutation is on: what catches is the bug and not the feature.
#[test]
fn nothing_is_caught_without_a_mutation() {
    for seed in 0..5 {
        run::seed(seed);
    }
}
