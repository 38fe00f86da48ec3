//! Attention of some queries at a time, side by side in registers: a number of a key or a value,
//! which need no packing, is multiplied with all of them at once, and their softmax needs no sums
//! across a register.

use std::cell::RefCell;

use pulp::{Arch, Simd, WithSimd};

use super::Heads;
use crate::ops::cpu::exp::exp;
use crate::ops::cpu::gemm_f32::{MAX_PANEL, Strides, in_registers, multiply, registers};

/// The most bytes of keys and values of a head to be read for every panel: they stay in the L2
/// cache.
const NEAR: usize = 1 << 18;
/// Keys whose values are read at a time, a few channels of all and then the next: they stay in the
/// L2 cache.
const KEYS: usize = 256;
/// Rows of a tile where a panel is one register wide.
const HIGH: usize = 12;

/// Whether [`attend`] is fast for `queries` queries, those of all heads of a group, over `keys`
/// keys of size `d`.
pub(super) fn supports(queries: usize, keys: usize, d: usize) -> bool {
    let (lanes, wide) = registers();
    lanes > 1 && (queries <= lanes * wide || 8 * keys * d <= NEAR)
}

/// Some queries of the heads of a group.
pub(super) struct Group<'a> {
    pub(super) q: Heads<'a>,
    pub(super) batch: usize,
    /// The first head, and the number of heads.
    pub(super) heads: (usize, usize),
    /// The first query, and the number of queries.
    pub(super) rows: (usize, usize),
}

/// `softmax(scale * q kᵀ) v` of a group over the first `keys` keys of its head, into `out`
/// (rows, heads, D) with rows `stride` apart. With `behind` the i-th query sees `behind + i + 1`
/// keys, else all.
pub(super) fn attend(
    out: &mut [f32],
    stride: usize,
    group: &Group,
    (k, v): (Heads, Heads),
    keys: usize,
    behind: Option<usize>,
    scale: f32,
) {
    thread_local!(static SCRATCH: RefCell<[Vec<f32>; 2]> = RefCell::default());
    let (lanes, wide) = registers();
    let all = group.rows.1 * group.heads.1;
    let width = if all <= lanes { lanes } else { lanes * wide };
    SCRATCH.with_borrow_mut(|[queries, weights]| {
        queries.resize(width * group.q.d, 0.0);
        weights.resize(width * keys, 0.0);
        for first in (0..all).step_by(width) {
            let panel = Panel { first, count: width.min(all - first), scale };
            let memory = Memory { out: &mut *out, stride, queries, weights };
            Arch::new().dispatch(Attend { panel, group, k, v, behind, memory });
        }
    });
}

/// Some queries of a group: head by head of the first row, then of the next.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    count: usize,
    scale: f32,
}

struct Memory<'a> {
    out: &'a mut [f32],
    stride: usize,
    /// (D, width)
    queries: &'a mut [f32],
    /// (keys, width)
    weights: &'a mut [f32],
}

struct Attend<'a> {
    panel: Panel,
    group: &'a Group<'a>,
    k: Heads<'a>,
    v: Heads<'a>,
    behind: Option<usize>,
    memory: Memory<'a>,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.memory.queries.len() == S::F32_LANES * self.group.q.d {
            true => panel::<S, HIGH, 1>(simd, self),
            false => in_registers!(S, panel(simd, self)),
        }
    }
}

#[inline(always)]
fn panel<S: Simd, const HIGH: usize, const WIDE: usize>(simd: S, attend: Attend) {
    let Attend { panel, group, k, v, behind, memory } = attend;
    let Group { q, batch, heads: (head, heads), rows: (row, _) } = *group;
    let (width, d) = (WIDE * S::F32_LANES, q.d);
    let place = |i: usize| ((panel.first + i) / heads, (panel.first + i) % heads);
    memory.queries.fill(0.0);
    for i in 0..panel.count {
        let (r, h) = place(i);
        let start = batch * q.batch_stride + (row + r) * q.stride + (head + h) * d;
        for (to, x) in memory.queries[i..].iter_mut().step_by(width).zip(&q.data[start..start + d]) {
            *to = x * panel.scale;
        }
    }
    let of_group = |x: Heads<'_>| batch * x.batch_stride + head / heads * d;
    let queries = S::as_simd_f32s(memory.queries).0.as_chunks::<WIDE>().0;
    let strides = Strides { row: k.stride, column: 1 };
    products::<S, HIGH, WIDE>(simd, (&k.data[of_group(k)..], strides), queries, memory.weights, panel, false);

    let mut largest = [f32::NEG_INFINITY; MAX_PANEL];
    let mut sums = [0f32; MAX_PANEL];
    let (largest, sums) = (&mut largest[..width], &mut sums[..width]);
    if let Some(before) = behind {
        for (key, logits) in memory.weights.chunks_exact_mut(width).enumerate().skip(before + place(0).0 + 1) {
            for (i, logit) in logits[..panel.count].iter_mut().enumerate() {
                *logit = if key > before + place(i).0 { f32::NEG_INFINITY } else { *logit };
            }
        }
    }
    for logits in memory.weights.chunks_exact(width) {
        for (largest, x) in largest.iter_mut().zip(logits) {
            *largest = if *x > *largest { *x } else { *largest };
        }
    }
    for logits in memory.weights.chunks_exact_mut(width) {
        for ((x, largest), sum) in logits.iter_mut().zip(&*largest).zip(&mut *sums) {
            *x = exp(*x - largest);
            *sum += *x;
        }
    }

    let weights = S::as_simd_f32s(memory.weights).0.as_chunks::<WIDE>().0;
    let strides = Strides { row: 1, column: v.stride };
    let by_channel = &mut memory.queries[..];
    for (first, weights) in (0..).step_by(KEYS).zip(weights.chunks(KEYS)) {
        let v = &v.data[of_group(v) + first * v.stride..];
        products::<S, HIGH, WIDE>(simd, (v, strides), weights, by_channel, panel, first > 0);
    }
    for (i, sum) in sums[..panel.count].iter().enumerate() {
        let ((r, h), norm) = (place(i), 1.0 / sum);
        let out = &mut memory.out[r * memory.stride + h * d..][..d];
        for (out, x) in out.iter_mut().zip(by_channel[i..].iter().step_by(width)) {
            *out = x * norm;
        }
    }
}

/// The products of all rows of `w` with a panel, written or added to `y` (rows, width).
#[inline(always)]
fn products<S: Simd, const HIGH: usize, const WIDE: usize>(
    simd: S,
    (w, strides): (&[f32], Strides),
    panel: &[[S::f32s; WIDE]],
    y: &mut [f32],
    Panel { count, .. }: Panel,
    add: bool,
) {
    let y = S::as_mut_simd_f32s(y).0.as_chunks_mut::<WIDE>().0;
    let mut row = 0;
    while row < y.len() {
        let (w, y) = (&w[row * strides.row..], &mut y[row..]);
        row += match (y.len(), count.div_ceil(S::F32_LANES)) {
            (left, 1) if left >= HIGH => tile::<S, HIGH, 1, WIDE>(simd, w, strides, panel, y, add),
            (left, _) if left >= HIGH => tile::<S, HIGH, WIDE, WIDE>(simd, w, strides, panel, y, add),
            (left, _) if left >= 4 => tile::<S, 4, WIDE, WIDE>(simd, w, strides, panel, y, add),
            _ => tile::<S, 1, WIDE, WIDE>(simd, w, strides, panel, y, add),
        };
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    w: &[f32],
    strides: Strides,
    panel: &[[S::f32s; WIDE]],
    y: &mut [[S::f32s; WIDE]],
    add: bool,
) -> usize {
    let sums: [[S::f32s; W]; R] = multiply(simd, (w, &[]), strides, panel, false);
    for (y, sums) in y.iter_mut().zip(&sums) {
        for (y, sum) in y.iter_mut().zip(sums) {
            *y = if add { simd.add_f32s(*y, *sum) } else { *sum };
        }
    }
    R
}
