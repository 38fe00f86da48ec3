//! Conversations about images: with Qwen2.5-VL's public weights, OneCAT's, or NextFlow's.

mod config;
mod cost;
mod drawing;
mod letterbox;
mod picture;
mod reader;
mod reply;
mod sampling;
mod session;
pub mod template;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use image::RgbImage;

pub use config::{QwenConfig, is_qwen, other_family, unknown_family};
pub use cost::ChatMemory;
pub use letterbox::Letterbox;
pub use picture::{Picture, PictureCodes};
pub use reader::Reader;
pub use reply::{FinishReason, Reply, ReplyEvent, ReplyObserver, ReplyOptions};
pub use sampling::{Detokenizer, TextSampling};
pub use session::{Session, Turn};
pub use template::{Part, Role};

use crate::backbone::{Backbone, BackboneConfig};
use crate::checkpoint::{FileSummary, Fit, Inventory, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Result};
use crate::generate::{ModelConfig, SYSTEM, Size, tokenflow};
use crate::onecat::{self, OneCatConfig, patches};
use crate::pixels;
use crate::text::Text;
use crate::tokenizer::{Code, ImageTokenizer};
use crate::vision::{ImageProcessor, VisionConfig, VisionTower};
use config::Generation;
use template::{ChatTemplate, ImageMarks, Template};

/// Shape of what makes features of images.
#[derive(Clone, Debug)]
pub enum ImageEncoder {
    /// Qwen2.5-VL's encoder.
    Tower(VisionConfig),
    /// OneCAT's patch embedding, a part of its transformer.
    Patches(Box<OneCatConfig>),
}

/// Config of a checkpoint for conversations, read before its weights.
#[derive(Clone, Debug)]
pub struct ChatConfig {
    /// Shape of the transformer.
    pub backbone: BackboneConfig,
    /// The image encoder's shape, and how images are made ready for it, if there is one.
    pub vision: Option<(ImageEncoder, ImageProcessor)>,
    /// The whole config of a model that reads images as codes and draws.
    pub drawing: Option<Box<ModelConfig>>,
    /// The default system prompt.
    pub system: String,
    /// The default sampling of text.
    pub sampling: TextSampling,
    /// The most tokens of a conversation.
    pub context: usize,
    /// What of the checkpoint has no effect, in sentences for the user.
    pub notes: Vec<String>,
    stops: Vec<u32>,
    template: Option<Arc<ChatTemplate>>,
}

impl ChatConfig {
    /// Reads the small files of a checkpoint: Qwen2.5-VL's public one, OneCAT's with the headers of
    /// its weights, or NextFlow's.
    ///
    /// Errors: a file that is missing or broken.
    pub fn read(source: &Source) -> Result<Self> {
        let public = source.read_config()?;
        if is_qwen(&public) {
            let config = QwenConfig::read(source)?;
            let QwenConfig { backbone, vision, processor, sampling, stops, context, template, notes } = config;
            let (vision, system) = (Some((ImageEncoder::Tower(vision), processor)), SYSTEM.into());
            return Ok(Self { backbone, vision, drawing: None, system, sampling, context, notes, stops, template });
        }
        if onecat::is_config(&public) {
            return Ok(Self::onecat(OneCatConfig::read(source)?));
        }
        if let Some(family) = other_family(&public).filter(|_| !tokenflow::is_public(&public)) {
            return Err(unknown_family(source, family));
        }
        let config = ModelConfig::read(source)?;
        let Generation { sampling, stops, ignored } = config::generation(source)?;
        let notes = ignored.into_iter().collect();
        Ok(Self { sampling, stops, notes, ..Self::nextflow(config) })
    }

    /// NextFlow's, which answers greedily.
    pub fn nextflow(config: ModelConfig) -> Self {
        Self {
            backbone: config.backbone.clone(),
            vision: None,
            system: config.conversation.system.clone(),
            sampling: TextSampling::GREEDY,
            context: config.conversation.context,
            drawing: Some(Box::new(config)),
            notes: Vec::new(),
            stops: Vec::new(),
            template: None,
        }
    }

    /// OneCAT's, which answers greedily as in the reference's sequence.
    pub fn onecat(config: OneCatConfig) -> Self {
        Self {
            backbone: config.transformer.clone(),
            drawing: None,
            system: config.system.clone(),
            sampling: TextSampling::GREEDY,
            context: config.context,
            notes: Vec::new(),
            stops: Vec::new(),
            template: None,
            vision: Some((ImageEncoder::Patches(Box::new(config)), patches::processor())),
        }
    }

    /// The config of OneCAT, if it is that.
    pub fn as_onecat(&self) -> Option<&OneCatConfig> {
        match &self.vision {
            Some((ImageEncoder::Patches(config), _)) => Some(config),
            _ => None,
        }
    }

    /// What stands around images.
    fn marks(&self) -> ImageMarks {
        match &self.vision {
            None => ImageMarks::NONE,
            Some((ImageEncoder::Tower(_), _)) => ImageMarks::QWEN,
            Some((ImageEncoder::Patches(_), _)) => ImageMarks::ONECAT,
        }
    }

    /// Errors: usage, for more images than a conversation may have.
    pub fn check_images(&self, count: usize) -> Result<()> {
        match self.as_onecat() {
            // All tokens of all its images would have to see each other, whatever was said between
            // them.
            Some(_) if count > 1 => Err(Error::usage(format!("OneCAT reads one image in a conversation, not {count}"))
                .hint("nextflow chat -i IMAGE \"...\" for each of them; /clear begins a new conversation")),
            _ => Ok(()),
        }
    }

    /// The text tokenizer, and the template of conversations over it.
    fn read_text(&self, source: &Source) -> Result<(Text, Template)> {
        let text = source.text_of(self.backbone.vocab_size)?;
        if self.as_onecat().is_some() {
            onecat::prompt::Marks::of(&text, self.backbone.vocab_size)?;
        }
        let template = Template::of(&text, self.marks())?;
        Ok((text, template))
    }

    /// A model of random weights.
    pub fn synthetic(backbone: BackboneConfig, vision: Option<VisionConfig>) -> Self {
        let vision = vision.map(|config| (ImageEncoder::Tower(config), ImageProcessor::default()));
        let (sampling, system, stops) = (TextSampling::GREEDY, SYSTEM.into(), Vec::new());
        let notes = Vec::new();
        Self { backbone, vision, drawing: None, system, sampling, context: 32_768, notes, stops, template: None }
    }

    /// Summaries of a checkpoint's files, and how their tensors compare with those that this
    /// config's modules load.
    ///
    /// Errors: a file that is missing or broken.
    pub fn compare(&self, source: &Source) -> Result<(Vec<FileSummary>, Fit)> {
        let inventory = Inventory::of(source, TRANSFORMER)?;
        let requested = Weights::inventory();
        self.build(&requested)?;
        Ok((inventory.files(), inventory.compare(&requested)))
    }

    /// How many more tokens fit into the model's context after `tokens`.
    ///
    /// Errors: usage, if these do not fit.
    pub fn room(&self, tokens: usize) -> Result<usize> {
        self.context.checked_sub(tokens).ok_or_else(|| {
            let context = self.context;
            Error::usage(format!("the conversation has {tokens} tokens, the model's limit is {context}"))
                .hint("less text, fewer images, or smaller ones")
        })
    }

    /// What reads a conversation.
    pub fn build(&self, w: &Weights) -> candle_core::Result<Reader> {
        let vision = match &self.vision {
            Some((ImageEncoder::Patches(config), _)) => return Reader::load_onecat(w, config),
            Some((ImageEncoder::Tower(config), _)) => Some(Box::new(VisionTower::load(&w.pp("visual"), config)?)),
            None => None,
        };
        Ok(Reader::Backbone(Box::new(Backbone::load(w, &self.backbone)?), vision))
    }
}

/// A loaded model that talks.
#[derive(Debug)]
pub struct ChatModel {
    text: Text,
    template: Template,
    /// Placeholder for an image token of Qwen2.5-VL.
    pad: Option<u32>,
    /// Its tokenizer puts a space before the first word of a text.
    spaced: bool,
    reader: Reader,
    tokenizer: Option<ImageTokenizer>,
    config: ChatConfig,
}

impl ChatModel {
    /// Checks that [`ChatModel::load`] can load the checkpoint of `config`, by its text tokenizer
    /// and the headers of its weights.
    ///
    /// Errors: those of [`ChatModel::load`].
    pub fn check(source: &Source, config: &ChatConfig) -> Result<()> {
        config.read_text(source)?;
        source.check(TRANSFORMER, |w| config.build(w))?;
        config.drawing.as_ref().map_or(Ok(()), |drawing| {
            source.check(drawing.tokenizer_file(source), |w| ImageTokenizer::load(w, &drawing.tokenizer))
        })
    }

    /// Loads the checkpoint of `config` onto `device`, as `weights`, by default f32 on a CPU and
    /// bf16 elsewhere.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a checkpoint that is broken or does not chat.
    pub fn load(source: &Source, mut config: ChatConfig, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let (text, mut template) = config.read_text(source)?;
        match config.template.take().map(|own| (*own).clone().fitted(&text)) {
            Some(Ok(own)) => {
                template = template.with_own(own);
                // The template brings its own system prompt where the user sets none.
                config.system.clear();
            }
            Some(Err(note)) => config.notes.push(note),
            None => {}
        }
        let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
        let build = |w: &Weights| config.build(&w.with_matrices(matrices));
        let reader = source.load(TRANSFORMER, dtype, device, build)?;
        let tokenizer =
            config.drawing.as_ref().map(|drawing| drawing.load_tokenizer(source, device, weights)).transpose()?;
        Self::new(config, (text, template), reader, tokenizer)
    }

    /// NextFlow with weights in memory.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a text tokenizer without the tokens of
    /// conversations.
    pub fn nextflow(config: ModelConfig, text: Text, backbone: Backbone, tokenizer: ImageTokenizer) -> Result<Self> {
        let template = Template::of(&text, ImageMarks::NONE)?;
        let reader = Reader::Backbone(Box::new(backbone), None);
        Self::new(ChatConfig::nextflow(config), (text, template), reader, Some(tokenizer))
    }

    fn new(
        config: ChatConfig,
        (text, template): (Text, Template),
        reader: Reader,
        tokenizer: Option<ImageTokenizer>,
    ) -> Result<Self> {
        let spaced = text.decode(&text.encode("a")?)?.starts_with(' ');
        let pad = text.control("<|image_pad|>");
        Ok(Self { text, template, pad, spaced, reader, tokenizer, config })
    }

    /// The same with another transformer.
    pub fn with_backbone(self, backbone: Backbone) -> Self {
        Self { reader: Reader::Backbone(Box::new(backbone), None), ..self }
    }

    /// The networks that read and answer.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// The image tokenizer, in a model that reads images as codes.
    pub fn tokenizer(&self) -> Option<&ImageTokenizer> {
        self.tokenizer.as_ref()
    }

    /// The text tokenizer.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// The config.
    pub fn config(&self) -> &ChatConfig {
        &self.config
    }

    /// Encodes an image for a conversation, in which its name is `name`.
    ///
    /// Errors: usage, if the model reads no images or this one is too narrow.
    pub fn picture(&self, name: &str, image: &RgbImage) -> Result<Picture> {
        if let Some(config) = &self.config.drawing {
            let letterbox = Letterbox::of(config, image.dimensions(), Size::Auto)?;
            return self.encode(name, &letterbox.apply(image), &letterbox.scales);
        }
        match (&self.reader, &self.config.vision) {
            (Reader::Backbone(_, Some(tower)), Some((ImageEncoder::Tower(config), processor))) => {
                let patches = processor.patches(image, config)?;
                Ok(Picture::of_patches(name, tower.forward(&patches)?, patches.tokens))
            }
            (Reader::OneCat(_, reading), Some((ImageEncoder::Patches(config), processor))) => {
                let parts = patches::understanding(config, processor, image)?;
                Ok(Picture::of_features(name, reading.features(&parts)?))
            }
            _ => Err(Self::sees_nothing()),
        }
    }

    /// Reads an image of the size of the last of the grids `scales`.
    ///
    /// Errors: usage, if the model does not read images as codes.
    pub fn encode(&self, name: &str, image: &RgbImage, scales: &[(usize, usize)]) -> Result<Picture> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(Self::sees_nothing)?;
        let (width, height) = (image.width() as usize, image.height() as usize);
        let pixels = pixels::to_tensor(&[image.as_raw()], height, width, self.reader.device())?;
        let codes = tokenizer.encode(&pixels, scales)?.remove(0).codes;
        Picture::of_codes(name, &self.config.backbone, tokenizer.quantizer(), codes, scales)
    }

    /// The grids of an image of the default size.
    pub fn usual_scales(&self) -> Result<Vec<(usize, usize)>> {
        Size::Auto.grids(self.config.drawing.as_ref().ok_or_else(|| self.draws_nothing())?)
    }

    /// The pixels of an image in codes.
    ///
    /// Errors: an image that is not in codes.
    pub fn decode(&self, picture: &Picture) -> Result<RgbImage> {
        match picture.codes() {
            Some(codes) => self.pixels(&codes.codes, &codes.scales),
            None => Err(Error::usage(format!("{} is not in codes", picture.name))),
        }
    }

    /// The pixels of the codes of all scales, or of the first of them.
    ///
    /// Errors: usage, if the model does not draw.
    pub fn pixels(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<RgbImage> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| self.draws_nothing())?;
        tokenizer.decode_image(codes, scales)
    }

    /// The error of an image for a model without an image encoder.
    pub fn sees_nothing() -> Error {
        Error::usage("this model sees no images").hint("nextflow chat \"...\" without -i")
    }

    /// The error of an image to be drawn by a model that draws none.
    pub fn draws_nothing(&self) -> Error {
        match self.config.as_onecat() {
            // The parts that draw are half of the model, and work from what conversations do not
            // hold.
            Some(_) => Error::usage("OneCAT draws and edits by commands of their own, not within a conversation")
                .hint("nextflow edit --model FOLDER -i IMAGE -p TEXT, or nextflow gen --model FOLDER -p TEXT"),
            None => Error::usage("this model does not draw").hint("nextflow gen -p \"a red apple\""),
        }
    }

    /// The beginning of generated text, without the space that a tokenizer like Llama's puts before
    /// the first word.
    fn opening<'a>(&self, words: &'a str, first: bool) -> &'a str {
        if first && self.spaced { words.strip_prefix(' ').unwrap_or(words) } else { words }
    }

    /// Whether it answers with images of its own accord.
    fn draws(&self) -> bool {
        self.config.drawing.as_ref().is_some_and(|config| config.conversation.draws)
    }

    /// Logits of all text tokens and, where it draws of its own accord, of `<boi>`, for hidden
    /// states (1, 1, hidden).
    fn logits(&self, hidden: &Tensor) -> candle_core::Result<Vec<f32>> {
        let logits = self.reader.text_logits(hidden)?.flatten_all()?;
        let rows = self.config.backbone.vocab_size + usize::from(self.draws());
        logits.narrow(0, 0, rows)?.to_dtype(candle_core::DType::F32)?.to_vec1()
    }
}
