//! fio as a peer.

use std::path::Path;
use std::process::Command;

use crate::process::{Result, run};

/// The peer of hydration, in words.
pub const SEQUENTIAL_WRITE: &str =
    "fio sequential write, bs=512k direct=1 iodepth=8 io_uring, end_fsync, to a new file";

/// MB/s of writing `mib` to a new file in `dir`, beside a job that reads so many MiB of a file if one is given.
///
/// # Errors
/// When fio fails.
pub fn sequential_write(dir: &Path, mib: u32, beside: Option<(&Path, u64)>) -> Result<f64> {
    let file = dir.join("fio.raw");
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--direct=1", "--ioengine=io_uring"]);
    command.args(["--name=w", "--rw=write", "--bs=512k", "--iodepth=8", "--fallocate=none", "--end_fsync=1"]);
    command.arg(format!("--size={mib}M")).arg(format!("--filename={}", file.display()));
    if let Some((read, read_mib)) = beside {
        command.args(["--name=r", "--rw=read", "--bs=1M", "--iodepth=4", &format!("--size={read_mib}M")]);
        command.arg(format!("--filename={}", read.display()));
    }
    let milliseconds = field(&run(&mut command)?, "write", "runtime")?;
    std::fs::remove_file(&file).map_err(|e| e.to_string())?;
    Ok(f64::from(mib) * f64::from(1 << 20) / (milliseconds / 1e3) / 1e6)
}

/// A guest's mix: 4 KiB at random, 70 % reads, 4 at a time, through an NBD server's unix socket.
#[must_use]
pub fn guest_mix(socket: &Path, export: &str, seconds: u32) -> Command {
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--name=g", "--ioengine=nbd", "--rw=randrw", "--rwmixread=70", "--bs=4k"]);
    command.args(["--iodepth=4", "--time_based", "--norandommap", "--unified_rw_reporting=1", "--ramp_time=1"]);
    command.arg(format!("--runtime={seconds}")).arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()));
    command
}

/// Milliseconds that 99 of 100 requests of a [`guest_mix`] took at most, and how many there were each second.
///
/// # Errors
/// When fio's JSON does not say.
pub fn p99_ms_and_iops(json: &str) -> Result<(f64, f64)> {
    let job = first_job(json)?;
    let p99 = job["mixed"]["clat_ns"]["percentile"]["99.000000"].as_f64().ok_or("fio's JSON has no 99th percentile")?;
    let iops = job["mixed"]["iops"].as_f64().ok_or("fio's JSON has no mixed.iops")?;
    Ok((p99 / 1e6, iops))
}

/// A number of the first job of fio's JSON.
///
/// # Errors
/// When it is not there.
pub fn field(json: &str, side: &str, field: &str) -> Result<f64> {
    first_job(json)?[side][field].as_f64().ok_or_else(|| format!("fio's JSON has no {side}.{field}"))
}

fn first_job(json: &str) -> Result<serde_json::Value> {
    // What fio says first goes to the same place.
    let start = json.find('{').ok_or_else(|| format!("fio printed no JSON: {json}"))?;
    let mut value: serde_json::Value = serde_json::from_str(&json[start..]).map_err(|e| format!("fio's JSON: {e}"))?;
    Ok(value["jobs"][0].take())
}
