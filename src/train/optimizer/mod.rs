//! Muon for the matrices inside the network and AdamW for everything else, with gradient clipping and a cosine
//! schedule, and the exact state to resume from.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Result, Tensor, Var};
use rayon::prelude::*;

use crate::ops;

/// Knobs of one stage.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// Steps in all; the rate falls along a cosine to a hundredth of its peak.
    pub steps: usize,
    /// Largest norm of the gradient of all parameters together.
    pub clip: f64,
    /// Decoupled weight decay of matrices; vectors have none.
    pub weight_decay: f64,
    /// Exponential decay of the second moment.
    pub beta2: f64,
}

impl Schedule {
    /// Learning rate at a step (0-based).
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64;
        self.lr * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }
}

struct Param {
    name: String,
    var: Var,
    value: Vec<f32>,
    m: Vec<f32>,
    /// Second moments; Muon has none.
    v: Vec<f32>,
}

/// Whether Muon trains a parameter: matrices and kernels that take features to features, not tables of vectors.
fn muon(name: &str, var: &Var) -> bool {
    var.rank() > 1 && !["embed", "lm_head"].iter().any(|table| name.contains(table))
}

/// The trained parameters and their moments.
pub struct Optimizer {
    params: Vec<Param>,
    /// Steps taken.
    pub step: usize,
}

impl Optimizer {
    /// Trains those of `vars` whose key `select` accepts.
    pub fn new(vars: &BTreeMap<String, Var>, select: impl Fn(&str) -> bool) -> Result<Self> {
        let params = vars.iter().filter(|(name, _)| select(name)).map(|(name, var)| {
            let value = var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
            let m = vec![0.0; value.len()];
            let v = if muon(name, var) { Vec::new() } else { m.clone() };
            Ok(Param { name: name.clone(), var: var.clone(), value, m, v })
        });
        Ok(Self { params: params.collect::<Result<_>>()?, step: 0 })
    }

    /// Parameters trained.
    pub fn count(&self) -> usize {
        self.params.iter().map(|p| p.value.len()).sum()
    }

    /// One step down the gradient of `loss` (a scalar). Returns the gradient's norm before clipping; a norm that is
    /// not finite skips the update.
    pub fn descend(&mut self, loss: &Tensor, schedule: &Schedule) -> Result<f64> {
        let grads = loss.backward()?;
        let grads = self
            .params
            .iter()
            .map(|p| grads.get(p.var.as_tensor()).map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose())
            .collect::<Result<Vec<_>>>()?;
        let square: f64 =
            grads.par_iter().flatten().map(|g| g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()).sum();
        let norm = square.sqrt();
        let rate = schedule.at(self.step);
        self.step += 1;
        if !norm.is_finite() {
            return Ok(norm);
        }
        let scale = (schedule.clip / (norm + 1e-6)).min(1.0) as f32;
        let (step, lr, beta2) = (self.step, rate as f32, schedule.beta2 as f32);
        self.params.par_iter_mut().zip(&grads).try_for_each(|(p, grad)| {
            let Some(grad) = grad else { return Ok(()) };
            let decay = if p.var.rank() > 1 { schedule.weight_decay as f32 } else { 0.0 };
            match p.v.is_empty() {
                true => ops::muon_step(&mut p.value, grad, &mut p.m, p.var.dims()[0], lr, decay, scale),
                false => {
                    ops::adamw_step(&mut p.value, grad, &mut p.m, &mut p.v, lr, 0.9, beta2, 1e-8, decay, step, scale)
                }
            }
            p.var.set(&Tensor::from_slice(&p.value, p.var.shape(), p.var.device())?)
        })?;
        Ok(norm)
    }

    /// Writes moments and step; the values themselves are in the weights' own file.
    pub fn save(&self, path: &Path) -> crate::error::Result<()> {
        let mut tensors = BTreeMap::new();
        for p in &self.params {
            for (kind, data) in [("m", &p.m), ("v", &p.v)].into_iter().filter(|(_, data)| !data.is_empty()) {
                let tensor = Tensor::from_slice(data, p.var.shape(), p.var.device())?;
                tensors.insert(format!("{kind}.{}", p.name), tensor);
            }
        }
        let step = std::collections::HashMap::from([("step".to_string(), self.step.to_string())]);
        crate::checkpoint::save(path, tensors, Some(step))
    }

    /// Reads what [`Optimizer::save`] wrote.
    pub fn restore(&mut self, path: &Path) -> crate::error::Result<()> {
        let bytes = std::fs::read(path)?;
        let corrupt = |what: String| crate::error::Error::model(format!("{}: {what}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| corrupt(e.to_string()))?;
        let step = header.metadata().as_ref().and_then(|m| m.get("step")).and_then(|s| s.parse().ok());
        self.step = step.ok_or_else(|| corrupt("no step".into()))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &candle_core::Device::Cpu)?;
        for p in &mut self.params {
            for (kind, data) in [("m", &mut p.m), ("v", &mut p.v)].into_iter().filter(|(_, data)| !data.is_empty()) {
                let key = format!("{kind}.{}", p.name);
                let tensor = tensors.get(&key).ok_or_else(|| corrupt(format!("no {key}")))?;
                *data = tensor.flatten_all()?.to_vec1()?;
            }
        }
        Ok(())
    }
}
