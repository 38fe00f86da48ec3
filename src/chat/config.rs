//! Qwen2.5-VL's public files: shape, stops and sampling.

use serde::Deserialize;
use serde_json::Value;

use super::TextSampling;
use crate::backbone::BackboneConfig;
use crate::backbone::presets::QWEN2_5_VL_7B;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::vision::{ImageProcessor, VisionConfig};

/// What config.json says of the transformer.
#[derive(Deserialize)]
struct Public {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    #[serde(alias = "rope_parameters")]
    rope_scaling: RopeScaling,
    max_position_embeddings: usize,
}

#[derive(Deserialize)]
struct RopeScaling {
    mrope_section: [usize; 3],
    rope_theta: Option<f64>,
}

/// generation_config.json.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Generation {
    do_sample: bool,
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    repetition_penalty: Option<f64>,
    eos_token_id: Stops,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stops {
    One(u32),
    Many(Vec<u32>),
}

impl Default for Stops {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

/// Everything about a public Qwen2.5-VL checkpoint but its weights and words.
#[derive(Clone, Debug)]
pub struct QwenConfig {
    /// Shape of the transformer.
    pub backbone: BackboneConfig,
    /// Shape of the image encoder.
    pub vision: VisionConfig,
    /// How images are made ready.
    pub processor: ImageProcessor,
    /// How words are drawn if the user says nothing.
    pub sampling: TextSampling,
    /// Tokens that end a reply, beside `<|im_end|>`.
    pub stops: Vec<u32>,
    /// The most tokens of a conversation.
    pub context: usize,
}

/// Whether a config.json is Qwen2.5-VL's.
pub fn is_qwen(config: &Value) -> bool {
    config["model_type"] == "qwen2_5_vl"
}

impl QwenConfig {
    /// Reads config.json, and generation_config.json and preprocessor_config.json where they are.
    ///
    /// Errors: a file that is broken, or a shape that cannot be.
    pub fn read(source: &Source) -> Result<Self> {
        let config = source.read_config()?;
        let of_config = |what: String| bad(source, "config.json", what);
        let nested = config.get("text_config").filter(|text| text.get("hidden_size").is_some());
        let text: Public =
            serde_json::from_value(nested.unwrap_or(&config).clone()).map_err(|e| of_config(e.to_string()))?;
        let mut vision = config["vision_config"].clone();
        if let Some(fields) = vision.as_object_mut() {
            // What a file may leave to the library's defaults.
            fields.entry("temporal_patch_size").or_insert(2.into());
            fields.entry("depth").or_insert(32.into());
        }
        let vision: VisionConfig =
            serde_json::from_value(vision).map_err(|e| of_config(format!("vision_config: {e}")))?;
        vision.check().map_err(|e| of_config(format!("vision_config: {e}")))?;
        let theta = text.rope_theta.or(text.rope_scaling.rope_theta);
        let backbone = BackboneConfig {
            vocab_size: text.vocab_size,
            hidden_size: text.hidden_size,
            intermediate_size: text.intermediate_size,
            num_hidden_layers: text.num_hidden_layers,
            num_attention_heads: text.num_attention_heads,
            num_key_value_heads: text.num_key_value_heads,
            rms_norm_eps: text.rms_norm_eps,
            rope_theta: theta.ok_or_else(|| of_config("rope_theta is missing".into()))?,
            mrope_section: text.rope_scaling.mrope_section,
            tie_word_embeddings: config["tie_word_embeddings"] == true,
            ..QWEN2_5_VL_7B
        };
        backbone.check().map_err(of_config)?;
        if vision.out_hidden_size != backbone.hidden_size {
            let (out, hidden) = (vision.out_hidden_size, backbone.hidden_size);
            return Err(of_config(format!("the image encoder gives a width of {out}, the transformer takes {hidden}")));
        }
        let processor = ImageProcessor::deserialize(optional(source, "preprocessor_config.json")?)
            .map_err(|e| bad(source, "preprocessor_config.json", e.to_string()))?;
        let (sampling, stops) = generation(source)?;
        Ok(Self { backbone, vision, processor, sampling, stops, context: text.max_position_embeddings })
    }
}

fn bad(source: &Source, file: &str, what: String) -> Error {
    Error::model(format!("{file} of {source}: {what}")).hint("copy the file from the checkpoint again")
}

/// A file of JSON, or an empty object where there is none.
fn optional(source: &Source, file: &str) -> Result<Value> {
    if source.has_file(file) { source.read_json(file) } else { Ok(Value::Object(Default::default())) }
}

/// Sampling and stops of generation_config.json, if there is one.
///
/// Errors: a file that is broken.
pub(super) fn generation(source: &Source) -> Result<(TextSampling, Vec<u32>)> {
    const FILE: &str = "generation_config.json";
    let file: Generation =
        serde_json::from_value(optional(source, FILE)?).map_err(|e| bad(source, FILE, e.to_string()))?;
    let sampling = TextSampling {
        temperature: if file.do_sample { file.temperature.unwrap_or(1.0) } else { 0.0 },
        // The library's value where the file has none.
        top_k: Some(file.top_k.unwrap_or(50)).filter(|&k| k > 0),
        top_p: file.top_p.unwrap_or(1.0),
        repetition_penalty: file.repetition_penalty.unwrap_or(1.0),
    };
    sampling.check().map_err(|e| bad(source, FILE, e))?;
    let stops = match file.eos_token_id {
        Stops::One(id) => vec![id],
        Stops::Many(ids) => ids,
    };
    Ok((sampling, stops))
}
