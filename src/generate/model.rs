//! A whole model: text, transformer and image tokenizer of one checkpoint.

use candle_core::{DType, Device};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{
    Batch, Event, Job, Observer, Prefix, PromptConfig, PromptCounter, Sampling, draw_after, schedule, tokenflow,
};
use crate::backbone::{Backbone, BackboneConfig, InputMode, Vocabulary};
use crate::checkpoint::{FileSummary, Fit, Inventory, Matrices, Source, WeightType, Weights};
use crate::error::{Error, Kind, Result, told};
use crate::pixels;
use crate::text::Text;
use crate::tokenizer::{ImageDecoder, ImageTokenizer, Preset, TokenizerConfig};

/// The file of the transformer's weights.
pub const TRANSFORMER: &str = "model.safetensors";
/// The file of the image tokenizer's weights.
pub const IMAGE_TOKENIZER: &str = "image_tokenizer.safetensors";

/// The longest side of a grid: 4096 pixels.
const MAX_GRID: usize = 256;

/// More scales than any image has, and more tokens than a prompt is padded to.
const MAX_SCALES: usize = 1000;
const MAX_PADDED: usize = 1 << 16;

/// What the model is told if the user tells nothing (Qwen2.5-VL's chat template).
pub const SYSTEM: &str = "You are a helpful assistant.";

/// How a model converses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConversationConfig {
    /// What it is told about itself if the user tells nothing.
    pub system: String,
    /// It may answer with an image of its own accord. Without it, it draws when the user says so.
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
    /// Sampling when the user asks for nothing else.
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
}

impl ModelConfig {
    /// Reads and checks the config of a checkpoint, without its weights. That of the public TokenFlow-t2i stands for
    /// [`tokenflow::config`].
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.read_config()?;
        if tokenflow::is_public(&config) {
            return Ok(tokenflow::config());
        }
        if let Some(other) = config.get("architectures").and_then(|names| names.get(0)?.as_str()) {
            return Err(Error::model(format!("{source} is {other}, which does not draw"))
                .hint("nextflow chat --model FOLDER talks with Qwen2.5-VL; nextflow assemble makes NextFlow of it"));
        }
        let bad = |what: String| {
            Error::model(format!("config.json of {source}: {what}"))
                .hint("correct it, or copy it from its origin again")
        };
        let config: Self = serde_json::from_value(config).map_err(|e| bad(e.to_string()))?;
        config.check().map_err(bad)?;
        Ok(config)
    }

    /// What would keep the model from being built or from drawing, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.backbone.check()?;
        self.tokenizer.check().map_err(|e| told(&e))?;
        let codes = (self.backbone.codebook_size, self.backbone.code_dim);
        let book = (self.tokenizer.codebook.size, self.tokenizer.codebook.dim());
        if codes != book {
            let (of, are) = (format!("{} codes of {} channels", codes.0, codes.1), format!("{} of {}", book.0, book.1));
            return Err(format!("the transformer has {of}, the image tokenizer {are}"));
        }
        self.check_image()
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

    /// Pixels, (width, height), of an image of these grids.
    pub fn pixels(&self, scales: &[(usize, usize)]) -> (u32, u32) {
        let cell = self.tokenizer.cell();
        scales.last().map_or((0, 0), |&(h, w)| ((w * cell) as u32, (h * cell) as u32))
    }

    /// NextFlow as the paper has it, up to 1024 pixels, on a `transformer` that reads text and a public tokenizer.
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
        }
    }

    /// The image tokenizer without the transformer: in f32, but for the pixel decoder on a GPU and, unless `weights` asks for
    /// f32, filters that are stored as bytes and stay so.
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

    /// How the image tokenizer's filters are kept beside a transformer of `weights`: as they are stored, unless all is to be f32.
    pub(crate) fn filters(&self, source: &Source, device: &Device, weights: Option<WeightType>) -> Matrices {
        source.placed(self.tokenizer_file(source), weights.filter(|weights| *weights == WeightType::F32), device).1
    }

    /// The image tokenizer's file in a model folder: ours, or the public one under its own name.
    pub fn tokenizer_file(&self, source: &Source) -> &'static str {
        const PUBLIC: &str = "tokenflow_clipb_32k_enhanced.safetensors";
        let public = self.tokenizer == Preset::clipb_32k_enhanced().config && source.has(PUBLIC);
        if public && !source.has(IMAGE_TOKENIZER) { PUBLIC } else { IMAGE_TOKENIZER }
    }

    /// The files of a checkpoint in numbers, and how their tensors compare with what this config's modules ask for.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let (mut files, mut fit) = (Vec::new(), Fit::default());
        for file in [TRANSFORMER, self.tokenizer_file(source)] {
            let inventory = Inventory::of(source, file)?;
            let asked = Weights::inventory();
            match file {
                TRANSFORMER => drop(Backbone::load(&asked, &self.backbone)?),
                _ => drop(ImageTokenizer::load(&asked, &self.tokenizer)?),
            }
            let part = inventory.compare(&asked);
            files.extend(inventory.files());
            fit.missing.extend(part.missing);
            fit.misshapen.extend(part.misshapen);
            fit.unknown.extend(part.unknown);
        }
        Ok((files, fit))
    }

    /// What would keep the transformer from drawing an image, as one sentence.
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
        if self.scales > MAX_SCALES || self.prompt.padded_to > Some(MAX_PADDED) {
            let padded = self.prompt.padded_to.unwrap_or(0);
            return Err(format!(
                "{} scales or a prompt of {padded} tokens: {MAX_SCALES} and {MAX_PADDED} are the limits",
                self.scales
            ));
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

/// A loaded model.
#[derive(Debug)]
pub struct Model {
    text: Text,
    /// Tokens that open an image.
    opening: Vec<u32>,
    unconditional: Prefix,
    backbone: Backbone,
    images: ImageDecoder,
    config: ModelConfig,
}

impl Model {
    /// Whether [`Model::load`] can load a checkpoint, as far as its words and the headers of its weights tell.
    ///
    /// Errors: those of [`Model::load`].
    pub fn check(source: &Source, config: &ModelConfig) -> Result<()> {
        Self::words(source, config)?;
        source.check(TRANSFORMER, |w| Backbone::load(w, &config.backbone))?;
        source.check(config.tokenizer_file(source), |w| ImageDecoder::load(w, &config.tokenizer))
    }

    /// The text tokenizer, and the tokens that open an image.
    fn words(source: &Source, config: &ModelConfig) -> Result<(Text, Vec<u32>)> {
        let text = source.text_of(config.backbone.vocab_size)?;
        let opening = config.prompt.opening(&text, config.backbone.boi())?;
        Ok((text, opening))
    }

    /// Loads what drawing needs onto `device`: the transformer as `weights`, by default f32 on a CPU and bf16 elsewhere, or
    /// as a GGUF file has it; the image tokenizer's half that draws as [`ModelConfig::load_tokenizer`] does.
    pub fn load(source: &Source, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let config = ModelConfig::read(source)?;
        let (text, opening) = Self::words(source, &config)?;
        let unconditional = config.prompt.prefix(&config.prompt.negative(&text)?, &opening);
        let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
        let build = |w: &Weights| Backbone::load(&w.with_matrices(matrices), &config.backbone);
        let backbone = source.load(TRANSFORMER, dtype, device, build)?;
        let images = config.load_images(source, device, weights, ImageDecoder::load)?;
        Ok(Self { text, opening, unconditional, backbone, images, config })
    }

    /// The checkpoint's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Pixels from the codes of all scales, or of a prefix of them.
    pub fn decode(&self, codes: &[Vec<u32>], scales: &[(usize, usize)]) -> Result<RgbImage> {
        pixels::to_image(&self.images.decode(codes, scales)?)
    }

    /// Draws one image.
    ///
    /// Errors: [`crate::error::Kind::Interrupted`] if the observer breaks, [`crate::error::Kind::NonFinite`] if the
    /// model gives no finite numbers.
    pub fn draw(&self, job: &Job, observe: Observer) -> Result<RgbImage> {
        let batch = Batch { scales: &job.scales, sampling: &job.sampling, seeds: &[job.seed] };
        let mut images = self.draw_batch(&[&job.prompt], job.negative.as_deref(), batch, observe)?;
        images.pop().ok_or_else(|| Error::new(Kind::Failure, "one seed draws one image"))
    }

    /// Draws an image from each of the prompts, with the seed in its place, in one pass over every scale, guided away from
    /// `negative` or what the config has in its place: their pixels are those that they have alone, but for what the order of additions in larger products changes.
    ///
    /// Errors: as [`Model::draw`].
    pub fn draw_batch(
        &self,
        prompts: &[&str],
        negative: Option<&str>,
        batch: Batch,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        let prefix =
            |prompt: &str| Ok::<_, Error>(self.config.prompt.prefix(&self.text.encode(prompt)?, &self.opening));
        let prompts = prompts.iter().map(|prompt| prefix(prompt)).collect::<Result<Vec<_>>>()?;
        let negative = negative.map(prefix).transpose()?;
        let quantizer = self.images.quantizer();
        let images = draw_after(
            &self.backbone,
            quantizer,
            &prompts,
            negative.as_ref().unwrap_or(&self.unconditional),
            batch,
            observe,
        )?;
        super::tell(observe, Event::Decode)?;
        images.iter().map(|codes| self.decode(codes, batch.scales)).collect()
    }
}
