//! The autoencoder: candle-transformers' halves, with noise of our own, for theirs has no seed.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_transformers::models::z_image::VaeConfig;
use candle_transformers::models::z_image::vae::{Decoder, Encoder};

use super::config::{VAE, ZImageConfig};
use super::var_builder;
use crate::checkpoint::{Source, Weights};
use crate::error::{self, Error};

/// A loaded autoencoder, in f32.
#[derive(Debug)]
pub struct Vae {
    encoder: Encoder,
    decoder: Decoder,
    scale: f64,
    shift: f64,
}

impl Vae {
    pub(super) fn load(w: &Weights, config: &VaeConfig) -> Result<Self> {
        let vb = var_builder(w, "");
        Ok(Self {
            encoder: Encoder::new(config, vb.pp("encoder"))?,
            decoder: Decoder::new(config, vb.pp("decoder"))?,
            scale: config.scaling_factor,
            shift: config.shift_factor,
        })
    }

    /// Checks that [`Vae::from_source`] can load the file, by its header.
    ///
    /// Errors: those of [`Vae::from_source`].
    pub fn check(source: &Source, config: &ZImageConfig) -> error::Result<()> {
        if source.has_tensor(VAE, "quant_conv.weight")? {
            return Err(Error::model(format!("{VAE} of {source} is of another model: it has a quant_conv"))
                .hint(format!("copy the folder vae of {} again", super::HUB)));
        }
        source.check(VAE, |w| Self::load(w, &config.vae))
    }

    /// Loads it from a model folder.
    ///
    /// Errors: a file that is missing, broken, or does not fit.
    pub fn from_source(source: &Source, config: &ZImageConfig, device: &Device) -> error::Result<Self> {
        source.load(VAE, DType::F32, device, |w| Self::load(w, &config.vae))
    }

    /// Latents (1, C, H / 8, W / 8) of pixels (1, 3, H, W) in [-1, 1], drawn from their posterior by
    /// `noise`, standard normals of their shape, as diffusers does by default.
    pub fn encode(&self, pixels: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let moments = self.encoder.forward(pixels)?.chunk(2, 1)?;
        let deviation = (moments[1].clamp(-30f32, 20f32)? * 0.5)?.exp()?;
        ((&moments[0] + (deviation * noise)?)? - self.shift)? * self.scale
    }

    /// Pixels (1, 3, H, W) around [-1, 1] of latents (1, C, H / 8, W / 8).
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder.forward(&((latents / self.scale)? + self.shift)?)
    }
}
