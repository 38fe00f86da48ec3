//! Cross-entropy.

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::ops::cpu::exp::exp;
use crate::ops::cpu::operand::Operand;
use crate::ops::cpu::reduce::{self, vectorized};
use crate::ops::custom_op::{Op, apply2, supports_f32};

/// `-log softmax(logits[i])[targets[i]]` of every row of logits (N, V): (N), in f32.
///
/// Errors: shapes that do not fit, or a target that is not below V.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (n, v) = logits.dims2()?;
    if targets.len() != n {
        bail!("cross_entropy: {} targets for {n} rows of logits", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= v) {
        bail!("cross_entropy: target {target} is not below the {v} classes");
    }
    let targets = Tensor::new(targets, logits.device())?;
    if supports_f32(&[logits]) { apply2(CrossEntropy, logits, &targets) } else { composed(logits, &targets) }
}

fn composed(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_softmax = candle_nn::ops::log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?;
    log_softmax.gather(&targets.unsqueeze(1)?, D::Minus1)?.neg()?.squeeze(1)
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let (max, sum) = vectorized(
        #[inline(always)]
        || {
            let max = reduce::max(row);
            (max, reduce::sum(row, row, |x, _| exp(x - max)))
        },
    );
    max + sum.ln()
}

/// Of logits (N, V) and targets (N) below V, u32.
pub(crate) struct CrossEntropy;

impl Op<2> for CrossEntropy {
    const NAME: &'static str = "cross-entropy";

    fn forward(&self, [logits, targets]: [Operand; 2]) -> Result<(Vec<f32>, Shape)> {
        let rows = logits.slice::<f32>()?.par_chunks(logits.dims()[1]).zip(targets.slice::<u32>()?);
        let losses = rows.map(|(row, &target)| log_sum_exp(row) - row[target as usize]).collect();
        Ok((losses, targets.shape().clone()))
    }

    fn backward(
        &self,
        [logits, targets]: [Operand; 2],
        _: [bool; 2],
        dlosses: &[f32],
    ) -> Result<[Option<Vec<f32>>; 2]> {
        let (classes, logits) = (logits.dims()[1], logits.slice::<f32>()?);
        let mut grad = vec![0f32; logits.len()];
        let rows = grad.par_chunks_mut(classes).zip(logits.par_chunks(classes));
        rows.zip(targets.slice::<u32>()?).zip(dlosses).for_each(|(((grad, row), &target), dloss)| {
            let total = log_sum_exp(row);
            vectorized(
                #[inline(always)]
                || grad.iter_mut().zip(row).for_each(|(g, x)| *g = exp(x - total) * dloss),
            );
            grad[target as usize] -= dloss;
        });
        Ok([Some(grad), None])
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{CudaStorage, Result, Shape, Tensor};

    use super::CrossEntropy;
    use crate::ops::cuda::f32::{Operand, cross_entropy, cross_entropy_back};
    use crate::ops::custom_op::CudaOp;

    impl CudaOp<2> for CrossEntropy {
        fn cuda_forward(&self, [logits, targets]: [Operand; 2]) -> Result<(CudaStorage, Shape)> {
            cross_entropy(logits, targets)
        }

        fn cuda_backward(&self, [logits, targets]: [&Tensor; 2], dlosses: &Tensor) -> Result<[Option<Tensor>; 2]> {
            Ok([Some(cross_entropy_back(logits, targets, dlosses)?), None])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{agree, random, same};

    #[test]
    fn matches_the_composition() -> Result<()> {
        let (x, targets) = (random((4, 19), 1), [3u32, 18, 0, 7]);
        let ids = Tensor::new(&targets, x.device())?;
        same(&[&x], || cross_entropy(&x, &targets), || composed(&x, &ids));
        agree("f64", &cross_entropy(&x.to_dtype(DType::F64)?, &targets)?, &composed(&x, &ids)?)
    }

    #[test]
    fn the_mean_is_the_loss_of_candle_nn() -> Result<()> {
        let (x, targets) = (random((4, 19), 1), [3u32, 18, 0, 7]);
        let ids = Tensor::new(&targets, x.device())?;
        same(&[&x], || cross_entropy(&x, &targets)?.mean(0), || candle_nn::loss::cross_entropy(&x, &ids));
        Ok(())
    }

    #[test]
    fn targets_out_of_range_are_refused() {
        let x = random((2, 3), 1);
        for targets in [vec![0, 3], vec![0, u32::MAX], vec![0], vec![0, 1, 2]] {
            assert!(cross_entropy(&x, &targets).is_err());
        }
    }
}
