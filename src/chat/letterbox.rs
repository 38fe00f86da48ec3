//! Letterboxing: images of any size in a model's grids, and back, for `nextflow edit` and
//! `nextflow chat`.

use image::{RgbImage, imageops};

use crate::error::Result;
use crate::generate::{ModelConfig, Size};
use crate::pixels;

/// The place of an image in the model's: scaled to fit and centred; where the ratios differ its
/// border pixels are repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letterbox {
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// The model's image, (width, height) in pixels.
    outer: (u32, u32),
    /// Left, top, width and height of the crop: the given image, or all of it if a size was asked
    /// for.
    kept: [u32; 4],
}

impl Letterbox {
    /// For an image of (width, height) pixels, in grids of its own ratio or of `size`, if that is
    /// not `auto`.
    ///
    /// Errors: usage, for a size that the model does not draw.
    pub fn of(config: &ModelConfig, dimensions: (u32, u32), size: Size) -> Result<Self> {
        let asked = size != Size::Auto;
        let scales = size.or_of(config, dimensions).grids(config)?;
        let outer = config.pixels(&scales);
        let kept = if asked { [0, 0, outer.0, outer.1] } else { pixels::place_within(dimensions, outer) };
        Ok(Self { scales, outer, kept })
    }

    /// The given image, letterboxed to the model's.
    pub fn apply(&self, image: &RgbImage) -> RgbImage {
        pixels::contain(image, self.outer)
    }

    /// Size of the crop, (width, height) in pixels.
    pub fn size(&self) -> (u32, u32) {
        (self.kept[2], self.kept[3])
    }

    /// The crop of the model's image, or of a refined one, which is so many times as large.
    pub fn crop(&self, image: &RgbImage) -> RgbImage {
        let times = (image.width() / self.outer.0.max(1)).max(1);
        let [left, top, width, height] = self.kept.map(|pixels| pixels * times);
        imageops::crop_imm(image, left, top, width, height).to_image()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Source;

    fn nano() -> ModelConfig {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/nano");
        ModelConfig::read(&Source::Folder(folder.into())).unwrap()
    }

    #[test]
    fn every_size_fits_and_comes_back_in_its_own_ratio() {
        for (w, h) in [(128, 128), (1, 1), (500, 333), (333, 500), (4000, 20), (7, 6000), (130, 128)] {
            let letterbox = Letterbox::of(&nano(), (w, h), Size::Auto).unwrap();
            let image = RgbImage::from_fn(w, h, |x, y| image::Rgb([(x % 200) as u8, (y % 200) as u8, 9]));
            let fitted = letterbox.apply(&image);
            let (rows, columns) = letterbox.scales[7];
            assert_eq!(fitted.dimensions(), (16 * columns as u32, 16 * rows as u32));
            let (cut_w, cut_h) = letterbox.crop(&fitted).dimensions();
            let off = (f64::from(cut_w) / f64::from(cut_h)) / (f64::from(w) / f64::from(h));
            assert!((0.9..1.12).contains(&off) || cut_w.min(cut_h) < 8, "{w}x{h} -> {cut_w}x{cut_h}");
        }
        let asked = Letterbox::of(&nano(), (160, 90), Size::Ratio(1.0)).unwrap();
        let image = RgbImage::from_pixel(160, 90, image::Rgb([7; 3]));
        assert_eq!((asked.size(), asked.crop(&asked.apply(&image)).dimensions()), ((128, 128), (128, 128)));
        let square = Letterbox::of(&nano(), (128, 128), Size::Auto).unwrap();
        let image = RgbImage::from_fn(128, 128, |x, y| image::Rgb([x as u8, y as u8, 9]));
        assert!(square.apply(&image) == image && square.crop(&image) == image);
    }
}
