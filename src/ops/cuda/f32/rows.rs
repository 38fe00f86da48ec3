//! Element-wise operations, and operations on rows.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{
    F32, Operand, THREADS, WARPS, address, blocks, column_sums, each, gpu, kernel, launch, operand, start, stored,
    tensor, uninit,
};

/// [`swiglu`](crate::ops::swiglu).
pub(crate) fn swiglu((gate, lg): Operand, (up, lu): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (gate.device(), lg.shape().elem_count());
    let (gate, up) = (operand::<f32>(gate, lg)?, operand::<f32>(up, lu)?);
    let (mut y, all) = (uninit(device, count)?, count as i64);
    launch!(kernel!(device, F32, "swiglu_f32"), blocks(each(count), THREADS, 0), &gate, &up, &mut y, &all);
    Ok((stored(y, device), lg.shape().clone()))
}

/// The gradients of gate and up.
pub(crate) fn swiglu_back(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (device, count, dy) = (gpu(gate)?, gate.elem_count(), dy.contiguous()?);
    let (mut dgate, mut dup, all) = (uninit(&device, count)?, uninit(&device, count)?, count as i64);
    let (g, u, d) = (start::<f32>(gate)?, start::<f32>(up)?, start::<f32>(&dy)?);
    let function = kernel!(device, F32, "swiglu_back_f32");
    launch!(function, blocks(each(count), THREADS, 0), &g, &u, &d, &mut dgate, &mut dup, &all);
    Ok((tensor(dgate, &device, gate.shape()), tensor(dup, &device, up.shape())))
}

/// GELU by tanh (kind 0), by the error function (1) or quick (2).
pub(crate) fn gelu((x, lx): Operand, kind: i32) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (x.device(), lx.shape().elem_count());
    let (x, mut y, all) = (operand::<f32>(x, lx)?, uninit(device, count)?, count as i64);
    launch!(kernel!(device, F32, "gelu_f32"), blocks(each(count), THREADS, 0), &x, &mut y, &all, &kind);
    Ok((stored(y, device), lx.shape().clone()))
}

/// The gradient of x.
pub(crate) fn gelu_back(x: &Tensor, dy: &Tensor, kind: i32) -> Result<Tensor> {
    let (device, count, dy) = (gpu(x)?, x.elem_count(), dy.contiguous()?);
    let (mut dx, all, from, d) = (uninit(&device, count)?, count as i64, start::<f32>(x)?, start::<f32>(&dy)?);
    let function = kernel!(device, F32, "gelu_back_f32");
    launch!(function, blocks(each(count), THREADS, 0), &from, &d, &mut dx, &all, &kind);
    Ok(tensor(dx, &device, x.shape()))
}

/// [`rms_norm`](crate::ops::rms_norm()).
pub(crate) fn rms_norm((x, lx): Operand, (w, lw): Operand, eps: f32) -> Result<(CudaStorage, Shape)> {
    let (device, count, width) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
    let (x, w, mut y) = (operand::<f32>(x, lx)?, operand::<f32>(w, lw)?, uninit(device, count)?);
    let (rows, grid, width) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    launch!(kernel!(device, F32, "rms_norm_f32"), blocks(grid, THREADS, 0), &x, &w, &mut y, &rows, &width, &eps);
    Ok((stored(y, device), lx.shape().clone()))
}

/// [`layer_norm`](crate::ops::layer_norm).
pub(crate) fn layer_norm(
    (x, lx): Operand,
    (w, lw): Operand,
    (b, lb): Operand,
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let (device, count, width) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
    let (x, w, b) = (operand::<f32>(x, lx)?, operand::<f32>(w, lw)?, operand::<f32>(b, lb)?);
    let mut y = uninit(device, count)?;
    let (rows, grid, width) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    let function = kernel!(device, F32, "layer_norm_f32");
    launch!(function, blocks(grid, THREADS, 0), &x, &w, &b, &mut y, &rows, &width, &eps);
    Ok((stored(y, device), lx.shape().clone()))
}

/// The gradients of x and of the weights.
pub(crate) fn rms_norm_back(x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    norm_back("rms_norm_back_f32", x, w, &dy.contiguous()?, eps)
}

/// The gradients of x, of the weights and of the biases.
pub(crate) fn layer_norm_back(x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<(Tensor, Tensor, Tensor)> {
    let dy = dy.contiguous()?;
    let (dx, dw) = norm_back("layer_norm_back_f32", x, w, &dy, eps)?;
    Ok((dx, dw, column_sums(&dy, w.elem_count())?))
}

fn norm_back(name: &str, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (device, count, width) = (gpu(x)?, x.elem_count(), w.elem_count());
    let (mut dx, mut along) = (uninit(&device, count)?, uninit(&device, count)?);
    let (from, weights, d) = (start::<f32>(x)?, start::<f32>(w)?, start::<f32>(dy)?);
    let (rows, grid, columns) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    let function = kernel!(device, F32, name);
    let blocks = blocks(grid, THREADS, 0);
    launch!(function, blocks, &from, &weights, &d, &mut dx, &mut along, &rows, &columns, &eps);
    let along = tensor(along, &device, (count / width, width));
    Ok((tensor(dx, &device, x.shape()), column_sums(&along, width)?))
}

/// [`rope`](crate::ops::rope()) of x (B, T, H, D).
pub(crate) fn rope((x, lx): Operand, (cos, lc): Operand, (sin, ls): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, shape) = (x.device(), lx.shape().clone());
    let (x, cos, sin) = (operand::<f32>(x, lx)?, operand::<f32>(cos, lc)?, operand::<f32>(sin, ls)?);
    let y = rotated(device, [&x, &cos, &sin].map(address), &shape, lc.shape(), 1.0)?;
    Ok((stored(y, device), shape))
}

/// The gradient of x: dy rotated back.
pub(crate) fn rope_back(dy: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (device, dy) = (gpu(dy)?, dy.contiguous()?);
    let dx =
        rotated(&device, [start::<f32>(&dy)?, start::<f32>(cos)?, start::<f32>(sin)?], dy.shape(), cos.shape(), -1.0)?;
    Ok(tensor(dx, &device, dy.shape()))
}

/// The heads (B, T, H, D) at the address x, rotated by the cosines and sines; back if `sign` is -1.
fn rotated(
    device: &CudaDevice,
    [x, cos, sin]: [u64; 3],
    heads: &Shape,
    angles: &Shape,
    sign: f32,
) -> Result<CudaSlice<f32>> {
    let (_, _, h, d) = heads.dims4()?;
    let (count, mut y) = (heads.elem_count() / 2, uninit(device, heads.elem_count())?);
    let (all, positions, h, d) = (count as i64, (angles.elem_count() / (d / 2)) as i32, h as i32, d as i32);
    let function = kernel!(device, F32, "rope_f32");
    launch!(function, blocks(each(count), THREADS, 0), &x, &cos, &sin, &mut y, &all, &positions, &h, &d, &sign);
    Ok(y)
}

/// [`select`](crate::ops::select()) of rows of a tracked x: candle adds up the gradients of one row
/// after the other.
pub(crate) fn select(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(ids, Select)
}

struct Select;

impl CustomOp2 for Select {
    fn name(&self) -> &'static str {
        "select"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} has no kernel for the CPU", self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, ids: &CudaStorage, li: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = (li.shape().elem_count(), lx.shape().dims2()?.1);
        Ok((x.index_select(ids, lx, li, 0)?, shape.into()))
    }

    fn bwd(&self, x: &Tensor, ids: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(select_back(x, ids, dy)?), None))
    }
}

/// The gradient of x (rows, width): the rows of dy (N, width) added to its rows `ids` (N).
fn select_back(x: &Tensor, ids: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (device, dy) = (gpu(x)?, dy.contiguous()?);
    let mut dx = device.alloc_zeros::<f32>(x.elem_count())?;
    let (d, rows, grid, width) = (start::<f32>(&dy)?, start::<u32>(ids)?, (ids.elem_count(), 1, 1), x.dim(1)? as i32);
    launch!(kernel!(device, F32, "add_rows_f32"), blocks(grid, THREADS, 0), &d, &rows, &mut dx, &width);
    Ok(tensor(dx, &device, x.shape()))
}

/// [`cross_entropy`](crate::train::loss::cross_entropy) of logits (N, V) and targets (N).
#[cfg(feature = "train")]
pub(crate) fn cross_entropy((x, lx): Operand, (targets, lt): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, (rows, width)) = (x.device(), lx.shape().dims2()?);
    let (x, targets, mut losses) = (operand::<f32>(x, lx)?, operand::<u32>(targets, lt)?, uninit(device, rows)?);
    let (grid, all, width) = ((rows.div_ceil(WARPS), 1, 1), rows as i64, width as i32);
    let function = kernel!(device, F32, "cross_entropy_f32");
    launch!(function, blocks(grid, THREADS, 0), &x, &targets, &mut losses, &all, &width);
    Ok((stored(losses, device), rows.into()))
}

/// The gradient of the logits.
#[cfg(feature = "train")]
pub(crate) fn cross_entropy_back(x: &Tensor, targets: &Tensor, dlosses: &Tensor) -> Result<Tensor> {
    let (device, (rows, width), dlosses) = (gpu(x)?, x.dims2()?, dlosses.contiguous()?);
    let (from, targets, d) = (start::<f32>(x)?, start::<u32>(targets)?, start::<f32>(&dlosses)?);
    let (mut dx, grid) = (uninit(&device, x.elem_count())?, (rows.div_ceil(WARPS), 1, 1));
    let (all, width) = (rows as i64, width as i32);
    let function = kernel!(device, F32, "cross_entropy_back_f32");
    launch!(function, blocks(grid, THREADS, 0), &from, &targets, &d, &mut dx, &all, &width);
    Ok(tensor(dx, &device, x.shape()))
}
