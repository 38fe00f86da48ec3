//! The micro-kernels of [`packed_blocks`](super), for AVX2 and for AVX-512 VNNI.

use super::super::columns::Columns;
pub(super) use super::super::integer_isa::IntegerIsa as Kernel;
use super::{Inputs, PackedBlocks};

impl Kernel {
    /// The most rows of inputs in a tile.
    pub(super) fn inputs(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::registers::avx2::INPUTS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::registers::avx512::INPUTS,
        }
    }

    /// The products of the rows of weights that are the columns of `y` with all rows of inputs,
    /// which are rounded for this kernel: with `up`, `silu` of them times those with `up`; plus the
    /// bias of each row, if any.
    pub(super) fn block_products(
        self,
        x: &Inputs,
        w: &PackedBlocks,
        up: Option<&PackedBlocks>,
        bias: Option<&[f32]>,
        y: &mut Columns,
    ) {
        match self {
            // SAFETY: `IntegerIsa::all`, the only source of these, has checked the CPU features.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Self::Avx2 => unsafe { avx2::products(x, w, up, bias, y) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Self::Avx512 => unsafe { avx512::products(x, w, up, bias, y) },
        }
    }
}

/// Blocks by type, as a constant of the kernels.
#[cfg(target_arch = "x86_64")]
const Q8_0: u8 = 0;
#[cfg(target_arch = "x86_64")]
const Q4_0: u8 = 1;
#[cfg(target_arch = "x86_64")]
const Q4_K: u8 = 2;

/// A module with the kernel for one instruction set.
macro_rules! kernel {
    ($name:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

            use candle_core::quantized::GgmlDType;

            use super::super::inputs::{PAIRS, Tile, tile_rows};
            use super::super::registers::$name::*;
            use super::super::{GROUP, Layout, Line, ROWS};
            use super::{Columns, Inputs, PackedBlocks, Q4_0, Q4_K, Q8_0};
            use crate::ops::cpu::exp::sigmoid;

            /// Registers per line.
            const WIDE: usize = ROWS / LANES;
            /// Groups, and words of scales, per block of Q4_K.
            const GROUPS: usize = 8;
            const FACTORS: usize = 4;
            /// Lines that are asked of memory ahead of use, beyond the end of a slab too: the next
            /// one follows.
            const AHEAD: usize = 32;
            /// With more rows of inputs, sums are enough to hide the latency of an instruction that
            /// multiplies and adds.
            const FEW: usize = 6;

            /// See [`super::Kernel::block_products`].
            #[target_feature(enable = $features)]
            pub(super) fn products(
                x: &Inputs,
                w: &PackedBlocks,
                up: Option<&PackedBlocks>,
                bias: Option<&[f32]>,
                y: &mut Columns,
            ) {
                let (first, end) = (y.first(), y.first() + y.width());
                for tile in tile_rows(x.count(), x.kernel()) {
                    let mut row = first;
                    while row < end {
                        // Rows from the beginning or the middle of a slab to its end.
                        let at = (w.first + row) % ROWS;
                        let rows = (ROWS - at).min(end - row);
                        let mut out = sums(x, tile.start, tile.len(), w, row);
                        if let Some(up) = up {
                            let times = sums(x, tile.start, tile.len(), up, row);
                            for (out, times) in
                                out[..tile.len()].as_flattened_mut().iter_mut().zip(times.as_flattened())
                            {
                                *out = *out * sigmoid(*out) * times;
                            }
                        }
                        for (input, out) in tile.clone().zip(&mut out) {
                            let out = &mut out[at..at + rows];
                            if let Some(bias) = bias {
                                out.iter_mut().zip(&bias[row..]).for_each(|(out, bias)| *out += bias);
                            }
                            y.put(input, row - first, out);
                        }
                        row += rows;
                    }
                }
            }

            /// The products of `count` rows of inputs from `first` on with the slab that holds a
            /// row of weights.
            #[target_feature(enable = $features)]
            fn sums(x: &Inputs, first: usize, count: usize, w: &PackedBlocks, row: usize) -> [[f32; ROWS]; INPUTS] {
                let slab = w.slab((w.first + row) / ROWS);
                match w.dtype {
                    GgmlDType::Q8_0 => of_type::<Q8_0>(x, first, count, w, slab),
                    GgmlDType::Q4_0 => of_type::<Q4_0>(x, first, count, w, slab),
                    _ => of_type::<Q4_K>(x, first, count, w, slab),
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn of_type<const TYPE: u8>(
                x: &Inputs,
                first: usize,
                count: usize,
                w: &PackedBlocks,
                slab: &[Line],
            ) -> [[f32; ROWS]; INPUTS] {
                let layout = Layout::of(w.dtype).expect("a type that is packed");
                let parts = slab.split_at(layout.head_lines(w.columns / layout.columns));
                let mut out = [[0f32; ROWS]; INPUTS];
                match count {
                    1 => tile::<1, TYPE>(x.tile(first), parts, &mut out),
                    2 => tile::<2, TYPE>(x.tile(first), parts, &mut out),
                    3 => tile::<3, TYPE>(x.tile(first), parts, &mut out),
                    4 => tile::<4, TYPE>(x.tile(first), parts, &mut out),
                    5 => tile::<5, TYPE>(x.tile(first), parts, &mut out),
                    6 => tile::<6, TYPE>(x.tile(first), parts, &mut out),
                    7 if INPUTS > 6 => tile::<7, TYPE>(x.tile(first), parts, &mut out),
                    8 if INPUTS > 6 => tile::<8, TYPE>(x.tile(first), parts, &mut out),
                    9 if INPUTS > 6 => tile::<9, TYPE>(x.tile(first), parts, &mut out),
                    10 if INPUTS > 6 => tile::<10, TYPE>(x.tile(first), parts, &mut out),
                    11 if INPUTS > 6 => tile::<11, TYPE>(x.tile(first), parts, &mut out),
                    12 if INPUTS > 6 => tile::<12, TYPE>(x.tile(first), parts, &mut out),
                    other => unreachable!("{other} inputs at once"),
                }
                out
            }

            #[target_feature(enable = $features)]
            fn tile<const R: usize, const TYPE: u8>(
                x: Tile<R>,
                (heads, words): (&[Line], &[Line]),
                out: &mut [[f32; ROWS]; INPUTS],
            ) {
                let (groups, lines) = match TYPE {
                    Q8_0 => (1, GROUP / 4),
                    Q4_0 => (1, GROUP / 8),
                    _ => (GROUPS, FACTORS + GROUPS * GROUP / 8),
                };
                let mut totals = [[zero(); WIDE]; R];
                for (block, words) in words.chunks_exact(lines).enumerate() {
                    for line in 0..lines {
                        _mm_prefetch::<_MM_HINT_T0>(words.as_ptr().wrapping_add(AHEAD + line).cast());
                    }
                    let mut scales = [[zero(); WIDE]; GROUPS];
                    let mut minima = [[zero(); WIDE]; GROUPS];
                    let mut numbers = words;
                    if TYPE == Q4_K {
                        let (factors, rest) = words.split_at(FACTORS);
                        factors_of(factors, &mut scales, &mut minima);
                        numbers = rest;
                    } else {
                        let halves = &heads[block / 2].0.as_chunks::<{ 2 * ROWS }>().0[block % 2];
                        for i in 0..WIDE {
                            scales[0][i] = load_halves(&halves.as_chunks().0[i]);
                        }
                    }
                    for of_block in 0..groups {
                        let group = block * groups + of_block;
                        let values = &x.values[group * PAIRS..][..PAIRS];
                        let start = if TYPE == Q4_0 { x.starts[group] } else { [0; R] };
                        let sums = match of_block % 2 {
                            0 => group_sums::<R, TYPE, false>(&numbers[of_block / 2 * 8..], values, start),
                            _ => group_sums::<R, TYPE, true>(&numbers[of_block / 2 * 8..], values, start),
                        };
                        for r in 0..R {
                            let scale = splat_float(x.scales[group][r]);
                            for i in 0..WIDE {
                                let sum = multiply(to_floats(sums[r][i]), scale);
                                totals[r][i] = add_product(totals[r][i], sum, scales[of_block][i]);
                                if TYPE == Q4_K {
                                    let sum = splat_float(x.sums[group][r]);
                                    totals[r][i] = subtract_product(totals[r][i], sum, minima[of_block][i]);
                                }
                            }
                        }
                    }
                }
                for (out, totals) in out.iter_mut().zip(totals) {
                    for (out, total) in out.as_chunks_mut().0.iter_mut().zip(totals) {
                        store(out, total);
                    }
                }
            }

            /// The sums over a group; of two groups of Q4_K in the same bytes, `SECOND` is in the
            /// upper halves.
            #[inline]
            #[target_feature(enable = $features)]
            fn group_sums<const R: usize, const TYPE: u8, const SECOND: bool>(
                words: &[Line],
                values: &[[i32; R]],
                start: [i32; R],
            ) -> [[Ints; WIDE]; R] {
                let mut sums = [[splat(0); WIDE]; R];
                for r in 0..R {
                    sums[r] = [splat(start[r]); WIDE];
                }
                // Of Q4_0 the upper halves are the second half of the group.
                let (lines, parts) = if TYPE == Q4_0 { (4, 4) } else { (8, 2) };
                let (words, values) = (&words[..lines], &values[..PAIRS]);
                for line in 0..lines {
                    let mut weights = [[splat(0); 4]; WIDE];
                    for i in 0..WIDE {
                        weights[i] = widen::<TYPE, SECOND>(load(&words[line].0.as_chunks().0[i]));
                    }
                    for part in 0..parts {
                        let values = &values[2 * line + part % 2 + part / 2 * 8];
                        for r in 0..R {
                            let pair = splat(values[r]);
                            for i in 0..WIDE {
                                sums[r][i] = match R <= FEW {
                                    true => add_products(sums[r][i], weights[i][part], pair),
                                    false => add_many_products(sums[r][i], weights[i][part], pair),
                                };
                            }
                        }
                    }
                }
                sums
            }

            /// The numbers in four bytes of every row as pairs of 16 bits: the first and third
            /// byte, then the others; their lower halves, then the upper ones.
            #[inline]
            #[target_feature(enable = $features)]
            fn widen<const TYPE: u8, const SECOND: bool>(x: Ints) -> [Ints; 4] {
                let low = splat(0x000f_000f);
                let upper = and(shift_right_pairs(x, 4), low);
                match (TYPE, SECOND) {
                    (Q8_0, _) => [extend_pairs(shift_left_pairs(x, 8), 8), extend_pairs(x, 8), x, x],
                    (_, false) => [and(x, low), and(shift_right_pairs(x, 8), low), upper, shift_right_pairs(x, 12)],
                    (_, true) => [upper, shift_right_pairs(x, 12), x, x],
                }
            }

            /// Scales and minima of the groups of a block of Q4_K, as
            /// [`quants`](crate::ops::cpu::quants) describes them.
            #[inline]
            #[target_feature(enable = $features)]
            fn factors_of(
                lines: &[Line],
                scales: &mut [[Floats; WIDE]; GROUPS],
                minima: &mut [[Floats; WIDE]; GROUPS],
            ) {
                for i in 0..WIDE {
                    let mut words = [splat(0); FACTORS];
                    for (word, line) in words.iter_mut().zip(lines) {
                        *word = load(&line.0.as_chunks().0[i]);
                    }
                    let [both, times, minus, others] = words;
                    let (scale, offset) = (lower_halves(both), lower_halves(shift_right(both, 16)));
                    // The 6 bits of the first four factors of either kind lie together, those of
                    // the others as 4 and 2.
                    let first = |bits: Ints| and(bits, splat(0x3f3f_3f3f));
                    let rest = |four: Ints, two: Ints| {
                        or(and(four, splat(0x0f0f_0f0f)), and(shift_right(two, 2), splat(0x3030_3030)))
                    };
                    let times = [first(times), rest(others, times)];
                    let minus = [first(minus), rest(shift_right(others, 4), minus)];
                    for group in 0..GROUPS {
                        let factor = |bits: [Ints; 2]| {
                            to_floats(and(shift_right(bits[group / 4], group as i32 % 4 * 8), splat(255)))
                        };
                        scales[group][i] = multiply(factor(times), scale);
                        minima[group][i] = multiply(factor(minus), offset);
                    }
                }
            }
        }
    };
}

kernel!(avx2, "avx2,fma,f16c");
kernel!(avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c");
