//! Image tokenizers and the grids that they are used with: a model's own, or a public one in a file of its own.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use image::RgbImage;

use crate::checkpoint::{Fit, Inventory, Source, Weights, copy_weights, load_file};
use crate::error::{Error, Result};
use crate::generate::{IMAGE_TOKENIZER, ModelConfig};
use crate::pixels;
use crate::size::Size;
use crate::tokenizer::{ImageDecoder, ImageTokenizer, Preset, TokenizerConfig};

/// A tokenizer that is known, but not loaded.
pub struct Codec {
    /// Of the model, or of the public tokenizer.
    pub name: String,
    place: Place,
}

enum Place {
    Model(Source, Box<ModelConfig>),
    File(PathBuf, Box<Preset>),
}

impl Codec {
    /// The public tokenizer in a file.
    ///
    /// Errors: [`crate::error::Kind::Model`] if there is none in it.
    pub fn of_file(path: &Path) -> Result<Self> {
        let (preset, _) = nearest(&Inventory::open(path)?)?;
        Ok(Self { name: preset.name.into(), place: Place::File(path.into(), Box::new(preset)) })
    }

    /// The tokenizer of a whole model.
    pub fn of_model(source: Source) -> Result<Self> {
        let config = ModelConfig::read(&source)?;
        Ok(Self { name: config.name.clone(), place: Place::Model(source, Box::new(config)) })
    }

    /// Shape.
    pub fn config(&self) -> &TokenizerConfig {
        match &self.place {
            Place::Model(_, config) => &config.tokenizer,
            Place::File(_, preset) => &preset.config,
        }
    }

    /// Whether images have these grids (height, width), coarse to fine.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        match &self.place {
            Place::Model(_, config) => config.has_scales(scales),
            Place::File(_, preset) => preset.scales == scales,
        }
    }

    /// An image as it is encoded, in pixels of the last grid, and the grids.
    ///
    /// Errors: usage, for a size that it cannot have.
    pub fn prepare(&self, image: &RgbImage, size: Size) -> Result<(RgbImage, Vec<(usize, usize)>)> {
        match &self.place {
            Place::Model(_, config) => {
                let scales = size.or_of(config, image.dimensions()).grids(config)?;
                let (width, height) = config.pixels(&scales);
                Ok((pixels::cover(image, width, height), scales))
            }
            Place::File(_, preset) => {
                if size != Size::Auto {
                    let message = format!("{} encodes squares of {} pixels only", self.name, preset.image_size);
                    return Err(Error::usage(message).hint("leave out --size: what does not fit is cut off"));
                }
                Ok((pixels::centre_crop(image, preset.image_size as u32), preset.scales.clone()))
            }
        }
    }

    /// Copies the weights into a model folder, as its image tokenizer.
    ///
    /// Errors: [`crate::error::Kind::Failure`] if that is not possible.
    pub fn copy(&self, folder: &Path) -> Result<()> {
        match &self.place {
            Place::Model(source, config) => source.copy(config.tokenizer_file(source), IMAGE_TOKENIZER, folder),
            Place::File(path, _) => copy_weights(path, IMAGE_TOKENIZER, folder),
        }
    }

    /// Loads the weights, as [`ModelConfig::load_tokenizer`] does.
    pub fn load(&self, device: &Device) -> Result<ImageTokenizer> {
        self.load_as(device, ImageTokenizer::load)
    }

    /// The half that draws, by itself.
    pub fn load_decoder(&self, device: &Device) -> Result<ImageDecoder> {
        self.load_as(device, ImageDecoder::load)
    }

    fn load_as<T>(
        &self,
        device: &Device,
        build: impl Fn(&Weights, &TokenizerConfig) -> candle_core::Result<T>,
    ) -> Result<T> {
        match &self.place {
            Place::Model(source, config) => config.load_images(source, device, None, build),
            Place::File(path, preset) => {
                let layout = format!("TokenFlow's {}", preset.name);
                load_file(path, &layout, DType::F32, device, |w| build(w, &preset.config))
            }
        }
    }
}

/// The public tokenizer that fits a file best, and how it does.
///
/// Errors: a file that is none of them at all.
pub fn nearest(inventory: &Inventory) -> Result<(Preset, Fit)> {
    if !inventory.has("quantize.embedding_vqgan.weight") {
        return Err(Error::model("the file holds no image tokenizer of TokenFlow")
            .hint("nextflow info FILE tells what it holds; a whole model is named by its folder"));
    }
    let fit = |preset: Preset| {
        let asked = Weights::inventory();
        ImageTokenizer::load(&asked, &preset.config)?;
        let fit = inventory.compare(&asked);
        Ok((preset, fit))
    };
    let fits = Preset::all().into_iter().map(fit).collect::<Result<Vec<_>>>()?;
    let faults = |fit: &Fit| fit.missing.len() + fit.misshapen.len();
    let best = fits.into_iter().min_by_key(|(_, fit)| faults(fit));
    best.ok_or_else(|| Error::model("no tokenizer is known"))
}
