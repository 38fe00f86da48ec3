//! From a prompt to an image: schedules, guidance, sampling and the next-scale loop.

pub mod inputs;
mod model;
pub mod sampler;
pub mod schedule;

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};

pub use model::{Model, ModelConfig};

use crate::backbone::sequence::Layout;
use crate::backbone::{Backbone, Cache, Context, Position, Rope};
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Quantizer;
use inputs::NextInput;

/// How codes are drawn from the logits.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Guidance at the last scale; it ramps up from 0 at the first (VAR). 0 turns guidance off.
    pub cfg: f64,
    /// 0 means argmax.
    pub temperature: f64,
    /// Keep the k likeliest codes.
    pub top_k: Option<usize>,
    /// Keep the smallest set of codes whose probabilities sum to p; 1 keeps all.
    pub top_p: f64,
}

/// One image to draw.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to draw, as plain text.
    pub prompt: String,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// How codes are drawn.
    pub sampling: Sampling,
    /// Decides all randomness of the image.
    pub seed: u64,
}

/// What happens while an image is drawn. An observer that answers `Break` stops the drawing.
#[derive(Debug)]
pub enum Event<'a> {
    /// The prompt was read.
    Prompt {
        /// Text tokens in the prompt.
        tokens: usize,
    },
    /// The codes of one more scale are known.
    Scale {
        /// Codes of every scale so far, coarse to fine, each row-major.
        codes: &'a [Vec<u32>],
        /// All grids of the image.
        scales: &'a [(usize, usize)],
    },
    /// All codes are known; pixels come next.
    Decode,
}

/// Called with every [`Event`].
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// Draws the codes of one image, coarse to fine: the next-scale loop.
///
/// With guidance the batch has two rows, the prompt's and that of an empty prompt; each scale is one forward pass over
/// its grid against the cache, without a mask. The 1x1 code is predicted by `<boi>`, the codes of every later scale by
/// the upsampled codes of the scale before it.
pub fn draw_codes(
    backbone: &Backbone,
    quantizer: &Quantizer,
    prompt: &[u32],
    job: &Job,
    observe: Observer,
) -> Result<Vec<Vec<u32>>> {
    let (scales, sampling) = (&job.scales, &job.sampling);
    let prompts: &[&[u32]] = if sampling.cfg > 0.0 { &[prompt, &[]] } else { &[prompt] };
    let capacity = prompt.len() + 1 + schedule::codes(scales);
    let mut cache = Cache::new(backbone.config(), prompts.len(), capacity, backbone.dtype(), backbone.device())?;
    let mut layouts = Vec::new();
    let mut hidden = Vec::new();
    for (row, prompt) in prompts.iter().enumerate() {
        let layout = image_layout(backbone, prompt.len(), scales);
        hidden.push(prefill(backbone, prompt, &layout, &mut cache, row)?);
        layouts.push(layout);
    }
    tell(observe, Event::Prompt { tokens: prompt.len() })?;
    let mut hidden = Tensor::cat(&hidden, 0)?;
    let mut input = NextInput::new(backbone.config().input_mode);
    let mut codes: Vec<Vec<u32>> = Vec::new();
    for (si, &(h, w)) in scales.iter().enumerate() {
        if si > 0 {
            let features = input.next(quantizer, &codes[si - 1], scales[si - 1], (h, w));
            let features = Tensor::from_vec(features, (1, h * w, backbone.config().code_dim), backbone.device())?;
            let x = backbone.embed_codes(&features.to_dtype(backbone.dtype())?, si, scales.len())?;
            let x = x.broadcast_as((prompts.len(), h * w, backbone.config().hidden_size))?.contiguous()?;
            let rope = rope_at(backbone, &layouts, &cache, h * w)?;
            hidden = backbone.forward(&x, &rope, Context::Cached { cache: &mut cache, first: 0, causal: false })?;
        }
        let logits = backbone.code_logits(&hidden)?.to_dtype(DType::F32)?;
        let logits = guide(&logits, sampling.cfg * si as f64 / (scales.len() - 1).max(1) as f64)?;
        codes.push(sampler::sample(&logits, sampling, job.seed, si).map_err(|e| non_finite(e, si, (h, w)))?);
        tell(observe, Event::Scale { codes: &codes, scales })?;
    }
    Ok(codes)
}

/// VAR's guidance: (1 + t) conditional - t unconditional; logits (R, T, codes) -> (T, codes).
fn guide(logits: &Tensor, t: f64) -> Result<Tensor> {
    let conditional = logits.get(0)?;
    if logits.dim(0)? == 1 || t == 0.0 {
        return Ok(conditional);
    }
    Ok(((conditional * (1.0 + t))? - (logits.get(1)? * t)?)?)
}

fn image_layout(backbone: &Backbone, prompt: usize, scales: &[(usize, usize)]) -> Layout {
    let mut layout = Layout::new();
    layout.push_text(prompt);
    layout.push_image(scales, backbone.config().spatial_extent);
    layout
}

/// Reads the prompt and `<boi>` into a row of the cache; the hidden state of `<boi>`, (1, 1, hidden).
fn prefill(backbone: &Backbone, prompt: &[u32], layout: &Layout, cache: &mut Cache, row: usize) -> Result<Tensor> {
    let ids: Vec<u32> = prompt.iter().copied().chain([backbone.config().boi()]).collect();
    let tokens = ids.len();
    let x = backbone.embed_text(&Tensor::from_vec(ids, (1, tokens), backbone.device())?)?;
    let rope = Rope::new(backbone.config(), &[&layout.positions[..tokens]], backbone.device())?;
    let hidden = backbone.forward(&x, &rope, Context::Cached { cache, first: row, causal: true })?;
    Ok(hidden.narrow(1, tokens - 1, 1)?.contiguous()?)
}

/// Rotations of `tokens` tokens of each row, from its position in the cache on.
fn rope_at(backbone: &Backbone, layouts: &[Layout], cache: &Cache, tokens: usize) -> Result<Rope> {
    let rows: Vec<&[Position]> =
        layouts.iter().enumerate().map(|(row, l)| &l.positions[cache.len(row)..][..tokens]).collect();
    Ok(Rope::new(backbone.config(), &rows, backbone.device())?)
}

fn tell(observe: &mut dyn FnMut(Event) -> ControlFlow<()>, event: Event) -> Result<()> {
    match observe(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "interrupted")),
    }
}

fn non_finite(error: sampler::NonFinite, scale: usize, (h, w): (usize, usize)) -> Error {
    let sampler::NonFinite { position } = error;
    let message = format!("the model gave no finite numbers at scale {} ({h}x{w}), position {position}", scale + 1);
    Error::new(Kind::NonFinite, message).hint("check the weights: nextflow gen --model FOLDER with another checkpoint")
}

#[cfg(test)]
mod tests;
