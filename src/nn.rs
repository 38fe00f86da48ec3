//! The layers that all networks are made of, loaded from [`Weights`] by their public key names.
//!
//! candle-nn's layers hold dense tensors only, and call neither our kernels nor anything with a
//! backward pass for norms (see [`ops`]).

use candle_core::{DType, Result, Tensor};

use crate::checkpoint::{Init, Weights};
use crate::ops::{self, Filters, WeightMatrix};

/// More layers than any transformer has: a larger number is damage.
pub(crate) const MAX_LAYERS: usize = 1000;
/// No width, vocabulary or table of a model is larger: its shapes multiply without overflow.
pub(crate) const MAX_WIDTH: usize = 1 << 24;

/// Errors: a size that is 0, or larger than [`MAX_WIDTH`], by its name.
pub(crate) fn check_sizes<'a>(sizes: impl IntoIterator<Item = (&'a str, usize)>) -> std::result::Result<(), String> {
    match sizes.into_iter().find(|(_, size)| !(1..=MAX_WIDTH).contains(size)) {
        Some((name, size)) => Err(format!("{name} is {size}, not 1 to {MAX_WIDTH}")),
        None => Ok(()),
    }
}

/// Initial weights of a layer with `fan_in` inputs whose outputs are as large as its inputs
/// (LeCun).
pub fn lecun_normal(fan_in: usize) -> Init {
    Init::Normal { std: (fan_in as f64).powf(-0.5) }
}

/// `x wᵀ + b`.
#[derive(Debug)]
pub struct Linear {
    weight: WeightMatrix,
    bias: Option<Tensor>,
}

impl Linear {
    /// From `weight` (out, in) and `bias` (out).
    pub fn new(weight: impl Into<WeightMatrix>, bias: Option<Tensor>) -> Self {
        Self { weight: weight.into(), bias }
    }

    /// Keys `weight` (out, in), quantised if the matrices of `w` are, and `bias` (out).
    pub fn load(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        Self::load_with(w, inputs, outputs, true, lecun_normal(inputs))
    }

    /// As [`Self::load`], with or without a bias, from weights that start as `init`.
    pub fn load_with(w: &Weights, inputs: usize, outputs: usize, bias: bool, init: Init) -> Result<Self> {
        let weight = w.matrix((outputs, inputs), "weight", init)?;
        Ok(Self { weight, bias: bias.then(|| w.get(outputs, "bias", Init::Zeros)).transpose()? })
    }

    /// As [`Self::load`], but never quantised: for features that are compared with a codebook.
    pub fn load_dense(w: &Weights, inputs: usize, outputs: usize) -> Result<Self> {
        let weight = w.get((outputs, inputs), "weight", lecun_normal(inputs))?;
        Ok(Self::new(weight, Some(w.get(outputs, "bias", Init::Zeros)?)))
    }

    /// (out, in).
    pub fn weight(&self) -> &WeightMatrix {
        &self.weight
    }

    /// (out).
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// (..., in) -> (..., out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.linear(x, self.bias.as_ref())
    }

    /// `residual` (..., out) plus [`Self::forward`] of x (..., in), in the residual's memory where
    /// there is a kernel for that: nothing else may use it.
    pub fn forward_add(&self, residual: Tensor, x: &Tensor) -> Result<Tensor> {
        ops::add_linear(residual, x, &self.weight, self.bias.as_ref())
    }
}

/// Root-mean-square normalisation over the last dimension.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Key `weight` (size).
    pub fn load(w: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: w.get(size, "weight", Init::Ones)?, eps: eps as f32 })
    }

    /// Weights (size), and what is added to the mean square.
    pub fn parts(&self) -> (&Tensor, f32) {
        (&self.weight, self.eps)
    }

    /// (..., size) -> (..., size).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }
}

/// Normalisation over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Keys `weight` and `bias` (size).
    pub fn load(w: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: w.get(size, "weight", Init::Ones)?, bias: w.get(size, "bias", Init::Zeros)?, eps })
    }

    /// (..., size) -> (..., size).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Normalisation over groups of channels and all pixels.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Keys `weight` and `bias` (channels).
    pub fn load(w: &Weights, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        let weight = w.get(channels, "weight", Init::Ones)?;
        Ok(Self { weight, bias: w.get(channels, "bias", Init::Zeros)?, groups, eps })
    }

    /// (B, C, ...) -> (B, C, ...).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, false)
    }

    /// [`Self::forward`] and SiLU.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, true)
    }
}

/// A two-dimensional convolution with a square kernel of an odd side and a bias.
#[derive(Debug)]
pub struct Conv {
    weight: Filters,
    bias: Tensor,
}

impl Conv {
    /// Keys `weight` (out, in, kernel, kernel), int8 if the matrices of `w` are, and `bias` (out).
    pub fn load(w: &Weights, inputs: usize, outputs: usize, kernel: usize) -> Result<Self> {
        let bound = 1.0 / ((inputs * kernel * kernel) as f64).sqrt();
        Self::load_with(w, inputs, outputs, kernel, Init::Uniform { bound })
    }

    /// As [`Self::load`], from weights that start as `init`.
    pub fn load_with(w: &Weights, inputs: usize, outputs: usize, kernel: usize, init: Init) -> Result<Self> {
        let weight = match w.filters([outputs, inputs, kernel, kernel], "weight", init)? {
            // Channels last, as the CUDA kernels read them.
            Filters::Dense(weight) if w.device().is_cuda() && weight.dtype() == DType::BF16 => {
                Filters::Dense(weight.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2))?)
            }
            weight => weight,
        };
        Ok(Self { weight, bias: w.get(outputs, "bias", Init::Zeros)? })
    }

    /// Dtype of the images.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// At stride 1 with same padding: (B, in, H, W) -> (B, out, H, W).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.same_conv2d(x, &self.bias)
    }

    /// `residual` (B, out, H, W) plus [`Self::forward`] of x.
    pub fn forward_add(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.weight.add_conv2d(residual, x, &self.bias)
    }

    /// [`Self::forward`] of x enlarged by repeating pixels: (B, in, H, W) -> (B, out, 2H, 2W).
    pub fn forward_upsampled(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.upsampled_conv2d(x, &self.bias)
    }

    /// At `stride`, with zero padding of `[top, bottom, left, right]` pixels:
    /// (B, in, H, W) -> (B, out, H', W').
    pub fn forward_strided(&self, x: &Tensor, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
        self.weight.conv2d(x, &self.bias, stride, padding)
    }
}
