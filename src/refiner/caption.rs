//! The caption encoder: the text branch of the condition.

use candle_core::{Device, Result, Tensor, bail};

use super::config::{CaptionConfig, RefinerConfig};
use super::layers::{Attention, EPS, GatedMlp, Text};
use crate::checkpoint::{Init, Weights};
use crate::nn::RmsNorm;
use crate::ops::{self, WeightMatrix};

/// Captions as tokens, padded to one length: (B, S).
#[derive(Clone, Debug)]
pub struct Captions {
    ids: Tensor,
    /// 1 where there is a token, u8; none if no caption is padded.
    kept: Option<Tensor>,
}

impl Captions {
    /// Of the token ids of every caption, of which the first `max_tokens` are read; an empty one
    /// stands for any picture.
    pub fn new(captions: &[&[u32]], config: &CaptionConfig, device: &Device) -> Result<Self> {
        let read = |ids: &[u32]| ids.len().min(config.max_tokens);
        // Every caption begins with a token of its own, so that an empty one has something to see.
        let longest = 1 + captions.iter().map(|ids| read(ids)).max().unwrap_or(0);
        let (mut ids, mut kept) = (Vec::new(), Vec::new());
        for caption in captions {
            let caption = &caption[..read(caption)];
            if let Some(id) = caption.iter().find(|&&id| id as usize >= config.vocab_size) {
                bail!("token {id} is none of the refiner's {}", config.vocab_size);
            }
            ids.push(config.vocab_size as u32);
            ids.extend(caption);
            ids.resize(ids.len() + longest - 1 - caption.len(), 0);
            kept.extend((0..longest).map(|i| u8::from(i <= caption.len())));
        }
        let shape = (captions.len(), longest);
        let padded = kept.contains(&0);
        Ok(Self {
            ids: Tensor::from_vec(ids, shape, device)?,
            kept: padded.then(|| Tensor::from_vec(kept, shape, device)).transpose()?,
        })
    }
}

/// A small transformer over the tokens of a caption, which see each other both ways.
#[derive(Debug)]
pub(super) struct CaptionEncoder {
    embed: WeightMatrix,
    positions: Tensor,
    blocks: Vec<(Attention, RmsNorm, GatedMlp)>,
    norm: RmsNorm,
}

impl CaptionEncoder {
    /// Keys `embed` (tokens + 1, width), of which the last row begins every caption,
    /// `embed_positions`, `blocks.N` and `norm`.
    pub(super) fn load(w: &Weights, config: &RefinerConfig) -> Result<Self> {
        let CaptionConfig { vocab_size, width, blocks, heads, max_tokens } = config.caption;
        let block = |i: usize| -> Result<_> {
            let w = w.pp("blocks").pp(i);
            let attention = Attention::load(&w.pp("attention"), width, heads, None)?;
            Ok((attention, RmsNorm::load(&w.pp("norm"), width, EPS)?, GatedMlp::load(&w.pp("mlp"), width, 2 * width)?))
        };
        Ok(Self {
            embed: w.matrix((vocab_size + 1, width), "embed", Init::Normal { std: 1.0 })?,
            positions: w.get((max_tokens + 1, width), "embed_positions", Init::Normal { std: 0.1 })?,
            blocks: (0..blocks).map(block).collect::<Result<_>>()?,
            norm: RmsNorm::load(&w.pp("norm"), width, EPS)?,
        })
    }

    /// (B, S) tokens -> (B, S, width) features.
    pub(super) fn forward(&self, captions: &Captions) -> Result<Text> {
        let (b, s) = captions.ids.dims2()?;
        let (_, width) = self.positions.dims2()?;
        let x = self.embed.select(&captions.ids.flatten_all()?)?.reshape((b, s, width))?;
        let mut x = x.broadcast_add(&self.positions.narrow(0, 0, s)?)?;
        let kept = captions.kept.as_ref();
        for (attention, norm, mlp) in &self.blocks {
            x = attention.forward(&x, None, kept, None)?;
            x = ops::add(&x, &mlp.forward(&norm.forward(&x)?)?)?;
        }
        Ok(Text { tokens: self.norm.forward(&x)?, kept: captions.kept.clone() })
    }
}
