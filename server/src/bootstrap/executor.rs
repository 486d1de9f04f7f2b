//! glommio executors: on which core, and why one could not start.

use std::future::Future;
use std::io;

use glommio::{GlommioError, LocalExecutorBuilder, Placement};

use crate::error::{Error, Result, Status};
use crate::platform::glommio::Glommio;

/// The cores this process may run on.
///
/// # Errors
/// As `sched_getaffinity(2)`.
pub(super) fn allowed_cpus() -> Result<Vec<usize>> {
    let mut set = std::mem::MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: `set` is writable for the size passed, and 0 is this process.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) };
    if result != 0 {
        return Err(Error::from_io("which cores may be used", &io::Error::last_os_error()));
    }
    // SAFETY: zeroed is a valid empty set, and the call filled it.
    let set = unsafe { set.assume_init() };
    let cpus = 0..libc::CPU_SETSIZE as usize;
    // SAFETY: every index is below CPU_SETSIZE.
    Ok(cpus.filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect())
}

/// Runs `task` on an executor of its own, on a thread of its own, to its end.
///
/// # Errors
/// Those of the task, or why the executor could not start.
pub(super) fn on_temporary_executor<T, F, R>(task: F) -> Result<T>
where
    F: FnOnce(Glommio) -> R + Send + 'static,
    R: Future<Output = Result<T>> + 'static,
    T: Send + 'static,
{
    let run = move || async move { task(platform()?).await };
    let executor = LocalExecutorBuilder::new(Placement::Unbound).name("volley-start").spawn(run);
    executor.map_err(cannot_start)?.join().map_err(cannot_start)?
}

/// The platform of the executor that runs the caller.
pub(super) fn platform() -> Result<Glommio> {
    Glommio::new().map_err(|e| Error::from_io("random seed or thread of the kernel", &e))
}

/// Says what an operator has to change so that executors can start.
pub(super) fn cannot_start(error: GlommioError<()>) -> Error {
    // The executor's thread passes its reactor's error on as text inside an I/O error.
    let memlock = error.raw_os_error() == Some(libc::ENOMEM) || error.to_string().contains("MemLock");
    let advice = match error.raw_os_error() {
        _ if memlock => format!(
            "locked memory is limited to {}: raise it with `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the \
             systemd unit",
            locked_memory_limit()
        ),
        Some(libc::EPERM | libc::ENOSYS) => {
            "io_uring is not allowed here: see sysctl kernel.io_uring_disabled and the container's seccomp profile"
                .to_owned()
        }
        Some(libc::EMFILE | libc::ENFILE) => {
            "too many open files: raise `ulimit -n`, or LimitNOFILE= in the systemd unit".to_owned()
        }
        _ => error.to_string(),
    };
    Error::new(Status::Io, format!("can't start an executor: {advice}"))
}

fn locked_memory_limit() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is writable and outlives the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } {
        0 if limit.rlim_cur == libc::RLIM_INFINITY => "unlimited".to_owned(),
        0 => format!("{} KiB", limit.rlim_cur >> 10),
        _ => "an unknown amount".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use glommio::GlommioError;

    use super::{allowed_cpus, cannot_start};

    #[test]
    fn there_is_a_core_to_run_on() {
        assert!(!allowed_cpus().expect("cores").is_empty());
    }

    #[test]
    fn errors_say_what_to_change() {
        let advice = |number| cannot_start(GlommioError::IoError(std::io::Error::from_raw_os_error(number))).message;
        assert!(advice(libc::ENOMEM).contains("ulimit -l"));
        assert!(advice(libc::ENOMEM).contains("LimitMEMLOCK="));
        assert!(advice(libc::EPERM).contains("io_uring_disabled"));
        assert!(advice(libc::EMFILE).contains("ulimit -n"));
    }
}
