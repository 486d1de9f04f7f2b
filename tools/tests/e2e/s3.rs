//! The object store is a bucket: every command with `s3://`, and a node through a proxy that breaks things.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Node, NodeOptions, Outcome, Site, number, run};
use crate::image_file::{CHUNK, MIB, assert_same, noise, write_image};
use proxy::{Fault, Proxy};
use server::{KEY, S3Server, SECRET, files_below};

#[allow(dead_code, reason = "the server's own tests use all of it")]
#[path = "../../../server/tests/s3/proxy.rs"]
mod proxy;
#[path = "../../../server/tests/s3/server.rs"]
pub(crate) mod server;

const URL: &str = "s3://images/prod";

struct Lab {
    site: Site,
    proxy: Proxy,
    server: S3Server,
}

impl Lab {
    fn new() -> Lab {
        let server = S3Server::start();
        let proxy = Proxy::start(server.address, None);
        let site = Site::new();
        write_image(&site.path("image.raw"), 24 * MIB, 1);
        Lab { site, proxy, server }
    }

    fn at(&self, mut command: Command, url: &str, secret: &str) -> Command {
        command
            .env("VOLLEY_OBJECT_STORE", url)
            .env("AWS_ENDPOINT_URL", format!("http://{}", self.proxy.address))
            .env("AWS_ACCESS_KEY_ID", KEY)
            .env("AWS_SECRET_ACCESS_KEY", secret);
        for inherited in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_CA_BUNDLE"] {
            command.env_remove(inherited);
        }
        command
    }

    fn volley(&self, args: &[&str]) -> Outcome {
        run(self.at(self.site.volley_command(args), URL, SECRET))
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.volley(&[args, &["--json"]].concat()).success()).expect("JSON")
    }

    fn import(&self) -> Outcome {
        let image = self.site.path("image.raw").display().to_string();
        self.volley(&["image", "import", &image, "--name", "debian-12"])
    }

    fn node_command(&self, url: &str, secret: &str) -> Command {
        let options = NodeOptions {
            object_store: Some(url.to_owned()),
            default_rate: "unlimited",
            config: "[s3]\nread_timeout = \"700ms\"\n".to_owned(),
            ..NodeOptions::default()
        };
        self.at(self.site.node_command(&options), url, secret)
    }

    fn start(&self) -> Node {
        Site::start_command(self.node_command(URL, SECRET))
    }

    fn left(&self) -> Vec<String> {
        files_below(&self.server.bucket())
    }
}

#[test]
fn images_live_in_a_bucket_as_they_do_in_a_directory() {
    let lab = Lab::new();
    lab.import().success();
    let images = lab.json(&["image", "list"]);
    assert_eq!(images[0]["name"], "debian-12");
    assert_eq!(number(&lab.json(&["image", "show", "debian-12"]), "size_bytes"), 24 * MIB);
    lab.volley(&["image", "verify", "debian-12"]).success();
    let copy = lab.site.path("copy.raw");
    lab.volley(&["image", "export", "debian-12", &copy.display().to_string()]).success();
    assert_same(&lab.site.path("image.raw"), &copy);
    lab.import().fails_naming(&["debian-12", "exists already"]);
    lab.volley(&["image", "delete", "debian-12"]).success();
    lab.volley(&["image", "gc", "--grace", "0s"]).success();
    assert_eq!(lab.left(), Vec::<String>::new());
}

#[test]
fn a_node_hydrates_from_a_bucket_through_faults_and_every_chunk_is_right() {
    let lab = Lab::new();
    lab.import().success();
    let packs = "GET /images/prod/packs";
    for (fault, times) in [
        (Fault::Status(503, "SlowDown"), 3),
        (Fault::Flip, 1),
        (Fault::Cut, 2),
        (Fault::Stall, 1),
        (Fault::Reset, 2),
        (Fault::Delay(Duration::from_millis(200)), 3),
    ] {
        lab.proxy.fail(packs, fault, times);
    }
    let node = lab.start();
    node.create(&lab.site, "debian-12", 2, "web-");
    for volume in ["web-0", "web-1"] {
        node.wait_hydrated(&lab.site, volume, "100s");
    }
    let (status, _) = node.stop();
    assert!(status.success());
    // Every chunk of both volumes against the bucket.
    let data = lab.site.data().display().to_string();
    let report = lab.json(&["check", &data]);
    assert_eq!(report["clean"], true, "{report}");
    assert!(number(&report, "chunks_verified") > 0, "{report}");
}

#[test]
fn a_check_of_the_store_tells_what_it_can_and_leaves_nothing() {
    let lab = Lab::new();
    let report = lab.json(&["object-store", "check"]);
    assert_eq!(report["ok"], true, "{report}");
    let features = report["features"].as_array().expect("features");
    for name in ["ranged get", "put if absent", "atomic put if absent", "multipart put", "list", "delete", "clock"] {
        let feature = features.iter().find(|f| f["name"] == name).unwrap_or_else(|| panic!("no {name} in {report}"));
        assert_eq!(feature["ok"], true, "{feature}");
    }
    assert!(report["small_get"]["p99_ms"].as_f64().expect("p99") > 0.0);
    let throughput = report["throughput"].as_array().expect("throughput");
    assert!(throughput.len() == 4 && throughput.iter().all(|t| t["mib_per_second"].as_f64() > Some(0.0)), "{report}");
    assert_eq!(lab.left(), Vec::<String>::new());

    lab.proxy.fail("POST /images/prod/trial", Fault::Status(403, "AccessDenied"), usize::MAX);
    let outcome = lab.volley(&["object-store", "check"]);
    assert!(outcome.code == 1 && outcome.stdout.contains("MISSING"), "{outcome:?}");
    outcome.fails_naming(&[URL, "lacks: multipart put"]);
    lab.proxy.heal();
    assert_eq!(lab.left(), Vec::<String>::new());
}

#[test]
fn what_is_set_wrongly_is_one_line_of_tool_and_server() {
    let lab = Lab::new();
    let endpoint = format!("http://{}", lab.proxy.address);
    for (url, secret, words) in [
        (URL, "wrong", ["s3://images/prod", "are wrong"]),
        ("s3://nobody", SECRET, ["s3://nobody", "does not exist"]),
        ("s3://", SECRET, ["s3://", "write s3://BUCKET"]),
    ] {
        let words = if url == "s3://" { words.to_vec() } else { [&words[..], &[endpoint.as_str()]].concat() };
        run(lab.at(lab.site.volley_command(&["image", "list"]), url, secret)).fails_naming(&words);
        let outcome = run(lab.node_command(url, secret));
        assert_eq!(outcome.code, 1, "{outcome:?}");
        let last = outcome.stderr.trim_end().lines().last().unwrap_or_default().to_owned();
        assert!(last.starts_with("volleyd: error: "), "{last}");
        for word in &words {
            assert!(last.contains(word), "no {word:?} in: {last}");
        }
    }
    lab.proxy.fail("PUT ", Fault::Status(403, "AccessDenied"), usize::MAX);
    lab.import().fails_naming(&[URL, &endpoint, "s3:PutObject", "grant"]);
}

#[test]
fn snapshots_are_copied_into_a_bucket_and_out_of_it_also_after_their_packs_were_rewritten() {
    let lab = Lab::new();
    let (site, directory) = (&lab.site, lab.site.objects_url());
    let at = |url: &str, args: &[&str]| run(lab.at(site.volley_command(args), url, SECRET));
    let json = |url: &str, args: &[&str]| -> Value {
        serde_json::from_str(&at(url, &[args, &["--json"]].concat()).success()).expect("JSON")
    };
    let image = site.path("image.raw");
    site.import(&image, "monday");
    // Of every third chunk something changes.
    let changed = std::fs::File::options().write(true).open(&image).expect("open");
    for chunk in (0..24 * MIB / CHUNK).step_by(3) {
        std::os::unix::fs::FileExt::write_all_at(&changed, &noise(chunk + 90, 4096), chunk * CHUNK).expect("write");
    }
    site.import(&image, "tuesday");
    let root = |url: &str| json(url, &["image", "verify", "tuesday"])["merkle_root"].clone();
    let expected = root(&directory);

    // Into the bucket; what the first copy brought is not sent again.
    let first = json(&directory, &["image", "copy", "monday", "--to", URL]);
    let second = json(&directory, &["image", "copy", "tuesday", "--to", URL]);
    let (sent, there) = (number(&second, "stored_chunks"), number(&second, "shared_chunks"));
    assert!(number(&first, "stored_chunks") > sent && sent > 0 && there > sent, "{first} {second}");
    at(&directory, &["image", "copy", "tuesday", "--to", URL]).fails_naming(&["target", "exists already"]);
    assert_eq!(root(URL), expected);

    // Without the first, its packs are mostly dead: what is left of them moves.
    lab.volley(&["image", "delete", "monday"]).success();
    let packs = || lab.left().into_iter().filter(|key| key.contains("packs/")).collect::<Vec<_>>();
    let before = packs();
    let report = lab.json(&["image", "gc", "--grace", "0s", "--rewrite-below", "100%"]);
    assert_eq!(report["rewritten"]["snapshots"], serde_json::json!(["tuesday"]), "{report}");
    assert!(number(&report, "packs_removed") > 0, "{report}");
    assert!(packs().iter().any(|key| !before.contains(key)) && before.iter().any(|key| !packs().contains(key)));
    assert_eq!(root(URL), expected, "rewritten");
    let exported = site.path("from-the-bucket.raw");
    lab.volley(&["image", "export", "tuesday", &exported.display().to_string()]).success();
    assert_same(&image, &exported);

    // And out of it, through a network that fails now and then.
    lab.proxy.fail("GET /images/prod/packs", Fault::Status(503, "SlowDown"), 2);
    lab.proxy.fail("GET /images/prod/packs", Fault::Cut, 1);
    let back = format!("file:{}", site.path("back").display());
    json(URL, &["image", "copy", "tuesday", "--to", &back, "--as", "tuesday"]);
    assert_eq!(root(&back), expected);
    let exported = site.path("back.raw");
    at(&back, &["image", "export", "tuesday", &exported.display().to_string()]).success();
    assert_same(&image, &exported);
    // What was left in the bucket goes with its last snapshot.
    lab.volley(&["image", "delete", "tuesday"]).success();
    lab.volley(&["image", "gc", "--grace", "0s"]).success();
    assert_eq!(lab.left(), Vec::<String>::new());
}
