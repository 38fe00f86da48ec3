//! Cross-entropy.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::exp::exp;
use super::slice::{self, Borrowed};

/// `sum_i weights[i] * -log softmax(logits[i])[targets[i]]`, an f32 scalar, for logits (N, V), targets (N) u32 and
/// weights (N) f32. Targets and weights are constants: no gradient flows into them.
///
/// Errors when the shapes do not fit or a target is not below V, even where its weight is zero.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let indices = checked(logits, targets)?;
    if weights.dims() != targets.dims() {
        bail!("cross_entropy: {:?} weights for {:?} targets", weights.dims(), targets.dims());
    }
    match slice::fused(&[logits]) {
        true => logits.contiguous()?.apply_op1(CrossEntropy { targets: indices, weights: weights.to_vec1()? }),
        false => (plain_rows(logits, targets)? * weights.detach())?.sum_all(),
    }
}

/// `-log softmax(logits[i])[targets[i]]` of every row, for logits (N, V) and targets (N) u32; not differentiable.
///
/// Errors when the shapes do not fit or a target is not below V.
pub fn cross_entropy_rows(logits: &Tensor, targets: &Tensor) -> Result<Vec<f32>> {
    let indices = checked(logits, targets)?;
    if !slice::fused(&[logits]) {
        return plain_rows(logits, targets)?.to_vec1();
    }
    let logits = logits.contiguous()?;
    let borrowed = Borrowed::of(&logits);
    Ok(rows(borrowed.slice()?, &indices).collect())
}

/// The targets, known to be rows of one-hot vectors over the logits' V classes.
fn checked(logits: &Tensor, targets: &Tensor) -> Result<Vec<u32>> {
    let (n, v) = logits.dims2()?;
    let targets = targets.to_vec1::<u32>()?;
    if targets.len() != n {
        bail!("cross_entropy: {} targets for {n} rows of logits", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= v) {
        bail!("cross_entropy: target {target} is not below the {v} classes");
    }
    Ok(targets)
}

fn plain_rows(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F32)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let total = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()?.add(&max)?;
    (total - logits.gather(&targets.unsqueeze(1)?, D::Minus1)?)?.squeeze(1)
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = slice::max(row);
    max + slice::sum(row, row, |x, _| exp(x - max)).ln()
}

fn rows<'a>(logits: &'a [f32], targets: &'a [u32]) -> impl IndexedParallelIterator<Item = f32> + 'a {
    let classes = logits.len() / targets.len();
    logits.par_chunks(classes).zip(targets).map(|(row, &t)| log_sum_exp(row) - row[t as usize])
}

struct CrossEntropy {
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = rows(slice::contiguous(s1, l1)?, &self.targets);
        let loss: f64 = rows.zip(&self.weights).map(|(loss, w)| f64::from(loss * w)).sum();
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let classes = logits.dim(1)?;
        let dloss = dloss.to_scalar::<f32>()?;
        let borrowed = Borrowed::of(logits);
        let values = borrowed.slice::<f32>()?;
        let mut grad = vec![0f32; values.len()];
        let rows = grad.par_chunks_mut(classes).zip(values.par_chunks(classes));
        rows.zip(&self.targets).zip(&self.weights).for_each(|(((grad, row), &target), w)| {
            let (total, w) = (log_sum_exp(row), w * dloss);
            grad.iter_mut().zip(row).for_each(|(g, x)| *g = exp(x - total) * w);
            grad[target as usize] -= w;
        });
        slice::gradient(logits, grad)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{agree, random, same};
    use super::*;
    use candle_core::Device;

    #[test]
    fn matches_the_composition() -> Result<()> {
        let x = random((4, 19), 1);
        let targets = Tensor::new(&[3u32, 18, 0, 7], &Device::Cpu)?;
        let weights = Tensor::new(&[0.5f32, 0.0, 2.0, 1.0], &Device::Cpu)?;
        let plain = || (plain_rows(&x, &targets)? * &weights)?.sum_all();
        same(&[&x], || cross_entropy(&x, &targets, &weights), plain);
        let rows = Tensor::new(cross_entropy_rows(&x, &targets)?, &Device::Cpu)?;
        agree("rows", &rows, &plain_rows(&x, &targets)?)?;
        let double = x.to_dtype(DType::F64)?;
        agree("f64", &cross_entropy(&double, &targets, &weights)?, &plain()?)
    }

    #[test]
    fn rejects_targets_out_of_range() -> Result<()> {
        let (x, w) = (random((2, 3), 1), random(2, 2));
        for targets in [vec![0u32, 3], vec![0, u32::MAX], vec![0], vec![0, 1, 2]] {
            let targets = Tensor::new(targets, &Device::Cpu)?;
            assert!(cross_entropy(&x, &targets, &w).is_err());
            assert!(cross_entropy_rows(&x, &targets).is_err());
        }
        Ok(())
    }
}
