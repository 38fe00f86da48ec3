//! The pixel branch: the convolutional encoder and decoder of TokenFlow and of Infinity, with their
//! public key names, which no autoencoder of candle-transformers has.

mod config;

use candle_core::{DType, Result, Tensor};
use candle_nn::ops::{pixel_shuffle, pixel_unshuffle};

pub use config::{CnnConfig, CnnLayout};

use crate::checkpoint::{Init, Weights};
use crate::nn::{Conv, GroupNorm};
use crate::ops::{self, Mask};

const EPS: f64 = 1e-6;
/// Top, bottom, left and right, at stride 2, as the reference's downsampling.
const DOWNSAMPLING_PADDING: [usize; 4] = [0, 1, 0, 1];

/// What all layers of a branch have in common.
#[derive(Clone, Copy)]
struct Style {
    groups: usize,
    layout: CnnLayout,
}

impl Style {
    fn conv(self, w: &Weights, from: usize, to: usize, kernel: usize) -> Result<Conv> {
        Conv::load(&self.layout.conv(w), from, to, kernel)
    }

    fn norm(self, w: &Weights, channels: usize) -> Result<GroupNorm> {
        GroupNorm::load(&self.layout.norm(w), channels, self.groups, EPS)
    }
}

impl From<&CnnConfig> for Style {
    fn from(config: &CnnConfig) -> Self {
        Self { groups: config.groups, layout: config.layout }
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
    fn load(w: &Weights, from: usize, to: usize, style: Style) -> Result<Self> {
        Ok(Self {
            norm1: style.norm(&w.pp("norm1"), from)?,
            conv1: style.conv(&w.pp("conv1"), from, to, 3)?,
            norm2: style.norm(&w.pp("norm2"), to)?,
            conv2: load_zeros(&style.layout.conv(&w.pp("conv2")), to, to, 3)?,
            nin_shortcut: (from != to).then(|| style.conv(&w.pp("nin_shortcut"), from, to, 1)).transpose()?,
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

/// Residual blocks of one level, each followed by attention where there is any, then a resize.
#[derive(Debug)]
struct Level {
    res: Vec<ResBlock>,
    attn: Vec<AttnBlock>,
    resize: Option<Conv>,
}

impl Level {
    fn load(w: &Weights, shape: LevelShape, resize: Option<&str>, style: Style) -> Result<Self> {
        let LevelShape { from, to, blocks, attend } = shape;
        let names = w.pp(if style.layout == CnnLayout::Tokenflow { "res" } else { "block" });
        let res = (0..blocks)
            .map(|i| ResBlock::load(&names.pp(i), if i == 0 { from } else { to }, to, style))
            .collect::<Result<_>>()?;
        let attn = (0..if attend { blocks } else { 0 })
            .map(|i| AttnBlock::load(&w.pp("attn").pp(i), to, style.groups))
            .collect::<Result<_>>()?;
        let resize = resize.map(|name| style.conv(&w.pp(name).pp("conv"), to, to, 3)).transpose()?;
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

/// The blocks at the fewest pixels: residual, attention where there is any, residual.
#[derive(Debug)]
struct Mid(ResBlock, Option<AttnBlock>, ResBlock);

impl Mid {
    fn load(w: &Weights, channels: usize, style: Style) -> Result<Self> {
        let names = if style.layout == CnnLayout::Tokenflow { ["0", "2"] } else { ["block_1", "block_2"] };
        let [first, second] = names.map(|name| ResBlock::load(&w.pp(name), channels, channels, style));
        let attend = || AttnBlock::load(&w.pp(1), channels, style.groups);
        Ok(Self(first?, style.layout.attends().then(attend).transpose()?, second?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.0.forward(x)?;
        if let Some(attn) = &self.1 {
            x = attn.forward(&x)?;
        }
        self.2.forward(&x)
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
    /// Keys `conv_in`, `conv_blocks.N` or `down.N`, `mid`, `norm_out`, `conv_out`.
    pub fn load(w: &Weights, config: &CnnConfig) -> Result<Self> {
        let (last, style) = (config.ch_mult.len() - 1, Style::from(config));
        let attends = style.layout.attends();
        let names = w.pp(if attends { "conv_blocks" } else { "down" });
        let mut from = config.ch;
        let mut levels = Vec::new();
        for (i, mult) in config.ch_mult.iter().enumerate() {
            let attend = attends && i == last;
            let shape = LevelShape { from, to: config.ch * mult, blocks: config.num_res_blocks, attend };
            from = shape.to;
            levels.push(Level::load(&names.pp(i), shape, (i < last).then_some("downsample"), style)?);
        }
        Ok(Self {
            conv_in: style.conv(&w.pp("conv_in"), 3 * config.patch * config.patch, config.ch, 3)?,
            levels,
            mid: Mid::load(&w.pp("mid"), from, style)?,
            norm_out: style.norm(&w.pp("norm_out"), from)?,
            conv_out: style.conv(&w.pp("conv_out"), from, config.z_channels, 3)?,
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
    /// Keys as [`Encoder::load`], with `up.N` for `down.N`; of `conv_blocks` 0 is the level with
    /// the fewest pixels, of `up` the one with the most.
    pub fn load(w: &Weights, config: &CnnConfig) -> Result<Self> {
        let (last, style) = (config.ch_mult.len() - 1, Style::from(config));
        let lowest = config.ch * config.ch_mult[last];
        let mut from = lowest;
        let mut levels = Vec::new();
        for (i, mult) in config.ch_mult.iter().rev().enumerate() {
            let attend = style.layout.attends() && i == 0;
            let shape = LevelShape { from, to: config.ch * mult, blocks: config.num_res_blocks + 1, attend };
            from = shape.to;
            let level = match style.layout {
                CnnLayout::Tokenflow => w.pp("conv_blocks").pp(i),
                CnnLayout::Infinity | CnnLayout::InfinityPlain => w.pp("up").pp(last - i),
            };
            levels.push(Level::load(&level, shape, (i < last).then_some("upsample"), style)?);
        }
        Ok(Self {
            conv_in: style.conv(&w.pp("conv_in"), config.z_channels, lowest, 3)?,
            mid: Mid::load(&w.pp("mid"), lowest, style)?,
            levels,
            norm_out: style.norm(&w.pp("norm_out"), from)?,
            conv_out: style.conv(&w.pp("conv_out"), from, 3 * config.patch * config.patch, 3)?,
            patch: config.patch,
        })
    }

    /// The type of weights and activations.
    pub(super) fn dtype(&self) -> DType {
        self.conv_in.dtype()
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
