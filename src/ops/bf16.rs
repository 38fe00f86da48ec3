//! `x wᵀ` for many inputs with bf16 products and f32 sums, on processors that have an instruction for them (AVX-512 BF16).
//!
//! The inputs are rounded to bf16 and laid out in panels of 48: for every pair of neighbouring numbers, 48 such pairs
//! side by side. A pair of a row of weights, which needs no layout, is then multiplied with 48 inputs at once, and eight
//! rows of weights with 48 inputs keep their sums in registers.

use std::arch::x86_64::*;
use std::cell::RefCell;

use candle_core::Result;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::blocks::dequantise;
use super::columns::{Columns, by_columns};

/// Numbers in a register: f32, or pairs of bf16.
const LANES: usize = 16;
/// Registers of inputs in a panel.
const WIDE: usize = 3;
/// Inputs in a panel.
const PANEL: usize = WIDE * LANES;
/// Rows of weights whose sums are in registers.
const HIGH: usize = 8;
/// Rows of weights that one thread takes at a time.
const ROWS: usize = 64;
/// Columns that are summed before the sums are put down: a panel of so many stays in the first-level cache.
const DEEP: usize = 512;
/// Inputs that are laid out at a time, to bound the memory for it.
const INPUTS: usize = 20 * PANEL;

/// A register's worth of pairs of bf16.
type Pairs = [u16; 2 * LANES];

/// Whether this processor and these weights are what [`products`] is for.
pub(super) fn suits(dtype: GgmlDType, columns: usize) -> bool {
    matches!(dtype, GgmlDType::BF16 | GgmlDType::Q8_0 | GgmlDType::Q4K)
        && columns > 0
        && columns.is_multiple_of(2 * LANES)
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// The products of every one of the `inputs`, `columns` long, with all rows of `w`, blocks of `dtype`, plus `bias`, if
/// any: (inputs, rows) in `y`. Numbers in blocks are rounded to bf16 as well.
///
/// Errors: blocks that do not divide `columns`. Panics unless it [`suits`].
pub(super) fn products(
    y: &mut [f32],
    (w, dtype): (&[u8], GgmlDType),
    bias: Option<&[f32]>,
    inputs: &[f32],
    columns: usize,
) -> Result<()> {
    assert!(suits(dtype, columns), "a product that this processor has not");
    let bytes = columns / dtype.block_size() * dtype.type_size();
    let rows = w.len() / bytes;
    let mut panels: Vec<Pairs> = Vec::new();
    for (inputs, y) in inputs.chunks(INPUTS * columns).zip(y.chunks_mut(INPUTS * rows)) {
        let count = inputs.len() / columns;
        panels.resize(count.div_ceil(PANEL) * WIDE * columns / 2, [0; _]);
        let each = panels.par_chunks_exact_mut(WIDE * columns / 2).zip(inputs.par_chunks(PANEL * columns));
        // SAFETY (here and below): `suits` has asked the processor for what this is compiled for.
        #[allow(unsafe_code)]
        each.for_each(|(panel, inputs)| unsafe { lay_out(panel, inputs, columns) });
        by_columns(y, rows, ROWS, |y| {
            let w = &w[y.first() * bytes..][..y.width() * bytes];
            #[allow(unsafe_code)]
            unsafe {
                block(y, (w, dtype), bias, &panels, count, columns)
            }
        })?;
    }
    Ok(())
}

/// The panel of up to [`PANEL`] inputs; what is missing counts as zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn lay_out(panel: &mut [Pairs], inputs: &[f32], columns: usize) {
    let count = inputs.len() / columns;
    for wide in 0..WIDE {
        for (step, out) in panel.chunks_exact_mut(LANES * WIDE).enumerate() {
            let rows = std::array::from_fn(|i| match wide * LANES + i {
                input if input < count => {
                    let x = inputs[input * columns + step * 2 * LANES..].as_chunks::<LANES>().0;
                    as_floats(round(load(&x[0]), load(&x[1])))
                }
                _ => _mm512_setzero_ps(),
            });
            for (pair, inputs) in transpose(rows).into_iter().enumerate() {
                store_pairs(&mut out[pair * WIDE + wide], as_pairs(inputs));
            }
        }
    }
}

/// Some rows of weights with all inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn block(
    y: &mut Columns,
    (w, dtype): (&[u8], GgmlDType),
    bias: Option<&[f32]>,
    panels: &[Pairs],
    count: usize,
    columns: usize,
) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(|Scratch { sums, floats, rounded }| {
        let (width, row_bytes) = (y.width(), w.len() / y.width());
        let padded = count.div_ceil(PANEL) * PANEL;
        // Sums of a row lie side by side, for every input.
        sums.clear();
        sums.resize(width.next_multiple_of(LANES) * padded, 0.0);
        for at in (0..columns).step_by(DEEP) {
            let deep = DEEP.min(columns - at);
            let bytes = |numbers: usize| numbers / dtype.block_size() * dtype.type_size();
            let (w, stride) = match dtype {
                GgmlDType::BF16 => (&w[bytes(at)..], row_bytes),
                _ => {
                    floats.resize(deep, 0.0);
                    rounded.resize(width * deep * 2, 0);
                    for (w, out) in w.chunks_exact(row_bytes).zip(rounded.chunks_exact_mut(deep * 2)) {
                        dequantise(&w[bytes(at)..bytes(at + deep)], dtype, floats)?;
                        for (x, out) in floats.as_chunks::<{ 2 * LANES }>().0.iter().zip(out.as_chunks_mut::<64>().0) {
                            let x = x.as_chunks::<LANES>().0;
                            store_bytes(out, round(load(&x[0]), load(&x[1])));
                        }
                    }
                    (&rounded[..], deep * 2)
                }
            };
            for (i, panel) in panels.chunks_exact(WIDE * columns / 2).enumerate() {
                let panel = panel[at / 2 * WIDE..][..deep / 2 * WIDE].as_chunks::<WIDE>().0;
                let mut row = 0;
                while row < width {
                    let (w, sums) = (&w[row * stride..], &mut sums[row * padded + i * PANEL..]);
                    if row + HIGH <= width {
                        tile::<HIGH>(w, stride, panel, sums, padded);
                        row += HIGH;
                    } else {
                        tile::<1>(w, stride, panel, sums, padded);
                        row += 1;
                    }
                }
            }
        }
        put(y, sums, padded, bias, count);
        Ok(())
    })
}

#[derive(Default)]
struct Scratch {
    sums: Vec<f32>,
    floats: Vec<f32>,
    rounded: Vec<u8>,
}

/// Adds the products of `R` rows of weights, `stride` bytes apart, with a panel of inputs to `sums`, whose rows are
/// `padded` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tile<const R: usize>(w: &[u8], stride: usize, panel: &[[Pairs; WIDE]], sums: &mut [f32], padded: usize) {
    let rows: [&[[u8; 4]]; R] = std::array::from_fn(|r| &w[r * stride..].as_chunks::<4>().0[..panel.len()]);
    let mut totals = [[_mm512_setzero_ps(); WIDE]; R];
    for (pair, inputs) in panel.iter().enumerate() {
        let inputs = [load_pairs(&inputs[0]), load_pairs(&inputs[1]), load_pairs(&inputs[2])];
        for r in 0..R {
            let weights = as_pairs(_mm512_castsi512_ps(_mm512_set1_epi32(i32::from_ne_bytes(rows[r][pair]))));
            for i in 0..WIDE {
                totals[r][i] = _mm512_dpbf16_ps(totals[r][i], inputs[i], weights);
            }
        }
    }
    for (r, totals) in totals.into_iter().enumerate() {
        for (sums, total) in sums[r * padded..][..PANEL].as_chunks_mut().0.iter_mut().zip(totals) {
            store(sums, _mm512_add_ps(load(sums), total));
        }
    }
}

/// Writes sums (rows, inputs) to their columns of (inputs, rows).
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn put(y: &mut Columns, sums: &[f32], padded: usize, bias: Option<&[f32]>, count: usize) {
    for row in (0..y.width()).step_by(LANES) {
        let rows = LANES.min(y.width() - row);
        let mut offset = [0f32; LANES];
        if let Some(bias) = bias {
            offset[..rows].copy_from_slice(&bias[y.first() + row..][..rows]);
        }
        let offset = load(&offset);
        for input in (0..count).step_by(LANES) {
            let block =
                std::array::from_fn(|r| load(sums[(row + r) * padded + input..].first_chunk().unwrap_or(&[0.0; _])));
            for (i, values) in transpose(block).into_iter().enumerate().take(count - input) {
                let mut out = [0f32; LANES];
                store(&mut out, _mm512_add_ps(values, offset));
                if rows == LANES {
                    y.put(input + i, row, &out);
                } else {
                    y.put(input + i, row, &out[..rows]);
                }
            }
        }
    }
}

/// Rows to columns.
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
    // Pairs, then fours, of rows side by side, in every quarter of a register.
    let pairs: [__m512; LANES] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_ps(r[i], r[i + 1]),
        _ => _mm512_unpackhi_ps(r[i - 1], r[i]),
    });
    let fours: [__m512; LANES] = std::array::from_fn(|i| {
        let (a, b) = (i / 4 * 4 + i % 4 / 2, i / 4 * 4 + i % 4 / 2 + 2);
        let (a, b) = (_mm512_castps_pd(pairs[a]), _mm512_castps_pd(pairs[b]));
        _mm512_castpd_ps(if i % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
    });
    // Column 4q + c is quarter q of the registers c, 4 + c, 8 + c and 12 + c.
    let halves: [[__m512; 4]; 4] = std::array::from_fn(|c| {
        [
            _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[c], fours[4 + c]),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[c], fours[4 + c]),
            _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[8 + c], fours[12 + c]),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[8 + c], fours[12 + c]),
        ]
    });
    std::array::from_fn(|column| {
        let [even_low, odd_low, even_high, odd_high] = halves[column % 4];
        match column / 4 {
            0 => _mm512_shuffle_f32x4::<0b10_00_10_00>(even_low, even_high),
            1 => _mm512_shuffle_f32x4::<0b10_00_10_00>(odd_low, odd_high),
            2 => _mm512_shuffle_f32x4::<0b11_01_11_01>(even_low, even_high),
            _ => _mm512_shuffle_f32x4::<0b11_01_11_01>(odd_low, odd_high),
        }
    })
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn round(low: __m512, high: __m512) -> __m512bh {
    _mm512_cvtne2ps_pbh(high, low)
}

// SAFETY, for all that follows: a register is loaded from and stored to an array of its size, of any alignment, and
// every pattern of 512 bits is a register of each kind.

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; LANES]) -> __m512 {
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn store(x: &mut [f32; LANES], value: __m512) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn load_pairs(x: &Pairs) -> __m512bh {
    as_pairs(unsafe { _mm512_loadu_ps(x.as_ptr().cast()) })
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn store_pairs(x: &mut Pairs, value: __m512bh) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value)) }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn store_bytes(x: &mut [u8; 64], value: __m512bh) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value)) }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn as_pairs(x: __m512) -> __m512bh {
    unsafe { std::mem::transmute(x) }
}

#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
fn as_floats(x: __m512bh) -> __m512 {
    unsafe { std::mem::transmute(x) }
}
