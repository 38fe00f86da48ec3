//! From a checked request to a loading model: the plan of `--dry-run`, and what has to be checked
//! before weights are read, in the same order for every command.

use candle_core::Device;
use serde::Serialize;

use super::refining::Refining;
use super::request::Request;
use crate::checkpoint::{Source, TRANSFORMER};
use crate::error::Result;
use crate::generate::schedule;
use crate::memory;
use crate::terminal::{self, Console, Level, Stop};

/// A model about to be loaded.
pub(super) struct Load<'a> {
    /// Nothing for random weights.
    pub source: Option<&'a Source>,
    pub device: &'a Device,
    /// Peak memory of the whole run, in bytes.
    pub peak: u64,
    /// The hint where memory is short: flags that need less.
    pub smaller: &'a str,
}

/// A run whose checks have passed: the model can be loaded.
pub(super) struct Run {
    pub console: Console,
    pub stop: Stop,
}

impl Load<'_> {
    /// Checks files, then memory, and installs the handler of Ctrl-C. A missing file is reported
    /// first: it matters more than the memory that the model would need.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a missing file, [`crate::error::Kind::Memory`] for
    /// too little memory.
    pub fn start(&self, level: Level, images: u64) -> Result<Run> {
        if let Some(source) = self.source {
            source.find(TRANSFORMER)?;
        }
        memory::check(self.peak, self.device, self.smaller)?;
        Ok(Run { console: Console::new(level, images), stop: terminal::interrupts()? })
    }
}

/// Images of one size by one model, with a forecast `M` of the memory.
#[derive(Serialize)]
pub(super) struct Plan<'a, M> {
    model: &'a str,
    images: u64,
    seeds: &'a [u64],
    size: String,
    scales: &'a [(usize, usize)],
    codes: usize,
    passes: usize,
    memory: M,
    #[serde(skip_serializing_if = "Option::is_none")]
    refining: Option<Refining>,
    peak_memory: u64,
}

impl<'a, M: Serialize> Plan<'a, M> {
    /// Of images that are drawn in (width, height) pixels, in grids `scales`, with `peak` bytes of
    /// memory, and then refined, if that is asked for.
    ///
    /// Errors: as [`Request::refining`].
    pub fn new(
        request: &'a Request,
        drawn: (u32, u32),
        scales: &'a [(usize, usize)],
        memory: M,
        peak: u64,
    ) -> Result<Self> {
        let refining = request.refining(drawn)?;
        let (width, height) = refining.as_ref().map_or(drawn, |refining| refining.size);
        let (peak_memory, _) = request.limit(drawn, peak, "")?;
        Ok(Self {
            model: &request.model,
            images: request.images(),
            seeds: &request.seeds,
            size: format!("{width}x{height}"),
            scales,
            codes: schedule::codes(scales),
            passes: request.sampling.all_passes(scales.len()),
            memory,
            refining,
            peak_memory,
        })
    }

    /// Prints it, as JSON or with these `parts` of the memory by name.
    pub fn emit(&self, json: bool, parts: &[(&str, u64)]) -> Result<()> {
        if json {
            return terminal::emit_json(self).map(drop);
        }
        let Plan { model, images, seeds, size, codes, passes, scales, .. } = self;
        let numbers: Vec<String> = seeds.iter().map(u64::to_string).collect();
        let refining = self.refining.as_ref();
        let phases: Option<[(&str, u64); 2]> = refining.map(Refining::phases);
        let parts: Vec<_> = parts.iter().copied().chain(phases.into_iter().flatten()).collect();
        let text = format!(
            "{images} x {size} with {}, seed{} {}: {codes} codes in {} scales, {passes} passes\n{}{}",
            terminal::clean(model),
            if seeds.len() > 1 { "s" } else { "" },
            numbers.join(", "),
            scales.len(),
            refining.map(Refining::line).unwrap_or_default(),
            memory_line(self.peak_memory, &parts)
        );
        terminal::emit(text.as_bytes()).map(drop)
    }
}

/// A forecast as a line.
pub(super) fn memory_line(peak: u64, parts: &[(&str, u64)]) -> String {
    let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
    let parts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{name} {}", mb(*bytes))).collect();
    format!("memory {}: {}\n", mb(peak), parts.join(", "))
}
