//! A model before its weights are loaded: shapes and default sampling.

use std::path::Path;

use candle_core::{DType, Device};

use super::files::{TOKENIZER, TOKENIZER_HUB, no_tokenizer};
use crate::checkpoint::{
    self, FileSummary, Fit, IMAGE_TOKENIZER, Inventory, Matrices, Source, TRANSFORMER, WeightType, Weights,
};
use crate::error::{Error, Result};
use crate::generate::cost::{self, Memory, Work};
use crate::generate::ratios::{self, LEVELS};
use crate::generate::{Guidance, Sampling, Size, schedule};
use crate::io::output;
use crate::onecat::prompt::Marks;
use crate::onecat::{Drawing, OneCatConfig, Reading, ReadingParts, Trunk};
use crate::text::Text;
use crate::tokenizer::{BitDecoder, BitEncoder, BitPreset, BitTokenizerConfig, ImageDecoder};

/// Pixels of a code along each side.
const CELL: usize = 16;
/// Guidance of text to image, as in the reference's script.
const CFG: f64 = 20.0;
/// Guidance of editing, by the words and by the picture.
const EDIT_CFG: f64 = 3.0;
const IMAGE_CFG: f64 = 1.0;
/// Temperature of every scale.
const TAU: f64 = 0.5;
/// Top-p of the reference, over the two values of a bit.
const TOP_P: f64 = 0.97;
/// The most tokens of a template around a prompt.
pub(super) const AROUND: usize = 48;
/// Prompts of more tokens in all are not kept in caches; [`Reading`] then stays loaded.
pub(super) const KEPT: usize = 4096;

/// Shapes and settings of a whole model.
#[derive(Clone, Debug)]
pub struct OneCatSetup {
    /// The model's name, as it is stored with every image.
    pub name: String,
    /// The transformer.
    pub transformer: OneCatConfig,
    /// The image tokenizer.
    pub tokenizer: BitTokenizerConfig,
    /// Default sampling of text to image.
    pub sampling: Sampling,
    /// Default number of scales.
    pub level: usize,
}

impl OneCatSetup {
    /// A model of these parts.
    pub fn new(transformer: OneCatConfig, tokenizer: BitTokenizerConfig) -> Self {
        let sampling =
            Sampling { cfg: CFG, temperature: TAU, top_p: TOP_P, guidance: Guidance::Constant, ..Sampling::default() };
        let name = if transformer.is_3b() { "OneCAT-3B" } else { "OneCAT" }.into();
        let level =
            LEVELS.iter().rfind(|&&level| level <= transformer.adapters).copied().unwrap_or(transformer.adapters);
        Self { name, transformer, tokenizer, sampling, level }
    }

    /// OneCAT-3B with Infinity's image tokenizer of 32 bits.
    pub fn onecat_3b() -> Option<Self> {
        let tokenizer = BitPreset::all().into_iter().find(|preset| preset.file() == TOKENIZER)?;
        Some(Self::new(OneCatConfig::onecat_3b(), tokenizer.config))
    }

    /// Reads `config.json` and the headers of the weights.
    ///
    /// Errors: [`crate::error::Kind::Model`] for files that are missing, or do not belong together.
    pub fn read(source: &Source) -> Result<Self> {
        let transformer = OneCatConfig::read(source)?;
        if !source.has(IMAGE_TOKENIZER) {
            return Err(no_tokenizer(source));
        }
        let right = || format!("take Infinity's of 32 bits: hf download {TOKENIZER_HUB} {TOKENIZER}");
        let tokenizer = Inventory::of(source, IMAGE_TOKENIZER)?;
        let tokenizer = BitTokenizerConfig::of_weights(&tokenizer).ok_or_else(|| {
            Error::model(format!("{} is no image tokenizer of Infinity", source.name(IMAGE_TOKENIZER))).hint(right())
        })?;
        let (own, other) = (transformer.bits, tokenizer.bits.per_token());
        if own != other || tokenizer.cell() != CELL {
            let message = format!(
                "{} has {other} bits for a token of {} pixels, the transformer of {source} {own} for one of {CELL}",
                source.name(IMAGE_TOKENIZER),
                tokenizer.cell()
            );
            return Err(Error::model(message).hint(right()));
        }
        Ok(Self::new(transformer, tokenizer))
    }

    /// Default sampling of edits.
    pub fn edit_sampling(&self) -> Sampling {
        Sampling { cfg: EDIT_CFG, image_cfg: Some(IMAGE_CFG), ..self.sampling.clone() }
    }

    /// The text tokenizer, and the control tokens of prompts.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a tokenizer that is missing, broken, or of another
    /// model.
    pub fn read_text(&self, source: &Source) -> Result<(Text, Marks)> {
        let rows = self.transformer.transformer.vocab_size;
        let text = source.text_of(rows)?;
        let marks = Marks::of(&text, rows)?;
        Ok((text, marks))
    }

    /// Whether it draws images of these grids (height, width), coarse to fine.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        self.levels().any(|level| ratios::table().iter().any(|ratio| ratio.prefix(level) == scales))
    }

    /// Scales of every level that it has adapters for.
    fn levels(&self) -> impl Iterator<Item = usize> {
        let most = self.transformer.adapters;
        LEVELS.into_iter().filter(move |&level| level <= most)
    }

    /// Pixels, (width, height), of an image of these grids.
    pub fn pixels(&self, scales: &[(usize, usize)]) -> (u32, u32) {
        scales.last().map_or((0, 0), |&(h, w)| ((w * CELL) as u32, (h * CELL) as u32))
    }

    /// The grids of an image of a size: a ratio's at the largest level, or those that end in so
    /// many pixels.
    ///
    /// Errors: usage, for pixels of no level.
    pub fn grids(&self, size: Size) -> Result<Vec<(usize, usize)>> {
        self.grids_like(size, (1, 1))
    }

    /// The same, with the ratio of a picture of (width, height) pixels for `auto`.
    ///
    /// Errors: as [`Self::grids`].
    pub fn grids_like(&self, size: Size, (width, height): (u32, u32)) -> Result<Vec<(usize, usize)>> {
        let levels: Vec<usize> = self.levels().collect();
        size.of_ratios(f64::from(height) / f64::from(width.max(1)), &levels, |_| self.level, CELL)
    }

    /// Checks that the model can be loaded to draw, and with `pictures` to edit, by its text
    /// tokenizer and the headers of its weights.
    ///
    /// Errors: those of loading.
    pub fn check(&self, source: &Source, pictures: bool) -> Result<()> {
        self.read_text(source)?;
        source.check(TRANSFORMER, |w| self.ask(w, ReadingParts { pictures, head: false }))?;
        source.check(IMAGE_TOKENIZER, |w| ImageDecoder::load_bits(w, &self.tokenizer))
    }

    /// Asks for everything that drawing loads.
    fn ask(&self, w: &Weights, parts: ReadingParts) -> candle_core::Result<()> {
        Trunk::load(w, &self.transformer)?;
        Reading::load(w, &self.transformer, parts)?;
        Drawing::load(w, &self.transformer).map(drop)
    }

    /// Summaries of a model's files, and how their tensors compare with those that are loaded.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let (mut files, mut fit) = compare_transformer(source, &self.transformer)?;
        let inventory = Inventory::of(source, IMAGE_TOKENIZER)?;
        let requested = Weights::inventory();
        self.ask_for_images(&requested)?;
        let part = inventory.compare(&requested);
        files.extend(inventory.files());
        fit.missing.extend(part.missing);
        fit.misshapen.extend(part.misshapen);
        fit.unknown.extend(part.unknown);
        Ok((files, fit))
    }

    /// Asks an inventory for both halves of the image tokenizer.
    fn ask_for_images(&self, w: &Weights) -> Result<()> {
        BitEncoder::load(w, &self.tokenizer)?;
        BitDecoder::load(w, &self.tokenizer)?;
        Ok(())
    }

    /// Writes the model at `source` to `folder`, which must not exist: the transformer in blocks of
    /// `weights`, and of the image tokenizer's file what is needed.
    ///
    /// Errors: those of loading; usage, if the folder exists; [`crate::error::Kind::Failure`] if it
    /// cannot be written.
    pub fn quantise(&self, source: &Source, weights: WeightType, folder: &Path) -> Result<()> {
        self.check(source, true)?;
        source.check_type(TRANSFORMER, Some(weights))?;
        checkpoint::whole_folder(folder, |part| {
            let (transformer, tokenizer) = (Weights::inventory(), Weights::inventory());
            self.transformer.ask(&transformer)?;
            let blocks = checkpoint::blocks(source, TRANSFORMER, &transformer, weights)?;
            checkpoint::write_gguf(&part.join("model.gguf"), &blocks)?;
            drop(blocks);
            self.ask_for_images(&tokenizer)?;
            checkpoint::extract(source, IMAGE_TOKENIZER, &tokenizer, DType::F32, &part.join(IMAGE_TOKENIZER))?;
            for file in ["tokenizer.json", "config.json"] {
                output::write(&part.join(file), &source.bytes(file)?)?;
            }
            Ok(())
        })
    }

    /// Memory of `work`, with weights as `source` stores them or as `weights`; without a source
    /// they are random. `picture` is the number of tokens of the source of an edit.
    ///
    /// Errors: a source whose header cannot be read.
    pub fn memory(
        &self,
        source: Option<&Source>,
        weights: Option<WeightType>,
        work: Work,
        picture: Option<usize>,
        device: &Device,
    ) -> Result<Memory> {
        let usual = || weights.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
        let (dtype, matrices) = source.map_or_else(usual, |source| source.placed(TRANSFORMER, weights, device));
        let Work { scales, images, text_tokens, sampling, prompts } = work;
        let (reading, drawing, tokenizer) = (Weights::inventory(), Weights::inventory(), Weights::inventory());
        let parts = ReadingParts { pictures: picture.is_some(), head: false };
        Trunk::load(&reading, &self.transformer)?;
        Reading::load(&reading, &self.transformer, parts)?;
        Trunk::load(&drawing, &self.transformer)?;
        Drawing::load(&drawing, &self.transformer)?;
        ImageDecoder::load_bits(&tokenizer, &self.tokenizer)?;
        let bytes = |requested: &Weights| match source.filter(|source| source.is_gguf(TRANSFORMER)) {
            Some(source) => Ok::<_, Error>(Inventory::of(source, TRANSFORMER)?.bytes_of(requested)),
            None => Ok(requested.bytes(dtype, matrices)),
        };
        let (t, width) = (&self.transformer.transformer, dtype.size_in_bytes());
        let token = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim() * width;
        let guided = sampling.guided_scales(scales.len()) > 0;
        let rows = images
            * match picture {
                None => 1 + usize::from(guided),
                Some(_) => 1 + usize::from(sampling.image_cfg() != 0.0) + usize::from(guided),
            };
        let prefix = picture.unwrap_or(0) + text_tokens + AROUND;
        let codes = schedule::codes(&scales[..sampling.drawn(scales.len())]);
        let largest = scales.iter().map(|(h, w)| h * w).max().unwrap_or(0);
        let last = scales[..sampling.drawn(scales.len())].last().map_or(0, |(h, w)| h * w);
        let read = prompts * (text_tokens + AROUND) > KEPT;
        let known = if read { 1 } else { prompts } * (prefix + 2 * (text_tokens + AROUND)) * token;
        let pixels = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        let mut memory = Memory {
            refiner: 0,
            text: bytes(&reading)? + known as u64 + cost::pass(t, prefix, width),
            transformer: bytes(&drawing)?,
            cache: (rows * (prefix + codes) * token + known) as u64,
            activations: cost::pass(t, rows * last, width),
            tokenizer: tokenizer.bytes(pixels, Matrices::Tensors),
            decode: cost::decoding(&self.tokenizer.decoder, largest, pixels.size_in_bytes()),
            program: cost::PROGRAM + cost::WORD * t.vocab_size as u64,
        };
        if read {
            memory.keep_text();
        }
        Ok(memory)
    }
}

/// As [`OneCatSetup::compare`], for the transformer alone.
///
/// Errors: a file that is missing or broken.
pub fn compare_transformer(source: &Source, config: &OneCatConfig) -> Result<(Vec<FileSummary>, Fit)> {
    let inventory = Inventory::of(source, TRANSFORMER)?;
    let requested = Weights::inventory();
    config.ask(&requested)?;
    Ok((inventory.files(), inventory.compare(&requested)))
}
