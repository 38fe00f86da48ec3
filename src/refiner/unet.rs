//! The U-Net: tokens of pixels, channels last, on grids that halve from level to level.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::condition::Condition;
use super::config::RefinerConfig;
use super::layers::{Angles, Attention, EPS, GatedMlp, Text};
use crate::checkpoint::{Init, Weights};
use crate::nn::{Linear, RmsNorm};
use crate::ops;

/// Base of the rotary frequencies of attention.
const THETA: f64 = 100.0;
/// Sines and cosines of a time.
const TIME_CHANNELS: usize = 64;

/// The depthwise convolution and gated MLP of ConvNeXt, scaled and shifted by the embedding, and
/// attention behind them.
#[derive(Debug)]
struct Block {
    conv: Tensor,
    modulation: Linear,
    mlp: GatedMlp,
    attention: Option<Attention>,
}

/// What the blocks of a level have in common.
struct Context<'a> {
    /// (B, embedding).
    embedding: &'a Tensor,
    text: &'a Text,
    /// Of the level's positions, where any of its blocks attends.
    angles: Option<Angles>,
    /// Height and width.
    grid: (usize, usize),
}

impl Block {
    fn load(w: &Weights, config: &RefinerConfig, width: usize, attends: bool) -> Result<Self> {
        let taps = config.kernel * config.kernel;
        let attention =
            || Attention::load(&w.pp("attention"), width, width / config.head_dim, Some(config.caption.width));
        Ok(Self {
            conv: w.get((taps, width), "depthwise", Init::Normal { std: (taps as f64).powf(-0.5) })?,
            modulation: Linear::load_with(&w.pp("modulation"), config.embedding, 2 * width, true, Init::Zeros)?,
            mlp: GatedMlp::load(&w.pp("mlp"), width, config.mlp_ratio * width)?,
            attention: attends.then(attention).transpose()?,
        })
    }

    /// x (B, T, C) -> (B, T, C).
    fn forward(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let (h, w) = context.grid;
        let y = ops::depthwise_conv2d(&x.reshape((b, h, w, c))?, &self.conv)?.reshape((b, t, c))?;
        let modulation = self.modulation.forward(context.embedding)?;
        let (scale, shift) = (modulation.narrow(1, 0, c)?, modulation.narrow(1, c, c)?);
        let x = ops::add(x, &self.mlp.forward(&ops::modulated_norm(&y, &scale, &shift, EPS)?)?)?;
        match &self.attention {
            Some(attention) => attention.forward(&x, context.angles.as_ref(), None, Some(context.text)),
            None => Ok(x),
        }
    }
}

/// The blocks of a level, of which the last `attending` attend.
fn blocks(w: &Weights, config: &RefinerConfig, level: usize, count: usize, attending: usize) -> Result<Vec<Block>> {
    let load = |i: usize| Block::load(&w.pp(i), config, config.widths[level], i + attending >= count);
    (0..count).map(load).collect()
}

/// A level on the way down and up.
#[derive(Debug)]
struct Level {
    down: Vec<Block>,
    /// To the next level: four tokens become one.
    merge: Linear,
    /// Back from it: one token becomes four.
    split: Linear,
    up: Vec<Block>,
}

/// The network.
#[derive(Debug)]
pub(super) struct Unet {
    time: (Linear, Linear),
    caption: Linear,
    codes: Linear,
    input: Linear,
    levels: Vec<Level>,
    middle: Vec<Block>,
    norm: RmsNorm,
    output: Linear,
    config: RefinerConfig,
}

impl Unet {
    /// Keys `time.N`, `caption`, `codes`, `input`, `levels.N.{down, merge, split, up}`, `middle`,
    /// `norm` and `output`.
    pub(super) fn load(w: &Weights, config: &RefinerConfig) -> Result<Self> {
        let (widths, embedding) = (&config.widths, config.embedding);
        let last = widths.len() - 1;
        let level = |i: usize| -> Result<Level> {
            let (w, from, to) = (w.pp("levels").pp(i), widths[i], widths[i + 1]);
            Ok(Level {
                down: blocks(&w.pp("down"), config, i, config.down_blocks[i], 0)?,
                merge: Linear::load(&w.pp("merge"), 4 * from, to)?,
                split: Linear::load(&w.pp("split"), to, 4 * from)?,
                up: blocks(&w.pp("up"), config, i, config.up_blocks[i], config.attention[i])?,
            })
        };
        let (side, per_code) = (config.patch / config.upscale, config.tokens_per_code());
        let (seen, pixels) = (3 * side * side, 3 * config.patch * config.patch);
        let codes = config.code_dim + config.semantic_dim;
        Ok(Self {
            time: (
                Linear::load(&w.pp("time").pp(0), TIME_CHANNELS, embedding)?,
                Linear::load(&w.pp("time").pp(1), embedding, embedding)?,
            ),
            caption: Linear::load(&w.pp("caption"), config.caption.width, embedding)?,
            codes: Linear::load(&w.pp("codes"), codes, per_code * per_code * config.code_channels)?,
            input: Linear::load(&w.pp("input"), pixels + seen + config.code_channels, widths[0])?,
            levels: (0..last).map(level).collect::<Result<_>>()?,
            middle: blocks(&w.pp("middle"), config, last, config.down_blocks[last], config.attention[last])?,
            norm: RmsNorm::load(&w.pp("norm"), widths[0], EPS)?,
            output: Linear::load_with(&w.pp("output"), widths[0], pixels, true, Init::Zeros)?,
            config: config.clone(),
        })
    }

    /// The picture that is seen in z (B, T, p * p * 3) at the times t of the batch, with its
    /// condition: folded as z.
    pub(super) fn forward(&self, z: &Tensor, t: &[f32], condition: &Condition, text: &Text) -> Result<Tensor> {
        let (b, tokens, _) = z.dims3()?;
        let mut grid = condition.grid();
        if t.len() != b || tokens != grid.0 * grid.1 || condition.picture.dim(0)? != b {
            bail!(
                "refiner: {:?} at {} times does not fit a condition of {:?}",
                z.dims(),
                t.len(),
                condition.picture.dims()
            );
        }
        let embedding = self.embedding(t, text)?;
        // Inside the network, what the picture lacks has the scale of the noise.
        let residual = ((z - condition.base())? / self.config.noise)?;
        let seen = [&residual, &condition.picture, &self.code_features(condition)?];
        let mut x = self.input.forward(&Tensor::cat(&seen, 2)?)?;
        let mut skips = Vec::new();
        for level in &self.levels {
            let context = Context { embedding: &embedding, text, angles: None, grid };
            for block in &level.down {
                x = block.forward(&x, &context)?;
            }
            skips.push(x.clone());
            x = level.merge.forward(&merged(&x, grid)?)?;
            grid = (grid.0 / 2, grid.1 / 2);
        }
        let context = |grid, level: usize| -> Result<Context> {
            let angles =
                (self.config.attention[level] > 0).then(|| self.angles(grid, level, z.device())).transpose()?;
            Ok(Context { embedding: &embedding, text, angles, grid })
        };
        let middle = context(grid, self.levels.len())?;
        for block in &self.middle {
            x = block.forward(&x, &middle)?;
        }
        for (i, (level, skip)) in self.levels.iter().zip(skips).enumerate().rev() {
            x = ops::add(&skip, &split(&level.split.forward(&x)?, grid)?)?;
            grid = (2 * grid.0, 2 * grid.1);
            let context = context(grid, i)?;
            for block in &level.up {
                x = block.forward(&x, &context)?;
            }
        }
        let residual = (self.output.forward(&self.norm.forward(&x)?)? * self.config.noise)?;
        ops::add(condition.base(), &residual)
    }

    /// What scales and shifts every block, (B, embedding): time and the caption's first token.
    fn embedding(&self, t: &[f32], text: &Text) -> Result<Tensor> {
        let half = TIME_CHANNELS / 2;
        let angle = |t: f32, i: usize| 1000.0 * f64::from(t) * 1e4f64.powf(-(i as f64) / half as f64);
        let waves = t.iter().flat_map(|&t| {
            let angles = (0..half).map(move |i| angle(t, i));
            angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|v| v as f32)
        });
        let device = text.tokens.device();
        let waves = Tensor::from_vec(waves.collect(), (t.len(), TIME_CHANNELS), device)?;
        let time = self.time.1.forward(&self.time.0.forward(&waves)?.silu()?)?;
        let caption = self.caption.forward(&text.tokens.narrow(1, 0, 1)?.squeeze(1)?)?;
        (time + caption)?.silu()
    }

    /// The codes at every token of the finest level, (B, T, code_channels).
    fn code_features(&self, condition: &Condition) -> Result<Tensor> {
        let (h, w) = condition.code_grid;
        let (side, channels) = (self.config.tokens_per_code(), self.config.code_channels);
        let features = self.codes.forward(&condition.codes)?;
        let b = features.dim(0)?;
        let features = features.reshape((b, h, w, side, side, channels))?.permute((0, 1, 3, 2, 4, 5))?;
        features.reshape((b, h * side * w * side, channels))
    }

    /// Rotary angles of a level's positions, relative to the middle, in tokens of the coarsest
    /// level: half of the frequencies turn by rows, half by columns.
    fn angles(&self, (h, w): (usize, usize), level: usize, device: &Device) -> Result<Angles> {
        let half = self.config.head_dim / 4;
        let step = 0.5f64.powi((self.config.widths.len() - 1 - level) as i32);
        let mut angles = Vec::with_capacity(h * w * 2 * half);
        for (y, x) in (0..h).flat_map(|y| (0..w).map(move |x| (y, x))) {
            for (at, size) in [(y, h), (x, w)] {
                let position = (at as f64 + 0.5 - size as f64 / 2.0) * step;
                angles.extend((0..half).map(|i| position * THETA.powf(-(i as f64) / half as f64)));
            }
        }
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Tensor::from_vec(values, (h * w, 2 * half), device)?.to_dtype(DType::F32)
        };
        Ok(Angles { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
}

/// Two by two neighbours as one: (B, h * w, C) -> (B, h/2 * w/2, 4 C).
fn merged(x: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    x.reshape((b, h / 2, 2, w / 2, 2, c))?.permute((0, 1, 3, 2, 4, 5))?.reshape((b, h * w / 4, 4 * c))
}

/// The reverse of [`merged`]: (B, h * w, 4 C) -> (B, 2h * 2w, C).
fn split(x: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    x.reshape((b, h, w, 2, 2, c / 4))?.permute((0, 1, 3, 2, 4, 5))?.reshape((b, 4 * h * w, c / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_is_undone() -> Result<()> {
        let x = Tensor::arange(0f32, 2.0 * 24.0 * 3.0, &Device::Cpu)?.reshape((2, 24, 3))?;
        let merged = merged(&x, (4, 6))?;
        assert_eq!(merged.dims(), [2, 6, 12]);
        // Rows of the first square are the tokens 0, 1, 6 and 7.
        let first = merged.get(0)?.get(0)?.to_vec1::<f32>()?;
        assert_eq!([first[0], first[3], first[6], first[9]], [0.0, 3.0, 18.0, 21.0]);
        assert_eq!(split(&merged, (2, 3))?.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }
}
