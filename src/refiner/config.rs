//! The shape of a diffusion decoder: what the paper leaves open.

use serde::{Deserialize, Serialize};

/// Sizes of the U-Net and of the caption encoder, and how a picture is refined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefinerConfig {
    /// Pixels of the refined picture that one token of the finest level stands for, along each
    /// side.
    pub patch: usize,
    /// Pixels of the refined picture for one of the tokenizer's, along each side (the paper's 2x2
    /// upsampling task).
    pub upscale: usize,
    /// Channels of every level, fine to coarse; each level has half the grid of the one before.
    pub widths: Vec<usize>,
    /// Blocks of every level on the way down; the last level is the middle.
    pub down_blocks: Vec<usize>,
    /// Blocks of every level but the last on the way up, fine to coarse.
    pub up_blocks: Vec<usize>,
    /// How many of the last blocks of a level attend to the picture and the caption, fine to
    /// coarse: on the way up, and in the middle.
    pub attention: Vec<usize>,
    /// Channels of an attention head.
    pub head_dim: usize,
    /// Side of the depthwise kernels.
    pub kernel: usize,
    /// Inner channels of a gated MLP for each channel.
    pub mlp_ratio: usize,
    /// Channels of the embedding of time and caption that scales and shifts every block.
    pub embedding: usize,
    /// Channels of the code embeddings (semantic and pixel), as the tokenizer has them.
    pub code_dim: usize,
    /// Channels of the tokenizer's decoded semantic features.
    pub semantic_dim: usize,
    /// Pixels of the tokenizer's picture for a code, along each side.
    pub code_cell: usize,
    /// Channels that the codes have at every token of the finest level.
    pub code_channels: usize,
    /// Standard deviation of the noise that is added to the tokenizer's picture in the beginning,
    /// in pixels of [-1, 1]: about that of what the picture lacks.
    pub noise: f64,
    /// The caption encoder.
    pub caption: CaptionConfig,
    /// Steps of a refinement if the user asks for no other number.
    pub steps: usize,
}

/// The encoder of captions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionConfig {
    /// Tokens of the model's text tokenizer.
    pub vocab_size: usize,
    /// Channels.
    pub width: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Heads.
    pub heads: usize,
    /// The most tokens that are read of a caption.
    pub max_tokens: usize,
}

impl RefinerConfig {
    /// What would keep the refiner from being built, as one sentence.
    pub fn check(&self) -> Result<(), String> {
        let levels = self.widths.len();
        let lists =
            [(self.down_blocks.len(), levels), (self.up_blocks.len() + 1, levels), (self.attention.len(), levels)];
        if levels == 0 || lists.iter().any(|(found, expected)| found != expected) {
            return Err(format!(
                "refiner: widths, down_blocks and attention need a number for each of {levels} levels, up_blocks one less"
            ));
        }
        let sizes = [
            ("patch", self.patch),
            ("upscale", self.upscale),
            ("head_dim", self.head_dim),
            ("mlp_ratio", self.mlp_ratio),
            ("embedding", self.embedding),
            ("code_dim", self.code_dim),
            ("semantic_dim", self.semantic_dim),
            ("code_cell", self.code_cell),
            ("code_channels", self.code_channels),
            ("caption.width", self.caption.width),
            ("caption.heads", self.caption.heads),
            ("caption.vocab_size", self.caption.vocab_size),
            ("caption.max_tokens", self.caption.max_tokens),
            ("steps", self.steps),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(1..=1 << 20).contains(size)) {
            return Err(format!("refiner: {name} {size} is not from 1 to {}", 1 << 20));
        }
        if self.widths.iter().any(|&width| width == 0 || width > 1 << 14) {
            return Err(format!("refiner: widths {:?} are not from 1 to {}", self.widths, 1 << 14));
        }
        let mut attending = self.widths.iter().zip(&self.attention).filter(|(_, blocks)| **blocks > 0);
        if let Some((width, _)) = attending.find(|(width, _)| !width.is_multiple_of(self.head_dim)) {
            return Err(format!("refiner: head_dim {} does not divide a level's {width} channels", self.head_dim));
        }
        if !(self.noise > 0.0 && self.noise <= 1.0) {
            return Err(format!("refiner: noise {} is not above 0 and at most 1", self.noise));
        }
        if !self.head_dim.is_multiple_of(4) || self.kernel.is_multiple_of(2) || self.kernel > 31 {
            return Err("refiner: head_dim must be a multiple of 4 and kernel odd, at most 31".into());
        }
        let blocks = self.down_blocks.iter().chain(&self.up_blocks);
        if blocks.chain([&self.caption.blocks]).any(|&blocks| blocks > 1000) {
            return Err("refiner: at most 1000 blocks a level".into());
        }
        if !self.caption.width.is_multiple_of(self.caption.heads) {
            return Err(format!(
                "refiner: {} heads do not divide caption.width {}",
                self.caption.heads, self.caption.width
            ));
        }
        // Tokens of the finest level for a code, which every level must divide.
        let cells = self.code_cell * self.upscale;
        if !self.patch.is_multiple_of(self.upscale)
            || !cells.is_multiple_of(self.patch)
            || !(cells / self.patch).is_multiple_of(1 << (levels - 1))
        {
            return Err(format!(
                "refiner: patch {} with {levels} levels does not divide a code's {cells} pixels",
                self.patch
            ));
        }
        Ok(())
    }

    /// A U-Net of the paper's class (1 B parameters), from pictures of 512 to 1024 pixels by
    /// TokenFlow's `siglip_32k` codes and Qwen2.5's words. The paper gives no shape.
    pub fn one_b() -> Self {
        Self {
            patch: 8,
            upscale: 2,
            widths: vec![320, 896, 1792],
            down_blocks: vec![2, 3, 12],
            up_blocks: vec![2, 3],
            attention: vec![0, 2, 12],
            head_dim: 64,
            kernel: 3,
            mlp_ratio: 4,
            embedding: 512,
            code_dim: 40,
            semantic_dim: 1152,
            code_cell: 16,
            code_channels: 64,
            noise: 0.25,
            caption: CaptionConfig { vocab_size: 151_936, width: 768, blocks: 6, heads: 12, max_tokens: 256 },
            steps: 8,
        }
    }

    /// Floating-point operations of a step for so many images whose codes have the grids `scales`:
    /// those of all matrix products of the U-Net.
    pub fn flops(&self, scales: &[(usize, usize)], images: usize) -> f64 {
        let (h, w) = scales.last().copied().unwrap_or_default();
        let finest = h * w * self.tokens_per_code().pow(2);
        let (last, pixels) = (self.widths.len() - 1, 3 * self.patch * self.patch);
        let seen = pixels / (self.upscale * self.upscale) + self.code_channels;
        let mut sum = finest * (2 * pixels + seen) * self.widths[0];
        for (level, &width) in self.widths.iter().enumerate() {
            let tokens = finest >> (2 * level);
            let up = if level < last { self.up_blocks[level] } else { 0 };
            let mlps = (self.down_blocks[level] + up) * 3 * self.mlp_ratio * width * width;
            let attending = self.attention[level] * (4 * width * width + 2 * tokens * width);
            let resize = if level < last { 2 * width * self.widths[level + 1] } else { 0 };
            sum += tokens * (mlps + attending + resize);
        }
        2.0 * (images * sum) as f64
    }

    /// Bytes that a step holds at once for so many images whose codes have the grids `scales`, in
    /// f32.
    pub fn activations(&self, scales: &[(usize, usize)], images: usize) -> u64 {
        let (h, w) = scales.last().copied().unwrap_or_default();
        let tokens = images * h * w * self.tokens_per_code().pow(2);
        let first = self.widths.first().copied().unwrap_or(0);
        // The noise, the condition and the prediction beside a block's streams.
        let pixels = 3 * self.patch * self.patch;
        (tokens * (4 * pixels + (3 + 2 * self.mlp_ratio) * first) * 4) as u64
    }

    /// Tokens of the finest level for a code, along each side.
    pub(super) fn tokens_per_code(&self) -> usize {
        self.code_cell * self.upscale / self.patch
    }
}
