//! `x wᵀ` for many inputs on processors with AVX-512 BF16: in f32, or with bf16 products and f32 sums.
//!
//! The inputs are laid out in panels of 48: for every column 48 numbers side by side, or, rounded to bf16, for every pair
//! of neighbouring columns 48 such pairs. A number or pair of a row of weights, which needs no layout, is then multiplied
//! with 48 inputs at once, and eight rows of weights with 48 inputs keep their sums in registers until they are written. For gradients the columns of a
//! matrix are multiplied instead of its rows.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::activation::sigmoid;
use super::avx512::{LANES, Pairs, as_floats, as_pairs, load, load_pairs, round, store, store_bytes};
use super::blocks::dequantise;
use super::columns::{Columns, by_columns};
use super::layout::{PANEL, WIDE, lay_out, lay_out_columns, padded};

/// Rows of weights whose sums are in registers.
const HIGH: usize = 8;
/// Rows of weights that one thread takes at a time, if there are enough for all threads, and if not.
const ROWS: [usize; 2] = [128, 64];
/// Columns that are summed before the sums are put down: a panel of so many, of two bytes or four, stays in the
/// second-level cache.
const DEEP: [usize; 2] = [5120, 2560];
/// The same for blocks, whose rows are rounded to bf16 before.
const DEEP_BLOCKS: usize = 1024;
/// Inputs that are laid out at a time, to bound the memory for it.
const INPUTS: usize = 20 * PANEL;

/// The sums of [`HIGH`] rows with a panel.
type Sums = [[__m512; WIDE]; HIGH];

/// Columns that share the lane of a register: two of bf16, one of f32.
fn shared(dtype: GgmlDType) -> usize {
    if dtype == GgmlDType::F32 { 1 } else { 2 }
}

/// Whether this processor and these weights are what [`products`] is for.
pub(super) fn suits(dtype: GgmlDType, columns: usize) -> bool {
    matches!(dtype, GgmlDType::F32 | GgmlDType::BF16 | GgmlDType::Q8_0 | GgmlDType::Q4K)
        && columns > 0
        && columns.is_multiple_of(2 * LANES)
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// What becomes of the products of a row.
#[derive(Clone, Copy)]
pub(super) enum Then<'a> {
    /// They are the result, plus the row's bias, if there is any.
    Add(Option<&'a [f32]>),
    /// `x * sigmoid(x)` of them times the products of the same row of other weights of the same type.
    Gate(&'a [u8]),
}

/// The products of every one of the `inputs`, `columns` long, with all rows of `w`, blocks of `dtype`, and what is `then`
/// done with them: (inputs, rows) in `y`. Unless weights are F32, inputs and numbers in blocks are rounded to bf16.
///
/// Errors: blocks that do not divide `columns`. Panics unless it [`suits`].
pub(super) fn products(
    y: &mut [MaybeUninit<f32>],
    w: (&[u8], GgmlDType),
    then: Then,
    inputs: &[f32],
    columns: usize,
) -> Result<()> {
    multiply(y, w, then, inputs.len() / columns, columns, |panel, range| {
        let inputs = &inputs[range.start * columns..range.end * columns];
        // SAFETY (here and below): `multiply` has asked the processor for what this is compiled for.
        #[allow(unsafe_code)]
        unsafe {
            match w.1 {
                GgmlDType::F32 => lay_out::<false>(panel, inputs, columns),
                _ => lay_out::<true>(panel, inputs, columns),
            }
        }
    })
}

/// As [`products`] of the columns of `inputs` (N, count) with rows of bf16 that are `padded(N)` long: (count, rows) in `y`.
///
/// Panics unless `count` is a multiple of 16.
pub(super) fn products_of_columns(
    y: &mut [MaybeUninit<f32>],
    w: &[u8],
    inputs: &[f32],
    (n, count): (usize, usize),
) -> Result<()> {
    assert!(count.is_multiple_of(LANES) && inputs.len() == n * count, "columns that do not fill registers");
    multiply(y, (w, GgmlDType::BF16), Then::Add(None), count, padded(n), |panel, range| {
        #[allow(unsafe_code)]
        unsafe {
            lay_out_columns(panel, inputs, count, range)
        }
    })
}

fn multiply(
    y: &mut [MaybeUninit<f32>],
    (w, dtype): (&[u8], GgmlDType),
    then: Then,
    count: usize,
    columns: usize,
    lay_out: impl Fn(&mut [Pairs], Range<usize>) + Sync,
) -> Result<()> {
    assert!(suits(dtype, columns), "a product that this processor has not");
    let bytes = columns / dtype.block_size() * dtype.type_size();
    let rows = w.len() / bytes;
    let at_once = ROWS[usize::from(rows < 4 * ROWS[0] * rayon::current_num_threads())];
    let registers = WIDE * columns / shared(dtype);
    let mut panels: Vec<Pairs> = Vec::new();
    for (i, y) in y.chunks_mut(INPUTS * rows).enumerate() {
        let inputs = i * INPUTS..count.min((i + 1) * INPUTS);
        panels.resize(inputs.len().div_ceil(PANEL) * registers, [0; _]);
        panels.par_chunks_exact_mut(registers).enumerate().for_each(|(j, panel)| {
            let first = inputs.start + j * PANEL;
            lay_out(panel, first..inputs.end.min(first + PANEL));
        });
        by_columns(y, rows, at_once, |y| {
            let range = y.first() * bytes..(y.first() + y.width()) * bytes;
            let (other, bias) = match then {
                Then::Add(bias) => (None, bias.map(|bias| &bias[y.first()..][..y.width()])),
                Then::Gate(up) => (Some(&up[range.clone()]), None),
            };
            let part = |rows| Part { rows, dtype, bytes, columns };
            let (w, other) = (part(&w[range]), other.map(part));
            #[allow(unsafe_code)]
            unsafe {
                block(y, w, other, bias, &panels, inputs.len())
            }
        })?;
    }
    Ok(())
}

/// Some rows of weights.
#[derive(Clone, Copy)]
struct Part<'a> {
    rows: &'a [u8],
    dtype: GgmlDType,
    /// Of a row.
    bytes: usize,
    columns: usize,
}

impl Part<'_> {
    /// The columns from `at` on, `deep` of them, as bf16 or f32, and how many bytes lie between rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn rounded<'a>(
        &'a self,
        at: usize,
        deep: usize,
        scratch: &'a mut (Vec<f32>, Vec<u8>),
    ) -> Result<(&'a [u8], usize)> {
        let bytes = |numbers: usize| numbers / self.dtype.block_size() * self.dtype.type_size();
        if matches!(self.dtype, GgmlDType::BF16 | GgmlDType::F32) {
            return Ok((&self.rows[bytes(at)..], self.bytes));
        }
        let (floats, rounded) = scratch;
        floats.resize(deep, 0.0);
        rounded.resize(self.rows.len() / self.bytes * deep * 2, 0);
        for (w, out) in self.rows.chunks_exact(self.bytes).zip(rounded.chunks_exact_mut(deep * 2)) {
            dequantise(&w[bytes(at)..bytes(at + deep)], self.dtype, floats)?;
            for (x, out) in floats.as_chunks::<{ 2 * LANES }>().0.iter().zip(out.as_chunks_mut::<64>().0) {
                let x = x.as_chunks::<LANES>().0;
                store_bytes(out, round(load(&x[0]), load(&x[1])));
            }
        }
        Ok((rounded, deep * 2))
    }
}

/// What a thread keeps: sums that are put down, of both weights, and rounded weights.
#[derive(Default)]
struct Scratch {
    sums: [Vec<[[[f32; LANES]; WIDE]; HIGH]>; 2],
    rounded: [(Vec<f32>, Vec<u8>); 2],
}

/// Some rows of weights, or of two, with all inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn block(
    y: &mut Columns,
    w: Part,
    other: Option<Part>,
    bias: Option<&[f32]>,
    panels: &[Pairs],
    count: usize,
) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(|Scratch { sums, rounded }| {
        let (width, columns) = (y.width(), w.columns);
        let most = match w.dtype {
            GgmlDType::BF16 => DEEP[0],
            GgmlDType::F32 => DEEP[1],
            _ => DEEP_BLOCKS,
        };
        let (shared, floats) = (shared(w.dtype), w.dtype == GgmlDType::F32);
        // Parts of the same size, in whole blocks of every type.
        let deep = columns.div_ceil(columns.div_ceil(most)).next_multiple_of(256);
        let groups = width.div_ceil(HIGH);
        let [sums, other_sums] = sums;
        let [scratch, other_scratch] = rounded;
        for at in (0..columns).step_by(deep) {
            let deep = deep.min(columns - at);
            let (first, last) = (at == 0, at + deep == columns);
            let w = w.rounded(at, deep, scratch)?;
            let other = other.as_ref().map(|other| other.rounded(at, deep, other_scratch)).transpose()?;
            if !last {
                let all = panels.len() / (WIDE * columns / shared) * groups;
                sums.resize(all, [[[0.0; LANES]; WIDE]; HIGH]);
                other_sums.resize(if other.is_some() { all } else { 0 }, [[[0.0; LANES]; WIDE]; HIGH]);
            }
            for (i, panel) in panels.chunks_exact(WIDE * columns / shared).enumerate() {
                let panel = panel[at / shared * WIDE..][..deep / shared * WIDE].as_chunks::<WIDE>().0;
                let inputs = i * PANEL..count.min((i + 1) * PANEL);
                for group in 0..groups {
                    let rows = group * HIGH..width.min((group + 1) * HIGH);
                    let sum = |(w, stride): (&[u8], usize), sums: &mut [[[[f32; LANES]; WIDE]; HIGH]]| {
                        let mut totals = [[_mm512_setzero_ps(); WIDE]; HIGH];
                        if !first {
                            take_up(&mut totals, &sums[i * groups + group]);
                        }
                        let (w, count) = (&w[rows.start * stride..], inputs.len());
                        match floats {
                            true => tiles::<false>(&mut totals, w, stride, rows.len(), panel, count),
                            false => tiles::<true>(&mut totals, w, stride, rows.len(), panel, count),
                        }
                        if !last {
                            put_down(&mut sums[i * groups + group], &totals);
                        }
                        totals
                    };
                    let mut totals = sum(w, sums);
                    if let Some(other) = other {
                        let up = sum(other, other_sums);
                        if last {
                            gate(&mut totals, &up);
                        }
                    }
                    if last {
                        let bias = bias.map_or(&[][..], |bias| &bias[rows.clone()]);
                        write(y, inputs.clone(), rows, &totals, bias);
                    }
                }
            }
        }
        Ok(())
    })
}

#[target_feature(enable = "avx512f")]
fn take_up(totals: &mut Sums, sums: &[[[f32; LANES]; WIDE]; HIGH]) {
    for (total, sum) in totals.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        *total = load(sum);
    }
}

#[target_feature(enable = "avx512f")]
fn put_down(sums: &mut [[[f32; LANES]; WIDE]; HIGH], totals: &Sums) {
    for (sum, total) in sums.as_flattened_mut().iter_mut().zip(totals.as_flattened()) {
        store(sum, *total);
    }
}

/// `x * sigmoid(x)` of sums times others.
#[target_feature(enable = "avx512f")]
fn gate(totals: &mut Sums, up: &Sums) {
    for (total, up) in totals.as_flattened_mut().iter_mut().zip(up.as_flattened()) {
        let (mut x, mut times) = ([0f32; LANES], [0f32; LANES]);
        store(&mut x, *total);
        store(&mut times, *up);
        for (x, times) in x.iter_mut().zip(times) {
            *x = *x * sigmoid(*x) * times;
        }
        *total = load(&x);
    }
}

/// Adds the products of up to [`HIGH`] `rows` of weights, `stride` bytes apart, with the `inputs` in a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tiles<const HALF: bool>(
    totals: &mut Sums,
    w: &[u8],
    stride: usize,
    rows: usize,
    panel: &[[Pairs; WIDE]],
    inputs: usize,
) {
    match (rows, inputs.div_ceil(LANES)) {
        (HIGH, 1) => tile::<HIGH, 1, HALF>(totals, w, stride, panel),
        (HIGH, 2) => tile::<HIGH, 2, HALF>(totals, w, stride, panel),
        (HIGH, _) => tile::<HIGH, WIDE, HALF>(totals, w, stride, panel),
        _ => {
            for (r, totals) in totals[..rows].iter_mut().enumerate() {
                tile::<1, WIDE, HALF>(std::array::from_mut(totals), &w[r * stride..], stride, panel);
            }
        }
    }
}

/// Adds the products of `R` rows of weights, `stride` bytes apart, with `W` registers of inputs in a panel, of pairs of bf16
/// or of f32.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tile<const R: usize, const W: usize, const HALF: bool>(
    totals: &mut [[__m512; WIDE]; R],
    w: &[u8],
    stride: usize,
    panel: &[[Pairs; WIDE]],
) {
    assert!(w.len() >= (R - 1) * stride + 4 * panel.len(), "rows that are too short");
    let mut sums: [[__m512; W]; R] = [[_mm512_setzero_ps(); W]; R];
    for r in 0..R {
        for i in 0..W {
            sums[r][i] = totals[r][i];
        }
    }
    let mut pairs = w.as_ptr().cast::<i32>();
    for inputs in panel {
        let mut x = [_mm512_setzero_ps(); W];
        for i in 0..W {
            x[i] = as_floats(load_pairs(&inputs[i]));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the r-th row has a number or a pair for everyone of the panel, which was asserted above. Slices of rows would
            // be asked for their lengths at every step.
            #[allow(unsafe_code)]
            let pair = unsafe { pairs.byte_add(r * stride).read_unaligned() };
            let pair = _mm512_castsi512_ps(_mm512_set1_epi32(pair));
            for i in 0..W {
                sums[i] = match HALF {
                    true => _mm512_dpbf16_ps(sums[i], as_pairs(x[i]), as_pairs(pair)),
                    false => _mm512_fmadd_ps(x[i], pair, sums[i]),
                };
            }
        }
        pairs = pairs.wrapping_add(1);
    }
    for r in 0..R {
        for i in 0..W {
            totals[r][i] = sums[r][i];
        }
    }
}

/// Writes sums (rows, inputs), plus a bias per row, if any, to their columns of (inputs, rows).
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn write(y: &mut Columns, inputs: Range<usize>, rows: Range<usize>, totals: &Sums, bias: &[f32]) {
    let mut twice = [0f32; LANES];
    twice.chunks_exact_mut(HIGH).for_each(|b| b[..bias.len()].copy_from_slice(bias));
    let twice = load(&twice);
    let pd = |x| _mm512_castps_pd(x);
    // Of two registers with the same four inputs, four rows each: two inputs, all rows of the first before the second.
    let pick = [_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)];
    for (i, at) in inputs.clone().step_by(LANES).enumerate() {
        // Input 4q + c of four rows is quarter q of the c-th register.
        let four = |first: usize| {
            let [a, b, c, d] = std::array::from_fn(|r| totals[first + r][i]);
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
                        // A copy of a length that is known is a move.
                        HIGH => y.put(input, rows.start, out.first_chunk::<HIGH>().unwrap_or(&[0.0; _])),
                        rows_left => y.put(input, rows.start, &out[..rows_left]),
                    }
                }
            }
        }
    }
}
