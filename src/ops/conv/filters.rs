//! The filters of a convolution, dense or int8.

use candle_core::{DType, Result, Tensor};

use super::{add_conv2d, conv2d, upsampled_conv2d};
use crate::ops::cpu::int8::{Int8Filters, Window};

/// The filters (O, C, K, K) of a convolution.
#[derive(Debug)]
pub enum Filters {
    /// A tensor.
    Dense(Tensor),
    /// Bytes with a scale per filter, on a CPU that has a kernel for them. Images are f32.
    Int8(Int8Filters),
}

impl Filters {
    /// Dtype of the images.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(w) => w.dtype(),
            Self::Int8(_) => DType::F32,
        }
    }

    /// Same padding at stride 1, for an odd K.
    fn same_padding(&self) -> Result<[usize; 4]> {
        let side = match self {
            Self::Dense(w) => w.dim(2)?,
            Self::Int8(w) => w.shape()[2],
        };
        Ok([side / 2; 4])
    }

    /// [`conv2d`](super::conv2d()) of x (B, C, H, W) with the bias b (O): (B, O, H', W').
    pub fn conv2d(&self, x: &Tensor, b: &Tensor, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
        match self {
            Self::Dense(w) => conv2d(x, w, Some(b), stride, padding),
            Self::Int8(w) => w.convolve(x, b, None, Window { stride, padding, repeat: 1 }),
        }
    }

    /// At stride 1 with same padding, for an odd K: x (B, C, H, W) to (B, O, H, W).
    pub fn same_conv2d(&self, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.conv2d(x, b, 1, self.same_padding()?)
    }

    /// As [`add_conv2d`]: residual (B, O, H, W) and x (B, C, H, W) to (B, O, H, W).
    pub fn add_conv2d(&self, residual: &Tensor, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => add_conv2d(residual, x, w, b),
            Self::Int8(w) => {
                let window = Window { stride: 1, padding: self.same_padding()?, repeat: 1 };
                w.convolve(x, b, Some(residual), window)
            }
        }
    }

    /// As [`upsampled_conv2d`]: x (B, C, H, W) to (B, O, 2H, 2W).
    pub fn upsampled_conv2d(&self, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => upsampled_conv2d(x, w, b),
            Self::Int8(w) => w.convolve(x, b, None, Window { stride: 1, padding: self.same_padding()?, repeat: 2 }),
        }
    }
}
