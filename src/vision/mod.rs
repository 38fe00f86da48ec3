//! Qwen2.5-VL's own image encoder: a ViT with windowed attention at any size, whose patches are
//! merged two by two.

mod image;
mod windows;

use candle_core::{Result, Tensor, bail};
use serde::Deserialize;

pub use image::{ImageProcessor, Patches};

use crate::checkpoint::Weights;
use crate::nn::{Linear, MAX_LAYERS, RmsNorm, check_sizes, lecun_normal};
use crate::ops::{self, Mask};
use windows::Windows;

/// Epsilon of every RMSNorm.
const EPS: f64 = 1e-6;
/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// Shape of the encoder; names as in `vision_config` of the public config.json. Fields that are
/// left out have transformers' defaults.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the patches.
    pub hidden_size: usize,
    /// Width of the SwiGLU.
    pub intermediate_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Width of the output, the transformer's.
    pub out_hidden_size: usize,
    /// Pixels per patch along each axis.
    pub patch_size: usize,
    /// Patches per token of the transformer along each axis.
    pub spatial_merge_size: usize,
    /// Frames per patch; an image is as many equal ones.
    pub temporal_patch_size: usize,
    /// Pixels per window of attention along each axis.
    pub window_size: usize,
    /// Blocks whose attention sees the whole image.
    pub fullatt_block_indexes: Vec<usize>,
}

impl Default for VisionConfig {
    /// The defaults of transformers' `Qwen2_5_VLVisionConfig`, which are no published encoder's.
    fn default() -> Self {
        Self { hidden_size: 3584, ..Self::qwen2_5_vl(3584) }
    }
}

impl VisionConfig {
    /// The encoder of Qwen2.5-VL-3B and 7B, for a transformer of width `out`.
    pub fn qwen2_5_vl(out: usize) -> Self {
        Self {
            depth: 32,
            hidden_size: 1280,
            intermediate_size: 3420,
            num_heads: 16,
            out_hidden_size: out,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            fullatt_block_indexes: vec![7, 15, 23, 31],
        }
    }

    /// Errors: a value that would make the encoder panic or mislead, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { hidden_size, num_heads, patch_size, spatial_merge_size: merge, window_size, .. } = *self;
        check_sizes([
            ("hidden_size", hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("out_hidden_size", self.out_hidden_size),
            ("window_size", window_size),
        ])?;
        if num_heads == 0 || hidden_size % num_heads != 0 || hidden_size / num_heads % 4 != 0 {
            return Err(format!("{num_heads} heads do not divide a width of {hidden_size} into multiples of 4"));
        }
        if !(1..=256).contains(&patch_size)
            || !(1..=8).contains(&merge)
            || !(1..=16).contains(&self.temporal_patch_size)
        {
            return Err("the sizes of patches make no sense".into());
        }
        if !(1..=MAX_LAYERS).contains(&self.depth) {
            return Err(format!("{} layers are not 1 to {MAX_LAYERS}", self.depth));
        }
        if window_size / (patch_size * merge) == 0 {
            return Err(format!("a window of {window_size} pixels is smaller than {merge} patches of {patch_size}"));
        }
        Ok(())
    }

    /// Merged tokens along the side of a window.
    fn window(&self) -> usize {
        self.window_size / (self.patch_size * self.spatial_merge_size)
    }

    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Floating-point operations for an image of a grid (height, width) of tokens.
    pub fn flops(&self, (h, w): (usize, usize)) -> f64 {
        let merge = self.spatial_merge_size.pow(2);
        let (patches, d, full) = (h * w * merge, self.hidden_size, self.fullatt_block_indexes.len());
        let block = 4 * d * d + 3 * d * self.intermediate_size;
        let window = self.window().pow(2) * merge;
        let attention = 2 * d * (full * patches + (self.depth - full.min(self.depth)) * window.min(patches));
        let embed = 3 * self.patch_size * self.patch_size * d;
        let merger = h * w * merge * d * (merge * d + self.out_hidden_size);
        2.0 * (patches * (embed + self.depth * block + attention) + merger) as f64
    }

    /// Numbers in all weights.
    pub fn parameters(&self) -> usize {
        let (d, inner, merge) = (self.hidden_size, self.intermediate_size, self.spatial_merge_size);
        let block = 2 * d + (d + 1) * 4 * d + 2 * (d + 1) * inner + (inner + 1) * d;
        let merged = d * merge * merge;
        let patch = 3 * self.temporal_patch_size * self.patch_size * self.patch_size * d;
        patch + self.depth * block + d + (merged + 1) * (merged + self.out_hidden_size)
    }
}

#[derive(Debug)]
struct Block {
    norm1: RmsNorm,
    qkv: Linear,
    proj: Linear,
    norm2: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    heads: usize,
    /// Attention sees the whole image.
    full: bool,
}

impl Block {
    fn load(w: &Weights, c: &VisionConfig, index: usize) -> Result<Self> {
        let (d, inner, mlp) = (c.hidden_size, c.intermediate_size, w.pp("mlp"));
        Ok(Self {
            norm1: RmsNorm::load(&w.pp("norm1"), d, EPS)?,
            qkv: Linear::load(&w.pp("attn.qkv"), d, 3 * d)?,
            proj: Linear::load(&w.pp("attn.proj"), d, d)?,
            norm2: RmsNorm::load(&w.pp("norm2"), d, EPS)?,
            gate_proj: Linear::load(&mlp.pp("gate_proj"), d, inner)?,
            up_proj: Linear::load(&mlp.pp("up_proj"), d, inner)?,
            down_proj: Linear::load(&mlp.pp("down_proj"), inner, d)?,
            heads: c.num_heads,
            full: c.fullatt_block_indexes.contains(&index),
        })
    }

    /// Patches (1, N, D) in the order of `windows`.
    fn forward(&self, x: &Tensor, windows: &Windows, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let x = ops::add(x, &self.attention(&self.norm1.forward(x)?, windows, cos, sin)?)?;
        let y = self.norm2.forward(&x)?;
        let y = ops::swiglu(&self.gate_proj.forward(&y)?, &self.up_proj.forward(&y)?)?;
        ops::add(&x, &self.down_proj.forward(&y)?)
    }

    fn attention(&self, x: &Tensor, windows: &Windows, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (_, n, width) = x.dims3()?;
        let d = width / self.heads;
        let qkv = self.qkv.forward(x)?.reshape((1, n, 3 * self.heads, d))?;
        let part = |i: usize| qkv.narrow(2, i * self.heads, self.heads)?.contiguous();
        let (q, k, v) = (ops::rope(&part(0)?, cos, sin)?, ops::rope(&part(1)?, cos, sin)?, part(2)?);
        let scale = 1.0 / (d as f32).sqrt();
        let attended = if self.full {
            ops::attention(&q, &k, &v, Mask::None, scale)?
        } else {
            // Windows of one size are a batch.
            let parts = windows.batches.iter().map(|b| {
                let of = |x: &Tensor| x.narrow(1, b.first, b.count * b.len)?.reshape((b.count, b.len, self.heads, d));
                ops::attention(&of(&q)?, &of(&k)?, &of(&v)?, Mask::None, scale)?.reshape((1, (), self.heads, d))
            });
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?
        };
        self.proj.forward(&attended.reshape((1, n, width))?)
    }
}

/// The encoder.
#[derive(Debug)]
pub struct VisionTower {
    /// (hidden, 3 * patch * patch): the kernel summed over its frames, which are all the same
    /// image.
    patch_embed: Tensor,
    blocks: Vec<Block>,
    ln_q: RmsNorm,
    merger: [Linear; 2],
    config: VisionConfig,
}

impl VisionTower {
    /// Qwen2.5-VL's keys under `visual`: `patch_embed.proj`, `blocks.N`, `merger`.
    pub fn load(w: &Weights, config: &VisionConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        let (d, p, frames) = (config.hidden_size, config.patch_size, config.temporal_patch_size);
        let kernel = w.pp("patch_embed.proj").get((d, 3, frames, p, p), "weight", lecun_normal(3 * frames * p * p))?;
        let (merger, merged) = (w.pp("merger"), d * config.spatial_merge_size.pow(2));
        Ok(Self {
            patch_embed: w.derive((d, 3 * p * p), || kernel.sum(2)?.reshape((d, 3 * p * p)))?,
            blocks: (0..config.depth).map(|i| Block::load(&w.pp("blocks").pp(i), config, i)).collect::<Result<_>>()?,
            ln_q: RmsNorm::load(&merger.pp("ln_q"), d, EPS)?,
            merger: [
                Linear::load(&merger.pp("mlp.0"), merged, merged)?,
                Linear::load(&merger.pp("mlp.2"), merged, config.out_hidden_size)?,
            ],
            config: config.clone(),
        })
    }

    /// Shape of the encoder.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Features of an image, one row per token of the transformer, row by row: (h * w, out), where
    /// (h, w) is [`Patches::tokens`].
    pub fn forward(&self, patches: &Patches) -> Result<Tensor> {
        let (c, (h, w)) = (&self.config, patches.tokens);
        let (unit, device) = (c.spatial_merge_size * c.spatial_merge_size, self.patch_embed.device());
        let pixels = 3 * c.patch_size * c.patch_size;
        if patches.values.len() != h * w * unit * pixels {
            bail!("{} values are not those of {h} by {w} tokens", patches.values.len());
        }
        let windows = Windows::new((h, w), c.window(), unit);
        let values = Tensor::from_slice(&patches.values, (h * w, unit * pixels), device)?;
        let order = Tensor::new(&windows.order[..], device)?;
        let values = values.index_select(&order, 0)?.reshape((1, h * w * unit, pixels))?;
        let mut x = ops::linear(&values.to_dtype(self.patch_embed.dtype())?, &self.patch_embed, None)?;
        let (cos, sin) = self.rotations(&windows, w)?;
        for block in &self.blocks {
            x = block.forward(&x, &windows, &cos, &sin)?;
        }
        let x = self.ln_q.forward(&x)?.reshape((h * w, unit * c.hidden_size))?;
        let x = self.merger[1].forward(&ops::gelu_erf(&self.merger[0].forward(&x)?)?)?;
        x.index_select(&Tensor::new(windows.places(), device)?, 0)
    }

    /// Cosines and sines (N, head / 2): the first half of the pairs turns by the row, the second by
    /// the column.
    fn rotations(&self, windows: &Windows, width: usize) -> Result<(Tensor, Tensor)> {
        let (merge, quarter) = (self.config.spatial_merge_size, self.config.head_dim() / 4);
        let frequencies: Vec<f64> = (0..quarter).map(|j| THETA.powf(-(j as f64) / quarter as f64)).collect();
        let mut angles = Vec::new();
        for &token in &windows.order {
            let (row, column) = (token as usize / width * merge, token as usize % width * merge);
            for i in 0..merge * merge {
                for at in [row + i / merge, column + i % merge] {
                    angles.extend(frequencies.iter().map(|f| (at as f64 * f) as f32));
                }
            }
        }
        let angles = Tensor::from_vec(angles, ((), 2 * quarter), self.patch_embed.device())?;
        Ok((angles.cos()?, angles.sin()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted() {
        let config = VisionConfig {
            depth: 3,
            hidden_size: 32,
            intermediate_size: 48,
            num_heads: 2,
            out_hidden_size: 64,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            fullatt_block_indexes: vec![1],
        };
        let requested = Weights::inventory();
        VisionTower::load(&requested, &config).unwrap();
        let shapes = requested.requested();
        let counted: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(config.parameters(), counted);
        for broken in [
            VisionConfig { num_heads: 3, ..config.clone() },
            VisionConfig { patch_size: 0, ..config.clone() },
            VisionConfig { window_size: 20, ..config.clone() },
            VisionConfig { temporal_patch_size: 1000, ..config.clone() },
        ] {
            assert!(VisionTower::load(&Weights::inventory(), &broken).is_err());
        }
    }
}
