//! The semantic branch: a ViT encoder at any grid (SigLIP's layout), and TokenFlow's semantic decoder.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Init, Weights};
use crate::ops;
use crate::pixels::GridResampling;

const EPS: f64 = 1e-6;

/// Shape of the semantic encoder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VitConfig {
    /// Width of the tokens.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Pixels per token along each axis.
    pub patch_size: usize,
    /// Side of the grid on which the position table is stored; other grids read it by bicubic resampling.
    pub native_grid: usize,
}

/// Shape of the semantic decoder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SemanticDecoderConfig {
    /// Blocks; width, heads and MLP are the semantic encoder's.
    pub depth: usize,
}

/// A linear layer with bias.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    pub(super) fn load(w: &Weights, from: usize, to: usize) -> Result<Self> {
        let init = Init::Normal { std: (from as f64).powf(-0.5) };
        Ok(Self { weight: w.get((to, from), "weight", init)?, bias: w.get(to, "bias", Init::Zeros)? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, Some(&self.bias))
    }
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn load(w: &Weights, size: usize) -> Result<Self> {
        Ok(Self { weight: w.get(size, "weight", Init::Ones)?, bias: w.get(size, "bias", Init::Zeros)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, EPS)
    }
}

#[derive(Clone, Copy, Debug)]
enum Activation {
    GeluTanh,
    GeluErf,
}

/// A pre-norm transformer block; the constructors differ in key names only.
#[derive(Debug)]
struct Block {
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
    fn load_siglip(w: &Weights, c: &VitConfig) -> Result<Self> {
        let d = c.hidden_size;
        let attn = w.pp("self_attn");
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("layer_norm1"), d)?,
            q: Linear::load(&attn.pp("q_proj"), d, d)?,
            k: Linear::load(&attn.pp("k_proj"), d, d)?,
            v: Linear::load(&attn.pp("v_proj"), d, d)?,
            out: Linear::load(&attn.pp("out_proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("layer_norm2"), d)?,
            fc1: Linear::load(&w.pp("mlp").pp("fc1"), d, c.intermediate_size)?,
            fc2: Linear::load(&w.pp("mlp").pp("fc2"), c.intermediate_size, d)?,
            activation: Activation::GeluTanh,
            heads: c.num_attention_heads,
        })
    }

    /// BEiT's layout: one fused qkv matrix, whose key part has no bias.
    fn load_beit(w: &Weights, c: &VitConfig) -> Result<Self> {
        let d = c.hidden_size;
        let attn = w.pp("attn");
        let qkv = attn.pp("qkv").get((3 * d, d), "weight", Init::Normal { std: (d as f64).powf(-0.5) })?;
        let q_bias = attn.get(d, "q_bias", Init::Zeros)?;
        let part = |i: usize, bias: Tensor| -> Result<Linear> { Ok(Linear { weight: qkv.narrow(0, i * d, d)?, bias }) };
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("norm1"), d)?,
            k: part(1, q_bias.zeros_like()?)?,
            q: part(0, q_bias)?,
            v: part(2, attn.get(d, "v_bias", Init::Zeros)?)?,
            out: Linear::load(&attn.pp("proj"), d, d)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d)?,
            fc1: Linear::load(&w.pp("mlp").pp("fc1"), d, c.intermediate_size)?,
            fc2: Linear::load(&w.pp("mlp").pp("fc2"), c.intermediate_size, d)?,
            activation: Activation::GeluErf,
            heads: c.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let head = d / self.heads;
        let normed = self.norm1.forward(x)?;
        let split = |l: &Linear| l.forward(&normed)?.reshape((b, t, self.heads, head));
        let scale = 1.0 / (head as f32).sqrt();
        let attended = ops::attention(&split(&self.q)?, &split(&self.k)?, &split(&self.v)?, None, scale)?;
        let x = (x + self.out.forward(&attended.reshape((b, t, d))?)?)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let h = match self.activation {
            Activation::GeluTanh => ops::gelu_tanh(&h)?,
            Activation::GeluErf => ops::gelu_erf(&h)?,
        };
        x + self.fc2.forward(&h)?
    }
}

/// Positions stored on a square grid, (n, D), read on another grid: (1, h * w, D).
fn positions_at(table: &Tensor, native: usize, grid: (usize, usize)) -> Result<Tensor> {
    let d = table.dim(1)?;
    if grid == (native, native) {
        return table.unsqueeze(0);
    }
    let table = table.reshape((1, native, native, d))?;
    GridResampling::bicubic((native, native), grid).channels_last(&table)?.reshape((1, grid.0 * grid.1, d))
}

/// Image (B, 3, H, W) in [-1, 1] to one token per patch, (B, h * w, D).
#[derive(Debug)]
pub struct SemanticEncoder {
    patch_embedding: Linear,
    position_embedding: Tensor,
    layers: Vec<Block>,
    post_layernorm: LayerNorm,
    config: VitConfig,
}

impl SemanticEncoder {
    /// Keys of SigLIP2-NaFlex's vision model, whose patch embedding is a linear layer.
    pub fn load(w: &Weights, config: &VitConfig) -> Result<Self> {
        let (d, embeddings) = (config.hidden_size, w.pp("embeddings"));
        let patch = 3 * config.patch_size * config.patch_size;
        let shape = (config.native_grid * config.native_grid, d);
        Ok(Self {
            patch_embedding: Linear::load(&embeddings.pp("patch_embedding"), patch, d)?,
            position_embedding: embeddings.pp("position_embedding").get(shape, "weight", Init::Normal { std: 0.02 })?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Block::load_siglip(&w.pp("encoder.layers").pp(i), config))
                .collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(&w.pp("post_layernorm"), d)?,
            config: config.clone(),
        })
    }

    /// Token features after the last norm, (B, h * w, D).
    pub fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let (b, _, height, width) = image.dims4()?;
        let p = self.config.patch_size;
        let (h, w) = (height / p, width / p);
        // Each patch becomes one row of (patch row, patch column, channel), as NaFlex lays it out.
        let patches = image.narrow(2, 0, h * p)?.narrow(3, 0, w * p)?.reshape((b, 3, h, p, w * p))?;
        let patches = patches.reshape(&[b, 3, h, p, w, p][..])?.permute(vec![0, 2, 4, 3, 5, 1])?;
        let patches = patches.reshape((b, h * w, p * p * 3))?;
        let positions = positions_at(&self.position_embedding, self.config.native_grid, (h, w))?;
        let mut x = self.patch_embedding.forward(&patches)?.broadcast_add(&positions)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        self.post_layernorm.forward(&x)
    }

    /// One unit vector per image, (B, D): the mean of its token features.
    pub fn embed(&self, image: &Tensor) -> Result<Tensor> {
        let pooled = self.forward(image)?.mean(1)?;
        pooled.broadcast_div(&(pooled.sqr()?.sum_keepdim(1)? + 1e-12)?.sqrt()?)
    }
}

/// The semantic half of F to the semantic encoder's features.
#[derive(Debug)]
pub struct SemanticDecoder {
    patch_embed: Linear,
    cls_token: Tensor,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    fc_norm: LayerNorm,
    native_grid: usize,
}

impl SemanticDecoder {
    /// Keys of the reference's `decoder_vqkd`.
    pub fn load(w: &Weights, encoder: &VitConfig, config: &SemanticDecoderConfig, code_dim: usize) -> Result<Self> {
        let d = encoder.hidden_size;
        let proj = w.pp("patch_embed").pp("proj");
        let init = Init::Normal { std: (code_dim as f64).powf(-0.5) };
        let weight = proj.get((d, code_dim, 1, 1), "weight", init)?.reshape((d, code_dim))?;
        let tokens = encoder.native_grid * encoder.native_grid + 1;
        Ok(Self {
            patch_embed: Linear { weight, bias: proj.get(d, "bias", Init::Zeros)? },
            cls_token: w.get((1, 1, d), "cls_token", Init::Normal { std: 0.02 })?,
            pos_embed: w.get((1, tokens, d), "pos_embed", Init::Normal { std: 0.02 })?,
            blocks: (0..config.depth)
                .map(|i| Block::load_beit(&w.pp("blocks").pp(i), encoder))
                .collect::<Result<_>>()?,
            fc_norm: LayerNorm::load(&w.pp("fc_norm"), d)?,
            native_grid: encoder.native_grid,
        })
    }

    /// (B, h, w, code_dim) -> (B, h * w, D).
    pub fn forward(&self, codes: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = codes.dims4()?;
        let x = self.patch_embed.forward(&codes.reshape((b, h * w, c))?)?;
        let d = x.dim(2)?;
        let table = self.pos_embed.squeeze(0)?;
        let grid = positions_at(&table.narrow(0, 1, table.dim(0)? - 1)?, self.native_grid, (h, w))?;
        let cls = (&self.cls_token + table.narrow(0, 0, 1)?.unsqueeze(0)?)?.broadcast_as((b, 1, d))?;
        let mut x = Tensor::cat(&[cls, x.broadcast_add(&grid)?], 1)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.fc_norm.forward(&x.narrow(1, 1, h * w)?.contiguous()?)
    }
}
