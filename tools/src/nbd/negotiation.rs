//! The handshake phase as pure functions: bytes of an option to its meaning, and answers to bytes.
//!
//! Nothing here does I/O, so hostile input is a matter of property tests. Every refusal is a reply type of the protocol
//! plus a sentence; only a bad magic ends the connection, because then nothing after it can be trusted.

use super::backend::Description;
use super::wire::{self, context, info, option, option_reply, transmission_flag};

/// Head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    /// Bytes of data that follow.
    pub len_bytes: u32,
}

/// An option, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    ExportName(String),
    Abort,
    List,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ListMetaContext(ContextQuery),
    SetMetaContext(ContextQuery),
}

/// Data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    pub export: String,
    /// Types of information asked for.
    pub items: Vec<u16>,
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery {
    pub export: String,
    pub queries: Vec<String>,
}

/// An option refused: a reply type and a sentence for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reply: u32,
    pub message: String,
}

impl Refusal {
    /// A refusal of type `reply`.
    pub fn new(reply: u32, message: impl Into<String>) -> Refusal {
        Refusal { reply, message: message.into() }
    }

    fn invalid(message: impl Into<String>) -> Refusal {
        Refusal::new(option_reply::ERR_INVALID, message)
    }
}

/// Contexts chosen by SET_META_CONTEXT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts {
    pub allocation: bool,
    pub resident: bool,
}

impl Contexts {
    /// Whether BLOCK_STATUS can be answered at all.
    #[must_use]
    pub fn any(self) -> bool {
        self.allocation || self.resident
    }

    /// Contexts that LIST_META_CONTEXT names for `queries`: all for none, a namespace for `ns:`.
    #[must_use]
    pub fn listed(queries: &[String]) -> Contexts {
        let matches =
            |name: &str, namespace: &str| queries.is_empty() || queries.iter().any(|q| q == name || q == namespace);
        Contexts {
            allocation: matches(context::BASE_ALLOCATION, "base:"),
            resident: matches(context::VOLLEY_RESIDENT, "volley:"),
        }
    }

    /// Contexts that SET_META_CONTEXT chooses for `queries`: exact names only; unknown ones are ignored.
    #[must_use]
    pub fn chosen(queries: &[String]) -> Contexts {
        let matches = |name: &str| queries.iter().any(|q| q == name);
        Contexts { allocation: matches(context::BASE_ALLOCATION), resident: matches(context::VOLLEY_RESIDENT) }
    }

    /// Names with their ids on the wire.
    pub fn names(self) -> impl Iterator<Item = (u32, &'static str)> {
        let allocation = self.allocation.then_some((context::BASE_ALLOCATION_ID, context::BASE_ALLOCATION));
        let resident = self.resident.then_some((context::VOLLEY_RESIDENT_ID, context::VOLLEY_RESIDENT));
        allocation.into_iter().chain(resident)
    }
}

/// Flags under which every export is served.
#[must_use]
pub fn export_flags(structured: bool) -> u16 {
    use transmission_flag as f;
    let always = f::HAS_FLAGS
        | f::SEND_FLUSH
        | f::SEND_FUA
        | f::SEND_TRIM
        | f::SEND_WRITE_ZEROES
        | f::CAN_MULTI_CONN
        | f::SEND_CACHE;
    if structured { always | f::SEND_DF } else { always }
}

/// Understands the head of an option.
///
/// # Errors
/// The magic is wrong: the peer is no NBD client, or we lost our place.
pub fn parse_option_header(bytes: &[u8; wire::OPTION_HEADER_BYTES]) -> Result<OptionHeader, String> {
    let mut fields = Fields(bytes);
    match (fields.u64(), fields.u32(), fields.u32()) {
        (Some(wire::OPTION_MAGIC), Some(option), Some(len_bytes)) => Ok(OptionHeader { option, len_bytes }),
        (magic, ..) => Err(format!("bad magic {:#018x} where an NBD option should start", magic.unwrap_or_default())),
    }
}

/// Understands an option with its data.
///
/// # Errors
/// The reply that refuses it: not known, not offered, or malformed.
pub fn parse_option(number: u32, data: &[u8]) -> Result<ClientOption, Refusal> {
    match number {
        option::EXPORT_NAME => Ok(ClientOption::ExportName(parse_name(data)?)),
        option::ABORT => Ok(ClientOption::Abort),
        option::LIST => without_data("LIST", data, ClientOption::List),
        option::STRUCTURED_REPLY => without_data("STRUCTURED_REPLY", data, ClientOption::StructuredReply),
        option::INFO => Ok(ClientOption::Info(parse_info_request(data)?)),
        option::GO => Ok(ClientOption::Go(parse_info_request(data)?)),
        option::LIST_META_CONTEXT => Ok(ClientOption::ListMetaContext(parse_context_query(data)?)),
        option::SET_META_CONTEXT => Ok(ClientOption::SetMetaContext(parse_context_query(data)?)),
        option::STARTTLS => {
            Err(Refusal::new(option_reply::ERR_POLICY, "this agent does not offer TLS; use a unix socket or a tunnel"))
        }
        other => Err(Refusal::new(option_reply::ERR_UNSUP, format!("option {other} is not supported"))),
    }
}

fn without_data(name: &str, data: &[u8], option: ClientOption) -> Result<ClientOption, Refusal> {
    if data.is_empty() {
        return Ok(option);
    }
    Err(Refusal::invalid(format!("option {name} carries {} bytes of data but takes none", data.len())))
}

fn parse_info_request(data: &[u8]) -> Result<InfoRequest, Refusal> {
    let mut fields = Fields(data);
    let export = fields.string("export name")?;
    let count = fields.u16().ok_or_else(|| Refusal::invalid("INFO or GO ends before its number of items"))?;
    if fields.0.len() != usize::from(count) * 2 {
        let have = fields.0.len();
        return Err(Refusal::invalid(format!(
            "INFO or GO announces {count} items of 2 bytes but carries {have} bytes"
        )));
    }
    Ok(InfoRequest { export, items: std::iter::from_fn(|| fields.u16()).collect() })
}

fn parse_context_query(data: &[u8]) -> Result<ContextQuery, Refusal> {
    let mut fields = Fields(data);
    let export = fields.string("export name")?;
    let count = fields.u32().ok_or_else(|| Refusal::invalid("context option ends before its number of queries"))?;
    if count > wire::OPTION_ITEMS_MAX {
        return Err(Refusal::invalid(format!(
            "{count} context queries; at most {} are accepted",
            wire::OPTION_ITEMS_MAX
        )));
    }
    let queries = (0..count).map(|_| fields.string("context query")).collect::<Result<Vec<_>, _>>()?;
    if !fields.0.is_empty() {
        return Err(Refusal::invalid(format!("context option has {} bytes left over", fields.0.len())));
    }
    Ok(ContextQuery { export, queries })
}

fn parse_name(bytes: &[u8]) -> Result<String, Refusal> {
    if bytes.len() > wire::STRING_BYTES_MAX {
        return Err(Refusal::invalid(format!(
            "a string of {} bytes; the limit is {}",
            bytes.len(),
            wire::STRING_BYTES_MAX
        )));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => Err(Refusal::invalid("a string is not UTF-8 or contains a NUL")),
    }
}

/// A cursor over big-endian fields that never reads past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, Refusal> {
        let len = self.u32().ok_or_else(|| Refusal::invalid(format!("option ends before the length of its {what}")))?;
        let bytes = usize::try_from(len).ok().and_then(|len| self.take(len));
        parse_name(bytes.ok_or_else(|| Refusal::invalid(format!("{what} of {len} bytes runs past the option's end")))?)
    }
}

/// The server's greeting.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let flags = wire::handshake_flag::FIXED_NEWSTYLE | wire::handshake_flag::NO_ZEROES;
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&wire::MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// Appends one reply to `option`.
///
/// # Panics
/// If `data` is 4 GiB or longer, which no caller builds.
pub fn push_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("replies to options are small");
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends the replies to LIST: each name, then the acknowledgement.
pub fn push_names(out: &mut Vec<u8>, names: &[String]) {
    for name in names {
        let mut data = Vec::with_capacity(4 + name.len());
        push_string(&mut data, name);
        push_reply(out, option::LIST, option_reply::SERVER, &data);
    }
    push_reply(out, option::LIST, option_reply::ACK, &[]);
}

/// Appends the replies to INFO or GO (`option`): what is always said, what was asked for, then the acknowledgement.
pub fn push_info(out: &mut Vec<u8>, option: u32, request: &InfoRequest, about: &Description, structured: bool) {
    let mut item = |kind: u16, data: &[u8]| {
        push_reply(out, option, option_reply::INFO, &[&kind.to_be_bytes(), data].concat());
    };
    item(info::EXPORT, &size_and_flags(about.size_bytes, structured));
    let sizes = [wire::BLOCK_BYTES_MIN, wire::BLOCK_BYTES_PREFERRED, wire::PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
    item(info::BLOCK_SIZE, sizes.as_flattened());
    if request.items.contains(&info::NAME) {
        item(info::NAME, request.export.as_bytes());
    }
    if request.items.contains(&info::DESCRIPTION) {
        item(info::DESCRIPTION, about.text.as_bytes());
    }
    push_reply(out, option, option_reply::ACK, &[]);
}

/// Appends the replies to a context option: each context, then the acknowledgement. Listing has no ids.
pub fn push_contexts(out: &mut Vec<u8>, option: u32, contexts: Contexts) {
    for (id, name) in contexts.names() {
        let id = if option == option::LIST_META_CONTEXT { 0 } else { id };
        push_reply(out, option, option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()].concat());
    }
    push_reply(out, option, option_reply::ACK, &[]);
}

/// The answer to EXPORT_NAME.
#[must_use]
pub fn export_name_answer(size_bytes: u64, structured: bool, no_zeroes: bool) -> Vec<u8> {
    let mut bytes = size_and_flags(size_bytes, structured).to_vec();
    if !no_zeroes {
        bytes.resize(bytes.len() + wire::EXPORT_NAME_PADDING_BYTES, 0);
    }
    bytes
}

fn size_and_flags(size_bytes: u64, structured: bool) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&size_bytes.to_be_bytes());
    bytes[8..].copy_from_slice(&export_flags(structured).to_be_bytes());
    bytes
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).expect("names are short");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests;
