//! The pre-norm transformer block of the semantic encoder and the semantic decoder.

use candle_core::{Result, Tensor};

use crate::checkpoint::{Init, Weights};
use crate::nn::{LayerNorm, Linear, lecun_normal};
use crate::ops::{self, Mask};

#[derive(Clone, Copy, Debug)]
enum Activation {
    GeluTanh,
    GeluErf,
    QuickGelu,
}

/// Sizes of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockShape {
    pub(super) width: usize,
    pub(super) mlp: usize,
    pub(super) heads: usize,
    pub(super) eps: f64,
}

/// A pre-norm transformer block; the constructors differ in key names and in the activation.
#[derive(Debug)]
pub(super) struct Block {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    heads: usize,
}

impl Block {
    /// SigLIP's layout.
    pub(super) fn load_siglip(w: &Weights, shape: BlockShape) -> Result<Self> {
        let BlockShape { width: d, mlp, heads, eps } = shape;
        let attn = w.pp("self_attn");
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("layer_norm1"), d, eps)?,
            q: Linear::load_dense(&attn.pp("q_proj"), d, d)?,
            k: Linear::load_dense(&attn.pp("k_proj"), d, d)?,
            v: Linear::load_dense(&attn.pp("v_proj"), d, d)?,
            out: Linear::load_dense(&attn.pp("out_proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("layer_norm2"), d, eps)?,
            fc1: Linear::load_dense(&w.pp("mlp.fc1"), d, mlp)?,
            fc2: Linear::load_dense(&w.pp("mlp.fc2"), mlp, d)?,
            activation: Activation::GeluTanh,
            heads,
        })
    }

    /// OpenAI CLIP's layout: one packed projection to queries, keys and values.
    pub(super) fn load_clip(w: &Weights, shape: BlockShape) -> Result<Self> {
        let BlockShape { width: d, mlp, heads, eps } = shape;
        let attn = w.pp("attn");
        let weight = attn.get((3 * d, d), "in_proj_weight", lecun_normal(d))?;
        let bias = attn.get(3 * d, "in_proj_bias", Init::Zeros)?;
        let part = |i: usize| Ok::<_, candle_core::Error>(Linear::new(rows(&weight, i, d)?, Some(rows(&bias, i, d)?)));
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("ln_1"), d, eps)?,
            q: part(0)?,
            k: part(1)?,
            v: part(2)?,
            out: Linear::load_dense(&attn.pp("out_proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("ln_2"), d, eps)?,
            fc1: Linear::load_dense(&w.pp("mlp.c_fc"), d, mlp)?,
            fc2: Linear::load_dense(&w.pp("mlp.c_proj"), mlp, d)?,
            activation: Activation::QuickGelu,
            heads,
        })
    }

    /// BEiT's layout: packed as CLIP's, and the keys have no bias.
    pub(super) fn load_beit(w: &Weights, shape: BlockShape) -> Result<Self> {
        let BlockShape { width: d, mlp, heads, eps } = shape;
        let attn = w.pp("attn");
        let qkv = attn.pp("qkv").get((3 * d, d), "weight", lecun_normal(d))?;
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("norm1"), d, eps)?,
            q: Linear::new(rows(&qkv, 0, d)?, Some(attn.get(d, "q_bias", Init::Zeros)?)),
            k: Linear::new(rows(&qkv, 1, d)?, None),
            v: Linear::new(rows(&qkv, 2, d)?, Some(attn.get(d, "v_bias", Init::Zeros)?)),
            out: Linear::load_dense(&attn.pp("proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d, eps)?,
            fc1: Linear::load_dense(&w.pp("mlp.fc1"), d, mlp)?,
            fc2: Linear::load_dense(&w.pp("mlp.fc2"), mlp, d)?,
            activation: Activation::GeluErf,
            heads,
        })
    }

    /// (B, T, D) -> (B, T, D), without a mask.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let head = d / self.heads;
        let normed = self.norm1.forward(x)?;
        let split = |l: &Linear| l.forward(&normed)?.reshape((b, t, self.heads, head));
        let scale = 1.0 / (head as f32).sqrt();
        let attended = ops::attention(&split(&self.q)?, &split(&self.k)?, &split(&self.v)?, Mask::None, scale)?;
        let x = (x + self.out.forward(&attended.reshape((b, t, d))?)?)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let h = match self.activation {
            Activation::GeluTanh => ops::gelu_tanh(&h)?,
            Activation::GeluErf => ops::gelu_erf(&h)?,
            Activation::QuickGelu => ops::quick_gelu(&h)?,
        };
        x + self.fc2.forward(&h)?
    }
}

/// The `i`th of the parts, of `d` rows each, of a packed tensor.
fn rows(packed: &Tensor, i: usize, d: usize) -> Result<Tensor> {
    packed.narrow(0, i * d, d)
}
