//! A model that draws, of any family: the interface of the commands that draw.

use std::path::Path;

use candle_core::Device;
use image::RgbImage;

use super::cost::{self, Memory, Work};
use super::infinity::{self, FeatureStore, InfinityModel, InfinitySetup};
use super::onecat::{OneCatModel, OneCatSetup};
use super::{Batch, Model, ModelConfig, Observer, PromptCounter, Sampling};
use crate::checkpoint::{FileSummary, Fit, Source, WeightType};
use crate::error::{Error, Result};
use crate::generate::Size;
use crate::onecat;
use crate::t5::{self, TextEncoder};
use crate::tokenizer::Code;

/// A model before its weights are loaded.
#[derive(Clone, Debug)]
pub enum GeneratorConfig {
    /// NextFlow, nano and TokenFlow-t2i: one sequence of text and images.
    NextFlow(Box<ModelConfig>),
    /// Infinity: images alone, by a text that another network reads.
    Infinity(Box<InfinitySetup>),
    /// OneCAT: one transformer, whose parts for reading and drawing are loaded one after the other.
    OneCat(Box<OneCatSetup>),
}

impl GeneratorConfig {
    /// Reads and checks the config of a checkpoint, and the headers of its weights where it has
    /// none.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a checkpoint that is broken or does not draw.
    pub fn read(source: &Source) -> Result<Self> {
        match source.read_config()? {
            config if infinity::is_config(&config) => {
                InfinitySetup::read(source).map(|setup| Self::Infinity(Box::new(setup)))
            }
            config if onecat::is_config(&config) => {
                OneCatSetup::read(source).map(|setup| Self::OneCat(Box::new(setup)))
            }
            _ => ModelConfig::read(source).map(|config| Self::NextFlow(Box::new(config))),
        }
    }

    /// The config of a model that draws within a conversation.
    ///
    /// Errors: usage, for one that does not.
    pub fn nextflow(&self) -> Result<&ModelConfig> {
        match self {
            Self::NextFlow(config) => Ok(config),
            Self::Infinity(setup) => Err(Error::usage(format!("{} draws, but neither edits nor talks", setup.name))
                .hint("nextflow gen --model FOLDER -p TEXT, or leave out --model to use nano")),
            Self::OneCat(setup) => Err(Error::usage(format!("{} does not think in words before it draws", setup.name))
                .hint("leave out --think")),
        }
    }

    /// Counts the tokens of prompts as the model does.
    ///
    /// Errors: those of [`Source::text_of`].
    pub fn prompt_counter(&self, source: &Source) -> Result<PromptCounter> {
        match self {
            Self::NextFlow(config) => config.prompt_counter(source),
            Self::Infinity(setup) => {
                let text = setup.text.as_ref().map(|_| TextEncoder::text(source)).transpose()?;
                Ok(PromptCounter::cutting(text))
            }
            Self::OneCat(setup) => Ok(PromptCounter::new(setup.read_text(source)?.0, setup.transformer.context)),
        }
    }

    /// The model's name, as it is stored with every image.
    pub fn name(&self) -> &str {
        match self {
            Self::NextFlow(config) => &config.name,
            Self::Infinity(setup) => &setup.name,
            Self::OneCat(setup) => &setup.name,
        }
    }

    /// The default sampling.
    pub fn sampling(&self) -> &Sampling {
        match self {
            Self::NextFlow(config) => &config.sampling,
            Self::Infinity(setup) => &setup.sampling,
            Self::OneCat(setup) => &setup.sampling,
        }
    }

    /// The grids (height, width) of an image of a size, drawn and refined as `sampling` says.
    ///
    /// Errors: usage, for a size that the model cannot draw.
    pub fn grids(&self, size: Size, sampling: &Sampling) -> Result<Vec<(usize, usize)>> {
        match self {
            Self::NextFlow(config) => size.refined_grids(config, config.upscale(sampling)),
            Self::Infinity(setup) => setup.grids(size),
            Self::OneCat(setup) => setup.grids(size),
        }
    }

    /// Whether it draws images of these grids (height, width), coarse to fine.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        match self {
            Self::NextFlow(config) => config.has_scales(scales),
            Self::Infinity(setup) => setup.has_scales(scales),
            Self::OneCat(setup) => setup.has_scales(scales),
        }
    }

    /// Pixels, (width, height), of an image of these grids, drawn and refined as `sampling` says.
    pub fn pixels(&self, scales: &[(usize, usize)], sampling: &Sampling) -> (u32, u32) {
        match self {
            Self::NextFlow(config) => {
                let ((width, height), times) = (config.pixels(scales), config.upscale(sampling) as u32);
                (width * times, height * times)
            }
            Self::Infinity(setup) => setup.pixels(scales),
            Self::OneCat(setup) => setup.pixels(scales),
        }
    }

    /// How many tokens of a prompt are read, where longer ones are cut as the reference does.
    pub fn prompt_limit(&self) -> Option<usize> {
        match self {
            Self::NextFlow(config) => config.prompt.padded_to,
            // The last one is `</s>`.
            Self::Infinity(_) => Some(t5::MAX_TOKENS - 1),
            Self::OneCat(_) => None,
        }
    }

    /// The steps that a refinement usually takes, if there is a refiner.
    pub fn refiner_steps(&self) -> Option<usize> {
        match self {
            Self::NextFlow(config) => config.refiner.as_ref().map(|refiner| refiner.steps),
            Self::Infinity(_) | Self::OneCat(_) => None,
        }
    }

    /// Checks that the model can be loaded, by its text tokenizer and the headers of its weights;
    /// `features` are stored features of prompts.
    ///
    /// Errors: those of [`Generator::load`].
    pub fn check(&self, source: &Source, features: Option<&Path>) -> Result<()> {
        match self {
            Self::NextFlow(config) => Model::check(source, config),
            Self::Infinity(setup) => setup.check(source, features.map(FeatureStore::at).as_ref()),
            Self::OneCat(setup) => setup.check(source, false),
        }
    }

    /// Summaries of a checkpoint's files, and how their tensors compare with those that the model
    /// loads.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        match self {
            Self::NextFlow(config) => config.compare(source),
            Self::Infinity(setup) => setup.compare(source),
            Self::OneCat(setup) => setup.compare(source),
        }
    }

    /// What `work` needs, with the weights as `source` has them or, where it is not GGUF, as
    /// `weights`.
    ///
    /// Errors: a source whose header cannot be read.
    pub fn memory(&self, source: &Source, weights: Option<WeightType>, work: Work, device: &Device) -> Result<Memory> {
        match self {
            Self::NextFlow(config) => cost::memory(config, source, weights, work, device),
            Self::Infinity(setup) => setup.memory(Some(source), weights, work, device),
            Self::OneCat(setup) => setup.memory(Some(source), weights, work, None, device),
        }
    }
}

/// A loaded model.
#[derive(Debug)]
pub enum Generator {
    /// NextFlow, nano and TokenFlow-t2i.
    NextFlow(Box<Model>),
    /// Infinity.
    Infinity(Box<InfinityModel>),
    /// OneCAT.
    OneCat(Box<OneCatModel>),
}

impl Generator {
    /// Loads everything for drawing onto `device`, as `weights` or by default. What reads text
    /// alone encodes the `prompts` now and is dropped before the other networks are loaded;
    /// `features` are stored features of prompts. With `refine` the refiner is loaded too.
    ///
    /// Errors: files that are missing, broken or do not fit.
    pub fn load(
        source: &Source,
        config: &GeneratorConfig,
        (device, weights): (&Device, Option<WeightType>),
        prompts: &[&str],
        features: Option<&Path>,
        refine: bool,
    ) -> Result<Self> {
        match config {
            GeneratorConfig::NextFlow(_) => {
                let mut model = Model::load(source, device, weights)?;
                if refine {
                    model = model.with_refiner(source, device, weights)?;
                }
                Ok(Self::NextFlow(Box::new(model)))
            }
            GeneratorConfig::Infinity(setup) => {
                let model = InfinityModel::load(source, setup, (device, weights), prompts, features)?;
                Ok(Self::Infinity(Box::new(model)))
            }
            GeneratorConfig::OneCat(setup) => {
                let model = OneCatModel::load(source, setup, (device, weights), prompts, None)?;
                Ok(Self::OneCat(Box::new(model)))
            }
        }
    }

    /// Pixels from the codes of all scales, or of a prefix of them.
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<RgbImage> {
        match self {
            Self::NextFlow(model) => model.decode(codes, scales),
            Self::Infinity(model) => model.decode(codes, scales),
            Self::OneCat(model) => model.decode(codes, scales),
        }
    }

    /// As [`Model::draw_batch`].
    pub fn draw_batch(
        &self,
        prompts: &[&str],
        negative: Option<&str>,
        batch: Batch,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        match self {
            Self::NextFlow(model) => model.draw_batch(prompts, negative, batch, observe),
            Self::Infinity(model) => model.draw_batch(prompts, negative, batch, observe),
            Self::OneCat(model) => model.draw_batch(prompts, negative, batch, observe),
        }
    }
}
