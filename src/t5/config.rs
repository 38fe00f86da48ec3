//! Shapes of T5's encoder.

use candle_transformers::models::t5::Config;

use super::TEXT_CONFIG;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::nn::MAX_LAYERS;

/// Shape of an encoder, as its `config.json` has it.
///
/// Errors: one that is not T5's.
pub fn read_config(source: &Source) -> Result<Config> {
    let value = source.read_json(TEXT_CONFIG)?;
    let bad = |what: String| {
        Error::model(format!("{TEXT_CONFIG} of {source}: {what}")).hint("copy config.json of google/flan-t5-xl again")
    };
    let config: Config = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
    check(&config).map_err(bad)?;
    Ok(config)
}

/// Errors: a value that would make the network panic, as one sentence.
pub(super) fn check(config: &Config) -> std::result::Result<(), String> {
    const MOST: usize = 1 << 20;
    let sizes = [config.vocab_size, config.d_model, config.d_kv, config.d_ff, config.num_heads];
    if !(1..=MAX_LAYERS).contains(&config.num_layers) || !sizes.iter().all(|n| (1..=MOST).contains(n)) {
        return Err("its sizes are those of no encoder".into());
    }
    if config.feed_forward_proj != flan_t5_xl().feed_forward_proj {
        return Err("feed_forward_proj is not gated-gelu".into());
    }
    let (buckets, distance) = (config.relative_attention_num_buckets, config.relative_attention_max_distance);
    if !(4..=MOST).contains(&buckets) || !(buckets / 4 + 1..=MOST).contains(&distance) {
        return Err(format!("{buckets} buckets for a distance of {distance}"));
    }
    if config.eos_token_id >= config.vocab_size {
        return Err(format!("eos_token_id {} of {} tokens", config.eos_token_id, config.vocab_size));
    }
    Ok(())
}

/// flan-t5-xl's shape.
pub fn flan_t5_xl() -> Config {
    let gated = candle_transformers::models::t5::ActivationWithOptionalGating {
        gated: true,
        activation: candle_nn::Activation::NewGelu,
    };
    Config {
        vocab_size: 32_128,
        d_model: 2048,
        d_kv: 64,
        d_ff: 5120,
        num_layers: 24,
        num_heads: 32,
        layer_norm_epsilon: 1e-6,
        feed_forward_proj: gated,
        tie_word_embeddings: false,
        ..Config::default()
    }
}
