//! Component tests of the production platform: a real executor, real files, real sockets.

use std::io::{ErrorKind, Read, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use glommio::{LocalExecutorBuilder, Placement};

use super::{Acceptor, Glommio, plain_error};
use crate::platform::{AlignedBytes, ByteReader, ByteWriter, Connection, File, OpenMode, Platform, Queue};

/// Runs `test` on an executor with a fresh directory.
fn on_executor<F: Future<Output = ()> + 'static>(test: impl FnOnce(Glommio, std::path::PathBuf) -> F + Send + 'static) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().to_owned();
    LocalExecutorBuilder::new(Placement::Unbound)
        .spawn(move || async move { test(Glommio::new().expect("platform"), path).await })
        .expect("executor")
        .join()
        .expect("test");
}

fn pattern(len: usize, salt: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(salt) >> 7) as u8).collect()
}

async fn write(platform: &Glommio, file: &super::GlommioFile, offset: u64, bytes: &[u8]) {
    let mut buf = platform.alloc(bytes.len());
    buf.copy_from_slice(bytes);
    file.write_at(offset, buf).await.expect("write");
}

/// A queue that is preempted ever sooner, until that happens before it ran anything: what a machine does that takes a thread off its core.
#[test]
fn an_executor_that_is_preempted_before_it_runs_goes_on() {
    let (done, all_done) = std::sync::mpsc::channel();
    let hasten = move || async move {
        let _platform = Glommio::new().expect("platform");
        let executor = glommio::executor();
        for micros in (1..50).rev() {
            let latency = glommio::Latency::Matters(Duration::from_micros(micros));
            let hasty = executor.create_task_queue(glommio::Shares::default(), latency, "hasty");
            for _ in 0..200 {
                let start = Instant::now();
                // Woken from outside of the queues: the timer that preempts is set after that, and before they run.
                let woken = glommio::timer::sleep(Duration::from_micros(10));
                glommio::spawn_local_into(woken, hasty).expect("queue").await;
                if start.elapsed() > Duration::from_millis(1) {
                    // It slept over its work, and here it is.
                    return done.send(()).expect("the test waits");
                }
            }
        }
    };
    LocalExecutorBuilder::new(Placement::Unbound).spawn(hasten).expect("executor");
    all_done.recv_timeout(Duration::from_secs(60)).expect("the executor sleeps over its work, or never does so");
}

#[test]
fn what_is_written_reads_back_after_sync_and_reopen() {
    on_executor(|platform, dir| async move {
        let path = dir.join("f");
        let file = platform.open(&path, OpenMode::CreateNew).await.expect("create");
        let data = pattern(64 << 10, 1);
        write(&platform, &file, 8192, &data).await;
        file.datasync().await.expect("sync");
        assert_eq!(file.len().await.expect("len"), 8192 + data.len() as u64);
        file.close().await.expect("close");
        let file = platform.open(&path, OpenMode::Read).await.expect("open");
        assert_eq!(&file.read_at(8192, data.len()).await.expect("read")[..], &data[..]);
        assert!(file.read_at(0, 8192).await.expect("read").iter().all(|&b| b == 0));
        file.close().await.expect("close");
    });
}

#[test]
fn transfers_above_the_limit_are_split_and_joined() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        let data = pattern(6 << 20, 2);
        write(&platform, &file, 4096, &data).await;
        assert!(file.read_at(4096, data.len()).await.expect("read")[..] == data[..]);
        // Past the end: short in the middle of the pieces.
        assert!(file.read_at(4096, 16 << 20).await.expect("read")[..] == data[..]);
        file.close().await.expect("close");
    });
}

#[test]
fn shared_memory_is_written_from_where_it_is_by_many_at_once_and_from_other_threads() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        let len = 3 << 20;
        let data = std::thread::spawn(move || AlignedBytes::from(&pattern(len, 3)[..])).join().expect("made");
        let data = Arc::new(data);
        // More at once than there are helper threads.
        let copies = 2 * super::HELPERS as u64;
        let writes = (0..copies).map(|copy| file.write_shared_at(copy * len as u64, data.clone(), 4096..len));
        for written in join_all(writes).await {
            written.expect("written");
        }
        for copy in 0..copies {
            let read = file.read_at(copy * len as u64, len - 4096).await.expect("read");
            assert!(read[..] == data[4096..], "copy {copy}");
        }
        let refused = |result: std::io::Result<()>| result.expect_err("refused").kind() == ErrorKind::InvalidInput;
        assert!(refused(file.write_shared_at(512, data.clone(), 0..4096).await));
        assert!(refused(file.write_shared_at(0, data.clone(), 0..1000).await));
        assert!(refused(file.write_shared_at(0, data.clone(), 512..4608).await));
        file.close().await.expect("close");
        let read_only = platform.open(&dir.join("f"), OpenMode::Read).await.expect("open");
        assert!(read_only.write_shared_at(0, data, 0..4096).await.is_err());
    });
}

#[test]
fn reads_are_short_only_at_the_end() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        file.set_len(5000).await.expect("set_len");
        assert_eq!(file.read_at(0, 8192).await.expect("read").len(), 5000);
        assert_eq!(file.read_at(8192, 4096).await.expect("read").len(), 0);
        file.set_len(4096).await.expect("set_len");
        assert_eq!(file.len().await.expect("len"), 4096);
        file.close().await.expect("close");
    });
}

#[test]
fn unaligned_transfers_are_refused() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        let refused = |result: std::io::Result<()>| result.expect_err("refused").kind() == ErrorKind::InvalidInput;
        assert!(refused(file.read_at(512, 4096).await.map(drop)));
        assert!(refused(file.read_at(0, 100).await.map(drop)));
        assert!(refused(file.write_at(100, platform.alloc(4096)).await));
        assert!(refused(file.write_at(0, platform.alloc(512)).await));
        assert!(refused(file.deallocate(0, 512).await));
        assert_eq!(file.len().await.expect("len"), 0);
        file.close().await.expect("close");
    });
}

#[test]
fn a_punched_hole_reads_as_zeroes_and_nothing_else_changes() {
    on_executor(|platform, dir| async move {
        let path = dir.join("f");
        let file = platform.open(&path, OpenMode::CreateNew).await.expect("create");
        let mut data = pattern(1 << 20, 3);
        write(&platform, &file, 0, &data).await;
        file.datasync().await.expect("sync");
        file.deallocate(64 << 10, 128 << 10).await.expect("punch");
        file.deallocate(0, 0).await.expect("nothing to punch");
        let all = file.stored(0..2 << 20, 9).await.expect("stored");
        assert_eq!(all, [0..64 << 10, 192 << 10..1 << 20]);
        data[64 << 10..192 << 10].fill(0);
        assert!(file.read_at(0, data.len()).await.expect("read")[..] == data[..]);
        assert_eq!(file.len().await.expect("len"), 1 << 20);
        file.close().await.expect("close");
    });
}

#[test]
fn errors_keep_their_kind() {
    on_executor(|platform, dir| async move {
        let missing = dir.join("missing");
        let kind = |error: std::io::Error| error.kind();
        for mode in [OpenMode::Read, OpenMode::ReadWrite] {
            assert_eq!(platform.open(&missing, mode).await.map(drop).map_err(kind), Err(ErrorKind::NotFound));
        }
        let path = dir.join("f");
        platform.open(&path, OpenMode::CreateNew).await.expect("create").close().await.expect("close");
        let again = platform.open(&path, OpenMode::CreateNew).await;
        assert_eq!(again.map(drop).map_err(kind), Err(ErrorKind::AlreadyExists));
        assert_eq!(platform.remove_file(&missing).await.map_err(kind), Err(ErrorKind::NotFound));
        assert_eq!(platform.hard_link(&path, &path).await.map_err(kind), Err(ErrorKind::AlreadyExists));
        let read_only = platform.open(&path, OpenMode::Read).await.expect("open");
        assert!(read_only.write_at(0, platform.alloc(4096)).await.is_err());
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(plain_error(full.into()).kind(), ErrorKind::StorageFull);
    });
}

#[test]
fn a_file_that_goes_away_while_it_is_opened_is_opened_or_not_found() {
    on_executor(|platform, dir| async move {
        let (here, gone) = (dir.join("here"), dir.join("gone"));
        std::fs::write(&here, "content").expect("write");
        let done = Arc::new(AtomicBool::new(false));
        let renamer = std::thread::spawn({
            let (here, gone, done) = (here.clone(), gone.clone(), done.clone());
            move || {
                while !done.load(Ordering::Relaxed) {
                    std::fs::rename(&here, &gone).expect("rename");
                    std::fs::rename(&gone, &here).expect("rename back");
                }
            }
        });
        let (mut opened, mut missing) = (0, 0);
        while opened < 500 || missing < 500 {
            match platform.open(&here, OpenMode::ReadWrite).await {
                Ok(file) => {
                    assert_eq!(file.len().await.expect("len"), 7);
                    file.close().await.expect("close");
                    opened += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                    missing += 1;
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        renamer.join().expect("the renamer");
    });
}

#[test]
fn directories_are_made_listed_linked_and_synced() {
    on_executor(|platform, dir| async move {
        let sub = dir.join("a/b");
        platform.create_dir_all(&sub).await.expect("mkdir");
        platform.create_dir_all(&sub).await.expect("mkdir again");
        platform.open(&sub.join("2"), OpenMode::CreateNew).await.expect("create").close().await.expect("close");
        platform.rename(&sub.join("2"), &sub.join("1")).await.expect("rename");
        platform.hard_link(&sub.join("1"), &sub.join("3")).await.expect("link");
        platform.create_dir_all(&sub.join("d")).await.expect("mkdir");
        platform.sync_dir(&sub).await.expect("sync");
        let names: Vec<_> =
            platform.list_dir(&sub).await.expect("list").into_iter().map(|e| (e.name, e.is_dir)).collect();
        assert_eq!(names, [("1".to_owned(), false), ("3".to_owned(), false), ("d".to_owned(), true)]);
        platform.remove_file(&sub.join("1")).await.expect("remove");
        assert_eq!(platform.list_dir(&sub).await.expect("list").len(), 2);
        let space = platform.space(&sub).await.expect("space");
        assert!(space.total_bytes > 0 && space.free_bytes <= space.total_bytes);
    });
}

#[test]
fn a_range_is_cloned_or_refused_as_unsupported() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        write(&platform, &file, 0, &pattern(16384, 1)).await;
        let source = platform.open(&dir.join("f"), OpenMode::Read).await.expect("open");
        match file.clone_range(8192, &source, 4096, 4096).await {
            Ok(()) => {
                assert!(file.read_at(8192, 4096).await.expect("read")[..] == pattern(16384, 1)[4096..8192]);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        }
        let misaligned = file.clone_range(8192, &source, 512, 4096).await;
        assert_eq!(misaligned.map_err(|e| e.kind()), Err(ErrorKind::InvalidInput));
    });
}

#[test]
fn clones_that_come_together_each_have_their_own_answer() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        let source = platform.open(&dir.join("s"), OpenMode::CreateNew).await.expect("create");
        write(&platform, &source, 0, &pattern(4096, 1)).await;
        file.set_len(100 * 4096).await.expect("longer");
        let can = file.clone_range(0, &source, 0, 4096).await.is_ok();
        // Every third is of what the source does not have.
        let clones = (0..100_u64).map(|n| file.clone_range(n * 4096, &source, (n % 3 / 2) * 8192, 4096));
        for (n, cloned) in join_all(clones).await.into_iter().enumerate() {
            assert_eq!(cloned.is_ok(), can && n % 3 != 2, "clone {n}: {cloned:?}");
        }
    });
}

#[test]
fn clones_share_a_file_and_outlive_a_close() {
    on_executor(|platform, dir| async move {
        let file = platform.open(&dir.join("f"), OpenMode::CreateNew).await.expect("create");
        let writers = (0..32_u64).map(|i| {
            let (platform, file) = (platform.clone(), file.clone());
            async move { write(&platform, &file, i * 16384, &pattern(16384, i)).await }
        });
        join_all(writers).await;
        let other = file.clone();
        file.close().await.expect("close one handle");
        for i in 0..32_u64 {
            assert!(other.read_at(i * 16384, 16384).await.expect("read")[..] == pattern(16384, i)[..]);
        }
        other.close().await.expect("close the last");
    });
}

#[test]
fn a_pending_read_does_not_hold_back_a_write() {
    on_executor(|platform, dir| async move {
        let path = dir.join("socket");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let tcp = Acceptor::from_tcp(listener).expect("listen");
        echo_after_a_greeting(&platform, tcp, move || std::net::TcpStream::connect(address).expect("connect")).await;
        let unix = Acceptor::bind_unix(&path).expect("bind");
        let connect = move || std::os::unix::net::UnixStream::connect(path).expect("connect");
        echo_after_a_greeting(&platform, unix, connect).await;
    });
}

/// The server's reader waits before its writer sends 1 MiB, which the peer answers only when it has it all.
async fn echo_after_a_greeting<S: Read + Write>(
    platform: &Glommio,
    acceptor: Acceptor,
    connect: impl FnOnce() -> S + Send + 'static,
) {
    const LEN: usize = 1 << 20;
    let peer = std::thread::spawn(move || {
        let mut stream = connect();
        let mut greeting = vec![0; LEN];
        stream.read_exact(&mut greeting).expect("greeting");
        stream.write_all(&greeting).expect("echo");
        assert_eq!(stream.read(&mut [0; 1]).expect("end"), 0);
    });
    let connection = acceptor.accept().await.expect("accept");
    assert!(!connection.peer().is_empty());
    let hang_up = connection.hang_up();
    let (mut reader, mut writer) = connection.split();
    let received = Rc::new(std::cell::RefCell::new(Vec::new()));
    let (done_sender, done) = futures::channel::oneshot::channel();
    platform.spawn(Queue::Serve, {
        let received = received.clone();
        async move {
            let mut buf = vec![0; 64 << 10];
            while received.borrow().len() < LEN {
                let len = reader.read(&mut buf).await.expect("read");
                received.borrow_mut().extend_from_slice(&buf[..len]);
            }
            done_sender.send(reader).ok();
        }
    });
    platform.yield_now().await;
    let greeting = pattern(LEN, 9);
    writer.write_all(&greeting).await.expect("write");
    let mut reader = done.await.expect("reader");
    assert!(*received.borrow() == greeting);
    hang_up();
    assert_eq!(reader.read(&mut [0; 16]).await.expect("end"), 0);
    glommio::executor().spawn_blocking(move || peer.join()).await.expect("peer");
}

#[test]
fn randomness_differs_between_platforms_and_time_moves() {
    on_executor(|platform, _| async move {
        let other = Glommio::new().expect("platform");
        assert_ne!(platform.random_u64(), platform.random_u64());
        assert_ne!(platform.random_u64(), other.random_u64());
        let before = platform.now();
        platform.sleep(std::time::Duration::from_millis(2)).await;
        assert!(platform.now().since(before) >= std::time::Duration::from_millis(2));
        assert!(platform.wall_clock_ms() > 1_600_000_000_000);
    });
}

#[test]
fn thousands_sleep_at_once_and_each_wakes_when_it_is_due() {
    on_executor(|platform, _| async move {
        let begun = Instant::now();
        let forgotten: Vec<_> = (0..5000).map(|_| Box::pin(platform.sleep(Duration::from_secs(600)))).collect();
        let mut forgotten = forgotten;
        for sleep in &mut forgotten {
            assert!(futures::poll!(sleep.as_mut()).is_pending());
        }
        // Each sooner than the one before, so that whoever waits for the earliest is told every time.
        let sleeps = (0..50).rev().map(|tens| {
            let (platform, wanted) = (platform.clone(), Duration::from_millis(tens * 10));
            async move {
                platform.sleep(wanted).await;
                let late = begun.elapsed().saturating_sub(wanted);
                assert!(begun.elapsed() >= wanted && late < Duration::from_secs(5), "{wanted:?}: {late:?} late");
            }
        });
        join_all(sleeps).await;
        drop(forgotten);
        platform.sleep(Duration::ZERO).await;
        platform.sleep(Duration::from_millis(1)).await;
        // One that was dropped wakes nobody, and one after it still wakes.
        let dropped = Box::pin(platform.sleep(Duration::from_millis(5)));
        let (kept, ()) = futures::join!(platform.sleep(Duration::from_millis(20)), async move { drop(dropped) });
        assert_eq!(kept, ());
    });
}
