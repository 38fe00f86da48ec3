//! An Infinity model before its weights are loaded: shapes, sizes and sampling.

use std::path::Path;

use candle_core::{DType, Device};
use candle_transformers::models::t5;
use serde_json::json;

use super::features::FeatureStore;
use super::files::{no_text_encoder, variant};
use super::variants::Variant;
use crate::checkpoint::{self, FileSummary, Fit, IMAGE_TOKENIZER, Inventory, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Result};
use crate::generate::cost::{self, Memory, Work};
use crate::generate::ratios::{self, LEVELS, Ratio};
use crate::generate::{Guidance, Sampling, Size, schedule};
use crate::infinity::{Infinity, InfinityConfig};
use crate::io::output;
use crate::t5::{self as encoder, TEXT_CONFIG, TEXT_ENCODER, TEXT_WORDS, TextEncoder};
use crate::tokenizer::{BitDecoder, BitEncoder, BitPreset, BitTokenizerConfig, ImageDecoder};

/// Shapes and settings of a whole model.
#[derive(Clone, Debug)]
pub struct InfinitySetup {
    /// The model's name, as it is stored with every image.
    pub name: String,
    /// The transformer.
    pub transformer: InfinityConfig,
    /// The image tokenizer.
    pub tokenizer: BitTokenizerConfig,
    /// The text encoder, if there is one.
    pub text: Option<t5::Config>,
    /// The default sampling.
    pub sampling: Sampling,
    /// Scales of an image when the user names a ratio, or nothing.
    pub level: usize,
}

/// The filter that the authors' sampler amounts to for the two values of a bit.
const TOP_P: f64 = 0.97;
/// The size of pixels of a token along each side.
const CELL: usize = 16;

impl InfinitySetup {
    /// That of a released model, or of one like it, with these parts.
    pub fn new(
        variant: Option<&Variant>,
        transformer: InfinityConfig,
        tokenizer: BitTokenizerConfig,
        text: Option<t5::Config>,
    ) -> Self {
        let (cfg, temperature) = variant.map_or((3.0, 0.5), |variant| (variant.cfg, variant.temperature));
        let sampling = Sampling { cfg, temperature, top_p: TOP_P, guidance: Guidance::Constant, ..Sampling::default() };
        let name = variant.map_or("Infinity", |variant| variant.title).into();
        let largest = LEVELS.iter().rfind(|&&level| level <= transformer.levels).copied().unwrap_or(transformer.levels);
        let level = variant.map_or(largest, |variant| variant.level);
        Self { name, transformer, tokenizer, text, sampling, level }
    }

    /// Reads the headers of a model's files: no config states their shapes.
    ///
    /// Errors: [`crate::error::Kind::Model`] for files that are missing, or do not belong together.
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.read_config()?;
        let weights = Inventory::of(source, TRANSFORMER)?;
        let transformer = InfinityConfig::of(&weights, &source.name(TRANSFORMER))?;
        let variant = variant(&config).or_else(|| Variant::of_shape(&transformer));
        if let Some(variant) = variant.filter(|variant| !variant.fits(&transformer)) {
            let message = format!("{} is not the transformer of {}", source.name(TRANSFORMER), variant.title);
            let fits = Variant::of_shape(&transformer).map_or("another file".into(), |fits| format!(":{}", fits.name));
            return Err(
                Error::model(message).hint(format!("--model FOLDER{fits}, or copy {} again", variant.transformer))
            );
        }
        let tokenizer = Inventory::of(source, IMAGE_TOKENIZER)?;
        let tokenizer = BitTokenizerConfig::of_weights(&tokenizer).ok_or_else(|| {
            Error::model(format!("{} is no image tokenizer of Infinity", source.name(IMAGE_TOKENIZER)))
                .hint("nextflow info FILE shows its content")
        })?;
        pair(source, &transformer, &tokenizer, variant)?;
        let text = source.has_file(TEXT_CONFIG).then(|| encoder::read_config(source)).transpose()?;
        if let Some(text) = text.as_ref().filter(|text| text.d_model != transformer.text_width) {
            let message = format!(
                "the text encoder of {source} gives {} features, its transformer reads {}",
                text.d_model, transformer.text_width
            );
            return Err(Error::model(message).hint("take google/flan-t5-xl for the text encoder"));
        }
        Ok(Self::new(variant, transformer, tokenizer, text))
    }

    /// Whether it draws images of these grids (height, width), coarse to fine.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        self.levels().any(|level| ratios::table().iter().any(|ratio| ratio.prefix(level) == scales))
    }

    /// Scales of every level that it has a row for.
    fn levels(&self) -> impl Iterator<Item = usize> {
        let most = self.transformer.levels;
        LEVELS.into_iter().filter(move |&level| level <= most)
    }

    /// Pixels, (width, height), of an image of these grids.
    pub fn pixels(&self, scales: &[(usize, usize)]) -> (u32, u32) {
        scales.last().map_or((0, 0), |&(h, w)| ((w * CELL) as u32, (h * CELL) as u32))
    }

    /// The grids of an image of a size: a ratio at the level that the model was trained for, or the
    /// schedule with these pixels.
    ///
    /// Errors: usage, for pixels that no level has.
    pub fn grids(&self, size: Size) -> Result<Vec<(usize, usize)>> {
        let levels: Vec<usize> = self.levels().collect();
        size.of_ratios(1.0, &levels, |_| self.level, CELL)
    }

    /// Checks that the model can be loaded, by text tokenizer and headers. Prompts with stored
    /// features need no text encoder.
    ///
    /// Errors: those of loading.
    pub fn check(&self, source: &Source, features: Option<&FeatureStore>) -> Result<()> {
        source.check(TRANSFORMER, |w| Infinity::load(w, &self.transformer))?;
        source.check(IMAGE_TOKENIZER, |w| ImageDecoder::load_bits(w, &self.tokenizer))?;
        match &self.text {
            Some(_) => TextEncoder::check(source),
            None if features.is_some() => Ok(()),
            None => Err(no_text_encoder(source)),
        }
    }

    /// Summaries of a model's files, and how their tensors compare with those that are loaded.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let (mut files, mut fit) = (Vec::new(), Fit::default());
        let text = self.text.as_ref().map(|_| TEXT_ENCODER);
        for file in [TRANSFORMER, IMAGE_TOKENIZER].into_iter().chain(text) {
            let inventory = Inventory::of(source, file)?;
            let requested = Weights::inventory();
            match (file, &self.text) {
                (TRANSFORMER, _) => drop(Infinity::load(&requested, &self.transformer)?),
                (TEXT_ENCODER, Some(text)) => encoder::ask(&requested, text, source.is_gguf(TEXT_ENCODER))?,
                _ => self.ask_for_images(&requested)?,
            }
            let part = inventory.compare(&requested);
            files.extend(inventory.files());
            fit.missing.extend(part.missing);
            fit.misshapen.extend(part.misshapen);
            // The text encoder's file holds a decoder as well, which nothing here needs.
            let decoders =
                |key: &String| file == TEXT_ENCODER && (key.starts_with("decoder.") || key == "lm_head.weight");
            fit.unknown.extend(part.unknown.into_iter().filter(|key| !decoders(key)));
        }
        Ok((files, fit))
    }

    /// Writes the model at `source` to `folder`, which must not exist: transformer and text encoder
    /// in blocks of `weights`, and the needed part of the image tokenizer's file.
    ///
    /// Errors: those of loading; usage, if the folder exists; [`crate::error::Kind::Failure`] if it
    /// cannot be written.
    pub fn quantise(&self, source: &Source, weights: WeightType, folder: &Path) -> Result<()> {
        self.check(source, None)?;
        for file in [TRANSFORMER, TEXT_ENCODER] {
            source.check_type(file, Some(weights))?;
        }
        checkpoint::whole_folder(folder, |part| {
            let (transformer, tokenizer) = (Weights::inventory(), Weights::inventory());
            Infinity::load(&transformer, &self.transformer)?;
            checkpoint::write_gguf(
                &part.join("model.gguf"),
                &checkpoint::blocks(source, TRANSFORMER, &transformer, weights)?,
            )?;
            self.ask_for_images(&tokenizer)?;
            let images = part.join(IMAGE_TOKENIZER);
            checkpoint::extract(source, IMAGE_TOKENIZER, &tokenizer, DType::F32, &images)?;
            std::fs::create_dir(part.join("text_encoder"))?;
            match encoder::is_small(weights) {
                true => {
                    checkpoint::write_gguf(&part.join("text_encoder/model.gguf"), &encoder::blocks(source, weights)?)?
                }
                // GGUF with 16 bits a number takes as much memory as f32 in candle-transformers'
                // network.
                false => {
                    let requested = Weights::inventory();
                    encoder::ask(&requested, &encoder::read_config(source)?, false)?;
                    let dtype = encoder::dtype(Some(weights));
                    checkpoint::extract(source, TEXT_ENCODER, &requested, dtype, &part.join(TEXT_ENCODER))?;
                }
            }
            for file in [TEXT_CONFIG, TEXT_WORDS] {
                output::write(&part.join(file), &source.bytes(file)?)?;
            }
            let config = serde_json::to_vec_pretty(&source.read_config()?).map_err(candle_core::Error::msg)?;
            output::write(&part.join("config.json"), &config)
        })
    }

    /// Loads both halves of the image tokenizer from an inventory.
    fn ask_for_images(&self, w: &Weights) -> Result<()> {
        BitEncoder::load(w, &self.tokenizer)?;
        BitDecoder::load(w, &self.tokenizer)?;
        Ok(())
    }

    /// The config that we would write.
    pub fn to_json(&self) -> serde_json::Value {
        let c = &self.transformer;
        json!({
            "name": self.name,
            "transformer": {
                "depth": c.depth, "width": c.width, "heads": c.heads, "mlp": c.mlp, "text_width": c.text_width,
                "max_tokens": c.max_tokens, "levels": c.levels, "bits": c.bits
            },
            "tokenizer": self.tokenizer,
            "sampling": self.sampling,
            "scales": self.level,
        })
    }

    /// What `work` needs, with weights as `source` has them or as `weights`. Without a source they
    /// are made up.
    ///
    /// Errors: a source whose header cannot be read.
    pub fn memory(
        &self,
        source: Option<&Source>,
        weights: Option<WeightType>,
        work: Work,
        device: &Device,
    ) -> Result<Memory> {
        let usual = || weights.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
        let (dtype, matrices) = source.map_or_else(usual, |source| source.placed(TRANSFORMER, weights, device));
        let Work { scales, images, text_tokens, sampling, .. } = work;
        let (transformer, tokenizer) = (Weights::inventory(), Weights::inventory());
        Infinity::load(&transformer, &self.transformer)?;
        ImageDecoder::load_bits(&tokenizer, &self.tokenizer)?;
        let (c, width) = (&self.transformer, dtype.size_in_bytes());
        let pixels = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        let rows = if sampling.guided_scales(scales.len()) > 0 { 2 * images } else { images };
        let drawn = sampling.drawn(scales.len());
        let codes = schedule::codes(&scales[..drawn]);
        let last = scales[..drawn].last().map_or(0, |(h, w)| h * w);
        let largest = scales.last().map_or(0, |(h, w)| h * w);
        let text_tokens = text_tokens.min(c.max_tokens);
        // Keys and values: of all scales but the last, and of the text for every block.
        let kept = codes - last + text_tokens;
        let cache = c.depth * rows * 2 * kept * c.width * width;
        let text = match &self.text {
            Some(text) => {
                let gguf = source.filter(|source| source.is_gguf(TEXT_ENCODER));
                let gguf = gguf.map(|source| Inventory::of(source, TEXT_ENCODER)).transpose()?;
                let bytes = gguf.map(|files| files.files().iter().map(|file| file.bytes).sum());
                encoder::memory(text, weights, bytes, text_tokens)?
            }
            None => 0,
        };
        let mut transformer = transformer.bytes(dtype, matrices);
        if let Some(source) = source.filter(|source| source.is_gguf(TRANSFORMER)) {
            transformer = Inventory::of(source, TRANSFORMER)?.files().iter().map(|file| file.bytes).sum();
        }
        Ok(Memory {
            refiner: 0,
            text,
            transformer,
            cache: cache as u64,
            activations: (rows * (last * (2 * c.mlp + 6 * c.width) + 2 * codes * c.width) * width.max(4)) as u64,
            tokenizer: tokenizer.bytes(pixels, checkpoint::Matrices::Tensors),
            decode: cost::decoding(
                &self.tokenizer.decoder,
                largest * self.tokenizer.bits.patch.pow(2),
                pixels.size_in_bytes(),
            ),
            program: cost::PROGRAM,
        })
    }
}

/// Whether transformer and image tokenizer belong together.
fn pair(
    source: &Source,
    transformer: &InfinityConfig,
    tokenizer: &BitTokenizerConfig,
    variant: Option<&Variant>,
) -> Result<()> {
    if tokenizer.bits.per_token() == transformer.bits {
        return Ok(());
    }
    let known = BitPreset::of(tokenizer);
    let named = known.first().map_or_else(|| source.name(IMAGE_TOKENIZER), |preset| preset.file());
    let message = format!(
        "{} has {} bits a token, the transformer of {source} {}",
        named,
        tokenizer.bits.per_token(),
        transformer.bits
    );
    let right = variant.map_or("the tokenizer that it was trained with", |variant| variant.tokenizer);
    Err(Error::model(message).hint(format!("put {right} there: hf download {} {right}", super::HUB)))
}

/// The ratio whose scales begin with these.
pub(super) fn ratio_of(scales: &[(usize, usize)]) -> Option<&'static Ratio> {
    ratios::table().iter().find(|ratio| ratio.prefix(scales.len()) == scales)
}
