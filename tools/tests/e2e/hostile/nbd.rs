//! The agent's NBD socket under strangers: noise, half handshakes by the thousand, clients that do not read.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use volley_tools::nbd::wire;

use super::Siege;
use crate::faults::eventually;
use crate::harness::Random;
use crate::torture::guest::NbdGuest;

/// Connections that stop in the middle of their handshake.
const HALF_OPEN: usize = 2000;
/// Clients that ask for more than they take, each for 100 MiB.
const NOT_READING: usize = 10;
/// The agent's own, and 64 MiB for each client that does not read (`docs/nbd.md`).
const MEMORY_GROWTH_MAX: u64 = (NOT_READING as u64 * 64 + 128) << 20;

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the agent runs").count()
}

fn connect(siege: &Siege) -> UnixStream {
    let stream = UnixStream::connect(siege.agent.socket()).expect("the agent listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream
}

#[test]
fn strangers_at_the_agent_cost_its_guests_nothing() {
    let mut siege = Siege::lay();
    siege.volumes("mallory-", 1);
    let pid = siege.agent.process().id();
    siege.attack("strangers at the agent", |siege| {
        let (memory, files) = (resident_bytes(pid), open_files(pid));
        let mut noise = Random::new(11);
        for round in 0..200 {
            let mut stream = connect(siege);
            let mut bytes: Vec<u8> = (0..1 + noise.below(2000)).map(|_| noise.below(256) as u8).collect();
            if round % 2 == 0 {
                // Past the flags, and an option of any length.
                bytes.splice(0..0, 3u32.to_be_bytes());
                bytes.splice(4..4, wire::OPTION_MAGIC.to_be_bytes());
            }
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        let half_open: Vec<UnixStream> = (0..HALF_OPEN)
            .map(|number| {
                let mut stream = connect(siege);
                let _ = stream.write_all(&[0, 0, 0, 3, b'I', b'H', b'A'][..number % 8]);
                stream
            })
            .collect();
        let mut guest = NbdGuest::connect(&siege.agent.socket(), "mallory-0").expect("a guest is served meanwhile");
        guest.read(0, 4096).expect("a read");
        drop(half_open);
        let not_reading: Vec<UnixStream> = (0..NOT_READING).map(|_| ask_without_reading(siege)).collect();
        guest.read(4096, 4096).expect("a read");
        let growth = resident_bytes(pid).saturating_sub(memory);
        println!("hostile: the agent's memory grew by {} MiB", growth >> 20);
        assert!(growth < MEMORY_GROWTH_MAX, "the agent's memory grew by {growth} bytes");
        drop((not_reading, guest));
        eventually("the agent lets go of them", || open_files(pid) <= files + 4);
    });
    siege.lift();
}

/// A client that has opened an export, asks for 100 MiB in requests of 1 MiB, and reads nothing.
fn ask_without_reading(siege: &Siege) -> UnixStream {
    let mut stream = connect(siege);
    stream.read_exact(&mut [0; 18]).expect("a greeting");
    let mut bytes = 3u32.to_be_bytes().to_vec();
    bytes.extend(wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend(wire::option::EXPORT_NAME.to_be_bytes());
    bytes.extend(9u32.to_be_bytes());
    bytes.extend(b"mallory-0");
    stream.write_all(&bytes).expect("the agent reads");
    stream.read_exact(&mut [0; 10]).expect("an export");
    for cookie in 0..100_u64 {
        let mut request = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(wire::command::READ.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(0u64.to_be_bytes());
        request.extend((1u32 << 20).to_be_bytes());
        stream.write_all(&request).expect("the socket takes it");
    }
    stream
}
