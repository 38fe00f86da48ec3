//! Shape of the model: from the shapes of its tensors where they determine it, else from
//! `config.json`.

use serde_json::{Value, json};

use super::{Drawing, Reading, ReadingParts, Trunk};
use crate::backbone::BackboneConfig;
use crate::backbone::presets::QWEN2_5_VL_3B;
use crate::checkpoint::{Inventory, Source, TRANSFORMER, Weights};
use crate::error::{Error, Result};
use crate::nn::{MAX_LAYERS, check_sizes};

/// `model_type` of the family in `config.json`.
const FAMILY: &str = "onecat";
/// Patches of a token along each side.
pub(super) const MERGE: usize = 2;
/// The default system prompt.
const SYSTEM: &str = "你是一个同时能够支持图像理解、图像生成、图像编辑的多模态大语言模型。";
/// Scales that the generation expert has an adapter for; a constant of the reference's class.
const ADAPTERS: usize = 13;
/// The adapters' alpha over their rank; the same.
const GAIN: f64 = 2.0;
/// A key that all models of this family have, and no others.
const EMBEDDING: &str = "patch_language_model.model.embed_tokens.weight";

/// Shape and settings of a OneCAT model.
#[derive(Clone, Debug)]
pub struct OneCatConfig {
    /// Qwen2.5's transformer; each of the three experts has its `intermediate_size`.
    pub transformer: BackboneConfig,
    /// The most tokens of a sequence of text and patches.
    pub context: usize,
    /// Channels of a patch.
    pub patch_width: usize,
    /// Pixels of a patch along each side.
    pub patch_size: usize,
    /// Sides of the learned grid of patch positions.
    pub position_grid: usize,
    /// Bits of a code.
    pub bits: usize,
    /// Scales that the generation expert has an adapter for.
    pub adapters: usize,
    /// Rank of an adapter.
    pub adapter_rank: usize,
    /// Factor of what an adapter adds: alpha over rank.
    pub adapter_gain: f64,
    /// Rows of the scale embedding.
    pub levels: usize,
    /// Round the rotary frequencies to bf16 in generation and editing, as the reference does when
    /// it casts the model. For understanding the reference keeps them in f32, and so does this
    /// program.
    pub bf16_frequencies: bool,
    /// The system prompt.
    pub system: String,
}

/// Whether a `config.json` is that of a model of this family.
pub fn is_config(config: &Value) -> bool {
    config["model_type"] == FAMILY
}

impl OneCatConfig {
    /// OneCAT-3B as far as it is known: patch width and position grid are inferred from its
    /// teacher, the vocabulary from Qwen2.5's with 15 added tokens.
    pub fn onecat_3b() -> Self {
        Self {
            transformer: BackboneConfig {
                vocab_size: 151_680,
                mrope_section: [64, 0, 0],
                tie_word_embeddings: false,
                ..QWEN2_5_VL_3B
            },
            context: 32_768,
            patch_width: 1024,
            patch_size: 14,
            position_grid: 32,
            bits: 32,
            adapters: ADAPTERS,
            adapter_rank: 64,
            adapter_gain: GAIN,
            levels: 15,
            bf16_frequencies: true,
            system: SYSTEM.into(),
        }
    }

    /// Reads `config.json` and the headers of the weights.
    ///
    /// Errors: [`crate::error::Kind::Model`] for files that are missing, broken, or contradict each
    /// other.
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.read_config()?;
        let weights = Inventory::of(source, TRANSFORMER)?;
        Self::of(&weights, &config).map_err(|what| {
            Error::model(format!("{source} is no OneCAT model that is read here: {what}"))
                .hint("nextflow info FOLDER shows what it holds; copy config.json and all weights from one checkpoint")
        })
    }

    /// The config from the shapes of `weights` and from `config`, a `config.json`.
    ///
    /// Errors: a tensor that is missing or of a shape that fits no model, and a field that
    /// contradicts the weights, as one sentence.
    pub fn of(weights: &Inventory, config: &Value) -> Result<Self, String> {
        let fields = Fields { config, text: &config["llm_config"], vision: &config["patch_vision_config"] };
        fields.check_choices()?;
        let transformer = fields.transformer(&Shapes(weights))?;
        let [patch_width, _, patch_size, _] =
            Shapes(weights).dims("patch_vision_model.embeddings.patch_embedding.weight")?;
        let positions = "patch_vision_model.embeddings.position_embedding";
        let [_, rows, _] = Shapes(weights).dims(positions)?;
        let position_grid = rows.saturating_sub(1).isqrt();
        if position_grid * position_grid + 1 != rows {
            return Err(format!("{positions} has {rows} rows, which are not those of a square and one more"));
        }
        let [_, bits] = Shapes(weights).dims("sos_embedding.weight")?;
        let [levels, _] = Shapes(weights).dims("lvl_embed.weight")?;
        let lora = "patch_language_model.model.layers.0.mlp_ge.gate_proj.lora_A.default.weight";
        let [rows, _] = Shapes(weights).dims(lora)?;
        let adapters = number(config, "saa_scales")?.unwrap_or(ADAPTERS);
        if adapters == 0 || rows % adapters != 0 || rows == 0 {
            return Err(format!("{lora} has {rows} rows, which {adapters} scales do not divide into adapters"));
        }
        let adapter_rank = rows / adapters;
        let alpha = number(config, "saa_alpha")?;
        let read = Self {
            context: number(fields.text, "max_position_embeddings")?.unwrap_or(32_768),
            transformer,
            patch_width,
            patch_size,
            position_grid,
            bits,
            adapters,
            adapter_rank,
            adapter_gain: alpha.map_or(GAIN, |alpha| alpha as f64 / adapter_rank as f64),
            levels,
            bf16_frequencies: match &config["bf16_frequencies"] {
                Value::Null => true,
                value => {
                    value.as_bool().ok_or(format!("config.json has bf16_frequencies {value}, not true or false"))?
                }
            },
            system: match &config["system_message"] {
                Value::Null => SYSTEM.into(),
                value => value.as_str().ok_or(format!("config.json has the system_message {value}, no text"))?.into(),
            },
        };
        fields.check_shapes(&read)?;
        read.check()?;
        Ok(read)
    }

    /// Errors: a reason why the model cannot be built, as one sentence.
    pub fn check(&self) -> Result<(), String> {
        self.transformer.check()?;
        check_sizes([
            ("the patch width", self.patch_width),
            ("the position grid", self.position_grid),
            ("the adapter rank", self.adapter_rank),
            ("the context", self.context),
        ])?;
        if !(1..=64).contains(&self.bits) {
            return Err(format!("a code has 1 to 64 bits, not {}", self.bits));
        }
        if !(1..=256).contains(&self.patch_size) {
            return Err(format!("a patch has 1 to 256 pixels along a side, not {}", self.patch_size));
        }
        if !(1..=1000).contains(&self.adapters) || self.levels < self.adapters {
            return Err(format!("{} rows of lvl_embed are too few for {} scales", self.levels, self.adapters));
        }
        // Rotary frequencies alternate between rows and columns in pairs of pairs.
        if !self.transformer.head_dim().is_multiple_of(8) {
            return Err(format!("a head of {} channels is no multiple of 8", self.transformer.head_dim()));
        }
        if !self.adapter_gain.is_finite() || self.adapter_gain <= 0.0 {
            return Err(format!("saa_alpha over the rank is {}, not above 0", self.adapter_gain));
        }
        Ok(())
    }

    /// Asks for every tensor of the model.
    ///
    /// Errors: what [`Self::check`] refuses.
    pub fn ask(&self, w: &Weights) -> candle_core::Result<()> {
        Trunk::load(w, self)?;
        Reading::load(w, self, ReadingParts { pictures: true, head: true })?;
        Drawing::load(w, self).map(drop)
    }

    /// Side of the thumbnail that goes with a picture to be understood, in pixels: that of the
    /// position grid.
    pub fn thumbnail(&self) -> usize {
        self.position_grid * self.patch_size
    }

    /// Tokens of the thumbnail.
    pub fn thumbnail_tokens(&self) -> usize {
        (self.position_grid / MERGE).pow(2)
    }

    /// Whether its shape is that of OneCAT-3B; the vocabulary may differ.
    pub fn is_3b(&self) -> bool {
        let (a, b) = (&self.transformer, &Self::onecat_3b().transformer);
        let shape = |c: &BackboneConfig| {
            [c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads]
        };
        shape(a) == shape(b) && self.bits == 32
    }

    /// What `nextflow info` prints.
    pub fn to_json(&self) -> Value {
        let t = &self.transformer;
        json!({
            "vocab_size": t.vocab_size, "hidden_size": t.hidden_size, "intermediate_size": t.intermediate_size,
            "num_hidden_layers": t.num_hidden_layers, "num_attention_heads": t.num_attention_heads,
            "num_key_value_heads": t.num_key_value_heads, "context": self.context,
            "patch_width": self.patch_width, "patch_size": self.patch_size, "position_grid": self.position_grid,
            "bits": self.bits, "adapters": self.adapters, "adapter_rank": self.adapter_rank, "levels": self.levels,
            "bf16_frequencies": self.bf16_frequencies,
        })
    }
}

/// Whether the weights are of this family.
pub fn is_onecat(weights: &Inventory) -> bool {
    weights.has(EMBEDDING)
}

/// A whole number of a field; none if it is left out or null.
fn number(fields: &Value, key: &str) -> Result<Option<usize>, String> {
    match &fields[key] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(number) if number <= 1 << 40 => Ok(Some(number as usize)),
            _ => Err(format!("config.json has {key} {value}, which is no size")),
        },
    }
}

/// Shapes of tensors by key.
struct Shapes<'a>(&'a Inventory);

impl Shapes<'_> {
    fn dims<const N: usize>(&self, key: &str) -> Result<[usize; N], String> {
        let shape = self.0.shape(key).ok_or_else(|| format!("{key} is missing"))?;
        shape.try_into().map_err(|_| format!("{key} has the shape {shape:?}, not {N} dimensions"))
    }
}

/// The fields of `config.json`.
struct Fields<'a> {
    config: &'a Value,
    /// Qwen2's fields.
    text: &'a Value,
    vision: &'a Value,
}

impl Fields<'_> {
    /// Errors: a setting that changes results and is not supported.
    fn check_choices(&self) -> Result<(), String> {
        let Self { config, text, .. } = self;
        let one_of = |name: &str, value: &Value, known: &[&str]| match value {
            Value::Null => Ok(()),
            value if value.as_str().is_some_and(|value| known.contains(&value)) => Ok(()),
            value => Err(format!("config.json has {name} {value}, only {} is supported", known[0])),
        };
        one_of("template", &config["template"], &[FAMILY])?;
        one_of("hidden_act", &text["hidden_act"], &["silu", "swish"])?;
        if [&config["quantization_config"], &text["quantization_config"]].iter().any(|value| value.is_object()) {
            return Err("its weights are quantised for another program (quantization_config)".into());
        }
        match config["downsample_ratio"].as_f64() {
            Some(ratio) if ratio != 0.5 => {
                return Err(format!("config.json has downsample_ratio {ratio}, only 0.5 is supported"));
            }
            None if !config["downsample_ratio"].is_null() => {
                return Err(format!("config.json has downsample_ratio {}, no number", config["downsample_ratio"]));
            }
            _ => {}
        }
        if !text["rope_scaling"].is_null() {
            return Err(format!("config.json has rope_scaling {}, which is not supported", text["rope_scaling"]));
        }
        if text["use_sliding_window"] == true {
            return Err("config.json asks for attention in a sliding window, which is not supported".into());
        }
        Ok(())
    }

    /// The transformer, whose sizes are the weights'.
    fn transformer(&self, shapes: &Shapes) -> Result<BackboneConfig, String> {
        let [vocab_size, hidden_size] = shapes.dims(EMBEDDING)?;
        let layer = |i: usize| format!("patch_language_model.model.layers.{i}");
        let has = |i: &usize| shapes.0.has(&format!("{}.input_layernorm.weight", layer(*i)));
        let layers = (0..MAX_LAYERS).take_while(has).count();
        if layers == 0 {
            return Err(format!("{}.input_layernorm.weight is missing", layer(0)));
        }
        let [queries, _] = shapes.dims(&format!("{}.self_attn.q_proj.weight", layer(0)))?;
        let [keys, _] = shapes.dims(&format!("{}.self_attn.k_proj.weight", layer(0)))?;
        let [intermediate_size, _] = shapes.dims(&format!("{}.mlp_te.gate_proj.weight", layer(0)))?;
        // Shapes do not determine the width of a head.
        let heads = number(self.text, "num_attention_heads")?.unwrap_or(queries / 128);
        if heads == 0 || queries % heads != 0 || hidden_size != queries {
            return Err(format!(
                "{heads} heads do not divide the {queries} rows of q_proj, of a width of {hidden_size}"
            ));
        }
        let head_dim = queries / heads;
        if head_dim == 0 || keys % head_dim != 0 {
            return Err(format!("heads of {head_dim} channels do not divide the {keys} rows of k_proj"));
        }
        let real = |key: &str, usual: f64| match &self.text[key] {
            Value::Null => Ok(usual),
            value => value.as_f64().ok_or_else(|| format!("config.json has {key} {value}, no number")),
        };
        Ok(BackboneConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: keys / head_dim,
            rms_norm_eps: real("rms_norm_eps", 1e-6)?,
            rope_theta: real("rope_theta", 1e6)?,
            mrope_section: [head_dim / 2, 0, 0],
            tie_word_embeddings: false,
            ..QWEN2_5_VL_3B
        })
    }

    /// Errors: a size in `config.json` that is not the weights'. Those of the vocabulary may
    /// differ: tables are padded.
    fn check_shapes(&self, read: &OneCatConfig) -> Result<(), String> {
        let t = &read.transformer;
        for (fields, key, found) in [
            (self.text, "hidden_size", t.hidden_size),
            (self.text, "intermediate_size", t.intermediate_size),
            (self.text, "num_hidden_layers", t.num_hidden_layers),
            (self.text, "num_key_value_heads", t.num_key_value_heads),
            (self.vision, "hidden_size", read.patch_width),
            (self.vision, "patch_size", read.patch_size),
            (self.vision, "image_size", read.thumbnail()),
            (self.config, "vae_embed_dim", read.bits),
            (self.config, "saa_rank", read.adapter_rank),
        ] {
            if let Some(said) = number(fields, key)?.filter(|&said| said != found) {
                return Err(format!("config.json has {key} {said}, the weights {found}"));
            }
        }
        match read.thumbnail() % (MERGE * read.patch_size) {
            0 => Ok(()),
            _ => Err(format!("a position grid of {0}x{0} has an odd side", read.position_grid)),
        }
    }
}
