//! A batch as large as the ones this system exists for.

use std::time::Instant;

use crate::harness::{Site, number};
use crate::image_file::{MIB, write_image};

const VOLUMES: u32 = 6000;

#[test]
fn six_thousand_volumes_are_created_listed_and_found_again() {
    let site = Site::new();
    write_image(&site.path("image.raw"), 64 * MIB, 1);
    site.import(&site.path("image.raw"), "debian-12");
    let node = site.start_default();
    let begun = Instant::now();
    node.create(&site, "debian-12", VOLUMES, "vm-");
    println!("created {VOLUMES} volumes in {:?} (development build)", begun.elapsed());

    let listed = |node: &crate::harness::Node| node.json(&site, &["volume", "list"]).as_array().expect("a list").len();
    assert_eq!(listed(&node), VOLUMES as usize);
    // All or nothing: one of these names is taken, so none of the others may appear.
    let again = ["volume", "create", "--snapshot", "debian-12", "--count", "10", "--name-prefix", "vm-599"];
    node.volley(&site, &again).fails_naming(&["vm-599"]);
    assert_eq!(listed(&node), VOLUMES as usize);

    node.kill();
    let begun = Instant::now();
    let node = site.start_default();
    println!("recovered {VOLUMES} volumes after kill -9 in {:?} (development build)", begun.elapsed());
    assert_eq!(listed(&node), VOLUMES as usize);
    assert_eq!(number(&node.volume(&site, "vm-5999"), "size_bytes"), 64 * MIB);
}
