//! The pixel branch: TokenFlow's convolutional encoder and decoder, with its public key names, which no autoencoder of
//! candle-transformers has.

use candle_core::{Result, Tensor, bail};
use candle_nn::ops::{pixel_shuffle, pixel_unshuffle};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Init, Weights};
use crate::nn::{Conv, GroupNorm};
use crate::ops::{self, Mask};

const EPS: f64 = 1e-6;
/// Top, bottom, left and right, at stride 2, as the reference's downsampling.
const DOWNSAMPLING_PADDING: [usize; 4] = [0, 1, 0, 1];
/// Channels of any level, and pixels for a code along a side, are no more.
const MAX_CHANNELS: usize = 1 << 20;
const MAX_STRIDE: usize = 1 << 10;

/// Shape of one convolutional half.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CnnConfig {
    /// Channels of the level with the most pixels.
    pub ch: usize,
    /// Multiple of `ch` at each level; every level but the last halves the grid.
    pub ch_mult: Vec<usize>,
    /// Residual blocks a level (the decoder has one more).
    pub num_res_blocks: usize,
    /// Channels between this half and its 1x1 quantisation convolution.
    pub z_channels: usize,
    /// Groups of every group norm.
    pub groups: usize,
    /// Pixels are folded into channels by patches of this side first (1: plain pixels, as TokenFlow).
    pub patch: usize,
}

impl CnnConfig {
    /// Errors: no levels, more than any image has pixels for, no patches, or channels that groups do not divide.
    pub(super) fn check(&self) -> Result<()> {
        if self.ch_mult.is_empty() || self.ch_mult.len() > 16 || self.patch == 0 || self.patch > MAX_STRIDE {
            bail!("a pixel branch needs 1 to 16 levels and a patch: {:?}, {}", self.ch_mult, self.patch);
        }
        let channels = |mult: &usize| self.ch.checked_mul(*mult).filter(|n| (1..=MAX_CHANNELS).contains(n));
        if !(1..=MAX_CHANNELS).contains(&self.z_channels) || self.stride() > MAX_STRIDE {
            let (z, stride) = (self.z_channels, self.stride());
            bail!("{z} z_channels are not 1 to {MAX_CHANNELS}, or {stride} pixels for a code above {MAX_STRIDE}");
        }
        let split = |mult: &usize| channels(mult).is_some_and(|n| n.is_multiple_of(self.groups));
        if self.groups == 0 || self.num_res_blocks > 100 || !self.ch_mult.iter().all(split) {
            bail!("{} groups do not divide {} channels times {:?}", self.groups, self.ch, self.ch_mult);
        }
        Ok(())
    }

    /// Pixels per code along each axis.
    pub fn stride(&self) -> usize {
        self.patch << (self.ch_mult.len() - 1)
    }
}

/// A convolution that starts at zero, so that the block it closes begins as the identity.
fn load_zeros(w: &Weights, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv> {
    Conv::load_with(w, inputs, outputs, kernel, Init::Zeros)
}

/// GroupNorm, SiLU, conv 3x3, twice, beside a shortcut (1x1 where channels change).
#[derive(Debug)]
struct ResBlock {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    nin_shortcut: Option<Conv>,
}

impl ResBlock {
    fn load(w: &Weights, from: usize, to: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::load(&w.pp("norm1"), from, groups, EPS)?,
            conv1: Conv::load(&w.pp("conv1"), from, to, 3)?,
            norm2: GroupNorm::load(&w.pp("norm2"), to, groups, EPS)?,
            conv2: load_zeros(&w.pp("conv2"), to, to, 3)?,
            nin_shortcut: (from != to).then(|| Conv::load(&w.pp("nin_shortcut"), from, to, 1)).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.norm2.forward_silu(&h)?;
        match &self.nin_shortcut {
            Some(shortcut) => self.conv2.forward_add(&shortcut.forward(x)?, &h),
            None => self.conv2.forward_add(x, &h),
        }
    }
}

/// Single-head attention over the grid.
#[derive(Debug)]
struct AttnBlock {
    norm: GroupNorm,
    q: Conv,
    k: Conv,
    v: Conv,
    proj_out: Conv,
}

impl AttnBlock {
    fn load(w: &Weights, channels: usize, groups: usize) -> Result<Self> {
        let conv = |name| Conv::load(&w.pp(name), channels, channels, 1);
        Ok(Self {
            norm: GroupNorm::load(&w.pp("norm"), channels, groups, EPS)?,
            q: conv("q")?,
            k: conv("k")?,
            v: conv("v")?,
            proj_out: load_zeros(&w.pp("proj_out"), channels, channels, 1)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let normed = self.norm.forward(x)?;
        let tokens = |conv: &Conv| conv.forward(&normed)?.permute((0, 2, 3, 1))?.reshape((b, h * w, 1, c));
        let scale = 1.0 / (c as f32).sqrt();
        let out = ops::attention(&tokens(&self.q)?, &tokens(&self.k)?, &tokens(&self.v)?, Mask::None, scale)?;
        self.proj_out.forward_add(x, &out.reshape((b, h, w, c))?.permute((0, 3, 1, 2))?)
    }
}

/// Residual blocks of one level, each followed by attention at the level with the fewest pixels, then a resize.
#[derive(Debug)]
struct Level {
    res: Vec<ResBlock>,
    attn: Vec<AttnBlock>,
    resize: Option<Conv>,
}

impl Level {
    fn load(w: &Weights, shape: LevelShape, resize: Option<&str>, groups: usize) -> Result<Self> {
        let LevelShape { from, to, blocks, attend } = shape;
        let res = (0..blocks)
            .map(|i| ResBlock::load(&w.pp("res").pp(i), if i == 0 { from } else { to }, to, groups))
            .collect::<Result<_>>()?;
        let attn = (0..if attend { blocks } else { 0 })
            .map(|i| AttnBlock::load(&w.pp("attn").pp(i), to, groups))
            .collect::<Result<_>>()?;
        let resize = resize.map(|name| Conv::load(&w.pp(name).pp("conv"), to, to, 3)).transpose()?;
        Ok(Self { res, attn, resize })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, res) in self.res.iter().enumerate() {
            x = res.forward(&x)?;
            if let Some(attn) = self.attn.get(i) {
                x = attn.forward(&x)?;
            }
        }
        Ok(x)
    }
}

struct LevelShape {
    from: usize,
    to: usize,
    blocks: usize,
    attend: bool,
}

/// The blocks at the fewest pixels: residual, attention, residual.
#[derive(Debug)]
struct Mid(ResBlock, AttnBlock, ResBlock);

impl Mid {
    fn load(w: &Weights, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self(
            ResBlock::load(&w.pp(0), channels, channels, groups)?,
            AttnBlock::load(&w.pp(1), channels, groups)?,
            ResBlock::load(&w.pp(2), channels, channels, groups)?,
        ))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.2.forward(&self.1.forward(&self.0.forward(x)?)?)
    }
}

/// Pixels to features: (B, 3, H, W) -> (B, z_channels, H / stride, W / stride).
#[derive(Debug)]
pub struct Encoder {
    conv_in: Conv,
    levels: Vec<Level>,
    mid: Mid,
    norm_out: GroupNorm,
    conv_out: Conv,
    patch: usize,
}

impl Encoder {
    /// Keys `conv_in`, `conv_blocks.N`, `mid.N`, `norm_out`, `conv_out`.
    pub fn load(w: &Weights, config: &CnnConfig) -> Result<Self> {
        let (last, groups) = (config.ch_mult.len() - 1, config.groups);
        let mut from = config.ch;
        let mut levels = Vec::new();
        for (i, mult) in config.ch_mult.iter().enumerate() {
            let shape = LevelShape { from, to: config.ch * mult, blocks: config.num_res_blocks, attend: i == last };
            from = shape.to;
            levels.push(Level::load(&w.pp("conv_blocks").pp(i), shape, (i < last).then_some("downsample"), groups)?);
        }
        Ok(Self {
            conv_in: Conv::load(&w.pp("conv_in"), 3 * config.patch * config.patch, config.ch, 3)?,
            levels,
            mid: Mid::load(&w.pp("mid"), from, groups)?,
            norm_out: GroupNorm::load(&w.pp("norm_out"), from, groups, EPS)?,
            conv_out: Conv::load(&w.pp("conv_out"), from, config.z_channels, 3)?,
            patch: config.patch,
        })
    }

    /// `x` in [-1, 1].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&pixel_unshuffle(x, self.patch)?)?;
        for level in &self.levels {
            x = level.forward(&x)?;
            if let Some(down) = &level.resize {
                x = down.forward_strided(&x, 2, DOWNSAMPLING_PADDING)?;
            }
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&self.mid.forward(&x)?)?)
    }
}

/// Features to pixels: (B, z_channels, h, w) -> (B, 3, h * stride, w * stride).
#[derive(Debug)]
pub struct Decoder {
    conv_in: Conv,
    mid: Mid,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv,
    patch: usize,
}

impl Decoder {
    /// Keys as [`Encoder::load`]; `conv_blocks.0` is the level with the fewest pixels.
    pub fn load(w: &Weights, config: &CnnConfig) -> Result<Self> {
        let (last, groups) = (config.ch_mult.len() - 1, config.groups);
        let lowest = config.ch * config.ch_mult[last];
        let mut from = lowest;
        let mut levels = Vec::new();
        for (i, mult) in config.ch_mult.iter().rev().enumerate() {
            let shape = LevelShape { from, to: config.ch * mult, blocks: config.num_res_blocks + 1, attend: i == 0 };
            from = shape.to;
            levels.push(Level::load(&w.pp("conv_blocks").pp(i), shape, (i < last).then_some("upsample"), groups)?);
        }
        Ok(Self {
            conv_in: Conv::load(&w.pp("conv_in"), config.z_channels, lowest, 3)?,
            mid: Mid::load(&w.pp("mid"), lowest, groups)?,
            levels,
            norm_out: GroupNorm::load(&w.pp("norm_out"), from, groups, EPS)?,
            conv_out: Conv::load(&w.pp("conv_out"), from, 3 * config.patch * config.patch, 3)?,
            patch: config.patch,
        })
    }

    /// Pixels around [-1, 1], not clamped.
    pub fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(&self.conv_in.forward(z)?)?;
        for level in &self.levels {
            x = level.forward(&x)?;
            if let Some(up) = &level.resize {
                x = up.forward_upsampled(&x)?;
            }
        }
        pixel_shuffle(&self.conv_out.forward(&self.norm_out.forward_silu(&x)?)?, self.patch)
    }
}

#[cfg(test)]
mod tests;
