//! A finding: what is wrong, how bad it is, and what to do about it. The kinds are a closed list with one advice each.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// What a crash leaves and a start tidies, or what does not concern Volley. A check with notes only is clean.
    Note,
    /// Something that should not be so and may be harmless: a person has to look.
    Warning,
    /// Data or knowledge of data is lost.
    Damage,
}

/// What was found. The names are stable; docs/data-directory.md explains each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    NodeLost,
    BatchDamaged,
    JournalLost,
    JournalDamaged,
    StoreLost,
    StoreUnknown,
    VolumeDuplicate,
    VolumeMisplaced,
    FileMissing,
    FileUnreadable,
    FileShort,
    FileLong,
    FileAmbiguous,
    ChunkHole,
    ChunkDiffers,
    NoData,
    SnapshotLost,
    FileOrphaned,
    NotClosed,
    TornTail,
    FileUnsized,
    DeletionUnfinished,
    CreationUnfinished,
    CacheCorrupt,
    CacheStale,
    CacheUnusable,
    Leftover,
    Foreign,
}

impl Kind {
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            Kind::NodeLost | Kind::JournalLost | Kind::JournalDamaged | Kind::StoreLost => Severity::Damage,
            Kind::StoreUnknown | Kind::VolumeDuplicate | Kind::VolumeMisplaced => Severity::Damage,
            Kind::FileMissing | Kind::FileUnreadable | Kind::FileShort | Kind::FileAmbiguous => Severity::Damage,
            Kind::ChunkHole | Kind::ChunkDiffers | Kind::SnapshotLost => Severity::Damage,
            Kind::FileLong | Kind::NoData | Kind::FileOrphaned | Kind::BatchDamaged => Severity::Warning,
            Kind::NotClosed | Kind::TornTail | Kind::FileUnsized | Kind::DeletionUnfinished => Severity::Note,
            Kind::CreationUnfinished | Kind::Leftover | Kind::Foreign => Severity::Note,
            Kind::CacheCorrupt | Kind::CacheStale | Kind::CacheUnusable => Severity::Note,
        }
    }

    /// What to do.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Kind::NodeLost => "restore node.toml from a backup",
            Kind::JournalLost => "restore the journal directory from a backup, or mount its filesystem",
            Kind::JournalDamaged => {
                "check the disk, and restore the journal directory and the volume stores from a backup"
            }
            Kind::StoreLost => "mount its filesystem, or name its place with --store LABEL=PATH",
            Kind::StoreUnknown => "configure the store again, or restore node.toml",
            Kind::VolumeDuplicate => "export both files before you delete one of the volumes",
            Kind::VolumeMisplaced => "restore the journal directory from a backup",
            Kind::FileMissing => "restore the file from a backup, or delete the volume",
            Kind::FileUnreadable => "check the disk and the file's owner and mode",
            Kind::FileShort => "restore the file from a backup, or delete the volume",
            Kind::BatchDamaged => {
                "remove the file: its volumes are not affected, but a batch that was not complete stays so"
            }
            Kind::FileLong => "find out who wrote to the file; what lies past the end is never read",
            Kind::FileAmbiguous => "move one of the two away before a start replaces the .raw by the .deleted",
            Kind::ChunkHole => "restore the file from a backup, or create the volume anew from its snapshot",
            Kind::ChunkDiffers => "check the disk, and create the volume anew from its snapshot",
            Kind::NoData => "check again with --object-store, which tells; a volume of zeroes is sound",
            Kind::SnapshotLost => {
                "restore the snapshot in the object store: chunks that are not resident are only there"
            }
            Kind::FileOrphaned => "keep it if the journal was restored from a backup; else remove it",
            Kind::NotClosed | Kind::TornTail => "nothing: the next start recovers",
            Kind::FileUnsized => "nothing: the next access makes it whole, and no data was in it",
            Kind::DeletionUnfinished => {
                "nothing: the next start ends the deletion, or undoes it if it was never acknowledged"
            }
            Kind::CreationUnfinished => "remove it: its creation was never acknowledged and it holds no data",
            Kind::CacheCorrupt => {
                "nothing: they are fetched again; if there are many, or more each time, check the disk"
            }
            Kind::CacheStale => "nothing: they are fetched again",
            Kind::CacheUnusable => "nothing: the next start makes it anew; if it does not, remove the file",
            Kind::Leftover => "nothing: the next start removes or replaces it",
            Kind::Foreign => "nothing: Volley leaves it alone",
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub kind: Kind,
    pub path: PathBuf,
    /// What is wrong and what it costs, without the path.
    pub message: String,
    pub advice: &'static str,
}

impl Finding {
    pub(super) fn new(kind: Kind, path: &Path, message: String) -> Finding {
        Finding { severity: kind.severity(), kind, path: path.to_path_buf(), message, advice: kind.advice() }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Damage => "damage",
        })
    }
}

/// One line.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}. {}.", self.severity, self.path.display(), self.message, capitalised(self.advice))
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
