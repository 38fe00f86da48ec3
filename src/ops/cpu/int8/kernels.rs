//! The micro-kernels of [`int8`](super), for AVX2 and for AVX-512 VNNI.

use super::image::Image;
use super::{Activations, Panels};
use crate::ops::cpu::columns::Columns;
pub(super) use crate::ops::cpu::integer_isa::IntegerIsa as Kernel;

/// Calls a function of a [`Kernel`], compiled for CPU features.
#[cfg(target_arch = "x86_64")]
macro_rules! has_features {
    ($call:expr) => {{
        // SAFETY: `IntegerIsa::all`, the only source of these, has checked the CPU features.
        #[allow(unsafe_code)]
        unsafe {
            $call
        }
    }};
}

impl Kernel {
    /// Rows of weights in a panel.
    pub(super) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::ROWS,
        }
    }

    /// The largest magnitude, which is NaN or infinite if any number is.
    pub(super) fn largest(self, x: &[f32]) -> f32 {
        match self {
            // Wider registers gain nothing.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 => has_features!(round::largest(x)),
        }
    }

    /// Writes the numbers times `times` as the nearest 16-bit integers to the beginning of `out`.
    pub(super) fn round(self, x: &[f32], times: f32, out: &mut [i16]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 => has_features!(round::round(x, times, out)),
        }
    }

    /// The products of the rows of weights that are the columns of `y` with all rows of x: with
    /// `up`, `silu` of them times those with `up`; plus the bias of each row, if any. Panels hold
    /// whole matrices.
    pub(super) fn products(
        self,
        x: &Activations,
        w: &Panels,
        up: Option<&Panels>,
        bias: Option<&[f32]>,
        y: &mut Columns,
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has_features!(avx2::products(x, w, up, bias, y)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => has_features!(avx512::products(x, w, up, bias, y)),
        }
    }

    /// All channels of a convolution at the positions that are the columns of `y`, whole rows of
    /// the image, plus a bias per channel and the residual (channels, height, width), if any.
    pub(super) fn convolve(self, image: &Image, w: &Panels, bias: &[f32], residual: Option<&[f32]>, y: &mut Columns) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has_features!(avx2::convolve(image, w, bias, residual, y)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => has_features!(avx512::convolve(image, w, bias, residual, y)),
        }
    }
}

/// Where the inputs of a tile lie among integers: an input is `stretches` of them, `pitch` apart,
/// and the inputs begin `step` apart.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Inputs {
    first: usize,
    step: usize,
    stretches: usize,
    pitch: usize,
}

#[cfg(target_arch = "x86_64")]
mod round {
    use std::arch::x86_64::*;

    /// See [`super::Kernel::largest`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn largest(x: &[f32]) -> f32 {
        // Magnitudes are ordered as their bits, with infinity and NaN above all others.
        f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)))
    }

    /// See [`super::Kernel::round`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn round(x: &[f32], times: f32, out: &mut [i16]) {
        let ((x, rest), out) = (x.as_chunks::<16>(), &mut out[..x.len()]);
        let (out, last) = out.as_chunks_mut::<16>();
        for (x, out) in x.iter().zip(out) {
            whole(x, times, out);
        }
        let mut padded = ([0f32; 16], [0i16; 16]);
        padded.0[..rest.len()].copy_from_slice(rest);
        whole(&padded.0, times, &mut padded.1);
        last.copy_from_slice(&padded.1[..last.len()]);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn whole(x: &[f32; 16], times: f32, out: &mut [i16; 16]) {
        let times = _mm256_set1_ps(times);
        // SAFETY: the loads and the store stay within the arrays, and need no alignment.
        #[allow(unsafe_code)]
        unsafe {
            let half = |at: usize| _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(at)), times));
            // Packs each half of the registers: the two quarters in the middle have to be swapped.
            let packed = _mm256_packs_epi32(half(0), half(8));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
}

/// A module with the kernel for one instruction set.
macro_rules! kernel {
    (
        $name:ident, $features:literal, $lanes:literal lanes, at most $inputs:literal inputs,
        $zero:ident, $pair:ident, $bytes:ty, $load_bytes:ident, $widen:ident, $times:expr,
        $to_floats:ident, $load:ident, $store:ident, $splat:ident, $mul:ident
    ) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;

            use super::{Activations, Columns, Image, Inputs, Panels};
            use crate::ops::cpu::exp::sigmoid;

            const LANES: usize = $lanes;
            /// Registers of weights per panel.
            const WIDE: usize = 2;
            /// Rows of weights per panel.
            pub(super) const ROWS: usize = WIDE * LANES;
            /// The most inputs whose sums fit into the registers.
            const INPUTS: usize = $inputs;

            /// See [`super::Kernel::products`].
            #[target_feature(enable = $features)]
            pub(super) fn products(
                x: &Activations,
                w: &Panels,
                up: Option<&Panels>,
                bias: Option<&[f32]>,
                y: &mut Columns,
            ) {
                let (first, end, count) = (y.first(), y.first() + y.width(), x.scales.len());
                // Tiles of even size, in place of full ones and a rest.
                let (tiles, step) = (count.div_ceil(INPUTS), 2 * x.pairs);
                for row in (first..end).step_by(ROWS) {
                    let rows = ROWS.min(end - row);
                    let bias = bias.map(|bias| &bias[row..row + rows]);
                    for tile in 0..tiles {
                        let range = tile * count / tiles..(tile + 1) * count / tiles;
                        let at = Inputs { first: range.start * step, step, stretches: 1, pitch: step };
                        let (values, scales) = (&x.values, &x.scales[range.clone()]);
                        let mut out = sums(values, at, scales, w, row);
                        if let Some(up) = up {
                            let times = sums(values, at, scales, up, row);
                            for (out, times) in
                                out[..range.len()].as_flattened_mut().iter_mut().zip(times.as_flattened())
                            {
                                *out = *out * sigmoid(*out) * times;
                            }
                        }
                        if let Some(bias) = bias {
                            for out in &mut out[..range.len()] {
                                out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
                            }
                        }
                        for (input, out) in range.zip(&out) {
                            y.put(input, row - first, &out[..rows]);
                        }
                    }
                }
            }

            /// See [`super::Kernel::convolve`].
            #[target_feature(enable = $features)]
            pub(super) fn convolve(image: &Image, w: &Panels, bias: &[f32], residual: Option<&[f32]>, y: &mut Columns) {
                let Image { values, scale, channels, pitch, side, stride, size: (height, width) } = image;
                let (step, places) = (stride * channels, y.first()..y.first() + y.width());
                let (scales, tiles) = ([*scale; INPUTS], width.div_ceil(INPUTS));
                let mut line = vec![0f32; ROWS * width];
                for channel in (0..bias.len()).step_by(ROWS) {
                    let channels = channel..bias.len().min(channel + ROWS);
                    for row in places.start / width..places.end / width {
                        for tile in 0..tiles {
                            let range = tile * width / tiles..(tile + 1) * width / tiles;
                            let first = row * stride * pitch + range.start * step;
                            let at = Inputs { first, step, stretches: *side, pitch: *pitch };
                            let out = sums(values, at, &scales[..range.len()], w, channel);
                            for (place, out) in range.zip(&out) {
                                for (line, out) in line[place..].iter_mut().step_by(*width).zip(out) {
                                    *line = *out;
                                }
                            }
                        }
                        for (channel, line) in channels.clone().zip(line.chunks_exact_mut(*width)) {
                            line.iter_mut().for_each(|line| *line += bias[channel]);
                            if let Some(residual) = residual {
                                let residual = &residual[(channel * height + row) * width..][..*width];
                                line.iter_mut().zip(residual).for_each(|(line, x)| *line += x);
                            }
                            y.put(channel, row * width - places.start, line);
                        }
                    }
                }
            }

            /// The products of the panel that begins with `row` of the weights with an input per
            /// scale.
            #[inline]
            #[target_feature(enable = $features)]
            fn sums(x: &[i16], at: Inputs, scales: &[f32], w: &Panels, row: usize) -> [[f32; ROWS]; INPUTS] {
                let (weights, of_rows) = (w.weights.as_chunks::<{ 2 * ROWS }>().0, w.scales.as_chunks::<ROWS>().0);
                let scales = (&of_rows[row / ROWS], scales);
                let panel = &weights[row / ROWS * w.pairs..][..w.pairs];
                let mut out = [[0f32; ROWS]; INPUTS];
                match scales.1.len() {
                    1 => tile::<1>(panel, x, at, scales, &mut out),
                    2 => tile::<2>(panel, x, at, scales, &mut out),
                    3 => tile::<3>(panel, x, at, scales, &mut out),
                    4 => tile::<4>(panel, x, at, scales, &mut out),
                    5 => tile::<5>(panel, x, at, scales, &mut out),
                    6 => tile::<6>(panel, x, at, scales, &mut out),
                    7 if INPUTS > 6 => tile::<7>(panel, x, at, scales, &mut out),
                    8 if INPUTS > 6 => tile::<8>(panel, x, at, scales, &mut out),
                    9 if INPUTS > 6 => tile::<9>(panel, x, at, scales, &mut out),
                    10 if INPUTS > 6 => tile::<10>(panel, x, at, scales, &mut out),
                    11 if INPUTS > 6 => tile::<11>(panel, x, at, scales, &mut out),
                    12 if INPUTS > 6 => tile::<12>(panel, x, at, scales, &mut out),
                    other => unreachable!("{other} inputs at once"),
                }
                out
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn tile<const R: usize>(
                panel: &[[i8; 2 * ROWS]],
                x: &[i16],
                at: Inputs,
                (scales, x_scales): (&[f32; ROWS], &[f32]),
                out: &mut [[f32; ROWS]; INPUTS],
            ) {
                let Inputs { first, step, stretches, pitch } = at;
                let pairs = panel.len() / stretches;
                let end = first + (R - 1) * step + (stretches - 1) * pitch + 2 * pairs;
                assert!(end <= x.len() && x_scales.len() == R && R <= INPUTS, "inputs out of bounds");
                let mut sums = [[$zero(); WIDE]; R];
                for (stretch, panel) in panel.chunks_exact(pairs).enumerate() {
                    let mut x = x[first + stretch * pitch..].as_ptr();
                    for weights in panel {
                        let mut w = [$zero(); WIDE];
                        for i in 0..WIDE {
                            // SAFETY: `weights` has bytes for WIDE registers of half the width.
                            #[allow(unsafe_code)]
                            let bytes = unsafe { $load_bytes(weights.as_ptr().add(i * 2 * LANES).cast::<$bytes>()) };
                            w[i] = $widen(bytes);
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: the last pair of the last stretch of the last of the R inputs
                            // is in bounds, as asserted above. Slices would be checked at every
                            // step.
                            #[allow(unsafe_code)]
                            let pair = $pair(unsafe { x.add(r * step).cast::<i32>().read_unaligned() });
                            for i in 0..WIDE {
                                sums[i] = $times(sums[i], w[i], pair);
                            }
                        }
                        x = x.wrapping_add(2);
                    }
                }
                for i in 0..WIDE {
                    // SAFETY: `scales` has ROWS numbers, WIDE registers.
                    #[allow(unsafe_code)]
                    let scale = unsafe { $load(scales.as_ptr().add(i * LANES)) };
                    for r in 0..R {
                        let scaled = $mul($mul($to_floats(sums[r][i]), scale), $splat(x_scales[r]));
                        // SAFETY: `out[r]` has ROWS numbers, WIDE registers.
                        #[allow(unsafe_code)]
                        unsafe {
                            $store(out[r].as_mut_ptr().add(i * LANES), scaled);
                        }
                    }
                }
            }
        }
    };
}

kernel!(
    avx2, "avx2,fma", 8 lanes, at most 6 inputs,
    _mm256_setzero_si256, _mm256_set1_epi32, __m128i, _mm_loadu_si128, _mm256_cvtepi8_epi16,
    |sum, w, x| _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)),
    _mm256_cvtepi32_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_mul_ps
);
kernel!(
    avx512, "avx512f,avx512bw,avx512vnni,avx2,fma", 16 lanes, at most 12 inputs,
    _mm512_setzero_si512, _mm512_set1_epi32, __m256i, _mm256_loadu_si256, _mm512_cvtepi8_epi16,
    |sum, w, x| _mm512_dpwssd_epi32(sum, w, x),
    _mm512_cvtepi32_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_mul_ps
);
