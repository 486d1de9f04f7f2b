//! Requests of a node under load, made from the recorded boot: what the policies are compared on.
//!
//! Volumes of several images, chosen by Zipf's law, boot in overlapping waves: each replays the chunks that the recorded
//! guest read, in that order, a few chunks at a time in turn with the others. Meanwhile a few volumes at a time are
//! hydrated: each reads all chunks of its image in order. Same arguments, same requests, on every machine.

use crate::policies::{Access, Key};

/// A 2 GiB image of 512 KiB chunks, as the recorded one.
pub const IMAGE_CHUNKS: u32 = 4096;
/// Of those, how many are not zero: what a Debian image of that size has.
pub const STORED_CHUNKS: u32 = 2200;
/// Chunks that one volume asks for before the next one has its turn.
const BURST: usize = 8;

/// What happens.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub images: u32,
    /// Exponent of the popularity of images.
    pub zipf: f64,
    pub volumes: u32,
    /// Volumes that boot at the same time.
    pub booting: usize,
    /// Volumes that are hydrated at the same time.
    pub hydrating: usize,
    /// Chunks hydrated for each chunk that a boot reads.
    pub scan_per_boot: usize,
}

/// Chunks that the recorded guest read, in order, repeats left in: they are what a volume without its own copy asks.
///
/// # Errors
/// Names the line that is not `us,op,offset,length`.
pub fn boot_chunks(csv: &str) -> Result<Vec<u32>, String> {
    let mut chunks = Vec::new();
    for (number, line) in csv.lines().enumerate().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let bad = || format!("line {}: {line:?}", number + 1);
        let [_, op, offset, len] = fields[..] else { return Err(bad()) };
        let (offset, len): (u64, u64) = (offset.parse().map_err(|_| bad())?, len.parse().map_err(|_| bad())?);
        if op != "R" || len == 0 {
            continue;
        }
        let chunk = |at: u64| u32::try_from(at / (512 << 10)).map_err(|_| bad());
        chunks.extend(chunk(offset)?..=chunk(offset + len - 1)?);
    }
    Ok(chunks)
}

/// The first request of each chunk: afterwards the volume has it.
#[must_use]
pub fn first_touches(chunks: &[u32]) -> Vec<u32> {
    let mut seen = std::collections::HashSet::new();
    chunks.iter().copied().filter(|chunk| seen.insert(*chunk)).collect()
}

struct Guest {
    image: u32,
    at: usize,
}

/// The requests of a mix.
#[must_use]
pub fn requests(mix: &Mix, boot: &[u32]) -> Vec<Access> {
    let mut random = Random(0x5eed);
    let weights: Vec<f64> = (1..=mix.images).map(|rank| f64::from(rank).powf(-mix.zipf)).collect();
    let mut left = mix.volumes;
    let mut requests = Vec::new();
    let (mut booting, mut hydrating): (Vec<Guest>, Vec<Guest>) = (Vec::new(), Vec::new());
    let mut waiting = std::collections::VecDeque::new();
    let mut turn = 0;
    while left > 0 || !booting.is_empty() || !hydrating.is_empty() || !waiting.is_empty() {
        while booting.len() < mix.booting && left > 0 {
            left -= 1;
            booting.push(Guest { image: random.pick(&weights), at: 0 });
        }
        while hydrating.len() < mix.hydrating
            && let Some(image) = waiting.pop_front()
        {
            hydrating.push(Guest { image, at: 0 });
        }
        turn += 1;
        if !booting.is_empty() {
            let index = turn % booting.len();
            let guest = &mut booting[index];
            let end = (guest.at + BURST).min(boot.len());
            requests.extend(boot[guest.at..end].iter().map(|chunk| access(guest.image, *chunk, false)));
            guest.at = end;
            if end == boot.len() {
                waiting.push_back(booting.swap_remove(index).image);
            }
        }
        if !hydrating.is_empty() {
            let index = turn % hydrating.len();
            let guest = &mut hydrating[index];
            let end = (guest.at + BURST * mix.scan_per_boot).min(STORED_CHUNKS as usize);
            requests.extend((guest.at..end).map(|place| access(guest.image, stored(place, boot), true)));
            guest.at = end;
            if end == STORED_CHUNKS as usize {
                hydrating.swap_remove(index);
            }
        }
    }
    requests
}

/// The chunk at a place among the stored ones: spread over the image, the boot's chunks among them.
fn stored(place: usize, boot: &[u32]) -> u32 {
    let spread = (place as u64 * u64::from(IMAGE_CHUNKS) / u64::from(STORED_CHUNKS)) as u32;
    if place < boot.len() { boot[place] } else { spread }
}

fn access(image: u32, chunk: u32, background: bool) -> Access {
    let key: Key = image * IMAGE_CHUNKS + chunk;
    Access { key, background }
}

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn pick(&mut self, weights: &[f64]) -> u32 {
        let mut left = self.unit() * weights.iter().sum::<f64>();
        for (index, weight) in weights.iter().enumerate() {
            left -= weight;
            if left <= 0.0 {
                return index as u32;
            }
        }
        weights.len() as u32 - 1
    }
}

#[cfg(test)]
mod tests {
    use super::{Mix, boot_chunks, first_touches, requests};

    #[test]
    fn a_boot_is_its_reads() {
        let csv = "us,op,offset,length\n0,R,0,512\n1,W,0,512\n2,R,524287,2\n3,F,0,0\n4,R,0,512\n";
        let chunks = boot_chunks(csv).unwrap();
        assert_eq!((chunks.as_slice(), first_touches(&chunks)), (&[0, 0, 1, 0][..], vec![0, 1]));
        assert!(boot_chunks("head\n1,R,x,5").unwrap_err().contains("line 2"));
    }

    #[test]
    fn requests_are_the_same_each_time_and_every_volume_boots_and_hydrates() {
        let mix = Mix { images: 3, zipf: 1.0, volumes: 7, booting: 2, hydrating: 2, scan_per_boot: 2 };
        let boot: Vec<u32> = (0..100).collect();
        let made = requests(&mix, &boot);
        assert_eq!(made, requests(&mix, &boot));
        let background = made.iter().filter(|access| access.background).count();
        assert_eq!((made.len() - background, background), (7 * 100, 7 * super::STORED_CHUNKS as usize));
    }
}
