//! Connections by the thousand, and peers that neither finish what they send nor take what they asked for.

use volley_protocol::Status;
use volley_protocol::limits::PAYLOAD_BYTES_MAX;
use volley_protocol::messages as m;
use volley_server::limits::{CONNECTIONS_BYTES_MAX, CONNECTIONS_MAX};

use super::Siege;
use super::peer::{Peer, frame};
use crate::faults::eventually;

const DROPPED: usize = 10_000;
/// Connections that say nothing: more than a shard takes.
const SILENT: usize = CONNECTIONS_MAX + 500;
/// Peers that stall: each asks for 37 MiB that it does not take, or owes the last byte of a large write.
const STALLED: usize = 300;

#[test]
fn connections_by_the_thousand_keep_no_host_away() {
    let mut siege = Siege::lay();
    siege.volumes("late-", 1);
    siege.attack("10,000 connections opened and dropped", |siege| {
        let before = siege.metric("volley_connections_accepted_total", "");
        for number in 0..DROPPED {
            let mut peer = Peer::connect(&siege.node.data);
            match number % 4 {
                0 => drop(peer),
                1 => peer.reset(),
                2 => peer.send(&super::peer::hello()),
                _ => peer.send(b"VLLY"),
            }
        }
        eventually("they are gone", || siege.metric("volley_connections", "") < 20);
        // What was reset before it was accepted may not have been seen.
        assert!(siege.metric("volley_connections_accepted_total", "") - before >= DROPPED as u64 / 2);
    });
    siege.attack("half-open connections", |siege| {
        let silent: Vec<Peer> = (0..SILENT).map(|_| Peer::connect(&siege.node.data)).collect();
        // A host that comes now is served.
        let mut late = Peer::greeted(&siege.node.data);
        let (volume, generation) = late.attach("late-0");
        let read = m::Read { volume, generation, offset: 0, len: 512 };
        assert_eq!(late.ask(3, &read, &[]).status, Status::Ok);
        let refused = || siege.connections_refused("limit") + siege.connections_refused("hello_late");
        eventually("the silent ones are closed", || refused() >= SILENT as u64);
        assert_eq!(late.ask(4, &read, &[]).status, Status::Ok);
        drop(silent);
    });
    siege.lift();
}

#[test]
fn slow_readers_and_writers_hold_bounded_memory_and_are_closed() {
    let mut siege = Siege::lay();
    siege.volumes("mallory-", STALLED / 2);
    siege.volumes("alice-", 1);
    let held = siege.attack("slow readers and writers", |siege| {
        let address = &siege.node.data;
        let (mut stalled, mut held) = (Vec::new(), 0);
        for number in 0..STALLED {
            let mut peer = Peer::greeted(address);
            if number % 2 == 0 {
                let (volume, generation) = peer.attach(&format!("mallory-{}", number / 2));
                let read = m::Read { volume, generation, offset: 0, len: PAYLOAD_BYTES_MAX };
                let reads: Vec<u8> = (3..40).flat_map(|id| frame(id, &read, &[])).collect();
                assert!(peer.offer(&reads), "a socket takes a few hundred bytes");
            } else {
                let write = m::Write { volume: 0, generation: 0, offset: 0 };
                let bytes = frame(2, &write, &vec![1; PAYLOAD_BYTES_MAX as usize]);
                peer.offer(&bytes[..bytes.len() - 1]);
            }
            stalled.push(peer);
            held = held.max(siege.metric("volley_connections_held_bytes", ""));
        }
        // A host is served meanwhile, with large requests too.
        let mut alice = Peer::greeted(address);
        let (volume, generation) = alice.attach("alice-0");
        for id in 3..10 {
            let read = m::Read { volume, generation, offset: 0, len: PAYLOAD_BYTES_MAX };
            assert_eq!(alice.ask(id, &read, &[]).status, Status::Ok);
            held = held.max(siege.metric("volley_connections_held_bytes", ""));
        }
        let closed = || siege.connections_refused("stalled_reader") + siege.connections_refused("stalled_sender");
        eventually("most of the stalled ones are closed", || {
            held = held.max(siege.metric("volley_connections_held_bytes", ""));
            closed() >= STALLED as u64 / 2
        });
        assert!(siege.connections_refused("stalled_reader") > 0, "readers that stalled");
        assert!(siege.connections_refused("stalled_sender") > 0, "writers that stalled");
        drop(stalled);
        held
    });
    println!("hostile: at most {} MiB were held for them", held >> 20);
    assert!(held >= 16 << 20, "the attack asked for memory: {held} bytes");
    assert!(held <= 4 * CONNECTIONS_BYTES_MAX as u64, "{held} bytes were held");
    eventually("all is given back", || siege.metric("volley_connections_held_bytes", "") < 16 << 20);
    siege.lift();
}
