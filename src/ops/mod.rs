//! The operations of all networks.
//!
//! They exist because candle-nn's fused operations (`rms_norm`, `layer_norm`, `rope`,
//! `softmax_last_dim`, `sdpa`) have no backward pass, so that code which also trains cannot call
//! them, and because candle multiplies neither int8 with a scale per row nor bf16 on a CPU.
//!
//! - Linear layers over a [`WeightMatrix`] of any type: [`linear`], [`linear_each`], [`add_linear`]
//!   with a residual, [`gated_linear`] with SwiGLU.
//! - Attention with grouped keys: [`attention`], [`attention_rows`]; rotary positions: [`rope`],
//!   [`project_heads`].
//! - Halves of a block for training: [`attention_branch`], [`swiglu_branch`].
//! - Norms: [`rms_norm`], [`layer_norm`], [`group_norm`].
//! - Convolutions over dense or int8 [`Filters`]: [`conv2d`], [`add_conv2d`], [`upsampled_conv2d`];
//!   of every channel by itself: [`depthwise_conv2d`].
//! - Adaptive norms and gates: [`modulated_norm`], [`add_gated`].
//! - Element-wise: [`add`], [`swiglu`], [`gelu_erf`], [`gelu_tanh`], [`quick_gelu`].
//! - Rows of a table: [`select`]. GGML's formats: [`quantize`], [`dequantize`].
//!
//! Every function takes any device and dtype. In f32 on the CPU it is one operation that borrows
//! its operands and keeps nothing for the backward pass but its inputs; only the halves of a block
//! keep more. With the feature `cuda` the
//! same holds for f32 on a GPU, and in bf16 what drawing needs has kernels there, forward only.
//! Anything else is composed of candle's own differentiable operations, with softmax and norms in
//! f32. Tests compare the kernels with these compositions and with candle-nn, values and gradients.
//!
//! The kernels are in `cpu` and `cuda`; `custom_op` ties them to candle.

mod activation;
mod attention;
mod branch;
mod conv;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
mod cuda_ops;
pub(crate) mod custom_op;
mod depthwise_conv;
mod group_norm;
mod linear;
mod matrix;
mod modulate;
mod norm;
mod rope;
mod select;
#[cfg(test)]
pub(crate) mod testing;

pub use activation::{add, gelu_erf, gelu_tanh, quick_gelu, swiglu};
pub use attention::{Mask, attention, attention_rows};
pub use branch::{attention_branch, swiglu_branch};
pub use conv::{Filters, add_conv2d, conv2d, upsampled_conv2d};
pub use cpu::int8::{Int8Filters, Int8Matrix};
pub use cpu::packed_blocks::PackedBlocks;
pub use cpu::quants::{dequantize, quantize};
#[cfg(feature = "cuda")]
pub use cuda::{MAX_TOP_K, Sample, sample};
pub use depthwise_conv::depthwise_conv2d;
pub use group_norm::group_norm;
pub use linear::linear;
pub use matrix::{WeightMatrix, add_linear, gated_linear, linear_each};
pub use modulate::{add_gated, modulated_norm};
pub use norm::{layer_norm, rms_norm};
pub use rope::{project_heads, rope};
pub use select::select;
