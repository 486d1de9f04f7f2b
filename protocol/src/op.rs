//! Operation numbers: stable, a number is never used again for another meaning.

/// What a frame asks or answers. A reply carries the number of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// First request of every connection: versions, features, shard map, limits.
    Hello = 1,
    /// Opens a volume for one writer.
    Attach = 2,
    /// Ends an attachment.
    Detach = 3,
    /// Reads bytes.
    Read = 4,
    /// Writes bytes; may carry [`crate::header::FLAG_FUA`].
    Write = 5,
    /// Makes every acknowledged write durable.
    Flush = 6,
    /// Makes a range read as zeroes and gives its space back.
    Discard = 7,
    /// Makes a range read as zeroes; may carry [`crate::header::FLAG_FUA`].
    WriteZeroes = 8,
    /// Brings a range into cache or volume ahead of everything in the background.
    PriorityFetch = 9,
    /// Which ranges are resident.
    Residency = 10,
    /// Long poll for a change of residency.
    ResidencyWait = 11,
    /// What is known of a volume.
    Stat = 12,
    /// Names of the volumes of this shard.
    List = 13,
    /// Describes a volume without attaching it: fences nobody.
    Lookup = 14,
}

impl Op {
    /// Every operation, in order of its number (the first is 1).
    pub const ALL: [Op; 14] = [
        Op::Hello,
        Op::Attach,
        Op::Detach,
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::PriorityFetch,
        Op::Residency,
        Op::ResidencyWait,
        Op::Stat,
        Op::List,
        Op::Lookup,
    ];

    /// The operation of a wire number; `None` if this version does not know it.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Op> {
        Op::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The name used in documents and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Op::Hello => "HELLO",
            Op::Attach => "ATTACH",
            Op::Detach => "DETACH",
            Op::Read => "READ",
            Op::Write => "WRITE",
            Op::Flush => "FLUSH",
            Op::Discard => "DISCARD",
            Op::WriteZeroes => "WRITE_ZEROES",
            Op::PriorityFetch => "PRIORITY_FETCH",
            Op::Residency => "RESIDENCY",
            Op::ResidencyWait => "RESIDENCY_WAIT",
            Op::Stat => "STAT",
            Op::List => "LIST",
            Op::Lookup => "LOOKUP",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Op;

    #[test]
    fn numbers_are_frozen_and_round_trip() {
        for (index, op) in Op::ALL.iter().enumerate() {
            assert_eq!(*op as usize, index + 1);
            assert_eq!(Op::from_wire(*op as u8), Some(*op));
        }
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(15), None);
    }
}
