//! Replays a trace through one volume: what a guest's boot would meet, without a guest.
//!
//! Requests start at their recorded times (divided by the speed), never earlier, and later only if too many are in
//! flight or if one would race a write of the same bytes. Writes carry patterns ([`super::pattern`]), so a replay
//! **overwrites the volume** where the guest wrote. With an image to compare with, every byte read is checked: the
//! image's, or the pattern of the replay's own last write.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use volley_client::Volume;

use super::pattern;
use super::report::{Report, Series};
use super::trace::{Event, Op};

const BLOCK: u64 = 512;

/// How fast time passes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// The recorded times divided by this.
    Times(f64),
    /// No waiting at all: as many requests in flight as allowed.
    Max,
}

impl std::str::FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Speed, String> {
        if text == "max" {
            return Ok(Speed::Max);
        }
        match text.parse::<f64>() {
            Ok(times) if times.is_finite() && times > 0.0 => Ok(Speed::Times(times)),
            _ => Err(format!("{text:?} is not a speed: write a positive number such as 1 or 2.5, or max")),
        }
    }
}

/// A replay to run.
#[derive(Debug)]
pub struct Plan<'a> {
    pub events: &'a [Event],
    pub speed: Speed,
    /// Requests in flight at once.
    pub depth: usize,
    /// No request starts later than this after the first.
    pub duration: Duration,
    /// The raw image that unwritten bytes must equal.
    pub verify: Option<&'a File>,
}

/// Opens an image to verify against.
///
/// # Errors
/// One line that names the file: unreadable, or not of the volume's size.
pub fn open_image(path: &Path, size_bytes: u64) -> Result<File, String> {
    let shown = path.display();
    let failed = |error: std::io::Error| format!("can't read the image {shown}: {error}");
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    if len > size_bytes {
        return Err(format!("the image {shown} has {len} bytes, more than the volume's {size_bytes}"));
    }
    Ok(file)
}

/// Runs a replay to its end.
pub async fn run(volume: &Volume, plan: &Plan<'_>) -> Report {
    let mut replay = Replay::new(volume, plan);
    let begun = Instant::now();
    for (index, event) in plan.events.iter().enumerate() {
        if let Speed::Times(times) = plan.speed {
            replay.serve_until(begun + due(event, times).min(plan.duration)).await;
        }
        replay.make_room(event).await;
        if begun.elapsed() >= plan.duration {
            replay.skipped = (plan.events.len() - index) as u64;
            break;
        }
        replay.start(index, event);
    }
    while replay.finish_one().await {}
    replay.report(begun.elapsed())
}

/// When an event is due after the first; a time beyond all bounds is as good as any other.
pub(super) fn due(event: &Event, times: f64) -> Duration {
    Duration::try_from_secs_f64(event.at_us as f64 / 1e6 / times).unwrap_or(Duration::MAX)
}

/// What a request came to.
struct Done {
    index: usize,
    latency: Duration,
    outcome: Result<Bytes, String>,
}

struct Replay<'a> {
    volume: &'a Volume,
    plan: &'a Plan<'a>,
    running: FuturesUnordered<BoxFuture<'a, Done>>,
    in_flight: Vec<usize>,
    /// Requests that touch a chunk no request touched before.
    first_touches: HashSet<usize>,
    touched_chunks: HashSet<u64>,
    /// Tag of the last write to each 512-byte block.
    written: HashMap<u64, u64>,
    first_touch: Series,
    later_reads: Series,
    writes: Series,
    flushes: Series,
    mismatches: u64,
    skipped: u64,
}

impl<'a> Replay<'a> {
    fn new(volume: &'a Volume, plan: &'a Plan<'a>) -> Replay<'a> {
        Replay {
            volume,
            plan,
            running: FuturesUnordered::new(),
            in_flight: Vec::new(),
            first_touches: HashSet::new(),
            touched_chunks: HashSet::new(),
            written: HashMap::new(),
            first_touch: Series::default(),
            later_reads: Series::default(),
            writes: Series::default(),
            flushes: Series::default(),
            mismatches: 0,
            skipped: 0,
        }
    }

    /// Collects answers until the time has come.
    async fn serve_until(&mut self, time: Instant) {
        let due = tokio::time::sleep_until(time.into());
        tokio::pin!(due);
        loop {
            tokio::select! {
                biased;
                () = &mut due => return,
                more = self.finish_one(), if !self.running.is_empty() => debug_assert!(more),
            }
        }
    }

    /// Waits while too many are in flight or one of them conflicts.
    async fn make_room(&mut self, event: &Event) {
        let conflicts = |index: &usize| self.plan.events[*index].conflicts(event);
        let mut full = self.in_flight.len() >= self.plan.depth || self.in_flight.iter().any(conflicts);
        while full && self.finish_one().await {
            let conflicts = |index: &usize| self.plan.events[*index].conflicts(event);
            full = self.in_flight.len() >= self.plan.depth || self.in_flight.iter().any(conflicts);
        }
    }

    fn start(&mut self, index: usize, event: &'a Event) {
        let touches_new = event.op != Op::Flush && self.touch(event);
        if touches_new {
            self.first_touches.insert(index);
        }
        // Tags start at 1, so no write repeats what a fresh volume's pattern could be.
        let tag = index as u64 + 1;
        let data = match event.op {
            Op::Write => Bytes::from(pattern(event.offset, event.len as usize, tag)),
            Op::Read | Op::Flush => Bytes::new(),
        };
        if event.op == Op::Write {
            self.written.extend(blocks(event).map(|block| (block, tag)));
        }
        self.in_flight.push(index);
        let volume = self.volume;
        self.running.push(Box::pin(async move {
            let begun = Instant::now();
            let answer = match event.op {
                Op::Read => volume.read(event.offset, event.len as usize).await,
                Op::Write => volume.write(event.offset, data, false).await.map(|()| Bytes::new()),
                Op::Flush => volume.flush().await.map(|()| Bytes::new()),
            };
            Done { index, latency: begun.elapsed(), outcome: answer.map_err(|error| error.to_string()) }
        }));
    }

    /// Notes the chunks of a request; whether one of them is new.
    fn touch(&mut self, event: &Event) -> bool {
        let chunks = event.chunks(self.volume.chunk_bytes().max(1).into());
        chunks.fold(false, |new, index| self.touched_chunks.insert(index) | new)
    }

    /// Waits for one answer and counts it; false if none is to come.
    async fn finish_one(&mut self) -> bool {
        let Some(done) = self.running.next().await else { return false };
        self.in_flight.retain(|index| *index != done.index);
        let event = &self.plan.events[done.index];
        let outcome = done.outcome.and_then(|data| self.verify(event, &data));
        let series = match event.op {
            Op::Read if self.first_touches.contains(&done.index) => &mut self.first_touch,
            Op::Read => &mut self.later_reads,
            Op::Write => &mut self.writes,
            Op::Flush => &mut self.flushes,
        };
        series.record(done.latency, event.len, outcome);
        true
    }

    /// Compares what was read with the image and with our own writes. No write of these bytes is in flight.
    fn verify(&mut self, event: &Event, data: &[u8]) -> Result<(), String> {
        let Some(image) = self.plan.verify.filter(|_| event.op == Op::Read) else { return Ok(()) };
        let mut want = read_image(image, event)?;
        for (block, piece) in blocks(event).zip(want.chunks_mut(BLOCK as usize)) {
            if let Some(tag) = self.written.get(&block) {
                piece.copy_from_slice(&pattern(block * BLOCK, piece.len(), *tag));
            }
        }
        compare(event, data, &want).inspect_err(|_| self.mismatches += 1)
    }

    fn report(self, elapsed: Duration) -> Report {
        let series = vec![
            ("first-touch", self.first_touch),
            ("later-reads", self.later_reads),
            ("writes", self.writes),
            ("flushes", self.flushes),
        ];
        let mut facts = vec![("chunks_touched", self.touched_chunks.len() as u64), ("requests_skipped", self.skipped)];
        if self.plan.verify.is_some() {
            facts.push(("mismatches", self.mismatches));
        }
        Report { workload: "replay", elapsed, series, facts }
    }
}

fn blocks(event: &Event) -> std::ops::Range<u64> {
    event.offset / BLOCK..(event.offset + event.len) / BLOCK
}

/// # Errors
/// A sentence that names the first wrong byte.
pub(super) fn compare(event: &Event, data: &[u8], want: &[u8]) -> Result<(), String> {
    if data == want {
        return Ok(());
    }
    let at = data.iter().zip(want).position(|(got, want)| got != want).unwrap_or(data.len().min(want.len()));
    let place = event.offset + at as u64;
    Err(format!("wrong data at byte {place}: {} bytes were read at {}", event.len, event.offset))
}

/// The image's bytes; past its end, where a larger volume goes on, zeroes.
pub(super) fn read_image(image: &File, event: &Event) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; event.len as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        match image.read_at(&mut bytes[filled..], event.offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) => return Err(format!("reading the image failed: {error}")),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::Speed;

    #[test]
    fn speeds_are_understood() {
        assert_eq!("2.5".parse(), Ok(Speed::Times(2.5)));
        assert_eq!("max".parse(), Ok(Speed::Max));
        for bad in ["", "0", "-1", "inf", "NaN", "fast"] {
            assert!(bad.parse::<Speed>().unwrap_err().contains("not a speed"), "{bad}");
        }
    }
}
