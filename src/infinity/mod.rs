//! Infinity's transformer: it draws scale by scale as NextFlow's does, but reads the prompt by
//! cross-attention to the features of a text encoder, and predicts every bit of a token by itself.

mod block;
mod config;
mod rope;
mod text;

use candle_core::{DType, Device, Result, Tensor};

pub use config::{InfinityConfig, presets};

use crate::backbone::{Cache, Rope};
use crate::checkpoint::{Init, Weights};
use crate::nn::Linear;
use crate::ops;
use block::{Block, EPS, Seen, Text};
use text::{TextProjections, exact};

/// A loaded transformer. It holds no state: the keys and values of a batch are in its [`Cache`]s.
#[derive(Debug)]
pub struct Infinity {
    text: TextProjections,
    /// Added to the first scale's token, (1, C).
    start: Tensor,
    /// A row for every scale, (levels, C).
    levels: Tensor,
    word_embed: Linear,
    ada: Linear,
    head_ada: Linear,
    head: Linear,
    blocks: Vec<Block>,
    config: InfinityConfig,
    device: Device,
    /// Of the blocks' activations.
    dtype: DType,
}

/// The conditions of a batch's rows: their texts, projected for the layers.
#[derive(Debug)]
pub struct Conditions {
    /// A vector for each text, (R, C).
    pub pooled: Tensor,
    /// What cross-attention makes keys and values of, (1, tokens, C) of each row.
    pub texts: Vec<Tensor>,
    /// Gates, scales and shifts for all blocks, (R, 6, C).
    pub ada: Tensor,
    /// Scale and shift of the last norm, (R, C) each.
    head: [Tensor; 2],
    /// Keys and values of the texts: of every block and every row.
    keys: Vec<Vec<Text>>,
}

impl Conditions {
    /// Forgets all but the first `rows`.
    pub fn truncate(&mut self, rows: usize) -> Result<()> {
        self.pooled = self.pooled.narrow(0, 0, rows)?;
        self.ada = self.ada.narrow(0, 0, rows)?;
        for part in &mut self.head {
            *part = part.narrow(0, 0, rows)?;
        }
        self.texts.truncate(rows);
        self.keys.iter_mut().for_each(|keys| keys.truncate(rows));
        Ok(())
    }
}

/// Guidance within the network: after some blocks both rows of an image go on from one mixture.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// Indices of the blocks.
    pub after: Vec<usize>,
    /// Weight of the conditional row; that of the other is 1 less it.
    pub weight: f64,
}

impl Infinity {
    /// The reference's keys: `text_norm`, `text_proj_for_sos`, `text_proj_for_ca`, `cfg_uncond`,
    /// `pos_start`, `lvl_embed`, `word_embed`, `shared_ada_lin`, `head_nm`, `head` and
    /// `block_chunks`. Blocks are in the type of the weights; all else is f32.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`InfinityConfig::check`] refuses.
    pub fn load(w: &Weights, config: &InfinityConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        let width = config.width;
        let plain = w.with_dtype(DType::F32);
        let table = Init::Normal { std: 0.02 };
        let blocks = (0..config.depth).map(|i| Block::load(&w.pp(config.block_key(i)), config));
        Ok(Self {
            text: TextProjections::load(w, config)?,
            start: plain.get((1, 1, width), "pos_start", table)?.squeeze(0)?,
            levels: plain.pp("lvl_embed").get((config.levels, width), "weight", table)?,
            word_embed: exact(&w.pp("word_embed"), config.bits, width)?,
            ada: exact(&w.pp("shared_ada_lin.1"), width, 6 * width)?,
            head_ada: exact(&w.pp("head_nm.ada_lin.1"), width, 2 * width)?,
            head: exact(&w.pp("head"), width, 2 * config.bits)?,
            blocks: blocks.collect::<Result<_>>()?,
            config: config.clone(),
            device: w.device().clone(),
            dtype: w.dtype(),
        })
    }

    /// Shape.
    pub fn config(&self) -> &InfinityConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The learned features of an unconditional row beside a prompt of `tokens` tokens,
    /// (tokens, text_width).
    pub fn unconditional(&self, tokens: usize) -> Result<Tensor> {
        self.text.unconditional(tokens)
    }

    /// The conditions of texts, one per row, from their features (tokens, text_width).
    pub fn condition(&self, texts: &[Tensor]) -> Result<Conditions> {
        let seen: Vec<(Tensor, Tensor)> = texts
            .iter()
            .map(|features| self.text.forward(&features.to_device(&self.device)?))
            .collect::<Result<_>>()?;
        let (pooled, texts): (Vec<Tensor>, Vec<Tensor>) = seen.into_iter().unzip();
        let pooled = Tensor::cat(&pooled, 0)?;
        let active = pooled.silu()?;
        let (rows, width) = pooled.dims2()?;
        let head = self.head_ada.forward(&active)?;
        let half = |i: usize| head.narrow(1, i * width, width)?.contiguous();
        let keys = |block: &Block| texts.iter().map(|text| block.text(text)).collect();
        Ok(Conditions {
            ada: self.ada.forward(&active)?.reshape((rows, 6, width))?,
            head: [half(0)?, half(1)?],
            keys: self.blocks.iter().map(keys).collect::<Result<_>>()?,
            pooled,
            texts,
        })
    }

    /// A cache for a row, with room for `tokens` tokens.
    pub fn cache(&self, capacity: usize) -> Result<Cache> {
        let heads = (self.config.heads, self.config.head_dim());
        Cache::of_layers(self.config.depth, heads, capacity, self.dtype, &self.device)
    }

    /// Angles of a grid (height, width) on the lattice of its ratio, the last grid (height, width)
    /// of the largest level.
    pub fn angles(&self, grid: (usize, usize), lattice: (usize, usize)) -> Result<Rope> {
        rope::grid(grid, lattice, self.config.head_dim(), &self.device)
    }

    /// The token that the first scale is predicted from, in every row: (R, 1, C).
    pub fn start(&self, conditions: &Conditions) -> Result<Tensor> {
        conditions.pooled.broadcast_add(&self.start)?.broadcast_add(&self.levels.narrow(0, 0, 1)?)?.unsqueeze(1)
    }

    /// Tokens of scale `si` from its inputs (B, T, bits): (B, T, C).
    pub fn embed(&self, si: usize, inputs: &Tensor) -> Result<Tensor> {
        let x = self.word_embed.forward(&inputs.to_dtype(DType::F32)?)?;
        x.broadcast_add(&self.levels.narrow(0, si, 1)?)
    }

    /// The forward pass of a scale's tokens x (R, T, C), in f32, against the cached scales: hidden
    /// states (R, T, C). With `keep` the scale is added to the caches.
    pub fn forward(
        &self,
        mut x: Tensor,
        rope: &Rope,
        conditions: &Conditions,
        (caches, keep): (&mut [Cache], bool),
        mixture: Option<&Mixture>,
    ) -> Result<Tensor> {
        let tokens = x.dim(1)?;
        for (i, (block, text)) in self.blocks.iter().zip(&conditions.keys).enumerate() {
            x = block.forward(x, i, &conditions.ada, &Seen { rope, caches, keep, text })?;
            if let Some(Mixture { weight, .. }) = mixture.filter(|mixture| mixture.after.contains(&i)) {
                let half = x.dim(0)? / 2;
                let mixed = ((x.narrow(0, 0, half)? * *weight)? + (x.narrow(0, half, half)? * (1.0 - weight))?)?;
                x = Tensor::cat(&[&mixed, &mixed], 0)?;
            }
        }
        if keep {
            caches.iter_mut().for_each(|cache| cache.advance(tokens));
        }
        Ok(x)
    }

    /// Logits of every bit of hidden states (R, T, C) of the first rows: (R, T, 2 * bits) in f32,
    /// those of 0 and of 1 side by side.
    pub fn logits(&self, hidden: &Tensor, conditions: &Conditions) -> Result<Tensor> {
        let rows = hidden.dim(0)?;
        let [scale, shift] = &conditions.head;
        let normed = ops::modulated_norm(hidden, &scale.narrow(0, 0, rows)?, &shift.narrow(0, 0, rows)?, EPS)?;
        self.head.forward(&normed)
    }
}
