//! Numbers each by itself, and rows.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaStorage, Result, Shape, Tensor};

use super::{
    Operand, THREADS, TRAINING, WARPS, address, blocks, column_sums, each, gpu, kernel, launch, operand, room, start,
    stored, tensor,
};

/// [`swiglu`](crate::ops::swiglu).
pub(in crate::ops) fn swiglu((gate, lg): Operand, (up, lu): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (gate.device(), lg.shape().elem_count());
    let (gate, up) = (operand::<f32>(gate, lg)?, operand::<f32>(up, lu)?);
    let (mut y, all) = (room(device, count)?, count as i64);
    launch!(kernel!(device, TRAINING, "swiglu_f32"), blocks(each(count), THREADS, 0), &gate, &up, &mut y, &all);
    Ok((stored(y, device), lg.shape().clone()))
}

/// The gradients of gate and up.
pub(in crate::ops) fn swiglu_back(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (device, count, dy) = (gpu(gate)?, gate.elem_count(), dy.contiguous()?);
    let (mut dgate, mut dup, all) = (room(&device, count)?, room(&device, count)?, count as i64);
    let (g, u, d) = (start::<f32>(gate)?, start::<f32>(up)?, start::<f32>(&dy)?);
    let function = kernel!(device, TRAINING, "swiglu_back_f32");
    launch!(function, blocks(each(count), THREADS, 0), &g, &u, &d, &mut dgate, &mut dup, &all);
    Ok((tensor(dgate, &device, gate.shape()), tensor(dup, &device, up.shape())))
}

/// GELU by tanh (kind 0), by the error function (1) or quick (2).
pub(in crate::ops) fn gelu((x, lx): Operand, kind: i32) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (x.device(), lx.shape().elem_count());
    let (x, mut y, all) = (operand::<f32>(x, lx)?, room(device, count)?, count as i64);
    launch!(kernel!(device, TRAINING, "gelu_f32"), blocks(each(count), THREADS, 0), &x, &mut y, &all, &kind);
    Ok((stored(y, device), lx.shape().clone()))
}

/// The gradient of x.
pub(in crate::ops) fn gelu_back(x: &Tensor, dy: &Tensor, kind: i32) -> Result<Tensor> {
    let (device, count, dy) = (gpu(x)?, x.elem_count(), dy.contiguous()?);
    let (mut dx, all, from, d) = (room(&device, count)?, count as i64, start::<f32>(x)?, start::<f32>(&dy)?);
    let function = kernel!(device, TRAINING, "gelu_back_f32");
    launch!(function, blocks(each(count), THREADS, 0), &from, &d, &mut dx, &all, &kind);
    Ok(tensor(dx, &device, x.shape()))
}

/// [`rms_norm`](crate::ops::rms_norm()).
pub(in crate::ops) fn rms_norm((x, lx): Operand, (w, lw): Operand, eps: f32) -> Result<(CudaStorage, Shape)> {
    let (device, count, width) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
    let (x, w, mut y) = (operand::<f32>(x, lx)?, operand::<f32>(w, lw)?, room(device, count)?);
    let (rows, grid, width) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    launch!(kernel!(device, TRAINING, "rms_norm_f32"), blocks(grid, THREADS, 0), &x, &w, &mut y, &rows, &width, &eps);
    Ok((stored(y, device), lx.shape().clone()))
}

/// [`layer_norm`](crate::ops::layer_norm).
pub(in crate::ops) fn layer_norm(
    (x, lx): Operand,
    (w, lw): Operand,
    (b, lb): Operand,
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let (device, count, width) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
    let (x, w, b) = (operand::<f32>(x, lx)?, operand::<f32>(w, lw)?, operand::<f32>(b, lb)?);
    let mut y = room(device, count)?;
    let (rows, grid, width) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    let function = kernel!(device, TRAINING, "layer_norm_f32");
    launch!(function, blocks(grid, THREADS, 0), &x, &w, &b, &mut y, &rows, &width, &eps);
    Ok((stored(y, device), lx.shape().clone()))
}

/// The gradients of x and of the weights.
pub(in crate::ops) fn rms_norm_back(x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    norm_back("rms_norm_back_f32", x, w, &dy.contiguous()?, eps)
}

/// The gradients of x, of the weights and of the biases.
pub(in crate::ops) fn layer_norm_back(
    x: &Tensor,
    w: &Tensor,
    dy: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor, Tensor)> {
    let dy = dy.contiguous()?;
    let (dx, dw) = norm_back("layer_norm_back_f32", x, w, &dy, eps)?;
    Ok((dx, dw, column_sums(&dy, w.elem_count())?))
}

fn norm_back(name: &str, x: &Tensor, w: &Tensor, dy: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (device, count, width) = (gpu(x)?, x.elem_count(), w.elem_count());
    let (mut dx, mut along) = (room(&device, count)?, room(&device, count)?);
    let (from, weights, d) = (start::<f32>(x)?, start::<f32>(w)?, start::<f32>(dy)?);
    let (rows, grid, columns) = ((count / width) as i64, ((count / width).div_ceil(WARPS), 1, 1), width as i32);
    let function = kernel!(device, TRAINING, name);
    let blocks = blocks(grid, THREADS, 0);
    launch!(function, blocks, &from, &weights, &d, &mut dx, &mut along, &rows, &columns, &eps);
    let along = tensor(along, &device, (count / width, width));
    Ok((tensor(dx, &device, x.shape()), column_sums(&along, width)?))
}

/// [`rope`](crate::ops::rope()) of x (B, T, H, D).
pub(in crate::ops) fn rope((x, lx): Operand, (cos, lc): Operand, (sin, ls): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, shape) = (x.device(), lx.shape().clone());
    let (x, cos, sin) = (operand::<f32>(x, lx)?, operand::<f32>(cos, lc)?, operand::<f32>(sin, ls)?);
    let y = rotated(device, [&x, &cos, &sin].map(address), &shape, lc.shape(), 1.0)?;
    Ok((stored(y, device), shape))
}

/// The gradient of x: dy turned back.
pub(in crate::ops) fn rope_back(dy: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (device, dy) = (gpu(dy)?, dy.contiguous()?);
    let dx =
        rotated(&device, [start::<f32>(&dy)?, start::<f32>(cos)?, start::<f32>(sin)?], dy.shape(), cos.shape(), -1.0)?;
    Ok(tensor(dx, &device, dy.shape()))
}

/// The heads at the first address, (B, T, H, D), rotated by the cosines and sines at the others, or back with `sign` -1.
fn rotated(
    device: &CudaDevice,
    [x, cos, sin]: [u64; 3],
    heads: &Shape,
    angles: &Shape,
    sign: f32,
) -> Result<CudaSlice<f32>> {
    let (_, _, h, d) = heads.dims4()?;
    let (count, mut y) = (heads.elem_count() / 2, room(device, heads.elem_count())?);
    let (all, positions, h, d) = (count as i64, (angles.elem_count() / (d / 2)) as i32, h as i32, d as i32);
    let function = kernel!(device, TRAINING, "rope_f32");
    launch!(function, blocks(each(count), THREADS, 0), &x, &cos, &sin, &mut y, &all, &positions, &h, &d, &sign);
    Ok(y)
}

/// The rows `ids` (N) of x (rows, width): (N, width).
pub(in crate::ops) fn select((x, lx): Operand, (ids, li): Operand) -> Result<(CudaStorage, Shape)> {
    let shape = (li.shape().elem_count(), lx.shape().dims2()?.1);
    Ok((x.index_select(ids, lx, li, 0)?, shape.into()))
}

/// The gradient of x (rows, width), to whose rows `ids` (N) those of dy (N, width) are added.
pub(in crate::ops) fn select_back(x: &Tensor, ids: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (device, dy) = (gpu(x)?, dy.contiguous()?);
    let mut dx = device.alloc_zeros::<f32>(x.elem_count())?;
    let (d, rows, grid, width) = (start::<f32>(&dy)?, start::<u32>(ids)?, (ids.elem_count(), 1, 1), x.dim(1)? as i32);
    launch!(kernel!(device, TRAINING, "add_rows_f32"), blocks(grid, THREADS, 0), &d, &rows, &mut dx, &width);
    Ok(tensor(dx, &device, x.shape()))
}

/// [`cross_entropy`](crate::ops::cross_entropy) of logits (N, V) and targets (N).
pub(in crate::ops) fn cross_entropy((x, lx): Operand, (targets, lt): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, (rows, width)) = (x.device(), lx.shape().dims2()?);
    let (x, targets, mut losses) = (operand::<f32>(x, lx)?, operand::<u32>(targets, lt)?, room(device, rows)?);
    let (grid, all, width) = ((rows.div_ceil(WARPS), 1, 1), rows as i64, width as i32);
    let function = kernel!(device, TRAINING, "cross_entropy_f32");
    launch!(function, blocks(grid, THREADS, 0), &x, &targets, &mut losses, &all, &width);
    Ok((stored(losses, device), rows.into()))
}

/// The gradient of the logits.
pub(in crate::ops) fn cross_entropy_back(x: &Tensor, targets: &Tensor, dlosses: &Tensor) -> Result<Tensor> {
    let (device, (rows, width), dlosses) = (gpu(x)?, x.dims2()?, dlosses.contiguous()?);
    let (from, targets, d) = (start::<f32>(x)?, start::<u32>(targets)?, start::<f32>(&dlosses)?);
    let (mut dx, grid) = (room(&device, x.elem_count())?, (rows.div_ceil(WARPS), 1, 1));
    let (all, width) = (rows as i64, width as i32);
    let function = kernel!(device, TRAINING, "cross_entropy_back_f32");
    launch!(function, blocks(grid, THREADS, 0), &from, &targets, &d, &mut dx, &all, &width);
    Ok(tensor(dx, &device, x.shape()))
}
