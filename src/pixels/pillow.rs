//! Antialiased resizing of RGB bytes exactly as Pillow does it, and the two ways TokenFlow makes an
//! image square.

use std::borrow::Cow;
use std::ops::Range;

use image::{Rgb, RgbImage, imageops};
use rayon::prelude::*;

/// A filter of Pillow's `resize`. Where an image shrinks, the filter widens with the scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResamplingFilter {
    /// The mean of the pixels beneath.
    Box,
    /// Linear interpolation.
    Bilinear,
    /// Keys' cubic with A = -0.5 (PyTorch's has -0.75).
    Bicubic,
    /// A sinc of three lobes, windowed by another.
    Lanczos,
}

impl ResamplingFilter {
    /// How far the filter reaches, in pixels of the coarser grid.
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => super::cubic(x, -0.5),
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) }
}

/// For each of `outputs`, of `to` over `from` inputs: the first input that it sees, and the weights
/// of the inputs from there.
pub(super) fn taps(from: usize, to: usize, filter: ResamplingFilter, outputs: Range<usize>) -> Vec<(usize, Vec<f64>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let row = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let mut weights: Vec<f64> = (first..end).map(|x| filter.weight((x as f64 - centre + 0.5) / stretch)).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        (first, weights)
    };
    outputs.map(row).collect()
}

/// Bits after the point of Pillow's fixed-point weights.
const PRECISION: u32 = 22;

/// Taps in fixed point, rounded half away from zero.
fn fixed_taps(from: usize, to: usize, filter: ResamplingFilter, outputs: Range<usize>) -> Vec<(usize, Vec<i32>)> {
    let fix = |w: f64| (w * f64::from(1u32 << PRECISION)).round() as i32;
    let taps = taps(from, to, filter, outputs).into_iter();
    taps.map(|(first, weights)| (first, weights.into_iter().map(fix).collect())).collect()
}

fn weighted(pixels: impl Iterator<Item = u8>, weights: &[i32]) -> u8 {
    let half = 1i64 << (PRECISION - 1);
    let sum: i64 = half + pixels.zip(weights).map(|(p, &w)| i64::from(p) * i64::from(w)).sum::<i64>();
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Pillow's `image.resize((width, height), filter)`, bit for bit. An empty image gives black.
pub fn resize(image: &RgbImage, (width, height): (u32, u32), filter: ResamplingFilter) -> RgbImage {
    resize_part(image, (width, height), filter, (0, 0), (width, height))
}

/// The part of a resized image, of `size`, that begins at `corner` (left, top) and has `part`
/// (width, height) pixels. It is rounded to bytes between the two passes, so their order shows.
pub(super) fn resize_part(
    image: &RgbImage,
    size: (u32, u32),
    filter: ResamplingFilter,
    corner: (u32, u32),
    part: (u32, u32),
) -> RgbImage {
    let (w_in, h_in) = (image.width() as usize, image.height() as usize);
    if w_in == 0 || h_in == 0 || part.0 == 0 || part.1 == 0 {
        return RgbImage::new(part.0, part.1);
    }
    let outputs = |corner: u32, part: u32| corner as usize..(corner + part) as usize;
    let columns = fixed_taps(w_in, size.0 as usize, filter, outputs(corner.0, part.0));
    let rows = fixed_taps(h_in, size.1 as usize, filter, outputs(corner.1, part.1));
    // Pillow 13 begins with the height where that loses much more than the width does; earlier ones
    // never do.
    let lost = |from: usize, to: u32| from as i64 - i64::from(to);
    let height_first = lost(h_in, size.1) > (2 * lost(w_in, size.0)).max(0);
    let bytes = match height_first {
        true => height_first_bands(image, &columns, &rows),
        false => width_first_bands(image, &columns, &rows),
    };
    RgbImage::from_raw(part.0, part.1, bytes).unwrap_or_default()
}

/// Weights of the inputs of every output: the first input, and the weights from there.
type Taps = [(usize, Vec<i32>)];

/// Most bytes of the intermediate image between the two passes, which is made band by band.
const BAND: usize = 8 << 20;

fn height_first_bands(image: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    let width = image.width() as usize;
    let mut out = Vec::with_capacity(rows.len() * columns.len() * 3);
    for band in rows.chunks((BAND / (width * 3)).max(1)) {
        out.extend(resize_rows(&resize_columns(image.as_raw(), width, band, 0), width, columns));
    }
    out
}

fn width_first_bands(image: &RgbImage, columns: &Taps, rows: &Taps) -> Vec<u8> {
    let (width, most) = (image.width() as usize, (BAND / (columns.len() * 3)).max(1));
    let mut out = Vec::with_capacity(rows.len() * columns.len() * 3);
    let mut rest = rows;
    while let Some(&(first, _)) = rest.first() {
        let end = |(from, weights): &(usize, Vec<i32>)| from + weights.len();
        let count = rest.iter().take_while(|taps| end(taps) - first <= most).count().max(1);
        let (band, below) = rest.split_at(count);
        let last = band.iter().map(end).max().unwrap_or(first);
        let narrow = resize_rows(&image.as_raw()[first * width * 3..last * width * 3], width, columns);
        out.extend(resize_columns(&narrow, columns.len(), band, first));
        rest = below;
    }
    out
}

/// Every row of an image of `width` on its own.
fn resize_rows(image: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let mut out = vec![0u8; image.len() / width / 3 * taps.len() * 3];
    out.par_chunks_mut(taps.len() * 3).zip(image.par_chunks(width * 3)).for_each(|(out, row)| {
        for (out, (first, weights)) in out.chunks_exact_mut(3).zip(taps) {
            for (c, out) in out.iter_mut().enumerate() {
                *out = weighted(row[first * 3 + c..].iter().step_by(3).copied(), weights);
            }
        }
    });
    out
}

/// Resizes every column of an image of `width`, whose first row is row `top` of the image that the
/// taps belong to.
fn resize_columns(image: &[u8], width: usize, taps: &Taps, top: usize) -> Vec<u8> {
    let mut out = vec![0u8; taps.len() * width * 3];
    out.par_chunks_mut(width * 3).zip(taps).for_each(|(out, (first, weights))| {
        for (x, out) in out.iter_mut().enumerate() {
            let column = image[(first - top) * width * 3 + x..].iter().step_by(width * 3);
            *out = weighted(column.copied(), weights);
        }
    });
    out
}

/// The middle of an image as a square of `side`, for encoding: halved by boxes while it is twice
/// too large, then bicubic until the shorter side fits, then cropped.
pub fn centre_crop(image: &RgbImage, side: u32) -> RgbImage {
    let shorter = |image: &RgbImage| image.width().min(image.height());
    let mut halved = Cow::Borrowed(image);
    while side > 0 && shorter(&halved) / 2 >= side {
        halved = Cow::Owned(resize(&halved, (halved.width() / 2, halved.height() / 2), ResamplingFilter::Box));
    }
    let scale = f64::from(side) / f64::from(shorter(&halved).max(1));
    // Python rounds half to even.
    let scaled = |length: u32| ((f64::from(length) * scale).round_ties_even() as u32).max(side);
    let size = (scaled(halved.width()), scaled(halved.height()));
    // Only the crop is computed: a strip of 1x8000 pixels would become huge.
    resize_part(&halved, size, ResamplingFilter::Bicubic, ((size.0 - side) / 2, (size.1 - side) / 2), (side, side))
}

/// The middle of an image in (width, height) pixels, as Infinity reads one: resized by Lanczos
/// until it covers them, the longer side truncated, then cropped.
pub fn cover_lanczos(image: &RgbImage, (width, height): (u32, u32)) -> RgbImage {
    let ratio = f64::from(image.width()) / f64::from(image.height().max(1));
    let size = match ratio <= f64::from(width) / f64::from(height.max(1)) {
        true => (width, ((f64::from(width) / ratio) as u32).max(height)),
        false => (((ratio * f64::from(height)) as u32).max(width), height),
    };
    resize_part(image, size, ResamplingFilter::Lanczos, ((size.0 - width) / 2, (size.1 - height) / 2), (width, height))
}

/// The grey that fills an image up to a square.
const GREY: Rgb<u8> = Rgb([127; 3]);

/// A whole image as a square of `side`, for understanding: centred on grey, then bicubic.
pub fn pad_to_square(image: &RgbImage, side: u32) -> RgbImage {
    let (width, height) = image.dimensions();
    let longer = width.max(height);
    let mut square = RgbImage::from_pixel(longer, longer, GREY);
    let (left, top) = ((longer - width) / 2, (longer - height) / 2);
    imageops::replace(&mut square, image, i64::from(left), i64::from(top));
    resize(&square, (side, side), ResamplingFilter::Bicubic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_make_no_difference() {
        let image = RgbImage::from_fn(3000, 1300, |x, y| Rgb([(x * 7 + y) as u8, (x ^ y) as u8, (x * y) as u8]));
        let bytes = image.as_raw();
        for (width, height) in [(2900, 700), (2900, 2600), (600, 150), (2999, 90)] {
            let columns = fixed_taps(3000, width, ResamplingFilter::Bicubic, 0..width);
            let rows = fixed_taps(1300, height, ResamplingFilter::Bicubic, 0..height);
            let narrow = resize_columns(&resize_rows(bytes, 3000, &columns), width, &rows, 0);
            assert!(width_first_bands(&image, &columns, &rows) == narrow, "{width} x {height}");
            let flat = resize_rows(&resize_columns(bytes, 3000, &rows, 0), 3000, &columns);
            assert!(height_first_bands(&image, &columns, &rows) == flat, "{width} x {height}");
        }
    }
}
