//! The judgement of what a life left behind: every volume is read by a node without faults and compared with the model.

use volley_server::error::Status;
use volley_server::platform::sim::Sim;
use volley_server::shard::api::{Command, ConnectionId, Reply, Request};
use volley_server::types::{HydrationRate, VolumeSpec};

use crate::guest::{Guests, VolumeRc};
use crate::model::{After, BLOCK, Existence};
use crate::node::{self, Node};

/// The connection of the judge: no guest has this one.
const JUDGE: ConnectionId = ConnectionId(u64::MAX);

/// Every volume that is there was asked for, by that name.
pub async fn judge_names(node: &Node, guests: &Guests) {
    for status in node.volumes().await {
        let asked_for = guests.volumes.borrow().iter().any(|volume| {
            let volume = volume.borrow();
            volume.spec.name.as_ref() == status.name && volume.spec.size_bytes == status.size_bytes
        });
        assert!(asked_for, "nobody created this: {status:?}");
    }
}

/// A deletion that was answered is for good, and its file is gone too.
pub async fn judge_deleted(sim: &Sim, node: &Node, spec: &VolumeSpec) {
    let name = spec.name.to_string();
    let status = node.command(&name, |reply| Command::VolumeStatus { name: name.clone(), reply }).await;
    assert_eq!(status.map(|_| ()).map_err(|e| e.status), Err(Status::UnknownVolume), "{name} was deleted and is back");
    let file = node::volume_path(spec);
    for path in [file.with_extension("deleted"), file] {
        assert!(sim.peek(&path, 0, 1).is_err(), "{name} was deleted, but {} is there", path.display());
    }
}

/// Whether the volume is there; if so its content is judged.
pub async fn judge_volume(node: &Node, volume: &VolumeRc, after: After) -> bool {
    let (name, existence) = (volume.borrow().spec.name.to_string(), volume.borrow().existence);
    let status = match node.command(&name, |reply| Command::VolumeStatus { name: name.clone(), reply }).await {
        Ok(status) => status,
        Err(error) => {
            assert!(error.status == Status::UnknownVolume && existence != Existence::Sure, "{name}: {error:?}");
            return false;
        }
    };
    if volume.borrow().hydrated {
        assert!(status.hydrated, "{name} was hydrated for good");
    }
    check_durable_fetches(node, volume).await;
    let bytes = read_bytes(node, volume).await;
    check_holes(node, volume, &bytes).await;
    let mut volume = volume.borrow_mut();
    let settled = volume.settle(&bytes, after, status.snapshot.as_deref());
    settled.unwrap_or_else(|complaint| panic!("{complaint}"));
    if after == After::PowerCut {
        // After a mere kill what was found may rest on journal records that a power cut can still take.
        volume.existence = Existence::Sure;
    }
    volume.attached = false;
    volume.attaching = 0;
    true
}

async fn check_durable_fetches(node: &Node, volume: &VolumeRc) {
    let (id, ranges) = (volume.borrow().spec.id, volume.borrow().fetched_durably.clone());
    for (offset, len) in &ranges {
        let request = Request::Residency { volume: id, offset: *offset, len: *len };
        let extents = match node.request(0, JUDGE, request).await {
            Ok(Reply::Residency { extents, .. }) => extents,
            other => panic!("no residency of {offset}+{len}: {other:?}"),
        };
        assert!(extents.iter().all(|e| e.resident), "{offset}+{len} was fetched durably, but is absent: {extents:?}");
    }
}

/// What is called a hole reads as zeroes: copying clients don't read it.
async fn check_holes(node: &Node, volume: &VolumeRc, bytes: &[u8]) {
    let id = volume.borrow().spec.id;
    let mut at = 0;
    while at < bytes.len() {
        let request = Request::Residency { volume: id, offset: at as u64, len: (bytes.len() - at) as u64 };
        let Ok(Reply::Residency { extents, .. }) = node.request(0, JUDGE, request).await else {
            panic!("no residency")
        };
        assert!(!extents.is_empty(), "no extents from {at}");
        for extent in extents {
            let end = at + extent.len_bytes as usize;
            assert!(!extent.hole || bytes[at..end].iter().all(|b| *b == 0), "a hole at {at}..{end} has data");
            at = end;
        }
    }
}

/// Attaches and reads the whole volume, without a fault in sight.
async fn read_bytes(node: &Node, volume: &VolumeRc) -> Vec<u8> {
    let (name, size) = (volume.borrow().spec.name.to_string(), volume.borrow().spec.size_bytes);
    let attach = Request::Attach { name: name.clone(), resume_generation: None };
    let Ok(Reply::Attached(info)) = node.request(0, JUDGE, attach).await else { panic!("{name} can't be attached") };
    assert!(info.generation > volume.borrow().generation, "{name}: generation {} again", info.generation);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let (offset, len) = (bytes.len() as u64, (size - bytes.len() as u64).min(100 * BLOCK) as u32);
        let read = Request::Read { volume: info.volume, generation: info.generation, offset, len };
        match node.request(1, JUDGE, read).await {
            Ok(Reply::Data(data)) => bytes.extend_from_slice(&data),
            other => panic!("{name}: read of {len} bytes at {offset}: {other:?}"),
        }
    }
    bytes
}

pub async fn hydrate(node: &Node, volume: &VolumeRc) {
    let name = volume.borrow().spec.name.to_string();
    let rate = HydrationRate::Unlimited;
    node.command(&name, |reply| Command::SetRate { name: name.clone(), rate, reply }).await.expect("a rate");
    let wait = |reply| Command::WaitHydrated { name: name.clone(), timeout_ms: 600_000, reply };
    let status = node.command(&name, wait).await.expect("a healthy volume hydrates");
    assert!(status.hydrated && status.remaining_bytes == 0, "{status:?}");
    volume.borrow_mut().hydrated = true;
}

pub async fn read_all(node: &Node, volume: &VolumeRc) {
    let start = volume.borrow().begin_read(0, volume.borrow().spec.size_bytes);
    let bytes = read_bytes(node, volume).await;
    volume.borrow().check_read(&start, &bytes).unwrap_or_else(|complaint| panic!("hydrated: {complaint}"));
}
