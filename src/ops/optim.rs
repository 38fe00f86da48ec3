//! The optimizer's step.

use rayon::prelude::*;

/// Elements one thread takes at a time.
const CHUNK: usize = 1 << 16;

/// One step of AdamW in place: parameters, gradients and both moments are of one length. `step` counts from 1,
/// `grad_scale` multiplies the gradients first (clipping), and `decay` is decoupled from them.
#[expect(clippy::too_many_arguments, reason = "the optimizer's own hyperparameters, by their usual names")]
pub fn adamw_step(
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn descends_a_parabola() {
        let (mut p, mut m, mut v) = ([5f32], [0f32], [0f32]);
        for step in 1..=400 {
            let g = [2.0 * p[0]];
            adamw_step(&mut p, &g, &mut m, &mut v, 0.05, 0.9, 0.99, 1e-8, 0.0, step, 1.0);
        }
        assert!(p[0].abs() < 0.05, "{}", p[0]);
    }
}
