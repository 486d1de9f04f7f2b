//! The stages of a request, and which functions are whose.

use serde::Serialize;

use super::stacks::Stack;

/// A part of what a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stage {
    pub name: &'static str,
    /// What it is, for people.
    pub what: &'static str,
    /// A frame is of this stage if its name contains one of these.
    patterns: &'static [&'static str],
}

const IDLE: &str = "idle";
const RUNTIME: &str = "runtime";
/// The runtime has no task to run under these: it polls for a while (`idle_poll`), or goes to sleep and wakes up.
const WAITING: [&str; 2] = ["Reactor::spin_poll_io", "parking::Parker::park"];
/// The name of what is dropped may name everything; it counts for whoever drops it.
const DROPS: &str = "core::ptr::drop_in_place";

/// A stack belongs to the stage of its innermost frame that any stage has a pattern for: what `memcpy` does for the decoder
/// is decoding. Where several stages have a pattern for that frame, the first of them counts, so what is narrow stands
/// before what is wide. What the runtime does while it waits is idle. Stacks without such a frame are of the last stage.
pub const STAGES: &[Stage] = &[
    Stage {
        name: IDLE,
        what: "nothing to do: polling before sleep, going to sleep, waking up",
        patterns: &[
            "io_cqring_wait",
            "schedule_timeout",
            "schedule_hrtimeout",
            "futex_wait",
            "do_epoll_wait",
            "link_rings_and_sleep",
            "SleepNotifier::prepare_to_sleep",
        ],
    },
    Stage {
        name: "cross-shard",
        what: "requests and answers between shards",
        patterns: &[
            "volley_server::shard::mesh",
            "shard::Shard<P,O>::forward",
            "glommio_ng::channels",
            "process_shared_channels",
            "SleepNotifier::queue_waker",
        ],
    },
    Stage {
        name: "socket",
        what: "receive: what arrives, and word of it",
        patterns: &[
            "sys_recvfrom",
            "__libc_recv",
            "sys_recvmsg",
            "tcp_recvmsg",
            "unix_stream_recvmsg",
            "io_poll_add",
            "io_poll_check_events",
            "io_poll_task_func",
            "io_poll_wake",
            "io_recv",
            "poll_read",
            "yolo_recv",
            "ReceiveBuffer",
            "StreamReader",
            "ByteReader",
            "sys_accept",
            "io_accept",
        ],
    },
    Stage {
        name: "send",
        what: "what leaves: the peer's side of a local connection runs in it too",
        patterns: &[
            "sys_sendto",
            "__send",
            "sys_sendmsg",
            "tcp_sendmsg",
            "unix_stream_sendmsg",
            "io_send",
            "poll_write",
            "yolo_send",
            "StreamWriter",
            "ByteWriter",
            "connection::write_replies",
            "Session::next_output",
        ],
    },
    Stage {
        name: "encode",
        what: "replies to frames",
        patterns: &[
            "volley_protocol::encode",
            "FrameHeader::to_bytes",
            "connection::convert::reply",
            "connection::session::Session::reply",
        ],
    },
    Stage {
        name: "decode",
        what: "frames to requests",
        patterns: &[
            "volley_protocol::",
            "connection::convert::request",
            "connection::reader::",
            "connection::session::",
        ],
    },
    Stage {
        name: "disk",
        what: "files of volumes, journal and disk cache",
        patterns: &[
            "io_read",
            "io_write",
            "io_fsync",
            "io_fallocate",
            "io_prep_rw",
            "io_openat",
            "io_statx",
            "blkdev_",
            "blk_finish_plug",
            "blk_mq_",
            "submit_bio",
            "iomap_",
            "ext4_",
            "xfs_",
            "btrfs_",
            "sys_fdatasync",
            "sys_fallocate",
            "sys_pwrite",
            "sys_pread",
            "glommio_ng::io::",
            "Reactor::read_dma",
            "Reactor::write_dma",
            "Reactor::fdatasync",
            "dma_buffer",
            "platform::glommio::file",
            "platform::glommio::clones",
            "volley_server::journal",
            "volley_server::cache::disk",
        ],
    },
    Stage {
        name: "store",
        what: "object store: read, decompress, compare digests",
        patterns: &[
            "volley_server::object_store",
            "volley_server::snapshot",
            "volley_server::transfer::get",
            "platform::glommio::http",
            "ZSTD_",
            "HUF_",
            "zstd",
            "blake3",
        ],
    },
    Stage {
        name: "cache",
        what: "chunks in memory, and who gets which",
        patterns: &["volley_server::cache", "volley_server::transfer", "shard::near", "shard::caching"],
    },
    Stage {
        name: "look-up",
        what: "volumes, residency, and what a request does with them",
        patterns: &["volley_server::shard", "volley_server::batch", "volley_server::metrics", "volley_server::budget"],
    },
    Stage {
        name: RUNTIME,
        what: "tasks, timers, and the ring beside the stages above",
        patterns: &[
            "glommio_ng::",
            "futures_task::",
            "futures_core::",
            "sys_io_uring_enter",
            "sys_membarrier",
            "tctx_task_work",
            "io_wq_worker",
            // The loop of an executor.
            "scoped_tls::ScopedKey",
            "as volley_server::platform::Platform>",
        ],
    },
    Stage { name: "other", what: "everything else", patterns: &[] },
];

/// A stage's part of all samples.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub stage: &'static Stage,
    pub percent: f64,
}

/// The stage that a stack belongs to.
#[must_use]
pub fn of(stack: &Stack<'_>) -> &'static Stage {
    let has = |frame: &str, patterns: &[&str]| patterns.iter().any(|pattern| frame.contains(pattern));
    let of_frame = |frame: &&str| STAGES.iter().find(|stage| !frame.starts_with(DROPS) && has(frame, stage.patterns));
    let stage = stack.frames.iter().rev().find_map(of_frame).unwrap_or(&STAGES[STAGES.len() - 1]);
    let waits = stage.name == RUNTIME && stack.frames.iter().any(|frame| has(frame, &WAITING));
    STAGES.iter().find(|stage| waits && stage.name == IDLE).unwrap_or(stage)
}

/// Each stage's part, in the order of the table; together 100 % unless there is no sample at all.
#[must_use]
pub fn shares(stacks: &[Stack<'_>]) -> Vec<Share> {
    let all: u64 = stacks.iter().map(|stack| stack.samples).sum();
    let part = |stage: &'static Stage| {
        let mine = stacks.iter().filter(|stack| of(stack).name == stage.name);
        let samples: u64 = mine.map(|stack| stack.samples).sum();
        Share { stage, percent: samples as f64 * 100.0 / all.max(1) as f64 }
    };
    STAGES.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::super::stacks::parse;
    use super::*;

    /// Real stacks, each behind the stage it belongs to.
    const SAMPLES: &str = include_str!("samples/stages.txt");

    fn samples() -> Vec<(&'static str, Stack<'static>)> {
        let sample = |line: &'static str| {
            let (stage, folded) = line.split_once(' ').expect("a stage and a stack");
            (stage, parse(folded).expect("a stack").remove(0))
        };
        SAMPLES.lines().map(sample).collect()
    }

    #[test]
    fn each_sample_belongs_to_its_stage() {
        for (stage, stack) in samples() {
            assert_eq!(of(&stack).name, stage, "{:?}", stack.frames);
        }
    }

    #[test]
    fn each_stage_has_a_sample() {
        for stage in STAGES {
            assert!(samples().iter().any(|(name, _)| *name == stage.name), "{} has none", stage.name);
        }
    }

    #[test]
    fn the_stages_are_the_whole() {
        let stacks: Vec<Stack<'_>> = samples().into_iter().map(|(_, stack)| stack).collect();
        let shares = shares(&stacks);
        let sum: f64 = shares.iter().map(|share| share.percent).sum();
        assert!((sum - 100.0).abs() < 1e-9, "{shares:?}");
        assert_eq!(shares.last().map(|share| share.stage.name), Some("other"));
        assert_eq!(super::shares(&[]).iter().map(|share| share.percent).sum::<f64>(), 0.0);
    }

    #[test]
    fn the_innermost_frame_decides_and_then_the_first_stage() {
        let stage = |folded: &str| of(&parse(folded).expect("a stack")[0]).name;
        let caller = "glommio_ng::task::raw::RawTask<F,R,S>::run;volley_server::connection::reader::read_requests";
        assert_eq!(stage(&format!("{caller} 1")), "decode");
        assert_eq!(stage(&format!("{caller};volley_protocol::encode::close;memcpy 1")), "encode");
        assert_eq!(stage("volley_server::shard::mesh::Mesh::send 1"), "cross-shard", "narrower than look-up");
        assert_eq!(stage(&format!("{caller};volley_protocol::header::FrameHeader::to_bytes 1")), "encode");
        let ring = "glommio_ng::sys::uring::Reactor::poll_io";
        assert_eq!(stage(&format!("glommio_ng::executor::LocalExecutor::run;{ring} 1")), "runtime");
        assert_eq!(stage(&format!("glommio_ng::reactor::Reactor::spin_poll_io;{ring} 1")), "idle");
        assert_eq!(stage(&format!("glommio_ng::reactor::Reactor::spin_poll_io;{ring};io_poll_add_[k] 1")), "socket");
        let dropped = "core::ptr::drop_in_place<volley_server::object_store::any::AnyStore>";
        assert_eq!(stage(&format!("{caller};{dropped};mi_free 1")), "decode");
        assert_eq!(stage("main;nobody's 1"), "other");
    }
}
