//! Error numbers of the wire protocol: stable, documented, and each says what the caller should do.

/// Outcome of a request. `Ok` is 0; every other number is an error whose text accompanies the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Malformed or contradictory request. Do not repeat it: fix the caller.
    Invalid = 1,
    /// Protocol version or feature not spoken here. Upgrade one of the sides.
    Unsupported = 2,
    /// No volume of that name or id on this node. Look the volume up again.
    UnknownVolume = 3,
    /// No snapshot of that name in the object store.
    UnknownSnapshot = 4,
    /// The name is in use. Choose another or delete the old one.
    NameTaken = 5,
    /// The generation is older than the volume's current one: another host attached. Stop using the volume.
    StaleGeneration = 6,
    /// Request for a volume that this connection never attached. ATTACH first.
    NotAttached = 7,
    /// Offset and length do not lie inside the device. Fix the caller.
    OutOfRange = 8,
    /// Offset or length is not a multiple of 512 bytes. Fix the caller.
    Misaligned = 9,
    /// The deadline passed before the data could be had. Retry later; the volume keeps working.
    DeadlineExceeded = 10,
    /// The object store cannot be reached or refuses. Retry later; the event log names the cause.
    ObjectStore = 11,
    /// Data failed its digest or checksum and no good copy was found. Needs an operator.
    Corrupt = 12,
    /// The volume store is full. Free space, then retry.
    NoSpace = 13,
    /// The volume store failed. Needs an operator.
    Io = 14,
    /// A queue is full. Retry with back-off.
    Busy = 15,
    /// The server is stopping. Reconnect with back-off.
    ShuttingDown = 16,
    /// The frame is larger than the limit. Split the request.
    TooLarge = 17,
    /// The request contradicts the present state (e.g. deleting an attached volume).
    Conflict = 18,
    /// A bug or an exhausted invariant in the server. Report it.
    Internal = 19,
}

impl Status {
    /// Every status, in numeric order.
    pub const ALL: [Status; 20] = [
        Status::Ok,
        Status::Invalid,
        Status::Unsupported,
        Status::UnknownVolume,
        Status::UnknownSnapshot,
        Status::NameTaken,
        Status::StaleGeneration,
        Status::NotAttached,
        Status::OutOfRange,
        Status::Misaligned,
        Status::DeadlineExceeded,
        Status::ObjectStore,
        Status::Corrupt,
        Status::NoSpace,
        Status::Io,
        Status::Busy,
        Status::ShuttingDown,
        Status::TooLarge,
        Status::Conflict,
        Status::Internal,
    ];

    /// The status of a wire number, or `None` for a number this version does not know.
    #[must_use]
    pub fn from_wire(number: u16) -> Option<Status> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Stable snake_case identifier, the `code` of problem+json and of `--json` errors.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Invalid => "invalid",
            Status::Unsupported => "unsupported",
            Status::UnknownVolume => "unknown_volume",
            Status::UnknownSnapshot => "unknown_snapshot",
            Status::NameTaken => "name_taken",
            Status::StaleGeneration => "stale_generation",
            Status::NotAttached => "not_attached",
            Status::OutOfRange => "out_of_range",
            Status::Misaligned => "misaligned",
            Status::DeadlineExceeded => "deadline_exceeded",
            Status::ObjectStore => "object_store",
            Status::Corrupt => "corrupt",
            Status::NoSpace => "no_space",
            Status::Io => "io",
            Status::Busy => "busy",
            Status::ShuttingDown => "shutting_down",
            Status::TooLarge => "too_large",
            Status::Conflict => "conflict",
            Status::Internal => "internal",
        }
    }

    /// Whether repeating the same request later can succeed without any change by the caller.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Status::DeadlineExceeded | Status::ObjectStore | Status::Busy | Status::ShuttingDown)
    }
}

#[cfg(test)]
mod tests {
    use super::Status;

    #[test]
    fn numbers_are_frozen_and_round_trip() {
        for (number, status) in Status::ALL.iter().enumerate() {
            assert_eq!(*status as usize, number);
            assert_eq!(Status::from_wire(number as u16), Some(*status));
        }
        assert_eq!(Status::from_wire(20), None);
        assert_eq!(Status::Internal as u16, 19);
    }
}
