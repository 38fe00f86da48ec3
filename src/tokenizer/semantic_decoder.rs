//! From the semantic half of F back to the semantic encoder's features: a BEiT-style ViT.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::layers::{Block, BlockShape};
use super::vit::{PositionResampling, VitConfig, positions_at};
use crate::checkpoint::{Init, Weights};
use crate::nn::{LayerNorm, Linear, MAX_LAYERS, check_sizes, lecun_normal};

const EPS: f64 = 1e-6;

/// Shape of the semantic decoder. Its width is the semantic encoder's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SemanticDecoderConfig {
    /// Blocks.
    pub depth: usize,
    /// Heads; the semantic encoder's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<usize>,
    /// Width of the MLP; the semantic encoder's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<usize>,
    /// Width of the features that come out of the whole; the semantic encoder's unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_dim: Option<usize>,
}

impl SemanticDecoderConfig {
    /// Errors: more than [`MAX_LAYERS`] blocks, and heads that do not divide the encoder's width.
    pub(super) fn check(&self, encoder: &VitConfig) -> Result<()> {
        let sizes = [("intermediate_size", self.intermediate_size), ("out_dim", self.out_dim)];
        let given = sizes.into_iter().filter_map(|(name, size)| Some((name, size?)));
        check_sizes(given).map_err(|e| candle_core::Error::Msg(format!("semantic_decoder: {e}")))?;
        match self.num_attention_heads {
            _ if self.depth > MAX_LAYERS => {
                bail!("{} blocks of a semantic decoder are more than {MAX_LAYERS}", self.depth)
            }
            Some(heads) if heads == 0 || !encoder.hidden_size.is_multiple_of(heads) => {
                bail!("{heads} heads do not divide the semantic decoder's width of {}", encoder.hidden_size)
            }
            _ => Ok(()),
        }
    }
}

/// The semantic half of F to the width of the semantic encoder.
#[derive(Debug)]
pub struct SemanticDecoder {
    patch_embed: Linear,
    cls_token: Tensor,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    fc_norm: LayerNorm,
    native_grid: usize,
    positions: PositionResampling,
}

impl SemanticDecoder {
    /// Keys of the reference's `decoder_vqkd`.
    pub fn load(w: &Weights, encoder: &VitConfig, config: &SemanticDecoderConfig, code_dim: usize) -> Result<Self> {
        let shape = BlockShape {
            width: encoder.hidden_size,
            mlp: config.intermediate_size.unwrap_or(encoder.intermediate_size),
            heads: config.num_attention_heads.unwrap_or(encoder.num_attention_heads),
            eps: EPS,
        };
        let (d, proj) = (shape.width, w.pp("patch_embed.proj"));
        let weight = proj.get((d, code_dim, 1, 1), "weight", lecun_normal(code_dim))?;
        let weight = proj.derive((d, code_dim), || weight.reshape((d, code_dim)))?;
        let tokens = encoder.native_grid * encoder.native_grid + 1;
        Ok(Self {
            patch_embed: Linear::new(weight, Some(proj.get(d, "bias", Init::Zeros)?)),
            cls_token: w.get((1, 1, d), "cls_token", Init::Normal { std: 0.02 })?,
            pos_embed: w.get((1, tokens, d), "pos_embed", Init::Normal { std: 0.02 })?,
            blocks: (0..config.depth).map(|i| Block::load_beit(&w.pp("blocks").pp(i), shape)).collect::<Result<_>>()?,
            fc_norm: LayerNorm::load(&w.pp("fc_norm"), d, EPS)?,
            native_grid: encoder.native_grid,
            positions: encoder.positions,
        })
    }

    /// (B, h, w, code_dim) -> (B, h * w, D).
    pub fn forward(&self, codes: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = codes.dims4()?;
        let x = self.patch_embed.forward(&codes.reshape((b, h * w, c))?)?;
        let d = x.dim(2)?;
        let table = self.pos_embed.squeeze(0)?;
        let patches = table.narrow(0, 1, table.dim(0)? - 1)?;
        let grid = positions_at(&patches, self.native_grid, (h, w), self.positions)?;
        let cls = (&self.cls_token + table.narrow(0, 0, 1)?.unsqueeze(0)?)?.broadcast_as((b, 1, d))?;
        let mut x = Tensor::cat(&[cls, x.broadcast_add(&grid)?], 1)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.fc_norm.forward(&x.narrow(1, 1, h * w)?.contiguous()?)
    }
}
