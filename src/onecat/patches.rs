//! Pictures as input of the model: sizes, patches, and features in place of token embeddings.

use candle_core::{D, Device, Result, Tensor};
use image::{RgbImage, imageops};

use super::config::{MERGE, OneCatConfig};
use crate::checkpoint::{Init, Weights};
use crate::nn::{LayerNorm, Linear, lecun_normal};
use crate::ops::{self, WeightMatrix};
use crate::pixels::GridResampling;
use crate::vision::{ImageProcessor, Patches};

/// Of the layer norm in the connector.
const EPS: f64 = 1e-5;
/// Pixels of a token along each side, by which the reference bounds sizes, whatever the patch size.
const TOKEN: usize = 28;
/// The fewest and the most tokens of a picture, its thumbnail aside.
const TOKENS: [usize; 2] = [576, 4000];
/// Pixels of the short side of a picture to be edited: for images of up to 512 pixels, and for
/// larger ones.
const SHORT: [f64; 2] = [672.0, 1008.0];
/// Scales of an image of the 512 pixel level.
const SMALL_LEVEL: usize = 10;

/// Preprocessing of pictures: the size rule and ImageNet's mean and deviation.
pub fn processor() -> ImageProcessor {
    ImageProcessor {
        min_pixels: TOKENS[0] * TOKEN * TOKEN,
        max_pixels: TOKENS[1] * TOKEN * TOKEN,
        image_mean: [0.485, 0.456, 0.406],
        image_std: [0.229, 0.224, 0.225],
    }
}

/// The grid of tokens (height, width) of a picture of (width, height) pixels of a
/// conversation.
///
/// Errors: usage, if one side is more than 200 times the other.
pub fn understanding_grid(
    config: &OneCatConfig,
    processor: &ImageProcessor,
    size: (u32, u32),
) -> crate::error::Result<(usize, usize)> {
    let side = MERGE * config.patch_size;
    let (width, height) = processor.size(size, side)?;
    Ok((height as usize / side, width as usize / side))
}

/// A picture to be understood, and its thumbnail, in this order.
///
/// Errors: as [`understanding_grid`].
pub fn understanding(
    config: &OneCatConfig,
    processor: &ImageProcessor,
    image: &RgbImage,
) -> crate::error::Result<[Patches; 2]> {
    let grid = understanding_grid(config, processor, image.dimensions())?;
    let cut = |grid| processor.cut(image, grid, (config.patch_size, MERGE));
    Ok([cut(grid), cut((config.position_grid / MERGE, config.position_grid / MERGE))])
}

/// What is kept of a picture of (width, height) pixels to be edited: the centre of its own ratio,
/// which rounding makes one row or column smaller than the picture now and then.
pub fn edit_crop((width, height): (u32, u32)) -> (u32, u32) {
    let (w, h) = (f64::from(width), f64::from(height));
    let ratio = h / w;
    match w * ratio > h {
        true => ((h / ratio) as u32, height),
        false => (width, (w * ratio) as u32),
    }
}

/// The grid of tokens (height, width) of a picture of (width, height) pixels that is edited into an
/// image of so many `scales`.
///
/// Errors: as [`understanding_grid`].
pub fn edit_grid(
    config: &OneCatConfig,
    (width, height): (u32, u32),
    scales: usize,
) -> crate::error::Result<(usize, usize)> {
    let ratio = f64::from(height) / f64::from(width);
    let short = if scales <= SMALL_LEVEL { SHORT[0] } else { SHORT[1] };
    let (h, w) = if ratio >= 1.0 { (short * ratio, short) } else { (short, short / ratio) };
    understanding_grid(config, &processor(), (w as u32, h as u32))
}

/// A picture to be edited into an image of so many `scales`.
///
/// Errors: as [`understanding_grid`].
pub fn reference(config: &OneCatConfig, image: &RgbImage, scales: usize) -> crate::error::Result<Patches> {
    let grid = edit_grid(config, image.dimensions(), scales)?;
    let (width, height) = edit_crop(image.dimensions());
    let (left, top) = ((image.width() - width) / 2, (image.height() - height) / 2);
    let cropped = imageops::crop_imm(image, left, top, width.max(1), height.max(1)).to_image();
    Ok(processor().cut(&cropped, grid, (config.patch_size, MERGE)))
}

/// A learned grid of positions (1 + side * side, C), row 0 unused, at (height, width) positions:
/// (height * width, C), row-major.
pub fn resized_positions(table: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
    let (rows, _) = table.dims2()?;
    let side = (rows - 1).isqrt();
    let grid = table.narrow(0, 1, side * side)?.unsqueeze(0)?;
    GridResampling::bicubic((side, side), (h, w)).tokens(&grid)?.squeeze(0)
}

/// The networks between pixels and tokens: a convolution to patches, their positions, and a
/// connector.
#[derive(Debug)]
pub struct PatchEmbedder {
    /// (C, 3 * patch * patch).
    kernel: WeightMatrix,
    bias: Tensor,
    /// (1 + grid * grid, C) in f32.
    positions: Tensor,
    norm: LayerNorm,
    connector: [Linear; 2],
}

impl PatchEmbedder {
    /// The keys `patch_vision_model.embeddings` and `mlp`.
    pub(super) fn load(w: &Weights, config: &OneCatConfig) -> Result<Self> {
        let (channels, pixels) = (config.patch_width, 3 * config.patch_size * config.patch_size);
        let (merged, hidden) = (MERGE * MERGE * channels, config.transformer.hidden_size);
        let (embeddings, mlp) = (w.pp("patch_vision_model.embeddings"), w.pp("mlp"));
        let kernel = embeddings.pp("patch_embedding");
        let shape = (channels, 3, config.patch_size, config.patch_size);
        let filters = kernel.get(shape, "weight", lecun_normal(pixels))?;
        let rows = 1 + config.position_grid * config.position_grid;
        let positions = embeddings.with_dtype(candle_core::DType::F32);
        let positions = positions.get((1, rows, channels), "position_embedding", Init::Normal { std: 0.02 })?;
        Ok(Self {
            kernel: w.derive((channels, pixels), || filters.reshape((channels, pixels)))?.into(),
            bias: kernel.get(channels, "bias", Init::Zeros)?,
            positions: positions.squeeze(0)?,
            norm: LayerNorm::load(&mlp.pp(0), merged, EPS)?,
            connector: [Linear::load(&mlp.pp(1), merged, hidden)?, Linear::load(&mlp.pp(3), hidden, hidden)?],
        })
    }

    /// Patches of an image, those of a token together, without their positions: (patches, C).
    pub fn project(&self, patches: &Patches) -> Result<Tensor> {
        let (h, w) = patches.tokens;
        let count = h * w * MERGE * MERGE;
        let device: &Device = self.bias.device();
        let values = Tensor::from_slice(&patches.values, (count, patches.values.len() / count.max(1)), device)?;
        self.kernel.linear(&values.to_dtype(self.bias.dtype())?, Some(&self.bias))
    }

    /// Positions of the patches of (height, width) tokens, those of a token together: (patches, C)
    /// in f32.
    pub fn positions(&self, (h, w): (usize, usize)) -> Result<Tensor> {
        let channels = self.positions.dim(D::Minus1)?;
        let rows = resized_positions(&self.positions, (MERGE * h, MERGE * w))?;
        let split = rows.reshape(&[h, MERGE, w, MERGE, channels][..])?.permute((0, 2, 1, 3, 4))?;
        split.reshape((h * w * MERGE * MERGE, channels))
    }

    /// Features of an image, one row per token, row by row: (tokens, hidden).
    pub fn forward(&self, patches: &Patches) -> Result<Tensor> {
        let x = self.project(patches)?;
        let x = ops::add(&x, &self.positions(patches.tokens)?.to_dtype(x.dtype())?)?;
        let (h, w) = patches.tokens;
        let x = self.norm.forward(&x.reshape((h * w, ()))?)?;
        let [first, second] = &self.connector;
        second.forward(&ops::gelu_erf(&first.forward(&x)?)?)
    }
}
