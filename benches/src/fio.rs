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

/// A number of the first job of fio's JSON.
///
/// # Errors
/// When it is not there.
pub fn field(json: &str, side: &str, field: &str) -> Result<f64> {
    let start = json.find('{').ok_or_else(|| format!("fio printed no JSON: {json}"))?;
    let value: serde_json::Value = serde_json::from_str(&json[start..]).map_err(|e| format!("fio's JSON: {e}"))?;
    value["jobs"][0][side][field].as_f64().ok_or_else(|| format!("fio's JSON has no {side}.{field}"))
}
