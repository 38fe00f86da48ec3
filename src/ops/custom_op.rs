//! One trait for differentiable operations, in place of candle's `CustomOp1`, `CustomOp2` and
//! `CustomOp3`, which spell every operand as a storage and a layout.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor};

use super::cpu::operand::{Borrowed, Operand, are_f32};

/// An operation on N tensors with its own forward and backward pass, which share nothing but its
/// inputs.
pub(crate) trait Op<const N: usize>: CudaOp<N> + Send + Sync + 'static {
    /// For error messages.
    const NAME: &'static str;

    /// The result and its shape.
    fn forward(&self, inputs: [Operand; N]) -> Result<(Vec<f32>, Shape)>;

    /// The gradients of the inputs that are `wanted`, by the gradient `dy` of the result. What else
    /// it returns is ignored.
    fn backward(&self, inputs: [Operand; N], wanted: [bool; N], dy: &[f32]) -> Result<[Option<Vec<f32>>; N]>;
}

/// The same on a GPU, in `cuda_ops.rs`.
#[cfg(feature = "cuda")]
pub(crate) trait CudaOp<const N: usize> {
    /// As [`Op::forward`].
    fn cuda_forward(&self, inputs: [(&CudaStorage, &Layout); N]) -> Result<(CudaStorage, Shape)>;

    /// As [`Op::backward`].
    fn cuda_backward(&self, inputs: [&Tensor; N], dy: &Tensor) -> Result<[Option<Tensor>; N]>;
}

#[cfg(not(feature = "cuda"))]
pub(crate) trait CudaOp<const N: usize> {}

#[cfg(not(feature = "cuda"))]
impl<T, const N: usize> CudaOp<N> for T {}

/// `op` of x, which is made contiguous.
pub(crate) fn apply1(op: impl Op<1>, x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Custom(op))
}

/// `op` of two tensors, which are made contiguous.
pub(crate) fn apply2(op: impl Op<2>, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2(&b.contiguous()?, Custom(op))
}

/// `op` of three tensors, which are made contiguous.
pub(crate) fn apply3(op: impl Op<3>, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op3(&b.contiguous()?, &c.contiguous()?, Custom(op))
}

/// Whether operations can run as an [`Op`] on these tensors: f32, on the CPU or on one GPU, none
/// empty.
pub(crate) fn supports_f32(tensors: &[&Tensor]) -> bool {
    #[cfg(feature = "cuda")]
    if super::cuda::supports_f32(tensors) {
        return true;
    }
    are_f32(tensors)
}

/// As [`supports_f32`], for operations that also have a kernel for bf16 on a GPU.
pub(crate) fn supports(tensors: &[&Tensor]) -> bool {
    #[cfg(feature = "cuda")]
    if super::cuda::supports_bf16(tensors) {
        return true;
    }
    supports_f32(tensors)
}

/// An [`Op`] as candle takes it.
pub(crate) struct Custom<T>(pub(crate) T);

impl<T> Custom<T> {
    fn forward<const N: usize>(&self, inputs: [Operand; N]) -> Result<(CpuStorage, Shape)>
    where
        T: Op<N>,
    {
        let (y, shape) = self.0.forward(inputs)?;
        Ok((CpuStorage::F32(y), shape))
    }

    fn backward<const N: usize>(&self, inputs: [&Tensor; N], dy: &Tensor) -> Result<[Option<Tensor>; N]>
    where
        T: Op<N>,
    {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            return self.0.cuda_backward(inputs, dy);
        }
        let dy = dy.contiguous()?;
        let (borrowed, dy) = (inputs.map(Borrowed::of), Borrowed::of(&dy));
        let operands: Vec<Operand> = borrowed.iter().map(Borrowed::operand).collect::<Result<_>>()?;
        let operands = operands.try_into().map_err(|_| Error::Msg(format!("{}: operands", T::NAME)))?;
        let gradients = self.0.backward(operands, inputs.map(Tensor::track_op), dy.slice()?)?;
        let mut tensors = [const { None }; N];
        for ((tensor, gradient), input) in tensors.iter_mut().zip(gradients).zip(inputs) {
            if let Some(gradient) = gradient.filter(|_| input.track_op()) {
                *tensor = Some(Tensor::from_vec(gradient, input.shape(), input.device())?);
            }
        }
        Ok(tensors)
    }
}

impl<T: Op<1>> CustomOp1 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward([Operand::new(s, l)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward([(s, l)])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = self.backward([x], dy)?;
        Ok(dx)
    }
}

impl<T: Op<2>> CustomOp2 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward([Operand::new(s1, l1), Operand::new(s2, l2)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward([(s1, l1), (s2, l2)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.backward([a, b], dy)?;
        Ok((da, db))
    }
}

impl<T: Op<3>> CustomOp3 for Custom<T> {
    fn name(&self) -> &'static str {
        T::NAME
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
        self.forward([Operand::new(s1, l1), Operand::new(s2, l2), Operand::new(s3, l3)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_forward([(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.backward([a, b, c], dy)?;
        Ok((da, db, dc))
    }
}
