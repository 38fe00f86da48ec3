//! Convolution of every channel by itself, channels last.

use candle_core::{DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::operand::{Operand, are_f32};
use super::cpu::reduce::{self, vectorized};
use super::custom_op::{Op, apply2};

/// Convolves each channel of x (B, H, W, C) with its own square kernel w (K * K, C), K odd, at
/// stride 1 with zero padding: x's shape and dtype.
///
/// Errors: kernels that do not fit.
pub fn depthwise_conv2d(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (_, _, _, c) = x.dims4()?;
    let (taps, channels) = w.dims2()?;
    let kernel = taps.isqrt();
    if channels != c || kernel * kernel != taps || kernel % 2 == 0 {
        bail!("depthwise_conv2d: kernels {:?} do not fit {:?}", w.dims(), x.dims());
    }
    if are_f32(&[x, w]) { apply2(DepthwiseConv { kernel }, x, w) } else { composed(x, w, kernel) }
}

/// A product and a sum for every tap.
fn composed(x: &Tensor, w: &Tensor, kernel: usize) -> Result<Tensor> {
    let (_, h, width, _) = x.dims4()?;
    let pad = kernel / 2;
    let padded = x.pad_with_zeros(1, pad, pad)?.pad_with_zeros(2, pad, pad)?;
    let mut sum = Tensor::zeros(x.shape(), DType::F32, x.device())?.to_dtype(x.dtype())?;
    for tap in 0..kernel * kernel {
        let seen = padded.narrow(1, tap / kernel, h)?.narrow(2, tap % kernel, width)?;
        sum = (sum + seen.broadcast_mul(&w.get(tap)?)?)?;
    }
    Ok(sum)
}

/// Of x and the kernels.
pub(super) struct DepthwiseConv {
    kernel: usize,
}

impl DepthwiseConv {
    /// Calls `f` with every tap that row `y` of `h` sees: the tap, the row that it reads, and the
    /// first column of the output, the first of the input and their number.
    #[inline(always)]
    fn taps(&self, y: usize, (h, w): (usize, usize), mut f: impl FnMut(usize, usize, (usize, usize, usize))) {
        let pad = self.kernel / 2;
        for ky in 0..self.kernel {
            let Some(row) = (y + ky).checked_sub(pad).filter(|&row| row < h) else { continue };
            for kx in 0..self.kernel {
                let (to, from) = (pad.saturating_sub(kx), kx.saturating_sub(pad));
                if let Some(columns) = w.checked_sub(to.max(from)).filter(|&columns| columns > 0) {
                    f(ky * self.kernel + kx, row, (to, from, columns));
                }
            }
        }
    }

    /// The convolution with kernels (K * K, C), or with the same turned by 180 degrees.
    fn convolve(&self, x: &[f32], kernels: &[f32], (h, w, c): (usize, usize, usize), turned: bool) -> Vec<f32> {
        let mut out = vec![0f32; x.len()];
        let last = self.kernel * self.kernel - 1;
        out.par_chunks_mut(w * c).enumerate().for_each(|(line, out)| {
            let (image, y) = (&x[line / h * h * w * c..][..h * w * c], line % h);
            vectorized(
                #[inline(always)]
                || {
                    self.taps(y, (h, w), |tap, row, (to, from, columns)| {
                        let kernel = &kernels[if turned { last - tap } else { tap } * c..][..c];
                        let seen = &image[(row * w + from) * c..][..columns * c];
                        let out = &mut out[to * c..][..columns * c];
                        for (out, seen) in out.chunks_exact_mut(c).zip(seen.chunks_exact(c)) {
                            for ((out, x), k) in out.iter_mut().zip(seen).zip(kernel) {
                                *out += x * k;
                            }
                        }
                    });
                },
            );
        });
        out
    }

    /// The gradient of the kernels.
    fn kernel_gradient(&self, x: &[f32], dy: &[f32], (h, w, c): (usize, usize, usize)) -> Vec<f32> {
        let zeros = || vec![0f32; self.kernel * self.kernel * c];
        let line = |mut sums: Vec<f32>, (line, dy): (usize, &[f32])| {
            let (image, y) = (&x[line / h * h * w * c..][..h * w * c], line % h);
            vectorized(
                #[inline(always)]
                || {
                    self.taps(y, (h, w), |tap, row, (to, from, columns)| {
                        let sums = &mut sums[tap * c..][..c];
                        let seen = &image[(row * w + from) * c..][..columns * c];
                        let dy = &dy[to * c..][..columns * c];
                        for (dy, seen) in dy.chunks_exact(c).zip(seen.chunks_exact(c)) {
                            for ((sum, x), dy) in sums.iter_mut().zip(seen).zip(dy) {
                                *sum += x * dy;
                            }
                        }
                    });
                },
            );
            sums
        };
        reduce::sums_in_order(dy.par_chunks(w * c).enumerate(), zeros, line)
    }
}

impl Op<2> for DepthwiseConv {
    const NAME: &'static str = "depthwise-conv2d";

    fn forward(&self, [x, w]: [Operand; 2]) -> Result<(Vec<f32>, Shape)> {
        let (_, h, width, c) = x.shape().dims4()?;
        Ok((self.convolve(x.slice()?, w.slice()?, (h, width, c), false), x.shape().clone()))
    }

    fn backward(&self, [x, w]: [Operand; 2], [want_x, want_w]: [bool; 2], dy: &[f32]) -> Result<[Option<Vec<f32>>; 2]> {
        let (_, h, width, c) = x.shape().dims4()?;
        let dx = want_x.then(|| w.slice().map(|w| self.convolve(dy, w, (h, width, c), true))).transpose()?;
        let dw = want_w.then(|| x.slice().map(|x| self.kernel_gradient(x, dy, (h, width, c)))).transpose()?;
        Ok([dx, dw])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Module;
    use candle_nn::{Conv2d, Conv2dConfig};

    use super::super::testing::{agree, random, same};
    use super::*;

    #[test]
    fn matches_the_composition() {
        for (b, h, w, c, kernel) in [(2, 5, 7, 16, 3), (1, 3, 1, 5, 5), (3, 8, 4, 33, 1)] {
            let (x, k) = (random((b, h, w, c), 1), random((kernel * kernel, c), 2));
            same(&[&x, &k], || depthwise_conv2d(&x, &k), || composed(&x, &k, kernel));
        }
    }

    #[test]
    fn is_the_grouped_convolution_of_candle_nn() -> Result<()> {
        let (x, k) = (random((2, 6, 5, 8), 1), random((9, 8), 2));
        let config = Conv2dConfig { padding: 1, groups: 8, ..Default::default() };
        let conv = Conv2d::new(k.t()?.reshape((8, 1, 3, 3))?, None, config);
        let want = conv.forward(&x.permute((0, 3, 1, 2))?.contiguous()?)?.permute((0, 2, 3, 1))?;
        agree("value", &depthwise_conv2d(&x, &k)?, &want)
    }

    #[test]
    fn kernels_that_do_not_fit_are_refused() {
        let x = random((1, 4, 4, 8), 1);
        assert!([(9, 7), (8, 8), (4, 8)].iter().all(|&shape| depthwise_conv2d(&x, &random(shape, 2)).is_err()));
    }
}
