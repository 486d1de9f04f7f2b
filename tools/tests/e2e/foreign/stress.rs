//! libnbd's own Python bindings: hundreds of requests in flight on four connections, every answer judged (stress.py).

use serde_json::Value;

use super::{hydrate, nbdcopy, served};
use crate::harness::{available, nbdsh, number};
use crate::image_file::assert_same;

const SCRIPT: &str = include_str!("stress.py");
const REQUESTS: &str = "10000";

#[test]
fn libnbd_finds_every_byte_of_hundreds_of_requests_in_flight() {
    if !available(&["nbdsh", "nbdcopy"]) {
        return;
    }
    let (site, node, agent) = served(1);
    hydrate(&site, &node, "web-0");
    std::fs::write(site.path("stress.py"), SCRIPT).expect("write the script");
    let image = site.path("image.raw").display().to_string();
    let expected = site.path("expected.raw").display().to_string();
    let uri = agent.uri("web-0");
    let environment = [
        ("VOLLEY_URI", uri.as_str()),
        ("VOLLEY_IMAGE", &image),
        ("VOLLEY_EXPECTED", &expected),
        ("VOLLEY_SEED", "7"),
        ("VOLLEY_REQUESTS", REQUESTS),
    ];
    let printed = nbdsh(&site.path(""), "stress.py", &environment).success();
    println!("{printed}");
    let counts: Value = serde_json::from_str(printed.lines().last().expect("counts")).expect("JSON");
    let kinds =
        "read write write_fua read_structured status zero trim duel neighbours cache flush refused nothing vanish";
    for kind in kinds.split(' ') {
        assert!(number(&counts, kind) > 0, "no {kind} was judged: {counts}");
    }
    assert!(number(&counts, "deepest") > 64, "{counts}");

    // A killed server has what it answered, and hydration does not touch it.
    node.kill();
    let node = site.start_default();
    nbdcopy(&site, &[], &uri, "copy.raw");
    assert_same(&site.path("expected.raw"), &site.path("copy.raw"));
    node.volley(&site, &["volume", "set", "web-0", "--rate", "unlimited"]).success();
    node.wait_hydrated(&site, "web-0", "60s");
    nbdcopy(&site, &[], &uri, "hydrated.raw");
    assert_same(&site.path("expected.raw"), &site.path("hydrated.raw"));
}
