//! Names of tensors: those of Qwen2.5-VL in every layout, and those by which a layout that is not
//! read is recognised.

use std::borrow::Cow;

use super::header::{self, Header};
use crate::error::Result;

/// Prefixes of Qwen2.5-VL's state dict, and what the published checkpoints have in their place:
/// those of transformers 4.52 and later, of its base model without the head, and of a wrapped text
/// model. Longer prefixes come first.
const PREFIXES: [(&str, &str); 5] = [
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
];

/// Marks a checkpoint as Qwen2.5-VL's, whose `language_model.` may be renamed: other families use
/// that prefix too.
const VISION: [&str; 2] = ["visual.patch_embed.", "model.visual.patch_embed."];

/// Whether only a checkpoint of Qwen2.5-VL has such a key.
pub(super) fn is_qwen(key: &str) -> bool {
    VISION.iter().any(|prefix| key.starts_with(prefix))
}

/// The published name of a key of Qwen2.5-VL.
pub(super) fn published(key: &str) -> Cow<'_, str> {
    let renamed = PREFIXES.iter().find_map(|(from, to)| Some(format!("{to}{}", key.strip_prefix(from)?)));
    renamed.map_or(Cow::Borrowed(key), Cow::Owned)
}

/// The header with published names.
///
/// Errors: two tensors that get the same name.
pub(super) fn renamed(name: &str, header: Header) -> Result<Header> {
    let mut renamed = Header::new();
    for (key, entry) in header {
        let to = published(&key).into_owned();
        if renamed.contains_key(&to) {
            return Err(header::broken(name, &format!("has {to:?} twice, once as {key:?}")));
        }
        renamed.insert(to, entry);
    }
    Ok(renamed)
}

/// What to do with a LoRA adapter.
pub(super) const MERGE: &str = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)";

/// Names of llama.cpp's GGUF files.
pub(super) fn is_llama_cpp(key: &str) -> bool {
    key == "token_embd.weight" || key.starts_with("blk.") || key.starts_with("v.blk.")
}

/// Names of a LoRA adapter's matrices.
pub(super) fn is_lora(key: &str) -> bool {
    key.contains(".lora_A.") || key.contains(".lora_B.")
}

/// Names of OneCAT's checkpoints, which have LoRA matrices of their own, for every scale.
pub(super) fn is_onecat(key: &str) -> bool {
    key.starts_with("patch_language_model.")
}

/// Names by which AWQ, GPTQ, compressed-tensors, bitsandbytes and block-wise fp8 store a matrix.
pub(super) fn is_quantised(key: &str) -> bool {
    const NAMES: [&str; 6] = ["qweight", "qzeros", "weight_packed", "weight.absmax", "SCB", "weight_scale_inv"];
    NAMES.iter().any(|name| key.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_layouts_get_the_published_names() {
        for (key, name) in [
            ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
            ("language_model.model.norm.weight", "model.norm.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("language_model.norm.weight", "model.norm.weight"),
            ("model.norm.weight", "model.norm.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(published(key), name);
        }
    }

    #[test]
    fn encodings_that_are_not_read_are_recognised() {
        assert!(is_quantised("model.layers.0.self_attn.q_proj.qweight"));
        assert!(is_quantised("model.layers.0.self_attn.q_proj.weight_scale_inv"));
        assert!(!is_quantised("model.layers.0.self_attn.q_proj.weight"));
        assert!(is_lora("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"));
        assert!(is_llama_cpp("blk.0.attn_q.weight") && !is_llama_cpp("visual.blocks.0.norm1.weight"));
    }
}
