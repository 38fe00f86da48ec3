//! TokenFlow-t2i: grids, prompt format and sampling of its reference.

use super::{Filter, ModelConfig, PromptConfig, Sampling};
use crate::backbone::InputMode;
use crate::backbone::presets::TOKENFLOW_T2I_7B;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::tokenizer::Preset;

/// Grids of its one size, 256 x 256 pixels.
pub const SCALES: [(usize, usize); 9] =
    [(1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (10, 10), (12, 12), (14, 14), (16, 16)];

const NEGATIVE: &str = "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, \
                        cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, \
                        username, blurry.";

/// `<s>`, the caption, `<img>` spelt in plain pieces of text; a fixed negative prompt for guidance.
pub fn prompt() -> PromptConfig {
    PromptConfig { bos: Some(1), image_start: "<img>".into(), padded_to: Some(128), negative: NEGATIVE.into() }
}

/// Its sampling with 1, 2 or 3 passes over a scale, the last of several greedy.
pub fn sampling(passes: usize) -> Sampling {
    let filter = |k: usize, p: f64| Filter { top_k: Some(k), top_p: p };
    let (first, later_passes) = match passes {
        0 | 1 => (filter(600, 0.6), vec![]),
        2 => (filter(1200, 0.8), vec![filter(1, 1.0)]),
        _ => (filter(1200, 0.8), vec![filter(100, 0.8), filter(1, 1.0)]),
    };
    Sampling { cfg: 7.5, top_k: first.top_k, top_p: first.top_p, later_passes, ..Sampling::default() }
}

/// Whether a model may draw a scale in several passes: its inputs are sums of scales, so that it
/// can read a scale's own codes.
pub fn takes_passes(config: &ModelConfig) -> bool {
    config.backbone.input_mode == InputMode::Cumulative
}

/// Draws every scale but the first in `passes` passes, each with its filter of [`sampling`].
///
/// Errors: usage, for more than one pass where the model [takes](takes_passes) one only.
pub fn set_passes(config: &mut ModelConfig, passes: usize) -> Result<()> {
    if !takes_passes(config) {
        if passes == 1 {
            return Ok(());
        }
        let message = format!("{} draws every scale in one pass: --passes is for TokenFlow-t2i", config.name);
        return Err(Error::usage(message).hint("leave out --passes, or --model ByteVisionLab/TokenFlow-t2i"));
    }
    let Sampling { top_k, top_p, later_passes, .. } = sampling(passes);
    config.sampling = Sampling { top_k, top_p, later_passes, ..config.sampling.clone() };
    Ok(())
}

/// The whole model, with one pass over a scale.
pub fn config() -> ModelConfig {
    ModelConfig {
        name: "TokenFlow-t2i".into(),
        scales: SCALES.len(),
        grids: SCALES.to_vec(),
        sampling: sampling(1),
        conversation: Default::default(),
        prompt: prompt(),
        backbone: TOKENFLOW_T2I_7B,
        tokenizer: Preset::clipb_32k_enhanced().config,
        refiner: None,
    }
}

/// Whether a `config.json` is the public checkpoint's: no other Llama has this number of tokens and
/// codes.
pub fn is_public(config: &serde_json::Value) -> bool {
    let words = (TOKENFLOW_T2I_7B.vocab_size + TOKENFLOW_T2I_7B.codebook_size) as u64;
    config.get("backbone").is_none() && config.get("vocab_size").and_then(|v| v.as_u64()) == Some(words)
}

/// The file that holds its image tokenizer, and the model of the hub that has the file: the two are
/// published apart.
const TOKENIZER: (&str, &str) = ("ByteVisionLab/TokenFlow", "tokenflow_clipb_32k_enhanced.pt");

/// Where on the hub the image tokenizer of a public checkpoint is that comes without one: model and
/// file.
pub fn tokenizer_elsewhere(source: &Source) -> Option<(&'static str, &'static str)> {
    let public = source.read_config().is_ok_and(|c| is_public(&c));
    (public && !source.has(config().tokenizer_file(source))).then_some(TOKENIZER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::presets::QWEN2_5_VL_7B;
    use crate::generate::schedule;

    #[test]
    fn an_image_fills_the_tables() {
        assert_eq!(Some(schedule::codes(&SCALES)), TOKENFLOW_T2I_7B.code_positions);
        assert_eq!(SCALES.len(), TOKENFLOW_T2I_7B.max_scales);
        assert_eq!((1..=3).map(|n| sampling(n).passes(1)).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(sampling(3).passes(0), 1);
    }

    #[test]
    fn passes_are_of_models_that_read_sums() {
        let mut config = config();
        config.sampling.cfg = 2.0;
        set_passes(&mut config, 2).unwrap();
        assert_eq!(config.sampling, Sampling { cfg: 2.0, ..sampling(2) });
        let mut config = ModelConfig::nextflow("7b", QWEN2_5_VL_7B, Preset::clipb_32k_enhanced().config);
        let before = config.sampling.clone();
        assert_eq!(set_passes(&mut config, 2).unwrap_err().exit_code(), 2);
        set_passes(&mut config, 1).unwrap();
        assert_eq!(config.sampling, before);
    }
}
