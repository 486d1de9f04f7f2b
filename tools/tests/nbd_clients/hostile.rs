//! Bad bytes, peers that vanish, failing backends: each costs its own request or connection and nobody else's.

use volley_tools::nbd::backend::{ErrorKind, ExportError};
use volley_tools::nbd::wire::{
    OPTION_BYTES_MAX, OPTION_MAGIC, PAYLOAD_BYTES_MAX, command, errno, option, option_reply,
};

use crate::harness::{RawClient, Server, SimpleReply, noise};

const SIZE: usize = 1 << 20;

fn info_request(name: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name, &0u16.to_be_bytes()].concat()
}

#[test]
fn options_refused_do_not_end_the_handshake() {
    let server = Server::of(vec![0; SIZE]);
    let mut client = RawClient::connect(&server);
    let cases: [(u32, Vec<u8>, u32); 7] = [
        (option::STARTTLS, vec![], option_reply::ERR_POLICY),
        (11, vec![], option_reply::ERR_UNSUP),
        (9999, vec![7; 100], option_reply::ERR_UNSUP),
        (option::LIST, vec![0; OPTION_BYTES_MAX as usize + 1], option_reply::ERR_TOO_BIG),
        (option::GO, vec![0xff; 9], option_reply::ERR_INVALID),
        (option::INFO, info_request(b"nobody"), option_reply::ERR_UNKNOWN),
        (option::INFO, info_request(b""), option_reply::ERR_UNKNOWN),
    ];
    for (number, data, want) in cases {
        client.option(number, &data);
        let (reply, text) = client.option_reply();
        assert_eq!(reply, want, "option {number}: {}", String::from_utf8_lossy(&text));
        assert!(!text.is_empty(), "option {number} is refused without a word");
    }
    // Contexts before structured replies.
    client.option(option::SET_META_CONTEXT, &[&info_request(b"disk")[..], &[0; 2]].concat());
    assert_eq!(client.option_reply().0, option_reply::ERR_INVALID);
    client.option(option::INFO, &info_request(b"disk"));
    assert_eq!(client.option_reply().0, option_reply::INFO);
    assert_eq!(client.option_reply().0, option_reply::INFO);
    assert_eq!(client.option_reply().0, option_reply::ACK);
    client.option(option::ABORT, b"");
    assert_eq!(client.option_reply().0, option_reply::ACK);
    assert!(client.is_closed());
    assert_eq!(server.backend.disk("disk").attached_total, 0);
}

#[test]
fn bad_magic_costs_the_connection_and_only_that() {
    let server = Server::of(noise(SIZE, 1));
    let mut good = RawClient::open(&server);
    let mut in_handshake = RawClient::connect(&server);
    in_handshake.send(&(OPTION_MAGIC ^ 1).to_be_bytes());
    in_handshake.send(&[0; 8]);
    assert!(in_handshake.is_closed());
    let mut unknown_export = RawClient::connect(&server);
    unknown_export.option(option::EXPORT_NAME, b"nobody");
    assert!(unknown_export.is_closed());
    let mut in_transmission = RawClient::open(&server);
    in_transmission.send(&[0x25; 28]);
    assert!(in_transmission.is_closed());
    assert_eq!(good.read(0, 512).unwrap(), server.backend.disk("disk").data[..512]);
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    let server = Server::of(vec![0; SIZE]);
    let mut client = RawClient::open(&server);
    assert_eq!(client.write(SIZE as u64, &[1; 700]), errno::ENOSPC);
    assert_eq!(client.write(0, &vec![1; PAYLOAD_BYTES_MAX as usize + 1]), errno::ENOSPC);
    assert_eq!(client.read(u64::MAX, u32::MAX), Err(errno::EINVAL));
    client.request(command::BLOCK_STATUS, 3, 0, 512);
    assert_eq!(client.simple_reply(), SimpleReply { errno: errno::EINVAL, cookie: 3 });
    client.request(77, 4, 0, 0);
    assert_eq!(client.simple_reply(), SimpleReply { errno: errno::EINVAL, cookie: 4 });
    assert_eq!(client.read(0, 0), Ok(vec![]));
    assert_eq!(client.write(100, &[9; 3]), 0);
    assert_eq!(client.read(99, 5), Ok(vec![0, 9, 9, 9, 0]));
    assert_eq!(server.backend.disk("disk").data.iter().filter(|byte| **byte != 0).count(), 3);
}

#[test]
fn a_payload_larger_than_the_limit_is_skipped_and_refused() {
    let server = Server::of(vec![0; PAYLOAD_BYTES_MAX as usize * 2]);
    let mut client = RawClient::open(&server);
    assert_eq!(client.write(0, &vec![1; PAYLOAD_BYTES_MAX as usize + 512]), errno::EINVAL);
    assert_eq!(client.read(0, PAYLOAD_BYTES_MAX + 1), Err(errno::EINVAL));
    assert_eq!(client.read(0, PAYLOAD_BYTES_MAX).unwrap(), vec![0; PAYLOAD_BYTES_MAX as usize]);
}

#[test]
fn a_client_killed_mid_request_writes_nothing_and_lets_go() {
    let mut server = Server::of(vec![0; SIZE]);
    let mut killed = RawClient::open(&server);
    killed.request(command::WRITE, 1, 0, 4096);
    killed.send(&[1; 4000]);
    drop(killed);
    // Asks much and does not wait for any answer.
    let mut impatient = RawClient::open(&server);
    (0..200).for_each(|cookie| impatient.request(command::READ, cookie, 0, SIZE as u32));
    drop(impatient);
    server.stop();
    let disk = server.backend.disk("disk");
    assert!(disk.data.iter().all(|byte| *byte == 0));
    assert!(disk.attached_total >= 1);
    assert_eq!(disk.attached_total, disk.detached_total);
}

#[test]
fn a_backends_error_reaches_the_client_and_the_export_goes_on() {
    let server = Server::of(vec![7; SIZE]);
    let mut client = RawClient::open(&server);
    for (kind, want) in
        [(ErrorKind::NoSpace, errno::ENOSPC), (ErrorKind::Io, errno::EIO), (ErrorKind::Invalid, errno::EINVAL)]
    {
        server.backend.disk("disk").failure = Some(ExportError::new(kind, "made by the test"));
        assert_eq!(client.write(0, &[1; 512]), want);
        assert_eq!(client.read(0, 512), Err(want));
    }
    server.backend.disk("disk").failure = None;
    assert_eq!(client.read(0, 3), Ok(vec![7; 3]));
}

#[test]
fn a_fenced_export_answers_and_hangs_up_and_can_be_opened_anew() {
    let server = Server::of(vec![7; SIZE]);
    let mut first = RawClient::open(&server);
    let mut second = RawClient::open(&server);
    server.backend.disk("disk").failure = Some(ExportError::new(ErrorKind::Gone, "another host attached the volume"));
    assert_eq!(first.read(0, 512), Err(errno::ESHUTDOWN));
    assert!(first.is_closed());
    assert_eq!(second.write(0, &[1; 512]), errno::ESHUTDOWN);
    assert!(second.is_closed());
    server.backend.disk("disk").failure = None;
    let mut third = RawClient::open(&server);
    assert_eq!(third.read(0, 3), Ok(vec![7; 3]));
    assert_eq!(server.backend.disk("disk").attached_total, 2);
}

#[test]
fn a_stop_answers_what_is_in_flight_flushes_and_detaches() {
    let mut server = Server::of(vec![0; SIZE]);
    let mut client = RawClient::open(&server);
    assert_eq!(client.write(0, &[1; 512]), 0);
    let idle = RawClient::connect(&server);
    server.stop();
    assert!(client.is_closed());
    drop(idle);
    assert!(!server.socket().exists(), "the socket file is removed");
    let disk = server.backend.disk("disk");
    assert_eq!((disk.writes_unflushed, disk.attached_total, disk.detached_total), (0, 1, 1));
}

#[test]
fn many_requests_in_flight_are_all_answered_once() {
    let server = Server::of(noise(SIZE, 6));
    let mut client = RawClient::open(&server);
    let offset = |cookie: u64| cookie * 613 % (SIZE as u64 - 512);
    (0..1000).for_each(|cookie| client.request(command::READ, cookie, offset(cookie), 512));
    let mut seen = vec![false; 1000];
    for _ in 0..1000 {
        let reply = client.simple_reply();
        let data = client.receive_vec(512);
        let at = offset(reply.cookie) as usize;
        assert!(data == server.backend.disk("disk").data[at..at + 512]);
        assert!(!std::mem::replace(&mut seen[reply.cookie as usize], true), "answered twice");
    }
    client.request(command::DISC, 0, 0, 0);
    assert!(client.is_closed());
}
