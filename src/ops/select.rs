//! Rows of a table.

#[cfg(feature = "cuda")]
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Shape, bail};
use candle_core::{Result, Tensor};

/// The rows `ids` (N) u32 of x (rows, width): (N, width), of x's dtype.
pub fn select(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::cuda::training::trains(&[x]) && x.track_op() {
        return x.contiguous()?.apply_op2(ids, Select);
    }
    x.index_select(ids, 0)
}

/// On a GPU candle adds up the gradients of one row after the other.
#[cfg(feature = "cuda")]
struct Select;

#[cfg(feature = "cuda")]
impl CustomOp2 for Select {
    fn name(&self) -> &'static str {
        "select"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} is for a GPU", self.name())
    }

    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        super::cuda::training::select((s1, l1), (s2, l2))
    }

    fn bwd(&self, x: &Tensor, ids: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(super::cuda::training::select_back(x, ids, dy)?), None))
    }
}
