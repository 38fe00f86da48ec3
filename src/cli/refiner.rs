//! `--refiner`: draws the detail of finished images anew with another model, Z-Image.

use candle_core::Device;
use clap::Args;
use image::RgbImage;
use serde::Serialize;

use super::request::Request;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::generate::{Size, cost};
use crate::z_image::{HUB, MULTIPLE, Memory, SMALLEST, ZImageConfig};

/// The usual strength: three passes of eight.
const STRENGTH: f64 = 0.3;
/// Tokens of the chat template around a prompt.
const TEMPLATE_TOKENS: usize = 8;

/// Another model that refines.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct RefinerArgs {
    /// Draw the detail of the finished image anew with another model, in 512 pixels or more: the
    /// folder of a Z-Image, or Tongyi-MAI/Z-Image-Turbo of the hub
    #[arg(long, value_name = "FOLDER|ID", conflicts_with_all = ["refine", "no_refine"])]
    pub refiner: Option<String>,
    /// With --refiner: how much is drawn anew, above 0 and at most 1, which keeps nothing
    /// [default: 0.3]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub refine_strength: Option<f64>,
    /// The refiner is named by a file and not by the user: nothing is downloaded for it.
    #[arg(skip)]
    pub stored: bool,
}

/// A checked refiner.
pub struct PictureRefiner {
    /// As the user named it.
    pub name: String,
    /// Its files; nothing if they are still to be downloaded, which `--dry-run` does not do.
    pub source: Option<Source>,
    /// The files to download, and their bytes.
    pub downloads: Vec<Download>,
    /// Its shapes.
    pub config: ZImageConfig,
    /// How much is drawn anew.
    pub strength: f64,
}

/// A file of the hub.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
#[derive(Clone, Debug, Serialize)]
pub struct Download {
    /// Its name in the repository.
    pub name: String,
    /// Its length, if the hub states it.
    pub bytes: Option<u64>,
}

/// What a refiner adds to a plan.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Refining {
    refiner: String,
    strength: f64,
    passes: usize,
    memory: Memory,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    downloads: Vec<Download>,
    /// (width, height) of the refined image.
    #[serde(skip)]
    pub size: (u32, u32),
}

impl RefinerArgs {
    /// Errors: usage, for a strength that is none, or one without a refiner.
    pub fn check(&self) -> Result<()> {
        let Some(strength) = self.refine_strength else { return Ok(()) };
        if self.refiner.is_none() {
            return Err(Error::usage("--refine-strength is for another model that refines")
                .hint(format!("--refiner {HUB} --refine-strength {STRENGTH}")));
        }
        match strength > 0.0 && strength <= 1.0 {
            true => Ok(()),
            false => Err(Error::usage(format!("--refine-strength {strength} is not above 0 and at most 1"))
                .hint(format!("--refine-strength {STRENGTH}"))),
        }
    }

    /// The refiner with all its files, checked by their headers. With `dry` nothing is downloaded:
    /// a model of the hub that is not in the cache is taken to be Z-Image-Turbo.
    ///
    /// Errors: those of [`Self::check`], and [`crate::error::Kind::Model`] for files that are
    /// missing, broken or another model's.
    pub(super) fn get(&self, offline: bool, dry: bool) -> Result<Option<PictureRefiner>> {
        self.check()?;
        let Some(name) = &self.refiner else { return Ok(None) };
        if name.is_empty() {
            return Err(Error::usage("--refiner names no model").hint(format!("--refiner {HUB}")));
        }
        let (source, downloads) = super::model::refiner(name, offline || self.stored, dry)?;
        let config = match &source {
            Some(source) => {
                let config = ZImageConfig::read(source)?;
                config.check(source)?;
                config
            }
            None => ZImageConfig::turbo(),
        };
        let strength = self.refine_strength.unwrap_or(STRENGTH);
        Ok(Some(PictureRefiner { name: name.clone(), source, downloads, config, strength }))
    }
}

impl PictureRefiner {
    /// Errors: usage, for a size in pixels that is large enough to be refined, and cannot be.
    pub fn check_size(&self, size: Size) -> Result<()> {
        let Size::Pixels { width, height } = size else { return Ok(()) };
        let (most, step) = (u64::from(self.config.largest()), u64::from(MULTIPLE));
        if width.min(height) < u64::from(SMALLEST) {
            return Ok(());
        }
        if width.max(height) > most {
            let message = format!("{width}x{height} pixels are more than the refiner's {most} on a side");
            return Err(Error::usage(message).hint("--size 1024x1024"));
        }
        if width.is_multiple_of(step) && height.is_multiple_of(step) {
            return Ok(());
        }
        let near = |side: u64| (side / step * step).max(u64::from(SMALLEST));
        Err(Error::usage(format!("the refiner draws multiples of {step} pixels, not {width}x{height}")).hint(format!(
            "--size {}x{}",
            near(width),
            near(height)
        )))
    }

    /// The size of a refined image that was drawn in (width, height) pixels: what the user `asked`
    /// for if that is large enough, else that of the image, enlarged to [`SMALLEST`], in multiples
    /// of [`MULTIPLE`].
    pub fn size(&self, (width, height): (u32, u32), asked: Size) -> (u32, u32) {
        if let Size::Pixels { width, height } = asked
            && width.min(height) >= u64::from(SMALLEST)
        {
            return (width as u32, height as u32);
        }
        let scale = (f64::from(SMALLEST) / f64::from(width.min(height).max(1))).max(1.0);
        let step = f64::from(MULTIPLE);
        let side = |side: u32| ((f64::from(side) * scale / step).round() * step) as u32;
        (side(width).clamp(SMALLEST, self.config.largest()), side(height).clamp(SMALLEST, self.config.largest()))
    }

    /// The drawn image in the size in which it is refined: bicubic.
    pub fn prepare(&self, image: &RgbImage, asked: Size) -> RgbImage {
        let (width, height) = self.size(image.dimensions(), asked);
        crate::pixels::cover(image, width, height)
    }

    /// What refining an image takes that was drawn in (width, height) pixels, by a prompt of
    /// `words` tokens.
    pub(super) fn plan(&self, drawn: (u32, u32), asked: Size, words: usize, device: &Device) -> Result<Refining> {
        let size = self.size(drawn, asked);
        Ok(Refining {
            refiner: self.name.clone(),
            strength: self.strength,
            passes: self.config.schedule.passes(self.strength),
            memory: self.config.memory(size, words + TEMPLATE_TOKENS, device)?,
            downloads: self.downloads.clone(),
            size,
        })
    }
}

impl Request {
    /// The grids (height, width) of the images to draw. A size that only the refiner makes is drawn
    /// in the nearest ratio.
    ///
    /// Errors: usage, for a size that neither makes.
    pub fn grids(&self) -> Result<Vec<(usize, usize)>> {
        let drawn = self.config.grids(self.size, &self.sampling);
        let ratio = match self.size {
            Size::Pixels { width, height } if self.refiner.is_some() && width.min(height) >= SMALLEST.into() => {
                height as f64 / width as f64
            }
            _ => return drawn,
        };
        match drawn {
            Err(_) if (0.249..=4.001).contains(&ratio) => self.config.grids(Size::Ratio(ratio), &self.sampling),
            drawn => drawn,
        }
    }

    /// What refining images takes that are drawn in (width, height) pixels; nothing without a
    /// refiner.
    ///
    /// Errors: shapes that no network has.
    pub fn refining(&self, drawn: (u32, u32)) -> Result<Option<Refining>> {
        let plan = |refiner: &PictureRefiner| refiner.plan(drawn, self.size, self.tokens, &self.device);
        self.refiner.as_ref().map(plan).transpose()
    }

    /// The peak of the whole run, where drawing takes `peak` bytes, and a hint for where that is too
    /// much: `smaller`, if it is drawing that takes the most.
    ///
    /// Errors: as [`Self::refining`].
    pub fn limit<'a>(&self, drawn: (u32, u32), peak: u64, smaller: &'a str) -> Result<(u64, &'a str)> {
        let refining = self.refining(drawn)?.map_or(0, |refining| refining.peak());
        match refining > peak {
            true => Ok((refining, "a smaller --size, or leave out --refiner")),
            false => Ok((peak, smaller)),
        }
    }
}

impl Refining {
    /// Bytes at the peak of refining: drawing is over by then.
    pub fn peak(&self) -> u64 {
        cost::PROGRAM + self.memory.text.max(self.memory.refining)
    }

    /// The phases, by name.
    pub fn phases(&self) -> [(&'static str, u64); 2] {
        let with = |bytes: u64| bytes + cost::PROGRAM;
        [("then the refiner's text", with(self.memory.text)), ("refining", with(self.memory.refining))]
    }

    /// A line of the plan.
    pub fn line(&self) -> String {
        let mut text = format!(
            "refined by {} in {} passes (strength {})\n",
            crate::terminal::clean(&self.refiner),
            self.passes,
            self.strength
        );
        if !self.downloads.is_empty() {
            let bytes: u64 = self.downloads.iter().filter_map(|file| file.bytes).sum();
            text += &format!("{} files to download, {:.1} GB:\n", self.downloads.len(), bytes as f64 / 1e9);
            for Download { name, bytes } in &self.downloads {
                let size = bytes.map_or(String::new(), |bytes| format!(" ({:.1} MB)", bytes as f64 / 1e6));
                text += &format!("  {}{size}\n", crate::terminal::clean(name));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refiner() -> PictureRefiner {
        let config = ZImageConfig::turbo();
        PictureRefiner { name: HUB.into(), source: None, downloads: Vec::new(), config, strength: STRENGTH }
    }

    #[test]
    fn small_images_are_enlarged_and_sizes_are_multiples_of_16() {
        let size = |drawn, asked: &str| refiner().size(drawn, asked.parse().unwrap());
        assert_eq!(size((128, 128), "auto"), (512, 512));
        assert_eq!(size((192, 96), "2:1"), (1024, 512));
        assert_eq!(size((144, 96), "auto"), (768, 512));
        assert_eq!(size((1024, 1024), "auto"), (1024, 1024));
        assert_eq!(size((900, 600), "auto"), (896, 608));
        assert_eq!(size((128, 128), "128x128"), (512, 512));
        assert_eq!(size((128, 128), "1024x768"), (1024, 768));
    }

    #[test]
    fn sizes_that_are_not_refined_name_one_that_is() {
        let check = |size: &str| refiner().check_size(size.parse().unwrap());
        for good in ["auto", "16:9", "128x128", "512x512", "1024x528", "100x100"] {
            assert!(check(good).is_ok(), "{good}");
        }
        assert_eq!(check("1000x513").unwrap_err().hint.unwrap(), "--size 992x512");
        assert_eq!(check("16384x512").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_strength_is_above_0_and_at_most_1() {
        let check = |strength: f64, refiner: Option<&str>| {
            let (refiner, refine_strength) = (refiner.map(String::from), Some(strength));
            RefinerArgs { refiner, refine_strength, stored: false }.check()
        };
        for bad in [0.0, -0.1, 1.01, f64::NAN, f64::INFINITY] {
            assert_eq!(check(bad, Some("x")).unwrap_err().exit_code(), 2, "{bad}");
        }
        assert!(check(1.0, Some("x")).is_ok() && check(0.01, Some("x")).is_ok());
        assert!(check(0.3, None).unwrap_err().hint.unwrap().contains("--refiner"));
    }
}
