//! What sectors hold. Tags name values, so that the model keeps no bytes.

use std::rc::Rc;

use volley_server::platform::sim::SimRng;

pub const BLOCK: u64 = 512;

/// Names a value of a sector: 0 is the first snapshot's, 1 is zeroes, those from 2^31 on are of snapshots that the volume
/// was rolled back to, all others are writes.
pub type Tag = u32;
pub const SNAPSHOT: Tag = 0;
pub const ZEROES: Tag = 1;
const ROLLED_BACK: Tag = 1 << 31;

/// Content of a snapshot.
pub struct Image {
    pub bytes: Vec<u8>,
}

/// The values that tags name in one volume.
#[derive(Clone)]
pub struct Values {
    first: Option<Rc<Image>>,
    rolled_back: Vec<Rc<Image>>,
}

impl Values {
    pub fn new(first: Option<Rc<Image>>) -> Values {
        Values { first, rolled_back: Vec::new() }
    }

    pub fn has_image(&self) -> bool {
        self.first.is_some()
    }

    /// The tag of a snapshot that the volume goes back to.
    pub fn add(&mut self, image: Rc<Image>) -> Tag {
        self.rolled_back.push(image);
        ROLLED_BACK + self.rolled_back.len() as Tag - 1
    }

    pub fn is(&self, index: usize, tag: Tag, found: &[u8]) -> bool {
        let mut block = [0; BLOCK as usize];
        self.write(index as u64, tag, &mut block);
        block == found
    }

    pub fn write(&self, index: u64, tag: Tag, block: &mut [u8]) {
        block.fill(0);
        let image = match tag {
            SNAPSHOT => self.first.as_ref(),
            ZEROES => None,
            ROLLED_BACK.. => self.rolled_back.get((tag - ROLLED_BACK) as usize),
            write => return SimRng::new(u64::from(write) << 32 | index).fill(block),
        };
        let at = (index * BLOCK) as usize;
        if let Some(bytes) = image.and_then(|image| image.bytes.get(at..at + BLOCK as usize)) {
            block.copy_from_slice(bytes);
        }
    }

    /// In words, for who finds something else than what it should be; `known`: what it was once.
    pub fn name(&self, index: usize, known: &[Tag], found: &[u8]) -> String {
        let is = [SNAPSHOT, ZEROES].into_iter().chain(known.iter().copied()).find(|tag| self.is(index, *tag, found));
        match is {
            Some(SNAPSHOT) => "the snapshot's content".to_owned(),
            Some(ZEROES) => "zeroes".to_owned(),
            Some(tag @ ROLLED_BACK..) => format!("what it was rolled back to ({tag})"),
            Some(write) => format!("write {write}"),
            None => format!("no value it ever had ({:02x?}...)", &found[..16]),
        }
    }
}

/// What a volume was at one moment: of every sector the values that it may have had then.
pub struct Moment {
    pub volume: String,
    pub values: Values,
    pub allowed: Vec<Vec<Tag>>,
}

impl Moment {
    /// # Errors
    /// The first sector that a snapshot of this moment must not hold.
    pub fn check(&self, content: &[u8]) -> Result<(), String> {
        let Moment { volume, values, allowed } = self;
        if content.len() as u64 != allowed.len() as u64 * BLOCK {
            return Err(format!("{} bytes of a volume of {}", content.len(), allowed.len() as u64 * BLOCK));
        }
        for (index, (found, allowed)) in content.chunks(BLOCK as usize).zip(allowed).enumerate() {
            if !allowed.iter().any(|tag| values.is(index, *tag, found)) {
                let what = values.name(index, allowed, found);
                let byte = index as u64 * BLOCK;
                return Err(format!("byte {byte} holds {what}; volume {volume:?} was then one of {allowed:?}"));
            }
        }
        Ok(())
    }
}
