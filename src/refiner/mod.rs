//! The diffusion decoder (paper: "optional diffusion decoder"): from an image's codes and its
//! caption to a sharper picture of twice the size.
//!
//! The condition has two branches that are never mixed. The visual one is what the tokenizer makes
//! of the codes: its picture, the code embeddings and the decoded semantic features (`condition`).
//! The text one is the caption, encoded by a small transformer (`caption`) that the U-Net (`unet`)
//! attends to. Noise becomes the picture along a rectified flow (`flow`).

mod caption;
mod condition;
mod config;
mod flow;
mod layers;
mod unet;

use std::ops::ControlFlow;

use candle_core::{Result, Tensor};

pub use caption::Captions;
pub use condition::{Condition, fold, unfold};
pub use config::{CaptionConfig, RefinerConfig};
pub use flow::Time;

use crate::checkpoint::Weights;
use crate::rng::Rng;
use caption::CaptionEncoder;
use unet::Unet;

/// Called after every step with the number of steps so far and of all steps; `Break` stops.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

/// A loaded diffusion decoder.
#[derive(Debug)]
pub struct Refiner {
    captions: CaptionEncoder,
    unet: Unet,
    config: RefinerConfig,
}

impl Refiner {
    /// Keys `caption` and `unet`.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`RefinerConfig::check`] refuses.
    pub fn load(w: &Weights, config: &RefinerConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        Ok(Self {
            captions: CaptionEncoder::load(&w.pp("caption"), config)?,
            unet: Unet::load(&w.pp("unet"), config)?,
            config: config.clone(),
        })
    }

    /// Shape and settings.
    pub fn config(&self) -> &RefinerConfig {
        &self.config
    }

    /// The picture that the network sees in noisy ones `z` (B, T, out), folded, at times `t`: the
    /// prediction of the noiseless picture, folded.
    pub fn predict(&self, z: &Tensor, t: &[f32], condition: &Condition, captions: &Captions) -> Result<Tensor> {
        let text = self.captions.forward(captions)?;
        self.unet.forward(z, t, condition, &text)
    }

    /// Refines a batch in so many steps: pixels (B, 3, H, W) around [-1, 1], twice as many on each
    /// side as the condition's picture has. The noise of an image is that of its `rng`. `None` if
    /// `progress` breaks.
    pub fn refine(
        &self,
        condition: &Condition,
        captions: &Captions,
        rngs: &[Rng],
        steps: usize,
        progress: Progress,
    ) -> Result<Option<Tensor>> {
        let text = self.captions.forward(captions)?;
        let (h, w) = condition.grid();
        let noise = flow::noise(rngs, (h * w, self.config.patch * self.config.patch * 3), condition.device())?;
        let predict = |z: &Tensor, t: f32| self.unet.forward(z, &vec![t; rngs.len()], condition, &text);
        let start = (condition.base() + (noise * self.config.noise)?)?;
        let Some(folded) = flow::integrate(start, steps, predict, progress)? else { return Ok(None) };
        unfold(&folded, (h, w), self.config.patch).map(Some)
    }
}

#[cfg(test)]
mod tests;
