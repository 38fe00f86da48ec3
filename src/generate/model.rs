//! A whole model: text, transformer and image tokenizer of one checkpoint.

use candle_core::Device;
use image::RgbImage;

use super::next_input::NextInput;
use super::refinement::{self, Refined, Refinement};
use super::{Batch, Event, Job, ModelConfig, Observer, Prefix, draw_after, infinity, tokenflow};
use crate::backbone::Backbone;
use crate::checkpoint::{REFINER, Source, TRANSFORMER, WeightType, Weights};
use crate::error::{Error, Kind, Result};
use crate::refiner::Refiner;
use crate::text::Text;
use crate::tokenizer::{Code, ImageDecoder};

impl ModelConfig {
    /// Reads and checks the config of a checkpoint, without its weights. The config of the public
    /// TokenFlow-t2i is replaced by [`tokenflow::config`].
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.read_config()?;
        if infinity::is_config(&config) {
            return Err(Error::model(format!("{source} is Infinity, which draws by nextflow gen alone"))
                .hint("nextflow gen --model FOLDER -p TEXT, or leave out --model to use nano"));
        }
        if crate::onecat::is_config(&config) {
            return Err(Error::model(format!("{source} is OneCAT, which this command is not for"))
                .hint("nextflow gen, edit or chat --model FOLDER"));
        }
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
        let config: Self = serde_json::from_value(config).map_err(|e| bad(e.to_string()).because(e))?;
        config.check().map_err(bad)?;
        Ok(config)
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
    refinement: Option<Refinement>,
    config: ModelConfig,
}

impl Model {
    /// Checks that [`Model::load`] can load a checkpoint, by its text tokenizer and the headers of
    /// its weights.
    ///
    /// Errors: those of [`Model::load`].
    pub fn check(source: &Source, config: &ModelConfig) -> Result<()> {
        Self::read_text(source, config)?;
        source.check(TRANSFORMER, |w| Backbone::load(w, &config.backbone))?;
        source.check(config.tokenizer_file(source), |w| ImageDecoder::load(w, &config.tokenizer))?;
        match &config.refiner {
            // Without its file the model draws all the same, unrefined.
            Some(refiner) if source.has(REFINER) => source.check(REFINER, |w| Refiner::load(w, refiner)),
            _ => Ok(()),
        }
    }

    /// The text tokenizer, and the tokens that open an image.
    fn read_text(source: &Source, config: &ModelConfig) -> Result<(Text, Vec<u32>)> {
        let text = source.text_of(config.backbone.vocab_size)?;
        let opening = config.prompt.opening(&text, config.backbone.boi())?;
        Ok((text, opening))
    }

    /// Loads what drawing needs onto `device`: the transformer as `weights`, by default f32 on a
    /// CPU and bf16 elsewhere, or as a GGUF file has it; the image tokenizer's half that draws as
    /// [`ModelConfig::load_tokenizer`] does.
    pub fn load(source: &Source, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let config = ModelConfig::read(source)?;
        let (text, opening) = Self::read_text(source, &config)?;
        let unconditional = config.prompt.prefix(&config.prompt.negative(&text)?, &opening);
        let (dtype, matrices) = source.placed(TRANSFORMER, weights, device);
        let build = |w: &Weights| Backbone::load(&w.with_matrices(matrices), &config.backbone);
        let backbone = source.load(TRANSFORMER, dtype, device, build)?;
        let images = config.load_images(source, device, weights, ImageDecoder::load)?;
        Ok(Self { text, opening, unconditional, backbone, images, refinement: None, config })
    }

    /// The same with the refiner, which [`super::Sampling::refine`] asks for.
    ///
    /// Errors: those of [`Refinement::load`].
    pub fn with_refiner(mut self, source: &Source, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        self.refinement = Some(Refinement::load(source, &self.config, (device, weights))?);
        Ok(self)
    }

    /// The checkpoint's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Pixels from the codes of all scales, or of a prefix of them.
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<RgbImage> {
        self.images.decode_image(codes, scales)
    }

    /// Draws one image.
    ///
    /// Errors: [`crate::error::Kind::Interrupted`] if the observer breaks,
    /// [`crate::error::Kind::NonFinite`] if the model gives no finite numbers.
    pub fn draw(&self, job: &Job, observe: Observer) -> Result<RgbImage> {
        let batch = Batch { scales: &job.scales, sampling: &job.sampling, seeds: &[job.seed] };
        let mut images = self.draw_batch(&[&job.prompt], job.negative.as_deref(), batch, observe)?;
        images.pop().ok_or_else(|| Error::new(Kind::Failure, "one seed draws one image"))
    }

    /// Draws an image of each prompt, with the seed at its index, in one pass over every scale,
    /// guided away from `negative` or the config's negative prompt. Each image equals the one drawn
    /// alone, up to the order of floating-point sums.
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
        let prefixes = prompts.iter().map(|prompt| prefix(prompt)).collect::<Result<Vec<_>>>()?;
        let negative = negative.map(prefix).transpose()?;
        let input = NextInput::of(&self.images, self.backbone.config().input_mode, batch.scales);
        let images = draw_after(
            &self.backbone,
            input,
            &prefixes,
            negative.as_ref().unwrap_or(&self.unconditional),
            batch,
            observe,
        )?;
        super::notify(observe, Event::Decode)?;
        let pictures = images.iter().map(|codes| self.decode(codes, batch.scales)).collect::<Result<Vec<_>>>()?;
        if batch.sampling.refine == 0 {
            return Ok(pictures);
        }
        let each = images.iter().zip(prompts).zip(batch.seeds);
        let jobs: Vec<Refined> = each.map(|((codes, caption), &seed)| Refined { codes, caption, seed }).collect();
        self.refine((&pictures, batch.scales), &jobs, batch.sampling.refine, observe)
    }

    /// As [`Refinement::refine`].
    ///
    /// Errors: usage, for a model that was loaded without its refiner.
    pub fn refine(
        &self,
        pictures: (&[RgbImage], &[(usize, usize)]),
        jobs: &[Refined],
        steps: usize,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        match (&self.refinement, &self.images) {
            (Some(refinement), ImageDecoder::Table(images)) => {
                refinement.refine((images, &self.text), pictures, jobs, steps, observe)
            }
            _ => Err(refinement::none(&self.config.name)),
        }
    }
}
