//! Self-attention with grouped keys, over a cache or under a mask.

use candle_core::{Result, Tensor};

use super::{BackboneConfig, Cache, Rope};
use crate::checkpoint::{Init, Weights};
use crate::nn::{Linear, RmsNorm, lecun_normal};
use crate::ops::{self, Mask, WeightMatrix};

/// What new tokens are to the sequence in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Text: each token attends to itself and everything before it.
    Text,
    /// A scale: each token attends to all of it and everything before it.
    Scale,
    /// Another pass over the last scale (TokenFlow-t2i): attended to in place of the first pass,
    /// which stays in the cache.
    Again,
}

/// The tokens that a forward pass attends to.
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
    pub(crate) fn finish(self, tokens: usize) {
        match self {
            Context::Masked(_) | Context::Cached { step: Step::Again, .. } => {}
            Context::Cached { caches, .. } => caches.iter_mut().for_each(|cache| cache.advance(tokens)),
        }
    }

    fn attend(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
        match self {
            Context::Masked(mask) => ops::attention(q, k, v, Mask::Kept(mask), scale),
            Context::Cached { caches, step } => {
                let append = |(r, cache): (usize, &Cache)| {
                    let (k, v) = (k.narrow(0, r, 1)?, v.narrow(0, r, 1)?);
                    match step {
                        Step::Text | Step::Scale => cache.append(layer, &k, &v),
                        Step::Again => cache.with_last(layer, &k, &v),
                    }
                };
                let rows: Vec<_> = caches.iter().enumerate().map(append).collect::<Result<_>>()?;
                ops::attention_rows(q, &rows, step.mask(), scale)
            }
        }
    }

    /// The same for heads that are still the product (R, T, (H + 2 KV) D) of a joint projection,
    /// where there is a kernel for that.
    fn attend_projected(
        &self,
        layer: usize,
        (heads, bias): (&Tensor, Option<&Tensor>),
        rope: &Rope,
        scale: f32,
    ) -> Result<Option<Tensor>> {
        let Context::Cached { caches, step: step @ (Step::Text | Step::Scale) } = self else { return Ok(None) };
        let rows: Vec<_> = caches.iter().map(|cache| cache.layer(layer)).collect();
        let Some(q) = ops::project_heads(heads, bias, (&rope.cos, &rope.sin), &rows)? else { return Ok(None) };
        let seen = |cache: &Cache| cache.first(layer, cache.len() + q.dim(1)?);
        let rows: Vec<_> = caches.iter().map(seen).collect::<Result<_>>()?;
        ops::attention_rows(&q, &rows, step.mask(), scale).map(Some)
    }
}

impl Step {
    fn mask(self) -> Mask<'static> {
        if self == Step::Text { Mask::Causal } else { Mask::None }
    }
}

/// Projections of the same numbers.
#[derive(Debug)]
pub(super) enum Projections<const N: usize> {
    /// Each by itself.
    Apart([Linear; N]),
    /// On a GPU: one product of all their rows takes less time than several.
    Joint(Linear, [usize; N]),
}

impl<const N: usize> Projections<N> {
    pub(super) fn new(parts: [Linear; N]) -> Result<Self> {
        let mut weights = Vec::new();
        for part in &parts {
            match part.weight() {
                WeightMatrix::Dense(weight) if weight.device().is_cuda() && !weight.track_op() => weights.push(weight),
                _ => return Ok(Self::Apart(parts)),
            }
        }
        let biases: Vec<&Tensor> = parts.iter().filter_map(Linear::bias).collect();
        let bias = match biases.len() {
            0 => None,
            n if n == N => Some(Tensor::cat(&biases, 0)?),
            _ => return Ok(Self::Apart(parts)),
        };
        let weight = Tensor::cat(&weights, 0)?;
        let mut sizes = [0; N];
        sizes.iter_mut().zip(&weights).for_each(|(size, weight)| *size = weight.dims()[0]);
        Ok(Self::Joint(Linear::new(weight, bias), sizes))
    }
}

/// Attention of a block: projections to heads, and back from them.
#[derive(Debug)]
pub(crate) struct SelfAttention {
    /// Of queries, keys and values.
    qkv_proj: Projections<3>,
    /// Over the channels of every head of queries and keys.
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    o_proj: Linear,
    head_dim: usize,
}

/// Initial weights of a projection to the residual stream, which starts small by depth.
pub(super) fn closing(c: &BackboneConfig, fan_in: usize) -> Init {
    let depth = (2.0 * c.num_hidden_layers as f64).powf(-0.5);
    Init::Normal { std: (fan_in as f64).powf(-0.5) * depth }
}

impl SelfAttention {
    /// Qwen2.5's keys: `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    pub(crate) fn load(w: &Weights, c: &BackboneConfig) -> Result<Self> {
        let (hidden, head_dim) = (c.hidden_size, c.head_dim());
        let (queries, keys) = (c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim);
        let qk_norm = |eps: f64| -> Result<_> {
            let load = |name: &str| RmsNorm::load(&w.pp("qknorm").pp(name), head_dim, eps);
            Ok((load("query_norm")?, load("key_norm")?))
        };
        Ok(Self {
            qkv_proj: Projections::new([
                Linear::load_with(&w.pp("q_proj"), hidden, queries, c.qkv_bias, lecun_normal(hidden))?,
                Linear::load_with(&w.pp("k_proj"), hidden, keys, c.qkv_bias, lecun_normal(hidden))?,
                Linear::load_with(&w.pp("v_proj"), hidden, keys, c.qkv_bias, lecun_normal(hidden))?,
            ])?,
            qk_norm: c.qk_norm_eps.map(qk_norm).transpose()?,
            o_proj: Linear::load_with(&w.pp("o_proj"), queries, hidden, false, closing(c, queries))?,
            head_dim,
        })
    }

    /// Attention over x (R, T, hidden), of the same shape.
    pub(crate) fn forward(&self, x: &Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        self.o_proj.forward(&self.heads(x, rope, layer, context)?)
    }

    /// `residual` plus [`Self::forward`] of x, in the residual's memory where there is a kernel for
    /// that: nothing else may use it.
    pub(crate) fn forward_add(
        &self,
        residual: Tensor,
        x: &Tensor,
        rope: &Rope,
        layer: usize,
        context: &Context,
    ) -> Result<Tensor> {
        self.o_proj.forward_add(residual, &self.heads(x, rope, layer, context)?)
    }

    /// x plus [`Self::forward`] of its norm, as one operation that can be trained; None where there
    /// is none.
    pub(super) fn trained_branch(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        rope: &Rope,
        context: &Context,
    ) -> Result<Option<Tensor>> {
        let (Projections::Apart(layers), None, Context::Masked(mask)) = (&self.qkv_proj, &self.qk_norm, context) else {
            return Ok(None);
        };
        let qkv = layers.each_ref().map(|layer| (layer.weight(), layer.bias()));
        ops::attention_branch(x, norm.parts(), qkv, self.o_proj.weight(), (&rope.cos, &rope.sin), mask, self.head_dim)
    }

    /// What the heads attend to, (R, T, H D).
    fn heads(&self, x: &Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        let (rows, tokens, _) = x.dims3()?;
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let split = |y: Tensor| y.reshape((rows, tokens, (), self.head_dim));
        let [mut q, mut k, v] = match &self.qkv_proj {
            Projections::Apart([q, k, v]) => {
                let layers = [q, k, v].map(|layer| (layer.weight(), layer.bias()));
                let [q, k, v] = ops::linear_each(x, layers)?;
                [split(q)?, split(k)?, split(v)?]
            }
            Projections::Joint(joint, [queries, keys, values]) => {
                let heads = joint.weight().linear(x, None)?;
                let fused = self.qk_norm.is_none().then_some((&heads, joint.bias()));
                let attended = fused.map(|heads| context.attend_projected(layer, heads, rope, scale)).transpose()?;
                if let Some(attended) = attended.flatten() {
                    return attended.reshape((rows, tokens, ()));
                }
                let heads = joint.bias().map_or(Ok(heads.clone()), |bias| heads.broadcast_add(bias))?;
                let part = |first, count| split(heads.narrow(2, first, count)?.contiguous()?);
                [part(0, *queries)?, part(*queries, *keys)?, part(queries + keys, *values)?]
            }
        };
        if let Some((query_norm, key_norm)) = &self.qk_norm {
            (q, k) = (query_norm.forward(&q)?, key_norm.forward(&k)?);
        }
        let (q, k) = (ops::rope(&q, &rope.cos, &rope.sin)?, ops::rope(&k, &rope.cos, &rope.sin)?);
        context.attend(layer, &q, &k, &v, scale)?.reshape((rows, tokens, ()))
    }
}
