//! The block: grouped-query attention and SwiGLU, each with an RMSNorm before it (Qwen2.5) or behind it (TokenFlow-t2i).

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{BackboneConfig, Cache, NormPlacement, Rope};
use crate::checkpoint::{Init, Weights};
use crate::ops::{self, Mask, WeightMatrix};

/// What new tokens are to the sequence in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Text: each sees itself and what is before it.
    Text,
    /// A scale: each sees all of it and what is before it.
    Scale,
    /// Another pass over the last scale: seen in the place of the scale as it was first read, which stays in the cache.
    Again,
}

/// What the tokens of a forward pass may attend to.
#[derive(Debug)]
pub enum Context<'a> {
    /// A whole sequence at once; mask u8 (T, T) or (R, T, T), 1 where a query may attend to a key.
    Masked(&'a Tensor),
    /// Everything in the cache of the same row, and among the new tokens what `step` says.
    Cached {
        /// Of every row; they grow by the new tokens, but for another pass.
        caches: &'a mut [Cache],
        /// What the new tokens are.
        step: Step,
    },
}

impl Context<'_> {
    /// Moves the lengths on by `tokens`, once every layer has written them.
    pub(super) fn finish(self, tokens: usize) {
        match self {
            Context::Masked(_) | Context::Cached { step: Step::Again, .. } => {}
            Context::Cached { caches, .. } => caches.iter_mut().for_each(|cache| cache.advance(tokens)),
        }
    }

    fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
        match self {
            Context::Masked(mask) => ops::attention(q, k, v, Mask::Kept(mask), scale),
            Context::Cached { caches, step } => {
                let attend = |(r, cache): (usize, &Cache)| {
                    let (q, k, v) = (q.narrow(0, r, 1)?, k.narrow(0, r, 1)?, v.narrow(0, r, 1)?);
                    let (keys, values) = match step {
                        Step::Text | Step::Scale => cache.append(layer, &k, &v)?,
                        Step::Again => cache.with_last(layer, &k, &v)?,
                    };
                    let mask = if *step == Step::Text { Mask::Causal } else { Mask::None };
                    ops::attention(&q, &keys, &values, mask, scale)
                };
                let outputs: Vec<Tensor> = match q.device().is_cpu() {
                    true => caches.par_iter().enumerate().map(attend).collect::<Result<_>>()?,
                    false => caches.iter().enumerate().map(attend).collect::<Result<_>>()?,
                };
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
    weight: WeightMatrix,
    bias: Option<Tensor>,
}

impl Linear {
    fn load(w: &Weights, from: usize, to: usize, bias: bool, init: Init) -> Result<Self> {
        let bias = if bias { Some(w.get(to, "bias", Init::Zeros)?) } else { None };
        Ok(Self { weight: w.matrix((to, from), "weight", init)?, bias })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.linear(x, self.bias.as_ref())
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Block {
    norm_placement: NormPlacement,
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    /// Over the channels of every head of queries and keys.
    qk_norm: Option<(RmsNorm, RmsNorm)>,
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
        let qk_norm = |eps: f64| -> Result<_> {
            let load = |name: &str| RmsNorm::load(&attn.pp("qknorm").pp(name), head_dim, eps);
            Ok((load("query_norm")?, load("key_norm")?))
        };
        Ok(Self {
            norm_placement: c.norm_placement,
            input_layernorm: RmsNorm::load(&w.pp("input_layernorm"), hidden, c.rms_norm_eps)?,
            q_proj: Linear::load(&attn.pp("q_proj"), hidden, queries, c.qkv_bias, normal(hidden))?,
            k_proj: Linear::load(&attn.pp("k_proj"), hidden, keys, c.qkv_bias, normal(hidden))?,
            v_proj: Linear::load(&attn.pp("v_proj"), hidden, keys, c.qkv_bias, normal(hidden))?,
            qk_norm: c.qk_norm_eps.map(qk_norm).transpose()?,
            o_proj: Linear::load(&attn.pp("o_proj"), queries, hidden, false, closing(queries))?,
            post_attention_layernorm: RmsNorm::load(&w.pp("post_attention_layernorm"), hidden, c.rms_norm_eps)?,
            gate_proj: Linear::load(&mlp.pp("gate_proj"), hidden, inner, false, normal(hidden))?,
            up_proj: Linear::load(&mlp.pp("up_proj"), hidden, inner, false, normal(hidden))?,
            down_proj: Linear::load(&mlp.pp("down_proj"), inner, hidden, false, closing(inner))?,
            head_dim,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        let (first, second) = (&self.input_layernorm, &self.post_attention_layernorm);
        match self.norm_placement {
            NormPlacement::Input => {
                let x = ops::add(x, &self.attention(&first.forward(x)?, rope, layer, context)?)?;
                ops::add(&x, &self.mlp(&second.forward(&x)?)?)
            }
            NormPlacement::Output => {
                let x = ops::add(x, &first.forward(&self.attention(x, rope, layer, context)?)?)?;
                ops::add(&x, &second.forward(&self.mlp(&x)?)?)
            }
        }
    }

    fn attention(&self, x: &Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        let (rows, tokens, _) = x.dims3()?;
        let heads = |l: &Linear| l.forward(x)?.reshape((rows, tokens, (), self.head_dim));
        let [mut q, mut k, v] = match x.device().is_cpu() {
            // Keys and values of a few heads are too little for all threads.
            true => {
                let pair = || rayon::join(|| heads(&self.k_proj), || heads(&self.v_proj));
                let (q, (k, v)) = rayon::join(|| heads(&self.q_proj), pair);
                [q?, k?, v?]
            }
            false => [heads(&self.q_proj)?, heads(&self.k_proj)?, heads(&self.v_proj)?],
        };
        if let Some((query_norm, key_norm)) = &self.qk_norm {
            (q, k) = (query_norm.forward(&q)?, key_norm.forward(&k)?);
        }
        let (q, k) = (ops::rope(&q, &rope.cos, &rope.sin)?, ops::rope(&k, &rope.cos, &rope.sin)?);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let attended = context.attend(layer, &q, &k, &v, scale)?;
        self.o_proj.forward(&attended.reshape((rows, tokens, ()))?)
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        self.down_proj.forward(&ops::gated_linear(x, &self.gate_proj.weight, &self.up_proj.weight)?)
    }
}
