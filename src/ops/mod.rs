//! The network's kernels: fused, multi-threaded f32 on the CPU, each with its backward pass.
//!
//! Every function takes any device and dtype. On the CPU in f32 it runs as one candle custom op that borrows its
//! operands and keeps no intermediate for the backward pass, which recomputes what it needs. With `--features cuda` the same holds
//! for f32 on a GPU; in bf16, what counts when a model draws has kernels there, forward only. Elsewhere it is the plain
//! composition of candle's own differentiable operations, with softmax, norms and losses in f32; the tests hold the
//! kernels to that composition, values and gradients.

mod activation;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod bytes;
#[cfg(test)]
mod check;
mod columns;
mod conv;
#[cfg(feature = "cuda")]
mod cuda;
mod exp;
mod few;
mod group_norm;
#[cfg(target_arch = "x86_64")]
mod layout;
mod linear;
mod loss;
mod matrix;
mod modulate;
mod norm;
mod optim;
#[cfg(target_arch = "x86_64")]
mod panels;
mod product;
mod resize;
mod rope;
mod select;
mod slice;
mod tiles;

pub use activation::{add, gelu_erf, gelu_tanh, quick_gelu, swiglu};
pub use attention::{Mask, attention, attention_rows};
pub use blocks::{dequantise, quantise};
pub use bytes::{ByteFilters, Bytes};
pub use conv::{Filters, add_conv2d, conv2d, upsampled_conv2d};
#[cfg(feature = "cuda")]
pub use cuda::{MAX_TOP_K, Sample, sample};
pub use group_norm::group_norm;
pub use linear::linear;
pub use loss::cross_entropy;
pub use matrix::{WeightMatrix, add_linear, gated_linear, linear_each};
pub use modulate::{add_gated, modulated_norm};
pub use norm::{layer_norm, rms_norm};
pub use optim::{adamw_step, adamw_stepped, muon_step, muon_stepped};
pub use resize::{pixel_shuffle, pixel_unshuffle};
pub use rope::{project_heads, rope};
pub use select::select;
