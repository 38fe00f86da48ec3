//! What an image encoder is given of an image: Qwen2.5-VL's, or OneCAT's patch embedding.

use image::RgbImage;

use super::VisionConfig;
use crate::error::{Error, Result};
use crate::pixels::{ResamplingFilter, resize};

/// The most a side may exceed the other.
const MAX_RATIO: u32 = 200;

/// No image is enlarged to more pixels.
const MOST_PIXELS: usize = 1 << 28;

/// How images are made ready; names as in the public preprocessor_config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    /// Smaller images are enlarged to this many pixels.
    pub min_pixels: usize,
    /// Larger ones are reduced to this many.
    pub max_pixels: usize,
    /// Mean of each channel, where white is 1.
    pub image_mean: [f32; 3],
    /// Standard deviation of each channel.
    pub image_std: [f32; 3],
}

impl Default for ImageProcessor {
    /// transformers' defaults.
    fn default() -> Self {
        Self {
            min_pixels: 56 * 56,
            max_pixels: 28 * 28 * 1280,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_55, 0.261_302_6, 0.275_777_1],
        }
    }
}

/// An image in patches, those of a token of the transformer together: (token rows, token columns,
/// patch row, patch column, channel, y, x).
#[derive(Clone, Debug)]
pub struct Patches {
    /// Normalised pixels.
    pub values: Vec<f32>,
    /// Grid (height, width) of the transformer's tokens.
    pub tokens: (usize, usize),
}

impl ImageProcessor {
    /// Errors: a value with which no image can be made, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { min_pixels: least, max_pixels: most, image_mean, image_std } = self;
        if least > most || *least > MOST_PIXELS || *most == 0 {
            return Err(format!("images cannot have {least} to {most} pixels"));
        }
        if !image_mean.iter().all(|mean| mean.is_finite()) || !image_std.iter().all(|std| std.is_finite() && *std > 0.0)
        {
            return Err(format!("image_mean {image_mean:?} or image_std {image_std:?} cannot be"));
        }
        Ok(())
    }

    /// The size (width, height) that an image of (width, height) is brought to: multiples of
    /// `factor` pixels, with about its ratio, and pixels within the limits where the ratio allows
    /// it.
    ///
    /// Errors: usage, if one side is more than 200 times the other.
    pub fn size(&self, (width, height): (u32, u32), factor: usize) -> Result<(u32, u32)> {
        let (short, long) = (width.min(height), width.max(height));
        if short == 0 || long > MAX_RATIO * short {
            let message = format!("an image of {width}x{height} pixels is too narrow: {MAX_RATIO}:1 is the limit");
            return Err(Error::usage(message).hint("cut it into pieces"));
        }
        let (w, h, f) = (f64::from(width), f64::from(height), factor as f64);
        let (least, most) = (self.min_pixels as f64, self.max_pixels as f64);
        let mut sides = [w, h].map(|side| (side / f).round_ties_even() * f);
        if sides[0] * sides[1] > most {
            let shrink = (w * h / most).sqrt();
            sides = [w, h].map(|side| ((side / shrink / f).floor() * f).max(f));
        } else if sides[0] * sides[1] < least {
            let grow = (least / (w * h)).sqrt();
            sides = [w, h].map(|side| (side * grow / f).ceil() * f);
        }
        Ok((sides[0] as u32, sides[1] as u32))
    }

    /// Tokens (height, width) that an image of (width, height) pixels becomes.
    ///
    /// Errors: as [`Self::size`].
    pub fn tokens(&self, size: (u32, u32), config: &VisionConfig) -> Result<(usize, usize)> {
        let factor = config.patch_size * config.spatial_merge_size;
        let (width, height) = self.size(size, factor)?;
        Ok((height as usize / factor, width as usize / factor))
    }

    /// Resizes (Pillow's bicubic), normalises and cuts.
    ///
    /// Errors: as [`Self::size`].
    pub fn patches(&self, image: &RgbImage, config: &VisionConfig) -> Result<Patches> {
        let tokens = self.tokens(image.dimensions(), config)?;
        Ok(self.cut(image, tokens, (config.patch_size, config.spatial_merge_size)))
    }

    /// The same for a grid (height, width) of `tokens`, whatever the ratio of the image, with
    /// patches of `p` pixels along each side, `merge` times `merge` of them in a token.
    pub fn cut(&self, image: &RgbImage, (h, w): (usize, usize), (p, merge): (usize, usize)) -> Patches {
        let side = p * merge;
        let image = resize(image, ((w * side) as u32, (h * side) as u32), ResamplingFilter::Bicubic);
        let levels: Vec<[f32; 256]> = (0..3)
            .map(|c| std::array::from_fn(|v| (v as f32 / 255.0 - self.image_mean[c]) / self.image_std[c]))
            .collect();
        let (bytes, stride) = (image.as_raw(), 3 * w * side);
        let mut values = Vec::with_capacity(bytes.len());
        for token in 0..h * w {
            for patch in 0..merge * merge {
                let top = token / w * side + patch / merge * p;
                let left = token % w * side + patch % merge * p;
                for (c, levels) in levels.iter().enumerate() {
                    for y in top..top + p {
                        let row = &bytes[y * stride + 3 * left..][..3 * p];
                        values.extend(row[c..].iter().step_by(3).map(|&v| levels[usize::from(v)]));
                    }
                }
            }
        }
        Patches { values, tokens: (h, w) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_stay_within_the_limits() {
        let limits = |min_pixels, max_pixels| ImageProcessor { min_pixels, max_pixels, ..Default::default() };
        let usual = limits(3136, 12_845_056);
        // Half a patch rounds to even, as Python does.
        assert_eq!(usual.size((42, 70), 28).unwrap(), (56, 56));
        assert_eq!(usual.size((1000, 500), 28).unwrap(), (1008, 504));
        assert_eq!(usual.size((10, 10), 28).unwrap(), (56, 56));
        assert_eq!(usual.size((2000, 10), 28).unwrap(), (812, 28));
        assert_eq!(limits(3136, 60_000).size((1031, 523), 28).unwrap(), (336, 168));
        for narrow in [(2001, 10), (10, 2001), (0, 5)] {
            let error = usual.size(narrow, 28).unwrap_err();
            assert!(error.exit_code() == 2 && error.hint.is_some());
        }
    }
}
