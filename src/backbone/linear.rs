//! A linear layer on weights that may be in blocks.

use candle_core::{Result, Tensor};

use crate::checkpoint::{Init, Weights};
use crate::ops::{self, WeightMatrix};

/// `x wᵀ + b`.
#[derive(Debug)]
pub(crate) struct Linear {
    /// (to, from).
    pub(crate) weight: WeightMatrix,
    /// (to).
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// Keys `weight` (to, from) and, if there is one, `bias`.
    pub(crate) fn load(w: &Weights, from: usize, to: usize, bias: bool, init: Init) -> Result<Self> {
        let bias = if bias { Some(w.get(to, "bias", Init::Zeros)?) } else { None };
        Ok(Self { weight: w.matrix((to, from), "weight", init)?, bias })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.linear(x, self.bias.as_ref())
    }

    /// As [`Self::forward`] of `y`, added to x, which nothing else may need.
    pub(crate) fn forward_onto(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        ops::add_linear(x, y, &self.weight, self.bias.as_ref())
    }
}
