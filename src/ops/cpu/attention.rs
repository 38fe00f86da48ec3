//! Attention of f32 queries, keys and values: by matrix products of one head at a time or, where
//! that is faster, with the queries of a group side by side ([`panel`]).

mod panel;

use candle_core::{Layout, Result};
use rayon::prelude::*;

use super::exp::exp;
use super::gemm::{Matrix, MatrixMut, Update, gemm};
use super::reduce::{self, vectorized};
use panel::Group;

/// Query rows per task: fewer are not worth waking a thread, and more would need much memory for
/// logits.
const MIN_ROWS: usize = 16;
const MAX_ROWS: usize = 256;
/// Query rows at a time in the backward pass.
const BACKWARD_ROWS: usize = 96;

/// The heads of queries, keys or values, (B, N, heads, D), the last two dimensions contiguous.
#[derive(Clone, Copy)]
pub(crate) struct Heads<'a> {
    data: &'a [f32],
    n: usize,
    heads: usize,
    d: usize,
    batch_stride: usize,
    stride: usize,
}

impl<'a> Heads<'a> {
    /// `data` begins with the first element.
    pub(crate) fn new(data: &'a [f32], layout: &Layout) -> Result<Self> {
        let (_, n, heads, d) = layout.shape().dims4()?;
        Ok(Self { data, n, heads, d, batch_stride: layout.stride()[0], stride: layout.stride()[1] })
    }

    /// `n` rows of every batch row, `stride` apart, each of which begins with the heads.
    pub(crate) fn of_rows(data: &'a [f32], n: usize, (heads, d): (usize, usize), stride: usize) -> Self {
        Self { data, n, heads, d, batch_stride: n * stride, stride }
    }

    /// Contiguous data of the same shape.
    fn with_data(self, data: &'a [f32]) -> Self {
        let stride = self.heads * self.d;
        Self { data, batch_stride: self.n * stride, stride, ..self }
    }

    /// Rows from `first` on of one head, (rows, D).
    fn rows(&self, batch: usize, head: usize, first: usize, rows: usize) -> Matrix<'a> {
        let start = batch * self.batch_stride + first * self.stride + head * self.d;
        Matrix::strided(&self.data[start..], rows, self.d, self.stride)
    }
}

/// Which keys the queries see.
#[derive(Clone, Copy)]
pub(crate) enum Visible<'a> {
    All,
    /// Of T queries over S keys the i-th sees the first S - T + i + 1.
    Causal,
    /// Those where the mask (T, S) is not zero.
    Mask(&'a [u8]),
    /// The same with a mask (T, S) for every batch row.
    BatchMask(&'a [u8]),
}

/// Which keys some rows of queries see.
#[derive(Clone, Copy)]
enum RowsVisible<'a> {
    All,
    /// As many as the index of the query, plus 1, plus this.
    Behind(usize),
    /// By the rows of a mask with `keys` keys.
    Mask(&'a [u8], usize),
}

impl<'a> Visible<'a> {
    /// For `rows` queries of a batch row from `first` on, of `t` over `s` keys: how many keys they
    /// see at most, and which of them.
    fn rows(self, batch: usize, (first, rows): (usize, usize), (t, s): (usize, usize)) -> (usize, RowsVisible<'a>) {
        let masked = |mask: &'a [u8], start: usize| {
            let mask = &mask[start * s..][..rows * s];
            (last_kept(mask, s), RowsVisible::Mask(mask, s))
        };
        match self {
            Self::All => (s, RowsVisible::All),
            Self::Causal => {
                let before = s.saturating_sub(t) + first;
                (before + rows, RowsVisible::Behind(before))
            }
            Self::Mask(mask) => masked(mask, first),
            Self::BatchMask(mask) => masked(mask, batch * t + first),
        }
    }
}

/// Number of `keys` up to the last one that any row of the mask allows; at least one.
fn last_kept(mask: &[u8], keys: usize) -> usize {
    let last = |row: &[u8]| row.iter().rposition(|&keep| keep != 0).map_or(1, |last| last + 1);
    mask.chunks_exact(keys).map(last).max().unwrap_or(1)
}

/// `softmax(scale * q kᵀ) v` for q (batch, T, H, D) and k, v (batch, S, KV, D): (batch, T, H, D),
/// contiguous.
pub(crate) fn attend((q, k, v): (Heads, Heads, Heads), batch: usize, visible: Visible, scale: f32) -> Vec<f32> {
    let (t, h, d) = (q.n, q.heads, q.d);
    let (s, group) = (k.n, h / k.heads);
    let masked = matches!(visible, Visible::Mask(_) | Visible::BatchMask(_));
    // Nothing here depends on the number of threads.
    let side_by_side = !masked && panel::supports(t * group, s, d);
    // A task writes whole rows, all heads of them, or, of a single row, the heads of one group.
    let blocks = (4 * rayon::current_num_threads()).div_ceil(batch).clamp(1, t.div_ceil(MIN_ROWS));
    let rows = t.div_ceil(blocks).min(MAX_ROWS);
    let task = if t == 1 { group * d } else { rows * h * d };
    let mut out = vec![0f32; batch * t * h * d];
    out.par_chunks_mut(t * h * d).enumerate().for_each(|(bi, out)| {
        let tasks = out.par_chunks_mut(task).enumerate();
        tasks.for_each_init(Vec::new, |p: &mut Vec<f32>, (i, out)| {
            let (first, heads) = if t == 1 { (0, i * group..(i + 1) * group) } else { (i * rows, 0..h) };
            let stride = heads.len() * d;
            let rows = out.len() / stride;
            let (keys, visible) = visible.rows(bi, (first, rows), (t, s));
            if side_by_side {
                let behind = if let RowsVisible::Behind(before) = visible { Some(before) } else { None };
                for (j, head) in heads.step_by(group).enumerate() {
                    let group = Group { q, batch: bi, heads: (head, group), rows: (first, rows) };
                    let out = &mut out[j * group.heads.1 * d..];
                    panel::attend(out, stride, &group, (k, v), keys, behind, scale);
                }
                return;
            }
            p.resize(rows * s, 0.0);
            let p = &mut p[..rows * keys];
            for (j, head) in heads.enumerate() {
                let (q, k) = (q.rows(bi, head, first, rows), k.rows(bi, head / group, 0, keys));
                probabilities(q, k, visible, p, (rows, keys), scale, false);
                let v = v.rows(bi, head / group, 0, keys);
                let out = MatrixMut::strided(&mut out[j * d..], rows, d, stride);
                gemm(out, Update::Overwrite, Matrix::new(p, rows, keys), v, 1.0, false);
            }
        });
    });
    out
}

/// The gradients of q, k and v for the gradient `dy` of [`attend`]'s result, contiguous.
pub(crate) fn attend_back(
    (q, k, v): (Heads, Heads, Heads),
    dy: &[f32],
    batch: usize,
    visible: Visible,
    scale: f32,
) -> [Vec<f32>; 3] {
    let (t, h, d, s, kv) = (q.n, q.heads, q.d, k.n, k.heads);
    let (group, dy) = (h / kv, q.with_data(dy));
    let mut dq = vec![0f32; batch * t * h * d];
    let (mut dk, mut dv) = (vec![0f32; batch * s * kv * d], vec![0f32; batch * s * kv * d]);
    // Batch rows share nothing; where they are too few for all threads, the products are split
    // instead.
    let parallel = batch < rayon::current_num_threads();
    let (row, key) = (h * d, kv * d);
    let rows = t.min(BACKWARD_ROWS);
    let grads = dq.par_chunks_mut(t * row).zip(dk.par_chunks_mut(s * key)).zip(dv.par_chunks_mut(s * key));
    grads.enumerate().for_each_init(
        || (vec![0f32; rows * s], vec![0f32; rows * s]),
        |(p, dp), (bi, ((dq, dk), dv))| {
            for (first, dq) in (0..t).step_by(rows).zip(dq.chunks_mut(rows * row)) {
                let rows = dq.len() / row;
                let (keys, visible) = visible.rows(bi, (first, rows), (t, s));
                let (p, dp) = (&mut p[..rows * keys], &mut dp[..rows * keys]);
                for head in 0..h {
                    let (q, dy) = (q.rows(bi, head, first, rows), dy.rows(bi, head, first, rows));
                    let (k, v) = (k.rows(bi, head / group, 0, keys), v.rows(bi, head / group, 0, keys));
                    let at = head / group * d;
                    probabilities(q, k, visible, p, (rows, keys), scale, parallel);
                    let dv = MatrixMut::strided(&mut dv[at..], keys, d, key);
                    gemm(dv, Update::Add, Matrix::new(p, rows, keys).t(), dy, 1.0, parallel);
                    gemm(MatrixMut::new(dp, rows, keys), Update::Overwrite, dy, v.t(), 1.0, parallel);
                    for (p, dp) in p.chunks_exact(keys).zip(dp.chunks_exact_mut(keys)) {
                        let mean = reduce::sum(p, dp, |p, dp| p * dp);
                        dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - mean) * scale);
                    }
                    let dlogits = Matrix::new(dp, rows, keys);
                    let dq = MatrixMut::strided(&mut dq[head * d..], rows, d, row);
                    gemm(dq, Update::Overwrite, dlogits, k, 1.0, parallel);
                    let dk = MatrixMut::strided(&mut dk[at..], keys, d, key);
                    gemm(dk, Update::Add, dlogits.t(), q, 1.0, parallel);
                }
            }
        },
    );
    [dq, dk, dv]
}

/// The softmax of some queries of one head over its keys, into `p` (rows, keys).
fn probabilities(
    q: Matrix,
    k: Matrix,
    visible: RowsVisible,
    p: &mut [f32],
    (rows, keys): (usize, usize),
    scale: f32,
    parallel: bool,
) {
    gemm(MatrixMut::new(p, rows, keys), Update::Overwrite, q, k.t(), scale, parallel);
    vectorized(
        #[inline(always)]
        || {
            for (i, row) in p.chunks_exact_mut(keys).enumerate() {
                match visible {
                    RowsVisible::All => softmax(row),
                    RowsVisible::Behind(before) => {
                        let (row, hidden) = row.split_at_mut(before + i + 1);
                        softmax(row);
                        hidden.fill(0.0);
                    }
                    RowsVisible::Mask(mask, stride) => {
                        for (logit, &keep) in row.iter_mut().zip(&mask[i * stride..]) {
                            *logit = if keep == 0 { f32::NEG_INFINITY } else { *logit };
                        }
                        softmax(row);
                    }
                }
            }
        },
    );
}

/// In place. A row of negative infinity becomes zeros, and NaN stays NaN.
#[inline(always)]
fn softmax(row: &mut [f32]) {
    let max = reduce::max(row);
    if max == f32::NEG_INFINITY {
        return row.iter_mut().filter(|x| !x.is_nan()).for_each(|x| *x = 0.0);
    }
    for x in row.iter_mut() {
        *x = exp(*x - max);
    }
    let norm = 1.0 / reduce::sum(row, row, |x, _| x);
    for x in row {
        *x *= norm;
    }
}
