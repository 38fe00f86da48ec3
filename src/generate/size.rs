//! Sizes of images, and their grids.

use std::str::FromStr;

use crate::error::{Error, Result};
use crate::generate::ratios::{self, Ratio};
use crate::generate::{ModelConfig, schedule};

/// The value of `--size`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// Decided by the task; a square for `gen`.
    Auto,
    /// Height over width, at the model's full size.
    Ratio(f64),
    /// Exactly these pixels.
    Pixels {
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
    },
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown =
            || Error::usage(format!("--size {text} is not a size")).hint("--size 128x128, --size 16:9 or --size auto");
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if let Some((width, height)) = text.split_once(['x', 'X']) {
            let digits = |s: &str| Some(s).filter(|s| s.bytes().all(|b| b.is_ascii_digit()))?.parse().ok();
            let (Some(width), Some(height)) = (digits(width), digits(height)) else { return Err(unknown()) };
            return Ok(Self::Pixels { width, height });
        }
        let (width, height) = text.split_once(':').ok_or_else(unknown)?;
        let number = |s: &str| s.parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0);
        let (Some(width), Some(height)) = (number(width), number(height)) else { return Err(unknown()) };
        // The rounding of 1:4 and 4:1 is not to be held against them.
        match height / width {
            ratio if (0.249..=4.001).contains(&ratio) => Ok(Self::Ratio(ratio)),
            ratio => Err(Error::usage(format!("--size {text} is narrower than 1:4 or wider than 4:1"))
                .hint(if ratio > 1.0 { "--size 1:4" } else { "--size 4:1" })),
        }
    }
}

impl Size {
    /// This size or, for `auto`, the ratio of an image of (width, height) pixels, if the model
    /// draws several ratios.
    pub fn or_of(self, config: &ModelConfig, (width, height): (u32, u32)) -> Self {
        match self {
            Self::Auto if config.grids.is_empty() => {
                Self::Ratio((f64::from(height) / f64::from(width)).clamp(0.25, 4.0))
            }
            size => size,
        }
    }

    /// The grids (height, width) of an image of this size, coarse to fine.
    ///
    /// Errors: usage, for a size that the model cannot draw.
    pub fn grids(self, config: &ModelConfig) -> Result<Vec<(usize, usize)>> {
        self.refined_grids(config, 1)
    }

    /// As [`Self::grids`], of an image that a refiner enlarges so many times.
    ///
    /// Errors: as [`Self::grids`].
    pub fn refined_grids(self, config: &ModelConfig, upscale: usize) -> Result<Vec<(usize, usize)>> {
        let cell = (config.tokenizer.cell() * upscale) as u64;
        match &config.grids[..] {
            [] => self.scales(config.scales, cell),
            grids => self.only(grids, cell),
        }
    }

    /// The grids of a model of at most `max` scales of the paper's table, with `cell` pixels for a
    /// code along each side.
    fn scales(self, max: usize, cell: u64) -> Result<Vec<(usize, usize)>> {
        let max = max.clamp(1, 18);
        match self {
            Self::Auto => Ok(schedule::nearest(1.0).prefix(max).to_vec()),
            Self::Ratio(ratio) => Ok(schedule::nearest_of(ratio, max).prefix(max).to_vec()),
            Self::Pixels { width, height } => {
                let levels = schedule::levels(max);
                let all = levels.flat_map(|level| schedule::table().iter().map(move |entry| &entry.scales[..level]));
                exactly((width, height), all, cell)
            }
        }
    }

    /// The grids of an Infinity image with `cell` pixels per token along each side. A size in
    /// pixels must be that of a ratio at one of `levels`; a ratio, or `auto` (height over width)
    /// where the user gave none, takes the nearest ratio at the level that `level` returns for it.
    ///
    /// Errors: usage, for a size in pixels that no level has.
    pub fn of_ratios(
        self,
        auto: f64,
        levels: &[usize],
        level: impl Fn(&Ratio) -> usize,
        cell: usize,
    ) -> Result<Vec<(usize, usize)>> {
        let of = |ratio: &Ratio| ratio.prefix(level(ratio)).to_vec();
        match self {
            Self::Auto => Ok(of(ratios::nearest(auto))),
            Self::Ratio(ratio) => Ok(of(ratios::nearest(ratio))),
            Self::Pixels { width, height } => {
                let of_level = |&level: &usize| ratios::table().iter().map(move |ratio| ratio.prefix(level));
                exactly((width, height), levels.iter().flat_map(of_level), cell as u64)
            }
        }
    }

    /// The grids of a model that draws a single size, which must be this one.
    fn only(self, grids: &[(usize, usize)], cell: u64) -> Result<Vec<(usize, usize)>> {
        let (h, w) = grids.last().copied().unwrap_or_default();
        let (w, h) = (w as u64 * cell, h as u64 * cell);
        let fits = match self {
            Self::Auto => true,
            Self::Ratio(ratio) => ratio * w as f64 == h as f64,
            Self::Pixels { width, height } => (width, height) == (w, h),
        };
        match fits {
            true => Ok(grids.to_vec()),
            false => Err(Error::usage(format!("this model draws {w}x{h} pixels only")).hint(format!("--size {w}x{h}"))),
        }
    }
}

/// The one of some schedules whose images have (width, height) pixels, with `cell` pixels for a
/// code along each side.
///
/// Errors: usage, with the size of the one that comes closest.
fn exactly<'a>(
    (width, height): (u64, u64),
    schedules: impl Iterator<Item = &'a [(usize, usize)]>,
    cell: u64,
) -> Result<Vec<(usize, usize)>> {
    let pixels =
        |scales: &[(usize, usize)]| scales.last().map_or((0, 0), |(h, w)| (*w as u64 * cell, *h as u64 * cell));
    let log = |a: u64, b: u64| (a.max(1) as f64 / b.max(1) as f64).ln();
    let distance = |scales: &[(usize, usize)]| {
        let (w, h) = pixels(scales);
        let (x, y) = (log(w, width), log(h, height));
        // Several ratios can share a last grid: the one whose coarser grids keep closest to it is
        // the best.
        let bend: f64 = scales.iter().map(|(r, c)| log(*r as u64 * w, *c as u64 * h).abs()).sum();
        // A wrong shape is worse than a wrong size.
        ((x + y).abs() + 2.0 * (x - y).abs(), bend)
    };
    let nearest = schedules.min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap_or(std::cmp::Ordering::Equal));
    let nearest = nearest.unwrap_or_default();
    match pixels(nearest) {
        found if found == (width, height) => Ok(nearest.to_vec()),
        (w, h) => Err(Error::usage(format!("this model cannot draw {width}x{height} pixels"))
            .hint(format!("--size {w}x{h} is the closest it can"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_one_size_draws_no_other() {
        let grids = [(1, 1), (16, 16)];
        for size in ["auto", "1:1", "256x256"] {
            assert_eq!(size.parse::<Size>().unwrap().only(&grids, 16).unwrap(), grids);
        }
        for size in ["4:3", "128x128"] {
            let error = size.parse::<Size>().unwrap().only(&grids, 16).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.as_deref()), (2, Some("--size 256x256")));
        }
    }

    fn drawn(size: &str, max: usize) -> Result<(usize, usize)> {
        let scales = size.parse::<Size>()?.scales(max, 16)?;
        assert_eq!(scales[0], (1, 1));
        let (h, w) = scales[scales.len() - 1];
        Ok((w * 16, h * 16))
    }

    #[test]
    fn sizes_map_to_the_table() {
        assert_eq!(drawn("auto", 8).unwrap(), (128, 128));
        assert_eq!(drawn("1:1", 18).unwrap(), (1024, 1024));
        assert_eq!(drawn("3:2", 8).unwrap(), (144, 96));
        assert_eq!(drawn("2:3", 8).unwrap(), (96, 144));
        assert_eq!(drawn("4:1", 8).unwrap(), (256, 64));
        assert_eq!(drawn("1:4", 8).unwrap(), (64, 256));
        assert_eq!(drawn("160x96", 8).unwrap(), (160, 96));
        assert_eq!(drawn("128x128", 18).unwrap(), (128, 128));
        assert_eq!(drawn("512x512", 16).unwrap(), (512, 512));
        assert_eq!("128x128".parse::<Size>().unwrap().scales(8, 16).unwrap(), schedule::nearest(1.0).scales[..8]);
    }

    #[test]
    fn what_can_be_asked_for_can_be_read() {
        let preset = crate::tokenizer::Preset::siglip_32k();
        let config = ModelConfig::nextflow("7b", crate::backbone::presets::QWEN2_5_VL_7B, preset.config);
        for size in ["auto", "128x128", "256x256", "512x512", "1024x1024", "16:9", "1:4"] {
            let scales = size.parse::<Size>().unwrap().grids(&config).unwrap();
            assert!(config.has_scales(&scales) && !config.has_scales(&scales[1..]), "{size}");
        }
    }

    #[test]
    fn every_size_of_the_table_can_be_asked_for() {
        for entry in schedule::table() {
            let (h, w) = entry.scales[7];
            assert_eq!(drawn(&format!("{}x{}", w * 16, h * 16), 8).unwrap(), (w * 16, h * 16));
        }
    }

    #[test]
    fn impossible_sizes_name_the_closest() {
        for (size, closest) in [
            ("1024x1024", "128x128"),
            ("127x127", "128x128"),
            ("0x0", ""),
            ("0x128", ""),
            ("1000000000x1000000000", ""),
            ("161x95", "160x96"),
        ] {
            let error = drawn(size, 8).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.contains(size));
            let hint = error.hint.unwrap();
            assert!(hint.contains(closest), "{size}: {hint}");
            let named = hint.split_whitespace().nth(1).unwrap();
            assert!(drawn(named, 8).is_ok(), "{named}");
        }
        for size in [
            "",
            "0",
            "127",
            "1000000000",
            "-1x5",
            "+128x128",
            "12.5x3",
            "x",
            ":",
            "0:1",
            "NaN:1",
            "inf:1",
            "1:5",
            "9:1",
            "99999999999999999999x1",
        ] {
            let error = drawn(size, 8).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{size}");
        }
    }
}
