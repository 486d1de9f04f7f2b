//! The client against a fake node over real sockets: everything it promises when connections and servers die.

mod fake;

use std::time::Duration;

use bytes::Bytes;
use fake::{Act, FakeNode, SIZE};
use volley_client::{Client, ErrorKind, FetchUntil, Options, Status, Volume};
use volley_protocol::Op;

const MIB: usize = 1 << 20;

async fn connect(node: &FakeNode) -> Client {
    let options = Options { deadline: Duration::from_secs(20), ..Options::default() };
    Client::connect(&node.address(), options).await.unwrap()
}

async fn one_volume() -> (FakeNode, Volume) {
    let node = FakeNode::start(1, &["web-1"]).await;
    let volume = connect(&node).await.attach("web-1").await.unwrap();
    (node, volume)
}

fn block(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 4096])
}

async fn first_byte(volume: &Volume, offset: u64) -> u8 {
    volume.read(offset, 512).await.unwrap()[0]
}

#[tokio::test]
async fn all_requests_work() {
    let (node, volume) = one_volume().await;
    assert_eq!((volume.name(), volume.size_bytes(), volume.generation()), ("web-1", SIZE as u64, 1));
    volume.write(4096, block(1), false).await.unwrap();
    volume.write(8192, block(2), true).await.unwrap();
    assert_eq!(first_byte(&volume, 4096).await, 1);
    volume.write_zeroes(4096, 512, true).await.unwrap();
    volume.discard(8192, 4096).await.unwrap();
    assert_eq!((first_byte(&volume, 4096).await, first_byte(&volume, 8192).await), (0, 0));
    volume.priority_fetch(0, SIZE as u64, FetchUntil::Durable).await.unwrap();
    volume.flush().await.unwrap();
    assert_eq!(volume.residency_wait(8).await.unwrap(), 9);
    let residency = volume.residency(0, u64::MAX).await.unwrap();
    assert_eq!(residency.extents.iter().map(|e| e.len_bytes).sum::<u64>(), SIZE as u64);
    let error = volume.stat().await.unwrap_err();
    assert_eq!((error.kind, error.status), (ErrorKind::Bug, Some(Status::Internal)));
    let error = volume.read(SIZE as u64, 512).await.unwrap_err();
    assert_eq!((error.kind, error.status), (ErrorKind::Invalid, Some(Status::OutOfRange)));
    assert_eq!(volume.read(0, 0).await.unwrap_err().kind, ErrorKind::Invalid);
    let other = volume.clone();
    volume.detach().await.unwrap();
    assert_eq!(other.read(0, 512).await.unwrap_err().kind, ErrorKind::Closed);
    assert_eq!(node.lock().count(Op::Detach), 1);
}

#[tokio::test]
async fn names_and_sizes_are_learnt_without_fencing() {
    let node = FakeNode::start(2, &["a", "b", "c", "d", "e", "f", "g"]).await;
    let client = connect(&node).await;
    assert_eq!(client.volumes().await.unwrap(), ["a", "b", "c", "d", "e", "f", "g"]);
    let volume = client.attach("c").await.unwrap();
    assert_eq!(client.lookup("c").await.unwrap().generation, volume.generation());
    assert_eq!(client.lookup("nope").await.unwrap_err().kind, ErrorKind::NotFound);
    volume.write(0, block(1), false).await.unwrap();
}

#[tokio::test]
async fn each_volume_uses_the_shard_that_owns_it() {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let node = FakeNode::start(2, &names).await;
    let client = connect(&node).await;
    for name in names {
        client.attach(name).await.unwrap().write(0, block(1), false).await.unwrap();
    }
    let mut want: Vec<u32> = names.iter().map(|n| u32::from(volley_protocol::name_tag(n) % 2)).collect();
    let seen = node.lock().seen.clone();
    let mut got: Vec<u32> = seen.iter().filter(|(_, op)| *op == Op::Write).map(|(shard, _)| *shard).collect();
    want.sort_unstable();
    got.sort_unstable();
    assert_eq!(got, want);
    assert!(want.contains(&0) && want.contains(&1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_out_of_order_reach_their_requests() {
    let (node, volume) = one_volume().await;
    for i in 0..16u8 {
        volume.write(u64::from(i) * 4096, block(i), false).await.unwrap();
    }
    node.lock().reverse = 16;
    let reads: Vec<_> = (0..16u8)
        .map(|i| {
            let volume = volume.clone();
            tokio::spawn(async move { (i, first_byte(&volume, u64::from(i) * 4096).await) })
        })
        .collect();
    for read in reads {
        let (want, got) = read.await.unwrap();
        assert_eq!(got, want);
    }
}

#[tokio::test]
async fn large_requests_are_split() {
    let (node, volume) = one_volume().await;
    let data: Vec<u8> = (0..3 * MIB + 512).map(|i| (i / 512 % 251) as u8).collect();
    volume.write(512, Bytes::from(data.clone()), true).await.unwrap();
    assert_eq!(volume.read(512, data.len()).await.unwrap(), data);
    volume.discard(0, SIZE as u64).await.unwrap();
    let state = node.lock();
    assert_eq!((state.count(Op::Write), state.count(Op::Read), state.count(Op::Discard)), (4, 4, 1));
}

#[tokio::test]
async fn a_lost_connection_is_not_noticed() {
    let (node, volume) = one_volume().await;
    volume.write(0, block(1), false).await.unwrap();
    node.cut();
    assert_eq!(first_byte(&volume, 0).await, 1);
    for (op, act) in [
        (Op::Read, Act::Drop),
        (Op::Read, Act::ServeAndDrop),
        (Op::Write, Act::Drop),
        (Op::Write, Act::ServeAndDrop),
        (Op::Flush, Act::ServeAndDrop),
        (Op::PriorityFetch, Act::Drop),
        (Op::Hello, Act::Drop),
        (Op::Attach, Act::ServeAndDrop),
    ] {
        node.first(op, 2, act);
        if matches!(op, Op::Hello | Op::Attach) {
            node.cut();
        }
        volume.write(4096, block(2), false).await.unwrap();
        volume.flush().await.unwrap();
        volume.priority_fetch(0, 4096, FetchUntil::Resident).await.unwrap();
        assert_eq!(first_byte(&volume, 4096).await, 2, "{op:?} {act:?}");
    }
    assert_eq!(volume.generation(), node.lock().volumes["web-1"].generation, "resumed, never attached afresh");
    // The process never changed, so nothing acknowledged was repeated: the first, 8 rounds, 2 carried out but unanswered.
    let writes = node.lock().count(Op::Write);
    assert_eq!(writes, 1 + 8 + 2);
}

#[tokio::test]
async fn acknowledged_unflushed_writes_survive_a_restart_in_order() {
    let (mut node, volume) = one_volume().await;
    volume.write(0, block(1), false).await.unwrap();
    volume.flush().await.unwrap();
    let flushed = node.lock().count(Op::Write);
    for i in 2..100u8 {
        volume.write(4096, block(i), false).await.unwrap();
    }
    volume.write(8192, block(3), false).await.unwrap();
    volume.write(8192, block(4), true).await.unwrap();
    volume.write(12288, block(5), false).await.unwrap();
    volume.discard(12288, 512).await.unwrap();
    node.kill().await;
    assert_eq!(node.lock().volumes["web-1"].data[4096], 0, "the fake really loses it");
    node.lock().seen.clear();
    node.listen().await;
    volume.flush().await.unwrap();
    {
        let state = node.lock();
        let durable = &state.volumes["web-1"].durable;
        assert_eq!([0, 4096, 8192, 12288, 12800].map(|at| durable[at]), [1, 99, 4, 0, 5]);
        assert_eq!(flushed, 1);
        assert_eq!(state.count(Op::Write), 98 + 3, "everything since the flush, and not what it covered");
        let ops: Vec<Op> = state.seen.iter().map(|(_, op)| *op).collect();
        let flush_at = ops.iter().position(|op| *op == Op::Flush).unwrap();
        assert!(ops[..2] == [Op::Hello, Op::Attach] && flush_at == ops.len() - 1, "{ops:?}");
    }
    // Flushed now: another restart repeats nothing.
    node.kill().await;
    node.lock().seen.clear();
    node.listen().await;
    assert_eq!(first_byte(&volume, 4096).await, 99);
    assert_eq!(node.lock().count(Op::Write), 0);
}

#[tokio::test]
async fn a_restart_in_the_middle_of_the_replay_starts_it_again() {
    let (mut node, volume) = one_volume().await;
    for i in 1..10u8 {
        volume.write(0, block(i), false).await.unwrap();
    }
    node.kill().await;
    let mut n = 0;
    node.rule(move |op| {
        n += usize::from(op == Op::Write);
        match n {
            3 | 9 if op == Op::Write => Act::ServeAndDrop,
            6 if op == Op::Write => Act::Refuse(Status::Busy),
            _ => Act::Serve,
        }
    });
    node.listen().await;
    assert_eq!(first_byte(&volume, 0).await, 9);
}

#[tokio::test]
async fn a_replay_that_fails_for_good_is_never_hidden() {
    let (mut node, volume) = one_volume().await;
    volume.write(0, block(1), false).await.unwrap();
    node.kill().await;
    node.first(Op::Write, 1, Act::Refuse(Status::NoSpace));
    node.listen().await;
    let error = volume.flush().await.unwrap_err();
    assert_eq!((error.kind, error.status), (ErrorKind::Storage, Some(Status::NoSpace)));
    assert!(error.message.contains("web-1") && error.message.contains("1 unflushed"), "{error}");
    assert_eq!(volume.flush().await.unwrap_err().kind, ErrorKind::Storage);
}

#[tokio::test]
async fn another_node_at_the_address_gets_no_writes() {
    let (mut node, volume) = one_volume().await;
    volume.write(0, block(1), false).await.unwrap();
    node.kill().await;
    node.lock().node_id += 1;
    node.lock().seen.clear();
    node.listen().await;
    assert_eq!(volume.write(4096, block(2), false).await.unwrap_err().kind, ErrorKind::Storage);
    assert_eq!(node.lock().count(Op::Write), 0);
}

#[tokio::test]
async fn the_log_is_bounded_by_flushes_of_its_own() {
    let node = FakeNode::start(1, &["web-1"]).await;
    let options = Options { unflushed_bytes_max: 64 << 10, ..Options::default() };
    let volume = Client::connect(&node.address(), options).await.unwrap().attach("web-1").await.unwrap();
    let writes: Vec<_> = (0..256u64)
        .map(|i| {
            let volume = volume.clone();
            tokio::spawn(async move { volume.write(i * 4096, block(1), false).await })
        })
        .collect();
    for write in writes {
        write.await.unwrap().unwrap();
    }
    let flushes = node.lock().count(Op::Flush);
    assert!(flushes >= 256 * 4096 / (64 << 10) - 1, "{flushes} flushes");
}

#[tokio::test]
async fn a_failed_flush_of_its_own_reaches_the_waiting_writes() {
    let node = FakeNode::start(1, &["web-1"]).await;
    let options = Options { unflushed_bytes_max: 10_000, ..Options::default() };
    let volume = Client::connect(&node.address(), options).await.unwrap().attach("web-1").await.unwrap();
    node.rule(|op| if op == Op::Flush { Act::Refuse(Status::Io) } else { Act::Serve });
    let mut failed = None;
    for i in 0..8 {
        if let Err(error) = volume.write(i * 4096, block(1), false).await {
            failed = Some(error);
            break;
        }
    }
    assert_eq!(failed.and_then(|e| e.status), Some(Status::Io));
    node.rule(|_| Act::Serve);
    volume.write(0, block(1), false).await.unwrap();
}

#[tokio::test]
async fn a_newer_attachment_fences() {
    let (node, old) = one_volume().await;
    let new = connect(&node).await.attach("web-1").await.unwrap();
    assert_eq!(new.generation(), 2);
    let error = old.write(0, block(1), false).await.unwrap_err();
    assert_eq!((error.kind, error.status), (ErrorKind::Fenced, Some(Status::StaleGeneration)));
    assert_eq!(old.flush().await.unwrap_err().kind, ErrorKind::Fenced);
    new.write(0, block(2), false).await.unwrap();
}

#[tokio::test]
async fn fencing_is_found_out_when_resuming() {
    let (mut node, old) = one_volume().await;
    old.write(0, block(1), false).await.unwrap();
    node.kill().await;
    node.lock().volumes.get_mut("web-1").unwrap().generation = 9;
    node.lock().seen.clear();
    node.listen().await;
    assert_eq!(old.flush().await.unwrap_err().kind, ErrorKind::Fenced);
    assert_eq!(old.read(0, 512).await.unwrap_err().kind, ErrorKind::Fenced);
    assert_eq!(node.lock().count(Op::Write), 0, "a fenced log is not repeated");
}

#[tokio::test]
async fn attaching_again_in_the_same_client_fences_the_older_handle() {
    let node = FakeNode::start(1, &["web-1"]).await;
    let client = connect(&node).await;
    let old = client.attach("web-1").await.unwrap();
    old.write(0, block(1), false).await.unwrap();
    let mut node = node;
    let new = client.attach("web-1").await.unwrap();
    assert_eq!(old.read(0, 512).await.unwrap_err().kind, ErrorKind::Fenced);
    drop(old);
    node.kill().await;
    node.listen().await;
    assert_eq!(first_byte(&new, 0).await, 1, "the older handle's write is still owed");
}

#[tokio::test]
async fn busy_is_retried_and_other_refusals_are_not() {
    let (node, volume) = one_volume().await;
    node.first(Op::Write, 3, Act::Refuse(Status::Busy));
    volume.write(0, block(1), false).await.unwrap();
    node.first(Op::Read, 2, Act::Refuse(Status::ShuttingDown));
    assert_eq!(first_byte(&volume, 0).await, 1);
    node.first(Op::Write, 1, Act::Refuse(Status::NoSpace));
    assert_eq!(volume.write(0, block(2), false).await.unwrap_err().kind, ErrorKind::NoSpace);
    node.first(Op::Read, 1, Act::Refuse(Status::ObjectStore));
    assert_eq!(volume.read(0, 512).await.unwrap_err().kind, ErrorKind::Retry);
}

async fn impatient(node: &FakeNode) -> Volume {
    let options = Options { deadline: Duration::from_millis(300), ..Options::default() };
    Client::connect(&node.address(), options).await.unwrap().attach("web-1").await.unwrap()
}

#[tokio::test]
async fn a_silent_server_costs_the_deadline_and_then_the_connection() {
    let node = FakeNode::start(1, &["web-1"]).await;
    let volume = impatient(&node).await;
    node.first(Op::Read, 1, Act::Hold);
    let error = volume.read(0, 512).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert!(error.message.contains("READ") && error.message.contains("0.3 s"), "{error}");
    volume.write(0, block(1), false).await.unwrap();
    assert_eq!(first_byte(&volume, 0).await, 1);
}

#[tokio::test]
async fn a_dead_server_is_named_when_the_deadline_passes() {
    let mut node = FakeNode::start(1, &["web-1"]).await;
    let volume = impatient(&node).await;
    node.kill().await;
    let error = volume.write(0, block(1), false).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert!(error.message.contains("connection to 127.0.0.1:"), "{error}");
    node.listen().await;
    volume.write(0, block(1), false).await.unwrap();
}

#[tokio::test]
async fn bad_bytes_cost_the_connection_only() {
    let (node, volume) = one_volume().await;
    node.first(Op::Read, 2, Act::Garbage);
    assert_eq!(first_byte(&volume, 0).await, 0);
    node.rule(|op| if op == Op::Hello { Act::Garbage } else { Act::Serve });
    let error = Client::connect(&node.address(), Options::default()).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::Protocol);
    assert!(error.message.contains("not the Volley data port"), "{error}");
}

#[tokio::test]
async fn a_server_that_refuses_the_version_is_named() {
    let (node, volume) = one_volume().await;
    node.rule(|op| if op == Op::Hello { Act::Refuse(Status::Unsupported) } else { Act::Serve });
    let error = Client::connect(&node.address(), Options::default()).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::Protocol);
    node.cut();
    assert_eq!(volume.read(0, 512).await.unwrap_err().kind, ErrorKind::Protocol);
}

#[tokio::test]
async fn nobody_there_fails_at_once() {
    let error = Client::connect("127.0.0.1:1", Options::default()).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert!(error.message.contains("127.0.0.1:1"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", dir.path().join("none.sock").display());
    assert_eq!(Client::connect(&path, Options::default()).await.err().unwrap().kind, ErrorKind::Unavailable);
}

#[test]
fn handles_cross_threads() {
    fn check<T: Send + Sync + Clone + 'static>() {}
    check::<Client>();
    check::<Volume>();
}

/// Processor time of this thread, on which client and fake node run, while a read waits for its deadline.
async fn cost_of_waiting(idle_poll: Duration) -> u64 {
    let cpu_ns = || {
        let said = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        said.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let node = FakeNode::start(1, &["web-1"]).await;
    let options = Options { deadline: Duration::from_millis(300), idle_poll, ..Options::default() };
    let volume = Client::connect(&node.address(), options).await.unwrap().attach("web-1").await.unwrap();
    node.first(Op::Read, 1, Act::Hold);
    let before = cpu_ns();
    assert_eq!(volume.read(0, 512).await.unwrap_err().kind, ErrorKind::Timeout);
    cpu_ns() - before
}

#[tokio::test]
async fn a_client_looks_for_an_owed_answer_as_long_as_it_was_told_and_then_sleeps() {
    let mut seen = Vec::new();
    // Where other tests want the core it sleeps at once, as it should.
    for _ in 0..20 {
        let sleeping = cost_of_waiting(Duration::ZERO).await;
        let brief = cost_of_waiting(Duration::from_micros(100)).await;
        let looking = cost_of_waiting(Duration::from_secs(1)).await;
        if looking > 4 * sleeping && looking > 4 * brief {
            return;
        }
        seen.push((sleeping, brief, looking));
    }
    panic!("{seen:?}");
}
