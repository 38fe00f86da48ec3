//! `tokenizer.json`, read field by field into types of bounded size.

use serde::Deserialize;

use super::components::{Component, Few};
use super::vocabulary::ModelFile;
use super::{Text, bad};
use crate::error::{Error, Result};

/// The longest file, in bytes: Qwen3's has 11.4 million.
const MAX_FILE: usize = 32 << 20;
/// The most added tokens, and the longest of them in bytes.
const MAX_ADDED: usize = 1 << 16;
const MAX_ADDED_LENGTH: usize = 256;

/// The parts of the file that are used. Truncation and padding would silently change prompts.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Option<Few<Added, MAX_ADDED>>,
    normalizer: Option<Component>,
    pre_tokenizer: Option<Component>,
    post_processor: Option<Component>,
    decoder: Option<Component>,
    model: ModelFile,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// The tokenizer of a file whose model is of the given type.
///
/// Errors: [`crate::error::Kind::Model`] for one that is damaged, too large, or of a kind that is
/// not supported.
pub(super) fn read(bytes: &[u8], model: &str) -> Result<Text> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::model("tokenizer.json is a git-lfs pointer file: the tokenizer itself was not downloaded")
            .hint("git lfs pull, in the folder of the file"));
    }
    if bytes.len() > MAX_FILE {
        return Err(bad(&format!("it has {} bytes, more than {MAX_FILE}", bytes.len())));
    }
    let file: File = serde_json::from_slice(bytes).map_err(|e| bad(&e).because(e))?;
    if file.model.kind != model {
        return Err(bad(&format!("its model is of type {:?}, not {model}", file.model.kind)));
    }
    build(file).map_err(|e| bad(&e))
}

fn build(file: File) -> Result<Text, String> {
    let Few(added) = file.added_tokens.unwrap_or_default();
    if let Some(long) = added.iter().find(|token| token.content.len() > MAX_ADDED_LENGTH) {
        return Err(format!("an added token has {} bytes, more than {MAX_ADDED_LENGTH}", long.content.len()));
    }
    let added: Vec<Added> = added.into_iter().filter(|token| !token.content.is_empty()).collect();
    let shown = added.iter().filter(|token| !token.special).map(|token| (token.id, token.content.clone())).collect();
    let control = added.into_iter().map(|token| (token.content, token.id)).collect();
    let normalizers = file.normalizer.map(Component::normalizers).transpose()?.unwrap_or_default();
    let pre_tokenizers = file.pre_tokenizer.map(Component::pre_tokenizers).transpose()?.unwrap_or_default();
    let decoders = file.decoder.map(Component::decoders).transpose()?.unwrap_or_default();
    file.post_processor.map(Component::check_post_processor).transpose()?;
    let model = file.model.build(&control)?;
    Ok(Text { normalizers, pre_tokenizers, model: model.model, decoders, size: model.size, control, shown })
}
