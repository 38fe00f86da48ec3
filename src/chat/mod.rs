//! Conversations about images: Qwen2.5-VL's public weights, or NextFlow's, over the same transformer.

mod config;
mod cost;
mod session;
#[cfg(test)]
mod tests;
mod words;

use candle_core::{Device, Tensor};

pub use config::{QwenConfig, is_qwen};
pub use cost::ChatMemory;
pub use session::{Ending, Picture, Reply, Role, Session, Turn};
pub use words::{Speech, WordSampling};

use crate::backbone::{Backbone, BackboneConfig};
use crate::checkpoint::{FileSummary, Fit, Inventory, Source, WeightType, Weights};
use crate::error::{Error, Result};
use crate::generate::{ModelConfig, TRANSFORMER};
use crate::text::Text;
use crate::vision::{ImageProcessor, VisionConfig, VisionTower};

/// What the model is told if the user tells nothing (Qwen2.5-VL's chat template).
pub const SYSTEM: &str = "You are a helpful assistant.";

/// What a conversation needs to know of a checkpoint before its weights are read.
#[derive(Clone, Debug)]
pub struct ChatConfig {
    /// Shape of the transformer.
    pub backbone: BackboneConfig,
    /// The image encoder's shape, and how images are made ready for it, if there is one.
    pub vision: Option<(VisionConfig, ImageProcessor)>,
    /// How words are drawn if the user says nothing.
    pub sampling: WordSampling,
    /// The most tokens of a conversation.
    pub context: usize,
    stops: Vec<u32>,
}

impl ChatConfig {
    /// Reads the small files of a checkpoint: Qwen2.5-VL's public one, or NextFlow's.
    ///
    /// Errors: a file that is missing or broken.
    pub fn read(source: &Source) -> Result<Self> {
        if is_qwen(&source.read_config()?) {
            let QwenConfig { backbone, vision, processor, sampling, stops, context } = QwenConfig::read(source)?;
            return Ok(Self { backbone, vision: Some((vision, processor)), sampling, context, stops });
        }
        let backbone = ModelConfig::read(source)?.backbone;
        let (sampling, stops) = config::generation(source)?;
        Ok(Self { backbone, vision: None, sampling, context: 32_768, stops })
    }

    /// A model of random weights.
    pub fn synthetic(backbone: BackboneConfig, vision: Option<VisionConfig>) -> Self {
        let vision = vision.map(|config| (config, ImageProcessor::default()));
        Self { backbone, vision, sampling: WordSampling::GREEDY, context: 32_768, stops: Vec::new() }
    }

    /// The files of a checkpoint in numbers, and how their tensors compare with what this config's modules ask for.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let inventory = Inventory::of(source, TRANSFORMER)?;
        let asked = Weights::inventory();
        self.build(&asked)?;
        Ok((inventory.files(), inventory.compare(&asked)))
    }

    /// The transformer and, where there is one, the image encoder.
    pub fn build(&self, w: &Weights) -> candle_core::Result<(Backbone, Option<VisionTower>)> {
        let vision = self.vision.as_ref().map(|(config, _)| VisionTower::load(&w.pp("visual"), config)).transpose()?;
        Ok((Backbone::load(w, &self.backbone)?, vision))
    }
}

/// Control tokens of ChatML.
#[derive(Clone, Copy, Debug)]
struct Marks {
    start: u32,
    end: u32,
    /// Before and behind an image.
    vision: (u32, u32),
    /// Stands for a token of an image.
    pad: u32,
}

impl Marks {
    fn of(text: &Text) -> Result<Self> {
        let id = |word: &str| {
            text.control(word).ok_or_else(|| {
                Error::model(format!("the model does not talk: tokenizer.json has no {word}"))
                    .hint("nextflow chat --model Qwen/Qwen2.5-VL-3B-Instruct")
            })
        };
        Ok(Self {
            start: id("<|im_start|>")?,
            end: id("<|im_end|>")?,
            vision: (id("<|vision_start|>")?, id("<|vision_end|>")?),
            pad: id("<|image_pad|>")?,
        })
    }
}

/// A loaded model that talks.
#[derive(Debug)]
pub struct ChatModel {
    text: Text,
    marks: Marks,
    backbone: Backbone,
    vision: Option<VisionTower>,
    config: ChatConfig,
}

impl ChatModel {
    /// Loads the checkpoint of `config` onto `device`, as `weights`, by default f32 on a CPU and bf16 elsewhere.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a checkpoint that is broken or does not talk.
    pub fn load(source: &Source, config: ChatConfig, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let text = source.text()?;
        let marks = Marks::of(&text)?;
        let usual = WeightType::usual(device.is_cpu() || source.is_gguf(TRANSFORMER));
        let (dtype, blocks) = weights.unwrap_or(usual).placed(device.is_cpu());
        let build = |w: &Weights| config.build(&w.with_matrices(blocks));
        let (backbone, vision) = source.load(TRANSFORMER, dtype, device, build)?;
        Ok(Self { text, marks, backbone, vision, config })
    }

    /// What was read before the weights.
    pub fn config(&self) -> &ChatConfig {
        &self.config
    }

    /// Reads an image for a conversation; `name` is what it is called there.
    ///
    /// Errors: usage, if the model sees no images or this one is too narrow.
    pub fn picture(&self, name: &str, image: &image::RgbImage) -> Result<Picture> {
        let (Some(tower), Some((config, processor))) = (&self.vision, &self.config.vision) else {
            return Err(Self::sees_nothing());
        };
        let patches = processor.patches(image, config)?;
        Ok(Picture::new(name, tower.forward(&patches)?, patches.tokens))
    }

    /// The error of an image for a model without an image encoder.
    pub fn sees_nothing() -> Error {
        Error::usage("this model sees no images").hint("nextflow chat \"...\" without -i")
    }

    /// Logits of all words of the vocabulary for hidden states (1, 1, hidden).
    fn logits(&self, hidden: &Tensor) -> candle_core::Result<Vec<f32>> {
        let logits = self.backbone.text_logits(hidden)?.flatten_all()?;
        // Text only: a model with codes would open an image by the word behind the last one.
        logits.narrow(0, 0, self.config.backbone.vocab_size)?.to_dtype(candle_core::DType::F32)?.to_vec1()
    }
}
