//! The products of [`bytes`](super) in the registers of AVX2 or of AVX-512.

use std::sync::OnceLock;

use super::{Panels, Rounded};
use crate::ops::columns::Columns;

/// The registers that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// All that this processor has, the widest first.
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            [(avx512, Self::Avx512), (avx2, Self::Avx2)]
                .into_iter()
                .filter_map(|(has, kernel)| has.then_some(kernel))
                .collect()
        }
        #[cfg(not(target_arch = "x86_64"))]
        Vec::new()
    }

    /// The widest; nothing on processors without any.
    pub(super) fn best() -> Option<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().first().copied())
    }

    /// Rows of weights in a panel.
    pub(super) fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::ROWS,
        }
    }

    /// Rounds an input to integers of at most `most`, and gives their scale, which is NaN if the input is not finite. What is
    /// behind it in `out` stays as it is.
    pub(super) fn round(self, x: &[f32], most: f32, out: &mut [i16]) -> f32 {
        // SAFETY (here and below): `all` has asked the processor for what these are compiled for.
        #[allow(unsafe_code)]
        match self {
            // There is nothing to be gained by wider registers.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 => unsafe { round::round(x, most, out) },
        }
    }

    /// The products of some rows of weights, all in `y`, with all inputs: `x * sigmoid(x)` of them times those with `up`, if
    /// there is one, or plus the bias of each row, if any. The rows of panels are those of whole matrices.
    pub(super) fn products(
        self,
        inputs: &Rounded,
        w: &Panels,
        up: Option<&Panels>,
        bias: Option<&[f32]>,
        y: &mut Columns,
    ) {
        #[allow(unsafe_code)]
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::products(inputs, w, up, bias, y) },
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::products(inputs, w, up, bias, y) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod round {
    use std::arch::x86_64::*;

    /// See [`super::Kernel::round`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn round(x: &[f32], most: f32, out: &mut [i16]) -> f32 {
        // The magnitudes of floats are ordered as their bits are, with what is not finite above all others.
        let largest = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            return f32::NAN;
        }
        if largest < f32::MIN_POSITIVE * 65536.0 {
            out[..x.len()].fill(0);
            return 0.0;
        }
        let times = most / largest;
        let (x, rest) = x.as_chunks::<16>();
        let (out, last) = out.as_chunks_mut::<16>();
        for (x, out) in x.iter().zip(out.iter_mut()) {
            whole(x, times, out);
        }
        let mut padded = ([0f32; 16], [0i16; 16]);
        padded.0[..rest.len()].copy_from_slice(rest);
        whole(&padded.0, times, &mut padded.1);
        let last = out.get_mut(x.len()).map_or(last, |out| &mut out[..]);
        last[..rest.len()].copy_from_slice(&padded.1[..rest.len()]);
        largest / most
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn whole(x: &[f32; 16], times: f32, out: &mut [i16; 16]) {
        let times = _mm256_set1_ps(times);
        // SAFETY: registers are loaded from and stored to arrays of their size.
        #[allow(unsafe_code)]
        unsafe {
            let half = |at: usize| _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(at)), times));
            // Packed by halves of registers: the quarters in the middle are to be swapped.
            let packed = _mm256_packs_epi32(half(0), half(8));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
}

/// A module with the kernel for one kind of registers.
macro_rules! kernel {
    (
        $name:ident, $features:literal, $lanes:literal lanes, at most $inputs:literal inputs,
        $zero:ident, $pair:ident, $bytes:ty, $load_bytes:ident, $widen:ident, $times:expr,
        $to_floats:ident, $load:ident, $store:ident, $splat:ident, $mul:ident
    ) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;
            use std::ops::Range;

            use super::{Columns, Panels, Rounded};
            use crate::ops::activation::sigmoid;

            const LANES: usize = $lanes;
            /// Registers of weights in a panel.
            const WIDE: usize = 2;
            /// Rows of weights in a panel.
            pub(super) const ROWS: usize = WIDE * LANES;
            /// The most inputs whose sums are in registers.
            const INPUTS: usize = $inputs;

            /// See [`super::Kernel::products`].
            #[target_feature(enable = $features)]
            pub(super) fn products(
                inputs: &Rounded,
                w: &Panels,
                up: Option<&Panels>,
                bias: Option<&[f32]>,
                y: &mut Columns,
            ) {
                let (first, end, count) = (y.first(), y.first() + y.width(), inputs.scales.len());
                // As even as may be, rather than a few inputs behind many full ones.
                let tiles = count.div_ceil(INPUTS);
                for row in (first..end).step_by(ROWS) {
                    let rows = ROWS.min(end - row);
                    let bias = bias.map(|bias| &bias[row..row + rows]);
                    for tile in 0..tiles {
                        let range = tile * count / tiles..(tile + 1) * count / tiles;
                        let mut out = [[0f32; ROWS]; INPUTS];
                        sums(inputs, range.clone(), w, row, &mut out);
                        if let Some(up) = up {
                            let mut times = [[0f32; ROWS]; INPUTS];
                            sums(inputs, range.clone(), up, row, &mut times);
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

            /// The products of the panel that begins with `row` with a few inputs.
            #[inline]
            #[target_feature(enable = $features)]
            fn sums(inputs: &Rounded, range: Range<usize>, w: &Panels, row: usize, out: &mut [[f32; ROWS]; INPUTS]) {
                let pairs = inputs.pairs;
                let panel = &w.weights.as_chunks::<{ 2 * ROWS }>().0[row / ROWS * pairs..][..pairs];
                let scales = (w.scales[row..].first_chunk().expect("a whole panel"), &inputs.scales[range.clone()]);
                let x = &inputs.values.as_chunks::<2>().0[range.start * pairs..range.end * pairs];
                match range.len() {
                    1 => tile::<1>(panel, x, scales, out),
                    2 => tile::<2>(panel, x, scales, out),
                    3 => tile::<3>(panel, x, scales, out),
                    4 => tile::<4>(panel, x, scales, out),
                    5 => tile::<5>(panel, x, scales, out),
                    6 => tile::<6>(panel, x, scales, out),
                    7 if INPUTS > 6 => tile::<7>(panel, x, scales, out),
                    8 if INPUTS > 6 => tile::<8>(panel, x, scales, out),
                    9 if INPUTS > 6 => tile::<9>(panel, x, scales, out),
                    10 if INPUTS > 6 => tile::<10>(panel, x, scales, out),
                    11 if INPUTS > 6 => tile::<11>(panel, x, scales, out),
                    12 if INPUTS > 6 => tile::<12>(panel, x, scales, out),
                    other => unreachable!("{other} inputs at once"),
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn tile<const R: usize>(
                panel: &[[i8; 2 * ROWS]],
                x: &[[i16; 2]],
                (scales, x_scales): (&[f32; ROWS], &[f32]),
                out: &mut [[f32; ROWS]; INPUTS],
            ) {
                let pairs = panel.len();
                assert!(x.len() == R * pairs && x_scales.len() == R && R <= INPUTS, "inputs of another length");
                let mut sums = [[$zero(); WIDE]; R];
                let mut x = x.as_ptr();
                for weights in panel {
                    let mut w = [$zero(); WIDE];
                    for i in 0..WIDE {
                        // SAFETY: a register of bytes is half as wide, and there are two of them.
                        #[allow(unsafe_code)]
                        let bytes = unsafe { $load_bytes(weights.as_ptr().add(i * 2 * LANES).cast::<$bytes>()) };
                        w[i] = $widen(bytes);
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: every one of the R inputs has as many pairs as the panel, which was asserted above. Slices
                        // would be asked for their lengths at every step.
                        #[allow(unsafe_code)]
                        let pair = $pair(unsafe { x.add(r * pairs).cast::<i32>().read_unaligned() });
                        for i in 0..WIDE {
                            sums[i] = $times(sums[i], w[i], pair);
                        }
                    }
                    x = x.wrapping_add(1);
                }
                for r in 0..R {
                    let scale = $splat(x_scales[r]);
                    for i in 0..WIDE {
                        // SAFETY: two registers are as long as a panel is high.
                        #[allow(unsafe_code)]
                        unsafe {
                            let scale = $mul($load(scales.as_ptr().add(i * LANES)), scale);
                            $store(out[r].as_mut_ptr().add(i * LANES), $mul($to_floats(sums[r][i]), scale));
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
