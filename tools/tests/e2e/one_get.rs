//! A storm as large as the ones this system exists for, counted by the object store: 6,000 guests want the same chunk at the
//! same instant, and the S3 server's log has one GET.

use std::process::Command;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use volley_client::{Client, FetchUntil, Options, Volume};

use crate::harness::{Node, NodeOptions, Site, number, run};
use crate::image_file::noise;
use crate::s3::server::{BUCKET, KEY, Logged, S3Server, SECRET};

const VOLUMES: usize = 6000;
/// Each with a connection to each shard.
const CLIENTS: usize = 8;
/// The smallest there is: every volume gets a copy of its own.
const CHUNK: u64 = 64 << 10;
const CHUNKS: u64 = 8;
/// The chunk that everybody wants.
const WANTED: u64 = 5;
/// Far more than the storm takes to arrive, and less than the deadlines below.
const STORM_MAX: Duration = Duration::from_secs(60);

fn with_bucket(mut command: Command, server: &S3Server) -> Command {
    command
        .env("VOLLEY_OBJECT_STORE", format!("s3://{BUCKET}/prod"))
        .env("AWS_ENDPOINT_URL", format!("http://{}", server.address))
        .env("AWS_ACCESS_KEY_ID", KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET);
    for inherited in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_CA_BUNDLE"] {
        command.env_remove(inherited);
    }
    command
}

fn start(site: &Site, server: &S3Server) -> Node {
    let options = NodeOptions {
        object_store: Some(format!("s3://{BUCKET}/prod")),
        config: "deadlines.guest_read = \"100s\"\nretries.deadline = \"100s\"\ns3.read_timeout = \"100s\"\n".to_owned(),
        ..NodeOptions::default()
    };
    Site::start_command(with_bucket(site.node_command(&options), server))
}

/// Requests for pack data in the server's log.
fn pack_gets(server: &S3Server) -> Vec<Logged> {
    server.log().into_iter().filter(Logged::gets_pack).collect()
}

/// The sum of a counter over the shards.
fn counted(node: &Node, name: &str) -> u64 {
    let text = node.get("/metrics");
    let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).expect("a number")).sum()
}

async fn attach_all(node: &Node) -> Vec<Volume> {
    let options = Options { deadline: Duration::from_secs(100), in_flight_max: 1024, ..Options::default() };
    let connects = (0..CLIENTS).map(|_| Client::connect(&node.data, options.clone()));
    let clients = try_join_all(connects).await.expect("connect");
    let names: Vec<String> = (0..VOLUMES).map(|n| format!("vm-{n}")).collect();
    let attaches = names.iter().enumerate().map(|(n, name)| clients[n % CLIENTS].attach(name));
    try_join_all(attaches).await.expect("attach")
}

#[test]
fn six_thousand_volumes_that_want_the_same_chunk_at_the_same_instant_are_one_get_in_the_servers_log() {
    let (site, server) = (Site::new(), S3Server::start());
    let content = noise(7, CHUNK * CHUNKS);
    let image = site.path("image.raw");
    std::fs::write(&image, &content).expect("image");
    let import = ["image", "import", &image.display().to_string(), "--name", "debian-12", "--chunk-size", "64KiB"];
    run(with_bucket(site.volley_command(&import), &server)).success();
    let node = start(&site, &server);
    node.create(&site, "debian-12", u32::try_from(VOLUMES).expect("count"), "vm-");
    assert_eq!(number(&node.volume(&site, "vm-5999"), "chunk_bytes"), CHUNK);
    assert_eq!(pack_gets(&server), [], "nobody has asked for data yet");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let volumes = runtime.block_on(attach_all(&node));
    server.hold(true);
    let wanted = CHUNK * WANTED;
    let storm = std::thread::spawn(move || {
        let fetches = volumes.iter().map(|volume| volume.priority_fetch(wanted, CHUNK, FetchUntil::Readable));
        let answers = runtime.block_on(try_join_all(fetches)).expect("every fetch succeeds");
        assert_eq!(answers.len(), VOLUMES);
        (runtime, volumes)
    });
    // All the others wait for the first one's GET, of which the server has said nothing yet.
    let begun = Instant::now();
    while counted(&node, "volley_fetches_joined_total") < VOLUMES as u64 - 1 {
        assert!(begun.elapsed() < STORM_MAX && !storm.is_finished(), "the storm does not arrive");
    }
    let arrived = begun.elapsed();
    server.hold(false);
    let (runtime, volumes) = storm.join().expect("storm");
    println!("{VOLUMES} requests outstanding after {arrived:?}, answered after {:?}", begun.elapsed());

    let gets = pack_gets(&server);
    assert_eq!(gets.len(), 1, "{gets:?}");
    let range = gets[0].range.clone().expect("a part of the pack");
    assert!(range.end - range.start >= CHUNK && range.end - range.start < 2 * CHUNK, "this chunk alone: {range:?}");

    let right = &content[usize::try_from(wanted).expect("small")..][..4096];
    let reads = runtime.block_on(try_join_all(volumes.iter().map(|volume| volume.read(wanted, 4096)))).expect("read");
    assert!(reads.len() == VOLUMES && reads.iter().all(|read| read[..] == *right), "wrong data");
    assert_eq!(pack_gets(&server), gets, "and no other for all the reads");
    assert_eq!(counted(&node, "volley_object_gets_total"), 1, "the node counts as the server does");
    assert!(node.stop().0.success());
}
