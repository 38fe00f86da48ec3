//! What lies between the matrix products of a step, and products that are added to what is there.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use half::bf16;

use super::{THREADS, VECTOR, aligned, blocks, kernel, launch, operand, room, takes};

pub(super) const STEP: (&str, &str) = ("step", include_str!(concat!(env!("OUT_DIR"), "/step.ptx")));

/// [`rms_norm`](crate::ops::rms_norm()) of x (..., D).
pub(in crate::ops) fn rms_norm(
    (x, lx): (&CudaStorage, &Layout),
    (w, lw): (&CudaStorage, &Layout),
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let (device, hidden) = (&x.device, lw.shape().elem_count());
    let count = lx.shape().elem_count();
    let (x, w) = (operand::<bf16>(x, lx)?, operand::<bf16>(w, lw)?);
    let mut out = room::<bf16>(device, count)?;
    let (grid, hidden) = ((count / hidden, 1, 1), hidden as i32);
    launch!(kernel!(device, STEP, "rms_norm_bf16"), blocks(grid, THREADS, 0), &x, &w, &mut out, &hidden, &eps);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// How far apart the rows of an operand lie, if they are contiguous themselves and equally far apart.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (dims, stride) = (layout.dims(), layout.stride());
    let last = dims.len().checked_sub(1).filter(|&last| stride[last] == 1)?;
    let rows = dims[..last].iter().zip(&stride[..last]).rev().filter(|(d, _)| **d > 1);
    let (mut apart, mut next) = (dims[last], None);
    for (&d, &s) in rows {
        match next {
            None => apart = s,
            Some(next) if next != s => return None,
            Some(_) => {}
        }
        next = Some(s * d);
    }
    Some(apart)
}

/// Whether [`swiglu`] takes an operand as it lies.
pub(in crate::ops) fn in_rows(x: &Tensor) -> bool {
    x.device().is_cuda()
        && x.dtype() == DType::BF16
        && aligned(x)
        && row_stride(x.layout()).is_some_and(|apart| apart.is_multiple_of(VECTOR))
}

/// [`swiglu`](crate::ops::swiglu), of parts of wider rows as well.
pub(in crate::ops) fn swiglu(
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
    let mut out = room::<bf16>(device, count)?;
    let (vectors, columns) = ((count / VECTOR) as i64, columns as i32);
    let (gate_stride, up_stride) = (gate_stride as i64, up_stride as i64);
    let grid = ((count / VECTOR).div_ceil(THREADS as usize), 1, 1);
    launch!(
        kernel!(device, STEP, "swiglu_bf16"),
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
pub(in crate::ops) fn rope(
    (x, lx): (&CudaStorage, &Layout),
    (cos, lc): (&CudaStorage, &Layout),
    (sin, ls): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (device, (b, t, heads, d)) = (&x.device, lx.shape().dims4()?);
    let positions = (lc.shape().elem_count() / (d / 2)) as i32;
    let (x, cos, sin) = (operand::<bf16>(x, lx)?, operand::<f32>(cos, lc)?, operand::<f32>(sin, ls)?);
    let mut out = room::<bf16>(device, lx.shape().elem_count())?;
    let (grid, heads, d) = ((b * t, 1, 1), heads as i32, d as i32);
    let rope = kernel!(device, STEP, "rope_bf16");
    launch!(rope, blocks(grid, THREADS, 0), &x, &cos, &sin, &mut out, &positions, &heads, &d);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// Adds `x wᵀ`, for x (..., in) and w (out, in), to y (..., out), rounding once; false if the operands are not taken.
pub(in crate::ops) fn add_product(y: &Tensor, x: &Tensor, w: &Tensor) -> Result<bool> {
    if !takes(&[y, x, w]) || ![y, x, w].iter().all(|t| t.is_contiguous()) {
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
        bail!("{} is for a GPU", self.name())
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
        // cuBLAS counts columns first: yᵀ = w xᵀ + yᵀ.
        // SAFETY: the operands are contiguous and of the sizes that were checked above, and nothing else has y.
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
