//! Processor time of the generator's threads and of the server, and which core a thread runs on.

use std::fs;

/// Processor time of another process from here on.
pub struct Meter {
    pid: Option<u32>,
    begun_ns: u64,
}

impl Meter {
    /// Of nobody, without a process id.
    ///
    /// # Errors
    /// A sentence when there is no such process.
    pub fn start(pid: Option<u32>) -> Result<Meter, String> {
        let begun_ns = pid.map(process_ns).transpose()?.unwrap_or_default();
        Ok(Meter { pid, begun_ns })
    }

    /// Nanoseconds since the start; `None` of nobody.
    ///
    /// # Errors
    /// A sentence when the process has ended.
    pub fn cpu_ns(&self) -> Result<Option<u64>, String> {
        let now = self.pid.map(process_ns).transpose()?;
        Ok(now.map(|now| now.saturating_sub(self.begun_ns)))
    }
}

/// Processor time of a process in nanoseconds: what the kernel's scheduler counts of all threads that it has now.
///
/// # Errors
/// A sentence when there is no such process.
pub fn process_ns(pid: u32) -> Result<u64, String> {
    let failed = |error: std::io::Error| format!("can't read the processor time of process {pid}: {error}");
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
        // A thread that has ended meanwhile counts for nothing.
        let Ok(text) = fs::read_to_string(task.map_err(failed)?.path().join("schedstat")) else { continue };
        total += text.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(total)
}

/// Processor time of this thread in nanoseconds.
#[must_use]
pub fn thread_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the one struct it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Keeps this thread on a core, if one is given.
///
/// # Errors
/// A sentence when there is no such core for this process.
pub fn pin(core: Option<usize>) -> Result<(), String> {
    let Some(core) = core else { return Ok(()) };
    // SAFETY: a plain bit set; CPU_SET is told a number it checks against the set's size.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if core < libc::CPU_SETSIZE as usize {
            libc::CPU_SET(core, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    match done {
        0 => Ok(()),
        _ => Err(format!("can't run on core {core}: {}", std::io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::{Meter, thread_ns};

    #[test]
    fn work_costs_time_of_the_thread_and_of_the_process() {
        let (meter, before) = (Meter::start(Some(std::process::id())).expect("this process"), thread_ns());
        let mut sum = 0_u64;
        while thread_ns() - before < 5_000_000 {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(meter.cpu_ns().expect("alive").expect("asked for") >= 4_000_000);
        assert!(Meter::start(Some(u32::MAX)).is_err());
        assert_eq!(Meter::start(None).expect("nobody").cpu_ns(), Ok(None));
    }
}
