//! Tests of the journal: the codec and replay as properties, each label of docs/journal.md, commits and checkpoints on
//! real files with injected failures.

mod bounds;
mod checkpoint;
mod codec;
mod commit;
mod crash;
mod directory;
mod harness;
mod labels;
mod model;
mod replay;
