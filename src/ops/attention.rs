//! Scaled dot-product attention with grouped keys and values.

mod panels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::exp::exp;
use super::slice::{self, Borrowed, Into, Matrix, MatrixMut, gemm};
use panels::Group;

/// Fewer query rows than this are not worth a task of their own; more keep too many weights at a time.
const MIN_ROWS: usize = 16;
const MAX_ROWS: usize = 256;
/// Query rows at a time in the backward pass.
const BACKWARD_ROWS: usize = 96;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// All.
    None,
    /// Of T queries after S keys the i-th sees all but the last T - 1 - i: what comes after it.
    Causal,
    /// Those where (T, S) or (B, T, S), u8, is not zero; a query without any gives zeros.
    Kept(&'a Tensor),
}

impl Mask<'_> {
    fn is_causal(self) -> bool {
        matches!(self, Self::Causal)
    }
}

/// `softmax(scale * q kᵀ) v` for q (B, T, H, D) and k, v (B, S, KV, D), where H is a multiple of KV: (B, T, H, D), of
/// q's dtype.
///
/// Keys and values may be views of a cache: any batch and sequence strides, the last two dimensions contiguous; other
/// strides are copied. Errors when the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask, scale: f32) -> Result<Tensor> {
    let (b, t, h, d) = q.dims4()?;
    let (kb, s, kv, kd) = k.dims4()?;
    if (kb, kd) != (b, d) || kv == 0 || h % kv != 0 || v.dims() != k.dims() {
        bail!("attention: queries {:?}, keys {:?} and values {:?} do not fit", q.dims(), k.dims(), v.dims());
    }
    match mask {
        Mask::Kept(m) if m.dtype() != DType::U8 || m.dims() != [t, s] && m.dims() != [b, t, s] => {
            bail!("attention: a {:?} mask {:?} does not fit {t} queries and {s} keys", m.dtype(), m.dims());
        }
        Mask::Causal if t > s => bail!("attention: {t} causal queries have only {s} keys"),
        _ => {}
    }
    #[cfg(feature = "cuda")]
    if on_gpu(q, k, v, mask) {
        let row = |i| Ok((heads_contiguous(&k.narrow(0, i, 1)?)?, heads_contiguous(&v.narrow(0, i, 1)?)?));
        let rows: Vec<(Tensor, Tensor)> = (0..b).map(row).collect::<Result<_>>()?;
        return super::cuda::attention(q, &rows, mask.is_causal(), scale);
    }
    let kept = match mask {
        Mask::None => None,
        Mask::Causal if slice::fused(&[q, k, v]) => None,
        Mask::Causal => Some(causal(t, s, q.device())?),
        Mask::Kept(mask) => Some(mask.contiguous()?),
    };
    if !slice::trained(&[q, k, v]) {
        return plain(q, k, v, kept.as_ref(), scale);
    }
    let lying = if q.device().is_cpu() { heads_contiguous } else { Tensor::contiguous };
    let op = Attention { causal: kept.is_none() && mask.is_causal() && t > 1, mask: kept, scale };
    q.contiguous()?.apply_op3(&lying(k)?, &lying(v)?, op)
}

/// [`attention`] of every row of q (R, T, H, D) over keys and values of its own, each (1, S, KV, D): (R, T, H, D).
///
/// Errors when the shapes do not fit.
pub fn attention_rows(q: &Tensor, rows: &[(Tensor, Tensor)], mask: Mask, scale: f32) -> Result<Tensor> {
    let (r, t, h, d) = q.dims4()?;
    let fits = |(k, v): &(Tensor, Tensor)| match *k.dims() {
        [1, s, kv, kd] => v.dims() == k.dims() && kd == d && kv > 0 && h % kv == 0 && (t <= s || !mask.is_causal()),
        _ => false,
    };
    if r != rows.len() || !rows.iter().all(fits) {
        let keys: Vec<&[usize]> = rows.iter().map(|(k, _)| k.dims()).collect();
        bail!("attention: queries {:?} do not fit the rows of keys {keys:?}", q.dims());
    }
    let attend = |(r, (k, v)): (usize, &(Tensor, Tensor))| attention(&q.narrow(0, r, 1)?, k, v, mask, scale);
    #[cfg(feature = "cuda")]
    if let [(k, _), others @ ..] = rows
        && rows.iter().all(|(k, v)| on_gpu(q, k, v, mask) && heads_lie_together(k) && heads_lie_together(v))
        && others.iter().all(|(other, _)| other.dims()[2] == k.dims()[2])
    {
        return super::cuda::attention(q, rows, mask.is_causal(), scale);
    }
    let outputs: Vec<Tensor> = match q.device().is_cpu() {
        true => rows.par_iter().enumerate().map(attend).collect::<Result<_>>()?,
        false => rows.iter().enumerate().map(attend).collect::<Result<_>>()?,
    };
    Tensor::cat(&outputs, 0)
}

/// Whether there is a kernel for CUDA.
#[cfg(feature = "cuda")]
fn on_gpu(q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask) -> bool {
    super::cuda::takes(&[q, k, v])
        && !matches!(mask, Mask::Kept(_))
        && q.dims().last().is_some_and(|d| super::cuda::HEAD_DIMS.contains(d))
}

/// [`Mask::Causal`] as a mask.
fn causal(t: usize, s: usize, device: &Device) -> Result<Tensor> {
    let keep = (0..t).flat_map(|i| (0..s).map(move |j| u8::from(j + t <= i + s)));
    Tensor::from_iter(keep, device)?.reshape((t, s))
}

fn heads_lie_together(x: &Tensor) -> bool {
    let (dims, stride) = (x.dims(), x.stride());
    let heads = (dims[3] == 1 || stride[3] == 1) && (dims[2] == 1 || stride[2] == dims[3]);
    // The kernels for CUDA take no gaps between positions either.
    heads && (x.device().is_cpu() || dims[1] == 1 || stride[1] == dims[2] * dims[3])
}

fn heads_contiguous(x: &Tensor) -> Result<Tensor> {
    if heads_lie_together(x) { Ok(x.clone()) } else { x.contiguous() }
}

fn plain(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f32) -> Result<Tensor> {
    let (b, _, h, d) = q.dims4()?;
    let (_, s, kv, _) = k.dims4()?;
    let repeat = |x: &Tensor| {
        let x = x.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((b, kv, h / kv, s, d))?;
        x.reshape((b, h, s, d))
    };
    let q = q.transpose(1, 2)?.contiguous()?;
    let logits = (q.matmul(&repeat(k)?.t()?)?.to_dtype(DType::F32)? * f64::from(scale))?;
    let keep = mask.map(|m| {
        let m = m.ne(0u8)?.to_dtype(DType::F32)?;
        if m.rank() == 3 { m.unsqueeze(1) } else { Ok(m) }
    });
    let keep = keep.transpose()?;
    let logits = match &keep {
        Some(keep) => logits.broadcast_add(&((keep - 1.0)? * 1e30)?)?,
        None => logits,
    };
    let e = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    // Only a row without any key to see still has weight on masked ones.
    let p = match &keep {
        Some(keep) => p.broadcast_mul(keep)?,
        None => p,
    };
    p.to_dtype(v.dtype())?.matmul(&repeat(v)?)?.transpose(1, 2)?.contiguous()
}

struct Attention {
    mask: Option<Tensor>,
    causal: bool,
    scale: f32,
}

/// Which keys some queries see.
#[derive(Clone, Copy)]
enum Seen<'a> {
    All,
    /// So many more than the index of the query, and its own.
    Behind(usize),
    /// By the mask's rows, of so many keys.
    Kept(&'a [u8], usize),
}

/// The heads of queries, keys or values, (B, N, heads, D), with the last two dimensions contiguous.
#[derive(Clone, Copy)]
struct Heads<'a> {
    data: &'a [f32],
    n: usize,
    heads: usize,
    d: usize,
    batch_stride: usize,
    stride: usize,
}

impl<'a> Heads<'a> {
    fn new(data: &'a [f32], layout: &Layout) -> Result<Self> {
        let (_, n, heads, d) = layout.shape().dims4()?;
        Ok(Self { data, n, heads, d, batch_stride: layout.stride()[0], stride: layout.stride()[1] })
    }

    /// Rows from `first` on of one head, (rows, D).
    fn rows(&self, batch: usize, head: usize, first: usize, rows: usize) -> Matrix<'a> {
        let start = batch * self.batch_stride + first * self.stride + head * self.d;
        Matrix::strided(&self.data[start..], rows, self.d, self.stride)
    }
}

impl Attention {
    /// The mask's first row of a batch row of `t` queries: (T, S) is one for all.
    fn mask_row(&self, batch: usize, t: usize) -> usize {
        if self.mask.as_ref().is_some_and(|m| m.rank() == 3) { batch * t } else { 0 }
    }

    /// Of `t` queries over `s` keys, the keys that `rows` queries of a batch row from `first` on see: up to which, and
    /// which of them.
    fn seen<'a>(
        &self,
        mask: Option<&'a [u8]>,
        batch: usize,
        (first, rows): (usize, usize),
        (t, s): (usize, usize),
    ) -> (usize, Seen<'a>) {
        let before = s.saturating_sub(t) + first;
        match mask {
            Some(mask) => {
                let mask = &mask[(self.mask_row(batch, t) + first) * s..][..rows * s];
                (last_kept(mask, s), Seen::Kept(mask, s))
            }
            None if self.causal => (before + rows, Seen::Behind(before)),
            None => (s, Seen::All),
        }
    }

    /// The weights of some queries of one head over its keys, into `p` (rows, S).
    fn weights(&self, q: Matrix, k: Matrix, seen: Seen, p: &mut [f32], (rows, s): (usize, usize), all: bool) {
        gemm(MatrixMut::new(p, rows, s), Into::Overwrite, q, k.t(), self.scale, all);
        slice::wide(
            #[inline(always)]
            || {
                for (i, row) in p.chunks_exact_mut(s).enumerate() {
                    match seen {
                        Seen::All => softmax(row),
                        Seen::Behind(before) => {
                            let (row, unseen) = row.split_at_mut(before + i + 1);
                            softmax(row);
                            unseen.fill(0.0);
                        }
                        Seen::Kept(mask, keys) => {
                            for (logit, &keep) in row.iter_mut().zip(&mask[i * keys..]) {
                                *logit = if keep == 0 { f32::NEG_INFINITY } else { *logit };
                            }
                            softmax(row);
                        }
                    }
                }
            },
        );
    }
}

/// How many of `keys` there are up to the last one that any of the mask's rows keeps; one at least.
fn last_kept(mask: &[u8], keys: usize) -> usize {
    let last = |row: &[u8]| row.iter().rposition(|&keep| keep != 0).map_or(1, |last| last + 1);
    mask.chunks_exact(keys).map(last).max().unwrap_or(1)
}

/// In place; a row of nothing but negative infinity becomes zeros, and what is NaN stays so.
#[inline(always)]
fn softmax(row: &mut [f32]) {
    let max = slice::max(row);
    if max == f32::NEG_INFINITY {
        return row.iter_mut().filter(|x| !x.is_nan()).for_each(|x| *x = 0.0);
    }
    for x in row.iter_mut() {
        *x = exp(*x - max);
    }
    let norm = 1.0 / slice::sum(row, row, |x, _| x);
    for x in row {
        *x *= norm;
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        let (b, t, h, d) = l1.shape().dims4()?;
        let q = Heads::new(slice::strided(s1, l1)?, l1)?;
        let (k, v) = (Heads::new(slice::strided(s2, l2)?, l2)?, Heads::new(slice::strided(s3, l3)?, l3)?);
        let (s, group) = (k.n, h / k.heads);
        let mask = self.mask.as_ref().map(Borrowed::of);
        let mask = mask.as_ref().map(Borrowed::slice::<u8>).transpose()?;
        // By nothing that the number of threads changes.
        let side_by_side = mask.is_none() && panels::suits(t * group, s, d);
        // A task writes whole rows, all heads of them, or, where there is but one row, the heads of one group.
        let blocks = (4 * rayon::current_num_threads()).div_ceil(b).clamp(1, t.div_ceil(MIN_ROWS));
        let rows = t.div_ceil(blocks).min(MAX_ROWS);
        let task = if t == 1 { group * d } else { rows * h * d };
        let mut out = vec![0f32; b * t * h * d];
        out.par_chunks_mut(t * h * d).enumerate().for_each(|(bi, out)| {
            let tasks = out.par_chunks_mut(task).enumerate();
            tasks.for_each_init(Vec::new, |p: &mut Vec<f32>, (i, out)| {
                let (first, heads) = if t == 1 { (0, i * group..(i + 1) * group) } else { (i * rows, 0..h) };
                let stride = heads.len() * d;
                let rows = out.len() / stride;
                let (keys, seen) = self.seen(mask, bi, (first, rows), (t, s));
                if side_by_side {
                    let behind = if let Seen::Behind(before) = seen { Some(before) } else { None };
                    for (j, head) in heads.step_by(group).enumerate() {
                        let group = Group { q, batch: bi, heads: (head, group), rows: (first, rows) };
                        let out = &mut out[j * group.heads.1 * d..];
                        panels::attend(out, stride, &group, (k, v), keys, behind, self.scale);
                    }
                    return;
                }
                p.resize(rows * s, 0.0);
                let p = &mut p[..rows * keys];
                for (j, head) in heads.enumerate() {
                    let (q, k) = (q.rows(bi, head, first, rows), k.rows(bi, head / group, 0, keys));
                    self.weights(q, k, seen, p, (rows, keys), false);
                    let v = v.rows(bi, head / group, 0, keys);
                    let out = MatrixMut::strided(&mut out[j * d..], rows, d, stride);
                    gemm(out, Into::Overwrite, Matrix::new(p, rows, keys), v, 1.0, false);
                }
            });
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
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
        super::cuda::training::attention((s1, l1), (s2, l2), (s3, l3), self.mask.as_ref(), self.scale)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let [dq, dk, dv] = super::cuda::training::attention_back([q, k, v, dy], self.mask.as_ref(), self.scale)?;
            return Ok((Some(dq), Some(dk), Some(dv)));
        }
        let dy = dy.contiguous()?;
        let (b, t, h, d) = q.dims4()?;
        let (_, s, kv, _) = k.dims4()?;
        let group = h / kv;
        let (bq, bk, bv, bdy) = (Borrowed::of(q), Borrowed::of(k), Borrowed::of(v), Borrowed::of(&dy));
        let (qs, dys) = (Heads::new(bq.strided()?, q.layout())?, Heads::new(bdy.strided()?, dy.layout())?);
        let (ks, vs) = (Heads::new(bk.strided()?, k.layout())?, Heads::new(bv.strided()?, v.layout())?);
        let mask = self.mask.as_ref().map(Borrowed::of);
        let mask = mask.as_ref().map(Borrowed::slice::<u8>).transpose()?;
        let mut dq = vec![0f32; b * t * h * d];
        let (mut dk, mut dv) = (vec![0f32; b * s * kv * d], vec![0f32; b * s * kv * d]);
        // Batch rows share nothing; where they are too few for all threads, the products split instead.
        let all = b < rayon::current_num_threads();
        let (row, key) = (h * d, kv * d);
        let rows = t.min(BACKWARD_ROWS);
        let grads = dq.par_chunks_mut(t * row).zip(dk.par_chunks_mut(s * key)).zip(dv.par_chunks_mut(s * key));
        grads.enumerate().for_each_init(
            || (vec![0f32; rows * s], vec![0f32; rows * s]),
            |(p, dp), (bi, ((dq, dk), dv))| {
                // A block of queries sees the keys up to the last of them at most.
                for (first, dq) in (0..t).step_by(rows).zip(dq.chunks_mut(rows * row)) {
                    let rows = dq.len() / row;
                    let (keys, seen) = self.seen(mask, bi, (first, rows), (t, s));
                    let (p, dp) = (&mut p[..rows * keys], &mut dp[..rows * keys]);
                    for head in 0..h {
                        let (q, dy) = (qs.rows(bi, head, first, rows), dys.rows(bi, head, first, rows));
                        let (k, v) = (ks.rows(bi, head / group, 0, keys), vs.rows(bi, head / group, 0, keys));
                        let at = head / group * d;
                        self.weights(q, k, seen, p, (rows, keys), all);
                        let dv = MatrixMut::strided(&mut dv[at..], keys, d, key);
                        gemm(dv, Into::Add, Matrix::new(p, rows, keys).t(), dy, 1.0, all);
                        gemm(MatrixMut::new(dp, rows, keys), Into::Overwrite, dy, v.t(), 1.0, all);
                        for (p, dp) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)) {
                            let mean = slice::sum(p, dp, |p, dp| p * dp);
                            dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - mean) * self.scale);
                        }
                        let dlogits = Matrix::new(dp, rows, keys);
                        let dq = MatrixMut::strided(&mut dq[head * d..], rows, d, row);
                        gemm(dq, Into::Overwrite, dlogits, k, 1.0, all);
                        gemm(MatrixMut::strided(&mut dk[at..], keys, d, key), Into::Add, dlogits.t(), q, 1.0, all);
                    }
                }
            },
        );
        Ok((slice::gradient(q, dq)?, slice::gradient(k, dk)?, slice::gradient(v, dv)?))
    }
}

#[cfg(test)]
mod tests;
