//! Norms, activations and rotations between the matrix products, and products that add to a
//! residual.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use half::bf16;

use super::{THREADS, VECTOR, aligned, blocks, kernel, launch, operand, supports_bf16, uninit};

pub(super) const ELEMENTWISE: (&str, &str) =
    ("elementwise", include_str!(concat!(env!("OUT_DIR"), "/elementwise.ptx")));

/// [`rms_norm`](crate::ops::rms_norm()) of x (..., D).
pub(crate) fn rms_norm(
    (x, lx): (&CudaStorage, &Layout),
    (w, lw): (&CudaStorage, &Layout),
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let (device, hidden) = (&x.device, lw.shape().elem_count());
    let count = lx.shape().elem_count();
    let (x, w) = (operand::<bf16>(x, lx)?, operand::<bf16>(w, lw)?);
    let mut out = uninit::<bf16>(device, count)?;
    let (grid, hidden) = ((count / hidden, 1, 1), hidden as i32);
    launch!(kernel!(device, ELEMENTWISE, "rms_norm_bf16"), blocks(grid, THREADS, 0), &x, &w, &mut out, &hidden, &eps);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// The distance between the rows of an operand, if it is constant and each row is contiguous.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (dims, stride) = (layout.dims(), layout.stride());
    let last = dims.len().checked_sub(1).filter(|&last| stride[last] == 1)?;
    let rows = dims[..last].iter().zip(&stride[..last]).rev().filter(|(d, _)| **d > 1);
    let (mut distance, mut next) = (dims[last], None);
    for (&d, &s) in rows {
        match next {
            None => distance = s,
            Some(next) if next != s => return None,
            Some(_) => {}
        }
        next = Some(s * d);
    }
    Some(distance)
}

/// Whether [`swiglu`] reads an operand in place.
pub(crate) fn has_row_stride(x: &Tensor) -> bool {
    x.device().is_cuda()
        && x.dtype() == DType::BF16
        && aligned(x)
        && row_stride(x.layout()).is_some_and(|distance| distance.is_multiple_of(VECTOR))
}

/// [`swiglu`](crate::ops::swiglu), also of parts of wider rows.
pub(crate) fn swiglu(
    (gate, lg): (&CudaStorage, &Layout),
    (up, lu): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (&gate.device, lg.shape().elem_count());
    let (Some(gate_stride), Some(up_stride), Some(&columns)) = (row_stride(lg), row_stride(lu), lg.dims().last())
    else {
        bail!("swiglu: rows of strides {:?} and {:?}", lg.stride(), lu.stride());
    };
    let (gate, up) = (gate.as_cuda_slice::<bf16>()?, up.as_cuda_slice::<bf16>()?);
    let (gate, up) = (gate.slice(lg.start_offset()..), up.slice(lu.start_offset()..));
    let mut out = uninit::<bf16>(device, count)?;
    let (vectors, columns) = ((count / VECTOR) as i64, columns as i32);
    let (gate_stride, up_stride) = (gate_stride as i64, up_stride as i64);
    let grid = ((count / VECTOR).div_ceil(THREADS as usize), 1, 1);
    launch!(
        kernel!(device, ELEMENTWISE, "swiglu_bf16"),
        blocks(grid, THREADS, 0),
        &gate,
        &up,
        &mut out,
        &vectors,
        &columns,
        &gate_stride,
        &up_stride,
    );
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lg.shape().clone()))
}

/// [`rope`](crate::ops::rope()) of x (B, T, H, D).
pub(crate) fn rope(
    (x, lx): (&CudaStorage, &Layout),
    (cos, lc): (&CudaStorage, &Layout),
    (sin, ls): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (device, (b, t, heads, d)) = (&x.device, lx.shape().dims4()?);
    let positions = (lc.shape().elem_count() / (d / 2)) as i32;
    let (x, cos, sin) = (operand::<bf16>(x, lx)?, operand::<f32>(cos, lc)?, operand::<f32>(sin, ls)?);
    let mut out = uninit::<bf16>(device, lx.shape().elem_count())?;
    let (grid, heads, d) = ((b * t, 1, 1), heads as i32, d as i32);
    let rope = kernel!(device, ELEMENTWISE, "rope_bf16");
    launch!(rope, blocks(grid, THREADS, 0), &x, &cos, &sin, &mut out, &positions, &heads, &d);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// Adds `x wᵀ`, for x (..., in) and w (out, in), to y (..., out) in place, rounding once. Returns
/// false for operands that are not supported.
pub(crate) fn add_product(y: &Tensor, x: &Tensor, w: &Tensor) -> Result<bool> {
    if !supports_bf16(&[y, x, w]) || ![y, x, w].iter().all(|t| t.is_contiguous()) {
        return Ok(false);
    }
    y.inplace_op3(x, w, &AddProduct)?;
    Ok(true)
}

struct AddProduct;

impl InplaceOp3 for AddProduct {
    fn name(&self) -> &'static str {
        "add-product"
    }

    fn cpu_fwd(
        &self,
        _: &mut CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        bail!("{} has no kernel for the CPU", self.name())
    }

    fn cuda_fwd(
        &self,
        y: &mut CudaStorage,
        ly: &Layout,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<()> {
        let (out, inner) = lw.shape().dims2()?;
        let rows = lx.shape().elem_count() / inner;
        if lx.dims().last() != Some(&inner) || ly.dims().last() != Some(&out) || ly.shape().elem_count() != rows * out {
            bail!("{}: {:?} times {:?} is not {:?}", self.name(), lx.shape(), lw.shape(), ly.shape());
        }
        let (device, start) = (y.device.clone(), ly.start_offset());
        let stream = device.cuda_stream();
        let (x, w) = (operand::<bf16>(x, lx)?, operand::<bf16>(w, lw)?);
        let mut y = y.as_cuda_slice_mut::<bf16>()?.slice_mut(start..start + rows * out);
        let ((x, _x), (w, _w), (y, _y)) = (x.device_ptr(&stream), w.device_ptr(&stream), y.device_ptr_mut(&stream));
        let (one, kind) = (1f32, sys::cudaDataType_t::CUDA_R_16BF);
        let factor = (&raw const one).cast();
        // cuBLAS is column-major: yᵀ = w xᵀ + yᵀ. SAFETY: the operands are contiguous and of the
        // sizes checked above, and y is borrowed mutably.
        #[allow(unsafe_code)]
        unsafe {
            gemm_ex(
                *device.cublas_handle().handle(),
                sys::cublasOperation_t::CUBLAS_OP_T,
                sys::cublasOperation_t::CUBLAS_OP_N,
                out as i32,
                rows as i32,
                inner as i32,
                factor,
                w as *const _,
                kind,
                inner as i32,
                x as *const _,
                kind,
                inner as i32,
                factor,
                y as *mut _,
                kind,
                out as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }
}
