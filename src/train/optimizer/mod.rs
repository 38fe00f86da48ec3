//! Muon for the matrices inside the network and AdamW for everything else, with gradient clipping
//! and a cosine schedule, and the exact state to resume from.

mod gpu;
mod host;
mod steps;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Shape, Tensor, Var};

use crate::error::{self, Error};

/// Hyperparameters of one stage, the schedule of its learning rate among them.
#[derive(Clone, Copy, Debug)]
pub struct Hyperparameters {
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

impl Hyperparameters {
    /// Learning rate at a step (0-based).
    pub fn lr_at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64;
        self.lr * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }
}

/// What all parameters of a step have in common.
#[derive(Clone, Copy)]
struct Pace {
    /// Learning rate.
    lr: f32,
    /// Weight decay of matrices.
    decay: f32,
    beta2: f32,
    /// Steps, with this one.
    step: usize,
    /// Largest norm of all gradients.
    clip: f64,
}

/// Added to the norm before it divides.
const TINY: f64 = 1e-6;

const BETA1: f32 = 0.9;
const EPS: f32 = 1e-8;

/// Whether a parameter is a matrix, a kernel or a table: no vector, however many dimensions it is
/// written with.
fn is_matrix(var: &Var) -> bool {
    var.dims().iter().filter(|&&size| size > 1).count() > 1
}

/// Whether Muon trains a parameter: matrices and kernels that take features to features, not tables
/// of vectors.
fn muon(name: &str, var: &Var) -> bool {
    is_matrix(var) && !["embed", "lm_head", "pos_1LC", "depthwise"].iter().any(|table| name.contains(table))
}

/// What [`Optimizer::save`] wrote, all of one step.
pub struct State {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl State {
    /// One of its tensors.
    ///
    /// Errors: [`error::Kind::Model`] where it is missing or of another shape.
    pub fn tensor(&self, key: &str, shape: impl Into<Shape>) -> error::Result<Tensor> {
        let shape = shape.into();
        let tensor = self.tensors.get(key).filter(|tensor| tensor.shape() == &shape);
        tensor.cloned().ok_or_else(|| corrupt(&self.path, &format!("no {key} of shape {:?}", shape.dims())))
    }
}

/// A state that cannot be gone on from.
fn corrupt(path: &Path, what: &dyn Display) -> Error {
    let path = path.display();
    Error::model(format!("{path}: {what}"))
        .hint(format!("rm {path} begins this part again, from the weights as they are"))
}

/// The trained parameters and their moments, where they are.
enum Trained {
    Host(Vec<host::Param>),
    Gpu(Vec<gpu::Group>),
}

/// The trained parameters and their moments.
pub struct Optimizer {
    trained: Trained,
    count: usize,
    /// Steps taken.
    pub step: usize,
}

impl Optimizer {
    /// Trains those of `vars` whose key `select` accepts.
    pub fn new(vars: &BTreeMap<String, Var>, select: impl Fn(&str) -> bool) -> Result<Self> {
        let chosen: Vec<(&String, &Var)> = vars.iter().filter(|(name, _)| select(name)).collect();
        let count = chosen.iter().map(|(_, var)| var.elem_count()).sum();
        let trained = match chosen.first().is_none_or(|(_, var)| var.device().is_cpu()) {
            true => Trained::Host(chosen.iter().map(|(name, var)| host::Param::new(name, var)).collect::<Result<_>>()?),
            false => Trained::Gpu(gpu::Group::all(&chosen)?),
        };
        Ok(Self { trained, count, step: 0 })
    }

    /// Parameters trained.
    pub fn count(&self) -> usize {
        self.count
    }

    /// One step down the gradient of `loss` (a scalar). Returns the gradient's norm before
    /// clipping; a norm that is not finite skips the update.
    pub fn descend(&mut self, loss: &Tensor, plan: &Hyperparameters) -> Result<f64> {
        let grads = loss.backward()?;
        let lr = plan.lr_at(self.step) as f32;
        self.step += 1;
        let (decay, beta2) = (plan.weight_decay as f32, plan.beta2 as f32);
        let pace = Pace { lr, decay, beta2, step: self.step, clip: plan.clip };
        match &mut self.trained {
            Trained::Host(params) => host::descend(params, &grads, pace),
            Trained::Gpu(groups) => gpu::descend(groups, &grads, pace),
        }
    }

    /// Writes values, moments and step, and what `more` a part resumes from, in one file: all of
    /// the same step.
    pub fn save(&self, path: &Path, more: BTreeMap<String, Tensor>) -> error::Result<()> {
        let mut tensors = match &self.trained {
            Trained::Host(params) => host::state(params)?,
            Trained::Gpu(groups) => gpu::state(groups)?,
        };
        tensors.extend(more);
        let step = HashMap::from([("step".to_string(), self.step.to_string())]);
        crate::checkpoint::save(path, tensors, Some(step))
    }

    /// Resumes from a file of [`Optimizer::save`], and returns all of it.
    ///
    /// Errors: [`error::Kind::Model`] for a file that is broken, or of other parameters than these.
    pub fn restore(&mut self, path: &Path) -> error::Result<State> {
        let bytes = std::fs::read(path)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| corrupt(path, &e))?;
        let step = header.metadata().as_ref().and_then(|m| m.get("step")).and_then(|s| s.parse().ok());
        self.step = step.ok_or_else(|| corrupt(path, &"no step"))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let state = State { path: path.to_path_buf(), tensors };
        let part = |kind: &str, name: &str, shape: &Shape| state.tensor(&format!("{kind}.{name}"), shape);
        match &mut self.trained {
            Trained::Host(params) => params.iter_mut().try_for_each(|param| param.restore(part))?,
            Trained::Gpu(groups) => groups.iter_mut().try_for_each(|group| group.restore(part))?,
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::linear;

    #[test]
    fn muon_trains_what_takes_features_to_features() -> Result<()> {
        let layers = [
            ("model.layers.0.mlp.up_proj.weight", &[6, 4][..]),
            ("decoder.conv_in.weight", &[6, 4, 3, 3]),
            ("quant_conv.weight", &[6, 4, 1, 1]),
        ];
        let others = [
            ("model.norm.weight", &[6][..]),
            ("decoder_vqkd.cls_token", &[1, 1, 6]),
            ("decoder_vqkd.pos_embed", &[1, 5, 6]),
            ("model.pos_1LC", &[5, 6]),
            ("model.scale_embed", &[5, 6]),
            ("model.lvl_embed.weight", &[5, 6]),
            ("model.embed_tokens.weight", &[5, 6]),
            ("lm_head.weight", &[5, 6]),
            ("unet.middle.0.depthwise", &[9, 6]),
        ];
        for (parameters, muons) in [(&layers[..], true), (&others, false)] {
            for (name, shape) in parameters {
                assert_eq!(muon(name, &Var::zeros(*shape, DType::F32, &Device::Cpu)?), muons, "{name}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_state_that_does_not_fit_is_told() -> error::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("state");
        let optimizer = |name: &str| -> Result<Optimizer> {
            Optimizer::new(&BTreeMap::from([(name.into(), Var::ones((6, 4), DType::F32, &Device::Cpu)?)]), |_| true)
        };
        optimizer("a")?.save(&path, BTreeMap::new())?;
        let error = optimizer("b")?.restore(&path).err().expect("another parameter");
        assert!(error.message.ends_with("no value.b of shape [6, 4]"), "{}", error.message);
        assert!(error.hint.is_some_and(|hint| hint.contains(&format!("rm {}", path.display()))));
        let state = optimizer("a")?.restore(&path)?;
        assert!(state.tensor("value.a", (6, 4)).is_ok() && state.tensor("value.a", (4, 6)).is_err());
        Ok(())
    }

    /// One run of steps on the host, one with the groups of a GPU (of the CPU, here), each from the
    /// same values and through a save and a restore.
    #[test]
    fn a_gpu_takes_the_steps_of_the_host() -> error::Result<()> {
        let plan = Hyperparameters { lr: 0.02, warmup: 2, steps: 8, clip: 0.5, weight_decay: 0.1, beta2: 0.98 };
        let run = |grouped: bool| -> error::Result<Vec<Vec<f32>>> {
            let keys = [("a.weight", (6, 4)), ("b.weight", (6, 4)), ("c.weight", (4, 6)), ("embed.weight", (5, 4))];
            let mut vars = BTreeMap::new();
            for (i, (name, shape)) in keys.into_iter().enumerate() {
                let values = Tensor::arange(0f32, (shape.0 * shape.1) as f32, &Device::Cpu)?;
                let values = ((values * (0.37 + i as f64))?.sin()? * 0.5)?.reshape(shape)?;
                vars.insert(name.to_string(), Var::from_tensor(&values)?);
            }
            vars.insert("a.bias".into(), Var::zeros(6, DType::F32, &Device::Cpu)?);
            // What no loss knows of.
            vars.insert("unused.weight".into(), Var::ones((6, 4), DType::F32, &Device::Cpu)?);
            vars.insert("unused.bias".into(), Var::ones(6, DType::F32, &Device::Cpu)?);
            let make = || -> Result<Optimizer> {
                let mut optimizer = Optimizer::new(&vars, |_| true)?;
                if grouped {
                    let chosen: Vec<(&String, &Var)> = vars.iter().collect();
                    optimizer.trained = Trained::Gpu(gpu::Group::all(&chosen)?);
                }
                Ok(optimizer)
            };
            let mut optimizer = make()?;
            let folder = tempfile::tempdir()?;
            for step in 0..8 {
                if step == 4 {
                    optimizer.save(&folder.path().join("state"), BTreeMap::new())?;
                    vars["c.weight"].set(&vars["c.weight"].zeros_like()?)?;
                    optimizer = make()?;
                    optimizer.restore(&folder.path().join("state"))?;
                }
                let x = vars["embed.weight"].as_tensor();
                let y = linear(x, &vars["a.weight"], Some(&vars["a.bias"]))?.tanh()?;
                // candle's own product does not detach the gradients that it gives to variables.
                let z = y.matmul(&vars["b.weight"])?.matmul(&vars["c.weight"])?;
                let loss = (z.sum_all()? + (x * 3.0)?.sqr()?.sum_all()?)?;
                optimizer.descend(&loss, &plan)?;
                if let Trained::Gpu(groups) = &optimizer.trained {
                    assert!(!groups.iter().any(|group| group.value.track_op() || group.m.track_op()), "a graph grows");
                }
            }
            let values = vars.values().map(|var| var.flatten_all()?.to_vec1::<f32>());
            Ok(values.collect::<Result<_>>()?)
        };
        for (host, gpu) in run(false)?.iter().flatten().zip(run(true)?.iter().flatten()) {
            assert!((host - gpu).abs() < 2e-4, "{host} {gpu}");
        }
        Ok(())
    }
}
