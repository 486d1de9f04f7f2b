"""Many requests in flight on several libnbd connections to one export, each judged by a model in memory.

Run by stress.rs through nbdsh, which provides the module `nbd`. The environment: VOLLEY_URI, VOLLEY_IMAGE (what the export
holds before), VOLLEY_EXPECTED (where the model is written at the end), VOLLEY_SEED, VOLLEY_REQUESTS. The last line printed
is JSON: how many requests of each kind were judged.

What makes the judgement exact: a request holds its byte range while it is in flight, shared if it only reads. A write that
conflicts with what is in flight is not sent, so that at its answer the model is what every connection must see. Only
`duel` sends two writes of one range at once; of them one must win whole.
"""

import errno, functools, json, os, random, select, traceback

SECTOR, CHUNK, MIB = 4096, 512 << 10, 1 << 20
LENGTH_MAX = 2 * MIB
DEPTH_PER_CONNECTION = 32
BASE, RESIDENT = "base:allocation", "volley:resident"

uri, size = os.environ["VOLLEY_URI"], os.path.getsize(os.environ["VOLLEY_IMAGE"])
rng = random.Random(int(os.environ["VOLLEY_SEED"]))
model = bytearray(open(os.environ["VOLLEY_IMAGE"], "rb").read())
noise = rng.randbytes(2 * LENGTH_MAX)
held, counts, in_flight = [], {}, 0


def callback(function):
    """libnbd would take what a callback raises for an error of the request; here it is the verdict."""

    @functools.wraps(function)
    def judged(*arguments):
        try:
            return function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    return judged


def connect(structured=True):
    h = nbd.NBD()
    # Requests that the server must refuse are sent, and those of single bytes.
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context(BASE)
        h.add_meta_context(RESIDENT)
    h.connect_uri(uri)
    assert h.get_size() == size, h.get_size()
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_meta_context(RESIDENT) == structured
    assert h.can_df() == structured
    return h


# The last one speaks as old clients do: simple replies.
connections = [connect(), connect(), connect(), connect(structured=False)]


def count(kind):
    counts[kind] = counts.get(kind, 0) + 1


def conflicts(start, end, shared):
    return any(s < end and start < e and not (shared and other) for s, e, other in held)


def place(whole_blocks=None):
    """A range: anywhere, at a chunk's edge or at the end; of blocks, or of bytes where the client may."""
    blocks = rng.random() < 0.7 if whole_blocks is None else whole_blocks
    step = 512 if blocks else 1
    length = rng.choice([1, 8, 8, 16, 64, 128, LENGTH_MAX // 512 - 3]) * 512 if blocks else rng.randint(1, 9000)
    where = rng.random()
    if where < 0.4:
        start = rng.randrange(0, size - length + 1, step)
    elif where < 0.9:
        start = rng.randrange(CHUNK, size - CHUNK, CHUNK) - rng.randrange(0, length + 1, step)
    else:
        start = size - length
    return max(0, min(start, size - length)) // step * step, length


def some_bytes(length):
    at = rng.randrange(LENGTH_MAX)
    return noise[at : at + length]


def send(kind, held_range, call, judge, expected_error=0):
    """Sends a request; `judge` runs at its answer, before its range is given back."""
    global in_flight
    if held_range:
        held.append(held_range)
    in_flight += 1

    @callback
    def answered(error):
        global in_flight
        in_flight -= 1
        got = error.value
        assert got == expected_error, f"{kind} {held_range}: {errno.errorcode.get(got, got)}, not {expected_error}"
        if judge:
            judge()
        if held_range:
            held.remove(held_range)
        count(kind)
        return 1

    call(answered)


def same(what, start, data):
    end = start + len(data)
    if data != model[start:end]:
        first = next(i for i in range(len(data)) if data[i] != model[start + i])
        raise SystemExit(f"{what} of {start}+{len(data)}: byte {start + first} is {data[first]}, not {model[start + first]}")


def read(h):
    start, length = place()
    if conflicts(start, start + length, True):
        return
    buffer = nbd.Buffer(length)
    judge = lambda: same("read", start, buffer.to_bytearray())
    send("read", (start, start + length, True), lambda done: h.aio_pread(buffer, start, done), judge)


def read_structured(h):
    start, length = place()
    if conflicts(start, start + length, True) or not h.can_df():
        return
    buffer, seen = nbd.Buffer(length), []
    flags = rng.choice([0, nbd.CMD_FLAG_DF])

    @callback
    def chunk(data, offset, status, error):
        assert status in (nbd.READ_DATA, nbd.READ_HOLE) and error.value == 0, (status, error.value)
        same("chunk", offset, bytearray(data) if status == nbd.READ_DATA else bytearray(len(data)))
        seen.append((offset, len(data)))

    def judge():
        assert sum(n for _, n in seen) == length, seen
        assert len(seen) == 1 or not flags, seen
        same("structured read", start, buffer.to_bytearray())

    call = lambda done: h.aio_pread_structured(buffer, start, chunk, done, flags)
    send("read_structured", (start, start + length, True), call, judge)


def write(h):
    start, length = place()
    if conflicts(start, start + length, False):
        return
    data, flags = some_bytes(length), nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0

    def judge():
        model[start : start + length] = data

    call = lambda done: h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), start, done, flags)
    send("write_fua" if flags else "write", (start, start + length, False), call, judge)


def duel(h):
    """Two connections write one range at once: afterwards it holds the one or the other, never a mixture."""
    start, length = place()
    if conflicts(start, start + length, False):
        return
    rival, left = rng.choice(connections), [2]
    pieces = [some_bytes(length), some_bytes(length)]
    buffer = nbd.Buffer(length)
    span = (start, start + length, False)

    def winner():
        data = buffer.to_bytearray()
        assert data in pieces, f"two writes of {start}+{length} at once are mixed"
        model[start : start + length] = data
        held.remove(span)

    def one_done():
        left[0] -= 1
        if left[0] == 0:
            later.append(lambda: send("duel", None, lambda done: h.aio_pread(buffer, start, done), winner))

    held.append(span)
    for who, piece in zip((h, rival), pieces):
        data = nbd.Buffer.from_bytearray(bytearray(piece))
        send("write", None, lambda done: who.aio_pwrite(data, start, done), one_done)


def neighbours(h):
    """Pieces of a few blocks, written or zeroed at once by all connections: nobody loses a byte to who writes beside it."""
    start = rng.randrange(0, size - 4096, 512)
    span = (start, start + rng.choice([512, 1024, 4096]), False)
    if conflicts(*span):
        return
    cuts = [span[0], *sorted(rng.sample(range(span[0] + 1, span[1]), 7)), span[1]]
    left, buffer = [len(cuts) - 1], nbd.Buffer(span[1] - span[0])

    def judge():
        same("neighbours", start, buffer.to_bytearray())
        held.remove(span)

    def one_done():
        left[0] -= 1
        if left[0] == 0:
            later.append(lambda: send("neighbours", None, lambda done: h.aio_pread(buffer, start, done), judge))

    held.append(span)
    for at, end in zip(cuts, cuts[1:]):
        who, data = rng.choice(connections), some_bytes(end - at) if rng.random() < 0.7 else bytes(end - at)
        model[at:end] = data
        if any(data):
            piece = nbd.Buffer.from_bytearray(bytearray(data))
            send("write", None, lambda done: who.aio_pwrite(piece, at, done), one_done)
        else:
            send("zero", None, lambda done: who.aio_zero(end - at, at, done), one_done)


def zero(h):
    start, length = place()
    if conflicts(start, start + length, False):
        return
    flags = rng.choice([0, 0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA])

    def judge():
        model[start : start + length] = bytes(length)

    send("zero", (start, start + length, False), lambda done: h.aio_zero(length, start, done, flags), judge)


def trim(h):
    """Whole sectors of 4 KiB read as zeroes; what is covered in part stays."""
    start, length = place()
    end = start + length
    if conflicts(start, end, False):
        return
    first, last = -(-start // SECTOR) * SECTOR, end if end == size else end // SECTOR * SECTOR

    def judge():
        if first < last:
            model[first:last] = bytes(last - first)

    flags = rng.choice([0, 0, nbd.CMD_FLAG_FUA])
    send("trim", (start, end, False), lambda done: h.aio_trim(length, start, done, flags), judge)


def flush(h):
    send("flush", None, lambda done: h.aio_flush(done), None)


def status(h, span=None, must_be_resident=False):
    """Holes must read as zeroes; what was brought must be resident; extents cover the range from its start."""
    start, length = span or place()
    if not h.can_meta_context(BASE) or (span is None and conflicts(start, start + length, True)):
        return
    one, found = rng.random() < 0.2, {}

    @callback
    def extents(context, offset, entries, error):
        assert error.value == 0 and offset == start and context not in found, (context, offset, error.value)
        found[context] = entries

    def judge():
        assert set(found) == {BASE, RESIDENT}, found
        for context, entries in found.items():
            at = start
            assert not one or len(entries) == 2, entries
            for run, flags in zip(entries[::2], entries[1::2]):
                assert run > 0 and at + run <= start + length, (entries, start, length)
                if context == BASE:
                    assert flags in (0, nbd.STATE_HOLE | nbd.STATE_ZERO), flags
                    assert not flags or not any(model[at : at + run]), f"a hole at {at}+{run} has data"
                else:
                    assert flags in (0, 1), flags
                    assert flags or not must_be_resident, f"{at}+{run} was brought and is not resident"
                at += run
            assert one or at == start + length, (entries, start, length)

    flags = nbd.CMD_FLAG_REQ_ONE if one else 0
    send("status", (start, start + length, True), lambda done: h.aio_block_status(length, start, extents, done, flags), judge)


def cache(h):
    start, length = place()
    if conflicts(start, start + length, True):
        return
    span = (start, length)
    then = lambda: later.append(lambda: status(connections[0], span, must_be_resident=True))
    send("cache", (start, start + length, True), lambda done: h.aio_cache(length, start, done), then)


def refused(h):
    """Past the end, impossible or malformed: an error of its own, and the connection goes on."""
    beyond = size - rng.choice([0, 1, 511, 512])
    data = nbd.Buffer.from_bytearray(bytearray(1024))
    cases = [
        (errno.EINVAL, lambda done: h.aio_pread(nbd.Buffer(1024), beyond, done)),
        (errno.ENOSPC, lambda done: h.aio_pwrite(data, beyond, done)),
        (errno.ENOSPC, lambda done: h.aio_zero(1024, beyond, done)),
        (errno.EINVAL, lambda done: h.aio_trim(1024, beyond, done)),
        (errno.EINVAL, lambda done: h.aio_cache(1024, beyond, done)),
        (errno.EINVAL, lambda done: h.aio_pread(nbd.Buffer(512), (1 << 63) - 512, done)),
        (errno.EINVAL, lambda done: h.aio_trim(512, 0, done, 1 << 12)),
        (errno.ENOTSUP, lambda done: h.aio_zero(512, 0, done, nbd.CMD_FLAG_FAST_ZERO)),
    ]
    wanted, call = rng.choice(cases)
    send("refused", None, call, None, expected_error=wanted)


def nothing(h):
    at = rng.randrange(0, size)
    call = rng.choice([h.aio_trim, h.aio_zero, h.aio_cache])
    send("nothing", None, lambda done: call(0, at, done), None)


def vanish(h):
    """A client that asks much and is gone before the answers."""
    guest = connect()
    for _ in range(20):
        start, length = place(whole_blocks=True)
        guest.aio_pread(nbd.Buffer(length), start)
    del guest
    count("vanish")


KINDS = [(read, 30), (write, 24), (read_structured, 10), (status, 8), (zero, 7), (trim, 6), (duel, 4), (neighbours, 4), (cache, 4)]
KINDS += [(flush, 3), (refused, 4), (nothing, 1), (vanish, 0.2)]
actions, weights = zip(*KINDS)
later = []
poll = select.poll()
by_fd = {h.aio_get_fd(): h for h in connections}


def turn():
    """Waits for answers and judges them, then sends what follows from them: before anything else can come between."""
    for fd, h in by_fd.items():
        direction = h.aio_get_direction()
        wanted = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        poll.register(fd, wanted | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0))
    ready = poll.poll(60_000)
    assert ready, f"nothing was answered for a minute, with {in_flight} requests in flight"
    for fd, events in ready:
        h = by_fd[fd]
        direction = h.aio_get_direction()
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
            h.aio_notify_read()
        elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
            h.aio_notify_write()
        assert not h.aio_is_dead() and not h.aio_is_closed(), "a connection ended"
    while later:
        later.pop()()


def drain():
    while in_flight:
        turn()


deepest = 0
while sum(counts.values()) < int(os.environ["VOLLEY_REQUESTS"]):
    for h in connections:
        for _ in range(2 * DEPTH_PER_CONNECTION):
            if h.aio_in_flight() >= DEPTH_PER_CONNECTION:
                break
            rng.choices(actions, weights)[0](h)
    deepest = max(deepest, in_flight)
    turn()
drain()
assert not held, held

# The largest request there may be, and one byte more.
largest = 32 * MIB
connections[0].pwrite(bytes(model[:largest]), 0, nbd.CMD_FLAG_FUA)
same("largest read", 0, connections[1].pread(largest, 0))
try:
    connections[0].pread(largest + 512, 0)
    raise SystemExit("a read of more than 32 MiB was not refused")
except nbd.Error as error:
    assert error.errno == "EINVAL", error
# One flush covers what all connections wrote.
connections[3].flush()
for at in range(0, size, MIB):
    same("last read", at, rng.choice(connections).pread(min(MIB, size - at), at))
for h in connections:
    h.shutdown()
open(os.environ["VOLLEY_EXPECTED"], "wb").write(model)
print(json.dumps({**counts, "deepest": deepest}))
