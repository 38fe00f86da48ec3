//! The two halves of a block for training on a CPU, each with its norm and its residual as one
//! operation. candle adds every gradient of every operation to zeros that it allocates first: of
//! the dozen operations of a half that took longer than what stands between the products.
//!
//! Unlike other operations they keep what the forward pass has computed, until the backward pass,
//! of which there can be one only.

mod attention;
mod swiglu;

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::cpu::operand::{Borrowed, Operand, are_f32};
use super::matrix::WeightMatrix;

pub use attention::attention_branch;
pub use swiglu::swiglu_branch;

/// A function of x (..., hidden), the weights of a norm (hidden), and other weights one after the
/// other: of x's shape.
trait Branch: Send + Sync + 'static {
    const NAME: &'static str;
    /// What the forward pass keeps.
    type Kept: Send + 'static;

    fn forward(&self, x: &[f32], norm: &[f32], weights: &[f32]) -> Result<(Vec<f32>, Self::Kept)>;

    /// The gradients of x, of the norm's weights and of the others.
    fn backward(&self, kept: Self::Kept, operands: [&[f32]; 3], dy: &[f32]) -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)>;
}

struct Trained<B: Branch> {
    branch: B,
    kept: Mutex<Option<B::Kept>>,
}

impl<B: Branch> Trained<B> {
    fn apply(branch: B, x: &Tensor, norm: &Tensor, weights: &[Tensor]) -> Result<Tensor> {
        let weights = Tensor::cat(weights, 0)?;
        x.contiguous()?.apply_op3(norm, &weights, Self { branch, kept: Mutex::new(None) })
    }

    fn kept(&self) -> Result<std::sync::MutexGuard<'_, Option<B::Kept>>> {
        match self.kept.lock() {
            Ok(kept) => Ok(kept),
            Err(_) => bail!("{}: a pass has panicked", B::NAME),
        }
    }
}

impl<B: Branch> CustomOp3 for Trained<B> {
    fn name(&self) -> &'static str {
        B::NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [x, norm, weights] = [Operand::new(s1, l1), Operand::new(s2, l2), Operand::new(s3, l3)];
        let (y, kept) = self.branch.forward(x.slice()?, norm.slice()?, weights.slice()?)?;
        *self.kept()? = Some(kept);
        Ok((CpuStorage::F32(y), x.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        norm: &Tensor,
        weights: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(kept) = self.kept()?.take() else { bail!("{}: a second backward pass", B::NAME) };
        let dy = dy.contiguous()?;
        let [a, b, c, d] = [x, norm, weights, &dy].map(Borrowed::of);
        let (dx, dnorm, dweights) = self.branch.backward(kept, [a.slice()?, b.slice()?, c.slice()?], d.slice()?)?;
        let tensor = |gradient: Vec<f32>, of: &Tensor| {
            of.track_op().then(|| Tensor::from_vec(gradient, of.shape(), of.device())).transpose()
        };
        Ok((tensor(dx, x)?, tensor(dnorm, norm)?, tensor(dweights, weights)?))
    }
}

/// The weights of matrices that are trained on a CPU, all in the same precision: whether that is
/// mixed, and the tensors. None for others.
fn trained<const N: usize>(x: &Tensor, matrices: [&WeightMatrix; N]) -> Option<(bool, [Tensor; N])> {
    let mixed = matches!(matrices[0], WeightMatrix::Mixed(_));
    let tensor = |matrix: &WeightMatrix| match matrix {
        WeightMatrix::Mixed(tensor) if mixed => Some(tensor.clone()),
        WeightMatrix::Dense(tensor) if !mixed => Some(tensor.clone()),
        _ => None,
    };
    let tensors: Vec<Tensor> = matrices.into_iter().map(tensor).collect::<Option<_>>()?;
    let trains = tensors.iter().any(Tensor::track_op) && tensors.iter().chain([x]).all(|tensor| are_f32(&[tensor]));
    trains.then(|| Some((mixed, tensors.try_into().ok()?))).flatten()
}
