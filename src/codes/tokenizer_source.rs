//! The source of an image tokenizer, and its grids: a model's own, or a public one in a separate
//! file.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use image::RgbImage;

use crate::checkpoint::{Fit, IMAGE_TOKENIZER, Inventory, Matrices, Source, Weights, copy_weights, load_file};
use crate::error::{Error, Result};
use crate::generate::{ImageCodes, ModelConfig, Size, cost, infinity, ratios};
use crate::io::input::quoted;
use crate::onecat;
use crate::tokenizer::{
    BitEncoder, BitPreset, BitTokenizerConfig, CnnConfig, Code, CodeSpace, ImageDecoder, ImageTokenizer, Preset,
    TokenizerConfig,
};
use crate::{memory, pixels};

/// Scales of the levels for encoding with a separate tokenizer: squares of 256, 512 and 1024
/// pixels.
const BIT_LEVELS: [usize; 3] = [7, 10, 13];
/// The largest grid side and the most scales of an explicit schedule.
const MAX_SIDE: usize = 128;
const MAX_SCALES: usize = 64;

/// An image tokenizer that is found, but not loaded.
pub struct TokenizerSource {
    /// Of the model, or of the public tokenizer.
    pub name: String,
    place: Place,
}

enum Place {
    Model(Source, Box<ModelConfig>),
    File(PathBuf, Box<Preset>),
    Bits(PathBuf, Box<BitTokenizerConfig>),
}

impl TokenizerSource {
    /// The public tokenizer in a file, TokenFlow's or Infinity's.
    ///
    /// Errors: [`crate::error::Kind::Model`] if there is none in it.
    pub fn of_file(path: &Path) -> Result<Self> {
        let inventory = Inventory::open(path)?;
        if let Some(config) = BitTokenizerConfig::of_weights(&inventory) {
            return Ok(Self { name: bit_name(&config, path), place: Place::Bits(path.into(), Box::new(config)) });
        }
        let (preset, _) = nearest(&inventory)?;
        Ok(Self { name: preset.name.into(), place: Place::File(path.into(), Box::new(preset)) })
    }

    /// The only Infinity tokenizer in a folder; `None` if the folder has none.
    ///
    /// Errors: [`crate::error::Kind::Model`] if there are several.
    pub fn of_folder(folder: &Path) -> Result<Option<Self>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let file = entry?.path();
            let kind = file.extension().is_some_and(|kind| kind == "pth" || kind == "pt" || kind == "safetensors");
            let known = || Inventory::open(&file).ok().is_some_and(|i| BitTokenizerConfig::of_weights(&i).is_some());
            if kind && file.is_file() && known() {
                files.push(file);
            }
        }
        files.sort();
        match &files[..] {
            [] => Ok(None),
            [file] => Self::of_file(file).map(Some),
            [first, ..] => {
                let message = format!("{} holds {} image tokenizers", folder.display(), files.len());
                Err(Error::model(message).hint(format!("name one of them: --model {}", quoted(first))))
            }
        }
    }

    /// The tokenizer of a whole model.
    pub fn of_model(source: Source) -> Result<Self> {
        let config = source.read_config()?;
        if infinity::is_config(&config) || onecat::is_config(&config) {
            let files = source.files(IMAGE_TOKENIZER)?;
            return files
                .first()
                .map_or_else(|| Err(Error::model(format!("{source} has no image tokenizer"))), |f| Self::of_file(f));
        }
        let config = ModelConfig::read(&source)?;
        Ok(Self { name: config.name.clone(), place: Place::Model(source, Box::new(config)) })
    }

    /// Which codes it has.
    pub fn space(&self) -> CodeSpace {
        match &self.place {
            Place::Model(_, config) => CodeSpace::Table(config.tokenizer.codebook.size),
            Place::File(_, preset) => CodeSpace::Table(preset.config.codebook.size),
            Place::Bits(_, config) => config.bits.space(),
        }
    }

    /// Shape, of a tokenizer that NextFlow can be assembled with.
    ///
    /// Errors: usage, for one without a codebook.
    pub fn tokenflow(&self) -> Result<&TokenizerConfig> {
        match &self.place {
            Place::Model(_, config) => Ok(&config.tokenizer),
            Place::File(_, preset) => Ok(&preset.config),
            Place::Bits(..) => Err(Error::usage(format!("{} has no codebook: it is Infinity's", self.name))
                .hint("--tokenizer tokenflow_siglip_32k.pt")),
        }
    }

    /// Whether images can have these grids (height, width), coarse to fine. Bitwise tokenizers
    /// accept any schedule that grows.
    pub fn has_scales(&self, scales: &[(usize, usize)]) -> bool {
        let side = 1..=MAX_SIDE;
        match &self.place {
            Place::Model(_, config) => config.has_scales(scales),
            Place::File(_, preset) => preset.scales == scales,
            Place::Bits(..) => {
                let grows = |w: &[(usize, usize)]| w[0].0 <= w[1].0 && w[0].1 <= w[1].1;
                (1..=MAX_SCALES).contains(&scales.len())
                    && scales.iter().all(|(h, w)| side.contains(h) && side.contains(w))
                    && scales.windows(2).all(grows)
            }
        }
    }

    /// The image resized and cropped for encoding, and its grids: `scales` if given, else those of
    /// `size`.
    ///
    /// Errors: usage, for a size or scales that it cannot have.
    pub fn prepare(
        &self,
        image: &RgbImage,
        size: Size,
        scales: Option<Vec<(usize, usize)>>,
    ) -> Result<(RgbImage, Vec<(usize, usize)>)> {
        if let Some(scales) = scales.as_ref().filter(|scales| !self.has_scales(scales)) {
            let message = format!("{} has no schedule with the scales {scales:?}", self.name);
            return Err(Error::usage(message).hint("leave out --scales"));
        }
        match &self.place {
            Place::Model(_, config) => {
                let grids = || size.or_of(config, image.dimensions()).grids(config);
                let scales = scales.map_or_else(grids, Ok)?;
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
            Place::Bits(_, config) => {
                let scales = scales.map_or_else(|| bit_scales(size, image.dimensions(), config.cell()), Ok)?;
                let (h, w) = scales.last().copied().unwrap_or_default();
                let size = ((w * config.cell()) as u32, (h * config.cell()) as u32);
                Ok((pixels::cover_lanczos(image, size), scales))
            }
        }
    }

    /// Copies the weights into a model folder, as its image tokenizer.
    ///
    /// Errors: [`crate::error::Kind::Failure`] if that is not possible.
    pub fn copy(&self, folder: &Path) -> Result<()> {
        match &self.place {
            Place::Model(source, config) => source.copy(config.tokenizer_file(source), IMAGE_TOKENIZER, folder),
            Place::File(path, _) | Place::Bits(path, _) => copy_weights(path, IMAGE_TOKENIZER, folder),
        }
    }

    /// The codes of an image that was [prepared](Self::prepare).
    ///
    /// Errors: weights that cannot be loaded, and features that are not finite.
    pub fn encode(&self, image: &RgbImage, scales: &[(usize, usize)], device: &Device) -> Result<ImageCodes> {
        let (h, w) = (image.height() as usize, image.width() as usize);
        let pixels = || pixels::to_tensor(&[image.as_raw()], h, w, device);
        let tokenizer = match &self.place {
            Place::Model(source, config) => config.load_images(source, device, None, ImageTokenizer::load)?,
            Place::File(path, preset) => of_tokenflow(path, preset, device, ImageTokenizer::load)?,
            Place::Bits(path, config) => {
                room(config, &config.encoder, |w| BitEncoder::load(w, config).map(drop), scales, device)?;
                let tokenizer = load_file(path, LAYOUT, DType::F32, device, |w| BitEncoder::load(w, config))?;
                return Ok(tokenizer.encode(&pixels()?, scales)?.remove(0));
            }
        };
        Ok(tokenizer.encode(&pixels()?, scales)?.remove(0).codes)
    }

    /// The image of codes that fit, or of those of a prefix of the scales.
    ///
    /// Errors: weights that cannot be loaded, and pixels that are not finite.
    pub fn decode(&self, codes: &[Vec<Code>], scales: &[(usize, usize)], device: &Device) -> Result<RgbImage> {
        let images = match &self.place {
            Place::Model(source, config) => config.load_images(source, device, None, ImageDecoder::load)?,
            Place::File(path, preset) => of_tokenflow(path, preset, device, ImageDecoder::load)?,
            Place::Bits(path, config) => {
                room(config, &config.decoder, |w| ImageDecoder::load_bits(w, config).map(drop), scales, device)?;
                load_file(path, LAYOUT, DType::F32, device, |w| ImageDecoder::load_bits(w, config))?
            }
        };
        images.decode_image(codes, scales)
    }
}

/// Checks that memory has room for the weights of `build` and for an image of `scales`
/// in one `half` of the tokenizer.
///
/// Errors: [`crate::error::Kind::Memory`] if it does not.
fn room(
    config: &BitTokenizerConfig,
    half: &CnnConfig,
    build: impl Fn(&Weights) -> candle_core::Result<()>,
    scales: &[(usize, usize)],
    device: &Device,
) -> Result<()> {
    let requested = Weights::inventory();
    build(&requested)?;
    let cells = scales.last().map_or(0, |(h, w)| h * w * config.bits.patch * config.bits.patch);
    let needed =
        requested.bytes(DType::F32, Matrices::Tensors) + cost::decoding(half, cells, DType::F32.size_in_bytes());
    memory::check(needed, device, "nextflow encode IMAGE --size 256x256 makes codes of a smaller image")
}

/// The layout that an Infinity file is compared with.
const LAYOUT: &str = "Infinity's image tokenizer";

fn of_tokenflow<T>(
    path: &Path,
    preset: &Preset,
    device: &Device,
    build: impl Fn(&Weights, &TokenizerConfig) -> candle_core::Result<T>,
) -> Result<T> {
    let layout = format!("TokenFlow's {}", preset.name);
    load_file(path, &layout, DType::F32, device, |w| build(w, &preset.config))
}

/// Default grids of an image of (width, height) pixels: the ratio nearest to `size`, or to the
/// image's own, at the largest level that has no more pixels than the image.
fn bit_scales(size: Size, (width, height): (u32, u32), cell: usize) -> Result<Vec<(usize, usize)>> {
    let area = width as usize * height as usize;
    let level = |ratio: &ratios::Ratio| {
        let fits = |&level: &usize| ratio.prefix(level).last().is_some_and(|(h, w)| h * w * cell * cell <= area);
        BIT_LEVELS.into_iter().rev().find(fits).unwrap_or(BIT_LEVELS[0])
    };
    size.of_ratios(f64::from(height) / f64::from(width), &ratios::LEVELS, level, cell)
}

/// The name of an Infinity tokenizer: the public name with its shape that is also its file's name,
/// else the first public name with its shape.
fn bit_name(config: &BitTokenizerConfig, path: &Path) -> String {
    let presets = BitPreset::of(config);
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().replace("d32_reg", "d32reg");
    let name = |preset: &BitPreset| format!("infinity_vae_{}", preset.name);
    match presets.iter().map(name).find(|name| *name == stem).or_else(|| presets.first().map(name)) {
        Some(name) => name,
        None => format!("infinity_vae_d{}", config.bits.per_token()),
    }
}

/// The public tokenizer of TokenFlow that fits a file best, and how it does.
///
/// Errors: a file that is none of them at all.
pub fn nearest(inventory: &Inventory) -> Result<(Preset, Fit)> {
    if !inventory.has("quantize.embedding_vqgan.weight") {
        return Err(Error::model("the file holds no image tokenizer of TokenFlow or Infinity")
            .hint("nextflow info FILE shows its content; a whole model is named by its folder"));
    }
    let fit = |preset: Preset| {
        let requested = Weights::inventory();
        ImageTokenizer::load(&requested, &preset.config)?;
        let fit = inventory.compare(&requested);
        Ok((preset, fit))
    };
    let fits = Preset::all().into_iter().map(fit).collect::<Result<Vec<_>>>()?;
    let faults = |fit: &Fit| fit.missing.len() + fit.misshapen.len();
    let best = fits.into_iter().min_by_key(|(_, fit)| faults(fit));
    best.ok_or_else(|| Error::model("no tokenizer is known"))
}
