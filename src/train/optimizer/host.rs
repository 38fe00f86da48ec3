//! Parameters on a CPU, each by itself.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor, Var};
use rayon::prelude::*;

use super::steps::{adamw_step, muon_step};
use super::{BETA1, EPS, Pace, TINY, is_matrix, muon};
use crate::error;

/// A parameter and its moments.
pub(super) struct Param {
    name: String,
    var: Var,
    value: Vec<f32>,
    m: Vec<f32>,
    /// Second moments; Muon has none.
    v: Vec<f32>,
}

impl Param {
    pub(super) fn new(name: &str, var: &Var) -> Result<Self> {
        let value = var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
        let m = vec![0.0; value.len()];
        let v = if muon(name, var) { Vec::new() } else { m.clone() };
        Ok(Self { name: name.into(), var: var.clone(), value, m, v })
    }

    /// Reads its parts by kind, name and shape.
    pub(super) fn restore(&mut self, part: impl Fn(&str, &str, &Shape) -> error::Result<Tensor>) -> error::Result<()> {
        let all = [("value", &mut self.value), ("m", &mut self.m), ("v", &mut self.v)];
        for (kind, data) in all.into_iter().filter(|(_, data)| !data.is_empty()) {
            *data = part(kind, &self.name, self.var.shape())?.flatten_all()?.to_vec1()?;
        }
        Ok(self.set()?)
    }

    fn set(&self) -> Result<()> {
        self.var.set(&Tensor::from_slice(&self.value, self.var.shape(), self.var.device())?)
    }

    /// `scale` multiplies the gradient first.
    fn step(&mut self, grad: &[f32], scale: f32, pace: Pace) -> Result<()> {
        let Pace { lr, beta2, step, .. } = pace;
        let decay = if is_matrix(&self.var) { pace.decay } else { 0.0 };
        let (value, m) = (&mut self.value, &mut self.m);
        match self.v.is_empty() {
            true => muon_step(value, grad, m, self.var.dims()[0], lr, decay, scale),
            false => adamw_step(value, grad, m, &mut self.v, lr, BETA1, beta2, EPS, decay, step, scale),
        }
        self.set()
    }
}

/// One step of all, unless the norm of their gradients is not finite. Returns that norm.
pub(super) fn descend(params: &mut [Param], grads: &GradStore, pace: Pace) -> Result<f64> {
    let grads = params
        .iter()
        .map(|p| grads.get(p.var.as_tensor()).map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose())
        .collect::<Result<Vec<_>>>()?;
    let square = |g: &Option<Vec<f32>>| g.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let squares: Vec<f64> = grads.par_iter().map(square).collect();
    let norm = squares.iter().sum::<f64>().sqrt();
    if norm.is_finite() {
        let scale = (pace.clip / (norm + TINY)).min(1.0) as f32;
        let step = |(param, grad): (&mut Param, &Option<Vec<f32>>)| match grad {
            Some(grad) => param.step(grad, scale, pace),
            None => Ok(()),
        };
        params.par_iter_mut().zip(&grads).try_for_each(step)?;
    }
    Ok(norm)
}

/// Values, first and second moments by `value.`, `m.` and `v.` and the parameter's name.
pub(super) fn state(params: &[Param]) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for p in params {
        for (kind, data) in
            [("value", &p.value), ("m", &p.m), ("v", &p.v)].into_iter().filter(|(_, data)| !data.is_empty())
        {
            let tensor = Tensor::from_slice(data, p.var.shape(), p.var.device())?;
            tensors.insert(format!("{kind}.{}", p.name), tensor);
        }
    }
    Ok(tensors)
}
