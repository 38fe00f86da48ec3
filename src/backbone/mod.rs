//! The decoder-only transformer: its blocks, rotary positions, and the image ends around them. NextFlow and
//! TokenFlow-t2i are two configurations of it.

mod block;
mod cache;
mod config;
pub mod presets;
pub mod rope;
pub mod sequence;

use candle_core::{DType, Device, Result, Tensor};

pub use block::{Context, Step};
pub use cache::Cache;
pub use config::{BackboneConfig, InputMode, NormPlacement, Vocabulary};
pub use rope::{Position, Rope};

use crate::checkpoint::{Init, Weights};
use crate::ops::{self, WeightMatrix};
use block::{Block, RmsNorm};

/// A loaded transformer. It holds no state: what a sequence has seen is in its [`Cache`].
#[derive(Debug)]
pub struct Backbone {
    embed_tokens: WeightMatrix,
    layers: Vec<Block>,
    norm: RmsNorm,
    /// (first code + codes, hidden); without the rows before the codes if they are tied to `embed_tokens`.
    lm_head: WeightMatrix,
    connector: [(WeightMatrix, Tensor); 2],
    /// Row k is added to the tokens of scale k, or row k + 1 if row 0 is added to text: with `code_positions`. The first
    /// scale is never an input, so its row is not used.
    scale_embed: Tensor,
    /// Row 0 is added to the token that predicts the first code, the others to the codes of the other scales in order.
    code_positions: Option<Tensor>,
    config: BackboneConfig,
    device: Device,
}

impl Backbone {
    /// Qwen2.5-VL's keys (`model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`) and TokenFlow's `mm_projector`
    /// for the connector; the scale embedding is our `model.scale_embed`, or TokenFlow-t2i's `model.lvl_embed` with its
    /// code positions `model.pos_1LC`.
    pub fn load(w: &Weights, config: &BackboneConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        let hidden = config.hidden_size;
        let model = w.pp("model");
        let normal = |fan_in: usize| Init::Normal { std: (fan_in as f64).powf(-0.5) };
        let linear = |w: Weights, from: usize| -> Result<(WeightMatrix, Tensor)> {
            Ok((w.matrix((hidden, from), "weight", normal(from))?, w.get(hidden, "bias", Init::Zeros)?))
        };
        let connector = model.pp("mm_projector");
        let levels = (config.scale_rows(), hidden);
        let table = Init::Normal { std: 0.1 };
        Ok(Self {
            embed_tokens: model.pp("embed_tokens").matrix(
                (config.embedding_rows(), hidden),
                "weight",
                Init::Normal { std: 0.5 },
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Block::load(&model.pp("layers").pp(i), config))
                .collect::<Result<_>>()?,
            norm: RmsNorm::load(&model.pp("norm"), hidden, config.rms_norm_eps)?,
            lm_head: w.pp("lm_head").matrix((config.head_rows(), hidden), "weight", Init::Normal { std: 0.02 })?,
            connector: [linear(connector.pp(0), config.code_dim)?, linear(connector.pp(2), hidden)?],
            scale_embed: match config.code_positions {
                None => model.get(levels, "scale_embed", table)?,
                Some(_) => model.pp("lvl_embed").get(levels, "weight", table)?,
            },
            code_positions: config.code_positions.map(|n| model.get((n, hidden), "pos_1LC", table)).transpose()?,
            config: config.clone(),
            device: w.device().clone(),
        })
    }

    /// Shape and choices.
    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.dtype()
    }

    /// Text ids, `<boi>` and `<eoi>` among them: (R, T) u32 -> (R, T, hidden).
    pub fn embed_text(&self, ids: &Tensor) -> Result<Tensor> {
        let (rows, tokens) = ids.dims2()?;
        let x = self.embed_tokens.select(&ids.flatten_all()?)?.reshape((rows, tokens, ()))?;
        if self.code_positions.is_some() { x.broadcast_add(&self.scale_embed.narrow(0, 0, 1)?) } else { Ok(x) }
    }

    /// Text of which the last token predicts the first code of an image: as [`Backbone::embed_text`].
    pub fn embed_prefix(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.embed_text(ids)?;
        let Some(positions) = &self.code_positions else { return Ok(x) };
        x.broadcast_add(&positions.narrow(0, 0, 1)?.pad_with_zeros(0, x.dim(1)? - 1, 0)?)
    }

    /// Code features that feed scale `index` (0-based) of an image of the grids `scales`:
    /// (R, T, code_dim) -> (R, T, hidden).
    pub fn embed_codes(&self, features: &Tensor, index: usize, scales: &[(usize, usize)]) -> Result<Tensor> {
        let x = self.connect(features)?.broadcast_add(&self.scale_rows(&[index], scales.len())?)?;
        let Some(positions) = &self.code_positions else { return Ok(x) };
        let first = scales[..index].iter().map(|(h, w)| h * w).sum();
        x.broadcast_add(&positions.narrow(0, first, features.dim(1)?)?)
    }

    /// The connector alone: Linear, GELU, Linear.
    pub fn connect(&self, features: &Tensor) -> Result<Tensor> {
        let [(w0, b0), (w2, b2)] = &self.connector;
        w2.linear(&ops::gelu_erf(&w0.linear(features, Some(b0))?)?, Some(b2))
    }

    /// What is added to the tokens of the scales `indices` of an image of `count` scales: (indices, hidden).
    pub fn scale_rows(&self, indices: &[usize], count: usize) -> Result<Tensor> {
        let text = usize::from(self.code_positions.is_some());
        let ids: Vec<u32> = indices.iter().map(|&i| (i + text) as u32).collect();
        let rows = self.scale_embed.index_select(&Tensor::new(ids, &self.device)?, 0)?;
        if !self.config.scale_length_embedding {
            return Ok(rows);
        }
        let length = sinusoid(count as f64, self.config.hidden_size);
        rows.broadcast_add(&Tensor::new(length, &self.device)?.to_dtype(self.dtype())?)
    }

    /// Runs `x` (R, T, hidden) through the blocks and the last norm.
    pub fn forward(&self, x: &Tensor, rope: &Rope, mut context: Context) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, rope, i, &mut context)?;
        }
        context.finish(x.dim(0)?, x.dim(1)?);
        self.norm.forward(&x)
    }

    /// Code logits, (..., hidden) -> (..., codes): only the head's code rows are computed.
    pub fn code_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let first = if self.config.tie_word_embeddings { 0 } else { self.config.first_code() };
        self.lm_head.narrow(first, self.config.codebook_size)?.linear(hidden, None)
    }

    /// Logits of text and, with markers, of `<boi>`: (..., hidden) -> (..., vocab or vocab + 1).
    pub fn text_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = if self.config.tie_word_embeddings { &self.embed_tokens } else { &self.lm_head };
        let rows = self.config.first_code().min(self.config.vocab_size + 1);
        head.narrow(0, rows)?.linear(hidden, None)
    }
}

/// The transformer's sinusoidal embedding of a number: sines, then cosines, of geometric frequencies from 1 to 1e-4.
fn sinusoid(value: f64, size: usize) -> Vec<f32> {
    let half = size / 2;
    let angle = |i: usize| value * (1e-4f64).powf(i as f64 / half as f64);
    (0..half).map(|i| angle(i).sin() as f32).chain((0..half).map(|i| angle(i).cos() as f32)).collect()
}
