//! `--refiner`: draws the detail of finished images anew with another model, Z-Image.

use image::RgbImage;

use super::args::{REFINE_STRENGTH, RefinerArgs};
use super::download::Download;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::generate::Size;
use crate::z_image::{HUB, MULTIPLE, SMALLEST, ZImageConfig};

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

impl RefinerArgs {
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
        let strength = self.refine_strength.unwrap_or(REFINE_STRENGTH);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refiner() -> PictureRefiner {
        let config = ZImageConfig::turbo();
        PictureRefiner { name: HUB.into(), source: None, downloads: Vec::new(), config, strength: REFINE_STRENGTH }
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
