//! What one peer, and all peers together, can make a shard hold, and for how long.

use volley_protocol::limits::{IN_FLIGHT_MAX, PAYLOAD_BYTES_MAX};
use volley_protocol::messages as m;
use volley_protocol::{HEADER_BYTES, Status};
use volley_server::connection::Refusal;
use volley_server::limits::{
    CONNECTION_BYTES_MAX, CONNECTIONS_BYTES_MAX, CONNECTIONS_MAX, STALL_MAX, STALL_PRESSED_MAX,
};
use volley_server::platform::Platform;

use crate::lab::{Lab, Peer, RESIDENT, VOLUME, fetch, frame, read};

#[test]
fn requests_past_the_limit_wait_in_the_socket() {
    let lab = Lab::new(5);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.hello().await;
        lab.fake.hold();
        let requests = IN_FLIGHT_MAX as usize + 500;
        let frames: Vec<u8> = (0..requests as u64).flat_map(|id| fetch(id, 2)).collect();
        peer.send(&frames).await;
        lab.settle().await;
        assert_eq!(lab.fake.0.seen.get(), IN_FLIGHT_MAX as usize);
        lab.fake.release();
        for _ in 0..requests {
            assert_eq!(peer.answer().await.expect("answer").status, Status::Ok);
        }
        assert_eq!(lab.fake.0.seen.get(), requests);
    });
}

#[test]
fn a_reader_that_does_not_read_bounds_what_the_server_holds_for_it() {
    let lab = Lab::new(6);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.hello().await;
        let requests = 64;
        let frames: Vec<u8> = (0..requests).flat_map(|id| read(id, PAYLOAD_BYTES_MAX)).collect();
        peer.send(&frames).await;
        lab.settle().await;
        // The bound, the request that passed it, and what the network took.
        let made = lab.fake.0.made_bytes.get();
        assert!(made >= CONNECTION_BYTES_MAX, "the bound is made use of");
        assert!(
            made <= CONNECTION_BYTES_MAX + 2 * PAYLOAD_BYTES_MAX as usize,
            "{made} bytes for a peer that reads none"
        );
        for _ in 0..requests {
            assert_eq!(peer.answer().await.expect("answer").payload_len, PAYLOAD_BYTES_MAX as usize);
        }
    });
}

#[test]
fn connections_past_the_limit_are_closed_at_once() {
    let lab = Lab::new(7);
    lab.world.block_on(async {
        let mut peers: Vec<Peer> = (0..CONNECTIONS_MAX).map(|_| lab.connect()).collect();
        for peer in &mut peers {
            peer.hello().await;
        }
        let mut one_more = lab.connect();
        assert_eq!(one_more.answer().await, None);
        assert_eq!(lab.connections.count(Refusal::TooManyConnections), 1);
        drop(peers);
        lab.all_closed().await;
        lab.connect().hello().await;
    });
}

#[test]
fn strangers_that_say_nothing_keep_no_host_away() {
    let lab = Lab::new(9);
    lab.world.block_on(async {
        let mut host = lab.connect();
        host.hello().await;
        let mut strangers: Vec<Peer> = (1..CONNECTIONS_MAX + 5).map(|_| lab.connect()).collect();
        let mut newcomer = lab.connect();
        newcomer.hello().await;
        assert_eq!(lab.connections.count(Refusal::TooManyConnections), 6);
        assert_eq!(strangers[0].answer().await, None, "the oldest stranger made room");
        host.send(&fetch(2, RESIDENT)).await;
        assert_eq!(host.status(2).await, Status::Ok);
        lab.settle().await;
        assert!(lab.connections.open() <= CONNECTIONS_MAX as u64);
    });
}

/// The largest write.
fn write(request_id: u64) -> Vec<u8> {
    let body = m::Write { volume: VOLUME, generation: 3, offset: 0 };
    frame(request_id, 0, &body, &vec![5; PAYLOAD_BYTES_MAX as usize])
}

#[test]
fn a_sender_that_stops_in_the_middle_of_a_frame_is_closed() {
    let lab = Lab::new(10);
    lab.world.block_on(async {
        let mut peer = lab.connect();
        peer.hello().await;
        let begun = lab.world.now();
        peer.send(&write(2)[..HEADER_BYTES + 100]).await;
        // Bytes that trickle do not renew its time.
        for _ in 0..20 {
            lab.settle().await;
            peer.send(&[5; 10]).await;
        }
        assert_eq!(peer.answer().await, None);
        let waited = lab.world.now().since(begun);
        assert!(waited >= STALL_MAX && waited < STALL_MAX * 2, "{waited:?}");
        assert_eq!(lab.connections.count(Refusal::StalledSender), 1);
        lab.all_closed().await;
        assert_eq!(lab.connections.held_bytes(), 0);

        // A peer that has nothing to say may say nothing for as long as it likes.
        let mut idle = lab.connect();
        idle.hello().await;
        lab.world.platform().sleep(STALL_MAX * 5).await;
        idle.send(&fetch(2, RESIDENT)).await;
        assert_eq!(idle.status(2).await, Status::Ok);
    });
}

#[test]
fn a_reader_that_takes_nothing_is_closed_and_a_slow_one_is_not() {
    let lab = Lab::new(11);
    lab.world.block_on(async {
        let mut stuck = lab.connect();
        stuck.hello().await;
        let begun = lab.world.now();
        let frames: Vec<u8> = (0..8).flat_map(|id| read(id, PAYLOAD_BYTES_MAX)).collect();
        stuck.send(&frames).await;
        let mut slow = lab.connect();
        slow.hello().await;
        slow.send(&frames).await;
        for _ in 0..8 {
            lab.world.platform().sleep(STALL_MAX / 2).await;
            assert_eq!(slow.answer().await.expect("answer").payload_len, PAYLOAD_BYTES_MAX as usize);
        }
        assert!(lab.world.now().since(begun) > STALL_MAX * 2);
        assert_eq!(lab.connections.count(Refusal::StalledReader), 1);
        assert_eq!(lab.connections.open(), 1);
        drop((slow, stuck));
        lab.all_closed().await;
        assert_eq!(lab.connections.held_bytes(), 0);
    });
}

#[test]
fn all_connections_together_are_bounded_and_stalled_ones_make_room() {
    let lab = Lab::new(12);
    lab.world.block_on(async {
        let most = CONNECTIONS_BYTES_MAX / PAYLOAD_BYTES_MAX as usize;
        // Twice as many peers as there is room for: half a write each, or replies that they do not take.
        let mut peers = Vec::new();
        for number in 0..2 * most {
            let mut peer = lab.connect();
            peer.hello().await;
            match number % 2 {
                0 => peer.send(&write(2)[..HEADER_BYTES + 100]).await,
                _ => peer.send(&[read(2, PAYLOAD_BYTES_MAX), read(3, PAYLOAD_BYTES_MAX)].concat()).await,
            }
            peers.push(peer);
        }
        let mut host = lab.connect();
        host.hello().await;
        let begun = lab.world.now();
        for request_id in 2..6 {
            host.send(&read(request_id, PAYLOAD_BYTES_MAX)).await;
            let held = lab.connections.held_bytes();
            assert!(held <= 4 * CONNECTIONS_BYTES_MAX, "{held} bytes held");
            assert_eq!(host.status(request_id).await, Status::Ok);
        }
        let waited = lab.world.now().since(begun);
        assert!(waited < STALL_PRESSED_MAX * 10, "the host waited for {waited:?}");
        let closed = lab.connections.count(Refusal::StalledSender) + lab.connections.count(Refusal::StalledReader);
        assert!(closed >= most as u64 / 2, "{closed} closed");
        drop((peers, host));
        // The last replies are for peers that are gone.
        lab.world.platform().sleep(STALL_MAX * 2).await;
        lab.all_closed().await;
        assert_eq!(lab.connections.held_bytes(), 0);
    });
}
