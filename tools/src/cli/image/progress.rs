//! Progress of long commands on stderr: a bar on a terminal, now and then a line elsewhere, nothing with `--json`.

use std::cell::Cell;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::units::format_size;

/// Between two lines of a log.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(in crate::cli) struct Progress {
    what: &'static str,
    shown: Shown,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines { last: Cell<Instant> },
}

impl Progress {
    pub(in crate::cli) fn start(what: &'static str, json: bool) -> Progress {
        let shown = if json {
            Shown::Nothing
        } else if stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
            let bar = ProgressBar::new(0).with_message(what);
            Shown::Bar(match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            })
        } else {
            Shown::Lines { last: Cell::new(Instant::now()) }
        };
        Progress { what, shown }
    }

    pub(in crate::cli) fn update(&self, done_bytes: u64, total_bytes: u64) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
            }
            Shown::Lines { last } => {
                if last.get().elapsed() >= LINE_INTERVAL {
                    last.set(Instant::now());
                    eprintln!("{}: {} of {}", self.what, format_size(done_bytes), format_size(total_bytes));
                }
            }
        }
    }

    pub(in crate::cli) fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    /// An error message must not share its line with the bar.
    fn drop(&mut self) {
        self.finish();
    }
}
