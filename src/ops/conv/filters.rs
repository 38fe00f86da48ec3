//! The filters of a convolution as they are kept.

use candle_core::{DType, Result, Tensor};

use super::{add_conv2d, conv2d, upsampled_conv2d};
use crate::ops::bytes::{ByteFilters, Reading};

/// The filters (O, C, K, K) of a convolution.
#[derive(Debug)]
pub enum Filters {
    /// One number after the other.
    Dense(Tensor),
    /// Bytes with a scale for each of the O, on a CPU that has a kernel for them; images are f32.
    Bytes(ByteFilters),
}

impl Filters {
    /// Type of the images.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(w) => w.dtype(),
            Self::Bytes(_) => DType::F32,
        }
    }

    /// The padding that keeps an image's size, for filters of an odd side at stride 1.
    fn same(&self) -> Result<[usize; 4]> {
        let side = match self {
            Self::Dense(w) => w.dim(2)?,
            Self::Bytes(w) => w.shape()[2],
        };
        Ok([side / 2; 4])
    }

    /// As [`conv2d`](super::conv2d()).
    pub fn conv2d(&self, x: &Tensor, b: &Tensor, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
        match self {
            Self::Dense(w) => conv2d(x, w, Some(b), stride, padding),
            Self::Bytes(w) => w.convolve(x, b, None, Reading { stride, padding, repeat: 1 }),
        }
    }

    /// The same at stride 1 with padding that keeps the image's size, for filters of an odd side.
    pub fn same_conv2d(&self, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.conv2d(x, b, 1, self.same()?)
    }

    /// As [`add_conv2d`].
    pub fn add_conv2d(&self, base: &Tensor, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => add_conv2d(base, x, w, b),
            Self::Bytes(w) => w.convolve(x, b, Some(base), Reading { stride: 1, padding: self.same()?, repeat: 1 }),
        }
    }

    /// As [`upsampled_conv2d`].
    pub fn upsampled_conv2d(&self, x: &Tensor, b: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => upsampled_conv2d(x, w, b),
            Self::Bytes(w) => w.convolve(x, b, None, Reading { stride: 1, padding: self.same()?, repeat: 2 }),
        }
    }
}
