//! The handshake phase over a stream: reads options, answers them, and ends with an attached export or nothing.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tracing::debug;

use super::backend::{Backend, ErrorKind, ExportError};
use super::exports::{Exports, Lease};
use super::negotiation::{self, ClientOption, ContextQuery, Contexts, InfoRequest, Refusal};
use super::reply::{self, Encoder};
use super::wire::{self, handshake_flag, option, option_reply};

/// A peer that says nothing for so long before it has chosen an export gives its place to others.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// Why a connection ended other than by its peer's wish.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(String),
}

/// What the handshake settled.
pub(crate) struct Agreed<E> {
    pub(crate) lease: Lease<E>,
    pub(crate) encoder: Encoder,
}

/// Runs the handshake. `None`: the peer left in order, or the agent stops.
pub(crate) async fn negotiate<B: Backend>(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    exports: &Exports<B>,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<Agreed<B::Export>>, ConnectionError> {
    writer.write_all(&negotiation::greeting()).await?;
    let Some(flags) = next(reader.read_u32(), stop).await? else { return Ok(None) };
    let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    if flags & !known != 0 {
        return Err(ConnectionError::Protocol(format!("unknown client flags {flags:#x}")));
    }
    let no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
    let mut session = Session { exports, no_zeroes, structured: false, chosen: None };
    loop {
        let Some((number, data)) = next(read_option(reader), stop).await? else { return Ok(None) };
        let outcome = match data {
            Ok(data) => session.answer(number, &data).await,
            Err(refusal) => Outcome::refused(number, &refusal),
        };
        match outcome {
            Outcome::Continue(bytes) => writer.write_all(&bytes).await?,
            Outcome::Close(bytes) => {
                // The peer may not wait for the answer to its farewell.
                let _ = writer.write_all(&bytes).await;
                return Ok(None);
            }
            Outcome::Start(bytes, agreed) => {
                if let Err(error) = writer.write_all(&bytes).await {
                    exports.leave(agreed.lease).await;
                    return Err(error.into());
                }
                return Ok(Some(agreed));
            }
        }
    }
}

/// What to do after an option.
enum Outcome<E> {
    Continue(Vec<u8>),
    Close(Vec<u8>),
    Start(Vec<u8>, Agreed<E>),
}

impl<E> Outcome<E> {
    fn refused(option: u32, refusal: &Refusal) -> Outcome<E> {
        debug!(option, "option refused: {}", refusal.message);
        let mut out = Vec::new();
        // A long name is quoted with escapes: clients end the connection over a longer text than the protocol has.
        let text = reply::truncate(&refusal.message, wire::STRING_BYTES_MAX);
        negotiation::push_reply(&mut out, option, refusal.reply, text.as_bytes());
        // EXPORT_NAME has no way to say no but to hang up.
        if option == option::EXPORT_NAME { Outcome::Close(Vec::new()) } else { Outcome::Continue(out) }
    }
}

struct Session<'a, B: Backend> {
    exports: &'a Exports<B>,
    no_zeroes: bool,
    structured: bool,
    /// Contexts chosen for an export; they hold only if that one is opened.
    chosen: Option<(String, Contexts)>,
}

impl<B: Backend> Session<'_, B> {
    async fn answer(&mut self, number: u32, data: &[u8]) -> Outcome<B::Export> {
        let answered = match negotiation::parse_option(number, data) {
            Ok(ClientOption::ExportName(name)) => self.export_name(&name).await,
            Ok(ClientOption::Abort) => Ok(Outcome::Close(ack(number))),
            Ok(ClientOption::List) => self.list().await,
            Ok(ClientOption::Info(request)) => self.info(&request).await,
            Ok(ClientOption::Go(request)) => self.go(&request).await,
            Ok(ClientOption::StructuredReply) => {
                self.structured = true;
                Ok(Outcome::Continue(ack(number)))
            }
            Ok(ClientOption::ListMetaContext(query)) => self.list_contexts(&query).await,
            Ok(ClientOption::SetMetaContext(query)) => self.set_contexts(query).await,
            Err(refusal) => Err(refusal),
        };
        answered.unwrap_or_else(|refusal| Outcome::refused(number, &refusal))
    }

    async fn export_name(&mut self, name: &str) -> Result<Outcome<B::Export>, Refusal> {
        let about = self.exports.describe(name).await.map_err(refusal)?;
        let agreed = self.join(name).await?;
        let answer = negotiation::export_name_answer(about.size_bytes, self.structured, self.no_zeroes);
        Ok(Outcome::Start(answer, agreed))
    }

    async fn list(&self) -> Result<Outcome<B::Export>, Refusal> {
        let names = self.exports.names().await.map_err(refusal)?;
        let mut out = Vec::new();
        negotiation::push_names(&mut out, &names);
        Ok(Outcome::Continue(out))
    }

    async fn info(&self, request: &InfoRequest) -> Result<Outcome<B::Export>, Refusal> {
        let about = self.exports.describe(&request.export).await.map_err(refusal)?;
        let mut out = Vec::new();
        negotiation::push_info(&mut out, option::INFO, request, &about, self.structured);
        Ok(Outcome::Continue(out))
    }

    async fn go(&mut self, request: &InfoRequest) -> Result<Outcome<B::Export>, Refusal> {
        let about = self.exports.describe(&request.export).await.map_err(refusal)?;
        let agreed = self.join(&request.export).await?;
        let mut out = Vec::new();
        negotiation::push_info(&mut out, option::GO, request, &about, self.structured);
        Ok(Outcome::Start(out, agreed))
    }

    async fn list_contexts(&self, query: &ContextQuery) -> Result<Outcome<B::Export>, Refusal> {
        self.exports.describe(&query.export).await.map_err(refusal)?;
        let mut out = Vec::new();
        negotiation::push_contexts(&mut out, option::LIST_META_CONTEXT, Contexts::listed(&query.queries));
        Ok(Outcome::Continue(out))
    }

    async fn set_contexts(&mut self, query: ContextQuery) -> Result<Outcome<B::Export>, Refusal> {
        self.chosen = None;
        if !self.structured {
            return Err(Refusal::new(option_reply::ERR_INVALID, "metadata contexts need STRUCTURED_REPLY first"));
        }
        self.exports.describe(&query.export).await.map_err(refusal)?;
        let contexts = Contexts::chosen(&query.queries);
        self.chosen = Some((query.export, contexts));
        let mut out = Vec::new();
        negotiation::push_contexts(&mut out, option::SET_META_CONTEXT, contexts);
        Ok(Outcome::Continue(out))
    }

    async fn join(&self, name: &str) -> Result<Agreed<B::Export>, Refusal> {
        let contexts = self.chosen.as_ref().filter(|(export, _)| export == name).map(|(_, contexts)| *contexts);
        let encoder = Encoder { structured: self.structured, contexts: contexts.unwrap_or_default() };
        let lease = self.exports.join(name).await.map_err(refusal)?;
        Ok(Agreed { lease, encoder })
    }
}

fn refusal(error: ExportError) -> Refusal {
    let reply = match error.kind {
        ErrorKind::UnknownExport => option_reply::ERR_UNKNOWN,
        ErrorKind::Invalid => option_reply::ERR_INVALID,
        ErrorKind::NoSpace | ErrorKind::Gone | ErrorKind::Io => option_reply::ERR_SHUTDOWN,
    };
    Refusal::new(reply, error.message)
}

fn ack(option: u32) -> Vec<u8> {
    let mut out = Vec::new();
    negotiation::push_reply(&mut out, option, option_reply::ACK, &[]);
    out
}

/// Number and data of the next option; oversized data is skipped and becomes a refusal.
async fn read_option(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<(u32, Result<Vec<u8>, Refusal>), ConnectionError> {
    let mut head = [0; wire::OPTION_HEADER_BYTES];
    reader.read_exact(&mut head).await?;
    let header = negotiation::parse_option_header(&head).map_err(ConnectionError::Protocol)?;
    if header.len_bytes > wire::OPTION_BYTES_MAX {
        skip(reader, header.len_bytes).await?;
        let text = format!("option data of {} bytes; the limit is {}", header.len_bytes, wire::OPTION_BYTES_MAX);
        return Ok((header.option, Err(Refusal::new(option_reply::ERR_TOO_BIG, text))));
    }
    let mut data = vec![0; header.len_bytes as usize];
    reader.read_exact(&mut data).await?;
    Ok((header.option, Ok(data)))
}

/// Reads `len` bytes and forgets them.
pub(crate) async fn skip(reader: &mut (impl AsyncRead + Unpin), len: u32) -> io::Result<()> {
    let skipped = tokio::io::copy(&mut reader.take(u64::from(len)), &mut tokio::io::sink()).await?;
    if skipped == u64::from(len) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// What comes next from the peer; `None` if it hung up or the agent stops.
async fn next<T, E: Into<ConnectionError>>(
    read: impl Future<Output = Result<T, E>>,
    stop: &mut watch::Receiver<bool>,
) -> Result<Option<T>, ConnectionError> {
    let read = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => return Ok(None),
        read = tokio::time::timeout(SILENCE_MAX, read) => read,
    };
    match read.map(|read| read.map_err(Into::into)) {
        Ok(Ok(value)) => Ok(Some(value)),
        Ok(Err(ConnectionError::Io(error))) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(ConnectionError::Protocol(format!("silent for {} s in the handshake", SILENCE_MAX.as_secs()))),
    }
}
