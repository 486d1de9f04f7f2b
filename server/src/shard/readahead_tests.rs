//! Streams of reads and the windows ahead of them.

use proptest::prelude::*;

use super::{Ahead, NEAR_CHUNKS, ReadAhead};

const VOLUME: u32 = 4096;

/// Reads one chunk, asks for all that is ahead; what was asked for.
fn read(streams: &mut ReadAhead, chunk: u32, most: u32) -> Vec<u32> {
    match streams.read(chunk..=chunk, most, VOLUME).ahead {
        Some(ahead) => {
            let asked: Vec<u32> = ahead.chunks.clone().collect();
            streams.asked(&ahead, &asked);
            asked
        }
        None => Vec::new(),
    }
}

#[test]
fn a_stream_that_moves_on_gets_a_window_that_doubles_up_to_the_maximum() {
    let mut streams = ReadAhead::default();
    let asked: Vec<Vec<u32>> = (0..16).map(|chunk| read(&mut streams, chunk, 8)).collect();
    assert_eq!(asked[..4], [vec![], vec![2], vec![3, 4], vec![5, 6, 7]]);
    assert_eq!((&asked[4], &asked[5]), (&vec![], &vec![8, 9, 10, 11, 12, 13]));
    assert_eq!((&asked[9], &asked[13]), (&vec![14, 15, 16, 17], &vec![18, 19, 20, 21]), "half a window at a time");
    assert_eq!(streams.unread(), 21 - 15);
}

#[test]
fn reads_within_a_chunk_and_backwards_ask_for_nothing() {
    let mut streams = ReadAhead::default();
    assert!((0..100).all(|_| read(&mut streams, 7, 8).is_empty()));
    assert!((0..100).rev().all(|chunk| read(&mut streams, chunk, 8).is_empty()));
}

#[test]
fn large_reads_begin_with_a_window_of_their_size() {
    let mut streams = ReadAhead::default();
    assert_eq!(streams.read(0..=3, 16, VOLUME).ahead, None);
    let ahead = streams.read(4..=7, 16, VOLUME).ahead.expect("the stream moved on");
    assert_eq!(ahead.chunks, 8..12);
}

#[test]
fn two_streams_in_turn_both_reach_the_maximum() {
    let mut streams = ReadAhead::default();
    let (mut low, mut high) = (0, 0);
    for step in 0..64 {
        low = read(&mut streams, step, 8).last().copied().unwrap_or(low);
        high = read(&mut streams, 2000 + step, 8).last().copied().unwrap_or(high);
    }
    assert!(low - 63 >= 4 && high - 2063 >= 4, "{low} and {high} were asked for");
}

#[test]
fn what_was_refused_is_wanted_again_at_the_next_read() {
    let mut streams = ReadAhead::default();
    read(&mut streams, 0, 8);
    let refused = streams.read(1..=1, 8, VOLUME).ahead.expect("chunk 2");
    assert_eq!(streams.read(1..=1, 8, VOLUME).ahead, Some(refused));
}

#[test]
fn what_is_read_is_used_and_what_is_left_behind_is_wasted_and_costs_the_window() {
    let mut streams = ReadAhead::default();
    (0..32).for_each(|chunk| drop(read(&mut streams, chunk, 8)));
    let unread = streams.unread() as u32;
    assert!(unread > 4);
    // Every second chunk from here.
    let (mut used, mut wasted, mut asked) = (0, 0, 0);
    for chunk in (33..65).step_by(2) {
        let noted = streams.read(chunk..=chunk, 8, VOLUME);
        (used, wasted) = (used + noted.used, wasted + noted.wasted);
        if let Some(ahead) = noted.ahead {
            let chunks: Vec<u32> = ahead.chunks.clone().collect();
            asked += chunks.len() as u32;
            streams.asked(&ahead, &chunks);
        }
    }
    assert!(used > 0 && wasted > 0 && asked <= 8, "{used} used, {wasted} wasted, {asked} asked for");
    assert_eq!(used + wasted + streams.unread() as u32, unread + asked);
    let left = streams.unread() as u32;
    assert_eq!((streams.clear(), streams.unread()), (left, 0));
}

#[test]
fn a_window_ends_where_a_get_ends_if_enough_is_left() {
    let ahead = |chunks, enough| Ahead { chunks, enough, window: 8 };
    let place = |chunk: u32| Some(chunk / 8);
    assert_eq!(ahead(12..20, 14).cut(place).chunks, 12..16);
    assert_eq!(ahead(12..20, 16).cut(place).chunks, 12..20, "too little would be left");
    assert_eq!(ahead(12..33, 14).cut(place).chunks, 12..32, "the last one");
    assert_eq!(ahead(12..20, 14).cut(|_| None::<u32>).chunks, 12..20, "zero chunks are in no GET");
}

proptest! {
    /// In any sequence of reads nothing is asked for further ahead than the maximum, nor than twice what was read, and what
    /// was asked for is used, wasted or not yet read.
    #[test]
    fn windows_stay_within_the_maximum_and_what_was_read(
        most in 1_u32..40,
        reads in prop::collection::vec((0_u32..8, 1_u32..4, 0_u32..300), 1..400),
    ) {
        let mut streams = ReadAhead::default();
        let (mut at, mut asked, mut used, mut wasted, mut total) = (0, 0, 0, 0, 0);
        for (kind, len, place) in reads {
            let first = match kind { 0 => place, 1 => at + 2, _ => at + 1 }.min(299);
            let last = (first + len - 1).min(299);
            at = last;
            total += last - first + 1;
            let noted = streams.read(first..=last, most, 300);
            (used, wasted) = (used + noted.used, wasted + noted.wasted);
            let Some(ahead) = noted.ahead else { continue };
            prop_assert!(!ahead.chunks.is_empty() && ahead.chunks.end <= 300);
            // Of a stream whose reads overtook each other the place is a little further on.
            let reach = ahead.chunks.end.saturating_sub(last + 1);
            prop_assert!(reach <= most + NEAR_CHUNKS, "{:?} is {} ahead of {}", ahead, reach, last);
            prop_assert!(reach <= 2 * total + NEAR_CHUNKS);
            let chunks: Vec<u32> = ahead.chunks.clone().collect();
            asked += chunks.len() as u32;
            streams.asked(&ahead, &chunks);
        }
        // The same chunk may be unread in two streams, and is then used twice.
        prop_assert_eq!(used + wasted + streams.unread() as u32, asked);
    }

    /// Reads that never touch a chunk near one read before ask for nothing.
    #[test]
    fn random_access_asks_for_nothing(places in prop::collection::vec(0_u32..400, 1..300)) {
        let mut streams = ReadAhead::default();
        let mut before = Vec::new();
        for chunk in places.into_iter().map(|place| place * 7 % 4000) {
            if before.iter().any(|b: &u32| b.abs_diff(chunk) <= NEAR_CHUNKS && *b != chunk) { continue; }
            before.push(chunk);
            prop_assert!(read(&mut streams, chunk, 16).is_empty());
        }
    }

    /// Wherever a stream begins and whatever lies between, it reaches the maximum and is never without its next chunk.
    #[test]
    fn a_sequential_reader_finds_its_chunks_asked_for(
        most in 2_u32..64, begin in 0_u32..1000, others in prop::collection::vec(1100_u32..4000, 200),
    ) {
        let mut streams = ReadAhead::default();
        let mut asked_to = 0;
        let mut reach = 0;
        for (step, other) in others.into_iter().enumerate() {
            let chunk = begin + step as u32;
            prop_assert!(step < 2 || asked_to > chunk, "chunk {} was not asked for in time", chunk);
            let asked = read(&mut streams, chunk, most);
            asked_to = asked.last().map_or(asked_to, |last| last + 1);
            reach = reach.max(asked_to.saturating_sub(chunk + 1));
            if step % 3 == 0 { read(&mut streams, other, most); }
        }
        prop_assert_eq!(reach, most);
    }
}
