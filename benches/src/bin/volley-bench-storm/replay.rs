//! The recorded boot read with its data from cold volumes, every byte compared with the image: ours beside nbdkit.

use volley_benches::BOOT_TRACE;
use volley_benches::figure::{Figure, Pair, ms};
use volley_benches::process::{Result, run};
use volley_tools::load::histogram::Histogram;
use volley_tools::load::report::Report;
use volley_tools::load::storm::{Arrivals, Ask, Progress};

use super::nbdkit::{self, Nbdkit};
use super::{Asking, Bench, HOSTS};

/// What the background may write each second: it must not fill the disk.
const HYDRATION_BANDWIDTH: &str = "100MiB";
/// Boots are not learned from: the next node is to know nothing.
const NOTHING_LEARNED: &str = "hydration.boot_window = \"0s\"\n";

/// One replay.
struct Replayed {
    seconds: f64,
    bytes: u64,
    latency: Histogram,
}

impl Replayed {
    fn of(report: &Report) -> Replayed {
        let (first, later) = (report.of("first-touch"), report.of("later"));
        let mut latency = first.latency;
        latency.merge(&later.latency);
        Replayed { seconds: report.elapsed.as_secs_f64(), bytes: first.bytes + later.bytes, latency }
    }

    fn p99_ms(&self) -> f64 {
        ms(self.latency.quantile(0.99))
    }

    fn mb_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e6
    }
}

/// How the volumes of a node are read.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Through the client crate.
    Client,
    /// Through volley-agent, by the same NBD client that reads from nbdkit.
    Agent,
}

impl Bench<'_> {
    /// Many volumes at once, beside nbdkit at its best.
    pub(super) fn many(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (volumes, runs) = (self.args.replay_volumes, self.args.long_runs);
        let url = nbdkit::publish(self.site, &self.image)?;
        let (mut client, mut agent, mut peer) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..runs {
            eprintln!("many: run {} of {runs}, {volumes} volumes: client, agent, nbdkit", number + 1);
            client.push(self.replay_ours(volumes, Way::Client, false)?);
            agent.push(self.replay_ours(volumes, Way::Agent, false)?);
            peer.push(self.replay_peer(&Nbdkit::shared(self.site, &url, volumes)?, volumes)?);
        }
        let name = format!("replay{volumes}");
        for (name, ours) in [(name.clone(), &client), (format!("{name}_nbd"), &agent)] {
            compare(figures, &name, ours, &peer, nbdkit::SHARED);
            let p99s: Vec<Pair> = pairs(ours, &peer, Replayed::p99_ms);
            figures.push(Figure::time(&format!("{name}_p99_vs_nbdkit"), "ms", nbdkit::SHARED, &p99s));
            let rates: Vec<f64> = ours.iter().map(Replayed::mb_per_second).collect();
            figures.push(Figure::alone(&format!("{name}_mb_per_second"), "MB/s", &rates));
        }
        alone(figures, &format!("nbdkit{volumes}"), &peer);
        Ok(())
    }

    /// Many volumes at once, beside an nbdkit for each.
    pub(super) fn plain(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let (volumes, runs) = (self.args.replay_volumes, self.args.long_runs);
        let url = nbdkit::publish(self.site, &self.image)?;
        let (mut client, mut peer) = (Vec::new(), Vec::new());
        for number in 0..runs {
            eprintln!("plain: run {} of {runs}, {volumes} volumes: client, nbdkit", number + 1);
            client.push(self.replay_ours(volumes, Way::Client, false)?);
            peer.push(self.replay_peer(&Nbdkit::plain(self.site, &url, volumes)?, volumes)?);
        }
        let times = pairs(&client, &peer, |replayed| replayed.seconds);
        figures.push(Figure::time(&format!("replay{volumes}_vs_nbdkit_plain"), "s", nbdkit::PLAIN, &times));
        alone(figures, &format!("nbdkit{volumes}_plain"), &peer);
        Ok(())
    }

    /// One volume, one read after another, on a node that knows nothing and on one that knows what the image boots.
    pub(super) fn one(&self, figures: &mut Vec<Figure>) -> Result<()> {
        let url = nbdkit::publish(self.site, &self.image)?;
        let (mut cold, mut known, mut peer) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..self.args.runs {
            eprintln!("one: run {} of {}: cold, with a boot set, nbdkit", number + 1, self.args.runs);
            cold.push(self.replay_ours(1, Way::Client, false)?);
            known.push(self.replay_ours(1, Way::Client, true)?);
            peer.push(self.replay_peer(&Nbdkit::shared(self.site, &url, 1)?, 1)?);
        }
        compare(figures, "replay1_cold", &cold, &peer, nbdkit::SHARED);
        compare(figures, "replay1_bootset", &known, &peer, nbdkit::SHARED);
        alone(figures, "nbdkit1", &peer);
        Ok(())
    }

    fn replay_ours(&self, volumes: u32, way: Way, boot_set: bool) -> Result<Replayed> {
        self.node(HYDRATION_BANDWIDTH, NOTHING_LEARNED, |server| {
            if boot_set {
                let record = ["bootset", "record", "debian", "--trace", BOOT_TRACE];
                run(&mut self.site.volley(Some(server), &record)?)?;
            } else {
                run(&mut self.site.volley(Some(server), &["bootset", "drop", "debian"])?)?;
            }
            self.create(server, volumes, &[])?;
            let address = server.ready_word("data")?;
            let asking =
                |nbd| Asking { volumes, ask: Ask::Read, nbd, hosts: HOSTS.min(volumes), arrivals: Arrivals::AtOnce };
            if way == Way::Client {
                return Ok(Replayed::of(&self.ask(&address, asking(None), &Progress::default())?));
            }
            let sockets = tempfile::tempdir().map_err(|e| e.to_string())?;
            let socket = sockets.path().join("nbd.sock");
            let agent = self.site.agent(server, &socket)?;
            let nbd = Some(format!("unix:{}", socket.display()).parse()?);
            let report = self.ask(&address, asking(nbd), &Progress::default())?;
            agent.stop()?;
            Ok(Replayed::of(&report))
        })
    }

    fn replay_peer(&self, peer: &Nbdkit, volumes: u32) -> Result<Replayed> {
        let asking = Asking {
            volumes,
            ask: Ask::Read,
            nbd: Some(peer.address().parse()?),
            hosts: HOSTS.min(volumes),
            arrivals: Arrivals::AtOnce,
        };
        Ok(Replayed::of(&self.ask("", asking, &Progress::default())?))
    }
}

fn pairs(ours: &[Replayed], peer: &[Replayed], value: impl Fn(&Replayed) -> f64) -> Vec<Pair> {
    ours.iter().zip(peer).map(|(ours, peer)| Pair { ours: value(ours), peer: value(peer) }).collect()
}

fn compare(figures: &mut Vec<Figure>, name: &str, ours: &[Replayed], peer: &[Replayed], what: &str) {
    let times = pairs(ours, peer, |replayed| replayed.seconds);
    figures.push(Figure::time(&format!("{name}_vs_nbdkit"), "s", what, &times));
    let p99s: Vec<f64> = ours.iter().map(Replayed::p99_ms).collect();
    figures.push(Figure::alone(&format!("{name}_p99_ms"), "ms", &p99s));
}

fn alone(figures: &mut Vec<Figure>, name: &str, replays: &[Replayed]) {
    let of = |value: fn(&Replayed) -> f64| replays.iter().map(value).collect::<Vec<_>>();
    figures.push(Figure::alone(&format!("{name}_seconds"), "s", &of(|replayed| replayed.seconds)));
    figures.push(Figure::alone(&format!("{name}_p99_ms"), "ms", &of(Replayed::p99_ms)));
}
