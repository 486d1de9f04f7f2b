//! Which chunks a volume's guest will read next, as far as its reads tell. Plain synchronous core: no I/O, no clock.
//!
//! A few streams per volume, each a place that reads move forward from. Once a stream moves on to the next chunk it
//! gets a window ahead of it, which doubles whenever half of it is read, up to a maximum; so it never reaches further
//! than twice what the stream has read already. A read anywhere else begins a stream without a window; one that leaves
//! chunks of its window out loses it.

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};

/// Streams remembered per volume; the one that was quiet for longest makes room.
const STREAMS_MAX: usize = 4;
/// Requests in flight overtake each other: a read so many chunks away from its stream's place still belongs to it.
const NEAR_CHUNKS: u32 = 2;

struct Stream {
    /// The furthest chunk read.
    at: u32,
    /// Chunks before this one were asked for, or need not be.
    to: u32,
    /// How far ahead it may reach; 0: it has not moved on yet.
    window: u32,
    /// Chunks it moved by when it did so last.
    step: u32,
    /// Asked for on its behalf and not read since.
    unread: BTreeSet<u32>,
}

impl Stream {
    fn begin(chunks: &RangeInclusive<u32>) -> Stream {
        let at = *chunks.end();
        Stream { at, to: at + 1, window: 0, step: 0, unread: BTreeSet::new() }
    }

    fn includes(&self, first: u32) -> bool {
        let skip = if self.window > 0 { NEAR_CHUNKS } else { 1 };
        (self.at.saturating_sub(NEAR_CHUNKS)..=self.at + skip).contains(&first)
    }

    /// Goes on with a read; how many chunks it turns out to have left out.
    fn go_on(&mut self, chunks: &RangeInclusive<u32>) -> u32 {
        if *chunks.end() > self.at {
            self.step = chunks.end() - self.at;
            self.at = *chunks.end();
        }
        self.to = self.to.max(self.at + 1);
        let ahead = self.unread.split_off(&self.at.saturating_sub(NEAR_CHUNKS).min(*chunks.start()));
        let left_out = std::mem::replace(&mut self.unread, ahead).len() as u32;
        if left_out > 0 {
            (self.window, self.step) = (0, 0);
        }
        left_out
    }

    /// What to ask for now: the window is doubled when half of it is read.
    fn ahead(&self, most: u32, chunks_of_volume: u32) -> Option<Ahead> {
        let left = self.to - (self.at + 1);
        if self.step == 0 || left > self.window / 2 {
            return None;
        }
        let window = if self.window == 0 { self.step } else { self.window.saturating_mul(2) }.min(most);
        let end = (self.at + 1).saturating_add(window).min(chunks_of_volume);
        (end > self.to).then_some(Ahead { chunks: self.to..end, enough: self.at + 1 + window / 2, window })
    }
}

/// Chunks that should be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    pub chunks: Range<u32>,
    /// With the chunks before this one the window is half full.
    enough: u32,
    window: u32,
}

impl Ahead {
    /// Shortens it to the last place where one GET ends and another begins, if enough is left: so the next window
    /// begins there. `place` is the GET that a chunk belongs to.
    #[must_use]
    pub fn cut<T: PartialEq>(self, place: impl Fn(u32) -> Option<T>) -> Ahead {
        let Range { start, end } = self.chunks;
        let ends = |end: &u32| {
            let (inside, behind) = (place(end - 1), place(*end));
            inside.is_some() && behind.is_some() && inside != behind
        };
        let least = (start + 1).max(self.enough + 1);
        let end = (least..=end).rev().find(ends).unwrap_or(end);
        Ahead { chunks: start..end, ..self }
    }
}

/// What a read meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// Chunks it touched that had been asked for ahead of it.
    pub used: u32,
    /// Chunks asked for that nobody is expected to read any more.
    pub wasted: u32,
    pub ahead: Option<Ahead>,
}

/// The streams of one volume.
#[derive(Default)]
pub struct ReadAhead {
    /// The one that went on last is the last one.
    streams: Vec<Stream>,
}

impl ReadAhead {
    /// A guest reads these chunks, present or not. `most`: the largest window, at least 1.
    pub fn read(&mut self, chunks: RangeInclusive<u32>, most: u32, chunks_of_volume: u32) -> Noted {
        let mut noted = Noted::default();
        for stream in self.streams.iter_mut().filter(|stream| !stream.unread.is_empty()) {
            noted.used += chunks.clone().map(|chunk| u32::from(stream.unread.remove(&chunk))).sum::<u32>();
        }
        let found = self.streams.iter().rposition(|stream| stream.includes(*chunks.start()));
        let mut stream = match found {
            Some(found) => self.streams.remove(found),
            None => Stream::begin(&chunks),
        };
        if found.is_none() && self.streams.len() >= STREAMS_MAX {
            noted.wasted += self.streams.remove(0).unread.len() as u32;
        }
        noted.wasted += stream.go_on(&chunks);
        noted.ahead = stream.ahead(most, chunks_of_volume);
        self.streams.push(stream);
        noted
    }

    /// The chunks ahead of the last read were asked for: these of them, the others need not be fetched.
    pub fn asked(&mut self, ahead: &Ahead, chunks: &[u32]) {
        let Some(stream) = self.streams.last_mut() else { return };
        (stream.to, stream.window) = (ahead.chunks.end, ahead.window);
        stream.unread.extend(chunks);
    }

    /// A chunk that was asked for did not come.
    pub fn failed(&mut self, chunk: u32) {
        for stream in &mut self.streams {
            stream.unread.remove(&chunk);
        }
    }

    /// Chunks asked for and not read yet.
    #[must_use]
    pub fn unread(&self) -> usize {
        self.streams.iter().map(|stream| stream.unread.len()).sum()
    }

    /// Forgets everything; how many chunks that wastes.
    pub fn clear(&mut self) -> u32 {
        let wasted = self.unread() as u32;
        self.streams.clear();
        wasted
    }
}

#[cfg(test)]
#[path = "readahead_tests.rs"]
mod tests;
