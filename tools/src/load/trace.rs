//! Traces of what a guest asked of its disk: CSV with the head `us,op,offset,length`.

use std::ops::Range;
use std::path::Path;

/// Largest trace file: a million requests, a boot has a few thousand.
const TRACE_BYTES_MAX: u64 = 64 << 20;
/// Largest single request: what an NBD client may send.
const REQUEST_BYTES_MAX: u64 = 32 << 20;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Flush,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Microseconds since the first request.
    pub at_us: u64,
    pub op: Op,
    /// Multiple of 512.
    pub offset: u64,
    /// Multiple of 512; 0 only for `Flush`.
    pub len: u64,
}

impl Event {
    /// Numbers of the chunks of this size that it touches; none for `Flush`.
    #[must_use]
    pub fn chunks(&self, chunk_bytes: u64) -> Range<u64> {
        self.offset / chunk_bytes..(self.offset + self.len).div_ceil(chunk_bytes)
    }

    /// Whether both touch a common byte and one of them writes it.
    #[must_use]
    pub fn conflicts(&self, other: &Event) -> bool {
        let writes = self.op == Op::Write || other.op == Op::Write;
        writes && self.offset < other.offset + other.len && other.offset < self.offset + self.len
    }
}

/// Reads and checks a trace for a device of `size_bytes`.
///
/// # Errors
/// One line that names the file and the line in it.
pub fn load(path: &Path, size_bytes: u64) -> Result<Vec<Event>, String> {
    let shown = path.display();
    let failed = |error: std::io::Error| format!("can't read the trace {shown}: {error}");
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > TRACE_BYTES_MAX {
        return Err(format!("the trace {shown} has {len} bytes; the limit is {TRACE_BYTES_MAX}"));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    parse(&text, size_bytes).map_err(|error| format!("{shown}: {error}"))
}

/// Understands the text of a trace.
///
/// # Errors
/// A sentence that names the line.
pub fn parse(text: &str, size_bytes: u64) -> Result<Vec<Event>, String> {
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    if head.trim() != "us,op,offset,length" {
        return Err(format!("line 1 is {head:?}; a trace starts with us,op,offset,length"));
    }
    let numbered = lines.enumerate().filter(|(_, line)| !line.trim().is_empty());
    let events = numbered
        .map(|(index, line)| parse_event(line, size_bytes).map_err(|error| format!("line {}: {error}", index + 2)))
        .collect::<Result<Vec<_>, _>>()?;
    if events.is_empty() { Err("the trace has no requests".to_owned()) } else { Ok(events) }
}

fn parse_event(line: &str, size_bytes: u64) -> Result<Event, String> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [us, op, offset, len] = fields[..] else {
        return Err(format!("{} fields instead of 4", fields.len()));
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is not a number"));
    let op = match op {
        "R" => Op::Read,
        "W" => Op::Write,
        "F" => Op::Flush,
        other => return Err(format!("{other:?} is not an operation: R, W or F")),
    };
    let event = Event { at_us: number(us)?, op, offset: number(offset)?, len: number(len)? };
    check_range(&event, size_bytes)?;
    Ok(event)
}

fn check_range(event: &Event, size_bytes: u64) -> Result<(), String> {
    let Event { op, offset, len, .. } = *event;
    if op == Op::Flush {
        return Ok(());
    }
    if len == 0 || len > REQUEST_BYTES_MAX || !len.is_multiple_of(512) || !offset.is_multiple_of(512) {
        let limit = REQUEST_BYTES_MAX;
        return Err(format!("{len} bytes at {offset}: both must be multiples of 512, the length 512 to {limit}"));
    }
    if offset.checked_add(len).is_none_or(|end| end > size_bytes) {
        return Err(format!("{len} bytes at {offset} do not lie inside the volume of {size_bytes} bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Event, Op, parse};

    #[test]
    fn a_trace_is_understood() {
        let events = parse("us,op,offset,length\n0,R,512,1024\n\n7,W,0,512\n9,F,0,0\n", 4096).unwrap();
        let event = |at_us, op, offset, len| Event { at_us, op, offset, len };
        let (read, write, flush) =
            (event(0, Op::Read, 512, 1024), event(7, Op::Write, 0, 512), event(9, Op::Flush, 0, 0));
        assert_eq!(events, [read, write, flush]);
        assert!(!read.conflicts(&write) && !read.conflicts(&read));
        assert!(write.conflicts(&event(0, Op::Read, 0, 4096)));
    }

    #[test]
    fn a_bad_trace_names_its_line() {
        for (text, want) in [
            ("", "line 1"),
            ("a,b\n", "line 1"),
            ("us,op,offset,length\n", "no requests"),
            ("us,op,offset,length\n1,R,0,512\n1,X,0,512", "line 3: \"X\""),
            ("us,op,offset,length\n1,R,0", "line 2: 3 fields"),
            ("us,op,offset,length\nx,R,0,512", "line 2: \"x\" is not a number"),
            ("us,op,offset,length\n1,R,0,100", "multiples of 512"),
            ("us,op,offset,length\n1,R,0,0", "multiples of 512"),
            ("us,op,offset,length\n1,W,4096,512", "do not lie inside"),
            ("us,op,offset,length\n1,W,18446744073709551104,1024", "do not lie inside"),
        ] {
            let error = parse(text, 4096).unwrap_err();
            assert!(error.contains(want), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_recorded_boot_is_a_good_trace() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/boot-trace-debian12.csv");
        assert_eq!(super::load(&path, 2 << 30).unwrap().len(), 3252);
    }

    proptest! {
        #[test]
        fn any_text_is_a_trace_or_refused(text in "us,op,offset,length\n([0-9RWFx,-]{0,20}\n){0,5}") {
            let _ = parse(&text, 1 << 20);
        }
    }
}
