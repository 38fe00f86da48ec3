//! From a prompt to an image: schedules, guidance, sampling and the next-scale loop.

pub mod cost;
pub mod frame;
pub mod inputs;
mod model;
pub mod prompt;
mod rows;
pub mod sampler;
pub mod schedule;
pub mod tokenflow;

use std::ops::ControlFlow;

use candle_core::Tensor;

pub use model::{ConversationConfig, IMAGE_TOKENIZER, Model, ModelConfig, TRANSFORMER};
pub use prompt::{Prefix, PromptConfig};
pub use rows::Rows;

use crate::backbone::Backbone;
use crate::error::{Error, Kind, Result};
use crate::tokenizer::Quantizer;
use inputs::NextInput;
use sampler::{Draw, Filter};

/// Beyond these, logits may not stay finite in f32.
const MAX_CFG: f64 = 1e3;
const MAX_TEMPERATURE: f64 = 1e6;

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
    /// Further passes over every scale but the first, each with a filter of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refine: Vec<Filter>,
    /// The first so many scales are guided; later ones follow the prompt's row alone, in half the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cfg_until: Option<usize>,
    /// So many scales are left out at the end: a draft, of full size but without its finest detail.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub draft: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Default for Sampling {
    /// All codes as the model gives them, without guidance.
    fn default() -> Self {
        Self { cfg: 0.0, temperature: 1.0, top_k: None, top_p: 1.0, refine: Vec::new(), cfg_until: None, draft: 0 }
    }
}

impl Sampling {
    /// The first invalid setting: its name, its value and the rule that it breaks.
    pub fn fault(&self) -> Option<(&'static str, f64, &'static str)> {
        let filters = std::iter::once((self.top_k, self.top_p)).chain(self.refine.iter().map(|f| (f.top_k, f.top_p)));
        let inside = |x: f64, most: f64| (0.0..=most).contains(&x);
        let mut faults = vec![
            (inside(self.cfg, MAX_CFG), ("cfg", self.cfg, "a number from 0 to 1000")),
            (
                inside(self.temperature, MAX_TEMPERATURE),
                ("temperature", self.temperature, "a number from 0 to 1000000"),
            ),
        ];
        for (top_k, top_p) in filters {
            faults.push((top_k != Some(0), ("top-k", 0.0, "1 or more")));
            faults.push((inside(top_p, 1.0) && top_p > 0.0, ("top-p", top_p, "above 0 and at most 1")));
        }
        faults.into_iter().find_map(|(good, fault)| (!good).then_some(fault))
    }

    /// Errors: usage, if the draft leaves none of so many scales.
    pub fn check(&self, scales: usize) -> Result<()> {
        if self.draft < scales {
            return Ok(());
        }
        Err(Error::usage(format!("--draft {} leaves none of the {scales} scales", self.draft)).hint("--draft 1"))
    }

    /// How many of the first scales are guided.
    pub fn guided(&self, scales: usize) -> usize {
        if self.cfg > 0.0 { self.cfg_until.unwrap_or(scales).min(scales) } else { 0 }
    }

    /// Passes over all of so many scales that are drawn.
    pub fn all_passes(&self, scales: usize) -> usize {
        (0..scales.saturating_sub(self.draft)).map(|scale| self.passes(scale)).sum()
    }

    /// Passes over the scale of an index.
    pub fn passes(&self, scale: usize) -> usize {
        if scale == 0 { 1 } else { 1 + self.refine.len() }
    }

    /// Candidates of a pass; the first is pass 0.
    fn filter(&self, pass: usize) -> Filter {
        let first = Filter { top_k: self.top_k, top_p: self.top_p };
        if pass == 0 { first } else { self.refine.get(pass - 1).copied().unwrap_or(first) }
    }
}

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
        /// Codes (images, h * w) u32 of every scale so far, coarse to fine; who reads them waits for them.
        codes: &'a [Tensor],
        /// All grids of the image.
        scales: &'a [(usize, usize)],
    },
    /// All codes were drawn; pixels come next.
    Decode,
}

/// Called with every [`Event`].
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// Draws the codes of images, each behind a prompt's prefix and, with guidance, the unconditional one.
pub fn draw_behind(
    backbone: &Backbone,
    quantizer: &Quantizer,
    prompts: &[Prefix],
    unconditional: &Prefix,
    batch: Batch,
    observe: Observer,
) -> Result<Vec<Vec<Vec<u32>>>> {
    let guides = if batch.sampling.guided(batch.scales.len()) > 0 { prompts.len() } else { 0 };
    let prefixes: Vec<&Prefix> = prompts.iter().chain(std::iter::repeat_n(unconditional, guides)).collect();
    let mut caches = Rows::caches(backbone, &prefixes, batch.scales)?;
    let (rows, hidden) = Rows::start(backbone, &mut caches, &prefixes, batch.scales)?;
    tell(observe, Event::Prompt { tokens: prompts.iter().map(|prompt| prompt.ids.len() - 1).sum() })?;
    draw_codes(rows, hidden, quantizer, batch, observe)
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
    mut rows: Rows,
    mut hidden: Tensor,
    quantizer: &Quantizer,
    batch: Batch,
    observe: Observer,
) -> Result<Vec<Vec<Vec<u32>>>> {
    let Batch { scales, sampling, seeds } = batch;
    let mut input = NextInput::new(rows.backbone().config().input_mode);
    let mut codes: Vec<Tensor> = Vec::new();
    for (si, &grid) in scales[..scales.len().saturating_sub(sampling.draft)].iter().enumerate() {
        if si == sampling.guided(scales.len()) {
            rows.drop_unconditional(seeds.len());
        }
        if si > 0 {
            hidden = rows.read(si, &input.next(quantizer, &codes[si - 1], scales[si - 1], grid)?, false)?;
        }
        let guidance = sampling.cfg * si as f64 / (scales.len() - 1).max(1) as f64;
        let mut drawn = None;
        for pass in 0..sampling.passes(si) {
            if let Some(drawn) = &drawn {
                hidden = rows.read(si, &input.with(quantizer, drawn)?, true)?;
            }
            let draw = Draw { sampling, guidance, seeds, scale: si, pass };
            let codes = rows.draw(&hidden, &draw).map_err(|fault| non_finite(fault, si, grid))?;
            drawn = Some(sampler::with_marks(codes, drawn.as_ref())?);
        }
        codes.extend(drawn);
        tell(observe, Event::Scale { codes: &codes, scales })?;
    }
    home(&codes, scales)
}

/// Codes (images, h * w) of every scale, image by image.
fn home(codes: &[Tensor], scales: &[(usize, usize)]) -> Result<Vec<Vec<Vec<u32>>>> {
    let mut images = Vec::new();
    for (si, codes) in codes.iter().enumerate() {
        let codes = codes.to_vec2::<u32>()?;
        images.resize(codes.len(), Vec::new());
        for (image, codes) in images.iter_mut().zip(codes) {
            if let Some(position) = codes.iter().position(|&code| code == sampler::NON_FINITE) {
                return Err(non_finite(sampler::Fault::NonFinite { position }, si, scales[si]));
            }
            image.push(codes);
        }
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
    let message = format!("the model gave no finite numbers at scale {} ({h}x{w}), position {position}", scale + 1);
    Error::new(Kind::NonFinite, message).hint("check the weights: --model FOLDER with another checkpoint")
}

#[cfg(test)]
mod tests;
