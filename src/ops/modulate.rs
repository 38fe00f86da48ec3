//! What adaptive layer norms (AdaLN) do to a residual stream: a norm whose scale and shift belong
//! to the row, and a sum with a gate that does.

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::operand::{Operand, are_f32};
use super::cpu::reduce::{self, moments, vectorized};
use super::custom_op::{Op, apply3};

/// Elements per task, in whole positions: fewer are not worth waking another thread.
const CHUNK: usize = 1 << 15;

/// `(x - mean) / sqrt(variance + eps) * (1 + scale) + shift` over the last dimension of x
/// (R, T, C), with a scale and a shift (R, C) for each row: x's shape, in f32.
///
/// Errors when the shapes do not fit.
pub fn modulated_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    check("modulated_norm", x, scale)?;
    check("modulated_norm", x, shift)?;
    match are_f32(&[x, scale, shift]) {
        true => apply3(ModulatedNorm { eps: eps as f32 }, x, scale, shift),
        false => plain_norm(x, scale, shift, eps),
    }
}

/// `x + gate * y` for x and y (R, T, C) and a gate (R, C) for each row: x's shape, in f32.
///
/// Errors when the shapes do not fit.
pub fn add_gated(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    check("add_gated", x, gate)?;
    if x.dims() != y.dims() {
        bail!("add_gated: {:?} and {:?} differ", x.dims(), y.dims());
    }
    match are_f32(&[x, y, gate]) {
        true => apply3(AddGated, x, y, gate),
        false => plain_add(x, y, gate),
    }
}

fn check(name: &str, x: &Tensor, of_row: &Tensor) -> Result<()> {
    let (r, _, c) = x.dims3()?;
    if of_row.dims() != [r, c] {
        bail!("{name}: {:?} does not fit {:?}", of_row.dims(), x.dims());
    }
    Ok(())
}

fn plain_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    let of_row = |t: &Tensor| t.to_dtype(DType::F32)?.unsqueeze(1);
    let x = x.to_dtype(DType::F32)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&deviation)?.broadcast_mul(&(of_row(scale)? + 1.0)?)?.broadcast_add(&of_row(shift)?)
}

fn plain_add(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let gated = y.to_dtype(DType::F32)?.broadcast_mul(&gate.to_dtype(DType::F32)?.unsqueeze(1)?)?;
    x.to_dtype(DType::F32)? + gated
}

/// Of x, scale and shift.
pub(super) struct ModulatedNorm {
    eps: f32,
}

/// Of x, y and the gate.
pub(super) struct AddGated;

/// Calls `f` with the row of every position of (R, T, C), the position and its output, on all
/// threads.
fn positions(out: &mut [f32], (tokens, c): (usize, usize), f: impl Fn(usize, usize, &mut [f32]) + Sync) {
    let at_once = (CHUNK / c).max(1);
    out.par_chunks_mut(at_once * c).enumerate().for_each(|(chunk, out)| {
        vectorized(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(c).enumerate() {
                    let position = chunk * at_once + i;
                    f(position / tokens, position, out);
                }
            },
        );
    });
}

/// As [`positions`], with each row on one thread: `f` also gets `width` sums of the row,
/// (R, width).
fn rows(
    out: &mut [f32],
    (tokens, c): (usize, usize),
    width: usize,
    f: impl Fn(usize, usize, &mut [f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut sums = vec![0f32; out.len() / (tokens * c) * width];
    out.par_chunks_mut(tokens * c).zip(sums.par_chunks_mut(width)).enumerate().for_each(|(row, (out, sums))| {
        vectorized(
            #[inline(always)]
            || {
                for (t, out) in out.chunks_exact_mut(c).enumerate() {
                    f(row, row * tokens + t, out, sums);
                }
            },
        );
    });
    sums
}

impl Op<3> for ModulatedNorm {
    const NAME: &'static str = "modulated-norm";

    fn forward(&self, [x, scale, shift]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (_, tokens, c) = x.shape().dims3()?;
        let (values, a, b) = (x.slice::<f32>()?, scale.slice::<f32>()?, shift.slice::<f32>()?);
        let mut y = vec![0f32; values.len()];
        positions(&mut y, (tokens, c), |row, position, y| {
            let x = &values[position * c..][..c];
            let (mean, r) = moments(x, self.eps);
            let (scale, shift) = (&a[row * c..][..c], &b[row * c..][..c]);
            for (((y, x), scale), shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                *y = (x - mean) * r * (1.0 + scale) + shift;
            }
        });
        Ok((y, x.shape().clone()))
    }

    fn backward(&self, [x, scale, _]: [Operand; 3], _: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let (_, tokens, c) = x.shape().dims3()?;
        let (values, a) = (x.slice::<f32>()?, scale.slice::<f32>()?);
        let mut dx = vec![0f32; values.len()];
        let sums = rows(&mut dx, (tokens, c), 2 * c, |row, position, dx, sums| {
            let (x, dy, scale) = (&values[position * c..][..c], &dy[position * c..][..c], &a[row * c..][..c]);
            let (mean, r) = moments(x, self.eps);
            let (dscale, dshift) = sums.split_at_mut(c);
            for (((((dx, x), dy), scale), ds), db) in dx.iter_mut().zip(x).zip(dy).zip(scale).zip(dscale).zip(dshift) {
                *dx = dy * (1.0 + scale);
                *ds += dy * (x - mean) * r;
                *db += dy;
            }
            let shift = reduce::sum(dx, x, |dx, _| dx) / c as f32;
            let slope = reduce::sum(dx, x, |dx, x| dx * (x - mean)) * r * r / c as f32;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = r * (*dx - shift - (x - mean) * slope));
        });
        let part = |first: usize| sums.chunks_exact(2 * c).flat_map(|row| row[first..][..c].iter().copied()).collect();
        Ok([Some(dx), Some(part(0)), Some(part(c))])
    }
}

impl Op<3> for AddGated {
    const NAME: &'static str = "add-gated";

    fn forward(&self, [x, y, gate]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (_, tokens, c) = x.shape().dims3()?;
        let (values, added, gates) = (x.slice::<f32>()?, y.slice::<f32>()?, gate.slice::<f32>()?);
        let mut sum = vec![0f32; values.len()];
        positions(&mut sum, (tokens, c), |row, position, sum| {
            let (x, added) = (&values[position * c..][..c], &added[position * c..][..c]);
            for (((sum, x), added), gate) in sum.iter_mut().zip(x).zip(added).zip(&gates[row * c..][..c]) {
                *sum = x + gate * added;
            }
        });
        Ok((sum, x.shape().clone()))
    }

    fn backward(&self, [x, y, gate]: [Operand; 3], _: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let (_, tokens, c) = x.shape().dims3()?;
        let (added, gates) = (y.slice::<f32>()?, gate.slice::<f32>()?);
        let mut dadded = vec![0f32; added.len()];
        let dgate = rows(&mut dadded, (tokens, c), c, |row, position, dadded, sums| {
            let (added, dy) = (&added[position * c..][..c], &dy[position * c..][..c]);
            for ((((d, sum), added), dy), gate) in
                dadded.iter_mut().zip(sums).zip(added).zip(dy).zip(&gates[row * c..][..c])
            {
                *d = dy * gate;
                *sum += dy * added;
            }
        });
        Ok([Some(dy.to_vec()), Some(dadded), Some(dgate)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{random, same};
    use super::*;

    #[test]
    fn match_the_compositions() {
        for (rows, tokens, c) in [(1, 1, 5), (3, 7, 16), (2, 700, 96)] {
            let (x, y) = (random((rows, tokens, c), 1), random((rows, tokens, c), 2));
            let (a, b) = (random((rows, c), 3), random((rows, c), 4));
            same(&[&x, &a, &b], || modulated_norm(&x, &a, &b, 1e-6), || plain_norm(&x, &a, &b, 1e-6));
            same(&[&x, &y, &a], || add_gated(&x, &y, &a), || plain_add(&x, &y, &a));
        }
    }

    #[test]
    fn reject_rows_that_do_not_fit() {
        let (x, one) = (random((2, 3, 8), 1), random((1, 8), 2));
        assert!(modulated_norm(&x, &one, &one, 1e-6).is_err() && add_gated(&x, &x, &one).is_err());
        assert!(add_gated(&x, &random((2, 4, 8), 1), &random((2, 8), 2)).is_err());
    }
}
