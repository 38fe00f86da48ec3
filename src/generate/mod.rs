//! From a prompt to an image: schedules, guidance, sampling and the next-scale loop.

pub mod bits;
pub mod cost;
mod generator;
pub mod infinity;
pub mod inputs;
mod model;
pub mod onecat;
pub mod prompt;
pub mod ratios;
mod rows;
pub mod sampler;
mod sampling;
pub mod schedule;
pub mod tokenflow;

use std::ops::ControlFlow;

use candle_core::Tensor;

pub use generator::{Generator, GeneratorConfig};
pub use model::{ConversationConfig, IMAGE_TOKENIZER, Model, ModelConfig, SYSTEM, TRANSFORMER};
pub use prompt::{Prefix, PromptConfig, PromptCounter};
pub use rows::Rows;
pub use sampling::{Guidance, Sampling};

use crate::backbone::{Backbone, Step};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Code;
use inputs::NextInput;
use sampler::{Draw, Fault};

/// One image to draw.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to draw, as plain text.
    pub prompt: String,
    /// What guidance leads away from, if that is not the model's own.
    pub negative: Option<String>,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// How codes are drawn.
    pub sampling: Sampling,
    /// Decides all randomness of the image.
    pub seed: u64,
}

/// Images that are drawn at once.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Grids (height, width) coarse to fine.
    pub scales: &'a [(usize, usize)],
    /// How codes are drawn.
    pub sampling: &'a Sampling,
    /// One for every image, which decides all its randomness.
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
    /// One more scale was drawn or, on a GPU, has been asked for.
    Scale {
        /// Codes of every scale so far, coarse to fine: (images, h * w) u32, or (images, h * w,
        /// bits) u8 for bitwise codes. Reading them ([`sampler::to_host`]) waits for the device.
        codes: &'a [Tensor],
        /// All grids of the image.
        scales: &'a [(usize, usize)],
        /// How many of them are drawn: a draft leaves out the last ones.
        drawn: usize,
    },
    /// All codes were drawn; pixels come next.
    Decode,
}

/// The codes of one image: of every scale, coarse to fine, the h * w codes of its grid, row-major.
pub type ImageCodes = Vec<Vec<Code>>;

/// Called with every [`Event`].
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// The sequences that a batch is drawn in, as far as they have been read: those of the images' prompts and, with guidance, as many
/// unconditional ones.
pub trait Sequences {
    /// Reads scale `si`, whose features (images, h * w, D) are those of the rows of each image: hidden states (R, h * w,
    /// hidden), which predict its codes. With [`Step::Again`] the scale, already read, is looked at with other features, which
    /// leave no trace.
    fn read(&mut self, si: usize, features: &Tensor, step: Step) -> candle_core::Result<Tensor>;

    /// From here on there is no guidance for the `images`: their unconditional rows are not read any more.
    fn drop_unconditional(&mut self, images: usize) -> candle_core::Result<()>;

    /// The codes that hidden states (R, T, hidden) of every image predict: (images, T) u32 or (images, T, bits) u8.
    fn sample(&self, hidden: &Tensor, draw: &Draw) -> std::result::Result<Tensor, Fault>;
}

/// Draws the codes of images, each after a prompt's prefix and, with guidance, the unconditional one.
pub fn draw_after(
    backbone: &Backbone,
    input: NextInput,
    prompts: &[Prefix],
    unconditional: &Prefix,
    batch: Batch,
    observe: Observer,
) -> Result<Vec<ImageCodes>> {
    let guides = if batch.sampling.guided_scales(batch.scales.len()) > 0 { prompts.len() } else { 0 };
    let prefixes: Vec<&Prefix> = prompts.iter().chain(std::iter::repeat_n(unconditional, guides)).collect();
    let mut caches = Rows::caches(backbone, &prefixes, batch.scales)?;
    let (rows, hidden) = Rows::start(backbone, &mut caches, &prefixes, batch.scales)?;
    tell(observe, Event::Prompt { tokens: prompts.iter().map(|prompt| prompt.ids.len() - 1).sum() })?;
    draw_codes(rows, hidden, input, batch, observe)
}

/// Draws the codes of images, coarse to fine: the next-scale loop. Gives the codes of every scale of every image.
///
/// - The batch has a row for the prompt of every image and, with guidance, as many unconditional ones, all read up to what
///   opens the image; `hidden` are the states of that last token, (R, 1, hidden).
/// - Each scale is one forward pass over its grid against the cache, without a mask. The first code is predicted by the last
///   token, the codes of every later scale by the upsampled codes before it.
/// - Further passes of a scale (`refine`) see its own codes as well and draw them anew.
/// - Once guidance ends, the loop goes on with the prompts' rows.
/// - A GPU that draws the codes itself is not waited for before all scales have been queued.
pub fn draw_codes(
    mut rows: impl Sequences,
    mut hidden: Tensor,
    mut input: NextInput,
    batch: Batch,
    observe: Observer,
) -> Result<Vec<ImageCodes>> {
    let Batch { scales, sampling, seeds } = batch;
    let mut codes: Vec<Tensor> = Vec::new();
    for (si, &grid) in scales[..sampling.drawn(scales.len())].iter().enumerate() {
        if si == sampling.guided_scales(scales.len()) {
            rows.drop_unconditional(seeds.len())?;
        }
        if si > 0 {
            let upsampled = input.next(&codes[si - 1], si)?;
            hidden = rows.read(si, &upsampled, Step::Scale)?;
        }
        let draw = Draw { sampling, guidance: sampling.guidance(si, scales.len()), seeds, scale: si, pass: 0 };
        let mut sampled = rows.sample(&hidden, &draw).map_err(|fault| non_finite(fault, si, grid))?;
        for pass in 1..sampling.passes(si) {
            hidden = rows.read(si, &input.with(&sampled, si)?, Step::Again)?;
            let anew = rows.sample(&hidden, &Draw { pass, ..draw }).map_err(|fault| non_finite(fault, si, grid))?;
            sampled = sampler::keep_non_finite(anew, &sampled)?;
        }
        codes.push(sampled);
        tell(observe, Event::Scale { codes: &codes, scales, drawn: sampling.drawn(scales.len()) })?;
    }
    to_host(&codes, scales)
}

/// Codes of every scale, image by image.
fn to_host(codes: &[Tensor], scales: &[(usize, usize)]) -> Result<Vec<ImageCodes>> {
    let mut images = Vec::new();
    for (si, codes) in codes.iter().enumerate() {
        let codes = sampler::to_host(codes).map_err(|fault| non_finite(fault, si, scales[si]))?;
        images.resize(codes.len(), Vec::new());
        images.iter_mut().zip(codes).for_each(|(image, codes)| image.push(codes));
    }
    Ok(images)
}

fn tell(observe: &mut dyn FnMut(Event) -> ControlFlow<()>, event: Event) -> Result<()> {
    match observe(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "interrupted")),
    }
}

fn non_finite(fault: sampler::Fault, scale: usize, (h, w): (usize, usize)) -> Error {
    let position = match fault {
        sampler::Fault::NonFinite { position } => position,
        sampler::Fault::Tensor(error) => return error.into(),
    };
    let message =
        format!("the model produced numbers that are not finite at scale {} ({h}x{w}), position {position}", scale + 1);
    Error::new(Kind::NonFinite, message).hint("check the weights: --model FOLDER with another checkpoint")
}

#[cfg(test)]
mod tests;
