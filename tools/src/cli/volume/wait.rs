//! `volley volume wait`: one volume after the other, with a progress bar on terminals.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::super::api::{Api, fields_of, segment};
use super::super::{CliError, CliResult, Globals, print_json, print_line};
use super::Volume;

/// How often the progress is refreshed, in whole seconds because the API's long poll counts them.
const REFRESH_SECONDS: u64 = 1;

pub(super) fn run(api: &Api, globals: &Globals, names: &[String], timeout: Option<Duration>) -> CliResult {
    for name in names {
        segment(name)?;
    }
    let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let bar = ProgressBar::new(0);
    let style = "{msg} {wide_bar} {bytes}/{total_bytes}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| CliError::new("internal", e.to_string()))?);
    let mut waited = Vec::with_capacity(names.len());
    for (number, name) in names.iter().enumerate() {
        let place = if names.len() > 1 { format!(" ({}/{})", number + 1, names.len()) } else { String::new() };
        let volume = wait_for(api, name, end, |volume| {
            bar.set_length(volume.size_bytes);
            bar.set_position(volume.resident_bytes);
            bar.set_message(format!("{}{place} {}, eta {}", volume.name, volume.hydration_state, volume.eta()));
        });
        let volume = volume.inspect_err(|_| bar.finish_and_clear())?;
        if !globals.json {
            bar.suspend(|| print_line(&format!("{name} is hydrated")))?;
        }
        waited.push(volume);
    }
    bar.finish_and_clear();
    if globals.json {
        return print_json(&waited);
    }
    Ok(())
}

fn wait_for(api: &Api, name: &str, end: Option<Instant>, mut progress: impl FnMut(&Volume)) -> CliResult<Value> {
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let seconds = left.map_or(REFRESH_SECONDS, |left| left.as_secs().min(REFRESH_SECONDS));
        match api.get(&format!("/v1/volumes/{name}/wait?timeout_s={seconds}")) {
            Err(error) if error.code == "deadline_exceeded" => {}
            answer => return answer,
        }
        let volume: Volume = fields_of(&api.get(&format!("/v1/volumes/{name}"))?)?;
        if volume.hydrated {
            continue;
        }
        progress(&volume);
        if volume.rate == "none" {
            let message = format!("volume {name:?} has rate none and is not hydrated in the background: set a rate");
            return Err(CliError::new("conflict", message));
        }
        if left.is_some_and(|left| left < Duration::from_secs(1)) {
            let (resident, state) = (volume.resident(), &volume.hydration_state);
            let message = format!("volume {name:?} is not hydrated in time: {resident} resident, {state}");
            return Err(CliError::new("deadline_exceeded", message));
        }
    }
}
