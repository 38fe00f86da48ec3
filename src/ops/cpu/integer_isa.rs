//! Instruction sets that multiply 16-bit integers and sum in 32 bits, which the integer kernels are
//! compiled for.

use std::sync::OnceLock;

/// An instruction set of this CPU: only [`IntegerIsa::all`] makes one, after it has checked that the
/// CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntegerIsa {
    /// With FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// F, BW and VNNI, and what AVX2 comes with.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl IntegerIsa {
    /// Those of this CPU, the widest first.
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            let all = [(avx512, Self::Avx512), (avx2, Self::Avx2)];
            all.into_iter().filter_map(|(has, isa)| has.then_some(isa)).collect()
        }
        #[cfg(not(target_arch = "x86_64"))]
        Vec::new()
    }

    /// The widest of this CPU, if any.
    pub(super) fn best() -> Option<Self> {
        static BEST: OnceLock<Option<IntegerIsa>> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().first().copied())
    }
}
