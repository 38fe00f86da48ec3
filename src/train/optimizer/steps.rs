//! The steps of AdamW and Muon: in place on slices, for parameters on the CPU, and of tensors on
//! any device.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::ops::cpu::gemm::{Matrix, MatrixMut, Update, gemm};
use crate::ops::cpu::reduce;

/// Elements per task.
const CHUNK: usize = 1 << 16;

/// One step of AdamW, in place: parameters, gradients and both moments are of one length. `step`
/// counts from 1, `grad_scale` multiplies the gradients first (clipping), and `decay` is decoupled
/// from them.
#[expect(clippy::too_many_arguments, reason = "the optimizer's own hyperparameters, by their usual names")]
pub(super) fn adamw_step(
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    decay: f32,
    step: usize,
    grad_scale: f32,
) {
    debug_assert!([grads.len(), m.len(), v.len()] == [params.len(); 3], "lengths of an AdamW step");
    let (bias1, bias2) = (1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32));
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    params.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).zip(moments).for_each(|((p, g), (m, v))| {
        for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v)) {
            let g = g * grad_scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *p -= lr * ((*m / bias1) / ((*v / bias2).sqrt() + eps) + decay * *p);
        }
    });
}

/// As [`adamw_step`] of tensors of one shape on any device, whose gradients are clipped already:
/// the new parameters and moments.
#[expect(clippy::too_many_arguments, reason = "as above")]
pub(super) fn adamw_stepped(
    params: &Tensor,
    grads: &Tensor,
    (m, v): (&Tensor, &Tensor),
    lr: f32,
    [beta1, beta2]: [f32; 2],
    eps: f32,
    decay: f32,
    step: usize,
) -> Result<(Tensor, Tensor, Tensor)> {
    let mixed = |old: &Tensor, new: &Tensor, beta: f32| (old * f64::from(beta))? + (new * f64::from(1.0 - beta))?;
    let (m, v) = (mixed(m, grads, beta1)?, mixed(v, &grads.sqr()?, beta2)?);
    let bias = |beta: f32| 1.0 / f64::from(1.0 - beta.powi(step as i32));
    let deviation = ((&v * bias(beta2))?.sqrt()? + f64::from(eps))?;
    let update = ((&m * (bias(beta1) * f64::from(lr)))? / deviation)?;
    Ok((((params * f64::from(1.0 - lr * decay))? - update)?, m, v))
}

/// Decay of Muon's momentum.
const MOMENTUM: f32 = 0.95;
/// Newton-Schulz iterations, and the coefficients of their quintic (Jordan et al., 2024): singular
/// values end between 0.7 and 1.2, which is near enough to 1 for a direction.
const ITERATIONS: usize = 5;
const QUINTIC: [f32; 3] = [3.4445, -4.775, 2.0315];
/// Root mean square of an update at a learning rate of 1: that of a usual AdamW step
/// (Liu et al., 2025), so that both share one rate.
const UPDATE_RMS: f32 = 0.2;

/// One step of Muon, in place on a matrix (rows, cols): the Nesterov momentum of the gradients,
/// with all its singular values brought near 1. `grad_scale` and `decay` are as in [`adamw_step`].
pub(super) fn muon_step(
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    rows: usize,
    lr: f32,
    decay: f32,
    grad_scale: f32,
) {
    debug_assert!([grads.len(), m.len()] == [params.len(); 2], "lengths of a Muon step");
    let cols = params.len() / rows;
    let lookahead = m.iter_mut().zip(grads).map(|(m, g)| {
        let g = g * grad_scale;
        *m = MOMENTUM * *m + (1.0 - MOMENTUM) * g;
        MOMENTUM * *m + (1.0 - MOMENTUM) * g
    });
    let direction = orthogonal(lookahead.collect(), rows, cols);
    let step = lr * update_scale(rows, cols);
    params.iter_mut().zip(&direction).for_each(|(p, d)| *p -= step * d + lr * decay * *p);
}

/// As [`muon_step`] of several matrices (N, rows, cols) on any device, whose gradients are clipped
/// already: the new parameters and momentum.
pub(super) fn muon_stepped(
    params: &Tensor,
    grads: &Tensor,
    m: &Tensor,
    lr: f32,
    decay: f32,
) -> Result<(Tensor, Tensor)> {
    let (_, rows, cols) = params.dims3()?;
    let new = (grads * f64::from(1.0 - MOMENTUM))?;
    let m = ((m * f64::from(MOMENTUM))? + &new)?;
    let direction = orthogonal_each(&((&m * f64::from(MOMENTUM))? + new)?)?;
    let update = (direction * f64::from(lr * update_scale(rows, cols)))?;
    Ok((((params * f64::from(1.0 - lr * decay))? - update)?, m))
}

/// Makes an orthogonal matrix an update of usual size.
fn update_scale(rows: usize, cols: usize) -> f32 {
    UPDATE_RMS * (rows.max(cols) as f32).sqrt()
}

/// As [`orthogonal`] of each of the matrices (N, rows, cols).
fn orthogonal_each(x: &Tensor) -> Result<Tensor> {
    let (_, rows, cols) = x.dims3()?;
    let norm = (x.sqr()?.sum_keepdim((1, 2))?.sqrt()? + 1e-12)?;
    let mut x = x.broadcast_div(&norm)?;
    let [a, b, c] = QUINTIC.map(f64::from);
    for _ in 0..ITERATIONS {
        let across = x.t()?;
        let gram = if rows <= cols { x.matmul(&across)? } else { across.matmul(&x)? };
        let poly = ((&gram * b)? + (gram.matmul(&gram)? * c)?)?;
        let product = if rows <= cols { poly.matmul(&x)? } else { x.matmul(&poly)? };
        x = ((x * a)? + product)?;
    }
    Ok(x)
}

/// The (rows, cols) matrix with its singular values brought near 1, by Newton-Schulz.
fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    let norm = reduce::sum(&x, &x, |a, b| a * b).sqrt() + 1e-12;
    x.iter_mut().for_each(|x| *x /= norm);
    // The Gram matrix of the shorter side; the transpose of x is only a view.
    let n = rows.min(cols);
    let (mut gram, mut poly, mut next) = (vec![0f32; n * n], vec![0f32; n * n], vec![0f32; x.len()]);
    let [a, b, c] = QUINTIC;
    for _ in 0..ITERATIONS {
        let m = Matrix::new(&x, rows, cols);
        let (left, right) = if rows <= cols { (m, m.t()) } else { (m.t(), m) };
        gemm(MatrixMut::new(&mut gram, n, n), Update::Overwrite, left, right, 1.0, false);
        poly.iter_mut().zip(&gram).for_each(|(p, g)| *p = b / c * g);
        let g = Matrix::new(&gram, n, n);
        gemm(MatrixMut::new(&mut poly, n, n), Update::Add, g, g, 1.0, false);
        next.iter_mut().zip(&x).for_each(|(n, x)| *n = a / c * x);
        let p = Matrix::new(&poly, n, n);
        let (left, right) = if rows <= cols { (p, m) } else { (m, p) };
        gemm(MatrixMut::new(&mut next, rows, cols), Update::Add, left, right, 1.0, false);
        x.iter_mut().zip(&next).for_each(|(x, n)| *x = c * n);
    }
    x
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};

    use super::*;
    use crate::ops::testing::agree;
    use crate::rng::{Rng, Stream};

    #[test]
    fn muon_updates_have_near_equal_singular_values() {
        for (rows, cols) in [(6, 40), (40, 6), (9, 9)] {
            let rng = Rng::new(3, 0, Stream::Train, 0);
            // One direction ten times as strong as the others.
            let value = |i: usize| rng.normal(i as u64) + 10.0 * f64::from((i / cols) as u32 + 1) * 0.3;
            let grads: Vec<f32> = (0..rows * cols).map(|i| value(i) as f32).collect();
            let o = orthogonal(grads.clone(), rows, cols);
            let m = Matrix::new(&o, rows, cols);
            let n = rows.min(cols);
            let (left, right) = if rows <= cols { (m, m.t()) } else { (m.t(), m) };
            let mut gram = vec![0f32; n * n];
            gemm(MatrixMut::new(&mut gram, n, n), Update::Overwrite, left, right, 1.0, false);
            let trace: f32 = (0..n).map(|i| gram[i * n + i]).sum();
            let square: f32 = gram.iter().map(|g| g * g).sum();
            // Equal eigenvalues have square = trace^2 / n.
            assert!((0.6..1.3).contains(&(trace / n as f32)), "{rows}x{cols}: mean {}", trace / n as f32);
            assert!(square * n as f32 / (trace * trace) < 1.3, "{rows}x{cols}: spread {square} {trace}");

            let (mut p, mut momentum) = (vec![1f32; rows * cols], vec![0f32; rows * cols]);
            muon_step(&mut p, &grads, &mut momentum, rows, 0.1, 0.5, 1.0);
            let square: f32 = p.iter().map(|p| (p - 0.95) * (p - 0.95)).sum();
            let rms = (square / p.len() as f32).sqrt() / 0.1;
            assert!((0.12..0.25).contains(&rms), "{rows}x{cols}: an update of {rms}");
        }
    }

    #[test]
    fn first_step_moves_by_the_rate_and_decays() {
        let (mut p, mut m, mut v) = ([1f32, -2.0, 3.0], [0f32; 3], [0f32; 3]);
        adamw_step(&mut p, &[4.0, -0.5, 0.0], &mut m, &mut v, 0.1, 0.9, 0.99, 1e-8, 0.5, 1, 0.5);
        // Bias correction makes the first step lr * sign(g); decay takes lr * 0.5 of the parameter.
        for (p, want) in p.iter().zip([1.0 - 0.1 - 0.05, -2.0 + 0.1 + 0.1, 3.0 - 0.15]) {
            assert!((p - want).abs() < 1e-5, "{p} {want}");
        }
        assert!((m[0] - 0.2).abs() < 1e-6 && (v[0] - 0.04).abs() < 1e-6);
    }

    /// Eight steps on a parabola with its minimum at 1, one of them clipped.
    #[test]
    fn adamw_steps_are_those_of_candle_nn() -> Result<()> {
        let start: Vec<f32> = (0..24).map(|i| (i as f32 * 0.37).sin()).collect();
        let var = Var::from_vec(start.clone(), 24, &Device::Cpu)?;
        let params = ParamsAdamW { lr: 0.02, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1 };
        let mut reference = AdamW::new(vec![var.clone()], params)?;
        let (mut p, mut m, mut v) = (start.clone(), vec![0f32; 24], vec![0f32; 24]);
        let tensor = Tensor::from_vec(start, 24, &Device::Cpu)?;
        let mut stepped = (tensor.clone(), tensor.zeros_like()?, tensor.zeros_like()?);
        for step in 1..=8 {
            let scale = if step == 3 { 0.25 } else { 1.0 };
            let loss = ((var.as_tensor() - 1.0)?.sqr()?.sum_all()? * f64::from(scale))?;
            reference.step(&loss.backward()?)?;
            let grads: Vec<f32> = p.iter().map(|p| 2.0 * (p - 1.0)).collect();
            adamw_step(&mut p, &grads, &mut m, &mut v, 0.02, 0.9, 0.98, 1e-8, 0.1, step, scale);
            let grads = ((&stepped.0 - 1.0)? * f64::from(2.0 * scale))?;
            let moments = (&stepped.1, &stepped.2);
            stepped = adamw_stepped(&stepped.0, &grads, moments, 0.02, [0.9, 0.98], 1e-8, 0.1, step)?;
        }
        let want = var.as_tensor();
        agree("on slices", &Tensor::from_vec(p, 24, &Device::Cpu)?, want)?;
        agree("of tensors", &stepped.0, want)
    }

    #[test]
    fn descends_a_parabola() {
        let (mut p, mut m, mut v) = ([5f32], [0f32], [0f32]);
        for step in 1..=400 {
            let g = [2.0 * p[0]];
            adamw_step(&mut p, &g, &mut m, &mut v, 0.05, 0.9, 0.99, 1e-8, 0.0, step, 1.0);
        }
        assert!(p[0].abs() < 0.05, "{}", p[0]);
    }

    #[cfg(feature = "cuda")]
    #[test]
    #[ignore = "needs a GPU"]
    fn on_a_gpu_muon_steps() -> Result<()> {
        let gpu = crate::device::cuda(0)?;
        let far = |a: &Tensor, b: &Tensor| {
            (a.to_device(&Device::Cpu)? - b)?
                .abs()?
                .flatten_all()?
                .max(0)?
                .to_dtype(candle_core::DType::F32)?
                .to_scalar::<f32>()
        };
        for (rows, columns) in [(64, 256), (256, 24)] {
            let [p, g, m] =
                [1, 2, 3].map(|seed| crate::ops::testing::random((5, rows, columns), seed).as_detached_tensor());
            let step = |device: &Device| {
                let [p, g, m] = [&p, &g, &m].map(|t| t.to_device(device));
                muon_stepped(&p?, &g?, &m?, 0.1, 0.5)
            };
            let (got, want) = (step(&gpu)?, step(&Device::Cpu)?);
            assert!(far(&got.0, &want.0)? < 1e-3 && far(&got.1, &want.1)? < 1e-5, "muon of {rows}x{columns}");
        }
        Ok(())
    }
}
