//! A checkpoint's `config.json`: shapes of the networks, schedules, sampling, prompts and
//! conversation.

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::{PromptConfig, PromptCounter, Sampling, schedule};
use crate::backbone::{Backbone, BackboneConfig, InputMode, Vocabulary};
use crate::checkpoint::{
    FileSummary, Fit, IMAGE_TOKENIZER, Inventory, Matrices, REFINER, Source, TRANSFORMER, WeightType, Weights,
};
use crate::error::{Result, told};
use crate::refiner::{Refiner, RefinerConfig};
use crate::tokenizer::{ImageTokenizer, Preset, TokenizerConfig};

/// The longest side of a grid: 4096 pixels.
const MAX_GRID: usize = 256;

/// More scales than any image has, and more tokens than a prompt is padded to.
const MAX_SCALES: usize = 1000;
const MAX_PADDED: usize = 1 << 16;

/// The default system prompt (Qwen2.5-VL's chat template).
pub const SYSTEM: &str = "You are a helpful assistant.";

/// How a model converses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConversationConfig {
    /// The default system prompt.
    pub system: String,
    /// It may answer with an image of its own accord. Otherwise it draws on command only.
    pub draws: bool,
    /// The most tokens of a conversation, those of images among them.
    pub context: usize,
}

impl Default for ConversationConfig {
    fn default() -> Self {
        Self { system: SYSTEM.into(), draws: false, context: 32_768 }
    }
}

impl ConversationConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A checkpoint's `config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The model's name, as it is stored with every image.
    pub name: String,
    /// Scales of an image: 8, 12, 16 or 18 for the 128, 256, 512 or 1024 px level.
    pub scales: usize,
    /// Grids (height, width) of the only size that it draws, in place of the paper's table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grids: Vec<(usize, usize)>,
    /// The default sampling.
    pub sampling: Sampling,
    /// How it converses.
    #[serde(default, skip_serializing_if = "ConversationConfig::is_default")]
    pub conversation: ConversationConfig,
    /// How a prompt becomes tokens.
    #[serde(default, skip_serializing_if = "PromptConfig::is_default")]
    pub prompt: PromptConfig,
    /// The transformer.
    pub backbone: BackboneConfig,
    /// The image tokenizer.
    pub tokenizer: TokenizerConfig,
    /// The refiner, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refiner: Option<RefinerConfig>,
}

impl ModelConfig {
    /// Errors: a value with which the model cannot be built or cannot draw, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.backbone.check()?;
        self.tokenizer.check().map_err(|e| told(&e))?;
        let codes = (self.backbone.codebook_size, self.backbone.code_dim);
        let book = (self.tokenizer.codebook.size, self.tokenizer.codebook.dim());
        if codes != book {
            let (of, are) = (format!("{} codes of {} channels", codes.0, codes.1), format!("{} of {}", book.0, book.1));
            return Err(format!("the transformer has {of}, the image tokenizer {are}"));
        }
        self.check_refiner()?;
        self.check_image()
    }

    /// What would keep the refiner from refining this model's images, as one sentence.
    fn check_refiner(&self) -> std::result::Result<(), String> {
        let Some(refiner) = &self.refiner else {
            return if self.sampling.refine > 0 { Err("sampling.refine without a refiner".into()) } else { Ok(()) };
        };
        refiner.check()?;
        let of = (self.tokenizer.codebook.dim(), self.tokenizer.semantic_features(), self.tokenizer.cell());
        let found = (refiner.code_dim, refiner.semantic_dim, refiner.code_cell);
        if found != of || refiner.caption.vocab_size < self.backbone.vocab_size {
            return Err(format!(
                "the refiner is another tokenizer's: code_dim, semantic_dim and code_cell are {found:?}, not {of:?}"
            ));
        }
        Ok(())
    }

    /// Pixels of an image for one of the tokenizer's, along each side: more than 1 where a refiner
    /// enlarges it.
    pub fn upscale(&self, sampling: &Sampling) -> usize {
        self.refiner.as_ref().filter(|_| sampling.refine > 0).map_or(1, |refiner| refiner.upscale)
    }

    /// What counts the tokens of prompts.
    ///
    /// Errors: a text tokenizer that is missing or broken.
    pub fn prompt_counter(&self, source: &Source) -> Result<PromptCounter> {
        Ok(PromptCounter::new(source.text_of(self.backbone.vocab_size)?, self.conversation.context))
    }

    /// Whether it draws images of these grids (height, width), coarse to fine.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        let mut levels = schedule::levels(self.scales);
        let any = |level: usize| schedule::table().iter().any(|entry| entry.prefix(level) == scales);
        if self.grids.is_empty() { levels.any(any) } else { self.grids == scales }
    }

    /// Pixels, (width, height), of an image of these grids, as the tokenizer decodes it.
    pub fn pixels(&self, scales: &[(usize, usize)]) -> (u32, u32) {
        let cell = self.tokenizer.cell();
        scales.last().map_or((0, 0), |&(h, w)| ((w * cell) as u32, (h * cell) as u32))
    }

    /// NextFlow as the paper has it, up to 1024 pixels, on a `transformer` that reads text and a
    /// public tokenizer.
    pub fn nextflow(name: &str, transformer: BackboneConfig, tokenizer: TokenizerConfig) -> Self {
        let backbone = BackboneConfig {
            spatial_extent: Some(64.0),
            codebook_size: tokenizer.codebook.size,
            code_dim: tokenizer.codebook.dim(),
            input_mode: InputMode::Residual,
            max_scales: 18,
            scale_length_embedding: true,
            vocabulary: Vocabulary::Markers,
            ..transformer
        };
        // Images of all sizes come out as they are.
        let tokenizer = TokenizerConfig { image_size: None, ..tokenizer };
        // The authors' own, in "VAR RL Done Right" (arXiv 2601.02256).
        let sampling = Sampling { cfg: 5.0, top_k: Some(2), top_p: 0.9, ..Sampling::default() };
        let (scales, grids) = (backbone.max_scales, Vec::new());
        Self {
            name: name.into(),
            scales,
            grids,
            sampling,
            conversation: Default::default(),
            prompt: Default::default(),
            backbone,
            tokenizer,
            refiner: None,
        }
    }

    /// The image tokenizer without the transformer: in f32, except the pixel decoder on a GPU, and
    /// int8 filters, which stay int8 unless `weights` is f32.
    pub fn load_tokenizer(
        &self,
        source: &Source,
        device: &Device,
        weights: Option<WeightType>,
    ) -> Result<ImageTokenizer> {
        self.load_images(source, device, weights, ImageTokenizer::load)
    }

    /// The same for any part of it.
    pub(crate) fn load_images<T>(
        &self,
        source: &Source,
        device: &Device,
        weights: Option<WeightType>,
        build: impl Fn(&Weights, &TokenizerConfig) -> candle_core::Result<T>,
    ) -> Result<T> {
        let filters = self.filters(source, device, weights);
        let build = |w: &Weights| build(&w.with_matrices(filters), &self.tokenizer);
        source.load(self.tokenizer_file(source), DType::F32, device, build)
    }

    /// How the image tokenizer's filters are stored beside a transformer of `weights`: as in the
    /// file, unless everything is f32.
    pub(crate) fn filters(&self, source: &Source, device: &Device, weights: Option<WeightType>) -> Matrices {
        source.placed(self.tokenizer_file(source), weights.filter(|weights| *weights == WeightType::F32), device).1
    }

    /// The image tokenizer's file in a model folder: ours, or the public one under its own name.
    pub fn tokenizer_file(&self, source: &Source) -> &'static str {
        const PUBLIC: &str = "tokenflow_clipb_32k_enhanced.safetensors";
        let public = self.tokenizer == Preset::clipb_32k_enhanced().config && source.has(PUBLIC);
        if public && !source.has(IMAGE_TOKENIZER) { PUBLIC } else { IMAGE_TOKENIZER }
    }

    /// Summaries of a checkpoint's files, and how their tensors compare with those that this
    /// config's modules load.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let (mut files, mut fit) = (Vec::new(), Fit::default());
        let refiner = self.refiner.as_ref().filter(|_| source.has(REFINER)).map(|_| REFINER);
        for file in [TRANSFORMER, self.tokenizer_file(source)].into_iter().chain(refiner) {
            let inventory = Inventory::of(source, file)?;
            let requested = Weights::inventory();
            match (file, &self.refiner) {
                (TRANSFORMER, _) => drop(Backbone::load(&requested, &self.backbone)?),
                (REFINER, Some(config)) => drop(Refiner::load(&requested, config)?),
                _ => drop(ImageTokenizer::load(&requested, &self.tokenizer)?),
            }
            let part = inventory.compare(&requested);
            files.extend(inventory.files());
            fit.missing.extend(part.missing);
            fit.misshapen.extend(part.misshapen);
            fit.unknown.extend(part.unknown);
        }
        Ok((files, fit))
    }

    /// Errors: a value with which the transformer cannot draw an image, as one sentence.
    fn check_image(&self) -> std::result::Result<(), String> {
        let (backbone, count) = (&self.backbone, self.grids.len());
        if backbone.vocabulary == Vocabulary::Plain && self.prompt.image_start.is_empty() {
            return Err("neither <boi> nor prompt.image_start opens an image".into());
        }
        if count > 0 && (count != self.scales || self.grids[0] != (1, 1)) {
            return Err(format!("grids must be {} from 1x1 on, as many as scales", self.scales));
        }
        if self.grids.iter().any(|&(h, w)| h == 0 || w == 0 || h > MAX_GRID || w > MAX_GRID) {
            return Err(format!("grids must have sides from 1 to {MAX_GRID}"));
        }
        if self.scales > MAX_SCALES {
            return Err(format!("{} scales are more than {MAX_SCALES}", self.scales));
        }
        if let Some(tokens) = self.prompt.padded_to.filter(|&tokens| tokens > MAX_PADDED) {
            return Err(format!("prompt.padded_to {tokens} is above {MAX_PADDED}"));
        }
        if let Some(bos) = self.prompt.bos.filter(|&id| id as usize >= backbone.vocab_size) {
            return Err(format!("prompt.bos {bos} is none of {} tokens", backbone.vocab_size));
        }
        let needed = self.scales + usize::from(backbone.context_last_scale);
        if self.scales == 0 || backbone.spatial_extent.is_some() && backbone.max_scales < needed {
            return Err(format!("{} scales need max_scales of {needed} or more", self.scales));
        }
        if let Some((setting, value, rule)) = self.sampling.fault() {
            return Err(format!("sampling: {setting} {value} is not {rule}"));
        }
        self.sampling.check(self.scales).map_err(|e| format!("sampling: {e}"))?;
        match backbone.code_positions {
            Some(rows) if rows != schedule::codes(&self.grids) => {
                Err(format!("the grids hold {} codes, code_positions {rows}", schedule::codes(&self.grids)))
            }
            _ => Ok(()),
        }
    }
}
