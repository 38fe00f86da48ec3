//! Kernels for the CPU: f32 activations, weights of any supported type, all threads of rayon's
//! pool.
//!
//! [`matmul`] chooses among the products with f32 weights and GGML blocks: [`packed_blocks`] for
//! blocks of 8 and 4 bits; for others [`gemv`] for a few rows of activations, then [`gemm_bf16`]
//! where the CPU has the instructions and the weights the type, and [`gemm_f32`] or the crate of
//! [`gemm`] otherwise. Weights of int8 with a scale per row go from `ops::matrix` to [`int8`]
//! directly.

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod columns;
pub(crate) mod direct_conv;
pub(crate) mod exp;
pub(crate) mod gemm;
#[cfg(target_arch = "x86_64")]
pub(crate) mod gemm_bf16;
pub(crate) mod gemm_f32;
pub(crate) mod gemv;
pub(crate) mod im2col;
pub(crate) mod int8;
mod integer_isa;
pub(crate) mod matmul;
pub(crate) mod operand;
#[cfg(target_arch = "x86_64")]
pub(crate) mod pack_bf16;
pub(crate) mod packed_blocks;
pub(crate) mod quants;
pub(crate) mod reduce;
