//! Pixels in and out of tensors, and exact resampling: every resize is two small matrix products.

mod decode;
mod file;
mod foreign;
mod jpeg;
mod pillow;

use candle_core::{DType, Device, Result, Tensor};
use image::RgbImage;

pub use file::{contain, cover, open, open_all, open_or_read, place_within};
pub use pillow::{ResamplingFilter, centre_crop, cover_lanczos, pad_to_square, resize};

/// A linear resampling along one axis: `weights` is (to, from), row-major.
#[derive(Clone, Debug)]
pub struct Resampling {
    /// Length of the input axis.
    pub from: usize,
    /// Length of the output axis.
    pub to: usize,
    /// Row-major (to, from).
    pub weights: Vec<f32>,
}

/// The A of PyTorch's bicubic.
const A: f64 = -0.75;

/// Keys' cubic convolution kernel.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

impl Resampling {
    /// Bicubic without antialiasing, `align_corners` false, edges clamped.
    pub fn bicubic(from: usize, to: usize) -> Self {
        Self::bicubic_scaled(from, to, from as f64 / to as f64)
    }

    /// As [`Resampling::bicubic`] with `step` input pixels per output pixel, for callers that give
    /// a scale factor. Source coordinates are computed in f32, as PyTorch's are: at 100 pixels the
    /// fifth digit differs.
    pub fn bicubic_scaled(from: usize, to: usize, step: f64) -> Self {
        let step = step as f32;
        let mut weights = vec![0f32; to * from];
        for (i, row) in weights.chunks_exact_mut(from).enumerate() {
            let centre = (i as f32 + 0.5) * step - 0.5;
            let base = centre.floor();
            for tap in -1..=2i64 {
                let source = (base as i64 + tap).clamp(0, from as i64 - 1) as usize;
                row[source] += cubic(f64::from(centre - base) - tap as f64, A) as f32;
            }
        }
        Self { from, to, weights }
    }

    /// Bilinear without antialiasing, `align_corners` false, edges clamped: two taps wherever it
    /// shrinks, too. Coordinates and weights are computed in f32, for PyTorch's are.
    pub fn bilinear(from: usize, to: usize) -> Self {
        let mut weights = vec![0f32; to * from];
        let step = from as f32 / to as f32;
        for (i, row) in weights.chunks_exact_mut(from).enumerate() {
            let source = ((i as f32 + 0.5) * step - 0.5).max(0.0);
            let first = (source as usize).min(from - 1);
            let second = source - first as f32;
            row[first] += 1.0 - second;
            row[(first + 1).min(from - 1)] += second;
        }
        Self { from, to, weights }
    }

    /// Adaptive average pooling: output i is the mean of inputs floor(i*from/to) ..
    /// ceil((i+1)*from/to).
    pub fn area(from: usize, to: usize) -> Self {
        let mut weights = vec![0f32; to * from];
        for (i, row) in weights.chunks_exact_mut(from).enumerate() {
            let (start, end) = (i * from / to, ((i + 1) * from).div_ceil(to));
            row[start..end].fill(1.0 / (end - start) as f32);
        }
        Self { from, to, weights }
    }

    /// Bilinear, `align_corners` false, with a filter that widens where the axis shrinks (PyTorch's
    /// `antialias`).
    pub fn bilinear_antialiased(from: usize, to: usize) -> Self {
        let mut weights = vec![0f32; to * from];
        let taps = pillow::taps(from, to, ResamplingFilter::Bilinear, 0..to);
        for (row, (first, taps)) in weights.chunks_exact_mut(from).zip(taps) {
            row[first..].iter_mut().zip(taps).for_each(|(w, tap)| *w = tap as f32);
        }
        Self { from, to, weights }
    }

    fn matrix(&self, like: &Tensor) -> Result<Tensor> {
        Tensor::from_slice(&self.weights, (self.to, self.from), like.device())?.to_dtype(like.dtype())
    }
}

/// A resampling of a grid: rows, then columns.
#[derive(Clone, Debug)]
pub struct GridResampling {
    rows: Resampling,
    columns: Resampling,
}

impl GridResampling {
    /// From a resampling of each axis.
    pub fn new(rows: Resampling, columns: Resampling) -> Self {
        Self { rows, columns }
    }

    /// Bicubic from one (height, width) to another.
    pub fn bicubic(from: (usize, usize), to: (usize, usize)) -> Self {
        Self { rows: Resampling::bicubic(from.0, to.0), columns: Resampling::bicubic(from.1, to.1) }
    }

    /// Two-tap bilinear from one (height, width) to another.
    pub fn bilinear(from: (usize, usize), to: (usize, usize)) -> Self {
        Self { rows: Resampling::bilinear(from.0, to.0), columns: Resampling::bilinear(from.1, to.1) }
    }

    /// Adaptive average pooling from one (height, width) to another.
    pub fn area(from: (usize, usize), to: (usize, usize)) -> Self {
        Self { rows: Resampling::area(from.0, to.0), columns: Resampling::area(from.1, to.1) }
    }

    /// Resizes `x` (B, H, W, C), channels last; differentiable.
    pub fn channels_last(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        let x = self.rows.matrix(x)?.broadcast_matmul(&x.reshape((b, h, w * c))?)?;
        let x = x.reshape((b * self.rows.to, w, c))?;
        self.columns.matrix(&x)?.broadcast_matmul(&x)?.reshape((b, self.rows.to, self.columns.to, c))
    }

    /// Resizes `x` (B, C, H, W); differentiable.
    pub fn channels_first(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let x = self.rows.matrix(x)?.broadcast_matmul(&x.reshape((b * c, h, w))?)?;
        let columns = self.columns.matrix(&x)?.t()?.contiguous()?;
        x.reshape((b * c * self.rows.to, w))?.matmul(&columns)?.reshape((b, c, self.rows.to, self.columns.to))
    }

    /// Resizes the grids of `x` (B, h * w, C).
    pub fn tokens(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, c) = x.dims3()?;
        let dims = (b, self.rows.to * self.columns.to, c);
        if x.device().is_cpu() {
            // Products of matrices that small are mostly overhead.
            let grids = x.flatten_from(1)?.to_vec2::<f32>()?;
            return Tensor::from_vec(grids.iter().flat_map(|x| self.apply(x, c)).collect(), dims, x.device());
        }
        self.channels_last(&x.reshape((b, self.rows.from, self.columns.from, c))?)?.reshape(dims)
    }

    /// Adds to `out` (to.0 * to.1 * channels), channels last, `gain` times the resized `x`.
    pub fn add_to(&self, x: &[f32], channels: usize, gain: f32, out: &mut [f32]) {
        let (w_in, w_out) = (self.columns.from, self.columns.to);
        let mut line = vec![0f32; w_in * channels];
        for (i, row) in self.rows.weights.chunks_exact(self.rows.from).enumerate() {
            line.fill(0.0);
            for (source, &weight) in row.iter().enumerate().filter(|(_, w)| **w != 0.0) {
                let from = &x[source * w_in * channels..][..w_in * channels];
                line.iter_mut().zip(from).for_each(|(l, v)| *l += weight * v);
            }
            let out = &mut out[i * w_out * channels..][..w_out * channels];
            for (column, out) in self.columns.weights.chunks_exact(w_in).zip(out.chunks_exact_mut(channels)) {
                for (from, &weight) in line.chunks_exact(channels).zip(column).filter(|(_, w)| **w != 0.0) {
                    out.iter_mut().zip(from).for_each(|(o, v)| *o += gain * weight * v);
                }
            }
        }
    }

    /// The resized `x` as a new buffer; layout as in [`GridResampling::add_to`].
    pub fn apply(&self, x: &[f32], channels: usize) -> Vec<f32> {
        let mut out = vec![0f32; self.rows.to * self.columns.to * channels];
        self.add_to(x, channels, 1.0, &mut out);
        out
    }
}

/// RGB bytes (height, width, 3) of a batch of equally large images, as (B, 3, H, W) f32 in [-1, 1].
pub fn to_tensor(batch: &[&[u8]], height: usize, width: usize, device: &Device) -> Result<Tensor> {
    let mut data = Vec::with_capacity(batch.len() * 3 * height * width);
    for rgb in batch {
        for channel in 0..3 {
            data.extend(rgb.iter().skip(channel).step_by(3).map(|&v| f32::from(v) / 127.5 - 1.0));
        }
    }
    Tensor::from_vec(data, (batch.len(), 3, height, width), device)
}

/// What zero becomes in TokenFlow's bytes.
pub const TOKENFLOW_GREY: f32 = 128.0;
/// What zero becomes in Infinity's bytes, before it is truncated.
pub const INFINITY_GREY: f32 = 127.5;

/// One image of (3, H, W) in [-1, 1]: clamp(127.5 x + grey, 0, 255), truncated; `grey` is
/// [`TOKENFLOW_GREY`] or [`INFINITY_GREY`].
///
/// Errors: [`crate::error::Kind::NonFinite`], for pixels that are not finite.
pub fn to_image(x: &Tensor, grey: f32) -> crate::error::Result<RgbImage> {
    let (_, height, width) = x.dims3()?;
    let x = x.to_dtype(DType::F32)?;
    let bytes = if x.device().is_cpu() {
        let x = x.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
        if !x.iter().all(|v| v.is_finite()) {
            return Err(crate::error::Error::non_finite("pixels"));
        }
        x.iter().map(|v| (127.5 * v + grey).clamp(0.0, 255.0) as u8).collect()
    } else {
        // A quarter of the bytes comes from a GPU.
        if (&x * 0.0)?.sum_all()?.to_scalar::<f32>()? != 0.0 {
            return Err(crate::error::Error::non_finite("pixels"));
        }
        let bytes = x.affine(127.5, f64::from(grey))?.clamp(0f32, 255f32)?.to_dtype(DType::U8)?;
        bytes.permute((1, 2, 0))?.flatten_all()?.to_vec1::<u8>()?
    };
    RgbImage::from_raw(width as u32, height as u32, bytes)
        .ok_or_else(|| candle_core::Error::Msg("an image buffer of the wrong size".into()).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn golden() -> HashMap<String, Tensor> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/resample_ops.safetensors");
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    }

    fn assert_close(name: &str, got: &Tensor, want: &Tensor) {
        let diff = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let diff = diff.to_scalar::<f32>().unwrap();
        assert!(diff < 2e-5, "{name}: {diff}");
    }

    #[test]
    fn bicubic_and_area_equal_the_golden_data() {
        let golden = golden();
        let mut seen = 0;
        for (name, input) in golden.iter().filter_map(|(k, v)| Some((k.strip_suffix(".in")?, v))) {
            let want = &golden[&format!("{name}.out")];
            let (from, to) = (input.dim(2).unwrap(), want.dim(2).unwrap());
            let grid = match name.split('_').next() {
                Some("bicubic") => GridResampling::bicubic((from, from), (to, to)),
                Some("area") => GridResampling::area((from, from), (to, to)),
                Some("posinterp") => {
                    let axis = Resampling::bicubic_scaled(from, to, from as f64 / (to as f64 + 0.1));
                    GridResampling { rows: axis.clone(), columns: axis }
                }
                _ => continue,
            };
            seen += 1;
            assert_close(name, &grid.channels_first(input).unwrap(), want);
            let last = input.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
            let got = grid.channels_last(&last).unwrap();
            assert_close(name, &got.permute((0, 3, 1, 2)).unwrap(), want);
            let channels = input.dim(1).unwrap();
            let raw = grid.apply(&last.flatten_all().unwrap().to_vec1::<f32>().unwrap(), channels);
            assert_close(name, &Tensor::from_vec(raw, got.shape(), &Device::Cpu).unwrap(), &got);
        }
        assert!(seen >= 24, "only {seen} cases");
    }

    #[test]
    fn pixels_survive_the_round_trip() {
        let bytes: Vec<u8> = (0..=255u8).flat_map(|v| [v, 255 - v, v / 2]).collect();
        let x = to_tensor(&[&bytes], 16, 16, &Device::Cpu).unwrap();
        let back = to_image(&x.get(0).unwrap(), TOKENFLOW_GREY).unwrap();
        assert!(back.as_raw().iter().zip(&bytes).all(|(a, b)| a.abs_diff(*b) <= 1));
    }

    #[test]
    fn what_is_not_finite_is_no_image() {
        let x = Tensor::new(&[[[0f32]], [[f32::NAN]], [[0.5]]], &Device::Cpu).unwrap();
        assert_eq!(to_image(&x, TOKENFLOW_GREY).unwrap_err().exit_code(), 5);
    }
}
