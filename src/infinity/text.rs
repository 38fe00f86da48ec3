//! The prompt as the transformer's condition: features of its tokens for cross-attention, and one
//! vector for everything else.

use candle_core::{DType, Result, Tensor};

use super::InfinityConfig;
use crate::checkpoint::{Init, Weights};
use crate::nn::{Linear, lecun_normal};
use crate::ops::{self, Mask, WeightMatrix};

/// Of the norm of the text encoder's features.
const EPS: f32 = 1e-6;

/// The projections of a text. They run once for an image, in f32 everywhere.
#[derive(Debug)]
pub(super) struct TextProjections {
    norm: Tensor,
    /// One learned query (1, 1, heads, head_dim), which pools a text.
    query: Tensor,
    pool_kv: Linear,
    pool_proj: Linear,
    to_blocks: [Linear; 2],
    /// The learned text of unconditional rows, (max_tokens, text_width).
    unconditional: Tensor,
}

/// A linear layer of f32, whatever the other weights are.
pub(super) fn exact(w: &Weights, from: usize, to: usize) -> Result<Linear> {
    Ok(Linear::new(exact_matrix(w, from, to)?, Some(w.with_dtype(DType::F32).get(to, "bias", Init::Zeros)?)))
}

fn exact_matrix(w: &Weights, from: usize, to: usize) -> Result<WeightMatrix> {
    w.with_dtype(DType::F32).get((to, from), "weight", lecun_normal(from)).map(WeightMatrix::Dense)
}

impl TextProjections {
    pub(super) fn load(w: &Weights, c: &InfinityConfig) -> Result<Self> {
        let w = w.with_dtype(DType::F32);
        let (width, text) = (c.width, c.text_width);
        let pool = w.pp("text_proj_for_sos").pp("ca");
        pool.unused().get(width, "zero_k_bias", Init::Zeros)?;
        let v_bias = pool.get(width, "v_bias", Init::Zeros)?;
        let normal = Init::Normal { std: 1.0 };
        let head_dim = width / c.text_heads;
        let to_blocks = w.pp("text_proj_for_ca");
        Ok(Self {
            norm: w.pp("text_norm").get(text, "weight", Init::Ones)?,
            query: pool.get((1, c.text_heads, head_dim), "mat_q", normal)?.unsqueeze(1)?,
            pool_kv: Linear::new(
                exact_matrix(&pool.pp("mat_kv"), text, 2 * width)?,
                Some(Tensor::cat(&[v_bias.zeros_like()?, v_bias], 0)?),
            ),
            pool_proj: exact(&pool.pp("proj"), width, width)?,
            to_blocks: [exact(&to_blocks.pp(0), text, width)?, exact(&to_blocks.pp(2), width, width)?],
            unconditional: w.get((c.max_tokens, text), "cfg_uncond", normal)?,
        })
    }

    /// The learned text of `tokens` tokens, (tokens, text_width).
    pub(super) fn unconditional(&self, tokens: usize) -> Result<Tensor> {
        self.unconditional.narrow(0, 0, tokens)
    }

    /// The vector of a text (1, C), and what blocks see of it, (1, tokens, C), from its features
    /// (tokens, text_width).
    pub(super) fn forward(&self, features: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = ops::rms_norm(&features.to_dtype(DType::F32)?.unsqueeze(0)?, &self.norm, EPS)?;
        let (_, _, heads, head_dim) = self.query.dims4()?;
        let (tokens, width) = (normed.dim(1)?, heads * head_dim);
        let both = self.pool_kv.forward(&normed)?;
        let half = |i: usize| both.narrow(2, i * width, width)?.contiguous()?.reshape((1, tokens, heads, head_dim));
        let scale = 1.0 / (head_dim as f32).sqrt();
        let pooled = ops::attention(&self.query, &half(0)?, &half(1)?, Mask::None, scale)?.reshape((1, width))?;
        let [first, second] = &self.to_blocks;
        let seen = second.forward(&ops::gelu_tanh(&first.forward(&normed)?)?)?;
        Ok((self.pool_proj.forward(&pooled)?, seen))
    }
}
