//! The agent's NBD server: the handshake and the requests of a client that may send anything. The bytes that come back are
//! read as a client would read them, against what it sent.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use volley_tools::nbd::exports::Exports;
use volley_tools::nbd::memory::MemoryBackend;
use volley_tools::nbd::negotiation::{self, ClientOption};
use volley_tools::nbd::wire::{self, chunk, command, command_flag as flag, option, option_reply};
use volley_tools::nbd::{request, server};

use super::measure::within;

const DISK_BYTES: usize = 64 << 10;
/// Buffers of the connection, the disk and its copy.
const MEMORY_BASE: usize = 2 << 20;
/// A request of 28 bytes may ask for the whole disk, and all of them may be in flight.
const MEMORY_PER_BYTE: usize = 64 + 2 * DISK_BYTES / wire::REQUEST_HEADER_BYTES;

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

/// All that a client sends.
pub fn run(input: &[u8]) {
    within(MEMORY_BASE + MEMORY_PER_BYTE * input.len(), || {
        let backend = MemoryBackend::new([("disk", noise()), ("a-second-export", vec![0; 512])]);
        let output = RUNTIME.with_borrow(|runtime| runtime.block_on(served(input, &backend)));
        let mut client = Client { sent: input, got: &output, structured: false };
        let requests = client.handshake();
        client.replies(&requests);
        let disk = backend.disk("disk");
        assert_eq!(disk.attached_total, disk.detached_total, "an attachment is not given back");
        assert_eq!(disk.data.len(), DISK_BYTES);
        let changed = |at: usize| requests.iter().any(|request| request.may_change(at));
        let lost = (0..DISK_BYTES).find(|at| disk.data[*at] != noise_at(*at) && !changed(*at));
        assert_eq!(lost, None, "a byte changed that no request names");
    });
}

fn noise_at(at: usize) -> u8 {
    (at * 31 + at / 256) as u8
}

fn noise() -> Vec<u8> {
    (0..DISK_BYTES).map(noise_at).collect()
}

/// Everything the server answers until it has closed the connection.
async fn served(input: &[u8], backend: &MemoryBackend) -> Vec<u8> {
    let exports = Arc::new(Exports::new(backend.clone()));
    let (_stop, stopped) = watch::channel(false);
    let (mut ours, theirs) = tokio::io::duplex(usize::MAX >> 1);
    server::serve_one(input, theirs, "fuzz".to_owned(), exports, stopped).await;
    let mut output = Vec::new();
    ours.read_to_end(&mut output).await.expect("memory");
    output
}

/// A whole request, and what it got.
#[derive(Clone, Copy)]
struct Sent {
    header: request::RequestHeader,
    whole: bool,
}

impl Sent {
    /// Whether the byte at `at` may be another afterwards.
    fn may_change(&self, at: usize) -> bool {
        let (start, end) = (self.header.offset, self.header.offset.saturating_add(self.header.len.into()));
        let changes = [command::WRITE, command::WRITE_ZEROES, command::TRIM].contains(&self.header.command);
        changes && self.whole && end <= DISK_BYTES as u64 && (start..end).contains(&(at as u64))
    }
}

/// The client's side: what is left of what was sent and of what came back.
struct Client<'a> {
    sent: &'a [u8],
    got: &'a [u8],
    structured: bool,
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(len)?;
    *bytes = tail;
    Some(head)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Client<'_> {
    /// The next `len` bytes of the server, which must be there.
    fn expect(&mut self, len: usize) -> &[u8] {
        take(&mut self.got, len).expect("the server stopped in the middle of an answer")
    }

    /// Reads the answers to all options; returns the requests behind them if an export was opened.
    fn handshake(&mut self) -> Vec<Sent> {
        assert_eq!(self.expect(18), negotiation::greeting());
        let Some(flags) = take(&mut self.sent, 4).map(|flags| u32_at(flags, 0)).filter(|flags| flags & !3 == 0) else {
            return Vec::new();
        };
        while let Some(head) = take(&mut self.sent, wire::OPTION_HEADER_BYTES) {
            let parsed = negotiation::parse_option_header(head.try_into().expect("16 bytes"));
            assert_eq!(parsed.is_ok(), head.starts_with(b"IHAVEOPT"));
            let Ok(header) = parsed else { return Vec::new() };
            let Some(data) = take(&mut self.sent, header.len_bytes as usize) else { return Vec::new() };
            if header.len_bytes <= wire::OPTION_BYTES_MAX {
                option_has_one_spelling(header.option, data);
            }
            if header.option == option::EXPORT_NAME {
                if self.got.is_empty() {
                    return Vec::new();
                }
                let size = u64_at(self.expect(10), 0);
                if flags & 2 == 0 {
                    assert_eq!(self.expect(124), [0; 124]);
                }
                return self.requests(size);
            }
            let size = self.option_replies(header.option, header.len_bytes);
            match (header.option, size) {
                (option::GO, Some(size)) => return self.requests(size),
                (option::ABORT, _) => return Vec::new(),
                _ => {}
            }
        }
        Vec::new()
    }

    /// The answers to one option, to the one that ends them. Returns the size of the device if they tell it.
    fn option_replies(&mut self, number: u32, len: u32) -> Option<u64> {
        let mut size = None;
        loop {
            let head = self.expect(20);
            assert_eq!((u64_at(head, 0), u32_at(head, 8)), (wire::OPTION_REPLY_MAGIC, number));
            let (reply, reply_len) = (u32_at(head, 12), u32_at(head, 16) as usize);
            let data = self.expect(reply_len);
            if reply & 1 << 31 != 0 {
                let text = std::str::from_utf8(data).expect("a refusal is text");
                super::assert_one_line(text, wire::STRING_BYTES_MAX);
                assert!(len <= wire::OPTION_BYTES_MAX || reply == option_reply::ERR_TOO_BIG);
                return None;
            }
            match reply {
                option_reply::ACK => {
                    assert!(data.is_empty() && len <= wire::OPTION_BYTES_MAX);
                    self.structured |= number == option::STRUCTURED_REPLY;
                    return size;
                }
                option_reply::INFO if data.starts_with(&[0, 0]) => size = Some(u64_at(data, 2)),
                option_reply::INFO | option_reply::SERVER | option_reply::META_CONTEXT => {
                    assert!(data.len() <= wire::STRING_BYTES_MAX + 4);
                }
                other => panic!("a reply of type {other}"),
            }
        }
    }

    /// The requests that the server must have read, up to where it must have hung up.
    fn requests(&mut self, size_bytes: u64) -> Vec<Sent> {
        let mut requests = Vec::new();
        while let Some(head) = take(&mut self.sent, wire::REQUEST_HEADER_BYTES) {
            let parsed = request::parse_request(head.try_into().expect("28 bytes"));
            assert_eq!(parsed.is_ok(), u32_at(head, 0) == wire::REQUEST_MAGIC);
            let Ok(header) = parsed else { break };
            let terms = request::Terms { size_bytes, structured: self.structured, contexts: true };
            let inside = header.offset.checked_add(header.len.into()).is_some_and(|end| end <= size_bytes);
            let checked = request::check(&header, &terms);
            let ranged = ![command::DISC, command::FLUSH].contains(&header.command);
            assert!(checked.is_err() || inside || !ranged, "{header:?}");
            if checked == Ok(request::Action::Disconnect) {
                break;
            }
            let payload = if header.command == command::WRITE { header.len as usize } else { 0 };
            let whole = take(&mut self.sent, payload).is_some();
            if !whole {
                break;
            }
            requests.push(Sent { header, whole: size_bytes == DISK_BYTES as u64 });
        }
        requests
    }

    /// Every request is answered once, and nothing else is.
    fn replies(&mut self, requests: &[Sent]) {
        let mut open: BTreeMap<u64, Vec<&Sent>> = BTreeMap::new();
        for sent in requests {
            open.entry(sent.header.cookie).or_default().push(sent);
        }
        if !self.structured && open.values().any(|same| same.len() > 1) {
            // Which of two requests with one cookie is answered can't be told, and so not how long the answer is.
            return;
        }
        while !self.got.is_empty() {
            let (cookie, done) = if self.structured { self.structured_chunk() } else { self.simple_reply(&open) };
            let same = open.get_mut(&cookie).expect("an answer that nobody waits for");
            if done {
                same.pop();
            }
            if same.is_empty() {
                open.remove(&cookie);
            }
        }
        assert!(open.is_empty(), "{} cookies are without an answer", open.len());
    }

    fn simple_reply(&mut self, open: &BTreeMap<u64, Vec<&Sent>>) -> (u64, bool) {
        let head = self.expect(16);
        assert_eq!(u32_at(head, 0), wire::SIMPLE_REPLY_MAGIC);
        let (errno, cookie) = (u32_at(head, 4), u64_at(head, 8));
        let sent = open.get(&cookie).and_then(|same| same.last()).expect("an answer that nobody waits for");
        if errno == 0 && sent.header.command == command::READ {
            self.expect(sent.header.len as usize);
        }
        (cookie, true)
    }

    fn structured_chunk(&mut self) -> (u64, bool) {
        let head = self.expect(20);
        assert_eq!(u32_at(head, 0), wire::STRUCTURED_REPLY_MAGIC);
        let (flags, kind) = ((u32_at(head, 4) >> 16) as u16, u32_at(head, 4) as u16);
        let (cookie, len) = (u64_at(head, 8), u32_at(head, 16) as usize);
        let content = self.expect(len);
        match kind {
            chunk::NONE => assert!(content.is_empty()),
            chunk::OFFSET_DATA => {
                let end = u64_at(content, 0) + content.len() as u64 - 8;
                assert!(content.len() > 8 && end <= DISK_BYTES as u64);
            }
            chunk::BLOCK_STATUS => {
                assert!(content.len() >= 12 && content.len() % 8 == 4);
                let lengths = content[4..].chunks_exact(8).map(|descriptor| u32_at(descriptor, 0));
                assert!(lengths.clone().all(|len| len > 0) && lengths.sum::<u32>() <= DISK_BYTES as u32);
            }
            chunk::ERROR => {
                let text = std::str::from_utf8(&content[6..]).expect("an error is text");
                assert!(u32_at(content, 0) != 0 && text.len() == (u32_at(content, 2) & 0xffff) as usize);
                super::assert_one_line(text, wire::STRING_BYTES_MAX);
            }
            other => panic!("a chunk of type {other}"),
        }
        (cookie, flags & chunk::FLAG_DONE != 0)
    }
}

/// What was understood of an option is all that was in it.
fn option_has_one_spelling(number: u32, data: &[u8]) {
    let string = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
    let written = match negotiation::parse_option(number, data) {
        Ok(ClientOption::ExportName(name)) => name.into_bytes(),
        Ok(ClientOption::Info(info) | ClientOption::Go(info)) => {
            let items = info.items.iter().flat_map(|item| item.to_be_bytes());
            string(&info.export).into_iter().chain((info.items.len() as u16).to_be_bytes()).chain(items).collect()
        }
        Ok(ClientOption::ListMetaContext(query) | ClientOption::SetMetaContext(query)) => {
            let queries = query.queries.iter().flat_map(|query| string(query));
            string(&query.export).into_iter().chain((query.queries.len() as u32).to_be_bytes()).chain(queries).collect()
        }
        Ok(ClientOption::List | ClientOption::StructuredReply) => Vec::new(),
        Ok(ClientOption::Abort) => return,
        Err(refusal) => {
            assert!(refusal.reply & 1 << 31 != 0);
            return super::assert_one_line(&refusal.message, wire::STRING_BYTES_MAX);
        }
    };
    assert_eq!(written, data, "option {number}");
}

/// Every option, refused ones too, and every command, with simple and with structured replies.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let string = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
    let option = |number: u32, data: &[u8]| {
        let head = [wire::OPTION_MAGIC.to_be_bytes().as_slice(), &number.to_be_bytes()].concat();
        [head, (data.len() as u32).to_be_bytes().to_vec(), data.to_vec()].concat()
    };
    let go = |name: &str| [string(name), vec![0, 2, 0, 1, 0, 2]].concat();
    let query = |count: u8, queries: &[&str]| {
        [string("disk"), vec![0, 0, 0, count], queries.iter().flat_map(|query| string(query)).collect()].concat()
    };
    let contexts = query(2, &["base:allocation", "volley:resident"]);
    let structured = option(option::STRUCTURED_REPLY, b"");
    let open = [option(option::EXPORT_NAME, b"disk")].concat();
    let begin = |flags: u8, rest: &[Vec<u8>]| [&[0, 0, 0, flags][..], &rest.concat()].concat();
    let all_options = [
        option(option::LIST, b""),
        option(option::LIST, b"x"),
        option(option::STARTTLS, b""),
        option(option::INFO, &go("disk")),
        option(option::INFO, &go("nobody")),
        option(option::LIST_META_CONTEXT, &query(0, &[])),
        option(option::LIST_META_CONTEXT, &query(1, &["base:"])),
        option(option::SET_META_CONTEXT, &contexts),
        structured.clone(),
        option(option::SET_META_CONTEXT, &contexts),
        option(99, b"data"),
        option(option::ABORT, b""),
    ];
    let write = [request_bytes(command::WRITE, flag::FUA, 2, 100, 700), vec![7; 700]].concat();
    let requests = [
        request_bytes(command::READ, 0, 1, 0, 1024),
        write,
        request_bytes(command::FLUSH, 0, 3, 0, 0),
        request_bytes(command::TRIM, 0, 4, 4096, 8192),
        request_bytes(command::CACHE, 0, 5, 0, 512),
        request_bytes(command::WRITE_ZEROES, flag::NO_HOLE, 6, 511, 2000),
        request_bytes(command::WRITE_ZEROES, 0, 7, 1, 3),
        request_bytes(command::BLOCK_STATUS, flag::REQ_ONE, 8, 0, 4096),
        request_bytes(command::BLOCK_STATUS, 0, 9, 512, 65024),
        request_bytes(command::READ, flag::DF, 10, 65535, 1),
        request_bytes(command::READ, 0, 11, u64::MAX, 2),
        request_bytes(command::WRITE_ZEROES, flag::FAST_ZERO, 12, 0, 512),
        request_bytes(77, 0, 13, 0, 0),
        request_bytes(command::DISC, 0, 14, 0, 0),
    ];
    let transmission = requests.concat();
    let chosen = [structured, option(option::SET_META_CONTEXT, &contexts), option(option::GO, &go("disk"))].concat();
    let long_name = option(option::INFO, &go(&"\u{1}é".repeat(1300)));
    let mut seeds = vec![
        ("options".to_owned(), begin(3, &all_options)),
        ("export-name".to_owned(), begin(1, std::slice::from_ref(&open))),
        ("simple".to_owned(), begin(3, &[open, transmission.clone()])),
        ("structured".to_owned(), begin(3, &[chosen, transmission])),
        ("unknown-flags".to_owned(), begin(4, &[])),
        ("long-name".to_owned(), begin(3, &[long_name])),
    ];
    for (number, bytes) in requests.iter().enumerate() {
        let go = option(option::GO, &go("disk"));
        seeds.push((format!("request-{number}"), begin(3, &[go, bytes.clone()])));
    }
    seeds
}

fn request_bytes(number: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let head = [wire::REQUEST_MAGIC.to_be_bytes().as_slice(), &flags.to_be_bytes(), &number.to_be_bytes()].concat();
    [head, cookie.to_be_bytes().to_vec(), offset.to_be_bytes().to_vec(), len.to_be_bytes().to_vec()].concat()
}
