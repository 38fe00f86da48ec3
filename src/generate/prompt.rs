//! Prompts: the tokens before the first code of an image.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::text::{self, Text};

/// Before a request that the model is to think about first.
pub const THINK: &str = "think, then draw ";
/// Before an instruction for an edit, where it could be a question.
pub const EDIT: &str = "edit: ";
/// Most text tokens before the image of an edit.
pub const MAX_THOUGHT: usize = 128;
/// Separates reasoning and prompt (the paper's chain of thought).
pub const FINAL: &str = "the final prompt is: ";

/// How a prompt becomes tokens. The default is NextFlow's: the text, then `<boi>`; nothing but
/// `<boi>` for the unconditional row of guidance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptConfig {
    /// Token before the text.
    pub bos: Option<u32>,
    /// Text that opens an image in place of `<boi>`.
    pub image_start: String,
    /// Positions count as if text and `bos` were padded on the left to this many tokens; longer
    /// prompts are cut to it.
    pub padded_to: Option<usize>,
    /// Text of the unconditional row.
    pub negative: String,
}

/// The most tokens of a prompt: one per byte. (NFKC may expand a byte to eleven.)
const MAX_TOKENS: usize = text::MAX_PROMPT;

/// Counts the tokens of prompts, before weights load.
#[derive(Debug)]
pub struct PromptCounter {
    /// Nothing where no text is read, but features of it.
    text: Option<Text>,
    limit: usize,
}

impl PromptCounter {
    /// Counts with the tokenizer of a model whose context holds `context` tokens.
    pub fn new(text: Text, context: usize) -> Self {
        Self { text: Some(text), limit: context.min(MAX_TOKENS) }
    }

    /// Counts with the tokenizer of a model that cuts off longer prompts, or guesses without one.
    pub fn cutting(text: Option<Text>) -> Self {
        Self { text, limit: MAX_TOKENS }
    }

    /// Tokens of a prompt.
    ///
    /// Errors: usage, if there are more than the model reads; [`crate::error::Kind::Model`] for a
    /// tokenizer that cannot be used.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        let Some(text) = &self.text else { return Ok(prompt.len().div_ceil(3)) };
        match (text.encode(prompt)?.len(), self.limit) {
            (count, limit) if count > limit => {
                Err(Error::usage(format!("the prompt has {count} tokens, the limit is {limit}"))
                    .hint("shorten it: -p \"a red apple\""))
            }
            (count, _) => Ok(count),
        }
    }
}

/// The tokens of one row up to the one that predicts the first code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Token ids; never empty.
    pub ids: Vec<u32>,
    /// Left pads before them. Pads are masked, so they are never computed: the positions begin
    /// after them.
    pub pads: usize,
}

impl PromptConfig {
    /// Whether everything is NextFlow's.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The tokens that open an image: those of the text in the config, or `boi`.
    pub(super) fn opening(&self, text: &Text, boi: u32) -> Result<Vec<u32>> {
        match self.image_start.as_str() {
            "" => Ok(vec![boi]),
            words => Some(text.encode(words)?).filter(|ids| !ids.is_empty()).ok_or_else(|| {
                Error::model(format!("tokenizer.json has no tokens for {words:?}, which opens an image"))
            }),
        }
    }

    /// The text of the unconditional row.
    pub(super) fn negative(&self, text: &Text) -> Result<Vec<u32>> {
        if self.negative.is_empty() { Ok(Vec::new()) } else { text.encode(&self.negative) }
    }

    /// The row of a text's tokens before an image that `opening` opens.
    pub fn prefix(&self, text: &[u32], opening: &[u32]) -> Prefix {
        let mut ids: Vec<u32> = self.bos.iter().chain(text).copied().collect();
        let length = self.padded_to.unwrap_or(ids.len());
        ids.truncate(length);
        let pads = length - ids.len();
        ids.extend(opening);
        Prefix { ids, pads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_text_and_boi() {
        let config = PromptConfig::default();
        assert_eq!(config.prefix(&[5, 6], &[9]), Prefix { ids: vec![5, 6, 9], pads: 0 });
        assert_eq!(config.prefix(&[], &[9]), Prefix { ids: vec![9], pads: 0 });
    }

    #[test]
    fn short_prompts_are_padded_and_long_ones_cut() {
        let config = PromptConfig { bos: Some(1), padded_to: Some(4), ..PromptConfig::default() };
        assert_eq!(config.prefix(&[5], &[8, 9]), Prefix { ids: vec![1, 5, 8, 9], pads: 2 });
        assert_eq!(config.prefix(&[5, 6, 7, 4], &[8, 9]), Prefix { ids: vec![1, 5, 6, 7, 8, 9], pads: 0 });
    }
}
