//! generation_config.json: sampling and stops.

use serde::Deserialize;
use serde_json::Value;

use super::{bad, optional};
use crate::chat::TextSampling;
use crate::checkpoint::Source;
use crate::error::Result;

const FILE: &str = "generation_config.json";

/// Settings of transformers' `generate` that are not supported, with the value at which each has no
/// effect.
const UNSUPPORTED: [(&str, f64); 14] = [
    ("num_beams", 1.0),
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("top_h", 0.0),
    ("num_beam_groups", 1.0),
];
/// The same for lists, which have no effect if they are empty.
const UNSUPPORTED_LISTS: [&str; 6] = [
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "force_words_ids",
    "exponential_decay_length_penalty",
];

/// The fields that have an effect.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Public {
    do_sample: bool,
    temperature: Option<f64>,
    top_k: Option<i64>,
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

impl Stops {
    fn ids(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// How replies are sampled and where they end.
pub(in crate::chat) struct Generation {
    /// The checkpoint's own sampling.
    pub sampling: TextSampling,
    /// Tokens that end a reply.
    pub stops: Vec<u32>,
    /// Settings that have no effect here, as a sentence for the user.
    pub ignored: Option<String>,
}

/// Reads generation_config.json, if there is one; else the stops of config.json.
///
/// Errors: a file that is broken.
pub(in crate::chat) fn generation(source: &Source) -> Result<Generation> {
    let mut fields = optional(source, FILE)?;
    if !source.has_file(FILE) {
        let config = source.read_config()?;
        let stops = [&config["text_config"]["eos_token_id"], &config["eos_token_id"]];
        if let Some(stops) = stops.into_iter().find(|stops| !stops.is_null()) {
            fields["eos_token_id"] = stops.clone();
        }
    }
    let ignored = ignored(&fields);
    let ignored = (!ignored.is_empty()).then(|| format!("{FILE} of {source}: {} not supported", ignored.join(", ")));
    if let Some(stops) = fields.get("eos_token_id").filter(|stops| Stops::deserialize(*stops).is_err()) {
        return Err(bad(source, FILE, format!("eos_token_id {stops} is no token, and no list of tokens")));
    }
    let file: Public = serde_json::from_value(fields).map_err(|e| bad(source, FILE, e.to_string()))?;
    let sampling = TextSampling {
        temperature: if file.do_sample { file.temperature.unwrap_or(1.0) } else { 0.0 },
        // The library's value where the file has none; none are left out by 0, or by -1 as in other
        // programs.
        top_k: usize::try_from(file.top_k.unwrap_or(50)).ok().filter(|&k| k > 0),
        top_p: file.top_p.unwrap_or(1.0),
        repetition_penalty: file.repetition_penalty.unwrap_or(1.0),
    };
    sampling.check().map_err(|e| bad(source, FILE, e))?;
    Ok(Generation { sampling, stops: file.eos_token_id.ids(), ignored })
}

/// Settings with an effect that is not supported, each with its value.
fn ignored(fields: &Value) -> Vec<String> {
    let acts = |value: &Value, idle: f64| !value.is_null() && value.as_f64() != Some(idle);
    let numbers = UNSUPPORTED.iter().filter(|(key, idle)| acts(&fields[*key], *idle)).map(|(key, _)| *key);
    let empty = |value: &Value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        value => value.is_null(),
    };
    let lists = UNSUPPORTED_LISTS.into_iter().filter(|key| !empty(&fields[*key]));
    numbers.chain(lists).map(|key| format!("{key} {}", fields[key])).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(fields: Value) -> Result<Generation> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), fields.to_string()).unwrap();
        generation(&Source::Folder(dir.path().into()))
    }

    #[test]
    fn null_is_as_if_left_out() {
        let keys = ["do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "eos_token_id", "min_p"];
        let nulls: Value = keys.into_iter().map(|key| (key.to_string(), Value::Null)).collect();
        for fields in [nulls, json!({}), json!({"transformers_version": "5.24.0"})] {
            let Generation { sampling, stops, ignored } = read(fields).unwrap();
            assert_eq!(sampling, TextSampling { top_k: Some(50), ..TextSampling::GREEDY });
            assert!(stops.is_empty() && ignored.is_none());
        }
    }

    #[test]
    fn stops_are_those_of_config_json_where_there_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        for (config, stops) in [
            (json!({"eos_token_id": 7}), vec![7]),
            (json!({"text_config": {"eos_token_id": [3, 4]}, "eos_token_id": 7}), vec![3, 4]),
            (json!({"text_config": {"eos_token_id": null}}), vec![]),
        ] {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            assert_eq!(generation(&Source::Folder(dir.path().into())).unwrap().stops, stops);
        }
    }

    #[test]
    fn what_has_no_effect_here_is_named() {
        let ignored = |fields| read(fields).unwrap().ignored;
        let note = ignored(json!({"num_beams": 4, "min_p": 0.1, "suppress_tokens": [3], "typical_p": 1.0})).unwrap();
        assert!(note.contains("num_beams 4, min_p 0.1, suppress_tokens [3] not supported"), "{note}");
        assert_eq!(ignored(json!({"num_beams": 1, "min_p": 0.0, "bad_words_ids": []})), None);
        for (key, value) in
            [("eos_token_id", json!("x")), ("eos_token_id", json!(-1)), ("temperature", json!(-1)), ("top_p", json!(2))]
        {
            let error = read(json!({"do_sample": true, key: value})).err().unwrap();
            assert!(error.exit_code() == 3 && error.message.contains(key), "{error}");
        }
    }
}
