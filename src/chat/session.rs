//! A conversation: its turns, and what the transformer has read of them.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use serde::Serialize;

use super::{ChatModel, SYSTEM, Speech, WordSampling};
use crate::backbone::sequence::Layout;
use crate::backbone::{Cache, Context, Rope, Step};
use crate::error::{Error, Kind, Result};

/// Tokens that are read in one pass.
pub(super) const CHUNK: usize = 512;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// An image as the transformer reads it.
#[derive(Clone, Debug)]
pub struct Picture {
    /// What the user calls it.
    pub name: String,
    /// Grid (height, width) of its tokens.
    pub tokens: (usize, usize),
    features: Tensor,
    /// Tells it from all others.
    id: u64,
}

impl Picture {
    /// Of features (h * w, hidden).
    pub(super) fn new(name: &str, features: Tensor, tokens: (usize, usize)) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { name: name.into(), features, tokens, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// The features, (h * w, hidden).
    pub fn features(&self) -> &Tensor {
        &self.features
    }
}

/// One message.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// Images before the text.
    pub pictures: Vec<Picture>,
    /// What is said.
    pub text: String,
    /// The words that the model drew, which its tokenizer need not choose for the same text.
    ids: Option<Vec<u32>>,
}

/// A token of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Word(u32),
    /// Of an image, by its id.
    Patch(u64, u32),
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The model had said it all.
    Stop,
    /// It was as long as it may be.
    Length,
    /// The user broke it off.
    Interrupted,
}

/// What the model answered.
#[derive(Clone, Debug, Serialize)]
pub struct Reply {
    /// Its text.
    pub text: String,
    /// Tokens of the conversation up to it, of which so many had been read before, and its own.
    pub prompt_tokens: usize,
    /// See above.
    pub cached_tokens: usize,
    /// See above.
    pub tokens: usize,
    /// Why it ended.
    pub ending: Ending,
}

/// A conversation with a model. What has been read once is not read again while the conversation goes on from there.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a ChatModel,
    system: String,
    turns: Vec<Turn>,
    cache: Cache,
    /// What the cache holds.
    read: Vec<Token>,
}

impl<'a> Session<'a> {
    /// An empty conversation.
    pub fn new(model: &'a ChatModel) -> Result<Self> {
        let (backbone, config) = (&model.backbone, &model.config.backbone);
        let cache = Cache::new(config, 1, CHUNK, backbone.dtype(), backbone.device())?;
        Ok(Self { model, system: SYSTEM.into(), turns: Vec::new(), cache, read: Vec::new() })
    }

    /// The turns so far.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// What the model is told about itself.
    pub fn system(&self) -> &str {
        &self.system
    }

    /// Tells the model something else about itself.
    pub fn set_system(&mut self, text: &str) {
        self.system = text.into();
    }

    /// Forgets all turns.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// Takes the last question and its answer back, if there is one.
    pub fn undo(&mut self) -> bool {
        let last = self.turns.iter().rposition(|turn| turn.role == Role::User);
        self.turns.truncate(last.unwrap_or(0));
        last.is_some()
    }

    /// Adds what somebody said before, as when a conversation is loaded.
    pub fn push(&mut self, role: Role, pictures: Vec<Picture>, text: &str) {
        self.turns.push(Turn { role, pictures, text: text.into(), ids: None });
    }

    /// Says something and gives the model's answer, which `observe` hears as it comes. An answer that the observer breaks
    /// off stays as far as it got; after an error the conversation is as before.
    ///
    /// Errors: usage, if the conversation is longer than the model's context, [`Kind::NonFinite`] if the model gives no
    /// finite numbers, [`Kind::Interrupted`] if the observer breaks before the first word.
    pub fn say(
        &mut self,
        pictures: Vec<Picture>,
        text: &str,
        sampling: &WordSampling,
        (seed, longest): (u64, usize),
        observe: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply> {
        self.push(Role::User, pictures, text);
        let answer = self.answer(sampling, seed, longest, observe);
        match answer {
            Ok((reply, ids)) => {
                let text = reply.text.clone();
                self.turns.push(Turn { role: Role::Assistant, pictures: Vec::new(), text, ids: Some(ids) });
                Ok(reply)
            }
            Err(error) => {
                self.turns.pop();
                Err(error)
            }
        }
    }

    pub(super) fn answer(
        &mut self,
        sampling: &WordSampling,
        seed: u64,
        longest: usize,
        observe: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(Reply, Vec<u32>)> {
        let Script { tokens, mut layout } = self.render()?;
        let (context, prompt_tokens) = (self.model.config.context, tokens.len());
        if prompt_tokens >= context {
            let message = format!("the conversation has {prompt_tokens} tokens, the model's limit is {context}");
            return Err(Error::usage(message).hint("/undo, /clear, or smaller images: --max-pixels 500000"));
        }
        let longest = longest.min(context - prompt_tokens);
        // The last token is read in any case: its logits are the first answer.
        let same = tokens.iter().zip(&self.read).take_while(|(a, b)| a == b).count();
        let cached_tokens = same.min(prompt_tokens - 1);
        self.read.truncate(cached_tokens);
        self.cache.truncate(0, cached_tokens);
        self.cache.reserve(prompt_tokens + longest.min(CHUNK))?;
        let mut hidden = None;
        for chunk in tokens[cached_tokens..].chunks(CHUNK) {
            hidden = Some(self.pass(chunk, &layout)?);
            if observe("").is_break() {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
        }
        let Some(mut hidden) = hidden else { return Err(Error::usage("nothing was said")) };
        let (model, marks) = (self.model, self.model.marks);
        let mut before = self.words_before(&tokens);
        let (mut speech, mut text) = (Speech::default(), String::new());
        let ending = loop {
            let position = layout.len();
            let drawn = sampling.draw(model.logits(&hidden)?, &before, seed, position);
            let word = drawn.ok_or_else(|| {
                Error::new(Kind::NonFinite, format!("the model gave no finite numbers at token {position}"))
                    .hint("check the weights: nextflow info MODEL")
            })?;
            if word == marks.end || model.config.stops.contains(&word) {
                break Ending::Stop;
            }
            let new = speech.push(word, &model.text)?;
            text.push_str(&new);
            if observe(&new).is_break() {
                break Ending::Interrupted;
            }
            if speech.ids().len() >= longest {
                break Ending::Length;
            }
            before[word as usize] = true;
            layout.push_text(1);
            self.cache.reserve(layout.len())?;
            hidden = self.pass(&[Token::Word(word)], &layout)?;
        };
        let rest = speech.finish(&model.text)?;
        text.push_str(&rest);
        let _ = observe(&rest);
        let ids = speech.ids().to_vec();
        Ok((Reply { text, prompt_tokens, cached_tokens, tokens: ids.len(), ending }, ids))
    }

    /// Which words of the vocabulary are in a sequence; tokens of images count as the word that stands for them.
    fn words_before(&self, tokens: &[Token]) -> Vec<bool> {
        let mut before = vec![false; self.model.config.backbone.vocab_size];
        for token in tokens {
            let id = match token {
                Token::Word(id) => *id,
                Token::Patch(..) => self.model.marks.pad,
            };
            if let Some(was) = before.get_mut(id as usize) {
                *was = true;
            }
        }
        before
    }

    /// Reads tokens behind what has been read: the hidden state of the last one, (1, 1, hidden).
    fn pass(&mut self, tokens: &[Token], layout: &Layout) -> Result<Tensor> {
        let (backbone, start) = (&self.model.backbone, self.read.len());
        let x = self.embed(tokens)?;
        let rope = Rope::new(backbone.config(), &[&layout.positions[start..][..tokens.len()]], backbone.device())?;
        let context = Context::Cached { cache: &mut self.cache, first: 0, step: Step::Text };
        let hidden = backbone.forward(&x, &rope, context)?;
        self.read.extend(tokens);
        Ok(hidden.narrow(1, tokens.len() - 1, 1)?.contiguous()?)
    }

    /// Tokens as the transformer reads them, (1, T, hidden).
    pub(super) fn embed(&self, tokens: &[Token]) -> Result<Tensor> {
        let backbone = &self.model.backbone;
        let image = |token: &Token| match token {
            Token::Word(_) => None,
            Token::Patch(id, _) => Some(*id),
        };
        let mut parts = Vec::new();
        for run in tokens.chunk_by(|a, b| image(a) == image(b)) {
            let indices: Vec<u32> = run
                .iter()
                .map(|t| match *t {
                    Token::Word(id) | Token::Patch(_, id) => id,
                })
                .collect();
            parts.push(match image(&run[0]) {
                None => backbone.embed_text(&Tensor::new(indices, backbone.device())?.unsqueeze(0)?)?,
                Some(id) => {
                    let mut pictures = self.turns.iter().flat_map(|turn| &turn.pictures);
                    let features = pictures.find(|p| p.id == id).map(Picture::features);
                    let features = features.ok_or_else(|| Error::new(Kind::Failure, "an image is gone"))?;
                    features.narrow(0, indices[0] as usize, run.len())?.unsqueeze(0)?.to_dtype(backbone.dtype())?
                }
            });
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// The whole conversation up to the model's next word, in ChatML.
    pub(super) fn render(&self) -> Result<Script> {
        let (text, marks) = (&self.model.text, self.model.marks);
        let mut script = Script::default();
        let close = [&[marks.end], &text.encode("\n")?[..]].concat();
        if !self.system.is_empty() {
            script.words(&[marks.start]);
            script.words(&text.encode(&format!("system\n{}", self.system))?);
            script.words(&close);
        }
        for turn in &self.turns {
            script.words(&[marks.start]);
            // What stands between control tokens is one text, for words may reach across its parts.
            let mut said = match turn.role {
                Role::User => "user\n".to_string(),
                Role::Assistant => "assistant\n".to_string(),
            };
            for picture in &turn.pictures {
                script.words(&text.encode(&said)?);
                said.clear();
                script.words(&[marks.vision.0]);
                script.picture(picture);
                script.words(&[marks.vision.1]);
            }
            match &turn.ids {
                Some(ids) => {
                    script.words(&text.encode(&said)?);
                    script.words(ids);
                }
                None => script.words(&text.encode(&(said + &turn.text))?),
            }
            script.words(&close);
        }
        script.words(&[marks.start]);
        script.words(&text.encode("assistant\n")?);
        Ok(script)
    }
}

/// Tokens and where they stand.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub tokens: Vec<Token>,
    pub layout: Layout,
}

impl Script {
    pub fn words(&mut self, ids: &[u32]) {
        self.tokens.extend(ids.iter().map(|&id| Token::Word(id)));
        self.layout.push_text(ids.len());
    }

    pub fn picture(&mut self, picture: &Picture) {
        let (h, w) = picture.tokens;
        self.tokens.extend((0..(h * w) as u32).map(|i| Token::Patch(picture.id, i)));
        self.layout.push_patches(picture.tokens);
    }
}

#[cfg(test)]
impl Session<'_> {
    /// Logits of every position, read from the start in passes of `chunk` tokens: (T, vocab).
    pub(super) fn logits(&mut self, tokens: &[Token], layout: &Layout, chunk: usize) -> Tensor {
        self.read.clear();
        self.cache.truncate(0, 0);
        self.cache.reserve(tokens.len()).unwrap();
        let backbone = &self.model.backbone;
        let rows = tokens.chunks(chunk).map(|part| {
            let positions = &layout.positions[self.cache.len(0)..][..part.len()];
            let rope = Rope::new(backbone.config(), &[positions], backbone.device()).unwrap();
            let x = self.embed(part).unwrap();
            let context = Context::Cached { cache: &mut self.cache, first: 0, step: Step::Text };
            backbone.text_logits(&backbone.forward(&x, &rope, context).unwrap()).unwrap().get(0).unwrap()
        });
        let rows = rows.collect::<Vec<_>>();
        self.read = tokens.to_vec();
        Tensor::cat(&rows, 0).unwrap()
    }
}
