//! The transformer: candle-transformers' blocks and embeddings in the order of diffusers'
//! `ZImageTransformer2DModel`.
//!
//! candle-transformers' own model is not used as a whole, because it pads otherwise than the one
//! that the weights were trained with: it masks the padding of a text, and pads no image. In
//! diffusers the tokens of text and of the image are each padded to a multiple of 32 with a learned
//! token, which the others attend to.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Linear, RmsNorm, linear, rms_norm};
use candle_transformers::models::z_image::Config;
use candle_transformers::models::z_image::transformer::{
    ADALN_EMBED_DIM, FinalLayer, RopeEmbedder, SEQ_MULTI_OF, TimestepEmbedder, ZImageTransformerBlock,
    create_coordinate_grid, patchify, unpatchify,
};

use super::config::PATCH;
use super::var_builder;
use crate::checkpoint::Weights;

/// Tokens of text, and of an image, are padded to multiples of this.
pub(super) const ROUND: usize = SEQ_MULTI_OF;
/// Width between the two layers that embed the time.
const TIME: usize = 1024;

/// A loaded transformer.
#[derive(Debug)]
pub struct Transformer {
    time: TimestepEmbedder,
    text_norm: RmsNorm,
    text_in: Linear,
    image_in: Linear,
    text_pad: Tensor,
    image_pad: Tensor,
    text_blocks: Vec<ZImageTransformerBlock>,
    image_blocks: Vec<ZImageTransformerBlock>,
    blocks: Vec<ZImageTransformerBlock>,
    last: FinalLayer,
    positions: RopeEmbedder,
    config: Config,
}

/// A prompt that the text blocks have read: it is the same at every time.
#[derive(Debug)]
pub struct Prompt {
    /// (1, tokens, dim), a multiple of 32 tokens.
    tokens: Tensor,
    /// (tokens, 3).
    ids: Tensor,
}

impl Transformer {
    /// Keys as diffusers has them.
    ///
    /// Errors: tensors that are missing or misshapen.
    pub fn load(w: &Weights, config: &Config) -> Result<Self> {
        let vb = var_builder(w, "");
        let (dim, patch) = (config.dim, PATCH * PATCH * config.in_channels);
        let blocks = |name: &str, count: usize, modulated: bool| {
            let vb = vb.pp(name);
            (0..count).map(|i| ZImageTransformerBlock::new(config, modulated, vb.pp(i))).collect::<Result<Vec<_>>>()
        };
        let (axes, lens) = (config.axes_dims.clone(), config.axes_lens.clone());
        Ok(Self {
            time: TimestepEmbedder::new(dim.min(ADALN_EMBED_DIM), TIME, vb.pp("t_embedder"))?,
            text_norm: rms_norm(config.cap_feat_dim, config.norm_eps, vb.pp("cap_embedder.0"))?,
            text_in: linear(config.cap_feat_dim, dim, vb.pp("cap_embedder.1"))?,
            image_in: linear(patch, dim, vb.pp("all_x_embedder.2-1"))?,
            text_pad: vb.get((1, dim), "cap_pad_token")?,
            image_pad: vb.get((1, dim), "x_pad_token")?,
            text_blocks: blocks("context_refiner", config.n_refiner_layers, false)?,
            image_blocks: blocks("noise_refiner", config.n_refiner_layers, true)?,
            blocks: blocks("layers", config.n_layers, true)?,
            last: FinalLayer::new(dim, patch, vb.pp("all_final_layer.2-1"))?,
            positions: RopeEmbedder::new(config.rope_theta, axes, lens, vb.device(), vb.dtype())?,
            config: config.clone(),
        })
    }

    /// Reads the features (tokens, cap_feat_dim) of a prompt.
    pub fn read(&self, features: &Tensor) -> Result<Prompt> {
        let features = features.to_dtype(self.text_pad.dtype())?.unsqueeze(0)?;
        let mut tokens = padded(&self.text_in.forward(&self.text_norm.forward(&features)?)?, &self.text_pad)?;
        // The padding goes on where the text ends.
        let ids = create_coordinate_grid((tokens.dim(1)?, 1, 1), (1, 0, 0), tokens.device())?;
        let (cos, sin) = self.positions.forward(&ids)?;
        for block in &self.text_blocks {
            tokens = block.forward(&tokens, None, &cos, &sin, None)?;
        }
        Ok(Prompt { tokens, ids })
    }

    /// The velocity towards the picture at latents `x` (1, C, H, W) of the noise level
    /// `sigma`: (1, C, H, W) in the type of `x`.
    pub fn velocity(&self, x: &Tensor, sigma: f64, prompt: &Prompt) -> Result<Tensor> {
        let device = x.device();
        let time = Tensor::new(&[((1.0 - sigma) * self.config.t_scale) as f32], device)?;
        let time = self.time.forward(&time)?;
        let latents = x.to_dtype(self.image_pad.dtype())?.unsqueeze(2)?;
        let (patches, size) = patchify(&latents, PATCH, 1)?;
        let mut image = padded(&self.image_in.forward(&patches)?, &self.image_pad)?;
        let (tokens, text) = (image.dim(1)?, prompt.tokens.dim(1)?);
        let grid = create_coordinate_grid((1, size.1 / PATCH, size.2 / PATCH), (text + 1, 0, 0), device)?;
        let ids = match tokens - grid.dim(0)? {
            0 => grid,
            // The padding is at the origin.
            more => Tensor::cat(&[&grid, &grid.zeros_like()?.narrow(0, 0, 1)?.repeat((more, 1))?], 0)?,
        };
        let (cos, sin) = self.positions.forward(&ids)?;
        for block in &self.image_blocks {
            image = block.forward(&image, None, &cos, &sin, Some(&time))?;
        }
        let (cos, sin) = self.positions.forward(&Tensor::cat(&[&ids, &prompt.ids], 0)?)?;
        let mut both = Tensor::cat(&[&image, &prompt.tokens], 1)?;
        for block in &self.blocks {
            both = block.forward(&both, None, &cos, &sin, Some(&time))?;
        }
        let image = self.last.forward(&both.narrow(1, 0, tokens)?.contiguous()?, &time)?;
        unpatchify(&image, size, PATCH, 1, self.config.in_channels)?.squeeze(2)?.to_dtype(x.dtype())
    }
}

/// Tokens (1, T, dim) with as many `pad` (1, dim) behind them as make a multiple of 32.
fn padded(tokens: &Tensor, pad: &Tensor) -> Result<Tensor> {
    let (_, count, dim) = tokens.dims3()?;
    match count.next_multiple_of(ROUND) - count {
        0 => Ok(tokens.clone()),
        more => Tensor::cat(&[tokens, &pad.unsqueeze(0)?.broadcast_as((1, more, dim))?.contiguous()?], 1),
    }
}
