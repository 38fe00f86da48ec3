//! config.json: the fields of `Qwen2_5_VLConfig`, with transformers' defaults for those left out.

use serde::Deserialize;
use serde_json::Value;

use super::{PUBLISHED, without_nulls};
use crate::backbone::presets::QWEN2_5_VL_7B;
use crate::backbone::rope_scaling::yarn_mscale;
use crate::backbone::{BackboneConfig, RopeScaling};
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::vision::VisionConfig;

/// The base of the rotary frequencies of the image encoder.
const VISION_THETA: f64 = 10_000.0;
/// `attention_bias` is none of them: transformers' Qwen2.5-VL has biases whatever it says.
const FULL: &str = "full_attention";

/// Errors: [`crate::error::Kind::Model`] for weights that were quantised for another program.
pub(super) fn check_encoding(source: &Source, config: &Value) -> Result<()> {
    let found = [&config["quantization_config"], &config["text_config"]["quantization_config"]];
    let Some(encoding) = found.into_iter().find(|value| value.is_object()) else { return Ok(()) };
    let of = |key: &str| encoding[key].as_bool() == Some(true);
    let method = match encoding["quant_method"].as_str() {
        // As their authors write them.
        Some(method @ ("awq" | "gptq")) => method.to_uppercase(),
        Some(method) => method.into(),
        None if of("load_in_4bit") || of("load_in_8bit") => "bitsandbytes".into(),
        None => "an unnamed method".into(),
    };
    let message = format!(
        "the weights of {source} are quantised by {method} (quantization_config in config.json), which is not read"
    );
    Err(Error::model(message).hint(format!("use the unquantised model with --quant: {PUBLISHED}")))
}

/// Whether the text rows of the head are the embedding's: transformers up to 4.57 writes it into
/// `text_config`, later ones at the top.
pub(super) fn is_tied(config: &Value) -> bool {
    config["tie_word_embeddings"] == true || config["text_config"]["tie_word_embeddings"] == true
}

/// The transformer in config.json.
#[derive(Deserialize)]
#[serde(default)]
pub(super) struct Text {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    hidden_act: String,
    rms_norm_eps: f64,
    rope_theta: f64,
    partial_rotary_factor: f64,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    pub(super) max_position_embeddings: usize,
    original_max_position_embeddings: Option<usize>,
    use_sliding_window: bool,
    sliding_window: usize,
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
}

impl Default for Text {
    fn default() -> Self {
        Self {
            vocab_size: 152_064,
            hidden_size: 8192,
            intermediate_size: 29_568,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            head_dim: None,
            hidden_act: "silu".into(),
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            partial_rotary_factor: 1.0,
            rope_scaling: None,
            rope_parameters: None,
            max_position_embeddings: 32_768,
            original_max_position_embeddings: None,
            use_sliding_window: false,
            sliding_window: 4096,
            max_window_layers: 80,
            layer_types: None,
        }
    }
}

/// `rope_scaling`, which transformers 5 calls `rope_parameters`.
#[derive(Deserialize)]
struct Rope {
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_type: Option<String>,
    #[serde(default = "usual_section")]
    mrope_section: [usize; 3],
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    attention_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
}

fn usual_section() -> [usize; 3] {
    QWEN2_5_VL_7B.mrope_section
}

/// The fields of the transformer: those of `text_config`, or of the top where it has none (up to
/// transformers 4.51).
pub(super) fn text(config: &Value) -> Result<Text, String> {
    let nested = config.get("text_config").filter(|text| text.get("hidden_size").is_some());
    let fields = nested.unwrap_or(config);
    // Unlike other fields, this one has a meaning if it is null.
    let every_head = fields.get("num_key_value_heads").is_some_and(Value::is_null);
    let fields = without_nulls(fields.clone());
    let mut text: Text = serde_json::from_value(fields).map_err(|e| e.to_string())?;
    if every_head {
        text.num_key_value_heads = text.num_attention_heads;
    }
    Ok(text)
}

impl Text {
    /// The shape of the transformer.
    ///
    /// Errors: sizes that do not fit together, and settings that are not supported, as one
    /// sentence.
    pub(super) fn backbone(&self) -> Result<BackboneConfig, String> {
        silu("hidden_act", &self.hidden_act)?;
        self.check_attention()?;
        let rope = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref());
        let partial = rope.and_then(|rope| rope.partial_rotary_factor).unwrap_or(self.partial_rotary_factor);
        if partial != 1.0 {
            return Err(format!("partial_rotary_factor {partial} is not supported"));
        }
        let backbone = BackboneConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: rope.and_then(|rope| rope.rope_theta).unwrap_or(self.rope_theta),
            rope_scaling: rope.map_or(Ok(None), |rope| rope.scaling(self))?,
            mrope_section: rope.map_or_else(usual_section, |rope| rope.mrope_section),
            ..QWEN2_5_VL_7B
        };
        backbone.check()?;
        match self.head_dim {
            Some(dim) if dim != backbone.head_dim() => {
                Err(format!("head_dim {dim} is not hidden_size / num_attention_heads, {}", backbone.head_dim()))
            }
            _ => Ok(backbone),
        }
    }

    /// Errors: a layer that does not see the whole conversation.
    fn check_attention(&self) -> Result<(), String> {
        let window = self.use_sliding_window && self.sliding_window < self.max_position_embeddings;
        let sliding = match &self.layer_types {
            Some(types) => match types.iter().find(|kind| *kind != FULL && *kind != "sliding_attention") {
                Some(kind) => return Err(format!("layer_types: {kind} is not supported")),
                None => types.iter().any(|kind| kind != FULL),
            },
            None => self.max_window_layers < self.num_hidden_layers,
        };
        if window && sliding {
            let window = self.sliding_window;
            return Err(format!(
                "attention in a sliding window (use_sliding_window, {window} tokens) is not supported"
            ));
        }
        Ok(())
    }
}

impl Rope {
    /// The scaling of the frequencies.
    ///
    /// Errors: a type that is not supported.
    fn scaling(&self, text: &Text) -> Result<Option<RopeScaling>, String> {
        let plain = |kind: &Option<String>| kind.clone().map(|k| if k == "mrope" { "default".into() } else { k });
        let kind = match (plain(&self.rope_type), plain(&self.old_type)) {
            (Some(new), Some(old)) if new != old => {
                return Err(format!("rope_scaling: rope_type is {new}, type is {old}: they must agree"));
            }
            (new, old) => new.or(old).unwrap_or_else(|| "default".into()),
        };
        let original = text.original_max_position_embeddings.or(self.original_max_position_embeddings);
        let original = original.unwrap_or(text.max_position_embeddings);
        match kind.as_str() {
            "default" => Ok(None),
            "linear" => {
                let factor = self.factor.ok_or("rope_scaling: type linear without a factor")?;
                Ok(Some(RopeScaling::Linear { factor }))
            }
            "yarn" => {
                let factor = self.factor.unwrap_or(text.max_position_embeddings as f64 / original as f64);
                let mscale = match (self.mscale, self.mscale_all_dim) {
                    (Some(a), Some(b)) if a != 0.0 && b != 0.0 => yarn_mscale(factor, a) / yarn_mscale(factor, b),
                    _ => yarn_mscale(factor, 1.0),
                };
                let given = |x: Option<f64>, usual: f64| x.filter(|x| *x != 0.0).unwrap_or(usual);
                Ok(Some(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: given(self.beta_fast, 32.0),
                    beta_slow: given(self.beta_slow, 1.0),
                    attention_factor: self.attention_factor.unwrap_or(mscale),
                    truncate: self.truncate.unwrap_or(true),
                }))
            }
            other => Err(format!("rope_scaling: type {other} is not supported; default, mrope, linear and yarn are")),
        }
    }
}

/// The shape of the image encoder.
///
/// Errors: sizes that do not fit together, and settings that are not supported, as one sentence.
pub(super) fn vision(config: &Value) -> Result<VisionConfig, String> {
    #[derive(Deserialize)]
    struct Other {
        hidden_act: Option<String>,
        in_channels: Option<usize>,
        in_chans: Option<usize>,
        rope_parameters: Option<VisionRope>,
    }
    #[derive(Deserialize)]
    struct VisionRope {
        rope_theta: Option<f64>,
    }
    let fields = config.get("vision_config").filter(|fields| !fields.is_null()).cloned();
    let fields = without_nulls(fields.unwrap_or_else(|| Value::Object(Default::default())));
    let other = Other::deserialize(&fields).map_err(|e| e.to_string())?;
    silu("hidden_act", other.hidden_act.as_deref().unwrap_or("silu"))?;
    if let Some(channels) = other.in_channels.or(other.in_chans).filter(|&channels| channels != 3) {
        return Err(format!("{channels} channels of colour are not supported"));
    }
    if let Some(theta) = other.rope_parameters.and_then(|rope| rope.rope_theta).filter(|&t| t != VISION_THETA) {
        return Err(format!("rope_theta {theta} is not supported, only {VISION_THETA}"));
    }
    let vision: VisionConfig = serde_json::from_value(fields).map_err(|e| e.to_string())?;
    vision.check()?;
    Ok(vision)
}

/// Errors: an activation other than SiLU.
fn silu(name: &str, activation: &str) -> Result<(), String> {
    match activation {
        "silu" | "swish" => Ok(()),
        other => Err(format!("{name} {other} is not supported, only silu")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tiny(change: impl Fn(&mut Value)) -> Result<BackboneConfig, String> {
        let mut config = serde_json::from_str(include_str!("../../../tests/data/qwen/tiny/config.json")).unwrap();
        change(&mut config);
        text(&config)?.backbone()
    }

    #[test]
    fn what_would_change_results_is_refused_by_name() {
        let refused = |key: &str, value: Value, part: &str| {
            let error = tiny(|config| config[key] = value.clone()).unwrap_err();
            assert!(error.contains(part), "{key}: {error}");
        };
        refused("hidden_act", json!("gelu"), "hidden_act gelu");
        refused("head_dim", json!(32), "head_dim 32");
        refused("partial_rotary_factor", json!(0.5), "partial_rotary_factor 0.5");
        refused("layer_types", json!(["full_attention", "linear_attention"]), "linear_attention");
        for kind in ["dynamic", "longrope", "llama3", "su"] {
            let rope = json!({"type": kind, "mrope_section": [2, 3, 3], "factor": 2.0});
            refused("rope_scaling", rope, &format!("type {kind} is not supported"));
        }
        let conflict = json!({"type": "yarn", "rope_type": "default", "mrope_section": [2, 3, 3], "factor": 2.0});
        refused("rope_scaling", conflict, "they must agree");
        for factor in [json!(0), json!(-1.0)] {
            refused("rope_scaling", json!({"type": "yarn", "mrope_section": [2, 3, 3], "factor": factor}), "factor");
        }
        let slides = tiny(|config| {
            config["use_sliding_window"] = true.into();
            config["sliding_window"] = 64.into();
            config["max_window_layers"] = 1.into();
        });
        assert!(slides.unwrap_err().contains("sliding window"));
        // A window that is as long as the context, or that no layer has, changes nothing.
        for (window, layers) in [(4096, 1), (64, 3)] {
            tiny(|config| {
                config["use_sliding_window"] = true.into();
                config["sliding_window"] = window.into();
                config["max_window_layers"] = layers.into();
            })
            .unwrap();
        }
    }

    #[test]
    fn fields_that_are_null_or_left_out_have_the_librarys_defaults() {
        let config = tiny(|config| {
            for key in ["rope_theta", "hidden_act", "sliding_window", "use_sliding_window", "max_window_layers"] {
                config[key] = Value::Null;
            }
            config["rope_parameters"] = Value::Null;
            config.as_object_mut().unwrap().remove("rms_norm_eps");
        })
        .unwrap();
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.num_key_value_heads), (1e6, 1e-5, 2));
        assert_eq!(tiny(|config| config["num_key_value_heads"] = Value::Null).unwrap().num_key_value_heads, 4);
        let vision = vision(&json!({})).unwrap();
        assert_eq!((vision.depth, vision.hidden_size, vision.patch_size), (32, 3584, 14));
    }

    #[test]
    fn encodings_of_other_programs_are_named() {
        let source = Source::Folder("m".into());
        for (encoding, name) in [
            (json!({"quant_method": "awq", "bits": 4}), "AWQ"),
            (json!({"quant_method": "gptq"}), "GPTQ"),
            (json!({"load_in_4bit": true}), "bitsandbytes"),
            (json!({"quant_method": "compressed-tensors"}), "compressed-tensors"),
            (json!({"quant_method": "fp8"}), "fp8"),
            (json!({}), "an unnamed method"),
        ] {
            for config in
                [json!({"quantization_config": encoding}), json!({"text_config": {"quantization_config": encoding}})]
            {
                let error = check_encoding(&source, &config).unwrap_err();
                assert!(error.message.contains(&format!("quantised by {name} ")), "{error}");
                assert!(error.hint.unwrap().contains("--quant"));
            }
        }
        check_encoding(&source, &json!({"quantization_config": null})).unwrap();
    }
}
