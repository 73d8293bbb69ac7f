use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// What a total is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    /// Codes, steps, files.
    Count,
}

/// Shows how far long work has come, on stderr.
pub trait Progress: Send + Sync {
    /// Begins `what`, `total` units of work.
    fn start(&self, what: &str, total: u64, unit: Unit) -> Box<dyn Bar>;
}

/// One piece of work. Dropping it ends the display.
pub trait Bar: Send {
    /// `done` units are finished.
    fn set(&mut self, done: u64);
}

/// Moving bars, for a terminal.
#[derive(Debug, Default)]
pub struct Bars(MultiProgress);

impl Bars {
    /// Bars when stderr is a terminal, [`Lines`] otherwise.
    pub fn or_lines() -> Arc<dyn Progress> {
        if std::io::stderr().is_terminal() { Arc::new(Self::default()) } else { Arc::new(Lines) }
    }
}

impl Progress for Bars {
    fn start(&self, what: &str, total: u64, unit: Unit) -> Box<dyn Bar> {
        let template = match unit {
            Unit::Bytes => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
            Unit::Count => "{msg} [{bar:30}] {pos}/{len} {per_sec}",
        };
        // A template is a constant: one that does not parse falls back to the default bar rather than stopping the work.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.0.add(ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what.to_owned()));
        Box::new(Moving(bar))
    }
}

struct Moving(ProgressBar);

impl Bar for Moving {
    fn set(&mut self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Work that is done sooner is not worth a line in a log.
const SHORT: Duration = Duration::from_secs(2);

/// A line at 0, 25, 50, 75 and 100 %, for logs, once the work has taken a while.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lines;

impl Progress for Lines {
    fn start(&self, what: &str, total: u64, _unit: Unit) -> Box<dyn Bar> {
        let told_from = Instant::now() + SHORT;
        Box::new(Quarters { what: what.to_owned(), total: total.max(1), next: 0, told_from, print: |line: &str| eprintln!("{line}") })
    }
}

struct Quarters<P> {
    what: String,
    total: u64,
    /// The next quarter to report, 0..=5.
    next: u64,
    /// What is reached before this is not printed.
    told_from: Instant,
    print: P,
}

impl<P: FnMut(&str) + Send> Bar for Quarters<P> {
    fn set(&mut self, done: u64) {
        let reached = done.min(self.total).saturating_mul(4) / self.total;
        if reached >= self.next {
            if Instant::now() >= self.told_from {
                (self.print)(&format!("{}: {} %", self.what, reached * 25));
            }
            self.next = reached + 1;
        }
    }
}

/// Nothing, for `--quiet` and `--json`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _what: &str, _total: u64, _unit: Unit) -> Box<dyn Bar> {
        Box::new(Self)
    }
}

impl Bar for Silent {
    fn set(&mut self, _done: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_are_told_once() {
        for (total, steps, expected) in [
            (8, vec![0, 1, 2, 3, 4, 5, 6, 7, 8, 8], "0 25 50 75 100"),
            (8, vec![0, 7, 8], "0 75 100"),
            (1, vec![0, 1], "0 100"),
            (3, vec![9], "100"),
        ] {
            let mut lines = Vec::new();
            let mut bar = Quarters {
                what: "x".to_owned(),
                total,
                next: 0,
                told_from: Instant::now(),
                print: |line: &str| lines.push(line.to_owned()),
            };
            steps.into_iter().for_each(|done| bar.set(done));
            let percents: Vec<_> = lines.iter().map(|line| line.trim_start_matches("x: ").trim_end_matches(" %")).collect();
            assert_eq!(percents.join(" "), expected);
        }
    }
}
