//! The steps of a tokenizer.json before and after its vocabulary: an allowlist.
//!
//! The library runs whatever a file describes: chains of replacements that double a text 26 times,
//! regular expressions that backtrack for minutes, tables that claim 8 GB, values that make it
//! panic. Here everything is built from the kinds and shapes that the tokenizers of our families
//! have (Qwen2.5's, Llama's, T5's and those that this crate trains), within bounds under which
//! every step is linear and grows a text by a small factor; the rest is refused by name.

use std::fmt;
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip as StripDecoder;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, NFD, NFKC, NFKD, Precompiled, Prepend, Replace, Strip};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::guard::guard;

/// The most steps of a sequence.
const MAX_STEPS: usize = 8;
/// The longest text, in bytes, that a step puts into another, or looks for.
const MAX_AFFIX: usize = 16;
/// The most spaces that a decoder takes away.
const MAX_STRIP: usize = 16;
/// The longest table of a `Precompiled` normalizer, in base64 (T5's has 317,000), and the longest
/// text in it (nmt_nfkc: 33).
const MAX_TABLE: usize = 4 << 20;
const MAX_ENTRY: usize = 64;

/// The regular expressions that are run: those of known tokenizers. All are linear; others might
/// take minutes.
const PATTERNS: [&str; 7] = [
    // Qwen2.5; Llama 3; GPT-2.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    // Those that this crate trains.
    r"\p{Han}",
    r"\s+",
    // What `transformers` makes of SentencePiece's models.
    r" {2,}",
    r"▁{2,}",
];

type Result<T> = std::result::Result<T, String>;

/// A component as a file has it: one step, or a sequence of them.
pub(super) type Component = Step<Few<Step<Nothing>, MAX_STEPS>>;

/// The fields of all kinds of components.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Step<Steps> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(alias = "normalizers", alias = "pretokenizers", alias = "decoders", alias = "processors")]
    steps: Option<Steps>,
    pattern: Option<Pattern>,
    content: Option<String>,
    prepend: Option<String>,
    replacement: Option<char>,
    add_prefix_space: Option<bool>,
    prepend_scheme: Option<PrependScheme>,
    split: Option<bool>,
    use_regex: Option<bool>,
    trim_offsets: Option<bool>,
    behavior: Option<SplitDelimiterBehavior>,
    invert: Option<bool>,
    start: Option<usize>,
    stop: Option<usize>,
    strip_left: Option<bool>,
    strip_right: Option<bool>,
    precompiled_charsmap: Option<String>,
    single: Option<Few<TemplatePiece, 64>>,
}

#[derive(Debug, serde::Deserialize)]
enum Pattern {
    String(String),
    Regex(String),
}

/// A part of a template of a post-processor.
#[derive(Debug, serde::Deserialize)]
struct TemplatePiece {
    #[serde(rename = "Sequence")]
    sequence: Option<Sequence>,
}

#[derive(Debug, serde::Deserialize)]
struct Sequence {
    id: String,
}

impl Component {
    /// The steps of a normalizer.
    pub fn normalizers(self) -> Result<Vec<NormalizerWrapper>> {
        self.each("normalizer", Step::normalizer, Step::normalizer)
    }

    /// The steps of a pre-tokenizer.
    pub fn pre_tokenizers(self) -> Result<Vec<PreTokenizerWrapper>> {
        let steps = self.each("pre-tokenizer", Step::pre_tokenizer, Step::pre_tokenizer)?;
        let twice = |is: fn(&PreTokenizerWrapper) -> bool| steps.iter().filter(|step| is(step)).count() > 1;
        // Each of them makes several bytes of one.
        if twice(|step| matches!(step, PreTokenizerWrapper::ByteLevel(_))) {
            return Err("its pre-tokenizer has ByteLevel twice".into());
        }
        if twice(|step| matches!(step, PreTokenizerWrapper::Metaspace(_))) {
            return Err("its pre-tokenizer has Metaspace twice".into());
        }
        Ok(steps)
    }

    /// The steps of a decoder.
    pub fn decoders(self) -> Result<Vec<DecoderWrapper>> {
        self.each("decoder", Step::decoder, Step::decoder)
    }

    /// Checks a post-processor. None is ever run: what it adds (control tokens) is added by the
    /// chat template or the prompt.
    pub fn check_post_processor(self) -> Result<()> {
        self.each("post-processor", Step::post_processor, Step::post_processor).map(drop)
    }

    /// Builds every step, by `one` where it is in a sequence, by `alone` where it is not.
    fn each<T>(
        mut self,
        what: &str,
        one: fn(Step<Nothing>) -> Result<T>,
        alone: fn(Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        match (self.kind.as_str(), self.steps.take()) {
            ("Sequence", Some(Few(steps))) => steps.into_iter().map(|step| step.built(what, one)).collect(),
            ("Sequence", None) => Err(format!("its {what} is a sequence of nothing")),
            _ => self.built(what, alone).map(|step| vec![step]),
        }
    }
}

impl<Steps> Step<Steps> {
    fn built<T>(self, what: &str, build: fn(Self) -> Result<T>) -> Result<T> {
        let kind: String = self.kind.chars().take(40).collect();
        // The library compiles patterns and tables.
        let built = guard(|| build(self)).unwrap_or_else(|| Err("is damaged".into()));
        built.map_err(|why| format!("its {what} {kind:?} {why}"))
    }

    fn normalizer(self) -> Result<NormalizerWrapper> {
        Ok(match self.kind.as_str() {
            "NFC" => NFC.into(),
            "NFD" => NFD.into(),
            "NFKC" => NFKC.into(),
            "NFKD" => NFKD.into(),
            "Lowercase" => Lowercase.into(),
            "Strip" => Strip::new(self.strip_left.unwrap_or(false), self.strip_right.unwrap_or(false)).into(),
            "Prepend" => Prepend::new(short(self.prepend, "prepend")?).into(),
            "Replace" => {
                let content = short(self.content, "content")?;
                Replace::new(pattern(self.pattern)?, content).map_err(|e| e.to_string())?.into()
            }
            "Precompiled" => precompiled(&self.precompiled_charsmap.unwrap_or_default())?.into(),
            _ => {
                return Err(unsupported(
                    "NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace and Precompiled are",
                ));
            }
        })
    }

    fn pre_tokenizer(self) -> Result<PreTokenizerWrapper> {
        Ok(match self.kind.as_str() {
            "ByteLevel" => self.byte_level().into(),
            "Metaspace" => self.metaspace()?.into(),
            "WhitespaceSplit" => WhitespaceSplit.into(),
            "Split" => {
                let pattern = match pattern(self.pattern)? {
                    ReplacePattern::String(text) => SplitPattern::String(text),
                    ReplacePattern::Regex(regex) => SplitPattern::Regex(regex),
                };
                let behavior = self.behavior.ok_or("has no behavior")?;
                Split::new(pattern, behavior, self.invert.unwrap_or(false)).map_err(|e| e.to_string())?.into()
            }
            _ => return Err(unsupported("ByteLevel, Metaspace, WhitespaceSplit and Split are")),
        })
    }

    fn decoder(self) -> Result<DecoderWrapper> {
        Ok(match self.kind.as_str() {
            "ByteLevel" => self.byte_level().into(),
            "Metaspace" => self.metaspace()?.into(),
            "ByteFallback" => ByteFallback::new().into(),
            "Fuse" => Fuse::new().into(),
            "Strip" => match (self.start.unwrap_or(0), self.stop.unwrap_or(0)) {
                (start, 0) if start <= MAX_STRIP => {
                    let content = self.content.unwrap_or_default();
                    let mut chars = content.chars();
                    let (Some(content), None) = (chars.next(), chars.next()) else {
                        return Err("removes more than one character".into());
                    };
                    StripDecoder::new(content, start, 0).into()
                }
                // The library panics on a text that is shorter than `stop`.
                (start, stop) => {
                    return Err(format!(
                        "takes away {start} and {stop} characters, up to {MAX_STRIP} and 0 are supported"
                    ));
                }
            },
            "Replace" => {
                let (pattern, content) = (pattern(self.pattern)?, short(self.content, "content")?);
                match &pattern {
                    ReplacePattern::String(text) if content.len() <= text.len() => {}
                    _ => return Err("makes a text longer".into()),
                }
                Replace::new(pattern, content).map_err(|e| e.to_string())?.into()
            }
            _ => return Err(unsupported("ByteLevel, Metaspace, ByteFallback, Fuse, Strip and Replace are")),
        })
    }

    fn post_processor(self) -> Result<()> {
        match self.kind.as_str() {
            "ByteLevel" | "BertProcessing" | "RobertaProcessing" => Ok(()),
            "TemplateProcessing" => {
                let Few(pieces) = self.single.unwrap_or_default();
                let sequences: Vec<String> = pieces.into_iter().filter_map(|p| Some(p.sequence?.id)).collect();
                match &sequences[..] {
                    [only] if only == "A" => Ok(()),
                    _ => Err(format!("makes {sequences:?} of a single text, which is \"A\"")),
                }
            }
            _ => Err(unsupported("ByteLevel, TemplateProcessing, BertProcessing and RobertaProcessing are")),
        }
    }

    fn byte_level(&self) -> ByteLevel {
        let flag = |value: Option<bool>| value.unwrap_or(true);
        ByteLevel::new(flag(self.add_prefix_space), flag(self.trim_offsets), flag(self.use_regex))
    }

    fn metaspace(&self) -> Result<Metaspace> {
        let scheme = match (self.add_prefix_space, self.prepend_scheme) {
            (Some(false), None | Some(PrependScheme::Never)) => PrependScheme::Never,
            (Some(false), Some(_)) => return Err("has an add_prefix_space that contradicts its prepend_scheme".into()),
            (_, scheme) => scheme.unwrap_or(PrependScheme::Always),
        };
        let replacement = self.replacement.ok_or("has no replacement")?;
        Ok(Metaspace::new(replacement, scheme, self.split.unwrap_or(true)))
    }
}

fn unsupported(what: &str) -> String {
    format!("is not supported, {what}")
}

fn short(text: Option<String>, field: &str) -> Result<String> {
    match text {
        Some(text) if text.len() <= MAX_AFFIX => Ok(text),
        Some(text) => Err(format!("has a {field} of {} bytes, more than {MAX_AFFIX}", text.len())),
        None => Err(format!("has no {field}")),
    }
}

fn pattern(pattern: Option<Pattern>) -> Result<ReplacePattern> {
    match pattern {
        Some(Pattern::String(text)) if text.is_empty() => Err("looks for an empty text".into()),
        Some(Pattern::String(text)) => short(Some(text), "pattern").map(ReplacePattern::String),
        Some(Pattern::Regex(regex)) if PATTERNS.contains(&regex.as_str()) => Ok(ReplacePattern::Regex(regex)),
        Some(Pattern::Regex(regex)) => {
            let shown: String = regex.chars().take(40).collect();
            Err(format!("has a regular expression of no known tokenizer: {shown:?}"))
        }
        None => Err("has no pattern".into()),
    }
}

/// A table of SentencePiece: the length of a trie (u32, little-endian), the trie, and the texts
/// that it leads to, each with a zero at its end.
fn precompiled(table: &str) -> Result<Precompiled> {
    let damaged = || "has a damaged table".to_string();
    if table.len() > MAX_TABLE {
        return Err(format!("has a table of {} bytes, more than {MAX_TABLE}", table.len()));
    }
    let bytes = STANDARD.decode(table).map_err(|_| damaged())?;
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
    // The library reserves memory of this length before it looks how much there is.
    let length = u32::from_le_bytes(*length) as usize;
    let (_, texts) =
        rest.split_at_checked(length).filter(|_| length > 0 && length.is_multiple_of(4)).ok_or_else(damaged)?;
    if texts.split(|&b| b == 0).any(|text| text.len() > MAX_ENTRY) {
        return Err(format!("makes more than {MAX_ENTRY} bytes of a character"));
    }
    Precompiled::from(&bytes).map_err(|_| damaged())
}

/// A list of at most `N`.
#[derive(Debug)]
pub(super) struct Few<T, const N: usize>(pub Vec<T>);

impl<T, const N: usize> Default for Few<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Few<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Reader<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Reader<T, N> {
            type Value = Few<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {N}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Few<T, N>, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    if items.len() == N {
                        return Err(de::Error::custom(format_args!("a list is longer than {N}")));
                    }
                    items.push(item);
                }
                Ok(Few(items))
            }
        }
        deserializer.deserialize_seq(Reader(PhantomData))
    }
}

/// The steps of a step: sequences hold no sequences.
#[derive(Debug)]
pub(super) enum Nothing {}

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(_: D) -> std::result::Result<Self, D::Error> {
        Err(de::Error::custom("a sequence within a sequence is not supported"))
    }
}
