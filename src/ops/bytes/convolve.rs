//! Convolution with filters of bytes: an image with its channels last holds what a row of a filter is multiplied with at a place
//! side by side, so that nothing is unfolded.

use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::registers::Kernel;
use super::{Bytes, Panels, ZERO, steps};
use crate::ops::columns::{by_columns, filled};
use crate::ops::slice::Borrowed;

/// Channels whose rows are turned at a time.
const TURNED: usize = 16;

/// The filters (O, C, K, K) of a convolution, as bytes with a scale for each of the O.
#[derive(Debug)]
pub struct ByteFilters {
    /// (O, K * (K C)), the rows of a filter filled up to pairs.
    panels: Panels,
    shape: [usize; 4],
}

/// An image with its padding, as integers, its channels last.
pub(super) struct Image {
    pub(super) values: Vec<i16>,
    /// What an integer stands for.
    pub(super) scale: f32,
    pub(super) channels: usize,
    /// Numbers in a row.
    pub(super) pitch: usize,
    /// The side of the filters, and how far they move.
    pub(super) side: usize,
    pub(super) stride: usize,
    /// Of what they make of it, (height, width).
    pub(super) size: (usize, usize),
}

/// How a convolution reads an image.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// How far the filters move.
    pub stride: usize,
    /// Zeros around it: top, bottom, left and right.
    pub padding: [usize; 4],
    /// How often every pixel is repeated in both directions, before.
    pub repeat: usize,
}

impl Reading {
    /// The size with its padding of an image (height, width).
    fn padded(&self, (h, w): (usize, usize)) -> (usize, usize) {
        let [top, bottom, left, right] = self.padding;
        (h * self.repeat + top + bottom, w * self.repeat + left + right)
    }

    /// The size of what filters of a side make of an image; nothing if they do not fit.
    fn size(&self, image: (usize, usize), side: usize) -> Option<(usize, usize)> {
        let (h, w) = self.padded(image);
        let fits = self.stride > 0 && side > 0 && h.min(w) >= side && image.0.min(image.1) > 0;
        fits.then(|| ((h - side) / self.stride + 1, (w - side) / self.stride + 1))
    }
}

impl ByteFilters {
    /// Whether this processor has a kernel for filters (O, C, K, K) of this shape.
    pub fn suits(shape: [usize; 4]) -> bool {
        let [o, channels, k, width] = shape;
        o > 0 && k == width && k.checked_mul(k).and_then(|k| k.checked_mul(channels)).is_some_and(Bytes::suits)
    }

    /// Of bytes and scales as [`Bytes::new`] takes them.
    ///
    /// Errors when their numbers are not those of the shape, or it does not [suit](Self::suits).
    pub fn new(bytes: &[u8], scales: &[f32], shape: [usize; 4]) -> Result<Self> {
        let [o, channels, k, _] = shape;
        let Some(kernel) = Kernel::best().filter(|_| Self::suits(shape)) else {
            bail!("no kernel for filters of shape {shape:?} on this processor");
        };
        let n = channels * k * k;
        if Some(bytes.len()) != o.checked_mul(n) {
            bail!("{} bytes are not filters of shape {shape:?}", bytes.len());
        }
        let row = (k * channels).next_multiple_of(2);
        let mut turned = vec![ZERO as u8; o * k * row];
        for (filter, turned) in bytes.chunks_exact(n).zip(turned.chunks_exact_mut(k * row)) {
            for (at, byte) in filter.iter().enumerate() {
                let (channel, i, j) = (at / (k * k), at / k % k, at % k);
                turned[i * row + j * channels + channel] = *byte;
            }
        }
        let panels = Bytes::new(turned.into(), scales, (o, k * row))?.lay_out(kernel);
        Ok(Self { panels, shape })
    }

    /// (O, C, K, K).
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Convolves x (B, C, H, W), f32, and adds the bias (O) and what is in `base`, if anything: (B, O, H', W'). Every image is
    /// rounded to 16-bit integers by its largest number.
    ///
    /// Errors when the shapes do not fit.
    pub fn convolve(&self, x: &Tensor, bias: &Tensor, base: Option<&Tensor>, reading: Reading) -> Result<Tensor> {
        let ([o, c, k, _], (batch, channels, h, w)) = (self.shape, x.dims4()?);
        let Some((height, width)) = reading.size((h, w), k).filter(|_| channels == c && bias.dims() == [o]) else {
            bail!("conv2d: {:?}, {reading:?}, does not fit {:?} and bias {:?}", x.dims(), self.shape, bias.dims());
        };
        let shape = [batch, o, height, width];
        if let Some(base) = base.filter(|base| base.dims() != shape) {
            bail!("conv2d: {shape:?} is not the shape of {:?}", base.dims());
        }
        let (x, bias, base) = (x.contiguous()?, bias.contiguous()?, base.map(Tensor::contiguous).transpose()?);
        let (x, bias, base) = (Borrowed::of(&x), Borrowed::of(&bias), base.as_ref().map(Borrowed::of));
        let (x, bias, base) = (x.slice()?, bias.slice()?, base.as_ref().map(|base| base.slice()).transpose()?);
        let (kernel, image): (_, usize) = (self.panels.kernel, o * height * width);
        // Rows of places that one thread takes at a time.
        let rows = height.div_ceil(2 * rayon::current_num_threads());
        let y = filled(batch * image, |y| {
            for (i, (x, y)) in x.chunks(c * h * w).zip(y.chunks_mut(image)).enumerate() {
                let source = Image::of(x, (c, h, w), k, reading, kernel);
                let base = base.map(|base: &[f32]| &base[i * image..][..image]);
                by_columns(y, height * width, rows * width, |y| {
                    kernel.convolve(&source, &self.panels, bias, base, y);
                    Ok(())
                })?;
            }
            Ok(())
        })?;
        Tensor::from_vec(y, &shape, &Device::Cpu)
    }
}

impl Image {
    /// Panics unless filters of this side fit the image `x` (C, H, W).
    fn of(x: &[f32], (c, h, w): (usize, usize, usize), side: usize, reading: Reading, kernel: Kernel) -> Self {
        let Reading { stride, padding: [top, _, left, _], repeat } = reading;
        let (padded, size) = (reading.padded((h, w)), reading.size((h, w), side).expect("filters that fit"));
        let largest = x
            .par_chunks(h * w)
            .map(|x| kernel.largest(x))
            .reduce(|| 0.0, |a, b| if a > b || a.is_nan() { a } else { b });
        let (scale, times) = steps(largest, c * side * side);
        let pitch = padded.1 * c;
        // Pairs of the last row may end after it.
        let mut values = vec![0i16; padded.0 * pitch + 1];
        values.par_chunks_exact_mut(pitch).take(padded.0).enumerate().for_each(|(row, out)| {
            let Some(row) = row.checked_sub(top).filter(|row| *row < h * repeat) else { return };
            let mut lines = vec![0i16; TURNED * w];
            for channel in (0..c).step_by(TURNED) {
                let channels = channel..c.min(channel + TURNED);
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
    use crate::ops::check::random;
    use crate::ops::conv2d;

    /// The filters, and what they stand for.
    fn filters(shape: [usize; 4]) -> Result<(ByteFilters, Tensor)> {
        let [o, c, k, _] = shape;
        let (bytes, scales) = bytes((o, c * k * k), 2);
        let mut numbers = Vec::new();
        let matrix = Bytes::new(bytes.clone().into(), &scales, (o, c * k * k))?;
        (0..o).try_for_each(|row| matrix.read(row, &mut numbers))?;
        Ok((ByteFilters::new(&bytes, &scales, shape)?, Tensor::from_vec(numbers, &shape, &Device::Cpu)?))
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn filters_of_bytes_are_those_that_they_stand_for() -> Result<()> {
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
            let reading = Reading { stride, padding, repeat };
            let repeated = x.upsample_nearest2d(image.2 * repeat, image.3 * repeat)?;
            let want = conv2d(&repeated, &w, Some(&bias), stride, padding)?;
            let got = filters.convolve(&x, &bias, None, reading)?;
            let largest = want.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(
                far(&got, &want) < 1e-4 * largest,
                "{image:?} {shape:?} {reading:?}: {} of {largest}",
                far(&got, &want)
            );
            let base = random(got.dims(), 4);
            let onto = filters.convolve(&x, &bias, Some(&base), reading)?;
            assert!(far(&onto, &(got + base.as_tensor())?) < 1e-6 * largest);
        }
        Ok(())
    }

    #[test]
    fn images_do_not_depend_on_each_other_and_stay_not_finite() -> Result<()> {
        let shape = [20, 6, 3, 3];
        let ((filters, _), bias) = (filters(shape)?, random(20, 3));
        let reading = Reading { stride: 1, padding: [1; 4], repeat: 1 };
        let (x, bad) = (random((1, 6, 5, 4), 1), Tensor::full(f32::NAN, (1, 6, 5, 4), &Device::Cpu)?);
        let alone = filters.convolve(&x, &bias, None, reading)?;
        let both = filters.convolve(&Tensor::cat(&[&bad, x.as_tensor()], 0)?, &bias, None, reading)?;
        assert_eq!(far(&both.narrow(0, 1, 1)?, &alone), 0.0);
        let first: Vec<f32> = both.narrow(0, 0, 1)?.flatten_all()?.to_vec1()?;
        assert!(first.iter().all(|y| y.is_nan()));
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let (shape, reading) = ([4, 2, 3, 3], Reading { stride: 1, padding: [0; 4], repeat: 1 });
        let ((filters, _), x, bias) = (filters(shape)?, random((1, 2, 4, 4), 1), random(4, 3));
        assert!(filters.convolve(&x, &bias, None, reading).is_ok());
        assert!(filters.convolve(&x, &bias, Some(&x), reading).is_err());
        assert!(filters.convolve(&x, &bias, None, Reading { stride: 0, ..reading }).is_err());
        assert!(filters.convolve(&x, &random(5, 3), None, reading).is_err());
        assert!(filters.convolve(&random((1, 3, 4, 4), 1), &bias, None, reading).is_err());
        assert!(filters.convolve(&random((1, 2, 2, 4), 1), &bias, None, reading).is_err());
        assert!(ByteFilters::new(&[0; 71], &[1.0; 4], shape).is_err());
        assert!(!ByteFilters::suits([1, usize::MAX, 3, 3]) && !ByteFilters::suits([1, 1024, 3, 3]));
        Ok(())
    }
}
