//! The block: self-attention by cosines, cross-attention to the text, and an MLP, with adaptive
//! layer norms (AdaLN).

use candle_core::{DType, Result, Tensor};

use super::{InfinityConfig, rope};
use crate::backbone::{Cache, Rope};
use crate::checkpoint::{Init, Weights};
use crate::nn::{Linear, lecun_normal};
use crate::ops::{self, Mask};

/// Of every layer norm.
pub(super) const EPS: f64 = 1e-6;

/// The logarithm of the largest factor of a head's cosines.
const MAX_LOG_SCALE: f64 = 4.605_170_185_988_092; // ln 100

/// Keys and values of a text, (1, tokens, heads, head_dim) each.
pub(super) type Text = (Tensor, Tensor);

/// Inputs of a block beside its tokens.
pub(super) struct Seen<'a> {
    /// Angles of the new tokens, the same in all rows.
    pub(super) rope: &'a Rope,
    /// Keys and values of the scales before, of every row.
    pub(super) caches: &'a [Cache],
    /// Whether those of the new tokens are written after them.
    pub(super) keep: bool,
    /// Of every row.
    pub(super) text: &'a [Text],
}

#[derive(Debug)]
pub(super) struct Block {
    /// Added to the prompt's values for all blocks: gates, scales and shifts (6, C).
    ada: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Of every head, (heads, 1): what its cosines are multiplied with.
    scales: Tensor,
    /// What makes an RMS norm over a head one by its length.
    unit: Tensor,
    proj: Linear,
    cross_norm: (Tensor, Tensor),
    cross_q: Linear,
    cross_kv: Linear,
    cross_proj: Linear,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl Block {
    pub(super) fn load(w: &Weights, c: &InfinityConfig) -> Result<Self> {
        let (width, d) = (c.width, c.head_dim());
        let (sa, ca, ffn, plain) = (w.pp("sa"), w.pp("ca"), w.pp("ffn"), w.with_dtype(DType::F32));
        let linear = |w: Weights, from: usize, to: usize| Linear::load(&w, from, to);
        // Stored, all zero, and never added.
        sa.unused().get(width, "zero_k_bias", Init::Zeros)?;
        ca.unused().get(width, "zero_k_bias", Init::Zeros)?;

        let turned: Vec<u32> = rope::halves(width, d).collect();
        let pairs = [0, width as u32].into_iter().flat_map(|first| turned.iter().map(move |row| first + row));
        let order: Vec<u32> = pairs.chain(2 * width as u32..3 * width as u32).collect();
        let qkv = sa.pp("mat_qkv").matrix((3 * width, width), "weight", lecun_normal(width))?.reordered(&order)?;
        let q_bias =
            sa.get(width, "q_bias", Init::Zeros)?.contiguous()?.index_select(&Tensor::new(turned, w.device())?, 0)?;
        let part = |i: usize, bias: Option<Tensor>| Result::Ok(Linear::new(qkv.narrow(i * width, width)?, bias));
        let shape = if c.heads_first { (1, c.heads, 1, 1) } else { (1, 1, c.heads, 1) };
        let scales = plain.pp("sa").get(shape, "scale_mul_1H11", Init::Ones)?.reshape((c.heads, 1))?;
        let v_bias = ca.get(width, "v_bias", Init::Zeros)?;
        Ok(Self {
            ada: plain.get((1, 1, 6, width), "ada_gss", Init::Normal { std: 0.02 })?.reshape((6, width))?,
            q: part(0, Some(q_bias))?,
            k: part(1, None)?,
            v: part(2, Some(sa.get(width, "v_bias", Init::Zeros)?))?,
            scales: scales.minimum(MAX_LOG_SCALE)?.exp()?,
            unit: Tensor::full((d as f32).powf(-0.5), d, w.device())?.to_dtype(v_bias.dtype())?,
            proj: linear(sa.pp("proj"), width, width)?,
            cross_norm: (
                plain.pp("ca_norm").get(width, "weight", Init::Ones)?,
                plain.pp("ca_norm").get(width, "bias", Init::Zeros)?,
            ),
            cross_q: linear(ca.pp("mat_q"), width, width)?,
            cross_kv: Linear::new(
                ca.pp("mat_kv").matrix((2 * width, width), "weight", lecun_normal(width))?,
                Some(Tensor::cat(&[v_bias.zeros_like()?, v_bias], 0)?),
            ),
            cross_proj: linear(ca.pp("proj"), width, width)?,
            fc1: linear(ffn.pp("fc1"), width, c.mlp)?,
            fc2: linear(ffn.pp("fc2"), c.mlp, width)?,
            heads: c.heads,
        })
    }

    /// Keys and values of a text, of which the projection (1, tokens, C) is given.
    pub(super) fn text(&self, text: &Tensor) -> Result<Text> {
        let (_, tokens, width) = text.dims3()?;
        let both = self.cross_kv.forward(&text.to_dtype(self.unit.dtype())?)?;
        let half = |i: usize| both.narrow(2, i * width, width)?.contiguous()?.reshape((1, tokens, self.heads, ()));
        Ok((half(0)?, half(1)?))
    }

    /// The block's output for x (R, T, C) in f32; `ada` (R, 6, C) are the gates, scales and shifts
    /// of the rows.
    pub(super) fn forward(&self, x: Tensor, layer: usize, ada: &Tensor, seen: &Seen) -> Result<Tensor> {
        let ada = ada.broadcast_add(&self.ada)?;
        let part = |i: usize| ada.narrow(1, i, 1)?.squeeze(1)?.contiguous();
        let [gate_sa, gate_ffn, scale_sa, scale_ffn, shift_sa, shift_ffn] =
            [part(0)?, part(1)?, part(2)?, part(3)?, part(4)?, part(5)?];
        let dtype = self.unit.dtype();

        let y = ops::modulated_norm(&x, &scale_sa, &shift_sa, EPS)?.to_dtype(dtype)?;
        let x = ops::add_gated(&x, &self.proj.forward(&self.attend(&y, layer, seen)?)?, &gate_sa)?;

        let y = ops::layer_norm(&x, &self.cross_norm.0, &self.cross_norm.1, EPS)?.to_dtype(dtype)?;
        let y = self.cross_proj.forward(&self.attend_to_text(&y, seen.text)?)?;
        let x = ops::add(&x, &y.to_dtype(DType::F32)?)?;

        let y = ops::modulated_norm(&x, &scale_ffn, &shift_ffn, EPS)?.to_dtype(dtype)?;
        let y = self.fc2.forward(&ops::gelu_tanh(&self.fc1.forward(&y)?)?)?;
        ops::add_gated(&x, &y, &gate_ffn)
    }

    /// Self-attention over all scales up to this one, (R, T, C).
    fn attend(&self, x: &Tensor, layer: usize, seen: &Seen) -> Result<Tensor> {
        let (rows, tokens, width) = x.dims3()?;
        let layers = [&self.q, &self.k, &self.v].map(|layer| (layer.weight(), layer.bias()));
        let [q, k, v] = ops::linear_each(x, layers)?;
        let heads = |y: Tensor| y.reshape((rows, tokens, self.heads, ()));
        let unit = |y: Tensor| ops::rms_norm(&heads(y)?, &self.unit, f32::MIN_POSITIVE);
        let q = unit(q)?.broadcast_mul(&self.scales.to_dtype(x.dtype())?)?;
        let (cos, sin) = (seen.rope.cos.squeeze(0)?, seen.rope.sin.squeeze(0)?);
        let (q, k, v) = (ops::rope(&q, &cos, &sin)?, ops::rope(&unit(k)?, &cos, &sin)?, heads(v)?);
        let of_row = |(r, cache): (usize, &Cache)| {
            let (k, v) = (k.narrow(0, r, 1)?, v.narrow(0, r, 1)?);
            if seen.keep { cache.append(layer, &k, &v) } else { cache.followed_by(layer, &k, &v) }
        };
        let all: Vec<_> = seen.caches.iter().enumerate().map(of_row).collect::<Result<_>>()?;
        // The factor of the cosines replaces the usual one.
        ops::attention_rows(&q, &all, Mask::None, 1.0)?.reshape((rows, tokens, width))
    }

    /// Cross-attention to the row's own text, (R, T, C).
    fn attend_to_text(&self, x: &Tensor, text: &[Text]) -> Result<Tensor> {
        let (rows, tokens, width) = x.dims3()?;
        let q = self.cross_q.forward(x)?.reshape((rows, tokens, self.heads, ()))?;
        let scale = 1.0 / ((width / self.heads) as f32).sqrt();
        ops::attention_rows(&q, text, Mask::None, scale)?.reshape((rows, tokens, width))
    }
}
