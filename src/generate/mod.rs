//! From a prompt to an image: schedules, guidance, sampling and the next-scale loop,
//! [`draw_codes`].

pub mod bits;
mod config;
pub mod cost;
mod generator;
pub mod infinity;
mod job;
mod model;
pub mod next_input;
pub mod onecat;
pub mod png_info;
pub mod prompt;
pub mod ratios;
pub mod refinement;
mod rows;
pub mod sampler;
mod sampling;
pub mod schedule;
mod size;
pub mod tokenflow;

use std::ops::ControlFlow;

use candle_core::Tensor;

pub use config::{ConversationConfig, ModelConfig, SYSTEM};
pub use generator::{Generator, GeneratorConfig};
pub use job::{Batch, Event, ImageCodes, Job, Observer};
pub use model::Model;
pub use prompt::{Prefix, PromptConfig, PromptCounter};
pub use rows::Rows;
pub use sampling::{Filter, Guidance, MAX_REFINE_STEPS, Sampling};
pub use size::Size;

use crate::backbone::{Backbone, Step};
use crate::error::{Error, Kind, Result};
use next_input::NextInput;
use sampler::{Fault, SampleParams};

/// Draws the codes of images, coarse to fine: the next-scale loop. Returns the codes of every scale
/// of every image.
///
/// In the paper's terms an image is r_1, ..., r_K, the code maps of its K scales; f_hat_k is the
/// sum of the code features of r_1 to r_k, resampled to one grid. The loop samples r_k ~
/// p(r_k | prompt, r_1, ..., r_k-1), all codes of a scale at once.
///
/// - `rows` are the sequences of the batch: a conditional one per image and, with guidance, as many
///   unconditional ones, read up to the token that opens the image; `hidden` are the states of that
///   token, (R, 1, hidden), which predict r_1.
/// - Each later scale is one forward pass over its grid against the KV cache, without a mask.
/// - Once guidance ends, the loop goes on with the conditional rows.
/// - On a GPU with a sampling kernel all scales are queued without synchronising.
pub fn draw_codes(
    mut rows: impl Sequences,
    mut hidden: Tensor,
    mut input: NextInput,
    batch: Batch,
    observe: Observer,
) -> Result<Vec<ImageCodes>> {
    let Batch { scales, sampling, seeds } = batch;
    let drawn = sampling.drawn(scales.len()); // K, less the scales that a draft leaves out
    let mut codes: Vec<Tensor> = Vec::new(); // r_1, ..., r_k
    for (si, &grid) in scales[..drawn].iter().enumerate() {
        if si == sampling.guided_scales(scales.len()) {
            rows.drop_unconditional(seeds.len())?; // nothing, if there never were any
        }
        if si > 0 {
            let upsampled = input.next(&codes[si - 1], si)?; // f_hat_k-1, or r_k-1 alone (InputMode), on the grid of r_k
            hidden = rows.forward(si, &upsampled, Step::Scale)?;
        }
        let guidance = sampling.guidance(si, scales.len()); // t of logits = (1 + t) conditional - t unconditional
        let params = SampleParams { sampling, guidance, seeds, scale: si, pass: 0 };
        let sampled = rows.sample(&hidden, &params).map_err(|fault| non_finite(fault, si, grid))?; // r_k
        codes.push(refined(&mut rows, &input, sampled, &params).map_err(|fault| non_finite(fault, si, grid))?);
        notify(observe, Event::Scale { codes: &codes, scales, drawn })?;
    }
    to_host(&codes, scales)
}

/// TokenFlow-t2i only: samples the codes of a scale again in further passes, which see the codes of
/// the pass before.
fn refined(
    rows: &mut impl Sequences,
    input: &NextInput,
    mut sampled: Tensor,
    params: &SampleParams,
) -> std::result::Result<Tensor, Fault> {
    let si = params.scale;
    for pass in 1..params.sampling.passes(si) {
        let hidden = rows.forward(si, &input.with(&sampled, si)?, Step::Again)?;
        let again = rows.sample(&hidden, &SampleParams { pass, ..*params })?;
        sampled = sampler::keep_non_finite(again, &sampled)?;
    }
    Ok(sampled)
}

/// The sequences that a batch is drawn in, as far as they have been read: those of the images'
/// prompts and, with guidance, as many unconditional ones.
pub trait Sequences {
    /// The forward pass of scale `si`: from the features (images, h * w, D) of each image, which
    /// its rows share, to the hidden states (R, h * w, hidden) that predict the scale's codes.
    /// [`Step::Again`] (TokenFlow-t2i only) repeats the pass of a scale with other features and
    /// leaves the cache as it was.
    fn forward(&mut self, si: usize, features: &Tensor, step: Step) -> candle_core::Result<Tensor>;

    /// From here on there is no guidance for the `images`: their unconditional rows are not read
    /// any more.
    fn drop_unconditional(&mut self, images: usize) -> candle_core::Result<()>;

    /// The codes that hidden states (R, T, hidden) of every image predict: (images, T) u32 or
    /// (images, T, bits) u8.
    fn sample(&self, hidden: &Tensor, params: &SampleParams) -> std::result::Result<Tensor, Fault>;
}

/// Draws the codes of images, each after a prompt's prefix and, with guidance, the unconditional
/// one.
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
    notify(observe, Event::Prompt { tokens: prompts.iter().map(|prompt| prompt.ids.len() - 1).sum() })?;
    draw_codes(rows, hidden, input, batch, observe)
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

/// Passes an event on. Errors: interrupted, if the observer breaks.
fn notify(observe: Observer, event: Event) -> Result<()> {
    match observe(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(job::interrupted()),
    }
}

fn non_finite(fault: Fault, scale: usize, (h, w): (usize, usize)) -> Error {
    let position = match fault {
        Fault::NonFinite { position } => position,
        Fault::Tensor(error) => return error.into(),
    };
    let message =
        format!("the model produced numbers that are not finite at scale {} ({h}x{w}), position {position}", scale + 1);
    Error::new(Kind::NonFinite, message).hint("check the weights: --model FOLDER with another checkpoint")
}

#[cfg(test)]
mod tests;
