//! Requests and answers as owned values, and how a request becomes a frame.

use bytes::Bytes;
use volley_protocol::messages as m;
use volley_protocol::{FLAG_FUA, FetchUntil, Frame, Op, encode};

use crate::error::{Error, ErrorKind, Result};

/// A request, owned, so that it can be sent again. Offsets and lengths in bytes, multiples of 512.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields and variants are those of the wire messages in volley_protocol::messages")]
pub enum Call {
    /// `resume_generation`: see [`m::Attach`].
    Attach {
        name: String,
        resume_generation: Option<u64>,
    },
    Lookup {
        name: String,
    },
    Detach {
        volume: u64,
        generation: u64,
    },
    Read {
        volume: u64,
        generation: u64,
        offset: u64,
        len: u32,
    },
    Write {
        volume: u64,
        generation: u64,
        offset: u64,
        data: Bytes,
        fua: bool,
    },
    Flush {
        volume: u64,
        generation: u64,
    },
    Discard {
        volume: u64,
        generation: u64,
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        volume: u64,
        generation: u64,
        offset: u64,
        len: u64,
        fua: bool,
    },
    PriorityFetch {
        volume: u64,
        offset: u64,
        len: u64,
        until: FetchUntil,
    },
    Residency {
        volume: u64,
        offset: u64,
        len: u64,
    },
    ResidencyWait {
        volume: u64,
        seen_version: u64,
    },
    Stat {
        volume: u64,
    },
    List {
        after: String,
    },
}

/// A successful reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Done.
    Done,
    /// Reply to ATTACH and LOOKUP.
    Attached(m::AttachReply),
    /// Reply to READ, as long as asked.
    Data(Bytes),
    /// Reply to RESIDENCY and RESIDENCY_WAIT.
    Residency(m::ResidencyReply),
    /// Reply to STAT.
    Stat(Box<m::StatReply>),
    /// Reply to LIST.
    Names(Vec<String>),
}

impl Call {
    pub(crate) fn op(&self) -> Op {
        match self {
            Call::Attach { .. } => Op::Attach,
            Call::Lookup { .. } => Op::Lookup,
            Call::Detach { .. } => Op::Detach,
            Call::Read { .. } => Op::Read,
            Call::Write { .. } => Op::Write,
            Call::Flush { .. } => Op::Flush,
            Call::Discard { .. } => Op::Discard,
            Call::WriteZeroes { .. } => Op::WriteZeroes,
            Call::PriorityFetch { .. } => Op::PriorityFetch,
            Call::Residency { .. } => Op::Residency,
            Call::ResidencyWait { .. } => Op::ResidencyWait,
            Call::Stat { .. } => Op::Stat,
            Call::List { .. } => Op::List,
        }
    }

    /// Volume and generation of a call that needs the attachment.
    pub(crate) fn attachment(&self) -> Option<(u64, u64)> {
        match *self {
            Call::Detach { volume, generation }
            | Call::Read { volume, generation, .. }
            | Call::Write { volume, generation, .. }
            | Call::Flush { volume, generation }
            | Call::Discard { volume, generation, .. }
            | Call::WriteZeroes { volume, generation, .. } => Some((volume, generation)),
            _ => None,
        }
    }

    /// The range a call changes: first byte and end (exclusive).
    pub(crate) fn changes(&self) -> Option<(u64, u64)> {
        match *self {
            Call::Write { offset, ref data, .. } => Some((offset, offset.saturating_add(data.len() as u64))),
            Call::Discard { offset, len, .. } | Call::WriteZeroes { offset, len, .. } => {
                Some((offset, offset.saturating_add(len)))
            }
            _ => None,
        }
    }

    pub(crate) fn is_fua(&self) -> bool {
        matches!(self, Call::Write { fua: true, .. } | Call::WriteZeroes { fua: true, .. })
    }

    pub(crate) fn payload_bytes(&self) -> usize {
        match self {
            Call::Write { data, .. } => data.len(),
            _ => 0,
        }
    }

    /// Appends the request's frame.
    pub(crate) fn encode(&self, id: u64, out: &mut Vec<u8>) {
        let none: &[u8] = &[];
        match *self {
            Call::Attach { ref name, resume_generation } => {
                encode::request(out, id, 0, &m::Attach { name: name.clone(), resume_generation }, none);
            }
            Call::Lookup { ref name } => encode::request(out, id, 0, &m::Lookup { name: name.clone() }, none),
            Call::Detach { volume, generation } => encode::request(out, id, 0, &m::Detach { volume, generation }, none),
            Call::Read { volume, generation, offset, len } => {
                encode::request(out, id, 0, &m::Read { volume, generation, offset, len }, none);
            }
            Call::Write { volume, generation, offset, ref data, fua } => {
                encode::request(out, id, fua_flag(fua), &m::Write { volume, generation, offset }, data);
            }
            Call::Flush { volume, generation } => encode::request(out, id, 0, &m::Flush { volume, generation }, none),
            Call::Discard { volume, generation, offset, len } => {
                encode::request(out, id, 0, &m::Discard { volume, generation, offset, len }, none);
            }
            Call::WriteZeroes { volume, generation, offset, len, fua } => {
                let body = m::WriteZeroes { volume, generation, offset, len };
                encode::request(out, id, fua_flag(fua), &body, none);
            }
            Call::PriorityFetch { volume, offset, len, until } => {
                encode::request(out, id, 0, &m::PriorityFetch { volume, offset, len, until }, none);
            }
            Call::Residency { volume, offset, len } => {
                encode::request(out, id, 0, &m::Residency { volume, offset, len }, none);
            }
            Call::ResidencyWait { volume, seen_version } => {
                encode::request(out, id, 0, &m::ResidencyWait { volume, seen_version }, none);
            }
            Call::Stat { volume } => encode::request(out, id, 0, &m::Stat { volume }, none),
            Call::List { ref after } => encode::request(out, id, 0, &m::List { after: after.clone() }, none),
        }
    }

    /// Reads the reply to this call; `payload` is the frame's payload, owned.
    pub(crate) fn answer(&self, frame: &Frame<'_>, payload: Bytes) -> Result<Answer> {
        let got = frame.header.op;
        if got != self.op() as u8 {
            return Err(Error::new(ErrorKind::Protocol, format!("reply of operation {got} to {}", self.op().name())));
        }
        frame.outcome().map_err(|e| Error::from_status(e.status, e.message))?;
        let malformed = |e: volley_protocol::BodyError| Error::new(ErrorKind::Protocol, format!("reply: {e}"));
        match *self {
            Call::Attach { .. } | Call::Lookup { .. } => {
                Ok(Answer::Attached(frame.owned_body::<m::AttachReply>().map_err(malformed)?))
            }
            Call::Read { len, .. } if payload.len() == len as usize => Ok(Answer::Data(payload)),
            Call::Read { len, .. } => {
                let message = format!("reply to READ of {len} bytes has {}", payload.len());
                Err(Error::new(ErrorKind::Protocol, message))
            }
            Call::Residency { .. } | Call::ResidencyWait { .. } => {
                Ok(Answer::Residency(frame.owned_body::<m::ResidencyReply>().map_err(malformed)?))
            }
            Call::Stat { .. } => Ok(Answer::Stat(Box::new(frame.owned_body::<m::StatReply>().map_err(malformed)?))),
            Call::List { .. } => Ok(Answer::Names(frame.owned_body::<m::ListReply>().map_err(malformed)?.names)),
            _ => Ok(Answer::Done),
        }
    }
}

fn fua_flag(fua: bool) -> u8 {
    if fua { FLAG_FUA } else { 0 }
}
