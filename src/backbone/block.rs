//! The block: grouped-query attention and SwiGLU, each with an RMSNorm before it (Qwen2.5) or after it (TokenFlow-t2i).
//! candle-transformers' Qwen2 has neither three-dimensional positions nor a cache that is allocated beforehand.

use candle_core::{Result, Tensor};

use super::attention::{Context, Projections, SelfAttention, closing};
use super::{BackboneConfig, NormPlacement, Rope};
use crate::checkpoint::Weights;
use crate::nn::{Linear, RmsNorm, lecun_normal};
use crate::ops;

/// The feed-forward half of a block.
#[derive(Debug)]
pub(crate) struct SwiGlu {
    gate_up_proj: Projections<2>,
    down_proj: Linear,
}

impl SwiGlu {
    /// Qwen2.5's keys: `gate_proj`, `up_proj` and `down_proj`.
    pub(crate) fn load(w: &Weights, c: &BackboneConfig) -> Result<Self> {
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            gate_up_proj: Projections::new([
                Linear::load_with(&w.pp("gate_proj"), hidden, inner, false, lecun_normal(hidden))?,
                Linear::load_with(&w.pp("up_proj"), hidden, inner, false, lecun_normal(hidden))?,
            ])?,
            down_proj: Linear::load_with(&w.pp("down_proj"), inner, hidden, false, closing(c, inner))?,
        })
    }

    /// (R, T, hidden) -> (R, T, hidden).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down_proj.forward(&self.gated(x)?)
    }

    /// `residual` plus [`Self::forward`] of x, in the residual's memory where there is a kernel for
    /// that: nothing else may use it.
    pub(crate) fn forward_add(&self, residual: Tensor, x: &Tensor) -> Result<Tensor> {
        self.down_proj.forward_add(residual, &self.gated(x)?)
    }

    fn gated(&self, x: &Tensor) -> Result<Tensor> {
        match &self.gate_up_proj {
            Projections::Apart([gate, up]) => ops::gated_linear(x, gate.weight(), up.weight()),
            Projections::Joint(joint, [gate, up]) => {
                let y = joint.forward(x)?;
                ops::swiglu(&y.narrow(2, 0, *gate)?, &y.narrow(2, *gate, *up)?)
            }
        }
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Block {
    norm_placement: NormPlacement,
    input_layernorm: RmsNorm,
    self_attn: SelfAttention,
    post_attention_layernorm: RmsNorm,
    mlp: SwiGlu,
}

impl Block {
    pub(super) fn load(w: &Weights, c: &BackboneConfig) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&w.pp(name), c.hidden_size, c.rms_norm_eps);
        Ok(Self {
            norm_placement: c.norm_placement,
            input_layernorm: norm("input_layernorm")?,
            self_attn: SelfAttention::load(&w.pp("self_attn"), c)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: SwiGlu::load(&w.pp("mlp"), c)?,
        })
    }

    /// The layer's output for x (R, T, hidden), which nothing else may need.
    pub(super) fn forward(&self, x: Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        let (first, second) = (&self.input_layernorm, &self.post_attention_layernorm);
        match self.norm_placement {
            NormPlacement::Input => {
                let normed = first.forward(&x)?;
                let x = self.self_attn.forward_add(x, &normed, rope, layer, context)?;
                let normed = second.forward(&x)?;
                self.mlp.forward_add(x, &normed)
            }
            NormPlacement::Output => {
                let attended = self.self_attn.forward(&x, rope, layer, context)?;
                let x = ops::add(&x, &first.forward(&attended)?)?;
                let y = self.mlp.forward(&x)?;
                ops::add(&x, &second.forward(&y)?)
            }
        }
    }
}
