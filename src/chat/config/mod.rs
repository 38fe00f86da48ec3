//! Qwen2.5-VL's public files: shape, image limits, stops, sampling and chat template, in every form
//! in which transformers
//! 4.49 to 5 writes them. Settings that change results and are not supported are refused by name.

mod generation;
mod processor;
mod public;

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::TextSampling;
use super::template::ChatTemplate;
use crate::backbone::BackboneConfig;
use crate::checkpoint::{Source, TRANSFORMER};
use crate::error::{Error, Result};
use crate::vision::{ImageProcessor, VisionConfig};

pub(super) use generation::{Generation, generation};

/// The way out of a family or an encoding that is not read.
const PUBLISHED: &str = "nextflow chat --model Qwen/Qwen2.5-VL-3B-Instruct --quant q8_0";

/// Everything about a public Qwen2.5-VL checkpoint but its weights and text tokenizer.
#[derive(Clone, Debug)]
pub struct QwenConfig {
    /// Shape of the transformer.
    pub backbone: BackboneConfig,
    /// Shape of the image encoder.
    pub vision: VisionConfig,
    /// How images are made ready.
    pub processor: ImageProcessor,
    /// How text tokens are sampled by default.
    pub sampling: TextSampling,
    /// Tokens that end a reply, beside `<|im_end|>`.
    pub stops: Vec<u32>,
    /// The most tokens of a conversation.
    pub context: usize,
    /// The folder's own chat template, if it has one that can be read.
    pub template: Option<Arc<ChatTemplate>>,
    /// What of the folder has no effect, in sentences for the user.
    pub notes: Vec<String>,
}

/// Whether a config.json is Qwen2.5-VL's.
pub fn is_qwen(config: &Value) -> bool {
    config["model_type"] == "qwen2_5_vl"
}

/// The family that transformers calls the model of a config.json, if that is one which is not read.
pub fn other_family(config: &Value) -> Option<&str> {
    config["model_type"].as_str().filter(|_| !is_qwen(config) && config.get("backbone").is_none())
}

/// The error of a model of another family.
pub fn unknown_family(source: &Source, family: &str) -> Error {
    Error::model(format!("{source} is a model of the family {family}, which is not read; Qwen2.5-VL (qwen2_5_vl) is"))
        .hint(PUBLISHED)
}

impl QwenConfig {
    /// Reads config.json, and what there is of generation_config.json, the image processor's config
    /// and the chat template.
    ///
    /// Errors: a file that is broken, a shape that cannot be, or a setting that is not supported.
    pub fn read(source: &Source) -> Result<Self> {
        const FILE: &str = "config.json";
        let config = source.read_config()?;
        public::check_encoding(source, &config)?;
        let broken = |what: String| bad(source, FILE, what);
        let text = public::text(&config).map_err(broken)?;
        let vision = public::vision(&config).map_err(|e| broken(format!("vision_config: {e}")))?;
        let context = text.max_position_embeddings;
        let mut backbone = text.backbone().map_err(broken)?;
        if public::is_tied(&config) && source.has(TRANSFORMER) {
            // If the file stores lm_head despite tie_word_embeddings, transformers uses the stored
            // one.
            backbone.tie_word_embeddings = !source.has_tensor(TRANSFORMER, "lm_head.weight")?;
        } else {
            backbone.tie_word_embeddings = public::is_tied(&config);
        }
        if vision.out_hidden_size != backbone.hidden_size {
            let (out, hidden) = (vision.out_hidden_size, backbone.hidden_size);
            return Err(broken(format!(
                "the image encoder has an output width of {out}, the transformer an input of {hidden}"
            )));
        }
        let mut notes = Vec::new();
        let processor = processor::read(source, &vision, &mut notes)?;
        let Generation { sampling, stops, ignored } = generation(source)?;
        notes.extend(ignored);
        let template = match ChatTemplate::read(source)? {
            Some(Ok(template)) => Some(Arc::new(template)),
            Some(Err(note)) => {
                notes.push(note);
                None
            }
            None => None,
        };
        Ok(Self { backbone, vision, processor, sampling, stops, context, template, notes })
    }
}

fn bad(source: &Source, file: &str, what: String) -> Error {
    Error::model(format!("{file} of {source}: {what}")).hint("correct the file, or copy it from its origin again")
}

/// A file of JSON without its nulls, or an empty object where there is none.
fn optional(source: &Source, file: &str) -> Result<Value> {
    if source.has_file(file) {
        source.read_json(file).map(without_nulls)
    } else {
        Ok(Value::Object(Default::default()))
    }
}

/// The value without fields that are null, which are as if left out.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect()
        }
        value => value,
    }
}

/// A whole number that may be written as a float, as of `size` in a preprocessor_config.json.
fn whole<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    let number = f64::deserialize(deserializer)?;
    let whole = number.fract() == 0.0 && (0.0..=2f64.powi(53)).contains(&number);
    if whole {
        Ok(Some(number as usize))
    } else {
        Err(serde::de::Error::custom(format!("{number} is no whole number")))
    }
}
