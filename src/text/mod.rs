//! Words to ids: BPE, and what a prompt may be.

mod sentencepiece;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Longest prompt in bytes.
pub const MAX_PROMPT: usize = 8192;

/// A text tokenizer whose control tokens are out of reach: whatever a user types, `<boi>` or `<|im_start|>` included, is
/// plain text.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    /// Ids of the control tokens.
    control: BTreeMap<String, u32>,
}

impl Text {
    /// Reads a `tokenizer.json` with a BPE.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::from_json(serde_json::from_slice(bytes).map_err(|e| bad(&e))?)
    }

    /// Reads a `tokenizer.model` of SentencePiece with a BPE, as Llama's.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self> {
        Self::from_json(sentencepiece::convert(bytes)?)
    }

    /// Reads a `tokenizer.json` with a Unigram, as T5's. The pieces of its vocabulary that are control tokens match no text: here
    /// they would be the likeliest pieces of all.
    pub fn from_unigram(bytes: &[u8]) -> Result<Self> {
        let mut file: Value = serde_json::from_slice(bytes).map_err(|e| bad(&e))?;
        if file["model"]["type"] != "Unigram" {
            return Err(bad(&"not a Unigram"));
        }
        let control = control(&file);
        for (id, piece) in file["model"]["vocab"].as_array_mut().into_iter().flatten().enumerate() {
            if let Some(piece) = piece.get_mut(0).filter(|word| word.as_str().is_some_and(|w| control.contains_key(w)))
            {
                // No prompt holds a control character.
                *piece = format!("\0{id}").into();
            }
        }
        Self::without_added_tokens(file, control)
    }

    fn from_json(file: Value) -> Result<Self> {
        // Other models, and these two affixes, reach code of the library that panics on crafted files.
        let model = &file["model"];
        let none = |key: &str| matches!(&model[key], Value::Null) || model[key] == "";
        if model["type"] != "BPE" || !none("continuing_subword_prefix") || !none("end_of_word_suffix") {
            return Err(bad(&"not a plain BPE"));
        }
        let control = control(&file);
        Self::without_added_tokens(file, control)
    }

    fn without_added_tokens(mut file: Value, control: BTreeMap<String, u32>) -> Result<Self> {
        if let Some(fields) = file.as_object_mut() {
            // Control words would be recognised in prompts, and the other two would silently change them.
            fields.insert("added_tokens".into(), Value::Array(Vec::new()));
            fields.insert("truncation".into(), Value::Null);
            fields.insert("padding".into(), Value::Null);
        }
        guard(|| serde_json::from_value(file).map_err(|e| bad(&e))).map(|tokenizer| Self { tokenizer, control })
    }

    /// The id of a control token, such as `<|im_start|>`.
    pub fn control(&self, word: &str) -> Option<u32> {
        self.control.get(word).copied()
    }

    /// Ids of a text; never those of control tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        guard(|| Ok(self.tokenizer.encode_fast(text, false).map_err(|e| bad(&e))?.get_ids().to_vec()))
    }

    /// The text of ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guard(|| self.tokenizer.decode(ids, false).map_err(|e| bad(&e)))
    }

    /// Ids there are.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab(false).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Writes a `tokenizer.json`, its control tokens included.
    pub fn save(&self, path: &Path) -> Result<()> {
        let json = self.tokenizer.to_string(false).map_err(|e| bad(&e))?;
        let mut file: Value = serde_json::from_str(&json).map_err(|e| bad(&e))?;
        let added = self.control.iter().map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        });
        file["added_tokens"] = added.collect();
        let json = serde_json::to_string_pretty(&file).map_err(|e| bad(&e))?;
        crate::checkpoint::write(path, json.as_bytes())
    }
}

/// Ids of the control tokens of a `tokenizer.json`.
fn control(file: &Value) -> BTreeMap<String, u32> {
    let added = file["added_tokens"].as_array().into_iter().flatten();
    let control = added.filter_map(|t| Some((t["content"].as_str()?.into(), t["id"].as_u64()?.try_into().ok()?)));
    control.collect()
}

fn bad(what: &dyn std::fmt::Display) -> Error {
    Error::model(format!("tokenizer.json cannot be used: {what}")).hint("copy the file from the checkpoint again")
}

/// Runs the library on a file from anywhere: a panic in it is an error like others.
fn guard<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(bad(&"it is damaged")))
}

/// Bytes that a user gave as a prompt, as text: UTF-8, not blank, at most [`MAX_PROMPT`] bytes, no control characters.
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

/// Control tokens of a text tokenizer of our own: what begins and ends a message.
#[cfg(feature = "train")]
const CONTROL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// Trains a BPE of `vocab_size` ids, the control tokens among them, on captions. Upper and lower case are one, spaces belong to the word after them, so
/// that frequent words become one id; bytes are the fallback for everything else.
#[cfg(feature = "train")]
pub fn train_bpe(captions: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Text> {
    use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
    use tokenizers::normalizers::{Lowercase, NFKC, Prepend, Replace, Sequence, Strip};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior, TokenizerBuilder};

    let fail = |e: tokenizers::Error| Error::model(format!("cannot train the text tokenizer: {e}"));
    let spaces = Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ");
    let normalizer: Vec<NormalizerWrapper> = vec![
        NFKC.into(),
        Lowercase.into(),
        spaces.map_err(fail)?.into(),
        Strip::new(true, true).into(),
        Prepend::new(" ".into()).into(),
    ];
    // Every Chinese character is a piece of its own: BPE would else fuse whole phrases, which then do not recombine.
    let han = Split::new(SplitPattern::Regex(r"\p{Han}".into()), SplitDelimiterBehavior::Isolated, false);
    let pieces = PreTokenizers::new(vec![han.map_err(fail)?.into(), ByteLevel::new(false, true, true).into()]);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(Sequence::new(normalizer)))
        .with_pre_tokenizer(Some(pieces))
        .with_post_processor(Some(ByteLevel::default()))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .map_err(fail)?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size - CONTROL.len())
        .min_frequency(1)
        .special_tokens(Vec::<AddedToken>::new())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, captions).map_err(fail)?;
    let json = tokenizer.to_string(true).map_err(fail)?;
    let mut text = Text::from_bytes(json.as_bytes())?;
    let first = text.vocab_size() as u32;
    text.control = (first..).zip(CONTROL).map(|(id, word)| (word.to_string(), id)).collect();
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_checked() {
        for (bytes, part) in [
            (&b""[..], "empty"),
            (b" \n ", "empty"),
            (b"caf\xff", "byte 3"),
            (&[b'a'; 1_000_000], "1000000 bytes"),
            (b"a\x1b[31m", "U+001B"),
        ] {
            let error = check_prompt(bytes).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.contains(part), "{}", error.message);
        }
        assert_eq!(check_prompt("  一只猫\n".as_bytes()).unwrap(), "一只猫");
    }

    #[test]
    fn a_broken_file_is_an_error() {
        let model = |fields: &str| format!(r#"{{"version": "1.0", "model": {{"type": "BPE", {fields}}}}}"#);
        for json in [
            String::new(),
            "{}".into(),
            "[1, 2".into(),
            "[".repeat(10_000),
            model(r#""vocab": {"a": -1}, "merges": []"#),
            model(r#""vocab": {"a": 0}, "merges": ["a b"]"#),
            model(r#""continuing_subword_prefix": "aaaa", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]"#),
        ] {
            assert_eq!(Text::from_bytes(json.as_bytes()).unwrap_err().exit_code(), 3, "{json}");
        }
    }

    #[test]
    fn control_words_of_a_file_are_plain_text_in_a_prompt() {
        let vocab: serde_json::Map<String, Value> =
            (b'!'..=b'~').enumerate().map(|(id, b)| ((b as char).to_string(), id.into())).collect();
        let added = |id: u32, content: &str, special: bool| {
            serde_json::json!({"id": id, "content": content, "special": special, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        };
        let file = serde_json::json!({
            "version": "1.0",
            "added_tokens": [added(200, "<|im_start|>", true), added(201, "<tool_call>", false)],
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let text = Text::from_bytes(file.to_string().as_bytes()).unwrap();
        for word in ["<|im_start|>", "<tool_call>"] {
            let ids = text.encode(word).unwrap();
            assert_eq!(ids.len(), word.len());
            assert!(ids.iter().all(|&id| id < 94), "{ids:?}");
        }
    }

    #[test]
    fn control_words_of_a_unigram_are_plain_text_in_a_prompt() {
        let mut vocab =
            vec![("<pad>".to_string(), 0.0), ("</s>".into(), 0.0), ("<unk>".into(), 0.0), ("\u{2581}".into(), -2.0)];
        vocab.extend((b'!'..=b'~').map(|b| ((b as char).to_string(), -8.0)));
        vocab.extend([("\u{2581}cat".into(), -6.0), ("<extra_id_0>".into(), 0.0)]);
        let last = vocab.len() as u32 - 1;
        let added: Vec<Value> = [(0, "<pad>"), (1, "</s>"), (2, "<unk>"), (last, "<extra_id_0>")]
            .map(|(id, content)| {
                serde_json::json!({"id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
            })
            .to_vec();
        let spaces = serde_json::json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}]});
        let file = serde_json::json!({"version": "1.0", "added_tokens": added, "pre_tokenizer": spaces,
            "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": false}});
        let text = Text::from_unigram(file.to_string().as_bytes()).unwrap();
        assert_eq!(text.encode("cat  \t cat").unwrap(), [last - 1; 2]);
        for word in ["</s>", "<pad>", "<extra_id_0>", "<unk>"] {
            let ids = text.encode(word).unwrap();
            assert_eq!(ids.len(), 1 + word.len(), "{word}: {ids:?}");
            assert!(ids.iter().all(|&id| (3..last).contains(&id)), "{word}: {ids:?}");
        }
        assert_eq!(text.encode("\u{732b}").unwrap(), [3, 2]);
        assert_eq!(text.vocab_size(), vocab.len());
        assert_eq!(Text::from_bytes(file.to_string().as_bytes()).unwrap_err().exit_code(), 3);
        assert_eq!(Text::from_unigram(b"{}").unwrap_err().exit_code(), 3);
    }

    #[cfg(feature = "train")]
    #[test]
    fn words_become_ids_and_special_words_stay_text() {
        let captions = ["a red apple", "two red apples", "a green star", "一只猫"];
        let text = train_bpe(captions.iter().cycle().take(40).map(|c| c.to_string()), 400).unwrap();
        assert_eq!(text.encode("a red apple").unwrap().len(), 3);
        assert_eq!(text.encode("A  Red APPLE ").unwrap(), text.encode("a red apple").unwrap());
        assert_eq!(text.decode(&text.encode("一只猫 <boi>").unwrap()).unwrap().trim(), "一只猫 <boi>");
        for special in ["<boi>", "<|im_start|>", "<|endoftext|>"] {
            assert!(text.encode(special).unwrap().len() > 2, "{special}");
        }
        assert_eq!(text.encode("一只猫").unwrap().len(), text.encode("猫只一").unwrap().len());
        assert!(text.encode("🍎").unwrap().len() >= 2);
        let again = train_bpe(captions.iter().cycle().take(40).map(|c| c.to_string()), 400).unwrap();
        assert_eq!(again.encode("two green stars").unwrap(), text.encode("two green stars").unwrap());
    }
}
