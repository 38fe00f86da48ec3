//! Qwen2.5's block: RMSNorm, grouped-query attention with q/k/v bias, RMSNorm, SwiGLU.

use candle_core::{Result, Tensor};

use super::{BackboneConfig, Cache, Rope};
use crate::checkpoint::{Init, Weights};
use crate::ops;

/// What the tokens of a forward pass may attend to.
#[derive(Debug)]
pub enum Context<'a> {
    /// A whole sequence at once; mask u8 (T, T) or (R, T, T), 1 where a query may attend to a key.
    Masked(&'a Tensor),
    /// Everything in the rows from `first` on, and the new tokens themselves: all of them (one scale, no mask), or
    /// only the earlier ones (`causal`: text).
    Cached {
        /// Grows by the new tokens.
        cache: &'a mut Cache,
        /// Row of the cache that belongs to row 0 of the input.
        first: usize,
        /// Each new token sees the new tokens before it and itself only.
        causal: bool,
    },
}

impl Context<'_> {
    /// Moves the lengths of `rows` rows on by `tokens`, once every layer has written them.
    pub(super) fn finish(&mut self, rows: usize, tokens: usize) {
        if let Context::Cached { cache, first, .. } = self {
            cache.advance(*first..*first + rows, tokens);
        }
    }

    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
        match self {
            Context::Masked(mask) => ops::attention(q, k, v, Some(mask), scale),
            Context::Cached { cache, first, causal } => {
                let (rows, tokens) = (q.dim(0)?, q.dim(1)?);
                let outputs = (0..rows)
                    .map(|r| {
                        let (q, k, v) = (q.narrow(0, r, 1)?, k.narrow(0, r, 1)?, v.narrow(0, r, 1)?);
                        let (keys, values) = cache.append(layer, *first + r, &k, &v)?;
                        let mask = if *causal && tokens > 1 {
                            let seen = keys.dim(1)? - tokens;
                            let mask =
                                (0..tokens).flat_map(|i| (0..seen + tokens).map(move |j| u8::from(j <= seen + i)));
                            Some(Tensor::from_iter(mask, q.device())?.reshape((tokens, seen + tokens))?)
                        } else {
                            None
                        };
                        ops::attention(&q, &keys, &values, mask.as_ref(), scale)
                    })
                    .collect::<Result<Vec<_>>>()?;
                Tensor::cat(&outputs, 0)
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(super) fn load(w: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: w.get(size, "weight", Init::Ones)?, eps: eps as f32 })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}

#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn load(w: &Weights, from: usize, to: usize, bias: bool, init: Init) -> Result<Self> {
        let bias = if bias { Some(w.get(to, "bias", Init::Zeros)?) } else { None };
        Ok(Self { weight: w.get((to, from), "weight", init)?, bias })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Block {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    head_dim: usize,
}

impl Block {
    pub(super) fn load(w: &Weights, c: &BackboneConfig) -> Result<Self> {
        let (hidden, inner, head_dim) = (c.hidden_size, c.intermediate_size, c.head_dim());
        let (queries, keys) = (c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim);
        let (attn, mlp) = (w.pp("self_attn"), w.pp("mlp"));
        let normal = |fan_in: usize| Init::Normal { std: (fan_in as f64).powf(-0.5) };
        // The two projections that write to the residual stream start small, by depth.
        let depth = (2.0 * c.num_hidden_layers as f64).powf(-0.5);
        let closing = |fan_in: usize| Init::Normal { std: (fan_in as f64).powf(-0.5) * depth };
        Ok(Self {
            input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden, c.rms_norm_eps)?,
            q_proj: Linear::load(&attn.pp("q_proj"), hidden, queries, true, normal(hidden))?,
            k_proj: Linear::load(&attn.pp("k_proj"), hidden, keys, true, normal(hidden))?,
            v_proj: Linear::load(&attn.pp("v_proj"), hidden, keys, true, normal(hidden))?,
            o_proj: Linear::load(&attn.pp("o_proj"), queries, hidden, false, closing(queries))?,
            post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden, c.rms_norm_eps)?,
            gate_proj: Linear::load(&mlp.pp("gate_proj"), hidden, inner, false, normal(hidden))?,
            up_proj: Linear::load(&mlp.pp("up_proj"), hidden, inner, false, normal(hidden))?,
            down_proj: Linear::load(&mlp.pp("down_proj"), inner, hidden, false, closing(inner))?,
            head_dim,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, rope: &Rope, layer: usize, context: &mut Context) -> Result<Tensor> {
        let (rows, tokens, _) = x.dims3()?;
        let normed = self.input_layernorm.forward(x)?;
        let heads = |l: &Linear| l.forward(&normed)?.reshape((rows, tokens, (), self.head_dim));
        let q = ops::rope(&heads(&self.q_proj)?, &rope.cos, &rope.sin)?;
        let k = ops::rope(&heads(&self.k_proj)?, &rope.cos, &rope.sin)?;
        let v = heads(&self.v_proj)?;
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let attended = context.attend(layer, &q, &k, &v, scale)?;
        let x = (x + self.o_proj.forward(&attended.reshape((rows, tokens, ()))?)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let inner = ops::swiglu(&self.gate_proj.forward(&normed)?, &self.up_proj.forward(&normed)?)?;
        x + self.down_proj.forward(&inner)?
    }
}
