//! Normalisation over the last dimension.

use candle_core::{Result, Shape, Tensor, bail};
use candle_nn::ops::{layer_norm_slow, rms_norm_slow};
use rayon::prelude::*;

use super::cpu::operand::Operand;
use super::cpu::reduce::{self, moments, vectorized};
use super::custom_op::{Op, apply2, apply3, supports, supports_f32};

/// Elements per task, in whole rows: fewer are not worth waking another thread.
const CHUNK: usize = 1 << 15;

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension of x (..., D), with w (D): x's shape and
/// dtype.
///
/// Errors: a `w` of another shape.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    check("rms_norm", x, w)?;
    if supports(&[x, w]) { apply2(RmsNorm { eps }, x, w) } else { rms_norm_slow(x, w, eps) }
}

/// `(x - mean) / sqrt(variance + eps) * w + b` over the last dimension of x (..., D), with w and
/// b (D): x's shape and dtype.
///
/// Errors: a `w` or `b` of another shape.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    check("layer_norm", x, w)?;
    check("layer_norm", x, b)?;
    let eps = eps as f32;
    if supports_f32(&[x, w, b]) { apply3(LayerNorm { eps }, x, w, b) } else { layer_norm_slow(x, w, b, eps) }
}

fn check(name: &str, x: &Tensor, w: &Tensor) -> Result<()> {
    if w.rank() != 1 || x.dims().last() != w.dims().last() {
        bail!("{name}: {:?} does not fit weights {:?}", x.dims(), w.dims());
    }
    Ok(())
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (reduce::sum(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

/// About [`CHUNK`] elements in rows of `d`.
fn whole_rows(d: usize) -> usize {
    d * (CHUNK / d).max(1)
}

/// Calls `row` with every row of an output like `x` and the same row of `x`, on all threads.
fn map_rows(x: &[f32], d: usize, row: impl Fn(&mut [f32], &[f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(whole_rows(d)).zip(x.par_chunks(whole_rows(d))).for_each(|(out, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    row(out, x);
                }
            },
        );
    });
    out
}

/// The backward pass of rows: `row` gets dx, x, dy and `width` partial sums of its thread, for the
/// gradients of weights. Returns dx and the sums.
fn map_rows_back(
    x: &[f32],
    dy: &[f32],
    d: usize,
    width: usize,
    row: impl Fn(&mut [f32], &[f32], &[f32], &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let mut dx = vec![0f32; x.len()];
    let zeros = || vec![0f32; width];
    let blocks = dx.par_chunks_mut(whole_rows(d)).zip(x.par_chunks(whole_rows(d))).zip(dy.par_chunks(whole_rows(d)));
    let block = |mut sums: Vec<f32>, ((dx, x), dy): ((&mut [f32], &[f32]), &[f32])| {
        vectorized(
            #[inline(always)]
            || {
                for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)) {
                    row(dx, x, dy, &mut sums);
                }
            },
        );
        sums
    };
    let sums = reduce::sums_in_order(blocks, zeros, block);
    (dx, sums)
}

pub(super) struct RmsNorm {
    pub(super) eps: f32,
}

impl Op<2> for RmsNorm {
    const NAME: &'static str = "rms-norm";

    fn forward(&self, [x, w]: [Operand; 2]) -> Result<(Vec<f32>, Shape)> {
        Ok((self.rows(x.slice()?, w.slice()?), x.shape().clone()))
    }

    fn backward(&self, [x, w]: [Operand; 2], _wanted: [bool; 2], dy: &[f32]) -> Result<[Option<Vec<f32>>; 2]> {
        let (dx, dw) = self.rows_back(x.slice()?, w.slice()?, dy);
        Ok([Some(dx), Some(dw)])
    }
}

impl RmsNorm {
    /// Of the rows x (N, D), with weights (D).
    pub(super) fn rows(&self, x: &[f32], weights: &[f32]) -> Vec<f32> {
        map_rows(x, weights.len(), |y, x| {
            let r = inverse_rms(x, self.eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weights) {
                *y = x * r * w;
            }
        })
    }

    /// The gradients of the rows and of the weights.
    pub(super) fn rows_back(&self, x: &[f32], weights: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let d = weights.len();
        map_rows_back(x, dy, d, d, |dx, x, dy, dw| {
            let r = inverse_rms(x, self.eps);
            for ((((dx, x), dy), w), dw) in dx.iter_mut().zip(x).zip(dy).zip(weights).zip(dw) {
                *dx = dy * w;
                *dw += dy * x * r;
            }
            let c = reduce::sum(dx, x, |a, b| a * b) * r * r * r / d as f32;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = *dx * r - x * c);
        })
    }
}

pub(super) struct LayerNorm {
    pub(super) eps: f32,
}

impl Op<3> for LayerNorm {
    const NAME: &'static str = "layer-norm";

    fn forward(&self, [x, w, b]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (weights, bias) = (w.slice::<f32>()?, b.slice::<f32>()?);
        let y = map_rows(x.slice()?, weights.len(), |y, x| {
            let (mean, r) = moments(x, self.eps);
            y.iter_mut().zip(x).zip(weights).zip(bias).for_each(|(((y, x), w), b)| *y = (x - mean) * r * w + b);
        });
        Ok((y, x.shape().clone()))
    }

    fn backward(&self, [x, w, _]: [Operand; 3], _wanted: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let weights = w.slice::<f32>()?;
        let d = weights.len();
        let (dx, mut dw) = map_rows_back(x.slice()?, dy, d, 2 * d, |dx, x, dy, sums| {
            let (mean, r) = moments(x, self.eps);
            let (dw, db) = sums.split_at_mut(d);
            for (((((dx, x), dy), w), dw), db) in dx.iter_mut().zip(x).zip(dy).zip(weights).zip(dw).zip(db) {
                *dx = dy * w;
                *dw += dy * (x - mean) * r;
                *db += dy;
            }
            let shift = reduce::sum(dx, x, |dx, _| dx) / d as f32;
            let slope = reduce::sum(dx, x, |dx, x| dx * (x - mean)) * r * r / d as f32;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = r * (*dx - shift - (x - mean) * slope));
        });
        let db = dw.split_off(d);
        Ok([Some(dx), Some(dw), Some(db)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{random, same};
    use super::*;

    #[test]
    fn norms_are_those_of_candle_nn() {
        for d in [5, 16, 43] {
            let (x, w, b) = (random((2, 70, d), 1), random(d, 2), random(d, 3));
            same(&[&x, &w], || rms_norm(&x, &w, 1e-6), || rms_norm_slow(&x, &w, 1e-6));
            same(&[&x, &w, &b], || layer_norm(&x, &w, &b, 1e-6), || layer_norm_slow(&x, &w, &b, 1e-6));
            let turned = || x.transpose(0, 1);
            same(&[&x, &w], || rms_norm(&turned()?, &w, 1e-6), || rms_norm_slow(&turned()?, &w, 1e-6));
        }
    }

    #[test]
    fn weights_of_another_shape_are_refused() {
        let (x, w, b) = (random((2, 6), 1), random(6, 2), random(2, 3));
        assert!(rms_norm(&x, &b, 1e-6).is_err());
        assert!(layer_norm(&x, &w, &b, 1e-6).is_err());
    }
}
