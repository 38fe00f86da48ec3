//! Trainable weights: created and stored at first use.

use std::collections::BTreeMap;

use candle_core::{Device, Error, Result, Shape, Tensor, Var};

use super::header::Fault;
use super::init::Init;
use crate::rng::{Rng, Stream, fnv1a};

/// The weights so far, with their initial values where known.
#[derive(Debug)]
pub(super) struct Trainable {
    pub(super) known: BTreeMap<String, Tensor>,
    pub(super) vars: BTreeMap<String, Var>,
}

impl Trainable {
    /// One of them.
    ///
    /// Errors: the known value has another shape. A new one in its place would lose its training.
    pub(super) fn get(&mut self, key: String, shape: Shape, init: Init, seed: u64, device: &Device) -> Result<Tensor> {
        if let Some(var) = self.vars.get(&key) {
            return Ok(var.as_tensor().clone());
        }
        let var = match self.known.get(&key) {
            Some(known) if known.shape() != &shape => {
                let (found, expected) = (known.dims().to_vec(), shape.dims().to_vec());
                return Err(Error::Msg(format!("{key}: {}", Fault::Shape { found, expected })));
            }
            Some(known) => Var::from_tensor(&known.to_device(device)?)?,
            None => Var::from_tensor(&initial(&key, shape, init, seed, device)?)?,
        };
        let tensor = var.as_tensor().clone();
        self.vars.insert(key, var);
        Ok(tensor)
    }
}

/// Initial values are a function of seed and key alone, so the order in which layers are built does
/// not matter.
pub(super) fn initial(key: &str, shape: Shape, init: Init, seed: u64, device: &Device) -> Result<Tensor> {
    let rng = Rng::new(seed, fnv1a(key), Stream::Train, 0);
    let draw = |f: &dyn Fn(u64) -> f64| (0..shape.elem_count() as u64).map(|i| f(i) as f32).collect::<Vec<f32>>();
    let values = match init {
        Init::Zeros => draw(&|_| 0.0),
        Init::Ones => draw(&|_| 1.0),
        Init::Normal { std } => draw(&|i| rng.normal(i) * std),
        Init::Uniform { bound } => draw(&|i| (2.0 * rng.uniform(i) - 1.0) * bound),
    };
    Tensor::from_vec(values, shape, device)
}
