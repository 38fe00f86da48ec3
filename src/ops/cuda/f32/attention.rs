//! Linear layers and attention.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Layout, Result, Shape, Storage, Tensor, bail};

use super::{
    F32, Operand, THREADS, WARPS, address, arranged, blocks, column_sums, each, gpu, kernel, launch, operand, start,
};

/// [`linear`](crate::ops::linear()); an empty bias is none.
pub(crate) fn linear((x, lx): Operand, (w, lw): Operand, (b, lb): Operand) -> Result<(CudaStorage, Shape)> {
    let (device, (out, inner)) = (x.device(), lw.shape().dims2()?);
    let rows = lx.shape().elem_count() / inner;
    let flat = Layout::contiguous_with_offset((rows, inner), lx.start_offset());
    let mut y = x.matmul(w, (1, rows, out, inner), &flat, &lw.transpose(0, 1)?)?;
    if lb.shape().elem_count() > 0 {
        let (bias, count, width) = (operand::<f32>(b, lb)?, (rows * out) as i64, out as i32);
        let y = y.as_cuda_slice_mut::<f32>()?;
        let function = kernel!(device, F32, "add_bias_f32");
        launch!(function, blocks(each(rows * out), THREADS, 0), y, &bias, &count, &width);
    }
    let mut dims = lx.dims().to_vec();
    dims.pop();
    dims.push(out);
    Ok((y, Shape::from(dims)))
}

/// The gradients of x, the weights and the bias, if they are tracked.
pub(crate) fn linear_back(x: &Tensor, w: &Tensor, b: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
    let (out, inner) = w.dims2()?;
    let (flat, dy) = (x.detach().reshape(((), inner))?, dy.reshape(((), out))?);
    let dx = x.track_op().then(|| dy.matmul(&w.detach())?.reshape(x.shape())).transpose()?;
    let dw = w.track_op().then(|| dy.t()?.matmul(&flat)).transpose()?;
    let db = (b.track_op() && b.elem_count() > 0).then(|| column_sums(&dy, out)).transpose()?;
    Ok([dx, dw, db])
}

/// Sizes of queries (B, T, H, D) and keys (B, S, KV, D). The queries of all heads that share keys
/// are the rows of one matrix.
struct Sizes {
    b: usize,
    t: usize,
    s: usize,
    kv: usize,
    group: usize,
    d: usize,
}

impl Sizes {
    fn new(q: &Shape, k: &Shape) -> Result<Self> {
        let ((b, t, h, d), (_, s, kv, _)) = (q.dims4()?, k.dims4()?);
        Ok(Self { b, t, s, kv, group: h / kv, d })
    }

    /// Rows of such a matrix.
    fn rows(&self) -> usize {
        self.group * self.t
    }

    /// Of the product of queries and keys, for each batch row and head of keys.
    fn product(&self) -> (usize, usize, usize, usize) {
        (self.b * self.kv, self.rows(), self.s, self.d)
    }

    fn queries(&self) -> Layout {
        Layout::contiguous((self.b * self.kv, self.rows(), self.d))
    }

    fn keys(&self) -> Layout {
        Layout::contiguous((self.b * self.kv, self.s, self.d))
    }

    fn weights(&self) -> Layout {
        Layout::contiguous((self.b * self.kv, self.rows(), self.s))
    }

    /// The softmax, in place of the products of queries and keys.
    fn softmax(&self, logits: &mut CudaStorage, mask: Option<&Tensor>, scale: f32) -> Result<()> {
        let device = logits.device().clone();
        let rows = self.b * self.kv * self.rows();
        let per_batch = mask.is_some_and(|m| m.rank() == 3);
        // A null pointer is none.
        let mask = mask.map(start::<u8>).transpose()?.unwrap_or(0);
        let batch = if per_batch { (self.kv * self.rows()) as i32 } else { 0 };
        let (all, keys, queries) = (rows as i64, self.s as i32, self.t as i32);
        let function = kernel!(device, F32, "softmax_f32");
        let (grid, logits) = (blocks((rows.div_ceil(WARPS), 1, 1), THREADS, 0), logits.as_cuda_slice_mut::<f32>()?);
        launch!(function, grid, logits, &mask, &all, &keys, &queries, &batch, &scale);
        Ok(())
    }

    /// Queries (B, T, H, D) to matrices.
    fn of_queries(&self, q: Operand) -> Result<CudaStorage> {
        arranged(q, vec![self.b, self.t, self.kv, self.group, self.d], &[0, 2, 3, 1, 4])
    }

    /// Matrices to queries.
    fn to_queries(&self, q: &CudaStorage) -> Result<CudaStorage> {
        let layout = self.queries();
        arranged((q, &layout), vec![self.b, self.kv, self.group, self.t, self.d], &[0, 3, 1, 2, 4])
    }

    /// Keys or values (B, S, KV, D) to matrices.
    fn of_keys(&self, k: Operand) -> Result<CudaStorage> {
        arranged(k, vec![self.b, self.s, self.kv, self.d], &[0, 2, 1, 3])
    }

    /// Matrices to keys or values.
    fn to_keys(&self, k: &CudaStorage) -> Result<CudaStorage> {
        let layout = self.keys();
        arranged((k, &layout), vec![self.b, self.kv, self.s, self.d], &[0, 2, 1, 3])
    }
}

/// [`attention`](crate::ops::attention()) of contiguous operands over the keys that a mask, (T, S)
/// or (B, T, S), keeps.
pub(crate) fn attention(
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Option<&Tensor>,
    scale: f32,
) -> Result<(CudaStorage, Shape)> {
    let (sizes, shape) = (Sizes::new(q.1.shape(), k.1.shape())?, q.1.shape().clone());
    let (q, k, v) = (sizes.of_queries(q)?, sizes.of_keys(k)?, sizes.of_keys(v)?);
    let (b, rows, s, d) = sizes.product();
    let mut p = q.matmul(&k, (b, rows, s, d), &sizes.queries(), &sizes.keys().transpose(1, 2)?)?;
    sizes.softmax(&mut p, mask, scale)?;
    let y = p.matmul(&v, (b, rows, d, s), &sizes.weights(), &sizes.keys())?;
    Ok((sizes.to_queries(&y)?, shape))
}

/// The gradients of queries, keys and values.
pub(crate) fn attention_back([q, k, v, dy]: [&Tensor; 4], mask: Option<&Tensor>, scale: f32) -> Result<[Tensor; 3]> {
    let sizes = Sizes::new(q.shape(), k.shape())?;
    let device = gpu(q)?;
    let dy = dy.contiguous()?;
    let arranged = |t: &Tensor, of_queries: bool| {
        let (storage, layout) = t.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("attention: not on a GPU") };
        if of_queries { sizes.of_queries((storage, layout)) } else { sizes.of_keys((storage, layout)) }
    };
    let (q_matrices, dy) = (arranged(q, true)?, arranged(&dy, true)?);
    let (k_matrices, v_matrices) = (arranged(k, false)?, arranged(v, false)?);
    let (b, rows, s, d) = sizes.product();
    let (queries, keys, weights) = (sizes.queries(), sizes.keys(), sizes.weights());
    let mut p = q_matrices.matmul(&k_matrices, (b, rows, s, d), &queries, &keys.transpose(1, 2)?)?;
    sizes.softmax(&mut p, mask, scale)?;
    let dv = p.matmul(&dy, (b, s, d, rows), &weights.transpose(1, 2)?, &queries)?;
    let mut dp = dy.matmul(&v_matrices, (b, rows, s, d), &queries, &keys.transpose(1, 2)?)?;
    {
        let (all, columns) = ((b * rows) as i64, s as i32);
        let p = address(&p.as_cuda_slice::<f32>()?.slice(..));
        let function = kernel!(device, F32, "softmax_back_f32");
        let (grid, dp) = (blocks(((b * rows).div_ceil(WARPS), 1, 1), THREADS, 0), dp.as_cuda_slice_mut::<f32>()?);
        launch!(function, grid, &p, dp, &all, &columns, &scale);
    }
    let dq = dp.matmul(&k_matrices, (b, rows, d, s), &weights, &keys)?;
    let dk = dp.matmul(&q_matrices, (b, s, d, rows), &weights.transpose(1, 2)?, &queries)?;
    let tensor = |storage: CudaStorage, like: &Tensor| {
        Tensor::from_storage(Storage::Cuda(storage), like.shape(), BackpropOp::none(), false)
    };
    Ok([tensor(sizes.to_queries(&dq)?, q), tensor(sizes.to_keys(&dk)?, k), tensor(sizes.to_keys(&dv)?, v)])
}
