//! A report as one HTML page that needs nothing else: the table, and the latency of every percentile as a curve.

use std::fmt::Write;
use std::time::Duration;

use super::report::{Report, Series};
use crate::units::format_duration;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 70.0;
/// From the median to one in a hundred thousand: each step across is ten times fewer requests.
const NINES_MAX: f64 = 5.0;
const POINTS: u32 = 200;
const COLOURS: [&str; 6] = ["#1b6ca8", "#c0392b", "#1e8449", "#7d3c98", "#b9770e", "#333333"];

/// The page.
#[must_use]
pub fn html(report: &Report) -> String {
    let shown: Vec<&(&str, Series)> = report.series.iter().filter(|(_, series)| series.latency.count() > 0).collect();
    let mut page = String::new();
    // Writing to a string can't fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>volley-load {0}</title>\n\
         <style>body{{font:14px sans-serif;margin:2em}}pre{{font-size:13px}}svg text{{font:12px sans-serif}}</style></head>\n\
         <body><h1>volley-load {0}</h1>\n<pre>{1}</pre>\n{2}\n</body></html>\n",
        report.workload,
        escaped(&report.to_string()),
        chart(&shown)
    );
    page
}

fn chart(shown: &[&(&str, Series)]) -> String {
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\">\n");
    let decade = |latency: Duration| (latency.as_nanos().max(1) as f64).log10();
    let ends = shown.iter().map(|(_, series)| (decade(series.latency.quantile(0.5)), decade(series.latency.max())));
    let (low, high) = ends.fold((f64::MAX, f64::MIN), |(low, high), (from, to)| (low.min(from), high.max(to)));
    let (low, high) = (low.floor(), high.ceil().max(low.floor() + 1.0));
    let x = |nines: f64| MARGIN + (WIDTH - 2.0 * MARGIN) * nines / NINES_MAX;
    let y = |decade: f64| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * (decade - low) / (high - low);
    let mut line = |text: std::fmt::Arguments<'_>| {
        let _ = writeln!(svg, "{text}");
    };
    let mut at = low;
    while at <= high && !shown.is_empty() {
        let label = format_duration(Duration::from_nanos(10_f64.powf(at) as u64));
        line(format_args!(
            "<line x1=\"{MARGIN}\" x2=\"{0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" stroke=\"#ddd\"/><text x=\"5\" y=\"{1:.1}\">{label}</text>",
            WIDTH - MARGIN,
            y(at)
        ));
        at += 1.0;
    }
    for (nines, label) in [(0.301, "50 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %")] {
        line(format_args!("<text x=\"{:.1}\" y=\"{:.1}\">{label}</text>", x(nines), HEIGHT - MARGIN / 2.0));
    }
    for (index, (name, series)) in shown.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        // Beyond one request of all there is nothing to tell.
        let last = (series.latency.count() as f64).log10().min(NINES_MAX);
        let points = (0..=POINTS).map(|point| last * f64::from(point) / f64::from(POINTS));
        let points: Vec<String> = points
            .map(|nines| {
                format!("{:.1},{:.1}", x(nines), y(decade(series.latency.quantile(1.0 - 10_f64.powf(-nines))).max(low)))
            })
            .collect();
        line(format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            points.join(" ")
        ));
        let place = MARGIN / 2.0 + 16.0 * index as f64;
        line(format_args!("<text x=\"{MARGIN}\" y=\"{place}\" fill=\"{colour}\">{name}</text>"));
    }
    svg.push_str("</svg>");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::html;
    use crate::load::report::{Report, Series};

    #[test]
    fn every_kind_of_request_has_a_curve_and_nothing_breaks_the_page() {
        let mut fast = Series::default();
        (1..=1000).for_each(|us| fast.record(Duration::from_micros(us), 4096, Ok(())));
        let mut failed = Series::default();
        failed.record(Duration::ZERO, 0, Err("<script>".to_owned()));
        let elapsed = Duration::from_secs(1);
        let series = vec![("read", fast), ("write", failed), ("flush", Series::default())];
        let page = html(&Report { workload: "mixed", elapsed, series, facts: Vec::new() });
        assert_eq!(page.matches("<polyline").count(), 1, "those without an answer have none");
        assert!(page.contains(">read</text>") && page.contains("&lt;script>") && !page.contains("<script>"), "{page}");
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        let empty = html(&Report { workload: "read", elapsed, series: Vec::new(), facts: Vec::new() });
        assert!(empty.contains("</svg>") && !empty.contains("NaN"), "{empty}");
    }
}
