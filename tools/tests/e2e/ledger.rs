//! What an operator can find out about a read: the ledger, the stages in the metrics, and slow reads in the log.

use crate::foreign::{qemu_io, served_with};
use crate::harness::{NodeOptions, available, number};

#[test]
fn reads_are_accounted_for_and_slow_ones_explained() {
    if !available(&["qemu-io"]) {
        return;
    }
    // Any read of absent data is slow by this measure.
    let config = "trace_slow = \"1us\"\ntransfer.price_per_million_gets = 1000000\n".to_string();
    let (site, node, agent) = served_with(&NodeOptions { config, ..NodeOptions::default() }, 2);
    for volume in ["web-0", "web-1"] {
        qemu_io(&site, &agent, volume, &["read 0 64k"]);
    }
    let ledger = node.json(&site, &["ledger"]);
    let total = &ledger["node"];
    let gets = number(total, "gets");
    assert!(gets > 0 && number(total, "object_bytes") > 0, "{ledger}");
    assert!(number(total, "asked_bytes") >= 128 << 10, "{ledger}");
    assert!(number(total, "saved_bytes") > 0, "the second volume found the chunk: {ledger}");
    assert_eq!(total["cost"].as_f64(), Some(gets as f64), "{ledger}");
    let image = &ledger["images"][0];
    assert_eq!((&image["image"], number(image, "gets")), (&"debian-12".into(), gets), "{ledger}");
    assert_eq!(ledger["batches"].as_array().map(Vec::len), Some(1), "one request made both: {ledger}");
    let text = node.volley(&site, &["ledger", "--image", "nothing"]).success();
    assert_eq!(text.lines().count(), 2, "a head and the price: {text}");

    let metrics = node.get("/metrics");
    for stage in ["queue", "transfer", "verify"] {
        let counted = metrics.lines().any(|line| {
            line.starts_with("volley_fetch_stage_seconds_count") && line.contains(stage) && !line.ends_with(" 0")
        });
        assert!(counted, "{stage} in {metrics}");
    }
    let log = node.process().log();
    let slow = log.lines().find(|line| line.contains("slow read")).unwrap_or_else(|| panic!("{log}"));
    for field in ["volume=", "tier=\"object_store\"", "queue_us=", "transfer_us=", "verify_us=", "total_us="] {
        assert!(slow.contains(field), "{field} in {slow}");
    }
}
