//! Report of a model that draws in phases, each with its own weights.

use std::fmt::Write;

use serde::Serialize;

use super::gb;
use crate::checkpoint::WeightType;
use crate::error::Result;
use crate::terminal;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub model: &'static str,
    pub weights: Option<WeightType>,
    /// Grid of the last scale in pixels.
    pub size: String,
    pub phases: Vec<Phase>,
    pub scales: Vec<Scale>,
    /// Matrix product in the type of the activations, as measured here.
    pub peak_gflops: f64,
    pub forecast_bytes: u64,
    /// Of the process, or of the tensors on a GPU.
    pub peak_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Phase {
    pub name: &'static str,
    /// For random weights: time to make them.
    pub load_seconds: f64,
    pub seconds: f64,
    pub forecast_bytes: u64,
    /// Peak from the start to its end.
    pub peak_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Scale {
    pub grid: (usize, usize),
    /// Of all rows.
    pub tokens: usize,
    pub seconds: f64,
    pub floor_seconds: f64,
}

impl Report {
    /// Prints it, as JSON or as a table.
    pub fn emit(&self, json: bool) -> Result<()> {
        match json {
            true => terminal::emit_json(self).map(drop),
            false => terminal::emit(self.table().as_bytes()).map(drop),
        }
    }

    fn table(&self) -> String {
        let weights = self.weights.map_or(String::new(), |w| format!(" in {w}"));
        let mut text = format!(
            "{}{weights}, {}\n\n{:<10} {:>8} {:>9} {:>10} {:>10}\n",
            self.model, self.size, "", "load s", "s", "forecast", "peak so far"
        );
        for Phase { name, load_seconds, seconds, forecast_bytes, peak_bytes } in &self.phases {
            let peak = peak_bytes.map_or("unknown".into(), gb);
            let _ =
                writeln!(text, "{name:<10} {load_seconds:>8.1} {seconds:>9.2} {:>10} {peak:>10}", gb(*forecast_bytes));
        }
        let _ = writeln!(text, "\n{:<10} {:>8} {:>9} {:>10}", "scale", "tokens", "ms", "floor ms");
        for Scale { grid: (h, w), tokens, seconds, floor_seconds } in &self.scales {
            let (ms, floor) = (1e3 * seconds, 1e3 * floor_seconds);
            let _ = writeln!(text, "{:<10} {tokens:>8} {ms:>9.1} {floor:>10.1}", format!("{h}x{w}"));
        }
        let (spent, floor) = self.scales.iter().fold((0.0, 0.0), |(s, f), x| (s + x.seconds, f + x.floor_seconds));
        let _ = writeln!(
            text,
            "\nimage {:.2} s · drawing at {:.0}% of the floor ({:.0} GFLOP/s here)",
            self.phases.iter().map(|phase| phase.seconds).sum::<f64>(),
            100.0 * floor / spent,
            self.peak_gflops
        );
        let peak = self.peak_bytes.map_or("unknown".into(), gb);
        let _ = writeln!(text, "peak memory {peak}, forecast {}", gb(self.forecast_bytes));
        text
    }
}
