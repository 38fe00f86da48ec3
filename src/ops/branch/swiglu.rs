//! The feed-forward half of a block.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::{Branch, Trained, trained};
use crate::ops::cpu::exp::sigmoid;
use crate::ops::cpu::reduce::vectorized;
use crate::ops::linear::{Linear, add_assign};
use crate::ops::matrix::WeightMatrix;
use crate::ops::norm::RmsNorm;

/// Rows of gates per task.
const ROWS: usize = 32;

/// `x + (silu(n gateᵀ) * (n upᵀ)) downᵀ` with `n` the RMS norm of x (..., hidden) by weights
/// (hidden) and epsilon, gate and up (inner, hidden) and down (hidden, inner): of x's shape. None
/// unless all are trained in f32 on a CPU.
pub fn swiglu_branch(
    x: &Tensor,
    (norm, eps): (&Tensor, f32),
    [gate, up, down]: [&WeightMatrix; 3],
) -> Result<Option<Tensor>> {
    let Some((mixed, [gate, up, down])) = trained(x, [gate, up, down]) else { return Ok(None) };
    let (inner, hidden) = gate.dims2()?;
    if up.dims() != gate.dims() || down.dims() != [hidden, inner] || norm.dims() != [hidden] {
        return Ok(None);
    }
    let products = Linear::training(mixed, &[(inner, hidden), (hidden, inner)]);
    let branch = SwiGluBranch { norm: RmsNorm { eps }, products, hidden, inner };
    let weights = [gate.flatten_all()?, up.flatten_all()?, down.flatten_all()?];
    Trained::apply(branch, x, norm, &weights).map(Some)
}

struct SwiGluBranch {
    norm: RmsNorm,
    products: Linear,
    hidden: usize,
    inner: usize,
}

impl SwiGluBranch {
    /// Gate and up together, (2 inner, hidden), and down, (hidden, inner).
    fn split<'a>(&self, weights: &'a [f32]) -> (&'a [f32], &'a [f32]) {
        weights.split_at(2 * self.inner * self.hidden)
    }
}

impl Branch for SwiGluBranch {
    const NAME: &'static str = "swiglu-branch";
    /// Products with gate and up, (N, 2 inner).
    type Kept = Vec<f32>;

    fn forward(&self, x: &[f32], norm: &[f32], weights: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let (hidden, inner, (gate_up, down)) = (self.hidden, self.inner, self.split(weights));
        let gates = self.products.product(&self.norm.rows(x, norm), gate_up, None, (2 * inner, hidden))?;
        let mut gated = vec![0f32; gates.len() / 2];
        gated.par_chunks_mut(ROWS * inner).zip(gates.par_chunks(2 * ROWS * inner)).for_each(|(out, gates)| {
            vectorized(
                #[inline(always)]
                || {
                    for (out, gates) in out.chunks_exact_mut(inner).zip(gates.chunks_exact(2 * inner)) {
                        let (gate, up) = gates.split_at(inner);
                        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                            *out = gate * sigmoid(*gate) * up;
                        }
                    }
                },
            );
        });
        let mut y = x.to_vec();
        self.products.add_product(&mut y, &gated, down, (hidden, inner))?;
        Ok((y, gates))
    }

    fn backward(
        &self,
        mut gates: Vec<f32>,
        [x, norm, weights]: [&[f32]; 3],
        dy: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let (hidden, inner, (gate_up, down)) = (self.hidden, self.inner, self.split(weights));
        // The gradients of gates take the place of gates, and what they make that of its gradient.
        let mut gated = self.products.input_gradient(dy, down, (hidden, inner))?;
        gated.par_chunks_mut(ROWS * inner).zip(gates.par_chunks_mut(2 * ROWS * inner)).for_each(|(gated, gates)| {
            vectorized(
                #[inline(always)]
                || {
                    for (gated, gates) in gated.chunks_exact_mut(inner).zip(gates.chunks_exact_mut(2 * inner)) {
                        let (gate, up) = gates.split_at_mut(inner);
                        for ((gated, gate), up) in gated.iter_mut().zip(gate).zip(up) {
                            let (dy, g, u) = (*gated, *gate, *up);
                            let s = sigmoid(g);
                            *gated = g * s * u;
                            *up = dy * g * s;
                            *gate = dy * u * s * (1.0 + g * (1.0 - s));
                        }
                    }
                },
            );
        });
        let ddown = self.products.weight_gradient(dy, &gated, (hidden, inner))?;
        drop(gated);
        let mut dweights = self.products.weight_gradient(&gates, &self.norm.rows(x, norm), (2 * inner, hidden))?;
        dweights.extend(ddown);
        let dnormed = self.products.input_gradient(&gates, gate_up, (2 * inner, hidden))?;
        let (mut dx, dnorm) = self.norm.rows_back(x, norm, &dnormed);
        add_assign(&mut dx, dy);
        Ok((dx, dnorm, dweights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{random, same};
    use crate::ops::{add, rms_norm, swiglu};

    #[test]
    fn is_the_composition() {
        for (hidden, inner) in [(6, 10), (32, 96)] {
            let (x, norm) = (random((3, 45, hidden), 1), random(hidden, 2));
            let [gate, up] = [3, 4].map(|seed| random((inner, hidden), seed));
            let down = random((hidden, inner), 5);
            let fused = || {
                let matrices = [&gate, &up, &down].map(|w| WeightMatrix::Dense(w.as_tensor().clone()));
                let [gate, up, down] = &matrices;
                swiglu_branch(&x, (&norm, 1e-6), [gate, up, down]).map(|y| y.expect("trained in f32"))
            };
            let composed = || {
                let n = rms_norm(&x, &norm, 1e-6)?;
                let product = |x: &Tensor, w: &Tensor| x.broadcast_matmul(&w.t()?);
                add(&x, &product(&swiglu(&product(&n, &gate)?, &product(&n, &up)?)?, &down)?)
            };
            same(&[&x, &norm, &gate, &up, &down], fused, composed);
        }
    }

    #[test]
    fn what_is_not_trained_is_left_to_others() -> Result<()> {
        let (x, norm, w) = (random((2, 4), 1), random(4, 2), random((4, 4), 3));
        let fixed = WeightMatrix::Dense(w.as_detached_tensor());
        assert!(swiglu_branch(&x, (&norm, 1e-6), [&fixed, &fixed, &fixed])?.is_none());
        Ok(())
    }
}
