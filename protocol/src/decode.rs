//! Decoding: frames borrowed from a receive buffer, nothing copied, nothing allocated, every length checked first.

use rkyv::Portable;
use rkyv::api::high::{HighDeserializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;

use crate::header::{FLAG_FUA, FrameError, FrameHeader, HEADER_BYTES, checksum};
use crate::limits::{LOGICAL_BLOCK_BYTES, PAYLOAD_BYTES_MAX};
use crate::messages as m;
use crate::messages::Body;
use crate::op::Op;
use crate::status::Status;

/// What the start of a buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A whole, checked frame. It takes the first [`Frame::len`] bytes.
    Frame(Frame<'a>),
    /// Part of a frame: at least this many more bytes (never 0) are needed to learn more.
    NeedMore(usize),
}

/// A frame in a receive buffer. Header, body and payload have passed their checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The checked header.
    pub header: FrameHeader,
    /// The archived body, or the sentence of an error reply.
    pub body: &'a [u8],
    /// The raw payload.
    pub payload: &'a [u8],
}

/// A sound frame whose content is not a proper message. It costs the sender this request only.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BodyError {
    /// What to answer: `Invalid`, `Unsupported`, `Misaligned` or `TooLarge`.
    pub status: Status,
    /// What is wrong.
    pub message: String,
}

impl BodyError {
    fn invalid(message: String) -> BodyError {
        BodyError { status: Status::Invalid, message }
    }
}

/// Looks for a frame at the start of `input`. Call it in a loop, moving on by [`Frame::len`], until it needs more.
///
/// # Errors
/// The stream is broken for good: answer nothing more and close it.
pub fn decode(input: &[u8]) -> Result<Decoded<'_>, FrameError> {
    let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else {
        check_magic_prefix(input)?;
        return Ok(Decoded::NeedMore(HEADER_BYTES - input.len()));
    };
    let header = FrameHeader::from_bytes(head)?;
    let (body_len, payload_len) = (header.body_len as usize, header.payload_len as usize);
    if rest.len() < body_len + payload_len {
        return Ok(Decoded::NeedMore(body_len + payload_len - rest.len()));
    }
    let (body, rest) = rest.split_at(body_len);
    let payload = &rest[..payload_len];
    let request_id = header.request_id;
    let (got, want) = (header.body_crc, checksum(body));
    if got != want {
        return Err(FrameError::BodyCrc { got, want, request_id });
    }
    let (got, want) = (header.payload_crc, checksum(payload));
    if got != want {
        return Err(FrameError::PayloadCrc { got, want, request_id });
    }
    Ok(Decoded::Frame(Frame { header, body, payload }))
}

/// A stranger who sends less than a header (an HTTP client, a port scan) is found out at the first wrong byte.
fn check_magic_prefix(input: &[u8]) -> Result<(), FrameError> {
    let seen = input.len().min(4);
    if input[..seen] == crate::header::MAGIC[..seen] {
        return Ok(());
    }
    let mut got = [0; 4];
    got[..seen].copy_from_slice(&input[..seen]);
    Err(FrameError::Magic { got })
}

/// A request, read in place.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "each variant is the message of its name")]
pub enum Request<'a> {
    Hello(&'a m::ArchivedHello),
    Attach(&'a m::ArchivedAttach),
    Detach(&'a m::ArchivedDetach),
    Read(&'a m::ArchivedRead),
    Write { body: &'a m::ArchivedWrite, data: &'a [u8], fua: bool },
    Flush(&'a m::ArchivedFlush),
    Discard(&'a m::ArchivedDiscard),
    WriteZeroes { body: &'a m::ArchivedWriteZeroes, fua: bool },
    PriorityFetch(&'a m::ArchivedPriorityFetch),
    Residency(&'a m::ArchivedResidency),
    ResidencyWait(&'a m::ArchivedResidencyWait),
    Stat(&'a m::ArchivedStat),
    List(&'a m::ArchivedList),
    Lookup(&'a m::ArchivedLookup),
}

impl<'a> Frame<'a> {
    /// Bytes the frame takes in the stream (never 0, so there is no `is_empty`).
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.header.frame_bytes()
    }

    /// Reads the frame as a request: direction, operation, flags, payload, then the body, validated in place.
    /// Ranges are checked for what needs no volume: positive, multiples of 512, no overflow, payload limit.
    ///
    /// # Errors
    /// What to answer, see [`BodyError::status`].
    pub fn request(&self) -> Result<Request<'a>, BodyError> {
        let header = &self.header;
        if header.is_reply() || header.status != 0 {
            return Err(BodyError::invalid("a reply was sent where a request belongs".into()));
        }
        let op = Op::from_wire(header.op).ok_or_else(|| BodyError {
            status: Status::Unsupported,
            message: format!("operation {} is not known to protocol version {}", header.op, header.version),
        })?;
        if header.flags & FLAG_FUA != 0 && !matches!(op, Op::Write | Op::WriteZeroes) {
            return Err(BodyError::invalid(format!("{} takes no FUA flag", op.name())));
        }
        if !self.payload.is_empty() && op != Op::Write {
            return Err(BodyError::invalid(format!("{} takes no payload", op.name())));
        }
        self.typed_request(op)
    }

    fn typed_request(&self, op: Op) -> Result<Request<'a>, BodyError> {
        let fua = self.header.is_fua();
        let request = match op {
            Op::Hello => Request::Hello(self.body::<m::Hello>()?),
            Op::Attach => Request::Attach(self.body::<m::Attach>()?),
            Op::Detach => Request::Detach(self.body::<m::Detach>()?),
            Op::Read => {
                let body = self.body::<m::Read>()?;
                check_range(op, body.offset.to_native(), u64::from(body.len.to_native()))?;
                if body.len.to_native() > PAYLOAD_BYTES_MAX {
                    return Err(BodyError {
                        status: Status::TooLarge,
                        message: format!("READ of {} bytes exceeds the limit of {PAYLOAD_BYTES_MAX}", body.len),
                    });
                }
                Request::Read(body)
            }
            Op::Write => {
                let body = self.body::<m::Write>()?;
                check_range(op, body.offset.to_native(), self.payload.len() as u64)?;
                Request::Write { body, data: self.payload, fua }
            }
            Op::Flush => Request::Flush(self.body::<m::Flush>()?),
            Op::Discard => {
                let body = self.body::<m::Discard>()?;
                check_range(op, body.offset.to_native(), body.len.to_native())?;
                Request::Discard(body)
            }
            Op::WriteZeroes => {
                let body = self.body::<m::WriteZeroes>()?;
                check_range(op, body.offset.to_native(), body.len.to_native())?;
                Request::WriteZeroes { body, fua }
            }
            Op::PriorityFetch => {
                let body = self.body::<m::PriorityFetch>()?;
                check_range(op, body.offset.to_native(), body.len.to_native())?;
                Request::PriorityFetch(body)
            }
            Op::Residency => Request::Residency(self.body::<m::Residency>()?),
            Op::ResidencyWait => Request::ResidencyWait(self.body::<m::ResidencyWait>()?),
            Op::Stat => Request::Stat(self.body::<m::Stat>()?),
            Op::List => Request::List(self.body::<m::List>()?),
            Op::Lookup => Request::Lookup(self.body::<m::Lookup>()?),
        };
        Ok(request)
    }

    /// Reads the body in place as `T`, validated; nothing is copied.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not a proper `T`.
    pub fn body<T>(&self) -> Result<&'a T::Archived, BodyError>
    where
        T: Body,
        T::Archived: Portable + for<'c> CheckBytes<HighValidator<'c, rancor::Error>>,
    {
        if let Some(want) = T::FIXED_BYTES
            && self.body.len() != want
        {
            let (op, got) = (T::OP.name(), self.body.len());
            return Err(BodyError::invalid(format!("{op} body of {got} bytes, must have {want}")));
        }
        rkyv::access::<T::Archived, rancor::Error>(self.body)
            .map_err(|e| BodyError::invalid(format!("malformed {} body: {}", T::OP.name(), first_line(&e.to_string()))))
    }

    /// Reads the body as an owned `T`: for what is not hot.
    ///
    /// # Errors
    /// `Invalid` when the bytes are not a proper `T`.
    pub fn owned_body<T>(&self) -> Result<T, BodyError>
    where
        T: Body,
        T::Archived: Portable
            + for<'c> CheckBytes<HighValidator<'c, rancor::Error>>
            + rkyv::Deserialize<T, HighDeserializer<rancor::Error>>,
    {
        rkyv::deserialize::<T, rancor::Error>(self.body::<T>()?)
            .map_err(|e| BodyError::invalid(format!("malformed {} body: {}", T::OP.name(), first_line(&e.to_string()))))
    }

    /// The outcome of a reply: `Ok`, or the status and sentence of its error. A status number of a newer version reads
    /// as `Internal`.
    ///
    /// # Errors
    /// The error the server answered.
    pub fn outcome(&self) -> Result<(), BodyError> {
        let number = self.header.status;
        match Status::from_wire(number) {
            Some(Status::Ok) => Ok(()),
            Some(status) => Err(BodyError { status, message: String::from_utf8_lossy(self.body).into_owned() }),
            None => Err(BodyError {
                status: Status::Internal,
                message: format!("unknown status {number}: {}", String::from_utf8_lossy(self.body)),
            }),
        }
    }
}

fn check_range(op: Op, offset: u64, len: u64) -> Result<(), BodyError> {
    let block = u64::from(LOGICAL_BLOCK_BYTES);
    let at = |what| format!("{} of {len} bytes at {offset}: {what}", op.name());
    if len == 0 {
        return Err(BodyError::invalid(at("the length must not be 0")));
    }
    if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Err(BodyError { status: Status::Misaligned, message: at("not aligned to 512") });
    }
    if offset.checked_add(len).is_none() {
        return Err(BodyError { status: Status::OutOfRange, message: at("past the end of any device") });
    }
    Ok(())
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
