//! Deliberate bugs: the simulation must catch every one of them, or it proves nothing.
//!
//! Each [`Mutation`] stands at the place where the real bug would be, behind [`on`]. Without the cargo feature `mutations`
//! (which nothing but the mutation check turns on) `on` is the constant `false` and the compiler drops the branch. With
//! it, a test switches one mutation on for its own thread; no flag, file or request of a server can.

macro_rules! mutations {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// A bug, named by what the code does wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutation {
            $($(#[$doc])+ $name,)+
        }

        impl Mutation {
            pub const ALL: &[Mutation] = &[$(Mutation::$name,)+];
        }
    };
}

mutations! {
    /// The journal says that sectors are resident before their data is synced.
    RecordBeforeData,
    /// A flush syncs the data and forgets the residency map.
    FlushSkipsMap,
    /// A flush journals the map and forgets to sync the data.
    FlushSkipsDatasync,
    /// The first flush after a kill believes that what an earlier life wrote has reached the disk.
    FirstFlushTrustsEarlierLife,
    /// FUA is answered like any other write.
    FuaIgnored,
    /// The journal acknowledges what is only in its buffer.
    CommitWithoutSync,
    /// A durable priority fetch is answered when the chunk is resident.
    DurableFetchNotSynced,
    /// A fill writes the whole chunk, whatever of it the guest has written.
    FillIgnoresSectors,
    /// A fill decides which sectors to write before it has the chunk alone.
    FillDecidesBeforeLock,
    /// A fill does not take the chunk's lock.
    FillWithoutLock,
    /// A guest write is resident before its data is in the file.
    ResidentBeforeWritten,
    /// A discard marks sectors as zeroes without making them so.
    ZeroWithoutPunch,
    /// Write-zeroes of a part of a sector zeroes the whole.
    ZeroRoundsOutward,
    /// A zero chunk becomes resident whatever the file holds there.
    ZeroFillTrustsFile,
    /// A write to a part of a sector forgets the rest of it.
    EdgeWithoutOldContent,
    /// A fetch ends with its first caller.
    FetchEndsWithCaller,
    /// The same chunk is fetched again for every caller.
    SingleFlightBroken,
    /// A chunk's digest is not compared.
    DigestNotChecked,
    /// A fetch that failed is answered with zeroes.
    FailedFetchIsZeroes,
    /// Requests of an older generation are served.
    StaleGenerationAccepted,
    /// A connection that was replaced goes on writing.
    OldConnectionAccepted,
    /// A write that waited for its locks does not look again who is attached.
    ClaimNotCheckedAgain,
    /// An attach is answered while writes of the older host are on their way to the disk.
    AttachOvertakesWrites,
    /// A new generation is not made durable.
    GenerationNotJournaled,
    /// A deletion is not journaled.
    DeletionNotJournaled,
    /// A deletion is journaled before the file's new name is durable.
    DeletionBeforeItsName,
    /// The directory is not synced after a volume's file was made.
    DirectoryNotSynced,
    /// A checkpoint forgets volumes whose creation is being committed.
    CheckpointForgetsCreating,
    /// A checkpoint dumps residency whose data is not synced.
    CheckpointDumpsUnsynced,
    /// Records appended while a checkpoint runs are not in its segment.
    CheckpointDropsAppends,
    /// A batch that fails its checksum is replayed.
    TornBatchAccepted,
    /// A restart forgets the volumes of the last shard of an earlier life.
    RestartLosesPartition,
    /// The superblock takes its name before it is synced.
    SuperblockNotSynced,
    /// What comes back from the disk cache is served without its digest.
    SlotNotVerified,
    /// A slot of the disk cache is served as the chunk it says it holds, whichever was asked for.
    SlotOfAnotherChunk,
    /// Volumes clone from the base what is not written there yet.
    PlaceBeforeItsBytes,
    /// A place in the base is punched while a volume is about to clone from it.
    LentPlacePunched,
    /// Of volumes that want to hydrate the one with the latest deadline is the next.
    LatestDeadlineFirst,
    /// A guest's write is not counted as a change.
    ChangeNotNoted,
    /// What guests changed while a snapshot was taken is forgotten with its commit.
    ChangesSinceCutForgotten,
    /// A write does not put aside what a snapshot still needs.
    WriteOvertakesCapture,
    /// A snapshot is cut while writes are at the disk.
    CutDoesNotWaitForWrites,
    /// A rollback leaves chunks resident that differ.
    RollbackKeepsResidency,
    /// A guest's write goes to the disk before the journal has it that the chunk may change.
    ChangeNotAnnounced,
    /// A snapshot becomes the base while what was captured of it is not durable in the volume.
    BaseBeforeSync,
    /// Of a write to several chunks only the first one's old content is put aside for a snapshot.
    SecondChunkOvertakesCapture,
    /// A snapshot that was given up counts as one that was taken.
    GivenUpForgetsChanges,
    /// A checkpoint forgets what guests changed since the last snapshot.
    CheckpointForgetsChanges,
    /// A rollback does not wait for chunks on their way to the disk.
    RollbackOvertakesFills,
    /// A snapshot goes on with a volume that was rolled back since it was looked up.
    CutOfAnotherVolume,
    /// A volume is deleted while it is being rolled back.
    DeletionDuringRollback,
    /// A collection does not wait for the imports that were open when it condemned.
    CollectionIgnoresImports,
    /// A snapshot is deleted under the volumes that need it.
    DeletionIgnoresReferences,
}

/// Whether the bug is switched on.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
#[must_use]
pub const fn on(_: Mutation) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use switch::{active, on, with};

#[cfg(feature = "mutations")]
mod switch {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// The bug that is switched on in this thread.
    #[must_use]
    pub fn active() -> Option<Mutation> {
        ACTIVE.get()
    }

    /// Whether the bug is switched on in this thread.
    #[must_use]
    pub fn on(mutation: Mutation) -> bool {
        active() == Some(mutation)
    }

    /// Runs `f` with one bug switched on in this thread; off again also when `f` panics.
    pub fn with<T>(mutation: Mutation, f: impl FnOnce() -> T) -> T {
        struct Off;
        impl Drop for Off {
            fn drop(&mut self) {
                ACTIVE.set(None);
            }
        }
        ACTIVE.set(Some(mutation));
        let _off = Off;
        f()
    }
}
