//! Everything about the transformer that a checkpoint decides.

use serde::{Deserialize, Serialize};

/// What the transformer sees of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputMode {
    /// Scale k+1 sees the codebook entries of scale k alone (NextFlow).
    Residual,
    /// Scale k+1 sees the sum of all scales so far (TokenFlow-t2i, VAR).
    Cumulative,
}

/// Shape and choices of the transformer; names as in Qwen2.5-VL's config.json where it has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// Text tokens; `<boi>` and `<eoi>` follow, then the codes.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width of the SwiGLU.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Rotary pairs of the scale (or text), row and column axes; their sum is half the head.
    pub mrope_section: [usize; 3],
    /// C of the paper's Eq. 1: extent of the spatial axes, whatever the grid.
    pub spatial_extent: f64,
    /// The text rows of the head are the embedding's.
    pub tie_word_embeddings: bool,
    /// Codes of the tokenizer.
    pub codebook_size: usize,
    /// Channels of a code.
    pub code_dim: usize,
    /// What the transformer sees of an image.
    pub input_mode: InputMode,
    /// Rows of the scale embedding: the most scales an image may have.
    pub max_scales: usize,
    /// Add the sinusoidal embedding of an image's number of scales.
    pub scale_length_embedding: bool,
}

impl BackboneConfig {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Id of `<boi>`, after the text tokens.
    pub fn boi(&self) -> u32 {
        self.vocab_size as u32
    }

    /// Id of `<eoi>`.
    pub fn eoi(&self) -> u32 {
        self.vocab_size as u32 + 1
    }

    /// Row of code 0 in the head.
    pub fn first_code(&self) -> usize {
        self.vocab_size + 2
    }

    /// What would make the model's constructor panic or mislead, as one sentence.
    pub fn check(&self) -> Result<(), String> {
        let Self { hidden_size, num_attention_heads: heads, num_key_value_heads: kv, .. } = *self;
        if heads == 0 || kv == 0 || hidden_size % heads != 0 || heads % kv != 0 {
            return Err(format!("{heads} heads over {kv} key-value heads do not divide a width of {hidden_size}"));
        }
        if 2 * self.mrope_section.iter().sum::<usize>() != self.head_dim() {
            return Err(format!("mrope_section {:?} is not half of head_dim {}", self.mrope_section, self.head_dim()));
        }
        Ok(())
    }
}
