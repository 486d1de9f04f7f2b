//! How often something happened, as `perf stat` and `strace` print it.

use std::collections::BTreeMap;

use crate::process::Result;

/// Events by name; those that the kernel can't count are left out.
pub type Counts = BTreeMap<String, u64>;

/// Understands what `perf stat -x,` prints.
///
/// # Errors
/// When a line is none of its.
pub fn of_perf_stat(text: &str) -> Result<Counts> {
    let mut counts = Counts::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        // Value, unit, event: whatever follows is about how it was measured.
        let mut fields = line.split(',');
        let (Some(value), Some(_), Some(event)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(format!("perf stat printed {line:?}"));
        };
        if value.starts_with('<') {
            continue;
        }
        let value = value.parse::<u64>().map_err(|_| format!("perf stat printed {line:?}"))?;
        *counts.entry(event.to_owned()).or_default() += value;
    }
    Ok(counts)
}

/// Understands the table that `strace -c` prints.
///
/// # Errors
/// When it has no head.
pub fn of_strace(text: &str) -> Result<Counts> {
    let mut lines = text.lines().skip_while(|line| !line.contains("syscall"));
    lines.next().ok_or_else(|| format!("strace printed no table: {text:?}"))?;
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // % time, seconds, usecs/call, calls, errors (or nothing), syscall.
        let (name, calls) = (*words.last()?, words.get(3)?.parse().ok()?);
        (name != "total").then(|| (name.to_owned(), calls))
    };
    Ok(lines.filter_map(row).collect())
}

/// The system calls of these counts: of `syscalls:sys_enter_…` the names behind it.
#[must_use]
pub fn syscalls(counts: &Counts) -> Counts {
    let name = |(event, count): (&String, &u64)| {
        let name = event.strip_prefix("syscalls:sys_enter_")?;
        (*count > 0).then(|| (name.to_owned(), *count))
    };
    counts.iter().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perf_stat_is_understood() {
        let counts = of_perf_stat(include_str!("samples/perf-stat.csv")).expect("counts");
        let syscalls = syscalls(&counts);
        assert!(syscalls["recvfrom"] > 0 && syscalls["io_uring_enter"] > 0, "{syscalls:?}");
        assert!(!syscalls.contains_key("accept"), "what did not happen is left out: {syscalls:?}");
        assert!(counts["io_uring:io_uring_submit_req"] > 0);
        assert!(!counts.contains_key("cycles"), "what was not counted is not zero");
        assert!(of_perf_stat("nonsense").is_err());
        assert!(of_perf_stat("many,,x:y,1,100.00,,").is_err());
    }

    #[test]
    fn strace_is_understood() {
        let counts = of_strace(include_str!("samples/strace.txt")).expect("counts");
        assert_eq!((counts["recvfrom"], counts["madvise"]), (13604, 4), "{counts:?}");
        assert!(!counts.contains_key("total") && !counts.contains_key("----------------"), "{counts:?}");
        assert!(of_strace("strace: attach: Operation not permitted").is_err());
    }
}
