//! The semantic branch: a ViT encoder at any grid, in the layouts of CLIP, SigLIP and
//! SigLIP2-NaFlex. Those of candle-transformers read one size of image, from dense weights.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::layers::{Block, BlockShape};
use crate::checkpoint::{Init, Weights};
use crate::nn::{LayerNorm, Linear, MAX_LAYERS, check_sizes, lecun_normal};
use crate::pixels::{GridResampling, Resampling};

/// Shape of the semantic encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Side of the grid on which the position table is stored.
    pub native_grid: usize,
    /// Whose keys, activation and norms.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layout: VitLayout,
    /// How other grids read the position table; the semantic decoder's too.
    #[serde(default, skip_serializing_if = "is_default")]
    pub positions: PositionResampling,
    /// Which of the encoder's states are the features.
    #[serde(default, skip_serializing_if = "is_default")]
    pub features: VitFeatures,
}

/// Whose keys and details a semantic encoder follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VitLayout {
    /// SigLIP2-NaFlex: patches enter by a linear layer; tanh-GELU, norms with 1e-6.
    #[default]
    Naflex,
    /// SigLIP: as NaFlex, but patches enter by a convolution, of pixels clamped to [-1, 1].
    Siglip,
    /// OpenAI's CLIP: a class token, a norm before the blocks, packed projections; QuickGELU, norms
    /// with 1e-5.
    Clip,
}

/// How a grid that is not the stored one reads the position table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionResampling {
    /// Bicubic.
    #[default]
    Bicubic,
    /// Bicubic by a scale factor of (n + 0.1) / native, which guards against rounding down to n - 1
    /// (DINO, TokenFlow).
    BicubicOffset,
    /// Bilinear, antialiased where the grid is smaller (SigLIP2-NaFlex).
    Bilinear,
}

/// Which of the encoder's states are the features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VitFeatures {
    /// The last block's output after the last norm.
    #[default]
    Normed,
    /// The last but one block's output as it is (`hidden_states[-2]`).
    Penultimate,
}

pub(super) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Sides of patches, and of the grid of positions, are no larger.
const MAX_SIDE: usize = 1 << 10;

impl VitConfig {
    /// Errors: sizes that fit no encoder.
    pub(super) fn check(&self) -> Result<()> {
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            bail!("{} heads do not divide a width of {}", self.num_attention_heads, self.hidden_size);
        }
        let sizes = [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)];
        check_sizes(sizes).map_err(candle_core::Error::Msg)?;
        if self.patch_size > MAX_SIDE || self.native_grid > MAX_SIDE {
            bail!("patches of {} pixels and a grid of {} are above {MAX_SIDE}", self.patch_size, self.native_grid);
        }
        if self.patch_size == 0 || self.native_grid == 0 || !(1..=MAX_LAYERS).contains(&self.num_hidden_layers) {
            bail!("a semantic encoder needs patches, a grid and 1 to {MAX_LAYERS} layers");
        }
        Ok(())
    }

    /// Patches along each axis of an image; the rest at its bottom and right is dropped.
    ///
    /// Errors: an image smaller than a patch.
    pub fn grid(&self, (height, width): (usize, usize)) -> Result<(usize, usize)> {
        match (height / self.patch_size, width / self.patch_size) {
            (0, _) | (_, 0) => bail!("an image of {height}x{width} has no patch of {}", self.patch_size),
            grid => Ok(grid),
        }
    }

    fn block(&self) -> BlockShape {
        let eps = if self.layout == VitLayout::Clip { 1e-5 } else { 1e-6 };
        BlockShape { width: self.hidden_size, mlp: self.intermediate_size, heads: self.num_attention_heads, eps }
    }

    /// Blocks that run.
    fn depth(&self) -> usize {
        match self.features {
            VitFeatures::Normed => self.num_hidden_layers,
            VitFeatures::Penultimate => self.num_hidden_layers - 1,
        }
    }
}

/// Positions stored on a square grid, (n, D), read on another grid: (1, h * w, D).
pub(super) fn positions_at(
    table: &Tensor,
    native: usize,
    grid: (usize, usize),
    rule: PositionResampling,
) -> Result<Tensor> {
    let d = table.dim(1)?;
    if grid == (native, native) {
        return table.unsqueeze(0);
    }
    let axis = |to: usize| match rule {
        PositionResampling::Bicubic => Resampling::bicubic(native, to),
        PositionResampling::BicubicOffset => Resampling::bicubic_scaled(native, to, native as f64 / (to as f64 + 0.1)),
        PositionResampling::Bilinear => Resampling::bilinear_antialiased(native, to),
    };
    let table = table.contiguous()?.reshape((1, native, native, d))?;
    let resampling = GridResampling::new(axis(grid.0), axis(grid.1));
    resampling.channels_last(&table)?.reshape((1, grid.0 * grid.1, d))
}

/// Image (B, 3, H, W) in [-1, 1] to one token per patch, (B, h * w, D).
#[derive(Debug)]
pub struct SemanticEncoder {
    patch_embedding: Linear,
    /// (D): CLIP's class token; its position is the table's first row.
    class_embedding: Option<Tensor>,
    /// (n, D).
    position_embedding: Tensor,
    pre_norm: Option<LayerNorm>,
    layers: Vec<Block>,
    post_norm: Option<LayerNorm>,
    config: VitConfig,
}

impl SemanticEncoder {
    /// Keys of the layout's public vision model. Tensors that the features do not depend on are not
    /// read.
    pub fn load(w: &Weights, config: &VitConfig) -> Result<Self> {
        config.check()?;
        match config.layout {
            VitLayout::Clip => Self::load_clip(w, config),
            VitLayout::Siglip | VitLayout::Naflex => Self::load_siglip(w, config),
        }
    }

    fn load_siglip(w: &Weights, config: &VitConfig) -> Result<Self> {
        let (shape, embeddings) = (config.block(), w.pp("embeddings"));
        let (d, p, native) = (shape.width, config.patch_size, config.native_grid);
        let patch = embeddings.pp("patch_embedding");
        let unused = w.unused();
        let normed = config.features == VitFeatures::Normed;
        let encoder = Self {
            patch_embedding: match config.layout {
                VitLayout::Naflex => Linear::load_dense(&patch, 3 * p * p, d)?,
                _ => Linear::new(convolution(&patch, d, p)?, Some(patch.get(d, "bias", Init::Zeros)?)),
            },
            class_embedding: None,
            position_embedding: embeddings.pp("position_embedding").get((native * native, d), "weight", TABLE)?,
            pre_norm: None,
            layers: (0..config.depth())
                .map(|i| Block::load_siglip(&w.pp("encoder.layers").pp(i), shape))
                .collect::<Result<_>>()?,
            post_norm: normed.then(|| LayerNorm::load(&w.pp("post_layernorm"), d, shape.eps)).transpose()?,
            config: config.clone(),
        };
        if !normed {
            Block::load_siglip(&unused.pp("encoder.layers").pp(config.depth()), shape)?;
            LayerNorm::load(&unused.pp("post_layernorm"), d, shape.eps)?;
        }
        let head = unused.pp("head");
        head.get((1, 1, d), "probe", Init::Zeros)?;
        head.pp("attention").get((3 * d, d), "in_proj_weight", Init::Zeros)?;
        head.pp("attention").get(3 * d, "in_proj_bias", Init::Zeros)?;
        Linear::load_dense(&head.pp("attention.out_proj"), d, d)?;
        LayerNorm::load(&head.pp("layernorm"), d, shape.eps)?;
        Linear::load_dense(&head.pp("mlp.fc1"), d, shape.mlp)?;
        Linear::load_dense(&head.pp("mlp.fc2"), shape.mlp, d)?;
        Ok(encoder)
    }

    fn load_clip(w: &Weights, config: &VitConfig) -> Result<Self> {
        let (shape, native) = (config.block(), config.native_grid);
        let (d, blocks) = (shape.width, w.pp("transformer.resblocks"));
        let norm = |w: &Weights, name: &str| LayerNorm::load(&w.pp(name), d, shape.eps);
        let normed = config.features == VitFeatures::Normed;
        if !normed {
            Block::load_clip(&w.unused().pp("transformer.resblocks").pp(config.depth()), shape)?;
            norm(&w.unused(), "ln_post")?;
        }
        Ok(Self {
            patch_embedding: Linear::new(convolution(&w.pp("conv1"), d, config.patch_size)?, None),
            class_embedding: Some(w.get(d, "class_embedding", TABLE)?),
            position_embedding: w.get((native * native + 1, d), "positional_embedding", TABLE)?,
            pre_norm: Some(norm(w, "ln_pre")?),
            layers: (0..config.depth()).map(|i| Block::load_clip(&blocks.pp(i), shape)).collect::<Result<_>>()?,
            post_norm: normed.then(|| norm(w, "ln_post")).transpose()?,
            config: config.clone(),
        })
    }

    /// Token features, (B, h * w, D).
    pub fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = self.embeddings(image)?;
        if let Some(norm) = &self.pre_norm {
            x = norm.forward(&x)?;
        }
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        if let Some(norm) = &self.post_norm {
            x = norm.forward(&x)?;
        }
        match self.class_embedding {
            Some(_) => x.narrow(1, 1, x.dim(1)? - 1)?.contiguous(),
            None => Ok(x),
        }
    }

    /// What enters the first norm or block: patches, positions added, after the class token if
    /// there is one.
    pub(super) fn embeddings(&self, image: &Tensor) -> Result<Tensor> {
        let (b, _, height, width) = image.dims4()?;
        let grid = self.config.grid((height, width))?;
        let (native, rule) = (self.config.native_grid, self.config.positions);
        let x = self.patch_embedding.forward(&self.patches(image, grid)?)?;
        let Some(class) = &self.class_embedding else {
            return x.broadcast_add(&positions_at(&self.position_embedding, native, grid, rule)?);
        };
        let d = class.dim(0)?;
        let table = self.position_embedding.narrow(0, 1, native * native)?;
        let class = (class.reshape((1, d))? + self.position_embedding.narrow(0, 0, 1)?)?;
        let x = x.broadcast_add(&positions_at(&table, native, grid, rule)?)?;
        Tensor::cat(&[class.unsqueeze(0)?.broadcast_as((b, 1, d))?.contiguous()?, x], 1)
    }

    /// Each patch as one row: (patch row, patch column, channel) for NaFlex, the channel first for
    /// a convolution.
    fn patches(&self, image: &Tensor, (h, w): (usize, usize)) -> Result<Tensor> {
        let (b, p) = (image.dim(0)?, self.config.patch_size);
        let image = match self.config.layout {
            // The reference takes the image to bytes' range and back, as SigLIP's processor would.
            VitLayout::Siglip => {
                let bytes = ((image + 1.0)? * 127.5)?.clamp(0f32, 255f32)?;
                (((bytes / 255.0)? - 0.5)? / 0.5)?
            }
            VitLayout::Naflex | VitLayout::Clip => image.clone(),
        };
        let order = match self.config.layout {
            VitLayout::Naflex => vec![0, 2, 4, 3, 5, 1],
            VitLayout::Siglip | VitLayout::Clip => vec![0, 2, 4, 1, 3, 5],
        };
        let patches = image.narrow(2, 0, h * p)?.narrow(3, 0, w * p)?.reshape((b, 3, h, p, w * p))?;
        let patches = patches.reshape(&[b, 3, h, p, w, p][..])?.permute(order)?;
        patches.reshape((b, h * w, 3 * p * p))
    }

    /// One unit vector per image, (B, D): the mean of its token features.
    pub fn embed(&self, image: &Tensor) -> Result<Tensor> {
        let pooled = self.forward(image)?.mean(1)?;
        pooled.broadcast_div(&(pooled.sqr()?.sum_keepdim(1)? + 1e-12)?.sqrt()?)
    }
}

const TABLE: Init = Init::Normal { std: 0.02 };

/// A convolution whose stride is its side, as the matrix (D, 3 * p * p) that it is.
fn convolution(w: &Weights, d: usize, p: usize) -> Result<Tensor> {
    let weight = w.get((d, 3, p, p), "weight", lecun_normal(3 * p * p))?;
    w.derive((d, 3 * p * p), || weight.reshape((d, 3 * p * p)))
}
