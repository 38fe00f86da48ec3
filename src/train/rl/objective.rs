//! The objective of GRPO: advantages within a group, the clipped surrogate and the distance from
//! the reference model.

use candle_core::{DType, Result, Tensor};

use crate::backbone::Backbone;
use crate::train::sequence::{Batch, Kind, Sequence};

/// Standard deviation of a group's rewards below which they count as equal.
const EQUAL: f64 = 1e-6;

/// How far each draw of a group is above the group's mean, in its standard deviations; zeros where
/// all draws are worth the same, so that there is nothing to learn from their differences.
pub fn advantages(rewards: &[f64]) -> Vec<f64> {
    let count = rewards.len().max(1) as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let deviation = (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / count).sqrt();
    rewards.iter().map(|r| if deviation < EQUAL { 0.0 } else { (r - mean) / deviation }).collect()
}

/// Log-probabilities of the targets of sequences: of each, those of its codes and of its words.
pub struct LogProbs(Vec<[Vec<f32>; 2]>);

impl LogProbs {
    /// By a model; `count` is the number of scales of a whole image.
    pub fn of(backbone: &Backbone, sequences: &[Sequence], count: usize) -> Result<Self> {
        let mut all = vec![[Vec::new(), Vec::new()]; sequences.len()];
        Batch(sequences).cross_entropies(backbone, count, |kind, rows, losses| {
            let losses = losses.to_vec1::<f32>()?;
            let mut rest = losses.iter();
            for &row in rows {
                let count = sequences[row].targets(kind).len();
                all[row][kind as usize] = rest.by_ref().take(count).map(|loss| -loss).collect();
            }
            Ok(())
        })?;
        Ok(Self(all))
    }

    /// Those of the targets of a kind of some sequences, (N).
    fn tensor(&self, kind: Kind, rows: &[usize], like: &Tensor) -> Result<Tensor> {
        let values: Vec<f32> = rows.iter().flat_map(|&row| &self.0[row][kind as usize]).copied().collect();
        Tensor::new(values, like.device())
    }
}

/// The objective's constants.
#[derive(Clone, Copy, Debug)]
pub struct Objective {
    /// Epsilon: a ratio of probabilities further from 1 than this brings no more.
    pub clip: f64,
    /// Beta: weight of the distance from the reference.
    pub kl: f64,
}

/// Measurements of a batch, means over its targets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Estimated divergence from the reference, in nats per token.
    pub kl: f64,
    /// Share of the targets whose ratio was clipped.
    pub clipped: f64,
}

impl Objective {
    /// Minus the objective, averaged over the sequences, each of which has its advantage A: the sum
    /// over its targets, by their weights, of min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) - beta
    /// KL.
    ///
    /// The ratio is that of a token's probability to the one with which it was drawn, `old`;
    /// without `old` this is the first step since the draws, so that all ratios are 1. KL is
    /// estimated by r - 1 - log r, where r is the ratio of the reference's probability to the
    /// model's.
    pub fn loss(
        &self,
        backbone: &Backbone,
        (sequences, advantages): (&[Sequence], &[f64]),
        old: Option<&LogProbs>,
        reference: &LogProbs,
        count: usize,
    ) -> Result<(Tensor, Measured)> {
        let mut total = Tensor::zeros((), DType::F32, backbone.device())?;
        let (mut sums, mut targets) = (Measured::default(), 0);
        Batch(sequences).cross_entropies(backbone, count, |kind, rows, losses| {
            let each = |value: &dyn Fn(usize) -> f32| {
                let repeated = |&row: &usize| std::iter::repeat_n(value(row), sequences[row].targets(kind).len());
                Tensor::new(rows.iter().flat_map(repeated).collect::<Vec<f32>>(), losses.device())
            };
            let advantage = each(&|row| advantages[row] as f32)?;
            let weights: Vec<f32> = rows.iter().flat_map(|&row| sequences[row].weights(kind)).collect();
            let log_prob = losses.neg()?;
            let old = old.map_or_else(|| Ok(log_prob.detach()), |old| old.tensor(kind, rows, &losses))?;
            let (surrogate, clipped) = self.surrogate(&log_prob, &old, &advantage)?;
            let kl = divergence(&log_prob, &reference.tensor(kind, rows, &losses)?)?;
            let gain = (surrogate - (&kl * self.kl)?)?;
            total = (&total - (gain * Tensor::new(weights, losses.device())?)?.sum_all()?)?;
            sums.kl += f64::from(kl.sum_all()?.to_scalar::<f32>()?);
            sums.clipped += clipped;
            targets += losses.elem_count();
            Ok(())
        })?;
        let mean = |sum: f64| sum / targets.max(1) as f64;
        let measured = Measured { kl: mean(sums.kl), clipped: mean(sums.clipped) };
        Ok(((total / sequences.len().max(1) as f64)?, measured))
    }

    /// min(ratio A, clip(ratio) A) of every token, and how many were clipped.
    fn surrogate(&self, log_prob: &Tensor, old: &Tensor, advantage: &Tensor) -> Result<(Tensor, f64)> {
        let ratio = (log_prob - old)?.exp()?;
        let within = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)?;
        let (free, bound) = ((&ratio * advantage)?, (within * advantage)?);
        let clipped = bound.lt(&free)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        // candle gives equal arguments of a minimum half of the gradient each; the first is the one
        // that has one.
        Ok((bound.lt(&free)?.where_cond(&bound, &free)?, f64::from(clipped)))
    }
}

/// r - 1 - log r of every token: an estimate of the divergence from the reference that is never
/// negative.
fn divergence(log_prob: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let log_ratio = (reference - log_prob)?;
    (log_ratio.exp()? - &log_ratio)? - 1.0
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn advantages_are_normalised_within_the_group() {
        assert_eq!(advantages(&[1.0, 1.0, 1.0]), [0.0; 3]);
        let group = advantages(&[0.0, 0.0, 0.0, 1.0]);
        let (mean, square) = (group.iter().sum::<f64>(), group.iter().map(|a| a * a).sum::<f64>());
        assert!(mean.abs() < 1e-9 && (square - 4.0).abs() < 1e-9 && group[3] > 0.0 && group[0] < 0.0, "{group:?}");
        assert!(advantages(&[]).is_empty());
    }

    /// Values and gradients by the definition, one number at a time.
    #[test]
    fn the_surrogate_is_clipped_where_it_would_gain_and_only_there() -> Result<()> {
        let objective = Objective { clip: 0.2, kl: 0.1 };
        let old = [-1.0f32, -1.0, -1.0, -1.0, -2.0, -0.5];
        let new = [-1.0f32, -0.5, -0.5, -1.6, -2.1, -0.9];
        let advantage = [1.0f32, 1.0, -1.0, -1.0, 1.0, 2.0];
        let reference = [-1.0f32, -0.7, -0.2, -1.5, -2.3, -0.8];
        let device = &Device::Cpu;
        let var = Var::from_tensor(&Tensor::new(&new, device)?)?;
        let (old_t, advantage_t) = (Tensor::new(&old, device)?, Tensor::new(&advantage, device)?);
        let (surrogate, clipped) = objective.surrogate(&var, &old_t, &advantage_t)?;
        let kl = divergence(&var, &Tensor::new(&reference, device)?)?;
        let gain = (&surrogate - (&kl * objective.kl)?)?;
        let grads = gain.sum_all()?.backward()?;
        let (gain, grads) = (gain.to_vec1::<f32>()?, grads.get(&var).unwrap().to_vec1::<f32>()?);
        let value = |i: usize, log_prob: f64| {
            let (a, ratio) = (f64::from(advantage[i]), (log_prob - f64::from(old[i])).exp());
            let log_ratio = f64::from(reference[i]) - log_prob;
            (ratio * a).min(ratio.clamp(0.8, 1.2) * a) - 0.1 * (log_ratio.exp() - 1.0 - log_ratio)
        };
        for i in 0..6 {
            let (at, step) = (f64::from(new[i]), 1e-5);
            let slope = (value(i, at + step) - value(i, at - step)) / (2.0 * step);
            assert!((f64::from(gain[i]) - value(i, at)).abs() < 1e-5, "{i}: {} {}", gain[i], value(i, at));
            assert!((f64::from(grads[i]) - slope).abs() < 1e-3, "{i}: {} {slope}", grads[i]);
        }
        // The second gains by being more likely, the fourth by being less likely; the third loses.
        assert_eq!(clipped, 2.0);
        Ok(())
    }
}
