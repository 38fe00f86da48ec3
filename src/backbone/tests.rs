//! The text path against candle-transformers' Qwen2, with the same random weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::qwen2;

use super::presets::QWEN2_5_VL_7B;
use super::rope::text_position;
use super::{Backbone, BackboneConfig, Cache, Context, Position, Rope, Step};
use crate::checkpoint::Weights;
use crate::ops::testing::agree;

const CONFIG: BackboneConfig = BackboneConfig {
    vocab_size: 50,
    hidden_size: 48,
    intermediate_size: 80,
    num_hidden_layers: 3,
    num_attention_heads: 6,
    num_key_value_heads: 2,
    mrope_section: [2, 1, 1],
    ..QWEN2_5_VL_7B
};

fn qwen2(vars: HashMap<String, Tensor>, config: &BackboneConfig) -> Result<qwen2::ModelForCausalLM> {
    let config = qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: 64,
        sliding_window: 64,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope_theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    qwen2::ModelForCausalLM::new(&config, VarBuilder::from_tensors(vars, DType::F32, &Device::Cpu))
}

/// A prompt in two passes, then token by token: the logits of the last position of every pass.
#[test]
fn text_logits_are_those_of_candle_transformers() -> Result<()> {
    for tie_word_embeddings in [false, true] {
        let config = BackboneConfig { tie_word_embeddings, ..CONFIG };
        let weights = Weights::trainable(7, &Device::Cpu);
        let backbone = Backbone::load(&weights, &config)?;
        let vars = weights.vars().into_iter().map(|(key, var)| (key, var.as_detached_tensor()));
        let mut reference = qwen2(vars.collect(), &config)?;
        let mut caches = [Cache::new(&config, 30, DType::F32, &Device::Cpu)?];
        let ids: Vec<u32> = (0..30).map(|i| i * i % 50).collect();
        let passes = [0..9, 9..20].into_iter().chain((20..30).map(|i| i..i + 1));
        for pass in passes {
            let x = Tensor::new(&ids[pass.clone()], &Device::Cpu)?.unsqueeze(0)?;
            let positions: Vec<Position> = pass.clone().map(text_position).collect();
            let rope = Rope::new(&config, &[&positions], &Device::Cpu)?;
            let context = Context::Cached { caches: &mut caches, step: Step::Text };
            let hidden = backbone.forward(&backbone.embed_text(&x)?, &rope, context)?;
            let got = backbone.text_logits(&hidden.narrow(1, pass.len() - 1, 1)?)?;
            let want = reference.forward(&x, pass.start)?;
            agree(&format!("positions {pass:?}"), &got, &want)?;
        }
    }
    Ok(())
}
