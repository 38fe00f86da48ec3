//! The refiner of a checkpoint: from the codes of drawn images to sharper pictures of twice the
//! size.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::{Event, ModelConfig, Observer};
use crate::checkpoint::{REFINER, Source, WeightType, Weights};
use crate::error::{Error, Kind, Result};
use crate::pixels;
use crate::refiner::{Captions, Condition, Refiner};
use crate::rng::{Rng, Stream};
use crate::text::Text;
use crate::tokenizer::{Code, SemanticFeatures, TableDecoder};

/// A loaded refiner, with the part of the image tokenizer that it reads.
#[derive(Debug)]
pub struct Refinement {
    refiner: Refiner,
    features: SemanticFeatures,
    device: Device,
}

/// An image to refine.
#[derive(Clone, Copy, Debug)]
pub struct Refined<'a> {
    /// Its codes: of every scale, or of the first ones.
    pub codes: &'a [Vec<Code>],
    /// What it shows; may be empty.
    pub caption: &'a str,
    /// Decides the noise.
    pub seed: u64,
}

impl Refinement {
    /// Loads the refiner of a checkpoint.
    ///
    /// Errors: usage, for a model without one; [`crate::error::Kind::Model`] for files that are
    /// missing, broken or do not fit.
    pub fn load(
        source: &Source,
        config: &ModelConfig,
        (device, weights): (&Device, Option<WeightType>),
    ) -> Result<Self> {
        let Some(shape) = &config.refiner else { return Err(none(&config.name)) };
        let weights = weights.filter(|weights| *weights == WeightType::F32);
        let (_, matrices) = source.placed(REFINER, weights, device);
        let build = |w: &Weights| Refiner::load(&w.with_matrices(matrices), shape);
        Ok(Self {
            refiner: source.load(REFINER, DType::F32, device, build)?,
            features: config.load_images(source, device, weights, SemanticFeatures::load)?,
            device: device.clone(),
        })
    }

    /// Refines images of the grids `scales`, decoded as `pictures`, in so many steps: all in one
    /// batch.
    ///
    /// Errors: [`crate::error::Kind::Interrupted`] if the observer breaks,
    /// [`crate::error::Kind::NonFinite`] for pixels that are not finite.
    pub fn refine(
        &self,
        (images, text): (&TableDecoder, &Text),
        (pictures, scales): (&[RgbImage], &[(usize, usize)]),
        jobs: &[Refined],
        steps: usize,
        observe: Observer,
    ) -> Result<Vec<RgbImage>> {
        let Some(first) = pictures.first() else { return Ok(Vec::new()) };
        let rows: Vec<&[u8]> = pictures.iter().map(|picture| picture.as_raw().as_slice()).collect();
        let (width, height) = first.dimensions();
        let picture = pixels::to_tensor(&rows, height as usize, width as usize, &self.device)?;
        let grid = scales.last().copied().unwrap_or_default();
        let f: Vec<Tensor> = jobs
            .iter()
            .map(|job| images.quantizer().to_tensor(images.quantizer().accumulate(job.codes, scales, grid), grid))
            .collect::<candle_core::Result<_>>()?;
        let f = Tensor::cat(&f, 0)?;
        let condition = Condition::new(&picture, &f, &self.features.decode(&f)?, self.refiner.config())?;
        let captions = jobs.iter().map(|job| text.encode(job.caption)).collect::<Result<Vec<_>>>()?;
        let captions: Vec<&[u32]> = captions.iter().map(Vec::as_slice).collect();
        let captions = Captions::new(&captions, &self.refiner.config().caption, &self.device)?;
        let rngs: Vec<Rng> = jobs.iter().map(|job| Rng::new(job.seed, 0, Stream::Refine, 0)).collect();
        let mut progress = |step, steps| observe(Event::Refine { step, steps });
        let refined = self.refiner.refine(&condition, &captions, &rngs, steps, &mut progress)?;
        let refined = refined.ok_or_else(super::job::interrupted)?;
        (0..jobs.len()).map(|i| pixels::to_image(&refined.get(i)?, pixels::TOKENFLOW_GREY)).collect()
    }
}

/// All that refines images without the transformer: those of an edit, and of files of codes.
#[derive(Debug)]
pub struct CodeRefiner {
    refinement: Refinement,
    images: TableDecoder,
    text: Text,
}

impl CodeRefiner {
    /// As [`Refinement::load`].
    ///
    /// Errors: those of it, and a text tokenizer that is missing or broken.
    pub fn load(source: &Source, config: &ModelConfig, on: (&Device, Option<WeightType>)) -> Result<Self> {
        Ok(Self {
            refinement: Refinement::load(source, config, on)?,
            images: config.load_images(source, on.0, on.1, TableDecoder::load)?,
            text: source.text_of(config.backbone.vocab_size)?,
        })
    }

    /// Refines the image of `job`, in the grids `scales`, decoded as `picture`.
    ///
    /// Errors: as [`Refinement::refine`].
    pub fn refine(
        &self,
        picture: RgbImage,
        scales: &[(usize, usize)],
        job: Refined,
        steps: usize,
        observe: Observer,
    ) -> Result<RgbImage> {
        let decoder = (&self.images, &self.text);
        let mut images = self.refinement.refine(decoder, (&[picture], scales), &[job], steps, observe)?;
        images.pop().ok_or_else(|| Error::new(Kind::Failure, "one image refines to one"))
    }
}

/// The error of a model that has no refiner.
pub fn none(model: &str) -> Error {
    Error::usage(format!("{model} has no refiner")).hint("leave out --refine, or leave out --model to use nano")
}
