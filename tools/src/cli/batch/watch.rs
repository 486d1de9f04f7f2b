//! `volley batch watch`: the server's events as a progress bar, as lines, or as one JSON object per line.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::super::api::{Api, fields_of};
use super::super::{CliError, CliResult, Globals, print_line};
use super::{Batch, Milestone};
use crate::units::{format_duration, format_size};

/// A server that restarts is back by then.
const AWAY_MAX: Duration = Duration::from_secs(60);
const AWAY_RETRY: Duration = Duration::from_millis(500);
/// Where there is no terminal, a line this often.
const LINE_PERIOD: Duration = Duration::from_secs(5);

/// Follows a batch to a milestone; `None`: until nothing of it is left.
pub(super) fn run(
    api: &Api,
    globals: &Globals,
    id: &str,
    until: Option<Milestone>,
    timeout: Option<Duration>,
) -> CliResult {
    let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut display = Display::new(globals.json)?;
    let mut seen = Instant::now();
    loop {
        let told = api.events(&format!("/v1/batches/{id}/events"), |event, data| {
            if event != "progress" {
                return Ok(None);
            }
            seen = Instant::now();
            let value: Value = serde_json::from_str(data).map_err(|e| CliError::new("unsupported", e.to_string()))?;
            let batch: Batch = fields_of(&value)?;
            display.show(&batch, &value)?;
            let late = end.is_some_and(|end| Instant::now() >= end);
            Ok(outcome(&batch, until).or_else(|| late.then(|| Err(too_late(&batch)))))
        });
        match told {
            Ok(Some(outcome)) => {
                display.bar.finish_and_clear();
                return outcome;
            }
            Err(error) if error.code != "unreachable" || seen.elapsed() > AWAY_MAX => {
                display.bar.finish_and_clear();
                return Err(error);
            }
            // It ended without an answer: the server restarts, and goes on with the batch.
            Ok(None) | Err(_) => std::thread::sleep(AWAY_RETRY),
        }
    }
}

fn outcome(batch: &Batch, until: Option<Milestone>) -> Option<CliResult> {
    match until {
        None => (batch.state == "cancelled").then_some(Ok(())),
        Some(milestone) if batch.has_reached(milestone) => Some(Ok(())),
        Some(milestone) => batch.obstacle(milestone).map(Err),
    }
}

fn too_late(batch: &Batch) -> CliError {
    let (id, state, hydrated, count) = (&batch.id, &batch.state, batch.volumes_hydrated, batch.count);
    CliError::new("deadline_exceeded", format!("batch {id} is {state} with {hydrated} of {count} volumes hydrated"))
}

/// Where progress is shown.
struct Display {
    json: bool,
    bar: ProgressBar,
    begun: Instant,
    last: Option<(Instant, String)>,
}

impl Display {
    fn new(json: bool) -> CliResult<Display> {
        let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
        bar.set_style(style.map_err(|e| CliError::new("internal", e.to_string()))?);
        Ok(Display { json, bar, begun: Instant::now(), last: None })
    }

    fn show(&mut self, batch: &Batch, value: &Value) -> CliResult {
        if self.json {
            return print_line(&value.to_string());
        }
        let count = batch.count;
        let boot_set =
            batch.volumes_boot_set_resident.map(|volumes| format!(", boot set {volumes}")).unwrap_or_default();
        let failed =
            if batch.volumes_failed > 0 { format!(", failed {}", batch.volumes_failed) } else { String::new() };
        let text = format!(
            "{}: created {}/{count}, attached {}{boot_set}, hydrated {}{failed}, {}/s, eta {}",
            batch.state,
            batch.volumes,
            batch.volumes_attached,
            batch.volumes_hydrated,
            format_size(batch.hydration_bytes_per_second),
            batch.eta(),
        );
        self.bar.set_length(batch.size_bytes);
        self.bar.set_position(batch.resident_bytes);
        self.bar.set_message(text.clone());
        let news = self.last.as_ref().is_none_or(|(at, state)| *state != batch.state || at.elapsed() >= LINE_PERIOD);
        if self.bar.is_hidden() && news {
            self.last = Some((Instant::now(), batch.state.clone()));
            print_line(&format!("{:>8} {text}", format_duration(self.begun.elapsed())))?;
        }
        Ok(())
    }
}
