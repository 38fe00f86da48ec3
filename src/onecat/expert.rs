//! The generation expert: a SwiGLU with an adapter for every scale.

use candle_core::{Result, Tensor};

use super::OneCatConfig;
use crate::checkpoint::{Init, Weights};
use crate::nn::lecun_normal;
use crate::ops::{self, WeightMatrix};

/// A projection with low-rank adapters (LoRA): `W x + gain * B_k A_k x` at scale k. They are not
/// merged into W, because every scale has another one.
#[derive(Debug)]
struct Adapted {
    base: WeightMatrix,
    /// (rank, inputs) of every scale.
    down: Vec<WeightMatrix>,
    /// (outputs, rank) of every scale.
    up: Vec<WeightMatrix>,
}

impl Adapted {
    fn load(w: &Weights, c: &OneCatConfig, inputs: usize, outputs: usize) -> Result<Self> {
        let (rank, scales) = (c.adapter_rank, c.adapters);
        let base = w.pp("base_layer").matrix((outputs, inputs), "weight", lecun_normal(inputs))?;
        let all = rank * scales;
        // The peft library's names; It initialises B as zeros, which would disable the
        // adapters of random weights.
        let down = w.pp("lora_A.default").matrix((all, inputs), "weight", lecun_normal(inputs))?;
        let small = Init::Normal { std: 0.1 * (rank as f64).powf(-0.5) };
        let up = w.pp("lora_B.default").matrix((outputs, all), "weight", small)?;
        Ok(Self {
            base,
            down: (0..scales).map(|k| down.narrow(k * rank, rank)).collect::<Result<_>>()?,
            up: (0..scales).map(|k| up.columns(k * rank, rank)).collect::<Result<_>>()?,
        })
    }

    /// `y`, the base's product, plus the adapter of scale `k`; `low` is the product of its first
    /// matrix.
    fn add(&self, y: Tensor, low: &Tensor, k: usize, gain: f64) -> Result<Tensor> {
        ops::add_linear(y, &(low * gain)?, &self.up[k], None)
    }
}

/// The feed-forward half of a block for codes.
#[derive(Debug)]
pub(super) struct AdaptedSwiGlu {
    gate: Adapted,
    up: Adapted,
    down: Adapted,
    gain: f64,
}

impl AdaptedSwiGlu {
    /// The keys `{gate,up,down}_proj.{base_layer.weight, lora_A.default.weight,
    /// lora_B.default.weight}`.
    pub(super) fn load(w: &Weights, c: &OneCatConfig) -> Result<Self> {
        let (hidden, inner) = (c.transformer.hidden_size, c.transformer.intermediate_size);
        Ok(Self {
            gate: Adapted::load(&w.pp("gate_proj"), c, hidden, inner)?,
            up: Adapted::load(&w.pp("up_proj"), c, hidden, inner)?,
            down: Adapted::load(&w.pp("down_proj"), c, inner, hidden)?,
            gain: c.adapter_gain,
        })
    }

    /// `residual` plus the expert's output for x (R, T, hidden), codes of scale `k`.
    pub(super) fn forward_add(&self, residual: Tensor, x: &Tensor, k: usize) -> Result<Tensor> {
        let products = [&self.gate.base, &self.up.base, &self.gate.down[k], &self.up.down[k]];
        let [gate, up, gate_low, up_low] = ops::linear_each(x, products.map(|w| (w, None)))?;
        let gate = self.gate.add(gate, &gate_low, k, self.gain)?;
        let up = self.up.add(up, &up_low, k, self.gain)?;
        let y = ops::swiglu(&gate, &up)?;
        drop((gate, up));
        let low = self.down.down[k].linear(&y, None)?;
        self.down.add(ops::add_linear(residual, &y, &self.down.base, None)?, &low, k, self.gain)
    }
}
