//! Bytes that are no frames, frames that are no requests, requests that are not the sender's to make.

use volley_protocol::messages as m;
use volley_protocol::{FrameHeader, HEADER_BYTES, Op, Status};

use super::Siege;
use super::peer::{Peer, every_request, frame, hello, sound_frame};

/// Connections of random bytes.
const NOISY: u64 = 200;

#[test]
fn bytes_that_are_no_frames_cost_the_sender_its_connection() {
    let mut siege = Siege::lay();
    siege.attack("damaged frames", |siege| {
        let address = &siege.node.data;
        let mut noise = crate::harness::Random::new(7);
        for round in 0..NOISY {
            let mut peer = if round % 2 == 0 { Peer::connect(address) } else { Peer::greeted(address) };
            let bytes: Vec<u8> = (0..1 + noise.below(4000)).map(|_| noise.below(256) as u8).collect();
            peer.send(&bytes);
            peer.end_sending();
            peer.closed();
        }
        assert!(siege.frames_refused("magic") >= NOISY / 2, "random bytes are counted");

        // Every operation, cut at every byte: half of the peers close, the others are gone without a word.
        for (_, request) in every_request(0, 0) {
            for cut in 1..request.len() {
                let mut peer = Peer::greeted(address);
                peer.send(&request[..cut]);
                if cut % 2 == 0 {
                    peer.end_sending();
                    assert!(peer.closed().is_empty(), "half a request was answered");
                }
            }
        }

        // A write with each byte of its header and body, and some of its payload, damaged.
        let write = frame(7, &m::Write { volume: 0, generation: 0, offset: 0 }, &[9; 512]);
        let before = siege.frames_refused("checksum");
        let spots = (0..HEADER_BYTES + 40).chain((HEADER_BYTES + 40..write.len()).step_by(37));
        let mut damaged = 0;
        for at in spots {
            let mut bytes = write.clone();
            bytes[at] ^= 1 << (at % 8);
            let mut peer = Peer::greeted(address);
            peer.send(&bytes);
            peer.end_sending();
            let answers = peer.closed();
            assert!(answers.iter().all(|answer| answer.status != Status::Ok), "byte {at}: {answers:?}");
            damaged += u64::from(at >= 4);
        }
        assert_eq!(siege.frames_refused("checksum") - before, damaged, "damage is counted");

        let header = |body_len, payload_len, version, flags| FrameHeader {
            version,
            op: Op::Write as u8,
            flags,
            status: 0,
            request_id: 5,
            body_len,
            payload_len,
            body_crc: 1,
            payload_crc: 1,
        };
        for (header, status, refused) in [
            (header(u32::MAX, 0, 1, 0), Status::TooLarge, "length"),
            (header(24, u32::MAX, 1, 0), Status::TooLarge, "length"),
            (header(24, 512, 1, 0x80), Status::Invalid, "undefined_bits"),
        ] {
            let before = siege.frames_refused(refused);
            let mut peer = Peer::greeted(address);
            peer.send(&header.to_bytes());
            let answers = peer.closed();
            assert_eq!(answers.iter().map(|a| (a.request_id, a.status)).collect::<Vec<_>>(), [(5, status)]);
            assert_eq!(siege.frames_refused(refused), before + 1, "{refused} is counted");
        }
        let mut peer = Peer::greeted(address);
        peer.send(&header(24, 512, 9, 0).to_bytes());
        assert_eq!(peer.closed()[0].status, Status::Unsupported);
        assert_eq!(siege.connections_refused("version"), 1);
    });
    siege.lift();
}

#[test]
fn frames_that_are_no_requests_cost_the_request() {
    let mut siege = Siege::lay();
    siege.volumes("mallory-", 1);
    siege.attack("malformed requests", |siege| {
        let mut peer = Peer::greeted(&siege.node.data);
        let (volume, generation) = peer.attach("mallory-0");
        let before = siege.frames_refused("body");
        let mut refused = 0;
        let mut refuse = |peer: &mut Peer, bytes: &[u8], what: &str| {
            peer.send(bytes);
            let answer = peer.answer().unwrap_or_else(|| panic!("{what}: closed"));
            assert_ne!(answer.status, Status::Ok, "{what}");
            refused += 1;
        };
        // Operations that do not exist, replies, and sound frames whose bodies are cut, too long, or noise.
        for op in [0, 15, 99, 255] {
            refuse(&mut peer, &sound_frame(op, 0, &[], &[]), "unknown operation");
        }
        refuse(&mut peer, &sound_frame(Op::Read as u8, 1, &[], &[]), "a reply");
        for (op, request) in every_request(volume, generation) {
            let body_len = u32::from_le_bytes(request[12..16].try_into().expect("four bytes")) as usize;
            let body = &request[HEADER_BYTES..HEADER_BYTES + body_len];
            for cut in 0..body.len() {
                refuse(&mut peer, &sound_frame(op as u8, 0, &body[..cut], &[]), &format!("{op:?} cut at {cut}"));
            }
            if op != Op::Write {
                refuse(&mut peer, &sound_frame(op as u8, 0, body, &[1; 512]), &format!("{op:?} with a payload"));
            }
        }
        assert_eq!(siege.frames_refused("body") - before, refused, "each is counted");
        // The connection has lost nothing by it.
        let read = m::Read { volume, generation, offset: 0, len: 512 };
        assert_eq!(peer.ask(9, &read, &[]).status, Status::Ok);

        // Nothing is served before HELLO.
        for (op, request) in every_request(volume, generation) {
            if op != Op::Hello {
                let mut stranger = Peer::connect(&siege.node.data);
                stranger.send(&request);
                assert_eq!(stranger.closed()[0].status, Status::NotAttached, "{op:?} before HELLO");
            }
        }
        assert_eq!(siege.connections_refused("no_hello"), 13);
    });
    siege.lift();
}

#[test]
fn requests_for_other_peoples_volumes_are_refused() {
    let mut siege = Siege::lay();
    siege.volumes("alice-", 1);
    siege.attack("other people's volumes", |siege| {
        let address = &siege.node.data;
        let mut alice = Peer::greeted(address);
        let (volume, generation) = alice.attach("alice-0");
        let mut mallory = Peer::greeted(address);
        let before = (siege.requests_failed("not_attached"), siege.requests_failed("stale_generation"));
        // Even with the right generation: the attachment is of another connection.
        let mut refused = 0;
        for generation in [generation, generation + 1, generation.wrapping_sub(1), 0, u64::MAX] {
            for (op, request) in every_request(volume, generation) {
                let guarded = [Op::Detach, Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];
                if guarded.contains(&op) {
                    mallory.send(&request);
                    let status = mallory.answer().expect("an answer").status;
                    assert!(
                        matches!(status, Status::NotAttached | Status::StaleGeneration),
                        "{op:?} with generation {generation}: {status:?}"
                    );
                    refused += 1;
                }
            }
        }
        let after = (siege.requests_failed("not_attached"), siege.requests_failed("stale_generation"));
        assert_eq!(after.0 + after.1 - before.0 - before.1, refused, "each is counted");
        // Ids that nobody has: spread over both shards.
        let before = siege.requests_failed("unknown_volume");
        for volume in [0, 1, volume ^ 1, u64::MAX] {
            let read = m::Read { volume, generation, offset: 0, len: 512 };
            assert_eq!(mallory.ask(3, &read, &[]).status, Status::UnknownVolume);
        }
        assert_eq!(siege.requests_failed("unknown_volume") - before, 4);
        // Alice noticed nothing.
        let read = m::Read { volume, generation, offset: 0, len: 512 };
        assert_eq!(alice.ask(3, &read, &[]).status, Status::Ok);

        // Request ids used many times over: as many answers, all with that id.
        let requests: Vec<u8> = (0..500).flat_map(|_| frame(42, &read, &[])).collect();
        alice.send(&requests);
        for _ in 0..500 {
            let answer = alice.answer().expect("an answer");
            assert_eq!((answer.request_id, answer.status, answer.payload_len), (42, Status::Ok, 512));
        }
        // A second HELLO costs the request, and the connection goes on.
        alice.send(&hello());
        assert_eq!(alice.answer().expect("an answer").status, Status::Invalid);
        assert_eq!(alice.ask(4, &read, &[]).status, Status::Ok);
    });
    siege.lift();
}
