//! The block: grouped-query attention and SwiGLU, each with an RMSNorm before it (Qwen2.5) or after
//! it (TokenFlow-t2i). candle-transformers' Qwen2 has neither three-dimensional positions nor a
//! cache that is allocated beforehand.

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

    /// x plus [`Self::forward`] of its norm, as one operation that can be trained; None where there
    /// is none.
    fn trained_branch(&self, x: &Tensor, norm: &RmsNorm) -> Result<Option<Tensor>> {
        let Projections::Apart([gate, up]) = &self.gate_up_proj else { return Ok(None) };
        ops::swiglu_branch(x, norm.parts(), [gate.weight(), up.weight(), self.down_proj.weight()])
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
        self.feed_forward(self.attend(x, rope, layer, context)?)
    }

    /// As [`Self::forward`] for some of the R * T tokens only, `rows` (N) u32: (N, hidden).
    pub(super) fn forward_selected(
        &self,
        x: Tensor,
        rope: &Rope,
        layer: usize,
        context: &Context,
        rows: &Tensor,
    ) -> Result<Tensor> {
        let attended = self.attend(x, rope, layer, context)?;
        self.feed_forward(ops::select(&attended.flatten_to(1)?, rows)?.unsqueeze(0)?)?.squeeze(0)
    }

    /// The first half, with attention.
    fn attend(&self, x: Tensor, rope: &Rope, layer: usize, context: &Context) -> Result<Tensor> {
        let norm = &self.input_layernorm;
        match self.norm_placement {
            NormPlacement::Input => {
                if let Some(y) = self.self_attn.trained_branch(&x, norm, rope, context)? {
                    return Ok(y);
                }
                let normed = norm.forward(&x)?;
                self.self_attn.forward_add(x, &normed, rope, layer, context)
            }
            NormPlacement::Output => {
                let attended = self.self_attn.forward(&x, rope, layer, context)?;
                ops::add(&x, &norm.forward(&attended)?)
            }
        }
    }

    /// The second half, for every token by itself.
    fn feed_forward(&self, x: Tensor) -> Result<Tensor> {
        let norm = &self.post_attention_layernorm;
        match self.norm_placement {
            NormPlacement::Input => {
                if let Some(y) = self.mlp.trained_branch(&x, norm)? {
                    return Ok(y);
                }
                let normed = norm.forward(&x)?;
                self.mlp.forward_add(x, &normed)
            }
            NormPlacement::Output => ops::add(&x, &norm.forward(&self.mlp.forward(&x)?)?),
        }
    }
}
