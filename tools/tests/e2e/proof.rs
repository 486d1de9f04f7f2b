//! What a volume is, proved: equal to its snapshot but for the sectors that its guest wrote, which the report names.

use serde_json::Value;
use volley_client::{Client, Options};

use crate::harness::{Node, NodeOptions, Site, number};
use crate::image_file::{CHUNK, MIB, noise, write_image};

const IMAGE_BYTES: u64 = 24 * MIB;
const SECTOR: u64 = 4096;

/// Writes as a guest does: offset and data of each.
fn write(node: &Node, volume: &str, writes: &[(u64, Vec<u8>)]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let client = Client::connect(&node.data, Options::default()).await.expect("connect");
        let volume = client.attach(volume).await.expect("attach");
        for (offset, data) in writes {
            volume.write(*offset, data.clone().into(), false).await.expect("write");
        }
        volume.flush().await.expect("flush");
        volume.detach().await.expect("detach");
    });
}

/// Offset and length of each run, in sectors.
fn runs(report: &Value) -> Vec<(u64, u64)> {
    let runs = report["sectors"]["runs"].as_array().expect("runs");
    runs.iter().map(|run| (number(run, "offset") / SECTOR, number(run, "bytes") / SECTOR)).collect()
}

#[test]
fn a_verification_by_sectors_names_exactly_what_the_guest_wrote() {
    let site = Site::new();
    let path = site.path("image.raw");
    write_image(&path, IMAGE_BYTES, 9);
    let image = std::fs::read(&path).expect("the image");
    site.import(&path, "debian");
    let node = site.start(&NodeOptions { default_rate: "unlimited", ..NodeOptions::default() });
    let volley = |args: &[&str]| node.volley(&site, args);
    volley(&["volume", "create", "whole", "--snapshot", "debian", "--size", "25MiB"]).success();
    volley(&["volume", "create", "lazy", "--snapshot", "debian", "--rate", "none"]).success();
    node.wait_hydrated(&site, "whole", "60s");
    let last = IMAGE_BYTES / SECTOR - 1;
    let per_chunk = CHUNK / SECTOR;
    let same = image[(600 * SECTOR) as usize..][..(2 * SECTOR) as usize].to_vec();
    let writes = [
        (3 * SECTOR, noise(1, SECTOR)),
        // Over the border of two chunks.
        ((per_chunk - 1) * SECTOR, noise(2, 2 * SECTOR)),
        // Into a chunk of zeroes: data, and zeroes.
        ((2 * per_chunk + 4) * SECTOR, noise(3, SECTOR)),
        ((2 * per_chunk + 9) * SECTOR, vec![0; SECTOR as usize]),
        // What is there already.
        (600 * SECTOR, same),
        // Less than a sector.
        (400 * SECTOR + 1024, noise(4, 512)),
        (last * SECTOR, noise(5, SECTOR)),
    ];
    let wrote = [(3, 1), (per_chunk - 1, 2), (2 * per_chunk + 4, 1), (400, 1), (last, 1)];
    let root = serde_json::from_str::<Value>(&site.volley(&["image", "show", "debian", "--json"]).success());
    let root = root.expect("JSON")["merkle_root"].clone();
    for volume in ["whole", "lazy"] {
        write(&node, volume, &writes);
        let proof = node.json(&site, &["volume", "verify", volume, "--sectors"]);
        let report = &proof["report"];
        assert_eq!(runs(report), wrote, "{volume}: {report}");
        let sectors = &report["sectors"];
        assert_eq!(
            (number(sectors, "differing_runs"), number(sectors, "differing_bytes")),
            (5, 6 * SECTOR),
            "{report}"
        );
        let of = |kind: &str| number(report, &format!("chunks_{kind}"));
        assert_eq!(of("equal") + of("changed") + of("absent"), number(report, "chunks"), "{report}");
        assert_eq!((of("damaged"), of("unexplained")), (0, 0), "{report}");
        assert!(root.is_string() && report["merkle_root"] == root, "{report}");
        assert_eq!(proof["blake3"], blake3::hash(report.to_string().as_bytes()).to_hex().as_str());
    }
    // Behind the end of the snapshot there are zeroes.
    write(&node, "whole", &[((last + 1) * SECTOR, noise(6, SECTOR))]);
    let said = volley(&["volume", "verify", "whole", "--sectors"]).success();
    let list = [(3, 1), (per_chunk - 1, 2), (2 * per_chunk + 4, 1), (400, 1), (last, 2)]
        .map(|(at, count)| format!("{} at {}", count * SECTOR, at * SECTOR))
        .join(", ");
    let sentence = format!("equals snapshot debian except for {} bytes in 5 runs of sectors: {list}", 7 * SECTOR);
    assert!(said.contains(&sentence), "{said}");
    // Without guests' writes since, nothing differs.
    volley(&["snapshot", "create", "whole", "--name", "now", "--wait"]).success();
    let said = volley(&["volume", "verify", "whole", "--sectors"]).success();
    assert!(said.contains("equals snapshot now except for nothing"), "{said}");
    let (status, _) = node.stop();
    assert!(status.success());
}
