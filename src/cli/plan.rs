//! What `--dry-run` tells of images that are not drawn.

use serde::Serialize;

use super::draw::told;
use super::request::Request;
use crate::error::Result;
use crate::generate::schedule;
use crate::terminal;

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
    peak_memory: u64,
}

impl<'a, M: Serialize> Plan<'a, M> {
    /// Of images of (width, height) pixels in grids `scales`.
    pub fn new(
        request: &'a Request,
        (width, height): (u32, u32),
        scales: &'a [(usize, usize)],
        memory: M,
        peak_memory: u64,
    ) -> Self {
        Self {
            model: &request.model,
            images: request.images(),
            seeds: &request.seeds,
            size: format!("{width}x{height}"),
            scales,
            codes: schedule::codes(scales),
            passes: request.sampling.all_passes(scales.len()),
            memory,
            peak_memory,
        }
    }

    /// Prints it, as JSON or with these `parts` of the memory by name.
    pub fn emit(&self, json: bool, parts: &[(&str, u64)]) -> Result<()> {
        if json {
            return terminal::emit_json(self).map(drop);
        }
        let Plan { model, images, seeds, size, codes, passes, scales, .. } = self;
        let text = format!(
            "{images} x {size} with {}, {}: {codes} codes in {} scales, {passes} passes\n{}",
            terminal::clean(model),
            told(seeds),
            scales.len(),
            memory(self.peak_memory, parts)
        );
        terminal::emit(text.as_bytes()).map(drop)
    }
}

/// A forecast as a line.
pub(super) fn memory(peak: u64, parts: &[(&str, u64)]) -> String {
    let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
    let parts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{name} {}", mb(*bytes))).collect();
    format!("memory {}: {}\n", mb(peak), parts.join(", "))
}
