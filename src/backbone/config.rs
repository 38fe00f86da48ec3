//! Everything about the transformer that a checkpoint decides.

use crate::nn::{MAX_LAYERS, check_sizes};
use serde::{Deserialize, Serialize};

use super::rope_scaling::RopeScaling;

/// An image as the transformer's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputMode {
    /// Scale k+1 sees the codebook entries of scale k alone (NextFlow).
    Residual,
    /// Scale k+1 sees the sum of all scales so far (TokenFlow-t2i, VAR).
    Cumulative,
}

/// Where the two RMSNorms of a block stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormPlacement {
    /// Before attention and SwiGLU (Qwen2.5).
    #[default]
    Input,
    /// After each sublayer, on its output (TokenFlow-t2i).
    Output,
}

/// How codes join the vocabulary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vocabulary {
    /// Text, `<boi>`, `<eoi>`, codes. Codes have rows in the head only.
    #[default]
    Markers,
    /// Text, codes. Codes have rows in the embedding too, and words of the text open an image
    /// (TokenFlow-t2i).
    Plain,
}

/// Shape and choices of the transformer; names as in Qwen2.5-VL's config.json where it has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// Number of text tokens; see `vocabulary` for the ids after them.
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
    /// Rotary frequencies for sequences longer than those of the training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Rotary pairs of the scale (or text), row and column axes; their sum is half the head.
    pub mrope_section: [usize; 3],
    /// C of the paper's Eq. 1: extent of the spatial axes, whatever the grid. Without it codes
    /// stand where text would: at their index in the sequence, pads included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spatial_extent: Option<f64>,
    /// The text rows of the head are the embedding's.
    pub tie_word_embeddings: bool,
    /// Codes of the tokenizer; 0 in a model of text alone.
    pub codebook_size: usize,
    /// Channels of a code.
    pub code_dim: usize,
    /// An image as the transformer's input.
    pub input_mode: InputMode,
    /// The most scales an image may have: rows of the scale embedding.
    pub max_scales: usize,
    /// Add the paper's scale-length embedding: the sinusoidal embedding of an image's number of
    /// scales.
    pub scale_length_embedding: bool,
    /// An image that others follow in the sequence ends with one more grid: the sum of all its
    /// scales. Without it nothing after an image sees the codes of its last scale, which are never
    /// an input.
    #[serde(default, skip_serializing_if = "is_default")]
    pub context_last_scale: bool,
    /// How codes join the vocabulary.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vocabulary: Vocabulary,
    /// Where the RMSNorms of a block stand.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm_placement: NormPlacement,
    /// Queries, keys and values have a bias.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub qkv_bias: bool,
    /// Epsilon of the RMSNorm over every head's queries and keys, if there is one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub qk_norm_eps: Option<f64>,
    /// Round the rotary frequencies to bf16, as TokenFlow-t2i's reference does when it casts the
    /// model.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bf16_frequencies: bool,
    /// Rows of TokenFlow's learned table of code positions: the codes of a whole image. With it the
    /// scale embedding has a row in front, which is added to text.
    #[serde(default, skip_serializing_if = "is_default")]
    pub code_positions: Option<usize>,
}

fn yes() -> bool {
    true
}

/// Left out of a config that is written, so that one without TokenFlow's choices looks as if there
/// were none.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl BackboneConfig {
    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Id of `<boi>`, after the text tokens of a vocabulary with markers.
    pub fn boi(&self) -> u32 {
        self.vocab_size as u32
    }

    /// Id of `<eoi>`.
    pub fn eoi(&self) -> u32 {
        self.vocab_size as u32 + 1
    }

    /// Row of code 0 in the head.
    pub fn first_code(&self) -> usize {
        match self.vocabulary {
            Vocabulary::Markers => self.vocab_size + 2,
            Vocabulary::Plain => self.vocab_size,
        }
    }

    /// Rows of the token embedding.
    pub(super) fn embedding_rows(&self) -> usize {
        match self.vocabulary {
            Vocabulary::Markers => self.first_code(),
            Vocabulary::Plain => self.first_code() + self.codebook_size,
        }
    }

    /// Rows of the head that are its own: all, or those of the codes if the others are the
    /// embedding's.
    pub(super) fn head_rows(&self) -> usize {
        self.codebook_size + if self.tie_word_embeddings { 0 } else { self.first_code() }
    }

    /// Rows of the scale embedding.
    pub(super) fn scale_rows(&self) -> usize {
        self.max_scales + usize::from(self.code_positions.is_some())
    }

    /// Numbers in all weights.
    pub fn parameters(&self) -> usize {
        let (hidden, head_dim) = (self.hidden_size, self.head_dim());
        let (queries, keys) = (self.num_attention_heads * head_dim, self.num_key_value_heads * head_dim);
        let bias = if self.qkv_bias { queries + 2 * keys } else { 0 };
        let qk_norm = if self.qk_norm_eps.is_some() { 2 * head_dim } else { 0 };
        let attention = 2 * hidden * (queries + keys) + bias + qk_norm;
        let block = attention + 3 * hidden * self.intermediate_size + 2 * hidden;
        let words = self.embedding_rows() + self.head_rows() + 1;
        let image = match self.codebook_size {
            0 => 0,
            _ => self.code_dim + 1 + hidden + 1 + self.scale_rows() + self.code_positions.unwrap_or(0),
        };
        self.num_hidden_layers * block + (words + image) * hidden
    }

    /// Parameters that a scale of an image is multiplied with: all but the rows for text.
    pub fn parameters_of_images(&self) -> usize {
        let words = self.embedding_rows() + self.head_rows() - self.codebook_size;
        self.parameters() - words * self.hidden_size
    }

    /// Errors: a value that would make the constructor panic or mislead, as one sentence.
    pub fn check(&self) -> Result<(), String> {
        let Self { hidden_size, num_attention_heads: heads, num_key_value_heads: kv, .. } = *self;
        check_sizes([
            ("vocab_size", self.vocab_size),
            ("hidden_size", hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_key_value_heads", kv),
        ])?;
        if self.codebook_size > 0 {
            let positions = self.code_positions.unwrap_or(1);
            check_sizes([
                ("codebook_size", self.codebook_size),
                ("code_dim", self.code_dim),
                ("max_scales", self.max_scales),
                ("code_positions", positions),
            ])?;
        }
        if !(1..=MAX_LAYERS).contains(&self.num_hidden_layers) {
            return Err(format!("{} layers are not 1 to {MAX_LAYERS}", self.num_hidden_layers));
        }
        if heads == 0 || hidden_size % heads != 0 || heads % kv != 0 {
            return Err(format!("{heads} heads over {kv} key-value heads do not divide a width of {hidden_size}"));
        }
        let half = self.mrope_section.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
        if half.and_then(|half| half.checked_mul(2)) != Some(self.head_dim()) {
            return Err(format!("mrope_section {:?} is not half of head_dim {}", self.mrope_section, self.head_dim()));
        }
        let positive = |name: &str, x: f64| {
            if x.is_finite() && x > 0.0 { Ok(()) } else { Err(format!("{name} {x} is not above 0")) }
        };
        positive("rope_theta", self.rope_theta)?;
        positive("spatial_extent", self.spatial_extent.unwrap_or(1.0))?;
        positive("rms_norm_eps", self.rms_norm_eps)?;
        positive("qk_norm_eps", self.qk_norm_eps.unwrap_or(1.0))?;
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::check)?;
        if self.codebook_size > 0 && self.spatial_extent.is_some() == self.code_positions.is_some() {
            return Err("one of spatial_extent and code_positions must give the positions of codes".into());
        }
        if self.context_last_scale && self.spatial_extent.is_none() {
            return Err("context_last_scale needs spatial_extent".into());
        }
        Ok(())
    }
}
