//! The load generator's own NBD client.

use std::time::Duration;

use volley_tools::load::nbd::{Disk, Servers};
use volley_tools::nbd::backend::{ErrorKind, ExportError};

use crate::harness::{Server, noise};

const SIZE: usize = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(20);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

#[test]
fn it_reads_what_is_there_and_says_what_is_not() {
    let server = Server::of(noise(SIZE, 7));
    let data = server.backend.disk("disk").data.clone();
    let servers: Servers = format!("unix:{}", server.socket().display()).parse().expect("an address");
    let address = servers.of("disk").expect("an address");
    block_on(async {
        let unknown = Disk::open(&address, "nobody", DEADLINE).await.expect_err("no such export");
        assert!(unknown.contains("nobody"), "{unknown}");
        let mut disk = Disk::open(&address, "disk", DEADLINE).await.expect("an export");
        assert_eq!(disk.size_bytes(), SIZE as u64);
        for (offset, len) in [(0, 512), (512, 4096), (SIZE - 65536, 65536), (0, SIZE), (99, 1)] {
            let read = disk.read(offset as u64, len as u64).await.expect("a read");
            assert!(read == &data[offset..offset + len], "{len} bytes at {offset}");
        }
        assert!(disk.read(SIZE as u64, 512).await.is_err(), "past the end");
        assert!(disk.read(0, 1 << 40).await.is_err(), "longer than the protocol knows");
        server.backend.disk("disk").failure = Some(ExportError { kind: ErrorKind::Io, message: "broken".into() });
        assert!(disk.read(0, 512).await.expect_err("a failure").contains("at 0"));
        server.backend.disk("disk").failure = None;
        assert_eq!(disk.read(0, 512).await.expect("the next request is answered"), &data[..512]);
    });
}
