//! Jobs, batches, and the events of drawing them.

use std::ops::ControlFlow;

use candle_core::Tensor;

use super::Sampling;
use crate::error::{Error, Kind};
use crate::tokenizer::Code;

/// One image to draw.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to draw, as plain text.
    pub prompt: String,
    /// The negative prompt, if it is not the model's own.
    pub negative: Option<String>,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// How codes are sampled.
    pub sampling: Sampling,
    /// Seed of all randomness of the image.
    pub seed: u64,
}

/// Images that are drawn at once.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Grids (height, width) coarse to fine.
    pub scales: &'a [(usize, usize)],
    /// How codes are sampled.
    pub sampling: &'a Sampling,
    /// The seed of every image.
    pub seeds: &'a [u64],
}

/// What happens while images are drawn. An observer that answers `Break` stops the drawing.
#[derive(Debug)]
pub enum Event<'a> {
    /// The prompts were read.
    Prompt {
        /// Tokens in all of them, but for the last one of each, which opens the image.
        tokens: usize,
    },
    /// One more scale was drawn or, on a GPU, queued.
    Scale {
        /// Codes of every scale so far, coarse to fine: (images, h * w) u32, or
        /// (images, h * w, bits) u8 for bitwise codes. Reading them ([`super::sampler::to_host`])
        /// waits for the device.
        codes: &'a [Tensor],
        /// All grids of the image.
        scales: &'a [(usize, usize)],
        /// How many of them are drawn: a draft skips the last ones.
        drawn: usize,
    },
    /// All codes were drawn; pixels come next.
    Decode,
    /// The refiner has taken a step.
    Refine {
        /// Steps so far.
        step: usize,
        /// Of all.
        steps: usize,
    },
}

/// The codes of one image: of every scale, coarse to fine, the h * w codes of its grid, row-major.
pub type ImageCodes = Vec<Vec<Code>>;

/// Called with every [`Event`].
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// The error of an observer that breaks.
pub(super) fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted")
}
