//! A disk behind an NBD server, read as the block layer of a guest does that waits for each of its reads: fixed newstyle,
//! simple replies, one request at a time. So the same storm runs against `volley-agent` and against other servers.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::nbd::listen::Address;
use crate::nbd::wire::{
    MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command, info,
    option, option_reply,
};

/// Stands for the volume's name in an address.
const NAME: &str = "%s";
const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const REPLY_BYTES: usize = 16;
/// Longest reply to an option that is looked at; a server that says more is none.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

/// Where the NBD servers of volumes are; an address of all, or one for each with `%s` for its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Servers(String);

impl FromStr for Servers {
    type Err = String;

    fn from_str(text: &str) -> Result<Servers, String> {
        text.replace(NAME, "name").parse::<Address>().map(|_| Servers(text.to_owned()))
    }
}

impl Servers {
    /// # Errors
    /// What is wrong with the address once the name stands in it.
    pub fn of(&self, volume: &str) -> Result<Address, String> {
        self.0.replace(NAME, volume).parse()
    }
}

trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Socket for S {}

/// An open export.
pub struct Disk {
    socket: Box<dyn Socket>,
    size_bytes: u64,
    deadline: Duration,
    cookie: u64,
    /// The last reply: its head and its data.
    reply: Vec<u8>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

impl Disk {
    /// Connects and opens the export of this name.
    ///
    /// # Errors
    /// A sentence: the server is away, speaks something else, or has no such export.
    pub async fn open(address: &Address, export: &str, deadline: Duration) -> Result<Disk, String> {
        let opening = async {
            let socket: Box<dyn Socket> = match address {
                Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
                Address::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Box::new(stream)
                }
            };
            let mut disk = Disk { socket, size_bytes: 0, deadline, cookie: 0, reply: Vec::new() };
            disk.negotiate(export).await?;
            Ok(disk)
        };
        let opened = timeout(deadline, opening).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        opened.map_err(|error: io::Error| format!("NBD export {export:?}: {error}"))
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// A sentence. After any but an error number of the server the connection is of no use any more.
    pub async fn read(&mut self, offset: u64, len: u64) -> Result<&[u8], String> {
        let len = u32::try_from(len).ok().filter(|len| *len <= PAYLOAD_BYTES_MAX).ok_or("a read larger than NBD's")?;
        let done = timeout(self.deadline, self.exchange(offset, len)).await;
        done.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| format!("NBD read of {len} bytes at {offset}: {error}"))?;
        Ok(&self.reply[REPLY_BYTES..])
    }

    /// One request and its reply, head and data with as few reads of the socket as they take.
    async fn exchange(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.cookie += 1;
        let mut request = [0; 28];
        request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[6..8].copy_from_slice(&command::READ.to_be_bytes());
        request[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..].copy_from_slice(&len.to_be_bytes());
        self.socket.write_all(&request).await?;
        self.reply.resize(REPLY_BYTES + len as usize, 0);
        let mut have = 0;
        while have < self.reply.len() {
            let before = have;
            have += match self.socket.read(&mut self.reply[have..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => n,
            };
            if before < REPLY_BYTES && have >= REPLY_BYTES {
                check_reply(&self.reply, self.cookie)?;
            }
        }
        Ok(())
    }

    async fn negotiate(&mut self, export: &str) -> io::Result<()> {
        let greeting: [u8; 18] = self.receive().await?;
        if greeting[..8] != MAGIC.to_be_bytes() || greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
            return Err(senseless("greeting of something else than a newstyle NBD server"));
        }
        let mut go = FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes().to_vec();
        go.extend(OPTION_MAGIC.to_be_bytes());
        go.extend(option::GO.to_be_bytes());
        let name_bytes = u32::try_from(export.len()).map_err(|_| senseless("name too long"))?;
        go.extend((4 + name_bytes + 2).to_be_bytes());
        go.extend(name_bytes.to_be_bytes());
        go.extend(export.as_bytes());
        go.extend(0_u16.to_be_bytes());
        self.socket.write_all(&go).await?;
        loop {
            let head: [u8; 20] = self.receive().await?;
            let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            if head[..8] != OPTION_REPLY_MAGIC.to_be_bytes() || word(16) > OPTION_REPLY_BYTES_MAX {
                return Err(senseless("reply to GO that is none"));
            }
            let mut data = vec![0; word(16) as usize];
            self.socket.read_exact(&mut data).await?;
            match (word(12), data.first_chunk::<10>()) {
                (option_reply::ACK, _) => return Ok(()),
                (option_reply::INFO, Some([a, b, size @ ..])) if u16::from_be_bytes([*a, *b]) == info::EXPORT => {
                    self.size_bytes = u64::from_be_bytes(*size);
                }
                (option_reply::INFO, _) => {}
                (error, _) => {
                    let why = String::from_utf8_lossy(&data);
                    return Err(io::Error::other(format!("refused with {error:#x}: {why}")));
                }
            }
        }
    }

    async fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).await?;
        Ok(bytes)
    }
}

fn check_reply(reply: &[u8], cookie: u64) -> io::Result<()> {
    if reply[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() || reply[8..REPLY_BYTES] != cookie.to_be_bytes() {
        return Err(senseless("reply to another request"));
    }
    match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX))),
    }
}

fn senseless(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::Servers;
    use crate::nbd::listen::Address;

    #[test]
    fn an_address_is_of_all_volumes_or_of_each() {
        let unix = |path: &str| Ok(Address::Unix(path.into()));
        let servers: Servers = "unix:/run/%s.sock".parse().unwrap();
        assert_eq!((servers.of("a"), servers.of("b")), (unix("/run/a.sock"), unix("/run/b.sock")));
        let servers: Servers = "unix:/run/agent.sock".parse().unwrap();
        assert_eq!(servers.of("a"), unix("/run/agent.sock"));
        assert!("somewhere".parse::<Servers>().unwrap_err().contains("address"));
    }
}
