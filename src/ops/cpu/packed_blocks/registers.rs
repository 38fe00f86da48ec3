//! The instructions of the kernels, under the same names for AVX2 and AVX-512.

/// A module of functions on registers of `$lanes` 32-bit numbers, compiled for CPU features.
macro_rules! registers {
    (
        $name:ident, $features:literal, $lanes:literal lanes, at most $inputs:literal inputs,
        $ints:ident, $floats:ident, $load:ident, $load_half:ident, $store:ident,
        $(fn $function:ident($($argument:ident: $type:ty),*) -> $result:ty = $value:expr;)*
    ) => {
        pub(super) mod $name {
            use std::arch::x86_64::*;

            /// 32-bit numbers per register.
            pub(crate) const LANES: usize = $lanes;
            /// The most rows of inputs whose sums fit into the registers.
            pub(crate) const INPUTS: usize = $inputs;
            pub(crate) type Ints = $ints;
            pub(crate) type Floats = $floats;

            $(
                #[inline]
                #[target_feature(enable = $features)]
                pub(crate) fn $function($($argument: $type),*) -> $result {
                    $value
                }
            )*

            #[inline]
            #[target_feature(enable = $features)]
            pub(crate) fn load(bytes: &[u8; 4 * LANES]) -> Ints {
                // SAFETY: the array is as long as the register, and need not be aligned.
                #[allow(unsafe_code)]
                unsafe {
                    $load(bytes.as_ptr().cast())
                }
            }

            /// f16 to f32.
            #[inline]
            #[target_feature(enable = $features)]
            pub(crate) fn load_halves(bytes: &[u8; 2 * LANES]) -> Floats {
                // SAFETY: the array is as long as half a register, and need not be aligned.
                #[allow(unsafe_code)]
                widen_halves(unsafe { $load_half(bytes.as_ptr().cast()) })
            }

            #[inline]
            #[target_feature(enable = $features)]
            pub(crate) fn store(to: &mut [f32; LANES], x: Floats) {
                // SAFETY: the array is as long as the register, and need not be aligned.
                #[allow(unsafe_code)]
                unsafe {
                    $store(to.as_mut_ptr(), x);
                }
            }

            /// The lower 16 bits of every number as an f16.
            #[inline]
            #[target_feature(enable = $features)]
            pub(crate) fn lower_halves(x: Ints) -> Floats {
                widen_halves(narrow(x))
            }

            /// What the shift instructions take.
            #[inline]
            #[target_feature(enable = $features)]
            fn by(bits: i32) -> __m128i {
                _mm_cvtsi32_si128(bits)
            }
        }
    };
}

registers! {
    avx2, "avx2,fma,f16c", 8 lanes, at most 6 inputs,
    __m256i, __m256, _mm256_loadu_si256, _mm_loadu_si128, _mm256_storeu_ps,

    fn zero() -> Floats = _mm256_setzero_ps();
    fn splat(x: i32) -> Ints = _mm256_set1_epi32(x);
    fn splat_float(x: f32) -> Floats = _mm256_set1_ps(x);
    fn and(a: Ints, b: Ints) -> Ints = _mm256_and_si256(a, b);
    fn or(a: Ints, b: Ints) -> Ints = _mm256_or_si256(a, b);
    fn shift_right(a: Ints, bits: i32) -> Ints = _mm256_srl_epi32(a, by(bits));
    fn shift_right_pairs(a: Ints, bits: i32) -> Ints = _mm256_srl_epi16(a, by(bits));
    fn shift_left_pairs(a: Ints, bits: i32) -> Ints = _mm256_sll_epi16(a, by(bits));
    fn extend_pairs(a: Ints, bits: i32) -> Ints = _mm256_sra_epi16(a, by(bits));
    fn add_products(sum: Ints, a: Ints, b: Ints) -> Ints = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    fn add_many_products(sum: Ints, a: Ints, b: Ints) -> Ints = add_products(sum, a, b);
    fn to_floats(a: Ints) -> Floats = _mm256_cvtepi32_ps(a);
    fn multiply(a: Floats, b: Floats) -> Floats = _mm256_mul_ps(a, b);
    fn add_product(sum: Floats, a: Floats, b: Floats) -> Floats = _mm256_fmadd_ps(a, b, sum);
    fn subtract_product(sum: Floats, a: Floats, b: Floats) -> Floats = _mm256_fnmadd_ps(a, b, sum);
    fn widen_halves(x: __m128i) -> Floats = _mm256_cvtph_ps(x);
    fn narrow(x: Ints) -> __m128i = {
        let lower = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
        // Packs each half of the register.
        let packed = _mm256_packus_epi32(lower, lower);
        _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b00_00_10_00>(packed))
    };
}

registers! {
    avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c", 16 lanes, at most 12 inputs,
    __m512i, __m512, _mm512_loadu_si512, _mm256_loadu_si256, _mm512_storeu_ps,

    fn zero() -> Floats = _mm512_setzero_ps();
    fn splat(x: i32) -> Ints = _mm512_set1_epi32(x);
    fn splat_float(x: f32) -> Floats = _mm512_set1_ps(x);
    fn and(a: Ints, b: Ints) -> Ints = _mm512_and_si512(a, b);
    fn or(a: Ints, b: Ints) -> Ints = _mm512_or_si512(a, b);
    fn shift_right(a: Ints, bits: i32) -> Ints = _mm512_srl_epi32(a, by(bits));
    fn shift_right_pairs(a: Ints, bits: i32) -> Ints = _mm512_srl_epi16(a, by(bits));
    fn shift_left_pairs(a: Ints, bits: i32) -> Ints = _mm512_sll_epi16(a, by(bits));
    fn extend_pairs(a: Ints, bits: i32) -> Ints = _mm512_sra_epi16(a, by(bits));
    fn add_products(sum: Ints, a: Ints, b: Ints) -> Ints = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
    fn add_many_products(sum: Ints, a: Ints, b: Ints) -> Ints = {
        let mut sum = sum;
        // The compiler takes its intrinsic apart into the two instructions of `add_products`, whose
        // latency is shorter, but with many sums there are others to work on meanwhile.
        // SAFETY: the instruction reads and writes registers only, and the features are enabled.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!(
                "vpdpwssd {sum}, {a}, {b}",
                sum = inout(zmm_reg) sum, a = in(zmm_reg) a, b = in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    };
    fn to_floats(a: Ints) -> Floats = _mm512_cvtepi32_ps(a);
    fn multiply(a: Floats, b: Floats) -> Floats = _mm512_mul_ps(a, b);
    fn add_product(sum: Floats, a: Floats, b: Floats) -> Floats = _mm512_fmadd_ps(a, b, sum);
    fn subtract_product(sum: Floats, a: Floats, b: Floats) -> Floats = _mm512_fnmadd_ps(a, b, sum);
    fn widen_halves(x: __m256i) -> Floats = _mm512_cvtph_ps(x);
    fn narrow(x: Ints) -> __m256i = _mm512_cvtepi32_epi16(x);
}
