//! The CUDA kernels of every operation: f32 with a backward pass, and bf16 where there is one.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Shape, Tensor, bail};

use super::activation::{Add, Gelu, SwiGlu};
use super::attention::Attention;
use super::conv::Conv;
use super::cuda::f32::Operand;
use super::cuda::{bf16, f32};
use super::custom_op::{CudaOp, Op};
use super::depthwise_conv::DepthwiseConv;
use super::group_norm::GroupNorm;
use super::linear::Linear;
use super::modulate::{AddGated, ModulatedNorm};
use super::norm::{LayerNorm, RmsNorm};
use super::rope::Rope;

type Forward = Result<(CudaStorage, Shape)>;
type Backward<const N: usize> = Result<[Option<Tensor>; N]>;

fn is_f32((x, _): Operand) -> bool {
    x.dtype() == DType::F32
}

impl CudaOp<1> for Gelu {
    fn cuda_forward(&self, [x]: [Operand; 1]) -> Forward {
        f32::gelu(x, *self as i32)
    }

    fn cuda_backward(&self, [x]: [&Tensor; 1], dy: &Tensor) -> Backward<1> {
        Ok([Some(f32::gelu_back(x, dy, *self as i32)?)])
    }
}

/// Operations that candle's own compose on a GPU.
macro_rules! composed {
    ($($op:ty, $n:literal;)*) => {$(
        impl CudaOp<$n> for $op {
            fn cuda_forward(&self, _: [Operand; $n]) -> Forward {
                bail!("{} has no kernel for a GPU", <Self as Op<$n>>::NAME)
            }

            fn cuda_backward(&self, _: [&Tensor; $n], _: &Tensor) -> Backward<$n> {
                bail!("{} has no kernel for a GPU", <Self as Op<$n>>::NAME)
            }
        }
    )*};
}

composed! {
    Add, 2;
    DepthwiseConv, 2;
    ModulatedNorm, 3;
    AddGated, 3;
}

impl CudaOp<2> for SwiGlu {
    fn cuda_forward(&self, [gate, up]: [Operand; 2]) -> Forward {
        if is_f32(gate) { f32::swiglu(gate, up) } else { bf16::swiglu(gate, up) }
    }

    fn cuda_backward(&self, [gate, up]: [&Tensor; 2], dy: &Tensor) -> Backward<2> {
        let (dgate, dup) = f32::swiglu_back(gate, up, dy)?;
        Ok([Some(dgate), Some(dup)])
    }
}

impl CudaOp<2> for RmsNorm {
    fn cuda_forward(&self, [x, w]: [Operand; 2]) -> Forward {
        if is_f32(x) { f32::rms_norm(x, w, self.eps) } else { bf16::rms_norm(x, w, self.eps) }
    }

    fn cuda_backward(&self, [x, w]: [&Tensor; 2], dy: &Tensor) -> Backward<2> {
        let (dx, dw) = f32::rms_norm_back(x, w, dy, self.eps)?;
        Ok([Some(dx), Some(dw)])
    }
}

impl CudaOp<3> for LayerNorm {
    fn cuda_forward(&self, [x, w, b]: [Operand; 3]) -> Forward {
        f32::layer_norm(x, w, b, self.eps)
    }

    fn cuda_backward(&self, [x, w, _]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        let (dx, dw, db) = f32::layer_norm_back(x, w, dy, self.eps)?;
        Ok([Some(dx), Some(dw), Some(db)])
    }
}

impl CudaOp<3> for GroupNorm {
    fn cuda_forward(&self, [x, w, b]: [Operand; 3]) -> Forward {
        f32::group_norm(x, w, b, (self.groups, self.eps, self.silu))
    }

    fn cuda_backward(&self, [x, w, b]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        Ok(f32::group_norm_back([x, w, b, dy], (self.groups, self.eps, self.silu))?.map(Some))
    }
}

impl CudaOp<3> for Rope {
    fn cuda_forward(&self, [x, cos, sin]: [Operand; 3]) -> Forward {
        if is_f32(x) { f32::rope(x, cos, sin) } else { bf16::rope(x, cos, sin) }
    }

    fn cuda_backward(&self, [_, cos, sin]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        Ok([Some(f32::rope_back(dy, cos, sin)?), None, None])
    }
}

impl CudaOp<3> for Linear {
    fn cuda_forward(&self, [x, w, b]: [Operand; 3]) -> Forward {
        f32::linear(x, w, b)
    }

    fn cuda_backward(&self, [x, w, b]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        f32::linear_back(x, w, b, dy)
    }
}

impl CudaOp<3> for Conv {
    fn cuda_forward(&self, [x, w, b]: [Operand; 3]) -> Forward {
        f32::conv2d(&self.geometry(x.1.shape(), w.1.shape())?, x, w, b)
    }

    fn cuda_backward(&self, [x, w, b]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        f32::conv2d_back(&self.geometry(x.shape(), w.shape())?, x, w, b, dy)
    }
}

impl CudaOp<3> for Attention {
    fn cuda_forward(&self, [q, k, v]: [Operand; 3]) -> Forward {
        f32::attention(q, k, v, self.mask.as_ref(), self.scale)
    }

    fn cuda_backward(&self, [q, k, v]: [&Tensor; 3], dy: &Tensor) -> Backward<3> {
        Ok(f32::attention_back([q, k, v, dy], self.mask.as_ref(), self.scale)?.map(Some))
    }
}
