//! What the U-Net and the caption encoder are made of.

use candle_core::{Result, Tensor};

use crate::checkpoint::Weights;
use crate::nn::{Linear, RmsNorm, lecun_normal};
use crate::ops::{self, Mask};

/// Of all norms.
pub(super) const EPS: f64 = 1e-6;

/// The SwiGLU feed-forward layer, without biases.
#[derive(Debug)]
pub(super) struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// Keys `gate`, `up` and `down`.
    pub(super) fn load(w: &Weights, width: usize, inner: usize) -> Result<Self> {
        let load = |name: &str, from, to| Linear::load_with(&w.pp(name), from, to, false, lecun_normal(from));
        Ok(Self { gate: load("gate", width, inner)?, up: load("up", width, inner)?, down: load("down", inner, width)? })
    }

    /// x (..., C) -> (..., C).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&ops::gated_linear(x, self.gate.weight(), self.up.weight())?)
    }
}

/// Encoded captions: (B, S, width), and which of their tokens are no padding, (B, S) u8.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) tokens: Tensor,
    pub(super) kept: Option<Tensor>,
}

/// Cosines and sines of the angles of positions, (T, D/2).
#[derive(Debug)]
pub(super) struct Angles {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

/// Pre-norm attention of tokens to each other and, in the U-Net, to the caption as well: one
/// softmax over both.
#[derive(Debug)]
pub(super) struct Attention {
    norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// Keys and values of the caption.
    caption: Option<(Linear, Linear)>,
    heads: usize,
}

impl Attention {
    /// Keys `norm`, `q`, `k`, `v`, `out` and, with the width of captions, `caption_k` and
    /// `caption_v`.
    pub(super) fn load(w: &Weights, width: usize, heads: usize, caption: Option<usize>) -> Result<Self> {
        let load = |name: &str, from| Linear::load_with(&w.pp(name), from, width, false, lecun_normal(from));
        Ok(Self {
            norm: RmsNorm::load(&w.pp("norm"), width, EPS)?,
            q: load("q", width)?,
            k: load("k", width)?,
            v: load("v", width)?,
            out: load("out", width)?,
            caption: caption
                .map(|from| Ok::<_, candle_core::Error>((load("caption_k", from)?, load("caption_v", from)?)))
                .transpose()?,
            heads,
        })
    }

    /// x (B, T, C) plus what it attends to; queries and keys of x are rotated by `angles`. `kept`
    /// masks the keys of x, `text` has keys of its own.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        angles: Option<&Angles>,
        kept: Option<&Tensor>,
        text: Option<&Text>,
    ) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let split = |y: Tensor| y.reshape((b, (), self.heads, c / self.heads));
        let layers = [&self.q, &self.k, &self.v].map(|layer| (layer.weight(), layer.bias()));
        let [q, k, v] = ops::linear_each(&self.norm.forward(x)?, layers)?;
        let (mut q, mut k, mut v) = (split(q)?, split(k)?, split(v)?);
        if let Some(angles) = angles {
            (q, k) = (ops::rope(&q, &angles.cos, &angles.sin)?, ops::rope(&k, &angles.cos, &angles.sin)?);
        }
        let mut seen = kept.cloned();
        if let (Some((key, value)), Some(text)) = (&self.caption, text) {
            k = Tensor::cat(&[k, split(key.forward(&text.tokens)?)?], 1)?;
            v = Tensor::cat(&[v, split(value.forward(&text.tokens)?)?], 1)?;
            if let Some(kept) = &text.kept {
                seen = Some(Tensor::cat(&[&Tensor::ones((b, t), kept.dtype(), kept.device())?, kept], 1)?);
            }
        }
        let seen = seen.map(|kept| kept.unsqueeze(1)?.repeat((1, t, 1))).transpose()?;
        let mask = seen.as_ref().map_or(Mask::None, Mask::Kept);
        let y = ops::attention(&q, &k, &v, mask, 1.0 / ((c / self.heads) as f32).sqrt())?;
        ops::add(x, &self.out.forward(&y.reshape((b, t, c))?)?)
    }
}
