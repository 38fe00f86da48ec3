//! The decoder-only transformer: its blocks, rotary positions, and the input and output layers for
//! image codes. NextFlow, TokenFlow-t2i and Qwen2.5-VL are configurations of it.

mod attention;
mod block;
mod cache;
mod code_embedding;
mod config;
mod layout;
pub mod presets;
pub mod rope;
pub mod rope_scaling;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

pub(crate) use attention::SelfAttention;
pub use attention::{Context, Step};
pub(crate) use block::SwiGlu;
pub use cache::Cache;
pub use config::{BackboneConfig, InputMode, NormPlacement, Vocabulary};
pub use layout::Layout;
pub use rope::{Position, Rope};
pub use rope_scaling::RopeScaling;

use crate::checkpoint::{Init, Weights};
use crate::nn::RmsNorm;
use crate::ops::WeightMatrix;
use block::Block;
use code_embedding::CodeEmbedding;

/// With fewer tokens a row, reading the weights takes longer than multiplying with them: then once
/// for all rows.
const APART: usize = 24;

/// A loaded transformer. It holds no state: the keys and values of a sequence are in its [`Cache`].
#[derive(Debug)]
pub struct Backbone {
    embed_tokens: WeightMatrix,
    layers: Vec<Block>,
    norm: RmsNorm,
    /// The rows of the head for text tokens and, with markers, for `<boi>`, (tokens, hidden).
    text_head: WeightMatrix,
    /// Those for codes, (codes, hidden); nothing in a model of text alone.
    code_head: Option<WeightMatrix>,
    /// Nothing in a model of text alone.
    image: Option<CodeEmbedding>,
    config: BackboneConfig,
    device: Device,
}

impl Backbone {
    /// Qwen2.5-VL's keys: `model.embed_tokens`, `model.layers.N`, `model.norm` and `lm_head`, where
    /// it is not tied. With codes also a connector and tables (the README lists their keys).
    pub fn load(w: &Weights, config: &BackboneConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        let hidden = config.hidden_size;
        let model = w.pp("model");
        let embed_tokens =
            model.pp("embed_tokens").matrix((config.embedding_rows(), hidden), "weight", Init::Normal { std: 0.5 })?;
        let layers = (0..config.num_hidden_layers).map(|i| Block::load(&model.pp("layers").pp(i), config));
        let layers = layers.collect::<Result<_>>()?;
        let norm = RmsNorm::load(&model.pp("norm"), hidden, config.rms_norm_eps)?;
        // Without the rows before the codes if they are tied to `embed_tokens`.
        let head = || w.pp("lm_head").matrix((config.head_rows(), hidden), "weight", Init::Normal { std: 0.02 });
        let lm_head = if config.head_rows() > 0 { head()? } else { embed_tokens.clone() };
        let (words, codes) = (config.first_code().min(config.vocab_size + 1), config.codebook_size);
        let first = if config.tie_word_embeddings { 0 } else { config.first_code() };
        Ok(Self {
            layers,
            norm,
            text_head: if config.tie_word_embeddings { &embed_tokens } else { &lm_head }.narrow(0, words)?,
            code_head: (codes > 0).then(|| lm_head.narrow(first, codes)).transpose()?,
            embed_tokens,
            image: (config.codebook_size > 0).then(|| CodeEmbedding::load(&model, config)).transpose()?,
            config: config.clone(),
            device: w.device().clone(),
        })
    }

    /// Shape and choices.
    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.dtype()
    }

    /// Text ids, `<boi>` and `<eoi>` among them: (R, T) u32 -> (R, T, hidden).
    pub fn embed_text(&self, ids: &Tensor) -> Result<Tensor> {
        let (rows, tokens) = ids.dims2()?;
        let x = self.embed_tokens.select(&ids.flatten_all()?)?.reshape((rows, tokens, ()))?;
        match &self.image {
            Some(image) => image.text(x),
            None => Ok(x),
        }
    }

    /// Text of which the last token predicts the first code of an image: as
    /// [`Backbone::embed_text`].
    pub fn embed_prefix(&self, ids: &Tensor) -> Result<Tensor> {
        self.image()?.prefix(self.embed_text(ids)?)
    }

    /// Code features that feed scale `index` (0-based) of an image of the grids `scales`:
    /// (R, T, code_dim) -> (R, T, hidden).
    pub fn embed_codes(&self, features: &Tensor, index: usize, scales: &[(usize, usize)]) -> Result<Tensor> {
        let first = scales[..index].iter().map(|(h, w)| h * w).sum();
        self.image()?.codes(features, &[index], scales.len(), Some(first))
    }

    /// As [`Backbone::embed_codes`], for codes of many images of `count` scales at once, each of
    /// which feeds the scale in its place of `indices`: (N, code_dim) -> (N, hidden).
    ///
    /// Errors: a model with code positions.
    pub fn embed_mixed_codes(&self, features: &Tensor, indices: &[usize], count: usize) -> Result<Tensor> {
        self.image()?.codes(features, indices, count, None)
    }

    fn image(&self) -> Result<&CodeEmbedding> {
        self.image.as_ref().ok_or_else(|| candle_core::Error::Msg("the model has no codes of images".into()))
    }

    /// Runs `x` (R, T, hidden) through the blocks and the last norm.
    pub fn forward(&self, x: &Tensor, rope: &Rope, context: Context) -> Result<Tensor> {
        match context {
            Context::Cached { caches, step } if caches.len() > 1 && x.dim(1)? >= APART && self.stays_in_cache() => {
                let row = |(r, cache)| {
                    let context = Context::Cached { caches: std::slice::from_mut(cache), step };
                    self.forward(&x.narrow(0, r, 1)?, &rope.narrow(r, 1)?, context)
                };
                let rows: Vec<Tensor> = caches.par_iter_mut().enumerate().map(row).collect::<Result<_>>()?;
                Tensor::cat(&rows, 0)
            }
            context => {
                // On a GPU the layers write over it.
                let mut y = if x.device().is_cpu() { x.clone() } else { x.copy()? };
                for (i, layer) in self.layers.iter().enumerate() {
                    y = layer.forward(y, rope, i, &context)?;
                }
                context.finish(x.dim(1)?);
                self.norm.forward(&y)
            }
        }
    }

    /// As [`Backbone::forward`] of whole sequences under a mask, for some of the R * T tokens only,
    /// `rows` (N) u32: (N, hidden). The last layer's feed-forward half is computed for no others.
    pub fn forward_selected(&self, x: &Tensor, rope: &Rope, mask: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let context = Context::Masked(mask);
        let mut y = if x.device().is_cpu() { x.clone() } else { x.copy()? };
        let last = self.layers.len() - 1;
        for (i, layer) in self.layers[..last].iter().enumerate() {
            y = layer.forward(y, rope, i, &context)?;
        }
        self.norm.forward(&self.layers[last].forward_selected(y, rope, last, &context, rows)?)
    }

    /// Whether this is a CPU whose caches hold the weights, or nearly. Then threads are better
    /// given a row each than a part of every product: they wait less for each other, and that they
    /// read the weights more than once costs little.
    pub fn stays_in_cache(&self) -> bool {
        const CACHED: usize = 64 << 20;
        self.device.is_cpu() && self.config.parameters() * self.dtype().size_in_bytes() <= CACHED
    }

    /// Code logits, (..., hidden) -> (..., codes): only the head's code rows are computed.
    pub fn code_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.code_head.as_ref();
        head.ok_or_else(|| candle_core::Error::Msg("the model has no codes of images".into()))?.linear(hidden, None)
    }

    /// Logits of text and, with markers, of `<boi>`: (..., hidden) -> (..., vocab or vocab + 1).
    pub fn text_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.text_head.linear(hidden, None)
    }
}

#[cfg(test)]
mod tests;
