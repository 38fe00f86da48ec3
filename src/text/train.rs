//! Text tokenizers of our own: trained on captions, written as `tokenizer.json`.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::{Lowercase, NFKC, Prepend, Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior, TokenizerBuilder};

use super::{Text, bad};
use crate::error::{Error, Result};

/// Control tokens of our own text tokenizers: the beginning and the end of a message.
const CONTROL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// Trains a BPE of `vocab_size` ids, the control tokens among them, on captions. Upper and lower
/// case are one, spaces belong to the word after them, so that frequent words become one id; bytes
/// are the fallback for everything else.
pub fn train_bpe(captions: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Text> {
    let fail = |e: tokenizers::Error| Error::model(format!("cannot train the text tokenizer: {e}"));
    let spaces = Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ");
    let normalizer: Vec<NormalizerWrapper> = vec![
        NFKC.into(),
        Lowercase.into(),
        spaces.map_err(fail)?.into(),
        Strip::new(true, true).into(),
        Prepend::new(" ".into()).into(),
    ];
    // Every Chinese character is a token: BPE would otherwise merge whole phrases, which then do
    // not recombine.
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

impl Text {
    /// The content of a `tokenizer.json`, control tokens included.
    pub fn to_file(&self) -> Result<String> {
        self.to_json().and_then(|file| serde_json::to_string_pretty(&file)).map_err(|e| bad(&e))
    }

    fn to_json(&self) -> serde_json::Result<Value> {
        let added = self.control.iter().map(|(content, id)| {
            json!({"id": id, "content": content, "special": !self.is_shown(*id), "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        });
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Value>(),
            "normalizer": {"type": "Sequence", "normalizers": serde_json::to_value(&self.normalizers)?},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": serde_json::to_value(&self.pre_tokenizers)?},
            "post_processor": serde_json::to_value(ByteLevel::default())?,
            "decoder": serde_json::to_value(self.decoders.first())?,
            "model": serde_json::to_value(&self.model)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let nano = include_bytes!("../../assets/nano/tokenizer.json");
        let text = Text::from_bytes(nano).unwrap();
        let written: Value = text.to_json().unwrap();
        assert_eq!(written, serde_json::from_slice::<Value>(nano).unwrap());
    }

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
