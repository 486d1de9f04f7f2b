//! Writes a configuration as a commented TOML file: the reference of every key and its default.

use std::fmt::Write as _;

use super::{Config, StoreConfig};
use crate::object_store::s3::S3Config;
use crate::types::HydrationRate;
use crate::units::ByteSize;

pub(super) fn to_toml(config: &Config) -> String {
    let Config {
        data,
        object_store,
        listen,
        http,
        cores,
        idle_poll,
        log,
        trace_slow,
        cache,
        hydration,
        transfer,
        placement,
        snapshots,
        deadlines,
        retries,
        s3,
        stores,
    } = config;
    let object_store = match object_store {
        Some(url) => format!("object_store = {}", text(url)),
        None => "# object_store = \"file:/var/lib/volley/objects\"".to_string(),
    };
    let cache_dir = match &cache.dir {
        Some(dir) => format!("dir = {}", text(&dir.to_string_lossy())),
        None => "# dir = \"/mnt/nvme0/volley-cache\"".to_string(),
    };
    let rate = match hydration.default_rate {
        HydrationRate::BytesPerSecond(bytes) => format!("{}/s", ByteSize(bytes)),
        other => other.to_string(),
    };
    let mut out = format!(
        r#"# Configuration of volleyd. Every key is optional except object_store. Unknown keys are errors.
# Sizes are written as "256MiB", durations as "30s", bandwidths as "200MiB/s" or "unlimited".

# Identity, journals and, unless [[store]] says otherwise, volumes of this node.
data = {data}

# Where snapshots live: file:DIR or s3://BUCKET/PREFIX. Must be given here, as --object-store or as VOLLEY_OBJECT_STORE.
{object_store}

# Data port of shard 0: host:port or unix:PATH. Shard k listens on port + k, or on PATH.k. Port 0 picks free ports.
listen = {listen}

# HTTP API, metrics and health: host:port. There is no authentication: keep it on a trusted network.
http = {http}

# Shards, each pinned to a core. 0: one for each core this process may use.
cores = {cores}

# A shard without work looks for some this long before it sleeps: waking up takes longer than a fast disk. "0us" sleeps
# at once. Ignored where shards share a core.
idle_poll = "{idle_poll}"

# error, warn, info, debug, trace, or per module: "info,volley_server::shard=debug".
log = {log}

# Guest reads of absent data that take longer than this are logged with their stages. "0s": none.
trace_slow = "{trace_slow}"

[cache]
# RAM for chunks of the whole node, split evenly over the shards.
ram_bytes = "{ram_bytes}"
# What guests of a batch of several volumes ask for stays in RAM (at most half of it) until none has asked for so long.
# "0s": it is evicted like anything else.
pin_waves = "{pin_waves}"
# Disk for chunks of the whole node, so that a restart stays warm. "0" is no disk cache; else at least 64MiB.
disk_bytes = "{disk_bytes}"
# Where the disk cache lies: <data>/cache unless given. It may be lost at any time.
{cache_dir}

[hydration]
# Rate of volumes whose creator names none: "unlimited", "none" (only what is touched) or bytes per second.
default_rate = "{rate}"
# Object-store reads in flight per shard, and how many of them background hydration may occupy: the rest is reserved
# for guests and priority fetches.
reads_max = {reads_max}
background_reads_max = {background_reads_max}
# Neighbouring chunks of a pack are fetched in one read of at most this size.
read_bytes_max = "{read_bytes_max}"
# What a volume's guest touches within this of its first attachment is its boot. Boots are learned from, and later volumes
# of the image hydrate first what boots touch. "0s": none is recorded.
boot_window = "{boot_window}"
# While guests use a store its hydration slows down as long as the p99 of their I/O there is over the bound times what it is
# without hydration. "none": their latency is not looked at. The floor is what hydration of a store may write all the same:
# "auto" is 5% of its hydration_bandwidth, or 4MiB/s where that has no limit.
guest_p99_bound = "{guest_p99_bound}"
floor = "{floor}"

# The object store as the whole node uses it; every shard has an equal share.
[transfer]
# false: every volume fetches for itself and nothing is cached. Only to measure what sharing saves.
share = {share}
# Bytes received per second ("unlimited" or "500MiB/s") and GETs per second (0: unlimited). What guests wait for goes into
# debt that background hydration pays.
bandwidth = "{bandwidth}"
gets_per_second = {gets_per_second}
# Of 100 GETs that guests wait for so many may be sent a second time when they are slower than 95 of 100. 0: none.
hedge_percent = {hedge_percent}
# How far ahead of a guest that reads in order absent chunks are fetched. "0": not at all; it reaches no further than twice
# what the guest has read in order.
readahead_bytes_max = "{readahead_bytes_max}"
# Price of 1,000,000 GETs, in any unit of money: `volley ledger` multiplies by it.
price_per_million_gets = {price_per_million_gets}

[placement]
# What volumes may be promised for each free byte of a store, before it takes no more: 1 is what there is, "unlimited" promises
# without end. A [[store]] may have its own, and a request that creates volumes too.
overcommit = "{overcommit}"

# Snapshots of volumes.
[snapshots]
# What they may read each second, over the whole node. Guests come first in any case.
bandwidth = "{snapshot_bandwidth}"
# What guests overwrite while a snapshot still needs it is put aside, up to so much in each store; beyond it the snapshot is
# given up, never a guest's write.
staging_bytes = "{staging_bytes}"
# Volumes and the disk cache are read in the background and held against what they should hold; what rotted is put back, or
# dropped from the cache. Bytes per second ("0": not at all), and the pause between two rounds.
scrub_bandwidth = "{scrub_bandwidth}"
scrub_pause = "{scrub_pause}"
# So often the node does what `volley snapshot gc` does: it carries out intended deletions, and condemns and removes packs that nothing
# references. "0s": never. Several nodes may.
gc_every = "{gc_every}"

[deadlines]
# A guest read that needs the object store gets an I/O error after this long. The volume keeps working.
guest_read = "{guest_read}"
# A clean stop; exceeding it is an error exit, but loses nothing that was acknowledged.
stop = "{stop}"

[retries]
# A fetch that fails is tried again until the deadline; the back-off doubles from min to max, with jitter.
deadline = "{deadline}"
backoff_min = "{backoff_min}"
backoff_max = "{backoff_max}"
# How often a chunk that fails its digest is fetched again.
corrupt_attempts = {corrupt_attempts}
"#,
        data = text(&data.to_string_lossy()),
        listen = text(&listen.to_string()),
        http = text(http),
        log = text(log),
        ram_bytes = cache.ram_bytes,
        pin_waves = cache.pin_waves,
        disk_bytes = cache.disk_bytes,
        reads_max = hydration.reads_max,
        background_reads_max = hydration.background_reads_max,
        read_bytes_max = hydration.read_bytes_max,
        boot_window = hydration.boot_window,
        guest_p99_bound = hydration.guest_p99_bound,
        floor = hydration.floor,
        share = transfer.share,
        bandwidth = transfer.bandwidth,
        gets_per_second = transfer.gets_per_second,
        hedge_percent = transfer.hedge_percent,
        readahead_bytes_max = transfer.readahead_bytes_max,
        price_per_million_gets = transfer.price_per_million_gets,
        overcommit = placement.overcommit,
        snapshot_bandwidth = snapshots.bandwidth,
        staging_bytes = snapshots.staging_bytes,
        scrub_bandwidth = snapshots.scrub_bandwidth,
        scrub_pause = snapshots.scrub_pause,
        gc_every = snapshots.gc_every,
        guest_read = deadlines.guest_read,
        stop = deadlines.stop,
        deadline = retries.deadline,
        backoff_min = retries.backoff_min,
        backoff_max = retries.backoff_max,
        corrupt_attempts = retries.corrupt_attempts,
    );
    push_s3(&mut out, s3);
    out.push_str(STORES_COMMENT);
    if stores.is_empty() {
        out.push_str(STORE_EXAMPLE);
    }
    for store in stores {
        push_store(&mut out, store);
    }
    out
}

fn push_s3(out: &mut String, s3: &S3Config) {
    let S3Config {
        endpoint,
        region,
        addressing,
        ca_file,
        anonymous,
        profile,
        connect_timeout,
        read_timeout,
        connections_max,
        conditional_put,
    } = s3;
    let optional = |key: &str, value: Option<&str>, example: &str| match value {
        Some(value) => format!("{key} = {}", text(value)),
        None => format!("# {key} = {}", text(example)),
    };
    let _ = write!(
        out,
        r#"
[s3]
# How to reach s3://BUCKET/PREFIX (docs/object-store.md). What is not given here comes from the standard environment
# (AWS_ENDPOINT_URL, AWS_REGION, AWS_CA_BUNDLE, AWS_PROFILE, ...) and the shared profile files; so do the credentials.
{endpoint}
{region}
# "path" (endpoint/bucket/key), "virtual" (bucket.endpoint/key), or "auto": virtual for AWS, path elsewhere.
addressing = {addressing}
# PEM file with the only certificate authorities to trust, instead of those of the Mozilla programme.
{ca_file}
# Sign nothing: for public buckets.
anonymous = {anonymous}
{profile}
# For a connection, with its name look-up and TLS; and the longest silence of the store in the middle of a request.
connect_timeout = "{connect_timeout}"
read_timeout = "{read_timeout}"
# Connections of one shard.
connections_max = {connections_max}
# "auto": by If-None-Match, with a look before the put where the store lacks it. "off": always look before the put.
conditional_put = {conditional_put}
"#,
        endpoint = optional("endpoint", endpoint.as_deref(), "https://s3.eu-central-1.amazonaws.com"),
        region = optional("region", region.as_deref(), "eu-central-1"),
        addressing = text(addressing.as_str()),
        ca_file =
            optional("ca_file", ca_file.as_ref().and_then(|path| path.to_str()), "/etc/ssl/certs/ca-certificates.crt"),
        profile = optional("profile", profile.as_deref(), "default"),
        conditional_put = text(conditional_put.as_str()),
    );
}

const STORES_COMMENT: &str = "
# Volume stores: directories that hold one file per volume; new volumes go where most is left. A label must stay
# with its directory. Without any, there is one store \"default\" at <data>/store. hydration_bandwidth is what
# hydration may write to the store, so that guests are not disturbed. Stores of one domain fail together (its label
# unless given); --spread domain deals a batch over the domains. overcommit as in [placement]. Where the filesystem can
# share extents (XFS, btrfs), volumes share chunks with a base of at most base_percent of it; 0: each has its own copy.
";

const STORE_EXAMPLE: &str = "# [[store]]
# label = \"nvme0\"
# path = \"/mnt/nvme0/volley\"
# hydration_bandwidth = \"unlimited\"
# domain = \"rack-1\"
# overcommit = \"1\"
# base_percent = 20
";

fn push_store(out: &mut String, store: &StoreConfig) {
    let StoreConfig { label, path, hydration_bandwidth, domain, overcommit, base_percent } = store;
    let (label, path) = (text(label), text(&path.to_string_lossy()));
    let _ = writeln!(out, "[[store]]\nlabel = {label}\npath = {path}\nhydration_bandwidth = \"{hydration_bandwidth}\"");
    if let Some(domain) = domain {
        let _ = writeln!(out, "domain = {}", self::text(domain));
    }
    if let Some(overcommit) = overcommit {
        let _ = writeln!(out, "overcommit = \"{overcommit}\"");
    }
    let _ = writeln!(out, "base_percent = {base_percent}\n");
}

/// A TOML string, quoted and escaped.
fn text(value: &str) -> String {
    toml::Value::String(value.to_string()).to_string()
}
