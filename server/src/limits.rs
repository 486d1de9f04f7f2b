//! The bounds of the data port and of a node's start and stop, each with its reason. Bounds of the protocol itself are
//! in `volley_protocol::limits`.

use std::time::Duration;

/// Connections of one shard. A host holds a few connections, so this is ten thousand hosts for each core; past it a
/// new connection is closed at once, counted, and the host tries again with back-off.
pub const CONNECTIONS_MAX: usize = 10_240;

/// A peer that has not said HELLO by then is a stranger or half open.
pub const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Bytes that one connection may make the shard hold: payloads in flight, replies expected, replies not sent yet. 16 of
/// the largest requests keep a disk busy; whoever asks for more, or does not read, waits in its own socket.
pub const CONNECTION_BYTES_MAX: usize = 16 << 20;

/// Bytes that all connections of one shard may make it hold together. Past it, only a connection that holds nearly
/// nothing gets room for another request, and past twice this none, until others have left. With the copies of the
/// frames that had their buffers by then it is at most four times this.
pub const CONNECTIONS_BYTES_MAX: usize = 256 << 20;

/// A connection that holds less is a light one: what heavy ones hold is not to keep it waiting.
pub const LIGHT_CONNECTION_BYTES_MAX: usize = 64 << 10;

/// A peer that owes the rest of a frame, or does not take [`WRITE_PIECE_BYTES`] of its replies, for this long is closed.
pub const STALL_MAX: Duration = Duration::from_secs(30);

/// The same for peers that hold memory while the shard has none left for others.
pub const STALL_PRESSED_MAX: Duration = Duration::from_secs(1);

/// Replies are written in pieces of at most this: each that is taken counts as progress of the peer.
pub const WRITE_PIECE_BYTES: usize = 256 << 10;

/// A receive buffer's first size: dozens of the hot requests (65 bytes), and thousands of idle connections stay cheap.
pub const RECEIVE_BUFFER_FIRST_BYTES: usize = 4 << 10;

/// A receive buffer grows to this when reads fill it: hundreds of the hot requests at once. What it grows beyond, for a
/// larger frame, counts as held.
pub const RECEIVE_BUFFER_BYTES: usize = 64 << 10;

/// An output buffer that grew beyond this is given back after its write.
pub const OUTPUT_BUFFER_KEPT_BYTES: usize = 256 << 10;

/// How long a stopping shard waits for its last replies to leave.
pub const FLUSH_REPLIES_MAX: Duration = Duration::from_secs(1);

/// How long a start waits for an address in use: the kernel lets go of the sockets of a server that was killed a moment
/// after its end, because it ends io_uring's requests on them in the background. On a busy machine that took over 2 s.
pub const BIND_WAIT_MAX: Duration = Duration::from_secs(10);

/// After an accept that failed (no descriptors left, mostly) the listener waits before it tries again.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Commands of the control thread waiting for one shard.
pub const COMMANDS_DEPTH: usize = 1024;

const _: () = assert!(CONNECTION_BYTES_MAX >= volley_protocol::limits::FRAME_BYTES_MAX);
