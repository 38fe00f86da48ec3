//! GEMM with bf16 products and f32 sums, on CPUs with AVX-512 BF16.
//!
//! Activations are packed into panels of 48 rows: for every pair of columns, that pair of all 48
//! rows side by side. A pair of a row of weights, which need no packing, is multiplied with 48 rows
//! at once, and the sums of eight rows of weights with 48 of activations stay in registers.
//! Gradients multiply the columns of a matrix in place of its rows.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

use super::avx512::{LANES, Pairs, as_floats, as_pairs, load, load_pairs, round, store, store_bytes, supports_bf16};
use super::columns::{Columns, by_columns};
use super::exp::sigmoid;
use super::pack_bf16::{PANEL, WIDE, pack, pack_columns, padded};
use super::packed_blocks::PackedBlocks;

/// Rows of weights whose sums are in registers.
const HIGH: usize = 8;
/// Rows of weights per task, if there are enough for all threads, and if not.
const TASK: [usize; 2] = [128, 64];
/// Columns that are summed before the accumulators are spilled: a panel of this many stays in the
/// L2 cache.
const DEEP: usize = 5120;
/// The same for blocks, whose rows are rounded to bf16 first.
const DEEP_BLOCKS: usize = 1024;
/// Rows of activations that are packed at a time, to bound the memory for it.
const PACKED: usize = 20 * PANEL;

/// The accumulators of [`HIGH`] rows of weights with a panel.
type Accumulators = [[__m512; WIDE]; HIGH];
/// The same in memory.
type Spilled = [[[f32; LANES]; WIDE]; HIGH];

/// What happens to the products of a row of weights.
#[derive(Clone, Copy)]
pub(crate) enum Epilogue<'a> {
    /// Adds the row's bias, if any.
    Bias(Option<&'a [f32]>),
    /// SwiGLU: `silu` of them, times the products of the same row of these weights.
    Gate(Weights<'a>),
}

/// Rows of weights.
#[derive(Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// The bytes of bf16.
    Bf16(&'a [u8]),
    /// Blocks, which are rounded to bf16.
    Packed(&'a PackedBlocks),
}

/// `x wᵀ` for x (M, columns) and `w` (rows, columns), and the epilogue: (M, rows) in `y`. Both
/// factors are rounded to bf16.
///
/// Panics unless [`supports_bf16`].
pub(crate) fn gemm_bf16(
    y: &mut [MaybeUninit<f32>],
    w: Weights,
    epilogue: Epilogue,
    x: &[f32],
    columns: usize,
) -> Result<()> {
    multiply(y, w, epilogue, x.len() / columns, columns, |panel, rows| {
        // SAFETY: `multiply` has checked the CPU features.
        #[allow(unsafe_code)]
        unsafe {
            pack(panel, &x[rows.start * columns..rows.end * columns], columns)
        }
    })
}

/// `xᵀ wᵀ` for x (n, count) and rows `w` of bf16 that are `padded(n)` long: (count, rows) in `y`.
///
/// Panics unless `count` is a multiple of 16.
pub(crate) fn gemm_columns(y: &mut [MaybeUninit<f32>], w: &[u8], x: &[f32], (n, count): (usize, usize)) -> Result<()> {
    assert!(count.is_multiple_of(LANES) && x.len() == n * count, "columns have to fill registers");
    multiply(y, Weights::Bf16(w), Epilogue::Bias(None), count, padded(n), |panel, columns| {
        // SAFETY: `multiply` has checked the CPU features.
        #[allow(unsafe_code)]
        unsafe {
            pack_columns(panel, x, count, columns)
        }
    })
}

/// `pack` fills a panel from a range of the `count` rows of activations.
fn multiply(
    y: &mut [MaybeUninit<f32>],
    w: Weights,
    epilogue: Epilogue,
    count: usize,
    columns: usize,
    pack: impl Fn(&mut [Pairs], Range<usize>) + Sync,
) -> Result<()> {
    assert!(supports_bf16(columns), "a bf16 product that is not supported");
    let rows = match w {
        Weights::Bf16(w) => w.len() / (2 * columns),
        Weights::Packed(w) => w.shape().0,
    };
    let task = TASK[usize::from(rows < 4 * TASK[0] * rayon::current_num_threads())];
    let registers = WIDE * columns / 2;
    let mut panels: Vec<Pairs> = Vec::new();
    for (i, y) in y.chunks_mut(PACKED * rows).enumerate() {
        let packed = i * PACKED..count.min((i + 1) * PACKED);
        panels.resize(packed.len().div_ceil(PANEL) * registers, [0; _]);
        panels.par_chunks_exact_mut(registers).enumerate().for_each(|(j, panel)| {
            let first = packed.start + j * PANEL;
            pack(panel, first..packed.end.min(first + PANEL));
        });
        by_columns(y, rows, task, |y| {
            let range = y.first()..y.first() + y.width();
            let (up, bias) = match epilogue {
                Epilogue::Bias(bias) => (None, bias.map(|bias| &bias[range.clone()])),
                Epilogue::Gate(up) => (Some(up), None),
            };
            let part = |weights| Part { weights, rows: range.clone(), columns };
            let (w, up) = (part(w), up.map(part));
            // SAFETY: the assertion has checked the CPU features.
            #[allow(unsafe_code)]
            unsafe {
                block(y, w, up, bias, &panels, packed.len())
            }
        })?;
    }
    Ok(())
}

/// Some rows of weights.
struct Part<'a> {
    weights: Weights<'a>,
    rows: Range<usize>,
    columns: usize,
}

impl Part<'_> {
    /// `deep` columns from `at` on as bf16, and the bytes from row to row.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn rounded<'a>(
        &'a self,
        at: usize,
        deep: usize,
        Rounded { blocks, floats, out }: &'a mut Rounded,
    ) -> Result<(&'a [u8], usize)> {
        let w = match self.weights {
            Weights::Bf16(w) => {
                let row = 2 * self.columns;
                return Ok((&w[self.rows.start * row..self.rows.end * row][2 * at..], row));
            }
            Weights::Packed(w) => w,
        };
        floats.resize(deep, 0.0);
        out.resize(self.rows.len() * deep * 2, 0);
        for (row, out) in self.rows.clone().zip(out.chunks_exact_mut(deep * 2)) {
            w.dequantize_row(row, at..at + deep, blocks, floats)?;
            for (x, out) in floats.as_chunks::<{ 2 * LANES }>().0.iter().zip(out.as_chunks_mut::<64>().0) {
                let x = x.as_chunks::<LANES>().0;
                store_bytes(out, round(load(&x[0]), load(&x[1])));
            }
        }
        Ok((out, deep * 2))
    }
}

/// Buffers for rounding weights: blocks and numbers of a row, and the result.
#[derive(Default)]
struct Rounded {
    blocks: Vec<u8>,
    floats: Vec<f32>,
    out: Vec<u8>,
}

/// A thread's buffers, for either matrix: spilled accumulators, and rounded weights.
#[derive(Default)]
struct Scratch {
    spilled: [Vec<Spilled>; 2],
    rounded: [Rounded; 2],
}

/// Some rows of weights, or of two matrices, with all `count` rows of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn block(
    y: &mut Columns,
    w: Part,
    up: Option<Part>,
    bias: Option<&[f32]>,
    panels: &[Pairs],
    count: usize,
) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(|Scratch { spilled, rounded }| {
        let (width, columns) = (y.width(), w.columns);
        let most = if matches!(w.weights, Weights::Bf16(_)) { DEEP } else { DEEP_BLOCKS };
        // Parts of the same size, in whole blocks of every type.
        let deep = columns.div_ceil(columns.div_ceil(most)).next_multiple_of(256);
        let groups = width.div_ceil(HIGH);
        let [spilled, up_spilled] = spilled;
        let [scratch, up_scratch] = rounded;
        for at in (0..columns).step_by(deep) {
            let deep = deep.min(columns - at);
            let (first, last) = (at == 0, at + deep == columns);
            let w = w.rounded(at, deep, scratch)?;
            let up = up.as_ref().map(|up| up.rounded(at, deep, up_scratch)).transpose()?;
            if !last {
                let all = panels.len() / (WIDE * columns / 2) * groups;
                spilled.resize(all, [[[0.0; LANES]; WIDE]; HIGH]);
                up_spilled.resize(if up.is_some() { all } else { 0 }, [[[0.0; LANES]; WIDE]; HIGH]);
            }
            for (i, panel) in panels.chunks_exact(WIDE * columns / 2).enumerate() {
                let panel = panel[at / 2 * WIDE..][..deep / 2 * WIDE].as_chunks::<WIDE>().0;
                let inputs = i * PANEL..count.min((i + 1) * PANEL);
                for group in 0..groups {
                    let rows = group * HIGH..width.min((group + 1) * HIGH);
                    let accumulate = |(w, stride): (&[u8], usize), spilled: &mut [Spilled]| {
                        let mut sums = [[_mm512_setzero_ps(); WIDE]; HIGH];
                        if !first {
                            load_accumulators(&mut sums, &spilled[i * groups + group]);
                        }
                        tiles(&mut sums, &w[rows.start * stride..], stride, rows.len(), panel, inputs.len());
                        if !last {
                            store_accumulators(&mut spilled[i * groups + group], &sums);
                        }
                        sums
                    };
                    let mut sums = accumulate(w, spilled);
                    if let Some(up) = up {
                        let up = accumulate(up, up_spilled);
                        if last {
                            gate(&mut sums, &up);
                        }
                    }
                    if last {
                        let bias = bias.map_or(&[][..], |bias| &bias[rows.clone()]);
                        write(y, inputs.clone(), rows, &sums, bias);
                    }
                }
            }
        }
        Ok(())
    })
}

#[target_feature(enable = "avx512f")]
fn load_accumulators(sums: &mut Accumulators, spilled: &Spilled) {
    for (sum, spilled) in sums.as_flattened_mut().iter_mut().zip(spilled.as_flattened()) {
        *sum = load(spilled);
    }
}

#[target_feature(enable = "avx512f")]
fn store_accumulators(spilled: &mut Spilled, sums: &Accumulators) {
    for (spilled, sum) in spilled.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        store(spilled, *sum);
    }
}

/// `silu` of the sums, times those of the other matrix.
#[target_feature(enable = "avx512f")]
fn gate(sums: &mut Accumulators, up: &Accumulators) {
    for (sum, up) in sums.as_flattened_mut().iter_mut().zip(up.as_flattened()) {
        let (mut x, mut times) = ([0f32; LANES], [0f32; LANES]);
        store(&mut x, *sum);
        store(&mut times, *up);
        for (x, times) in x.iter_mut().zip(times) {
            *x = *x * sigmoid(*x) * times;
        }
        *sum = load(&x);
    }
}

/// Adds the products of up to [`HIGH`] `rows` of weights, `stride` bytes apart, with the first
/// `inputs` rows of a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tiles(sums: &mut Accumulators, w: &[u8], stride: usize, rows: usize, panel: &[[Pairs; WIDE]], inputs: usize) {
    match (rows, inputs.div_ceil(LANES)) {
        (HIGH, 1) => tile::<HIGH, 1>(sums, w, stride, panel),
        (HIGH, 2) => tile::<HIGH, 2>(sums, w, stride, panel),
        (HIGH, _) => tile::<HIGH, WIDE>(sums, w, stride, panel),
        _ => {
            for (r, sums) in sums[..rows].iter_mut().enumerate() {
                tile::<1, WIDE>(std::array::from_mut(sums), &w[r * stride..], stride, panel);
            }
        }
    }
}

/// Adds the products of `R` rows of weights, `stride` bytes apart, with `W` registers of a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tile<const R: usize, const W: usize>(
    accumulators: &mut [[__m512; WIDE]; R],
    w: &[u8],
    stride: usize,
    panel: &[[Pairs; WIDE]],
) {
    assert!(w.len() >= (R - 1) * stride + 4 * panel.len(), "rows that are too short");
    let mut sums: [[__m512; W]; R] = [[_mm512_setzero_ps(); W]; R];
    for r in 0..R {
        for i in 0..W {
            sums[r][i] = accumulators[r][i];
        }
    }
    let mut pairs = w.as_ptr().cast::<i32>();
    for inputs in panel {
        let mut x = [_mm512_setzero_ps(); W];
        for i in 0..W {
            x[i] = as_floats(load_pairs(&inputs[i]));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the r-th row has a pair for every one of the panel, as asserted above. A
            // slice of each row would be checked at every step.
            #[allow(unsafe_code)]
            let pair = unsafe { pairs.byte_add(r * stride).read_unaligned() };
            let pair = _mm512_castsi512_ps(_mm512_set1_epi32(pair));
            for i in 0..W {
                sums[i] = _mm512_dpbf16_ps(sums[i], as_pairs(x[i]), as_pairs(pair));
            }
        }
        pairs = pairs.wrapping_add(1);
    }
    for r in 0..R {
        for i in 0..W {
            accumulators[r][i] = sums[r][i];
        }
    }
}

/// Writes sums (rows, inputs), plus a bias per row, if any, transposed: to (inputs, rows) in `y`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn write(y: &mut Columns, inputs: Range<usize>, rows: Range<usize>, sums: &Accumulators, bias: &[f32]) {
    let mut twice = [0f32; LANES];
    twice.chunks_exact_mut(HIGH).for_each(|b| b[..bias.len()].copy_from_slice(bias));
    let twice = load(&twice);
    let pd = |x| _mm512_castps_pd(x);
    // From two registers with four inputs of four rows each: two inputs, all rows of the first
    // before those of the second.
    let pick = [_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)];
    for (i, at) in inputs.clone().step_by(LANES).enumerate() {
        // Input 4q + c of four rows is quarter q of the c-th register.
        let four = |first: usize| {
            let [a, b, c, d] = std::array::from_fn(|r| sums[first + r][i]);
            let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (more_low, more_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            [
                _mm512_unpacklo_pd(pd(low), pd(more_low)),
                _mm512_unpackhi_pd(pd(low), pd(more_low)),
                _mm512_unpacklo_pd(pd(high), pd(more_high)),
                _mm512_unpackhi_pd(pd(high), pd(more_high)),
            ]
        };
        let (low, high) = (four(0), four(HIGH / 2));
        for c in 0..4 {
            for (half, pick) in pick.into_iter().enumerate() {
                let two = _mm512_castpd_ps(_mm512_permutex2var_pd(low[c], pick, high[c]));
                let mut out = [0f32; LANES];
                store(&mut out, _mm512_add_ps(two, twice));
                for (j, out) in out.chunks_exact(HIGH).enumerate() {
                    let input = at + 8 * half + 4 * j + c;
                    match rows.len() {
                        _ if input >= inputs.end => {}
                        // A copy of constant length compiles to a move.
                        HIGH => y.put(input, rows.start, out.first_chunk::<HIGH>().unwrap_or(&[0.0; _])),
                        rows_left => y.put(input, rows.start, &out[..rows_left]),
                    }
                }
            }
        }
    }
}
