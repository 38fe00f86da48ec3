//! Cross-entropy.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::exp::exp;
use super::slice::{self, Borrowed};

/// `-log softmax(logits[i])[targets[i]]` of every row, (N) in f32, for logits (N, V).
///
/// Errors when the shapes do not fit or a target is not below V.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (n, v) = logits.dims2()?;
    if targets.len() != n {
        bail!("cross_entropy: {} targets for {n} rows of logits", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= v) {
        bail!("cross_entropy: target {target} is not below the {v} classes");
    }
    let targets = Tensor::new(targets, logits.device())?;
    match slice::trained(&[logits]) {
        true => logits.contiguous()?.apply_op2(&targets, CrossEntropy),
        false => plain(logits, &targets),
    }
}

fn plain(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F32)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let total = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()?.add(&max)?;
    (total - logits.gather(&targets.unsqueeze(1)?, D::Minus1)?)?.squeeze(1)
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = slice::max(row);
    max + slice::sum(row, row, |x, _| exp(x - max)).ln()
}

/// Of logits (N, V) and targets (N), known to be below V.
struct CrossEntropy;

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (logits, targets) = (slice::contiguous::<f32>(s1, l1)?, slice::contiguous::<u32>(s2, l2)?);
        let rows = logits.par_chunks(l1.dims()[1]).zip(targets);
        let losses = rows.map(|(row, &target)| log_sum_exp(row) - row[target as usize]).collect();
        Ok((CpuStorage::F32(losses), l2.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        super::cuda::training::cross_entropy((s1, l1), (s2, l2))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _losses: &Tensor,
        dlosses: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if logits.device().is_cuda() {
            return Ok((Some(super::cuda::training::cross_entropy_back(logits, targets, dlosses)?), None));
        }
        let (classes, dlosses) = (logits.dim(1)?, dlosses.contiguous()?);
        let (logits_in, targets, dlosses) = (Borrowed::of(logits), Borrowed::of(targets), Borrowed::of(&dlosses));
        let values = logits_in.slice::<f32>()?;
        let mut grad = vec![0f32; values.len()];
        let rows = grad.par_chunks_mut(classes).zip(values.par_chunks(classes));
        rows.zip(targets.slice::<u32>()?).zip(dlosses.slice::<f32>()?).for_each(|(((grad, row), &target), dloss)| {
            let total = log_sum_exp(row);
            grad.iter_mut().zip(row).for_each(|(g, x)| *g = exp(x - total) * dloss);
            grad[target as usize] -= dloss;
        });
        Ok((slice::gradient(logits, grad)?, None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{agree, random, same};
    use super::*;

    #[test]
    fn matches_the_composition() -> Result<()> {
        let (x, targets) = (random((4, 19), 1), [3u32, 18, 0, 7]);
        let ids = Tensor::new(&targets, x.device())?;
        same(&[&x], || cross_entropy(&x, &targets), || plain(&x, &ids));
        agree("f64", &cross_entropy(&x.to_dtype(DType::F64)?, &targets)?, &plain(&x, &ids)?)
    }

    #[test]
    fn rejects_targets_out_of_range() {
        let x = random((2, 3), 1);
        for targets in [vec![0, 3], vec![0, u32::MAX], vec![0], vec![0, 1, 2]] {
            assert!(cross_entropy(&x, &targets).is_err());
        }
    }
}
