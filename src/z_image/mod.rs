//! Z-Image-Turbo as a refiner of pictures: image-to-image over the last passes of its flow, as
//! diffusers' `ZImageImg2ImgPipeline` without guidance.
//!
//! The networks are candle-transformers', on our checked weights. [`TextEncoder`] reads the prompt
//! and is dropped before [`ZImage`], transformer and autoencoder, is loaded.

mod config;
mod fit;
mod schedule;
mod text;
mod transformer;
mod vae;

use std::ops::ControlFlow;

use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use image::RgbImage;

pub use config::{
    DTYPE, INDEX, MAX_TOKENS, MULTIPLE, SMALLEST, TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE, ZImageConfig, check_class,
    is_whole, no_refiner,
};
pub use fit::Memory;
pub use schedule::{STEPS, Schedule};
pub use text::{Template, TextEncoder};
pub use transformer::{Prompt, Transformer};
pub use vae::Vae;

use crate::checkpoint::{Init, Source, Weights};
use crate::error::Result;
use crate::pixels;
use crate::rng::{Rng, Stream};

/// The model on the hub.
pub const HUB: &str = "Tongyi-MAI/Z-Image-Turbo";

/// Called after every pass with the number of passes so far and of all passes; `Break` stops.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

/// Transformer and autoencoder.
#[derive(Debug)]
pub struct ZImage {
    transformer: Transformer,
    vae: Vae,
    schedule: Schedule,
    channels: usize,
    device: Device,
}

impl ZImage {
    /// Loads both, the transformer with weights as `dtype`.
    ///
    /// Errors: files that are missing, broken, or do not fit.
    pub fn load(source: &Source, config: &ZImageConfig, dtype: DType, device: &Device) -> Result<Self> {
        let build = |w: &Weights| Transformer::load(w, &config.transformer);
        let transformer = source.load(TRANSFORMER, dtype, device, build)?;
        Ok(Self::new(config, transformer, Vae::from_source(source, config, device)?, device))
    }

    /// One with random weights.
    pub fn synthetic(config: &ZImageConfig, dtype: DType, device: &Device) -> Result<Self> {
        let transformer = Transformer::load(&Weights::synthetic(dtype, device), &config.transformer)?;
        let vae = Vae::load(&Weights::synthetic(DType::F32, device), &config.vae)?;
        Ok(Self::new(config, transformer, vae, device))
    }

    fn new(config: &ZImageConfig, transformer: Transformer, vae: Vae, device: &Device) -> Self {
        let (schedule, channels) = (config.schedule, config.vae.latent_channels);
        Self { transformer, vae, schedule, channels, device: device.clone() }
    }

    /// The transformer.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// The autoencoder.
    pub fn vae(&self) -> &Vae {
        &self.vae
    }

    /// Refines a picture whose sides are multiples of [`MULTIPLE`]. `features` (tokens, width) say
    /// what it shows, `strength` in (0, 1] how much of it is drawn anew, and `seed` decides the
    /// noise. `None` if `progress` breaks.
    ///
    /// Errors: [`crate::error::Kind::NonFinite`] for pixels that are not finite.
    pub fn refine(
        &self,
        picture: &RgbImage,
        features: &Tensor,
        (strength, seed): (f64, u64),
        progress: Progress,
    ) -> Result<Option<RgbImage>> {
        let (width, height) = picture.dimensions();
        let x = pixels::to_tensor(&[picture.as_raw()], height as usize, width as usize, &self.device)?;
        let shape = (1, self.channels, x.dim(2)? / 8, x.dim(3)? / 8);
        let noise = |step| {
            let rng = Rng::new(seed, 0, Stream::ImageToImage, step);
            Tensor::from_vec(rng.normals(shape.1 * shape.2 * shape.3), shape, &self.device)
        };
        let latents = self.vae.encode(&x, &noise(0)?)?;
        let sigmas = self.schedule.sigmas(strength);
        let start = with_noise(&latents, &noise(1)?, sigmas[0])?;
        let prompt = self.transformer.read(features)?;
        let Some(latents) = self.denoise(start, &prompt, &sigmas, progress)? else { return Ok(None) };
        pixels::to_image(&self.vae.decode(&latents)?.get(0)?, pixels::TOKENFLOW_GREY).map(Some)
    }

    /// Euler's method from latents `x` (1, C, H, W) at the first of the noise levels to those at the
    /// last one. `None` if `progress` breaks.
    pub fn denoise(
        &self,
        mut x: Tensor,
        prompt: &Prompt,
        sigmas: &[f64],
        progress: Progress,
    ) -> CandleResult<Option<Tensor>> {
        let passes = sigmas.len().saturating_sub(1);
        for (pass, pair) in sigmas.windows(2).enumerate() {
            let velocity = self.transformer.velocity(&x, pair[0], prompt)?;
            x = (x + (velocity * (pair[0] - pair[1]))?)?;
            if progress(pass + 1, passes).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(x))
    }
}

/// Latents at the noise level `sigma`.
pub fn with_noise(latents: &Tensor, noise: &Tensor, sigma: f64) -> CandleResult<Tensor> {
    (noise * sigma)? + (latents * (1.0 - sigma))?
}

/// Our weights as a backend of candle-nn's.
struct Checked {
    weights: Weights,
    /// Left out of the beginning of keys.
    prefix: &'static str,
}

impl SimpleBackend for Checked {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, _: DType, _: &Device) -> CandleResult<Tensor> {
        let init = match shape.dims() {
            [_] => Init::Ones,
            [_, rest @ ..] => Init::Normal { std: (rest.iter().product::<usize>() as f64).powf(-0.5) },
            [] => Init::Zeros,
        };
        self.weights.get(shape, name.strip_prefix(self.prefix).unwrap_or(name), init)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> CandleResult<Tensor> {
        bail!("{name}: a tensor without a shape is not read")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

/// A builder of candle-nn's over weights whose keys lack `prefix`.
fn var_builder(w: &Weights, prefix: &'static str) -> VarBuilder<'static> {
    let checked = Checked { weights: w.clone(), prefix };
    VarBuilder::from_backend(Box::new(checked), w.dtype(), w.device().clone())
}
