//! Memory of a conversation, computed from shapes.

use candle_core::{DType, Device};
use serde::Serialize;

use super::session::CHUNK;
use super::{ChatConfig, ChatModel, ImageEncoder};
use crate::chat::Letterbox;
use crate::checkpoint::{Inventory, Matrices, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Result};
use crate::generate::{Size, cost, schedule};
use crate::onecat::{Reading, ReadingParts, patches};
use crate::tokenizer::ImageTokenizer;
use crate::vision::VisionTower;

/// Bytes that a process needs for a conversation.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ChatMemory {
    /// All weights, those of the image encoder or the image tokenizer too.
    pub weights: u64,
    /// Keys and values.
    pub cache: u64,
    /// Peak of a pass of the transformer, or of the image encoder over the largest image.
    pub activations: u64,
    /// The program itself, its threads and vocabulary.
    pub program: u64,
}

impl ChatMemory {
    /// At the peak.
    pub fn peak(&self) -> u64 {
        self.weights + self.cache + self.activations + self.program
    }

    /// Its parts by name.
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        let Self { weights, cache, activations, program } = *self;
        [("weights", weights), ("cache", cache), ("at work", activations), ("program", program)]
    }
}

impl ChatConfig {
    /// The grid (height, width) of the largest pass over an image of (width, height) pixels, and
    /// all its tokens.
    ///
    /// Errors: usage, for an image that is too narrow, or if the model sees none.
    pub fn image_tokens(&self, size: (u32, u32)) -> Result<((usize, usize), usize)> {
        if let Some(config) = &self.drawing {
            let scales = Letterbox::of(config, size, Size::Auto)?.scales;
            let last = scales.last().copied().unwrap_or_default();
            let whole = if config.backbone.context_last_scale { last.0 * last.1 } else { 0 };
            return Ok((last, 1 + schedule::codes(&scales) + whole));
        }
        let (vision, processor) = self.vision.as_ref().ok_or_else(ChatModel::sees_nothing)?;
        match vision {
            ImageEncoder::Tower(vision) => processor.tokens(size, vision).map(|(h, w)| ((h, w), h * w)),
            ImageEncoder::Patches(config) => {
                let (h, w) = patches::understanding_grid(config, processor, size)?;
                Ok(((h, w), h * w + config.thumbnail_tokens()))
            }
        }
    }

    /// Memory of a conversation of `tokens` tokens, the largest of whose images is a grid of tokens
    /// `image`, with the weights as `source` stores them (GGUF, or random) or as `weights`.
    ///
    /// Errors: a source whose header cannot be read.
    pub fn memory(
        &self,
        source: Option<&Source>,
        weights: Option<WeightType>,
        tokens: usize,
        image: Option<(usize, usize)>,
        device: &Device,
    ) -> Result<ChatMemory> {
        let placed = || weights.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
        let (dtype, matrices) = source.map_or_else(placed, |source| source.placed(TRANSFORMER, weights, device));
        let requested = Weights::inventory();
        self.build(&requested)?;
        let held = match source.filter(|source| source.is_gguf(TRANSFORMER)) {
            Some(source) => Inventory::of(source, TRANSFORMER)?.files().iter().map(|file| file.bytes).sum(),
            None => source.map_or(1, |source| source.copies(matrices)) * requested.bytes(dtype, matrices),
        };
        let (c, width) = (&self.backbone, dtype.size_in_bytes());
        // A model that draws has a cache of the unconditional row as well.
        let rows = if self.drawing.is_some() { 2 } else { 1 };
        let cache = rows * 2 * c.num_hidden_layers * tokens.max(CHUNK) * c.num_key_value_heads * c.head_dim() * width;
        let seen = self.vision.as_ref().zip(image).map_or(0, |((v, _), (h, w))| match v {
            ImageEncoder::Tower(v) => {
                let patches = h * w * v.spatial_merge_size * v.spatial_merge_size;
                patches * (4 * v.intermediate_size).max(9 * v.hidden_size) * width
            }
            ImageEncoder::Patches(_) => 0,
        });
        let together = match (&self.vision, image) {
            (Some((ImageEncoder::Patches(v), _)), Some((h, w))) => CHUNK.max(h * w + v.thumbnail_tokens()),
            _ => CHUNK,
        };
        let pass = tokens.min(together) * (4 * c.intermediate_size + 6 * c.hidden_size) * width;
        let words = c.vocab_size * 4 * width;
        // Its answer may be an image, as large as the largest or as those that it usually draws.
        let drawn = match &self.drawing {
            None => 0,
            Some(config) => {
                let usual = || Ok::<_, Error>(Size::Auto.grids(config)?.last().copied().unwrap_or_default());
                let (h, w) = image.map_or_else(usual, Ok)?;
                let reading = cost::decoding(&config.tokenizer.decoder, h * w, width);
                cost::drawing(c, h * w, (1, true), width).max(reading)
            }
        };
        let tokenizer = self.drawing.as_ref().map(|config| {
            let requested = Weights::inventory();
            let filters = source.map_or(Matrices::Tensors, |source| config.filters(source, device, weights));
            ImageTokenizer::load(&requested, &config.tokenizer).map(|_| requested.bytes(DType::F32, filters))
        });
        let tokenizer = tokenizer.transpose()?.unwrap_or(0);
        Ok(ChatMemory {
            weights: held + tokenizer,
            cache: cache as u64,
            activations: ((pass + words).max(seen) as u64).max(drawn),
            program: cost::PROGRAM + cost::WORD * c.vocab_size as u64,
        })
    }

    /// Bytes of the weights that text is not read with: the image encoder's, or those of OneCAT's
    /// expert for pictures.
    pub fn vision_bytes(&self, dtype: DType, matrices: Matrices) -> u64 {
        let requested = Weights::inventory();
        match &self.vision {
            Some((ImageEncoder::Tower(config), _)) => {
                VisionTower::load(&requested, config).map_or(0, |_| requested.bytes(dtype, matrices))
            }
            Some((ImageEncoder::Patches(config), _)) => {
                let bytes = |pictures| {
                    let requested = Weights::inventory();
                    let parts = ReadingParts { pictures, head: false };
                    Reading::load(&requested, config, parts).map_or(0, |_| requested.bytes(dtype, matrices))
                };
                bytes(true) - bytes(false)
            }
            None => 0,
        }
    }
}
