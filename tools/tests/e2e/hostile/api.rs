//! The HTTP API under strangers: noise, heads that never end, more connections than it takes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::Siege;
use crate::faults::eventually;

/// More than the API takes at once.
const CROWD: usize = 700;

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the API listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream
}

/// The status line that these bytes are answered with; empty if the connection was closed without one.
fn answer(address: &str, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn the_api_survives_strangers_and_the_data_port_does_not_notice() {
    let mut siege = Siege::lay();
    siege.attack("strangers at the HTTP API", |siege| {
        let address = &siege.node.http;
        let body = "{".repeat(32 << 10);
        let post = |body: &str, len: usize| {
            let head =
                "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n";
            format!("{head}content-length: {len}\r\n\r\n{body}").into_bytes()
        };
        assert!(answer(address, &post(&body, body.len())).contains(" 400 "), "nested beyond reason");
        // Just beyond, so that nothing unread is left behind the refusal.
        let long = " ".repeat((64 << 10) + 1);
        assert!(answer(address, &post(&long, long.len())).contains(" 413 "), "a body beyond the limit");
        assert!(answer(address, &post("{}", 100)).contains(" 400 "), "half a body");
        let broken = siege.metric("volley_http_connections_broken_total", "");
        for noise in
            [&b"\x00\x01\x02\xff\xfe"[..], b"VLLY\x01\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", &[b'a'; 1 << 20]]
        {
            let answer = answer(address, noise);
            assert!(answer.is_empty() || answer.contains(" 4"), "{answer}");
        }
        assert!(siege.metric("volley_http_connections_broken_total", "") > broken, "noise is counted");

        // More connections than it takes, with heads that never end. The scraper's own one is among the refused until
        // they are closed for their silence.
        let mut crowd: Vec<TcpStream> = (0..CROWD).map(|_| connect(address)).collect();
        for stream in &mut crowd {
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nx-slow: ");
        }
        let scrape = || ureq::get(format!("http://{address}/healthz")).call().is_ok();
        eventually("the crowd is closed for its silence", scrape);
        assert!(siege.metric("volley_http_connections_refused_total", "") > 0, "refusals are counted");
        let counted = || siege.metric("volley_http_connections_broken_total", "") > broken + 400;
        eventually("silence is counted", counted);
        drop(crowd);
    });
    siege.lift();
}
