//! Convolution by im2col, and group norm, of contiguous (B, C, H, W).

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use crate::ops::cpu::im2col::Geometry;

use super::{
    F32, Operand, THREADS, address, blocks, column_sums, each, gpu, kernel, launch, operand, start, stored, tensor,
    uninit,
};

/// `Geometry` of f32.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Parameters {
    channels: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    side: i32,
    stride: i32,
    top: i32,
    left: i32,
}

// SAFETY: numbers alone, laid out as in CUDA.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Parameters {}

impl From<&Geometry> for Parameters {
    fn from(g: &Geometry) -> Self {
        let [channels, height, width, out_height, out_width, side, stride, top, left] =
            [g.c, g.h, g.w, g.out_h, g.out_w, g.k, g.stride, g.top, g.left].map(|n| n as i32);
        Self { channels, height, width, out_height, out_width, side, stride, top, left }
    }
}

/// The patches (batch, patch, area) of the images at an address.
fn unfold(g: &Geometry, x: u64, batch: usize, device: &CudaDevice) -> Result<CudaSlice<f32>> {
    let count = batch * g.patch() * g.out_area();
    let (mut patches, all, parameters) = (uninit(device, count)?, count as i64, Parameters::from(g));
    let function = kernel!(device, F32, "unfold_f32");
    launch!(function, blocks(each(count), THREADS, 0), &x, &mut patches, &all, &parameters);
    Ok(patches)
}

/// [`conv2d`](crate::ops::conv2d()).
pub(crate) fn conv2d(
    g: &Geometry,
    (x, lx): Operand,
    (w, lw): Operand,
    (b, lb): Operand,
) -> Result<(CudaStorage, Shape)> {
    let (device, batch, patch, area) = (x.device(), lx.dims()[0], g.patch(), g.out_area());
    let patches = stored(unfold(g, address(&operand::<f32>(x, lx)?), batch, device)?, device);
    // The same filters for every image.
    let filters =
        Layout::contiguous_with_offset((1, g.o, patch), lw.start_offset()).broadcast_as((batch, g.o, patch))?;
    let mut y = w.matmul(&patches, (batch, g.o, area, patch), &filters, &Layout::contiguous((batch, patch, area)))?;
    let (bias, count) = (operand::<f32>(b, lb)?, batch * g.o * area);
    let (all, channels, size) = (count as i64, g.o as i32, area as i32);
    let function = kernel!(device, F32, "add_channels_f32");
    let (grid, numbers) = (blocks(each(count), THREADS, 0), y.as_cuda_slice_mut::<f32>()?);
    launch!(function, grid, numbers, &bias, &all, &channels, &size);
    Ok((y, Shape::from((batch, g.o, g.out_h, g.out_w))))
}

/// The gradients of the image, the filters and the bias, if they are tracked.
pub(crate) fn conv2d_back(
    g: &Geometry,
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    dy: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    let (device, batch, patch, area) = (gpu(x)?, x.dim(0)?, g.patch(), g.out_area());
    let dy = dy.reshape((batch, g.o, area))?.contiguous()?;
    let dw = || -> Result<Tensor> {
        let patches = tensor(unfold(g, start::<f32>(x)?, batch, &device)?, &device, (batch, patch, area));
        column_sums(&dy.matmul(&patches.transpose(1, 2)?)?, w.elem_count())?.reshape(w.shape())
    };
    let dx = || -> Result<Tensor> {
        let filters = w.detach().reshape((1, g.o, patch))?.transpose(1, 2)?;
        let patches = filters.broadcast_as((batch, patch, g.o))?.matmul(&dy)?;
        let (count, parameters) = (x.elem_count(), Parameters::from(g));
        let (from, mut dx, all) = (start::<f32>(&patches)?, uninit(&device, count)?, count as i64);
        let function = kernel!(device, F32, "fold_f32");
        launch!(function, blocks(each(count), THREADS, 0), &from, &mut dx, &all, &parameters);
        Ok(tensor(dx, &device, x.shape()))
    };
    let db = || column_sums(&dy.transpose(1, 2)?.contiguous()?, g.o);
    Ok([x.track_op().then(dx).transpose()?, w.track_op().then(dw).transpose()?, b.track_op().then(db).transpose()?])
}

/// [`group_norm`](crate::ops::group_norm()) of x (B, C, ...).
pub(crate) fn group_norm(
    (x, lx): Operand,
    (w, lw): Operand,
    (b, lb): Operand,
    (groups, eps, silu): (usize, f32, bool),
) -> Result<(CudaStorage, Shape)> {
    let (device, sizes) = (x.device(), Groups::new(lx.dims(), groups));
    let (x, w, b) = (operand::<f32>(x, lx)?, operand::<f32>(w, lw)?, operand::<f32>(b, lb)?);
    let mut y = uninit(device, lx.shape().elem_count())?;
    let (channels, size, area, silu) = (sizes.channels, sizes.size, sizes.area, i32::from(silu));
    let function = kernel!(device, F32, "group_norm_f32");
    launch!(function, blocks(sizes.grid, THREADS, 0), &x, &w, &b, &mut y, &channels, &size, &area, &eps, &silu);
    Ok((stored(y, device), lx.shape().clone()))
}

/// The gradients of the image, the weights and the biases.
pub(crate) fn group_norm_back(
    [x, w, b, dy]: [&Tensor; 4],
    (groups, eps, silu): (usize, f32, bool),
) -> Result<[Tensor; 3]> {
    let (device, sizes, dy) = (gpu(x)?, Groups::new(x.dims(), groups), dy.contiguous()?);
    let rows = (x.dims()[0], x.dims()[1]);
    let (from, weights, biases, d) = (start::<f32>(x)?, start::<f32>(w)?, start::<f32>(b)?, start::<f32>(&dy)?);
    let mut dx = uninit(&device, x.elem_count())?;
    let (mut dw, mut db) = (uninit(&device, rows.0 * rows.1)?, uninit(&device, rows.0 * rows.1)?);
    let (channels, size, area, silu) = (sizes.channels, sizes.size, sizes.area, i32::from(silu));
    let function = kernel!(device, F32, "group_norm_back_f32");
    let blocks = blocks(sizes.grid, THREADS, 0);
    launch!(
        function, blocks, &from, &weights, &biases, &d, &mut dx, &mut dw, &mut db, &channels, &size, &area, &eps, &silu
    );
    let sums = |numbers| tensor(numbers, &device, rows).sum(0);
    Ok([tensor(dx, &device, x.shape()), sums(dw)?, sums(db)?])
}

/// Launches of group norm: a block per group of an image.
struct Groups {
    grid: (usize, usize, usize),
    channels: i32,
    /// Channels of a group.
    size: i32,
    /// Numbers of a channel.
    area: i32,
}

impl Groups {
    fn new(dims: &[usize], groups: usize) -> Self {
        let area = dims[2..].iter().product::<usize>() as i32;
        Self { grid: (dims[0] * groups, 1, 1), channels: dims[1] as i32, size: (dims[1] / groups) as i32, area }
    }
}
