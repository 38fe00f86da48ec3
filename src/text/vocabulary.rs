//! The `model` of a tokenizer.json: a vocabulary and the merges or scores that split text into its
//! tokens, of bounded size.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;

use super::guard::guard;

/// Largest vocabulary: Gemma's size; Qwen2.5's is 151,643. Each token takes about 400 bytes.
pub(super) const MAX_TOKENS: usize = 1 << 18;
/// Most merges of a BPE: Llama's has two per token.
pub(super) const MAX_MERGES: usize = 1 << 19;
/// Longest token of a BPE, in bytes.
const MAX_WORD: usize = 1024;
/// Longest token of a Unigram model, in bytes. At each position of a text every token with that
/// prefix is compared.
const MAX_PIECE: usize = 64;
/// The most nodes of a Unigram model's trie, of about 400 bytes each; T5's has some 80,000.
const MAX_NODES: usize = 1 << 18;

/// A model as the file has it.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(super) struct ModelFile {
    #[serde(rename = "type")]
    pub kind: String,
    pub vocab: Words,
    pub merges: Merges,
    pub unk_token: Option<String>,
    pub unk_id: Option<usize>,
    pub byte_fallback: Option<bool>,
    pub fuse_unk: Option<bool>,
    pub ignore_merges: Option<bool>,
    pub dropout: Option<f64>,
    pub continuing_subword_prefix: Option<String>,
    pub end_of_word_suffix: Option<String>,
}

/// A model that is ready.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub model: ModelWrapper,
    /// The highest id and one.
    pub size: usize,
}

impl ModelFile {
    /// Builds the model. No text can be encoded to tokens of `control`.
    ///
    /// Errors: what is wrong or unsupported, as a sentence.
    pub fn build(self, control: &BTreeMap<String, u32>) -> Result<Vocabulary, String> {
        match self.kind.as_str() {
            "BPE" => self.bpe(),
            "Unigram" => self.unigram(control),
            other => Err(format!("a model of type {other:?} is not supported")),
        }
    }

    fn bpe(self) -> Result<Vocabulary, String> {
        let Words::Ids(words) = self.vocab else { return Err("a BPE needs a vocabulary of tokens and ids".into()) };
        if self.dropout.is_some_and(|p| p != 0.0) {
            return Err("it has BPE dropout, which makes other tokens of the same prompt each time".into());
        }
        let affixes = [&self.continuing_subword_prefix, &self.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return Err("a BPE with a prefix or suffix of tokens is not supported".into());
        }
        let count = words.len();
        let size = words.iter().map(|(_, id)| *id as usize + 1).max().unwrap_or(0);
        let ids: HashSet<u32> = words.iter().map(|(_, id)| *id).collect();
        if ids.len() != count {
            return Err("two tokens have the same id".into());
        }
        let vocab: Vocab = words.into_iter().collect();
        if vocab.len() != count {
            return Err("a token is there twice".into());
        }
        // The library copies both halves into a buffer of the length of the longest token.
        let mut union = String::new();
        for (left, right) in &self.merges.0 {
            union.clear();
            union.extend([left.as_str(), right]);
            if let Some(missing) = [left, right, &union].into_iter().find(|word| !vocab.contains_key(*word)) {
                return Err(format!("a merge needs the token {missing:?}, which is not in the vocabulary"));
            }
        }
        if let Some(unknown) = self.unk_token.as_ref().filter(|word| !vocab.contains_key(*word)) {
            return Err(format!("its unk_token {unknown:?} is not in the vocabulary"));
        }
        let (merges, unknown) = (self.merges.0, self.unk_token);
        let model = guard(|| {
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab, merges)
                .byte_fallback(self.byte_fallback == Some(true))
                .fuse_unk(self.fuse_unk == Some(true))
                .ignore_merges(self.ignore_merges == Some(true));
            if let Some(unknown) = unknown {
                builder = builder.unk_token(unknown);
            }
            builder.build().map_err(|e| e.to_string())
        });
        let model = model.ok_or("its model is damaged")??;
        Ok(Vocabulary { model: model.into(), size })
    }

    fn unigram(self, control: &BTreeMap<String, u32>) -> Result<Vocabulary, String> {
        let Words::Scores(mut words) = self.vocab else {
            return Err("a Unigram model needs a vocabulary of tokens and scores".into());
        };
        let unknown = self.unk_id.filter(|&id| id < words.len()).ok_or("it has no unk_id within its vocabulary")?;
        if let Some((word, _)) = words.iter().find(|(word, _)| word.len() > MAX_PIECE) {
            return Err(format!("a token has {} bytes, more than {MAX_PIECE}", word.len()));
        }
        let nodes = trie_nodes(words.iter().map(|(word, _)| word.as_str()).collect());
        if nodes > MAX_NODES {
            return Err(format!("its vocabulary takes a trie of {nodes} nodes, more than {MAX_NODES}"));
        }
        let size = words.len();
        for (word, _) in &mut words {
            if control.contains_key(word) {
                // Text never holds this character: see `Text::encode`.
                word.insert(0, '\0');
            }
        }
        let model =
            guard(|| Unigram::from(words, Some(unknown), self.byte_fallback == Some(true)).map_err(|e| e.to_string()));
        let model = model.ok_or("its model is damaged")??;
        Ok(Vocabulary { model: model.into(), size })
    }
}

/// The non-empty prefixes of some tokens.
fn trie_nodes(mut words: Vec<&str>) -> usize {
    words.sort_unstable();
    let mut last = "";
    let mut nodes = 0;
    for word in words {
        let shared = word.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
        nodes += word.len() - shared;
        last = word;
    }
    nodes
}

/// A vocabulary as the file has it: a map to ids (BPE), or a list with scores (Unigram).
#[derive(Debug)]
pub(super) enum Words {
    Ids(Vec<(String, u32)>),
    Scores(Vec<(String, f64)>),
}

impl Default for Words {
    fn default() -> Self {
        Self::Ids(Vec::new())
    }
}

/// A token of a vocabulary.
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)? {
            long if long.len() > MAX_WORD => {
                Err(de::Error::custom(format_args!("a token has {} bytes, more than {MAX_WORD}", long.len())))
            }
            word => Ok(Self(word)),
        }
    }
}

fn too_many<E: de::Error>(what: &str, most: usize) -> E {
    E::custom(format_args!("it has more than {most} {what}"))
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Words;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some((Word(word), id)) = map.next_entry()? {
                    if words.len() == MAX_TOKENS {
                        return Err(too_many("words", MAX_TOKENS));
                    }
                    words.push((word, id));
                }
                Ok(Words::Ids(words))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some((Word(word), score)) = list.next_element()? {
                    if words.len() == MAX_TOKENS {
                        return Err(too_many("words", MAX_TOKENS));
                    }
                    words.push((word, score));
                }
                Ok(Words::Scores(words))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// The merges of a BPE in order: pairs of tokens, or both in one text with a space between them.
#[derive(Debug, Default)]
pub(super) struct Merges(pub Vec<(String, String)>);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merges;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merges, A::Error> {
                let mut merges = Vec::new();
                while let Some(merge) = list.next_element::<Merge>()? {
                    if merges.len() == MAX_MERGES {
                        return Err(too_many("merges", MAX_MERGES));
                    }
                    merges.extend(merge.0);
                }
                Ok(Merges(merges))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// One merge, or a comment of the old format.
struct Merge(Option<(String, String)>);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Merge, E> {
                if text.starts_with("#version") {
                    return Ok(Merge(None));
                }
                match text.split_once(' ') {
                    Some((left, right)) if !right.contains(' ') => Ok(Merge(Some((left.into(), right.into())))),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Merge, A::Error> {
                let (left, right) = (pair.next_element()?, pair.next_element()?);
                match (left, right, pair.next_element::<IgnoredAny>()?) {
                    (Some(Word(left)), Some(Word(right)), None) => Ok(Merge(Some((left, right)))),
                    _ => Err(de::Error::custom("a merge is not of two tokens")),
                }
            }
        }
        deserializer.deserialize_any(Reader)
    }
}
