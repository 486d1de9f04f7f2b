//! Requests of the transmission phase as pure functions: syntax, then bounds, then meaning.

use super::wire::{self, command, command_flag, errno};

/// Head of a request, syntactically sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    pub flags: u16,
    pub command: u16,
    /// Chosen by the client, repeated in the reply.
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl RequestHeader {
    /// Bytes of payload that follow this header on the wire, whether or not the request is any good.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        if self.command == command::WRITE { self.len } else { 0 }
    }
}

/// A request inside the device that asks for something we do. `len` may be zero: nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32, fua: bool },
    Flush,
    Trim { offset: u64, len: u32, fua: bool },
    WriteZeroes { offset: u64, len: u32, fua: bool, allocate: bool },
    Cache { offset: u64, len: u32 },
    BlockStatus { offset: u64, len: u32, one: bool },
    Disconnect,
}

/// What was agreed in the handshake, as far as it decides which requests are right.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub size_bytes: u64,
    pub structured: bool,
    /// At least one metadata context was chosen.
    pub contexts: bool,
}

/// A request refused: an error number of the protocol and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub errno: u32,
    pub message: String,
}

/// Understands the head of a request.
///
/// # Errors
/// The magic is wrong: we lost our place in the stream, and the connection must end.
pub fn parse_request(bytes: &[u8; wire::REQUEST_HEADER_BYTES]) -> Result<RequestHeader, String> {
    let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) << 16 | u32::from(u16_at(at + 2));
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let magic = u32_at(0);
    if magic != wire::REQUEST_MAGIC {
        return Err(format!("bad magic {magic:#010x} where an NBD request should start"));
    }
    Ok(RequestHeader { flags: u16_at(4), command: u16_at(6), cookie: u64_at(8), offset: u64_at(16), len: u32_at(24) })
}

/// Decides what a request asks for.
///
/// # Errors
/// The refusal to send: unknown command or flag, outside the device, too large, or not agreed in the handshake.
pub fn check(header: &RequestHeader, terms: &Terms) -> Result<Action, Refusal> {
    check_flags(header, terms)?;
    let RequestHeader { offset, len, .. } = *header;
    let fua = header.flags & command_flag::FUA != 0;
    match header.command {
        command::DISC => return Ok(Action::Disconnect),
        command::FLUSH => return Ok(Action::Flush),
        _ => check_range(header, terms)?,
    }
    match header.command {
        command::READ => Ok(Action::Read { offset, len }),
        command::WRITE => Ok(Action::Write { offset, len, fua }),
        command::TRIM => Ok(Action::Trim { offset, len, fua }),
        command::WRITE_ZEROES => {
            Ok(Action::WriteZeroes { offset, len, fua, allocate: header.flags & command_flag::NO_HOLE != 0 })
        }
        command::CACHE => Ok(Action::Cache { offset, len }),
        command::BLOCK_STATUS if !terms.contexts => {
            refuse(errno::EINVAL, "BLOCK_STATUS without a chosen metadata context")
        }
        command::BLOCK_STATUS if len == 0 => refuse(errno::EINVAL, "BLOCK_STATUS of zero bytes"),
        command::BLOCK_STATUS => {
            Ok(Action::BlockStatus { offset, len, one: header.flags & command_flag::REQ_ONE != 0 })
        }
        other => refuse(errno::EINVAL, format!("unknown command {other}")),
    }
}

fn check_flags(header: &RequestHeader, terms: &Terms) -> Result<(), Refusal> {
    // FUA is legal, if without meaning, on every command.
    let allowed = command_flag::FUA
        | match header.command {
            command::READ if terms.structured => command_flag::DF,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => 0,
        };
    let unknown = header.flags & !allowed;
    if unknown != 0 {
        return refuse(errno::EINVAL, format!("flags {unknown:#x} are not allowed with command {}", header.command));
    }
    if header.flags & command_flag::FAST_ZERO != 0 {
        return refuse(errno::ENOTSUP, "fast zeroing is not offered");
    }
    Ok(())
}

fn check_range(header: &RequestHeader, terms: &Terms) -> Result<(), Refusal> {
    let RequestHeader { offset, len, command, .. } = *header;
    let end = offset.checked_add(u64::from(len));
    if end.is_none_or(|end| end > terms.size_bytes) {
        let grows = command == command::WRITE || command == command::WRITE_ZEROES;
        let number = if grows { errno::ENOSPC } else { errno::EINVAL };
        let size = terms.size_bytes;
        return refuse(number, format!("{len} bytes at {offset} do not lie inside the device of {size} bytes"));
    }
    let carries_payload = command == command::READ || command == command::WRITE;
    if carries_payload && len > wire::PAYLOAD_BYTES_MAX {
        return refuse(errno::EINVAL, format!("{len} bytes in one request; the limit is {}", wire::PAYLOAD_BYTES_MAX));
    }
    Ok(())
}

fn refuse<T>(errno: u32, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { errno, message: message.into() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;
    const TERMS: Terms = Terms { size_bytes: SIZE, structured: true, contexts: true };

    fn header(command: u16, flags: u16, offset: u64, len: u32) -> RequestHeader {
        RequestHeader { flags, command, cookie: 7, offset, len }
    }

    fn errno_of(command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        check(&header(command, flags, offset, len), &TERMS).map_or_else(|refusal| refusal.errno, |_| 0)
    }

    #[test]
    fn a_request_is_read_field_by_field() {
        let mut bytes = [0u8; 28];
        bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        for (at, byte) in bytes.iter_mut().enumerate().skip(4) {
            *byte = at as u8;
        }
        let want = RequestHeader {
            flags: 0x0405,
            command: 0x0607,
            cookie: 0x0809_0a0b_0c0d_0e0f,
            offset: 0x1011_1213_1415_1617,
            len: 0x1819_1a1b,
        };
        assert_eq!(parse_request(&bytes), Ok(want));
        bytes[0] ^= 1;
        assert!(parse_request(&bytes).unwrap_err().contains("bad magic 0x24609513"));
    }

    #[test]
    fn requests_outside_the_device_get_the_number_the_protocol_wants() {
        for (command, want) in [
            (command::READ, errno::EINVAL),
            (command::WRITE, errno::ENOSPC),
            (command::WRITE_ZEROES, errno::ENOSPC),
            (command::TRIM, errno::EINVAL),
            (command::CACHE, errno::EINVAL),
            (command::BLOCK_STATUS, errno::EINVAL),
        ] {
            assert_eq!(errno_of(command, 0, SIZE - 512, 512), 0);
            assert_eq!(errno_of(command, 0, SIZE - 512, 513), want);
            assert_eq!(errno_of(command, 0, u64::MAX, 2), want);
        }
    }

    #[test]
    fn flags_are_allowed_only_where_they_mean_something() {
        use command_flag as f;
        assert_eq!(errno_of(command::READ, f::DF | f::FUA, 0, 1), 0);
        assert_eq!(errno_of(command::WRITE, f::DF, 0, 1), errno::EINVAL);
        assert_eq!(errno_of(command::WRITE_ZEROES, f::NO_HOLE, 0, 1), 0);
        assert_eq!(errno_of(command::WRITE_ZEROES, f::FAST_ZERO, 0, 1), errno::ENOTSUP);
        assert_eq!(errno_of(command::BLOCK_STATUS, f::REQ_ONE, 0, 1), 0);
        assert_eq!(errno_of(command::TRIM, 1 << 9, 0, 1), errno::EINVAL);
        let simple = Terms { structured: false, ..TERMS };
        assert!(check(&header(command::READ, f::DF, 0, 1), &simple).is_err());
    }

    #[test]
    fn what_was_not_agreed_is_refused() {
        let no_contexts = Terms { contexts: false, ..TERMS };
        assert!(check(&header(command::BLOCK_STATUS, 0, 0, 1), &no_contexts).is_err());
        assert_eq!(errno_of(command::BLOCK_STATUS, 0, 0, 0), errno::EINVAL);
        assert_eq!(errno_of(99, 0, 0, 1), errno::EINVAL);
        let huge = Terms { size_bytes: 1 << 40, ..TERMS };
        let read = header(command::READ, 0, 0, wire::PAYLOAD_BYTES_MAX + 1);
        assert_eq!(check(&read, &huge).unwrap_err().errno, errno::EINVAL);
        let zero = header(command::WRITE_ZEROES, 0, 0, u32::MAX);
        assert!(check(&zero, &huge).is_ok(), "requests without payload have no such limit");
    }

    proptest! {
        #[test]
        fn an_accepted_request_lies_inside_the_device(
            command in 0u16..10, flags in 0u16..32, offset in prop_oneof![0..SIZE * 2, any::<u64>()],
            len in prop_oneof![0u32..1 << 21, any::<u32>()],
        ) {
            match check(&header(command, flags, offset, len), &TERMS) {
                Ok(Action::Disconnect | Action::Flush) => {}
                Ok(_) => prop_assert!(offset.checked_add(u64::from(len)).unwrap() <= SIZE),
                Err(refusal) => prop_assert!(refusal.errno != 0 && !refusal.message.is_empty()),
            }
        }

        #[test]
        fn any_bytes_are_a_request_or_refused(bytes in any::<[u8; 28]>()) {
            let _ = parse_request(&bytes);
        }
    }
}
