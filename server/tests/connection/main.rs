//! The server side of the wire protocol against a peer that is slow, wrong, malicious or gone, in the simulator.

mod lab;
mod limits;

use std::time::Duration;

use lab::{Fake, Lab, Peer, RESIDENT, VOLUME, attach, detach, fetch, frame, hello, read};
use proptest::prelude::*;
use volley_protocol::limits::PAYLOAD_BYTES_MAX;
use volley_protocol::messages as m;
use volley_protocol::{Decoded, FLAG_FUA, Status, decode, encode};
use volley_server::connection::Refusal;
use volley_server::limits::HELLO_DEADLINE;
use volley_server::platform::{ByteReader, ByteWriter, Platform, Queue};
use volley_server::shard::api::ConnectionId;
use volley_server::types::VolumeId;

#[test]
fn hello_hands_out_the_node_and_requests_are_answered() {
    let lab = Lab::new(1);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.send(&hello(0, 9)).await;
        let answer = peer.answer().await.expect("hello");
        let body = rkyv::access::<m::ArchivedHelloReply, rkyv::rancor::Error>(&answer.body).expect("body");
        assert_eq!((body.version.to_native(), body.node_id.to_native(), body.boot_id.to_native()), (1, 11, 13));
        assert_eq!((body.shard.to_native(), body.shards.len()), (1, 2));

        // Many frames in one write; the last one needs no waiting, so it may overtake.
        let write = m::Write { volume: VOLUME, generation: 3, offset: 512 };
        let stat = frame(4, 0, &m::Stat { volume: 9 }, &[]);
        let frames = [read(2, 8192), frame(3, FLAG_FUA, &write, &[5; 512]), stat, fetch(5, RESIDENT), fetch(6, 2)];
        peer.send(&frames.concat()).await;
        let mut answers = Vec::new();
        for _ in 0..5 {
            let answer = peer.answer().await.expect("answer");
            answers.push((answer.request_id, answer.status, answer.payload_len));
        }
        answers.sort_by_key(|answer| answer.0);
        let (ok, unknown) = (Status::Ok, Status::UnknownVolume);
        assert_eq!(answers, [(2, ok, 8192), (3, ok, 0), (4, unknown, 0), (5, ok, 0), (6, ok, 0)]);
        drop(peer);
        lab.all_closed().await;
    });
}

#[test]
fn whoever_does_not_say_hello_is_refused() {
    let lab = Lab::new(2);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.send(&read(9, 512)).await;
        assert_eq!(peer.status(9).await, Status::NotAttached);
        assert_eq!(peer.answer().await, None);
        assert_eq!(lab.connections.count(Refusal::NoHello), 1);

        let mut silent = lab.connect();
        let before = lab.world.now();
        assert_eq!(silent.answer().await, None);
        assert!(lab.world.now().since(before) >= HELLO_DEADLINE);
        assert_eq!(lab.connections.count(Refusal::HelloLate), 1);

        let mut future = lab.connect();
        future.send(&hello(2, 5)).await;
        assert_eq!(future.status(1).await, Status::Unsupported);
        assert_eq!(future.answer().await, None);
        assert_eq!(lab.connections.count(Refusal::UnsupportedVersion), 1);

        let mut twice = lab.connect();
        twice.hello().await;
        twice.send(&[hello(1, 1), fetch(2, RESIDENT)].concat()).await;
        assert_eq!(twice.status(1).await, Status::Invalid);
        assert_eq!(twice.status(2).await, Status::Ok);
        drop(twice);
        lab.all_closed().await;
    });
}

#[test]
fn a_broken_stream_is_closed_and_a_wrong_request_is_not() {
    let lab = Lab::new(3);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.hello().await;
        // Unknown operation, in a sound frame: costs the request.
        let mut unknown = Vec::new();
        encode::reply_error(&mut unknown, 200, 4, Status::Busy, "");
        peer.send(&unknown).await;
        assert_eq!(peer.status(4).await, Status::Invalid);
        peer.send(&frame(5, 0, &m::Read { volume: 1, generation: 1, offset: 7, len: 512 }, &[])).await;
        assert_eq!(peer.status(5).await, Status::Misaligned);
        assert_eq!(lab.connections.count(Refusal::BadRequest), 2);
        // A damaged payload: the request is known, the frame borders are not to be trusted any more.
        let write = m::Write { volume: VOLUME, generation: 3, offset: 0 };
        let mut damaged = frame(6, 0, &write, &[5; 512]);
        *damaged.last_mut().expect("payload") ^= 1;
        peer.send(&damaged).await;
        assert_eq!(peer.status(6).await, Status::Invalid);
        assert_eq!(peer.answer().await, None);
        assert_eq!(lab.connections.count(Refusal::DamagedFrame), 1);

        let mut stranger = lab.connect();
        stranger.send(b"GET / HTTP/1.1\r\n").await;
        assert_eq!(stranger.answer().await, None);
        assert_eq!(lab.connections.count(Refusal::BadMagic), 1);
        lab.all_closed().await;
    });
}

#[test]
fn a_connection_that_ends_gives_up_its_attachments_once() {
    let lab = Lab::new(4);
    lab.world.block_on(async {
        let lost = |fake: &Fake| fake.0.lost.take();
        // The fake is shard 1; its connections are numbered from 0.
        let lost_with = |n| vec![(VolumeId(VOLUME), ConnectionId::new(1, n))];
        let mut peer = lab.connect();
        peer.hello().await;
        // A second attach of the same volume counts once.
        for (request_id, resume) in [(2, None), (3, Some(3))] {
            peer.send(&attach(request_id, resume)).await;
            assert_eq!(peer.status(request_id).await, Status::Ok);
        }
        assert_eq!(lost(&lab.fake), []);
        drop(peer);
        lab.all_closed().await;
        assert_eq!(lost(&lab.fake), lost_with(0));

        let mut detached = lab.connect();
        detached.hello().await;
        detached.send(&attach(2, None)).await;
        assert_eq!(detached.status(2).await, Status::Ok);
        detached.send(&detach(3, 3)).await;
        assert_eq!(detached.status(3).await, Status::Ok);
        drop(detached);
        lab.all_closed().await;
        assert_eq!(lost(&lab.fake), []);

        // The attach is answered after the peer has gone.
        let mut hasty = lab.connect();
        hasty.hello().await;
        lab.fake.hold();
        hasty.send(&attach(2, None)).await;
        lab.settle().await;
        drop(hasty);
        lab.settle().await;
        assert_eq!(lost(&lab.fake), []);
        lab.fake.release();
        lab.all_closed().await;
        assert_eq!(lost(&lab.fake), lost_with(2));
    });
}

#[test]
fn closing_all_sends_what_is_answered_and_waits_for_no_peer() {
    let lab = Lab::new(8);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.hello().await;
        let mut stuck = lab.connect();
        stuck.hello().await;
        lab.fake.hold();
        stuck.send(&fetch(2, 2)).await;
        peer.send(&fetch(2, RESIDENT)).await;
        lab.settle().await;
        lab.connections.close_all(&lab.world.platform(), Duration::from_secs(1)).await;
        assert_eq!(lab.connections.open(), 0);
        assert_eq!(peer.status(2).await, Status::Ok);
        assert_eq!(peer.answer().await, None);
        assert_eq!(stuck.answer().await, None);
    });
}

/// Frames of every kind, the raw material of the mutations.
fn any_frames() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        any::<u64>().prop_map(|id| fetch(id, RESIDENT)),
        any::<u64>().prop_map(|id| fetch(id, 2)),
        (any::<u64>(), any::<u32>()).prop_map(|(id, len)| read(id, len % (2 * PAYLOAD_BYTES_MAX))),
        (any::<u64>(), any::<Option<u64>>()).prop_map(|(id, generation)| attach(id, generation)),
        any::<u64>().prop_map(|id| detach(id, 3)),
        any::<u64>().prop_map(|id| frame(id, 0, &m::Stat { volume: id }, &[])),
        (any::<u64>(), 0..4096_usize, any::<u8>()).prop_map(|(id, len, flags)| {
            let body = m::Write { volume: VOLUME, generation: 3, offset: 512 };
            frame(id, flags & FLAG_FUA, &body, &vec![1; len])
        }),
        Just(hello(1, 1)),
        prop::collection::vec(any::<u8>(), 0..200),
    ];
    prop::collection::vec(one, 0..12).prop_map(|frames| frames.concat())
}

#[derive(Clone, Debug)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
}

fn any_damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<prop::sample::Index>(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        any::<prop::sample::Index>().prop_map(Damage::Cut),
        (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..50))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

fn apply(damage: &Damage, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    match damage {
        Damage::Flip(at, bit) => {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Damage::Insert(at, inserted) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, inserted.iter().copied());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_break_the_server(
        seed: u64,
        greet: bool,
        frames in any_frames(),
        damages in prop::collection::vec(any_damage(), 0..4),
    ) {
        let mut bytes = frames;
        damages.iter().for_each(|damage| apply(damage, &mut bytes));
        let lab = Lab::new(seed);
        lab.world.block_on(async {
            let peer = lab.connect();
            let Peer { mut reader, mut writer, .. } = peer;
            lab.world.platform().spawn(Queue::Serve, async move {
                if greet {
                    let _ = writer.write_all(&hello(1, 1)).await;
                }
                let _ = writer.write_all(&bytes).await;
                // Half a close: the server sees the end of the requests.
            });
            let mut received = Vec::new();
            let mut part = [0; 64 << 10];
            while let Ok(len @ 1..) = reader.read(&mut part).await {
                received.extend_from_slice(&part[..len]);
            }
            // Whatever came in, what goes out is sound frames.
            let mut rest = &received[..];
            while let Decoded::Frame(frame) = decode(rest).expect("sound replies") {
                rest = &rest[frame.len()..];
            }
            assert!(rest.is_empty(), "a reply was cut");
            lab.all_closed().await;
            // The next connection is served.
            lab.connect().hello().await;
        });
    }
}
