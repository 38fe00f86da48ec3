//! Shapes of the large models.

use super::{BackboneConfig, InputMode, NormPlacement, Vocabulary};

/// Qwen2.5-VL-7B's transformer, on which NextFlow is built (paper, section on the backbone).
pub const QWEN2_5_VL_7B: BackboneConfig = BackboneConfig {
    vocab_size: 152_064,
    hidden_size: 3584,
    intermediate_size: 18_944,
    num_hidden_layers: 28,
    num_attention_heads: 28,
    num_key_value_heads: 4,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    rope_scaling: None,
    mrope_section: [16, 24, 24],
    spatial_extent: None,
    tie_word_embeddings: false,
    codebook_size: 0,
    code_dim: 0,
    input_mode: InputMode::Residual,
    max_scales: 0,
    scale_length_embedding: false,
    context_last_scale: false,
    vocabulary: Vocabulary::Plain,
    norm_placement: NormPlacement::Input,
    qkv_bias: true,
    qk_norm_eps: None,
    bf16_frequencies: false,
    code_positions: None,
};

/// Qwen2.5-VL-3B's transformer.
pub const QWEN2_5_VL_3B: BackboneConfig = BackboneConfig {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 11_008,
    num_hidden_layers: 36,
    num_attention_heads: 16,
    num_key_value_heads: 2,
    tie_word_embeddings: true,
    ..QWEN2_5_VL_7B
};

/// Qwen2.5-0.5B, which reads text alone.
pub const QWEN2_5_0_5B: BackboneConfig = BackboneConfig {
    hidden_size: 896,
    intermediate_size: 4864,
    num_hidden_layers: 24,
    num_attention_heads: 14,
    num_key_value_heads: 2,
    mrope_section: [32, 0, 0],
    ..QWEN2_5_VL_3B
};

/// TokenFlow-t2i: Llama-2-7B's widths, 256 px. `[PAD]` is the last of the text tokens.
pub const TOKENFLOW_T2I_7B: BackboneConfig = BackboneConfig {
    vocab_size: 32_001,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    rms_norm_eps: 1e-5,
    rope_theta: 1e4,
    mrope_section: [64, 0, 0],
    codebook_size: 32_768,
    code_dim: 40,
    input_mode: InputMode::Cumulative,
    max_scales: 9,
    norm_placement: NormPlacement::Output,
    qkv_bias: false,
    // The reference leaves it at its class's default, other than the blocks' norms.
    qk_norm_eps: Some(1e-6),
    bf16_frequencies: true,
    code_positions: Some(817),
    ..QWEN2_5_VL_7B
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_numbers_are_refused() {
        for layers in [0, 1_000_000_000] {
            let damaged = BackboneConfig { num_hidden_layers: layers, ..QWEN2_5_0_5B };
            assert!(damaged.check().is_err_and(|message| message.contains("layers")));
        }
        // Their sum is that of sound ones, but for the bits that a word has no room for.
        let damaged = BackboneConfig { mrope_section: [usize::MAX - 7, 24, 16], ..QWEN2_5_0_5B };
        assert!(damaged.check().is_err_and(|message| message.contains("mrope_section")));
    }

    #[test]
    fn presets_are_sound_and_of_the_published_sizes() {
        for preset in [TOKENFLOW_T2I_7B, QWEN2_5_VL_7B, QWEN2_5_VL_3B, QWEN2_5_0_5B] {
            assert_eq!(preset.check(), Ok(()));
            let json = serde_json::to_string(&preset).unwrap();
            let again: BackboneConfig = serde_json::from_str(&json).unwrap();
            assert_eq!(serde_json::to_string(&again).unwrap(), json);
        }
        // Every tensor of the public checkpoint but its two scalars.
        assert_eq!(TOKENFLOW_T2I_7B.parameters(), 7_027_204_096);
        assert_eq!(TOKENFLOW_T2I_7B.first_code(), 32_001);
        assert_eq!(QWEN2_5_VL_7B.parameters(), 7_615_616_512);
        assert_eq!(QWEN2_5_VL_3B.parameters(), 3_085_938_688);
        assert_eq!(QWEN2_5_0_5B.parameters(), 494_032_768);
    }
}
