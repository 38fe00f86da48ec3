//! A readable log line: means since the last one, speed and time left; and when to write a
//! checkpoint.

use std::time::{Duration, Instant};

use crate::error::Result;

/// Averages measurements, and prints a line to stderr from time to time.
pub struct Progress {
    stage: String,
    steps: usize,
    step: usize,
    batch: usize,
    /// Name, sum and count of the measurements; NaN is skipped.
    sums: Vec<(String, f64, usize)>,
    since: usize,
    last: Instant,
    /// When the next checkpoint is due.
    due: Instant,
}

/// Between two lines: as many steps, or as much time where these take long.
const EVERY: usize = 50;
const AT_MOST: Duration = Duration::from_secs(120);
/// Between two checkpoints, but ten times as long as one takes at least: what an end before the
/// next one costs.
const BETWEEN: Duration = Duration::from_secs(60);

impl Progress {
    /// A log for `steps` steps of `batch` samples, of which `done` are done.
    pub fn new(stage: &str, steps: usize, done: usize, batch: usize) -> Self {
        let now = Instant::now();
        Self {
            stage: stage.into(),
            steps,
            step: done,
            batch,
            sums: Vec::new(),
            since: 0,
            last: now,
            due: now + BETWEEN,
        }
    }

    /// Writes a checkpoint if one is due after this step: after the last one, and once a minute.
    pub fn checkpoint(&mut self, write: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        if self.step >= self.steps || start >= self.due {
            write()?;
            self.due = start + BETWEEN.max(10 * start.elapsed());
        }
        Ok(())
    }

    /// A separate line.
    pub fn say(&self, what: &str) {
        eprintln!("[{}] {what}", self.stage);
    }

    /// One more step with these measurements.
    pub fn step(&mut self, measured: &[(&str, f64)]) {
        self.step += 1;
        self.since += 1;
        if self.sums.is_empty() {
            self.sums = measured.iter().map(|(name, _)| (name.to_string(), 0.0, 0)).collect();
        }
        for ((_, sum, count), (_, value)) in self.sums.iter_mut().zip(measured).filter(|(_, (_, v))| !v.is_nan()) {
            *sum += value;
            *count += 1;
        }
        let due = self.step.is_multiple_of(EVERY) || self.last.elapsed() >= AT_MOST;
        if !due && self.step != self.steps {
            return;
        }
        let rate = self.since as f64 / self.last.elapsed().as_secs_f64();
        let means: Vec<String> =
            self.sums.iter().map(|(name, sum, count)| format!("{name} {:.4}", sum / *count as f64)).collect();
        let left = (self.steps - self.step) as f64 / rate / 60.0;
        let speed = rate * self.batch as f64;
        let Self { step, steps, .. } = *self;
        self.say(&format!("{step}/{steps}  {}  {speed:.1} samples/s  {left:.1} min left", means.join("  ")));
        self.sums.clear();
        self.since = 0;
        self.last = Instant::now();
    }
}
