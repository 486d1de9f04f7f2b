//! The simulator's randomness: xoshiro256++ seeded through splitmix64, so a seed alone decides a whole run.

use std::ops::Range;

/// A small deterministic generator. Streams forked from one seed with different labels are independent.
#[derive(Clone, Debug)]
pub struct SimRng {
    state: [u64; 4],
}

impl SimRng {
    #[must_use]
    pub fn new(seed: u64) -> SimRng {
        let mut mix = seed;
        SimRng { state: std::array::from_fn(|_| splitmix(&mut mix)) }
    }

    /// An independent stream of the same seed.
    #[must_use]
    pub fn stream(seed: u64, label: &str) -> SimRng {
        SimRng::new(seed ^ u64::from(crc32fast::hash(label.as_bytes())).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in `0..bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.next_u64()) * u128::from(bound);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// Uniform in the range; its start when it is empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// An index into something `len` long.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True `ppm` times in a million.
    pub fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }

    pub fn coin(&mut self) -> bool {
        self.next_u64() & 1 == 1
    }

    pub fn fill(&mut self, buf: &mut [u8]) {
        for part in buf.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            part.copy_from_slice(&bytes[..part.len()]);
        }
    }
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::SimRng;

    #[test]
    fn streams_are_repeatable_and_differ_by_seed_and_label() {
        let draw = |mut rng: SimRng| [rng.next_u64(), rng.next_u64(), rng.next_u64()];
        assert_eq!(draw(SimRng::stream(7, "disk")), draw(SimRng::stream(7, "disk")));
        assert_ne!(draw(SimRng::stream(7, "disk")), draw(SimRng::stream(8, "disk")));
        assert_ne!(draw(SimRng::stream(7, "disk")), draw(SimRng::stream(7, "schedule")));
    }

    #[test]
    fn bounds_hold() {
        let mut rng = SimRng::new(1);
        assert!((0..1000).all(|_| rng.below(10) < 10));
        assert!((0..1000).all(|_| (5..8).contains(&rng.within(5..8))));
        assert_eq!((rng.below(0), rng.within(4..4)), (0, 4));
        let hits = (0..10_000).filter(|_| rng.chance(100_000)).count();
        assert!((800..1200).contains(&hits), "{hits} of 10,000 at 10 %");
    }
}
