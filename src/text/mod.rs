//! Text tokenizers: BPE and Unigram vocabularies, and checks of prompts.

mod components;
mod file;
mod guard;
mod sentencepiece;
#[cfg(feature = "train")]
mod train;
mod vocabulary;

use std::collections::BTreeMap;

use tokenizers::{
    Decoder, DecoderWrapper, Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
};

use crate::error::{Error, Result};
use guard::guard;

#[cfg(feature = "train")]
pub use train::train_bpe;

/// Longest prompt in bytes.
pub const MAX_PROMPT: usize = 8192;
/// The longest text, in bytes, that is cut into tokens, as the normalizer leaves it: all of the
/// longest message, or eleven times the longest prompt, which is the most that Unicode's
/// compatibility forms make of it.
const MAX_NORMALIZED: usize = 128 << 10;
/// A normalizer that makes more of a text than this many times its bytes is not one of a real
/// model.
const MAX_GROWTH: usize = 16;

/// A text tokenizer whose control tokens are out of reach: whatever a user types, `<boi>` or
/// `<|im_start|>` included, is plain text.
#[derive(Debug)]
pub struct Text {
    normalizers: Vec<NormalizerWrapper>,
    pre_tokenizers: Vec<PreTokenizerWrapper>,
    model: ModelWrapper,
    decoders: Vec<DecoderWrapper>,
    /// The highest id of the model and one.
    size: usize,
    /// Ids of the control tokens.
    control: BTreeMap<String, u32>,
    /// Control tokens that are shown in a reply: those that the file does not call special, such as
    /// `<tool_call>`.
    shown: BTreeMap<u32, String>,
}

impl Text {
    /// Reads a `tokenizer.json` with a BPE.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a file that is damaged, too large, or describes
    /// anything but what the module `components` lists.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        file::read(bytes, "BPE")
    }

    /// Reads a `tokenizer.json` with a Unigram model, as T5's. Control tokens in its vocabulary
    /// match no text; otherwise they would be the most likely pieces of all.
    ///
    /// Errors: as [`Text::from_bytes`].
    pub fn from_unigram(bytes: &[u8]) -> Result<Self> {
        file::read(bytes, "Unigram")
    }

    /// Reads a `tokenizer.model` of SentencePiece with a BPE, as Llama's.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self> {
        sentencepiece::read(bytes)
    }

    /// The id of a control token, such as `<|im_start|>`.
    pub fn control(&self, word: &str) -> Option<u32> {
        self.control.get(word).copied()
    }

    /// Every control token with its id.
    pub fn controls(&self) -> impl Iterator<Item = (&str, u32)> {
        self.control.iter().map(|(word, id)| (word.as_str(), *id))
    }

    /// Whether a control token is shown in a reply.
    pub fn is_shown(&self, id: u32) -> bool {
        self.shown.contains_key(&id)
    }

    /// Ids of a text; never those of control tokens.
    ///
    /// Errors: usage, for a text that is too long once it is normalised;
    /// [`crate::error::Kind::Model`] for a tokenizer that cannot be used.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.contains('\0') {
            return Err(Error::usage("the text holds the control character U+0000").hint("leave it out"));
        }
        // Step by step, not by the library's `encode`: what one step makes is bounded before the
        // next one reads it, and the tokens of one piece are dropped before those of the next one
        // are made.
        let run = || {
            check_length(text.len(), text.len())?;
            let mut normalized = NormalizedString::from(text);
            for step in &self.normalizers {
                step.normalize(&mut normalized).map_err(|e| broken(&e))?;
                check_length(text.len(), normalized.len())?;
            }
            if text.is_empty() || normalized.is_empty() {
                return Ok(Vec::new());
            }
            let mut pieces = PreTokenizedString::from(normalized);
            for step in &self.pre_tokenizers {
                step.pre_tokenize(&mut pieces).map_err(|e| broken(&e))?;
            }
            let mut ids = Vec::new();
            for (piece, ..) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
                let tokens = self.model.tokenize(piece).map_err(|e| broken(&e))?;
                ids.extend(tokens.iter().map(|token| token.id));
            }
            Ok(ids)
        };
        guard(run).unwrap_or_else(|| Err(broken(&"it is damaged")))
    }

    /// The text of ids. Special control tokens and ids that are not in the vocabulary have none.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a tokenizer that cannot be used.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let runs = ids.chunk_by(|a, b| !self.is_shown(*a) && !self.is_shown(*b));
        let text = runs.map(|run| match self.shown.get(&run[0]) {
            Some(word) => Ok(word.clone()),
            None => guard(|| self.decode_words(run)).unwrap_or_else(|| Err(broken(&"it is damaged"))),
        });
        text.collect()
    }

    fn decode_words(&self, ids: &[u32]) -> Result<String> {
        // The prefix of a Unigram's control tokens: see `ModelFile::unigram`.
        let word = |&id: &u32| self.model.id_to_token(id).filter(|word| !word.starts_with('\0'));
        let mut words: Vec<String> = ids.iter().filter_map(word).collect();
        if self.decoders.is_empty() {
            return Ok(words.join(" "));
        }
        // No decoder makes a text longer: see `components`.
        for step in &self.decoders {
            words = step.decode_chain(words).map_err(|e| broken(&e))?;
        }
        Ok(words.concat())
    }

    /// Ids there are, control tokens aside.
    pub fn vocab_size(&self) -> usize {
        self.size
    }
}

/// Refuses a text that has `after` bytes of `before` once it is normalised.
fn check_length(before: usize, after: usize) -> Result<()> {
    if after > MAX_GROWTH * before + 64 {
        return Err(broken(&format!("its normalizer makes {after} bytes of {before}")));
    }
    if after > MAX_NORMALIZED {
        let message = format!("the text has {after} bytes once it is normalised, the limit is {MAX_NORMALIZED}");
        return Err(Error::usage(message).hint("shorten it"));
    }
    Ok(())
}

/// The error of a file that cannot be used.
fn bad(what: &dyn std::fmt::Display) -> Error {
    Error::model(format!("tokenizer.json cannot be used: {what}"))
        .hint("copy the file from the checkpoint again, or name another model: --model FOLDER")
}

/// The error of a tokenizer that was loaded and fails at a text.
fn broken(what: &dyn std::fmt::Display) -> Error {
    Error::model(format!("the model's text tokenizer cannot be used: {what}"))
        .hint("copy the file from the checkpoint again, or name another model: --model FOLDER")
}

/// Bytes that a user gave as a prompt, as text: UTF-8, not blank, at most [`MAX_PROMPT`] bytes, no
/// control characters.
pub fn check_prompt(bytes: &[u8]) -> Result<String> {
    let say = |message: String| Err(Error::usage(message).hint("-p \"a red apple\""));
    if bytes.len() > MAX_PROMPT {
        return say(format!("the prompt has {} bytes, the limit is {MAX_PROMPT}", bytes.len()));
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.trim(),
        Err(e) => return say(format!("the prompt is not UTF-8 (byte {})", e.valid_up_to())),
    };
    if text.is_empty() {
        return say("the prompt is empty".into());
    }
    if let Some(c) = text.chars().find(|c| c.is_control() && !c.is_whitespace()) {
        return say(format!("the prompt holds the control character U+{:04X}", c as u32));
    }
    Ok(text.to_string())
}

#[cfg(test)]
mod tests;
