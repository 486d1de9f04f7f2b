//! Functions that the compiler put into others get frames of their own: without them a request is three frames deep, and
//! most of a stage hides in its caller. `perf` can do it as well, by starting a program for each address: for hours.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::path::Path;

use addr2line::Loader;

use crate::process::Result;

/// Names of the functions at an address, the innermost first.
pub trait Names {
    /// `offset` is in the program's file, where `perf script` says that a frame is. `is_return`: a call returns there, so what
    /// called is before it. Empty: nothing is known.
    fn at(&mut self, offset: u64, is_return: bool) -> &[String];
}

/// The debug information of one program.
pub struct Program {
    debug: Loader,
    segments: Vec<Segment>,
    known: HashMap<u64, Vec<String>>,
}

/// What of a file is where when it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    len: u64,
}

impl Program {
    /// # Errors
    /// When the file can't be read or is no program.
    pub fn new(path: &Path) -> Result<Program> {
        let file = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let segments = segments(&file).ok_or_else(|| format!("{} is no 64-bit ELF program", path.display()))?;
        let debug = Loader::new(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Program { debug, segments, known: HashMap::new() })
    }
}

impl Names for Program {
    fn at(&mut self, offset: u64, is_return: bool) -> &[String] {
        let offset = offset - u64::from(is_return);
        self.known.entry(offset).or_insert_with(|| {
            let mut names = Vec::new();
            let mut segments = self.segments.iter().filter(|segment| offset >= segment.offset);
            let address = segments.find_map(|segment| {
                let at = offset - segment.offset;
                (at < segment.len).then(|| segment.address + at)
            });
            let found = address.and_then(|address| self.debug.find_frames(address).ok());
            let Some(mut frames) = found else { return names };
            while let Ok(Some(frame)) = frames.next() {
                // Assembly has lines without functions: then the symbol is all there is.
                names.extend(frame.function.and_then(|function| Some(function.demangle().ok()?.into_owned())));
            }
            names
        })
    }
}

/// The loaded segments of a 64-bit little-endian ELF file.
fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    const LOAD: u64 = 1;
    let number = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(file.get(at..at.checked_add(len)?)?);
        Some(u64::from_le_bytes(bytes))
    };
    let number_at = |base: u64, at: usize, len: usize| number(usize::try_from(base).ok()?.checked_add(at)?, len);
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, entry_len, entries) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    let mut loaded = Vec::new();
    for entry in (0..entries).map(|index| table.saturating_add(index * entry_len)) {
        if number_at(entry, 0, 4)? == LOAD {
            let (offset, address, len) = (number_at(entry, 8, 8)?, number_at(entry, 16, 8)?, number_at(entry, 32, 8)?);
            loaded.push(Segment { offset, address, len });
        }
    }
    Some(loaded)
}

/// Copies what `perf script` prints; each frame in an object whose path ends so becomes those of all functions there.
///
/// # Errors
/// As reading and writing.
pub fn expand(script: impl BufRead, object: &str, names: &mut impl Names, mut out: impl Write) -> io::Result<()> {
    let mut is_first = true;
    for line in script.lines() {
        // What is in brackets counts as the kernel's, but this runs in the program.
        let line = line?.replace("([vdso])", "(vdso)");
        let address = frame(&line).filter(|(_, path)| path.ends_with(object)).map(|(address, _)| address);
        let inlined = address.map_or(&[][..], |address| names.at(address, !is_first));
        if inlined.is_empty() {
            writeln!(out, "{line}")?;
        }
        let path = line.rsplit(" (").next().unwrap_or_default();
        for name in inlined {
            writeln!(out, "\t{:x} {name} ({path}", address.unwrap_or_default())?;
        }
        // A stack has a line without indentation before it.
        is_first = !line.starts_with(['\t', ' ']);
    }
    Ok(())
}

/// Address and object of a line of a stack: `\t    55f0c1 function (/path/of/object)`.
fn frame(line: &str) -> Option<(u64, &str)> {
    let (address, rest) = line.strip_prefix(['\t', ' '])?.trim_start().split_once(' ')?;
    let (_, path) = rest.rsplit_once(" (")?;
    Some((u64::from_str_radix(address, 16).ok()?, path.strip_suffix(')')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Known;

    impl Names for Known {
        fn at(&mut self, address: u64, is_return: bool) -> &[String] {
            assert_eq!(is_return, address != 0x10, "only the innermost frame is where it ran");
            static OUTER: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
            let outer = OUTER.get_or_init(|| vec!["inner<T>".to_owned(), "outer::{{closure}}".to_owned()]);
            if address == 0x2f { &[] } else { outer.as_slice() }
        }
    }

    #[test]
    fn frames_of_the_program_become_all_functions_there() {
        let script = "volley-shard-0  12/13    5.1: cpu-clock:ppp: \n\
                      \t              10 a (b) c (/x/volleyd)\n\
                      \t              2f stripped (/x/volleyd)\n\
                      \tffffffff810000ff do_syscall_64 ([kernel.kallsyms])\n\
                      \t              3f main (/x/volleyd)\n\
                      \t             9f0 __vdso_clock_gettime ([vdso])\n\
                      \n";
        let mut out = Vec::new();
        expand(script.as_bytes(), "/volleyd", &mut Known, &mut out).expect("no error in memory");
        let expected = "volley-shard-0  12/13    5.1: cpu-clock:ppp: \n\
                        \t10 inner<T> (/x/volleyd)\n\
                        \t10 outer::{{closure}} (/x/volleyd)\n\
                        \t              2f stripped (/x/volleyd)\n\
                        \tffffffff810000ff do_syscall_64 ([kernel.kallsyms])\n\
                        \t3f inner<T> (/x/volleyd)\n\
                        \t3f outer::{{closure}} (/x/volleyd)\n\
                        \t             9f0 __vdso_clock_gettime (vdso)\n\
                        \n";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }

    #[inline(always)]
    fn within(number: u64) -> u64 {
        std::hint::black_box(number) * 3 + 1
    }

    #[inline(never)]
    fn around(number: u64) -> u64 {
        within(std::hint::black_box(number) ^ 5)
    }

    #[test]
    fn functions_of_this_program_have_their_names() {
        let own = std::env::current_exe().expect("own path");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        assert_eq!(around(4), 4);
        let address = around as fn(u64) -> u64 as usize as u64;
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("a number");
        let offset = maps.lines().find_map(|line| {
            // First-last, rights, offset in the file.
            let words: Vec<&str> = line.split_whitespace().collect();
            let (first, last) = words[0].split_once('-').expect("a range");
            (hex(first)..hex(last)).contains(&address).then(|| address - hex(first) + hex(words[2]))
        });
        let offset = offset.expect("its own code is mapped");
        let mut program = Program::new(&own).expect("debug information");
        let mut stacks = (0..48).map(|at| program.at(offset + at, false).to_vec());
        let inlined = stacks.find(|names| names.first().is_some_and(|name| name.ends_with("within")));
        assert!(inlined.as_ref().is_some_and(|names| names[1].ends_with("around")), "{inlined:?}");
        assert!(program.at(u64::MAX, true).is_empty());
    }

    #[test]
    fn what_is_no_program_is_refused() {
        assert_eq!(segments(b"#!/bin/sh\n"), None);
        assert_eq!(segments(b"\x7fELF\x02\x01"), None, "cut");
        let mut cut = std::fs::read(std::env::current_exe().expect("own path")).expect("readable");
        assert!(segments(&cut).is_some_and(|found| found.len() > 1));
        cut.truncate(0x60);
        assert_eq!(segments(&cut), None);
    }
}
