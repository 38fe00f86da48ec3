//! From logits to text tokens, and from these to text.

use serde::Serialize;

use crate::error::Result;
use crate::generate::{Filter, sampler};
use crate::rng::{Rng, Stream};
use crate::text::Text;

/// How text tokens are sampled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TextSampling {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// Keep the k most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the smallest set of tokens whose probabilities sum to p; 1 keeps all.
    pub top_p: f64,
    /// Logits of tokens that occurred before are divided by it, or multiplied if negative.
    pub repetition_penalty: f64,
}

impl TextSampling {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0 };

    /// Errors: the first setting that is out of range, as one sentence.
    pub fn check(&self) -> std::result::Result<(), String> {
        let within = |name: &str, value: f64, zero: bool, most: f64| {
            let fits = value <= most && (value > 0.0 || zero && value == 0.0);
            if fits { Ok(()) } else { Err(format!("{name} cannot be {value}")) }
        };
        within("temperature", self.temperature, true, 1000.0)?;
        within("repetition_penalty", self.repetition_penalty, false, 1000.0)?;
        within("top_p", self.top_p, false, 1.0)
    }

    /// Samples the token at `position` from `logits`; `before` marks the tokens so far. None if a
    /// logit is NaN or the largest is not finite.
    pub fn sample(&self, mut logits: Vec<f32>, before: &[bool], seed: u64, position: usize) -> Option<u32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if logits.iter().any(|v| v.is_nan()) || !largest.is_finite() {
            return None;
        }
        let penalty = self.repetition_penalty as f32;
        for (logit, _) in logits.iter_mut().zip(before).filter(|(_, was)| **was) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
        let filter = Filter { top_k: self.top_k, top_p: self.top_p };
        let noise = Rng::new(seed, 0, Stream::Token, position as u64).uniform(0);
        Some(sampler::sample_row(logits, self.temperature, filter, noise))
    }
}

/// Streaming detokenizer: returns whole characters only, as one may be spread over several tokens.
#[derive(Debug, Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Tokens whose text no later token changes, and those whose text has been returned.
    settled: usize,
    spoken: usize,
}

impl Detokenizer {
    /// The text that one more token adds; empty while a character is incomplete.
    pub fn push(&mut self, id: u32, text: &Text) -> Result<String> {
        self.ids.push(id);
        let new = self.rest(text)?;
        if new.is_empty() || new.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        (self.settled, self.spoken) = (self.spoken, self.ids.len());
        Ok(new)
    }

    /// The rest at the end: characters that were never completed.
    pub fn finish(&mut self, text: &Text) -> Result<String> {
        let rest = self.rest(text);
        (self.settled, self.spoken) = (self.ids.len(), self.ids.len());
        rest
    }

    /// Whether there are no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// All words.
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }

    fn rest(&self, text: &Text) -> Result<String> {
        let before = text.decode(&self.ids[self.settled..self.spoken])?;
        let all = text.decode(&self.ids[self.settled..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_whole() {
        let text = Text::from_bytes(include_bytes!("../../tests/data/qwen/tiny/tokenizer.json")).unwrap();
        let said = "naïve 你好 🙂!";
        let ids = text.encode(said).unwrap();
        assert!(ids.len() > said.chars().count(), "no character takes several words");
        let mut detokenizer = Detokenizer::default();
        let parts: Vec<String> = ids.iter().map(|id| detokenizer.push(*id, &text).unwrap()).collect();
        assert_eq!(parts.concat(), said);
        assert!(parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
        assert_eq!((detokenizer.finish(&text).unwrap().as_str(), &detokenizer.ids[..]), ("", &ids[..]));
        // What is cut in the middle of a character is told as that.
        let smile = text.encode("🙂").unwrap();
        let mut detokenizer = Detokenizer::default();
        for id in &smile[..smile.len() - 1] {
            assert_eq!(detokenizer.push(*id, &text).unwrap(), "");
        }
        assert_eq!(detokenizer.finish(&text).unwrap(), "\u{fffd}");
    }

    #[test]
    fn words_that_were_there_lose() {
        let draw = |logits: &[f32], before: &[bool], repetition_penalty| {
            let sampling = TextSampling { repetition_penalty, ..TextSampling::GREEDY };
            sampling.sample(logits.to_vec(), before, 0, 0)
        };
        for logits in [[2.0, 1.5], [-1.0, -1.2]] {
            assert_eq!(draw(&logits, &[true, false], 1.0), Some(0));
            assert_eq!(draw(&logits, &[true, false], 1.5), Some(1));
            assert_eq!(draw(&logits, &[true, true], 1.5), Some(0));
        }
        assert_eq!(draw(&[f32::NAN, 1.0], &[false, false], 1.0), None);
        assert_eq!(draw(&[f32::NEG_INFINITY; 2], &[false, false], 1.0), None);
    }
}
