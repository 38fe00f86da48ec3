//! What drawing an image takes, counted from shapes: memory, and the arithmetic of every pass.

use candle_core::{DType, Device};
use serde::Serialize;

use super::rows::POSITIONS;
use super::{ModelConfig, Sampling, schedule};
use crate::backbone::{Backbone, BackboneConfig};
use crate::checkpoint::{Inventory, Matrices, REFINER, Source, TRANSFORMER, WeightType, Weights};
use crate::error::Result;
use crate::refiner::Refiner;
use crate::tokenizer::{CnnConfig, ImageDecoder};

/// Bytes that a process needs for the images that it draws at once.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Encoding the prompts, by a separate network that is dropped before the others are loaded.
    #[serde(skip_serializing_if = "is_zero")]
    pub text: u64,
    /// Weights of the transformer.
    pub transformer: u64,
    /// Keys and values.
    pub cache: u64,
    /// Peak of a pass over the largest scale.
    pub activations: u64,
    /// Weights of the image tokenizer's half that draws.
    pub tokenizer: u64,
    /// What decoding pixels holds at once.
    pub decode: u64,
    /// Weights of the refiner and what a step of it holds at once.
    #[serde(skip_serializing_if = "is_zero")]
    pub refiner: u64,
    /// The program itself, with embedded files, threads and vocabulary.
    pub program: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Memory {
    /// At the peak: the text encoder, the last scale or the decoder is at work.
    pub fn peak(&self) -> u64 {
        self.phases().into_iter().map(|(_, bytes)| bytes).max().unwrap_or(0)
    }

    /// Prompts come while images are drawn: what reads them stays.
    pub fn keep_text(&mut self) {
        self.program += std::mem::take(&mut self.text);
    }

    /// The most that every phase of drawing takes.
    pub fn phases(&self) -> [(&'static str, u64); 3] {
        let loaded = self.transformer + self.tokenizer + self.program;
        let drawing = loaded + self.cache;
        let decoding = match self.text {
            // The cache lives until all images are decoded, except where batches are drawn one by
            // one.
            0 => drawing + self.decode.max(self.refiner),
            _ => loaded + self.decode,
        };
        let text = if self.text > 0 { self.text + self.program } else { 0 };
        [("text", text), ("drawing", drawing + self.activations), ("decoding", decoding)]
    }

    /// The parts of the peak by name; or the phases, where a separate network encodes the text.
    pub fn parts(&self) -> Vec<(&'static str, u64)> {
        if self.text > 0 {
            return self.phases().to_vec();
        }
        [
            ("transformer", self.transformer),
            ("cache", self.cache),
            ("image tokenizer", self.tokenizer),
            ("at work", self.activations.max(self.decode)),
            ("refiner", self.refiner),
            ("program", self.program),
        ]
        .into_iter()
        .filter(|(name, bytes)| *name != "refiner" || *bytes > 0)
        .collect()
    }
}

/// The program with its libraries, buffers and threads, as measured.
pub const PROGRAM: u64 = 20 << 20;

/// Bytes of the vocabulary per token: the tables of the `tokenizers` library, as measured.
pub const WORD: u64 = 400;

/// The images that are drawn at once.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Grids (height, width) of every image, coarse to fine.
    pub scales: &'a [(usize, usize)],
    /// Images.
    pub images: usize,
    /// Tokens of the longest prompt.
    pub text_tokens: usize,
    /// How codes are sampled.
    pub sampling: &'a Sampling,
    /// Different prompts in all, for a model that reads them beforehand.
    pub prompts: usize,
}

/// What `work` needs, with the weights as `source` has them or, where it is not GGUF, as `weights`.
///
/// Errors: a source whose header cannot be read.
pub fn memory(
    config: &ModelConfig,
    source: &Source,
    weights: Option<WeightType>,
    work: Work,
    device: &Device,
) -> Result<Memory> {
    let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
    let filters = config.filters(source, device, weights);
    let mut memory = synthetic_memory(config, dtype, (matrices, filters), work)?;
    memory.transformer *= source.copies(matrices);
    memory.program += source.embedded_bytes();
    if work.sampling.refine > 0 {
        memory.refiner = refiner(config, (source, weights, device), work.scales, work.images)?;
    }
    if source.is_gguf(TRANSFORMER) {
        memory.transformer = Inventory::of(source, TRANSFORMER)?.files().iter().map(|file| file.bytes).sum();
    }
    Ok(memory)
}

/// Bytes of a refiner's weights and of what a step holds at once for so many images; 0 for a model
/// without one.
///
/// Errors: a config that no refiner has.
pub fn refiner(
    config: &ModelConfig,
    (source, weights, device): (&Source, Option<WeightType>, &Device),
    scales: &[(usize, usize)],
    images: usize,
) -> Result<u64> {
    let Some(refiner) = &config.refiner else { return Ok(0) };
    let requested = Weights::inventory();
    Refiner::load(&requested, refiner)?;
    let (_, matrices) = source.placed(REFINER, weights.filter(|weights| *weights == WeightType::F32), device);
    Ok(requested.bytes(DType::F32, matrices) + refiner.activations(scales, images))
}

/// As [`memory`], for random weights, with the storage of the transformer's matrices and of the
/// tokenizer's filters.
pub fn synthetic_memory(
    config: &ModelConfig,
    dtype: DType,
    (matrices, filters): (Matrices, Matrices),
    work: Work,
) -> Result<Memory> {
    let Work { scales, images, text_tokens, sampling, .. } = work;
    let (transformer, tokenizer) = (Weights::inventory(), Weights::inventory());
    Backbone::load(&transformer, &config.backbone)?;
    ImageDecoder::load(&tokenizer, &config.tokenizer)?;
    let (c, width) = (&config.backbone, dtype.size_in_bytes());
    // Where activations are of half the width, pixels are.
    let pixels = if width == 4 { DType::F32 } else { DType::BF16 };
    let guided = sampling.guided_scales(scales.len()) > 0;
    let rows = if guided { 2 * images } else { images };
    let codes = schedule::codes(scales);
    let largest = scales.iter().map(|(h, w)| h * w).max().unwrap_or(0);
    let prefix = config.prompt.padded_to.unwrap_or(text_tokens) + OPENING;
    let cache = c.num_hidden_layers * rows * 2 * (prefix + codes) * c.num_key_value_heads * c.head_dim() * width;
    Ok(Memory {
        text: 0,
        transformer: transformer.bytes(dtype, matrices),
        cache: cache as u64,
        activations: drawing(c, largest, (images, guided), width).max(pass(c, rows * prefix, width)),
        tokenizer: tokenizer.bytes(pixels, filters),
        decode: decoding(&config.tokenizer.decoder, largest, pixels.size_in_bytes()),
        refiner: 0,
        program: PROGRAM,
    })
}

/// Peak bytes of a transformer block for `tokens` tokens, with numbers of `width` bytes: gate and
/// up, each with its packed copy, beside the residual stream and its norm.
pub fn pass(c: &BackboneConfig, tokens: usize, width: usize) -> u64 {
    (tokens * (4 * c.intermediate_size + 4 * c.hidden_size) * width) as u64
}

/// Peak bytes of a pass over a grid of `codes` codes in each of `images` images, guided or not,
/// with numbers of `width` bytes.
pub fn drawing(c: &BackboneConfig, codes: usize, (images, guided): (usize, bool), width: usize) -> u64 {
    let rows = if guided { 2 * images } else { images };
    // Logits of both rows, the guided ones, and the copy that is filtered.
    let (copies, at_once) = (if guided { 6 } else { 4 }, codes.min(POSITIONS.div_ceil(images.max(1))));
    pass(c, rows * codes, width).max((copies * images * at_once * c.codebook_size * 4) as u64)
}

/// Peak bytes of decoding, or encoding, the pixels of a grid of `cells` cells, with numbers of
/// `width` bytes.
pub fn decoding(cnn: &CnnConfig, cells: usize, width: usize) -> u64 {
    let side = cnn.stride() / cnn.patch;
    let first = cnn.ch * cnn.ch_mult.first().copied().unwrap_or(1);
    (DECODE * cells * side * side * first * width) as u64
}

/// Tokens around a text, what opens an image among them.
const OPENING: usize = 8;
/// Feature maps of full size that the decoder holds at once.
const DECODE: usize = 5;

/// Floating-point operations of one pass of `tokens` tokens in each of `rows` rows after `seen`
/// ones, `heads` of which tokens go through the head.
pub fn flops(c: &BackboneConfig, rows: usize, tokens: usize, seen: usize, heads: usize) -> f64 {
    let (hidden, inner, head) = (c.hidden_size, c.intermediate_size, c.head_dim());
    let (queries, keys) = (c.num_attention_heads * head, c.num_key_value_heads * head);
    let block = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner;
    let attention = 2 * (seen + tokens) * queries;
    let layers = c.num_hidden_layers * (block + attention);
    2.0 * (rows * tokens) as f64 * layers as f64 + 2.0 * (rows * heads) as f64 * (hidden * c.codebook_size) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_those_of_all_products() {
        let config = BackboneConfig {
            hidden_size: 8,
            intermediate_size: 20,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            codebook_size: 11,
            ..crate::backbone::presets::QWEN2_5_VL_7B
        };
        let (tokens, seen) = (5, 7);
        // (m, k) by (k, n): q, k, v, output, gate, up, down; then of both heads the scores and the
        // sums of values.
        let linear = [(5, 8, 8), (5, 8, 4), (5, 8, 4), (5, 8, 8), (5, 8, 20), (5, 8, 20), (5, 20, 8)];
        let attention = [(5, 4, 12), (5, 12, 4), (5, 4, 12), (5, 12, 4)];
        let count = |products: &[(usize, usize, usize)]| products.iter().map(|(m, k, n)| 2 * m * k * n).sum::<usize>();
        let head = count(&[(5, 8, 11)]);
        let row = 3 * (count(&linear) + count(&attention)) + head;
        assert_eq!(flops(&config, 2, tokens, seen, tokens), (2 * row) as f64);
    }
}
