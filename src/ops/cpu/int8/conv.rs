//! Convolution with int8 filters, without im2col: in an image with its channels last, the inputs of
//! a row of a filter lie side by side already.

use super::image::{Image, Window};
use super::kernels::Kernel;
use super::{Int8Matrix, Panels, ZERO, scale_of};
use crate::ops::cpu::columns::{by_columns, filled};
use crate::ops::cpu::operand::Borrowed;
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

/// Channels that are transposed at a time.
const TRANSPOSED: usize = 16;

/// The filters (O, C, K, K) of a convolution, as bytes with a scale for each of the O filters.
#[derive(Debug)]
pub struct Int8Filters {
    /// (O, K * (K C)), every row of a filter padded to whole pairs.
    panels: Panels,
    shape: [usize; 4],
}

impl Int8Filters {
    /// Whether this CPU has a kernel for filters of this shape (O, C, K, K).
    pub fn supports(shape: [usize; 4]) -> bool {
        let [o, channels, k, width] = shape;
        o > 0 && k == width && k.checked_mul(k).and_then(|k| k.checked_mul(channels)).is_some_and(Int8Matrix::supports)
    }

    /// From bytes (O, C, K, K) and a scale per filter, as those of an [`Int8Matrix`].
    ///
    /// Errors: numbers of bytes and scales that do not fit the shape, and shapes that are not
    /// [supported](Self::supports).
    pub fn new(bytes: &[u8], scales: &[f32], shape: [usize; 4]) -> Result<Self> {
        let [o, channels, k, _] = shape;
        let Some(kernel) = Kernel::best().filter(|_| Self::supports(shape)) else {
            bail!("no kernel for filters of shape {shape:?} on this CPU");
        };
        let n = channels * k * k;
        if Some(bytes.len()) != o.checked_mul(n) {
            bail!("{} bytes are not filters of shape {shape:?}", bytes.len());
        }
        let row = (k * channels).next_multiple_of(2);
        let mut transposed = vec![ZERO as u8; o * k * row];
        let transpose = |(filter, transposed): (&[u8], &mut [u8])| {
            for (channel, taps) in filter.chunks_exact(k * k).enumerate() {
                for (taps, transposed) in taps.chunks_exact(k).zip(transposed.chunks_exact_mut(row)) {
                    taps.iter().enumerate().for_each(|(j, tap)| transposed[j * channels + channel] = *tap);
                }
            }
        };
        bytes.par_chunks_exact(n).zip(transposed.par_chunks_exact_mut(k * row)).for_each(transpose);
        let panels = Int8Matrix::new(transposed.into(), scales, (o, k * row))?.pack(kernel);
        Ok(Self { panels, shape })
    }

    /// (O, C, K, K).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Convolves x (B, C, H, W), f32, and adds the bias (O) and the residual (B, O, H', W'), if
    /// any: (B, O, H', W'). Every image is rounded to 16-bit integers, by its largest number.
    ///
    /// Errors: shapes that do not fit.
    pub fn convolve(&self, x: &Tensor, bias: &Tensor, residual: Option<&Tensor>, window: Window) -> Result<Tensor> {
        let ([o, c, k, _], (batch, channels, h, w)) = (self.shape, x.dims4()?);
        let Some((height, width)) = window.size((h, w), k).filter(|_| channels == c && bias.dims() == [o]) else {
            bail!("conv2d: {:?}, {window:?}, does not fit {:?} and bias {:?}", x.dims(), self.shape, bias.dims());
        };
        let shape = [batch, o, height, width];
        if let Some(residual) = residual.filter(|residual| residual.dims() != shape) {
            bail!("conv2d: {shape:?} is not the shape of {:?}", residual.dims());
        }
        let (x, bias, residual) = (x.contiguous()?, bias.contiguous()?, residual.map(Tensor::contiguous).transpose()?);
        let (x, bias, residual) = (Borrowed::of(&x), Borrowed::of(&bias), residual.as_ref().map(Borrowed::of));
        let residual: Option<&[f32]> = residual.as_ref().map(Borrowed::slice).transpose()?;
        let (x, bias) = (x.slice::<f32>()?, bias.slice()?);
        let (kernel, image): (_, usize) = (self.panels.kernel, o * height * width);
        // Rows of the image per task.
        let rows = height.div_ceil(2 * rayon::current_num_threads());
        let y = filled(batch * image, |y| {
            for (i, (x, y)) in x.chunks(c * h * w).zip(y.chunks_mut(image)).enumerate() {
                let source = Image::round(x, (c, h, w), k, window, kernel);
                let residual = residual.map(|residual| &residual[i * image..][..image]);
                by_columns(y, height * width, rows * width, |y| {
                    kernel.convolve(&source, &self.panels, bias, residual, y);
                    Ok(())
                })?;
            }
            Ok(())
        })?;
        Tensor::from_vec(y, &shape, &Device::Cpu)
    }
}

impl Image {
    /// Rounds x (C, H, W). Panics unless filters of this side fit it.
    fn round(x: &[f32], (c, h, w): (usize, usize, usize), side: usize, window: Window, kernel: Kernel) -> Self {
        let Window { stride, padding: [top, _, left, _], repeat } = window;
        let (padded, size) = (window.padded((h, w)), window.size((h, w), side).expect("filters that fit"));
        let largest = x
            .par_chunks(h * w)
            .map(|x| kernel.largest(x))
            .reduce(|| 0.0, |a, b| if a > b || a.is_nan() { a } else { b });
        let (scale, times) = scale_of(largest, c * side * side);
        let pitch = padded.1 * c;
        // The last pair of columns may end one after the last row.
        let mut values = vec![0i16; padded.0 * pitch + 1];
        values.par_chunks_exact_mut(pitch).take(padded.0).enumerate().for_each(|(row, out)| {
            let Some(row) = row.checked_sub(top).filter(|row| *row < h * repeat) else { return };
            let mut lines = vec![0i16; TRANSPOSED * w];
            for channel in (0..c).step_by(TRANSPOSED) {
                let channels = channel..c.min(channel + TRANSPOSED);
                for (line, channel) in lines.chunks_exact_mut(w).zip(channels.clone()) {
                    kernel.round(&x[(channel * h + row / repeat) * w..][..w], times, line);
                }
                for place in 0..w * repeat {
                    let out = &mut out[(left + place) * c..][channels.clone()];
                    for (out, line) in out.iter_mut().zip(lines[place / repeat..].iter().step_by(w)) {
                        *out = *line;
                    }
                }
            }
        });
        Self { values, scale, channels: c, pitch, side, stride, size }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::tests::bytes;
    use super::*;
    use crate::ops::conv2d;
    use crate::ops::testing::{distance, random};

    /// Random filters, and their weights.
    fn filters(shape: [usize; 4]) -> Result<(Int8Filters, Tensor)> {
        let [o, c, k, _] = shape;
        let (bytes, scales) = bytes((o, c * k * k), 2);
        let mut numbers = Vec::new();
        let matrix = Int8Matrix::new(bytes.clone().into(), &scales, (o, c * k * k))?;
        (0..o).try_for_each(|row| matrix.dequantize_row(row, &mut numbers))?;
        Ok((Int8Filters::new(&bytes, &scales, shape)?, Tensor::from_vec(numbers, &shape, &Device::Cpu)?))
    }

    #[test]
    fn convolutions_lose_no_more_than_rounding() -> Result<()> {
        for (image, o, k, stride, padding, repeat) in [
            ((2, 5, 9, 7), 8, 3, 1, [1; 4], 1),
            ((1, 32, 16, 16), 24, 3, 1, [1; 4], 1),
            ((2, 33, 4, 5), 7, 3, 1, [1; 4], 2),
            ((1, 3, 8, 8), 16, 1, 1, [0; 4], 1),
            ((2, 4, 9, 11), 40, 3, 2, [0, 1, 0, 1], 1),
            ((1, 2, 3, 3), 1, 3, 1, [0; 4], 1),
            ((1, 1, 40, 50), 3, 5, 1, [2, 1, 0, 3], 1),
        ] {
            let shape = [o, image.1, k, k];
            let ((filters, w), x, bias) = (filters(shape)?, random(image, 1), random(o, 3));
            let window = Window { stride, padding, repeat };
            let repeated = x.upsample_nearest2d(image.2 * repeat, image.3 * repeat)?;
            let want = conv2d(&repeated, &w, Some(&bias), stride, padding)?;
            let got = filters.convolve(&x, &bias, None, window)?;
            let largest = want.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(
                distance(&got, &want) < 1e-4 * largest,
                "{image:?} {shape:?} {window:?}: {} of {largest}",
                distance(&got, &want)
            );
            let base = random(got.dims(), 4);
            let onto = filters.convolve(&x, &bias, Some(&base), window)?;
            assert!(distance(&onto, &(got + base.as_tensor())?) < 1e-6 * largest);
        }
        Ok(())
    }

    #[test]
    fn images_do_not_depend_on_each_other_and_stay_non_finite() -> Result<()> {
        let shape = [20, 6, 3, 3];
        let ((filters, _), bias) = (filters(shape)?, random(20, 3));
        let window = Window { stride: 1, padding: [1; 4], repeat: 1 };
        let (x, bad) = (random((1, 6, 5, 4), 1), Tensor::full(f32::NAN, (1, 6, 5, 4), &Device::Cpu)?);
        let alone = filters.convolve(&x, &bias, None, window)?;
        let both = filters.convolve(&Tensor::cat(&[&bad, x.as_tensor()], 0)?, &bias, None, window)?;
        assert_eq!(distance(&both.narrow(0, 1, 1)?, &alone), 0.0);
        let first: Vec<f32> = both.narrow(0, 0, 1)?.flatten_all()?.to_vec1()?;
        assert!(first.iter().all(|y| y.is_nan()));
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let (shape, window) = ([4, 2, 3, 3], Window { stride: 1, padding: [0; 4], repeat: 1 });
        let ((filters, _), x, bias) = (filters(shape)?, random((1, 2, 4, 4), 1), random(4, 3));
        assert!(filters.convolve(&x, &bias, None, window).is_ok());
        assert!(filters.convolve(&x, &bias, Some(&x), window).is_err());
        assert!(filters.convolve(&x, &bias, None, Window { stride: 0, ..window }).is_err());
        assert!(filters.convolve(&x, &random(5, 3), None, window).is_err());
        assert!(filters.convolve(&random((1, 3, 4, 4), 1), &bias, None, window).is_err());
        assert!(filters.convolve(&random((1, 2, 2, 4), 1), &bias, None, window).is_err());
        assert!(Int8Filters::new(&[0; 71], &[1.0; 4], shape).is_err());
        assert!(!Int8Filters::supports([1, usize::MAX, 3, 3]) && !Int8Filters::supports([1, 1024, 3, 3]));
        Ok(())
    }
}
