//! A conversation: its turns, and their KV caches.

use candle_core::Tensor;

use super::picture::{self, Token, TokenSequence, passes};
use super::reply::{FinishReason, Reply, ReplyEvent, ReplyObserver, ReplyOptions, ReplyState, StopReason};
use super::template::{Part, Role};
use super::{ChatModel, Detokenizer, Picture};
use crate::backbone::{Cache, Layout, Step};
use crate::error::{Error, Kind, Result};

/// Images in one reply: what opens more has lost itself.
const MOST_IMAGES: usize = 16;
/// Tokens that are read in one pass.
pub(super) const CHUNK: usize = 512;

/// One message.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The speaker.
    pub role: Role,
    /// Text and images in order.
    pub parts: Vec<Part<Picture>>,
}

impl Turn {
    /// Its images.
    pub fn pictures(&self) -> impl Iterator<Item = &Picture> {
        self.parts.iter().filter_map(Part::image)
    }

    /// All its text.
    pub fn text(&self) -> String {
        self.parts.iter().filter_map(Part::text).collect()
    }
}

/// A sequence: the whole conversation, or its images alone, from which guidance leads away (as in
/// InstructPix2Pix).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Row {
    Conditional,
    ImageConditional,
}

/// A conversation with a model. Its prefix stays in the KV cache from one reply to the next.
#[derive(Debug)]
pub struct Session<'a> {
    pub(super) model: &'a ChatModel,
    system: String,
    pub(super) turns: Vec<Turn>,
    /// Of every row.
    pub(super) caches: Vec<Cache>,
    /// The reply so far.
    pub(super) reply: Vec<Part<Picture>>,
    /// What each of the caches holds.
    pub(super) read: Vec<Vec<Token>>,
}

impl<'a> Session<'a> {
    /// An empty conversation.
    pub fn new(model: &'a ChatModel) -> Result<Self> {
        let config = &model.config;
        let rows = if config.drawing.is_some() { 2 } else { 1 };
        let caches = (0..rows).map(|_| model.reader.cache(CHUNK)).collect::<candle_core::Result<_>>()?;
        let (turns, reply, read) = (Vec::new(), Vec::new(), vec![Vec::new(); rows]);
        Ok(Self { model, system: config.system.clone(), turns, caches, reply, read })
    }

    /// The model.
    pub fn model(&self) -> &'a ChatModel {
        self.model
    }

    /// The turns so far.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// The last image of the last turn, if it has one.
    pub fn last_image(&self) -> Option<&Picture> {
        self.turns.last().and_then(|turn| turn.parts.iter().rev().find_map(Part::image))
    }

    /// All images so far, each of them once, in the order in which they came: `$N` is the N-th.
    pub fn gallery(&self) -> Vec<&Picture> {
        let mut gallery: Vec<&Picture> = Vec::new();
        for picture in self.pictures() {
            if gallery.iter().all(|known| known.id() != picture.id()) {
                gallery.push(picture);
            }
        }
        gallery
    }

    /// All images so far, in the order in which they were shown, and as often.
    pub fn pictures(&self) -> impl Iterator<Item = &Picture> {
        self.turns.iter().flat_map(|turn| &turn.parts).chain(&self.reply).filter_map(Part::image)
    }

    /// The system prompt.
    pub fn system(&self) -> &str {
        &self.system
    }

    /// Sets the system prompt.
    pub fn set_system(&mut self, text: &str) {
        self.system = text.into();
    }

    /// Forgets all turns.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// Takes the last question and its answer back, if there is one: the question.
    pub fn undo(&mut self) -> Option<Turn> {
        let last = self.turns.iter().rposition(|turn| turn.role == Role::User)?;
        self.turns.drain(last..).next()
    }

    /// Appends a turn, as when a conversation is loaded.
    pub fn push(&mut self, role: Role, parts: Vec<Part<Picture>>) {
        self.turns.push(Turn { role, parts });
    }

    /// Sends a message and returns the model's reply; `observe` gets its events. A reply that the
    /// observer stops stays as far as it got; after an error the conversation is as before.
    ///
    /// Errors: usage, if the conversation is longer than the model's context, [`Kind::NonFinite`]
    /// if the model gives no finite numbers, [`Kind::Interrupted`] if `observe` breaks before the
    /// first word or image.
    pub fn say(
        &mut self,
        pictures: Vec<Picture>,
        text: &str,
        options: &ReplyOptions,
        observe: ReplyObserver,
    ) -> Result<Reply> {
        self.take_turn(pictures, text, |session| session.answer(options, observe))
    }

    /// Sends a message that the model answers with an image in any case: of the grids `scales` or,
    /// without them, of those of the last image, as for an edit. Before it the model may announce
    /// it in text.
    ///
    /// Errors: as [`Session::say`], and usage if the model does not draw.
    pub fn draw(
        &mut self,
        pictures: Vec<Picture>,
        text: &str,
        options: &ReplyOptions,
        scales: Option<&[(usize, usize)]>,
        observe: ReplyObserver,
    ) -> Result<Reply> {
        if self.model.tokenizer.is_none() || options.image.is_none() {
            return Err(self.model.draws_nothing());
        }
        self.take_turn(pictures, text, |session| {
            let mut state = session.begin(options, observe)?;
            if let StopReason::End(FinishReason::Interrupted) = session.generate_text(&mut state, options, observe)? {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
            let scales = scales.map_or_else(|| session.next_scales(), |scales| Ok(scales.into()))?;
            session.draw_next(options, &scales, observe)?;
            Ok(session.reply(&state, FinishReason::Stop))
        })
    }

    /// As [`Session::draw`], but independent of the conversation before.
    ///
    /// Errors: as [`Session::draw`].
    pub fn draw_anew(
        &mut self,
        pictures: Vec<Picture>,
        text: &str,
        options: &ReplyOptions,
        scales: &[(usize, usize)],
        observe: ReplyObserver,
    ) -> Result<Reply> {
        if self.turns.is_empty() {
            return self.draw(pictures, text, options, Some(scales), observe);
        }
        let mut alone = Self::new(self.model)?;
        alone.system.clone_from(&self.system);
        // Another seed, so that the image is not drawn twice.
        let options = ReplyOptions { seed: options.seed.wrapping_add(self.drawn() as u64), ..options.clone() };
        let reply = alone.draw(pictures, text, &options, Some(scales), observe)?;
        self.turns.append(&mut alone.turns);
        Ok(reply)
    }

    fn take_turn(
        &mut self,
        pictures: Vec<Picture>,
        text: &str,
        answer: impl FnOnce(&mut Self) -> Result<Reply>,
    ) -> Result<Reply> {
        let parts = pictures.into_iter().map(Part::Image).chain([Part::Text(text.into())]);
        self.push(Role::User, parts.collect());
        let answer = answer(self);
        let parts = std::mem::take(&mut self.reply);
        match answer {
            Ok(_) => self.push(Role::Assistant, parts),
            Err(_) => drop(self.turns.pop()),
        }
        answer
    }

    /// Prefills the conversation up to the beginning of the reply.
    fn begin(&mut self, options: &ReplyOptions, observe: ReplyObserver) -> Result<ReplyState> {
        self.model.config.check_images(self.pictures().count())?;
        let sequence = self.render(Row::Conditional, true)?;
        let prompt_tokens = sequence.tokens.len();
        let max_tokens = options.max_tokens.min(self.room(prompt_tokens)?);
        self.caches[Row::Conditional as usize].reserve(prompt_tokens + max_tokens.min(CHUNK))?;
        let (cached_tokens, hidden) = self.catch_up(Row::Conditional, &sequence, observe)?;
        let before = self.tokens_before(&sequence.tokens);
        Ok(ReplyState { prompt_tokens, cached_tokens, tokens: 0, max_tokens, hidden, layout: sequence.layout, before })
    }

    /// How many more tokens fit into the model's context after `tokens`.
    ///
    /// Errors: usage, if these do not fit.
    pub(super) fn room(&self, tokens: usize) -> Result<usize> {
        self.model.config.room(tokens).map_err(|e| {
            let smaller =
                if self.model.config.vision.is_some() { ", or smaller images: --max-pixels 500000" } else { "" };
            e.hint(format!("/undo or /clear{smaller}"))
        })
    }

    pub(super) fn answer(&mut self, options: &ReplyOptions, observe: ReplyObserver) -> Result<Reply> {
        let mut state = self.begin(options, observe)?;
        loop {
            if let StopReason::End(ending) = self.generate_text(&mut state, options, observe)? {
                return Ok(self.reply(&state, ending));
            }
            if self.reply.iter().filter(|part| part.image().is_some()).count() >= MOST_IMAGES {
                return Ok(self.reply(&state, FinishReason::Length));
            }
            match self.draw_within(&mut state, options, observe) {
                Err(e) if e.kind == Kind::Interrupted && !self.reply.is_empty() => {
                    return Ok(self.reply(&state, FinishReason::Interrupted));
                }
                drawn => drawn?,
            }
        }
    }

    /// Generates text until the model opens an image or the reply ends.
    fn generate_text(
        &mut self,
        state: &mut ReplyState,
        options: &ReplyOptions,
        observe: ReplyObserver,
    ) -> Result<StopReason> {
        let model = self.model;
        let mut detokenizer = Detokenizer::default();
        let pause = loop {
            if state.tokens >= state.max_tokens {
                break StopReason::End(FinishReason::Length);
            }
            let position = state.layout.len();
            let drawn = options.sampling.sample(model.logits(&state.hidden)?, &state.before, options.seed, position);
            let word = drawn.ok_or_else(|| {
                Error::new(
                    Kind::NonFinite,
                    format!("the model produced numbers that are not finite at token {position}"),
                )
                .hint("check the weights: nextflow info MODEL")
            })?;
            if word == model.template.end || model.config.stops.contains(&word) {
                break StopReason::End(FinishReason::Stop);
            }
            if model.draws() && word == model.config.backbone.boi() {
                break StopReason::Image;
            }
            state.tokens += 1;
            let first = detokenizer.is_empty();
            let new = detokenizer.push(word, &model.text)?;
            if observe(ReplyEvent::Text(model.opening(&new, first))).is_break() {
                break StopReason::End(FinishReason::Interrupted);
            }
            if state.tokens >= state.max_tokens {
                continue;
            }
            state.before[word as usize] = true;
            state.layout.push_text(1);
            self.caches[Row::Conditional as usize].reserve(state.layout.len())?;
            state.hidden = self.pass(Row::Conditional, &[Token::Text(word)], &state.layout, Step::Text)?;
        };
        self.finish(&mut detokenizer, observe)?;
        Ok(pause)
    }

    /// The finished reply.
    fn reply(&self, state: &ReplyState, ending: FinishReason) -> Reply {
        let ReplyState { prompt_tokens, cached_tokens, tokens, .. } = *state;
        let text = self.reply.iter().filter_map(Part::text).collect();
        Reply { text, prompt_tokens, cached_tokens, tokens, ending }
    }

    /// Adds the generated text to the reply.
    fn finish(&mut self, detokenizer: &mut Detokenizer, observe: ReplyObserver) -> Result<()> {
        let text = &self.model.text;
        let rest = detokenizer.finish(text)?;
        let _ = observe(ReplyEvent::Text(&rest));
        let ids = std::mem::take(detokenizer).into_ids();
        if !ids.is_empty() {
            let words = text.decode(&ids)?;
            self.reply.push(Part::Drawn(self.model.opening(&words, true).into(), ids));
        }
        Ok(())
    }

    /// Which tokens of the vocabulary occur in a sequence; image tokens count as their placeholder.
    fn tokens_before(&self, tokens: &[Token]) -> Vec<bool> {
        let mut before = vec![false; self.model.config.backbone.vocab_size];
        for token in tokens {
            let id = match token {
                Token::Text(id) => Some(*id),
                Token::Patch(..) => self.model.pad,
                Token::Code(..) | Token::Feature(..) => None,
            };
            if let Some(was) = id.and_then(|id| before.get_mut(id as usize)) {
                *was = true;
            }
        }
        before
    }

    /// Prefills the part of a sequence that a row's cache lacks. Returns how many tokens it had,
    /// and the hidden state of the last one.
    pub(super) fn catch_up(
        &mut self,
        row: Row,
        sequence: &TokenSequence,
        observe: ReplyObserver,
    ) -> Result<(usize, Tensor)> {
        let (read, tokens) = (&mut self.read[row as usize], &sequence.tokens);
        // The last token is computed in any case: its hidden state is needed.
        let same = tokens.iter().zip(&*read).take_while(|(a, b)| a == b).count().min(tokens.len() - 1);
        read.truncate(same);
        self.caches[row as usize].truncate(same);
        let mut hidden = None;
        for (part, step) in passes(&tokens[same..], CHUNK) {
            hidden = Some(self.pass(row, part, &sequence.layout, step)?);
            if observe(ReplyEvent::Read).is_break() {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
        }
        let hidden = hidden.ok_or_else(|| Error::usage("nothing was said"))?;
        Ok((same, hidden))
    }

    /// Appends tokens to a row's cache. Returns the hidden state of the last one, (1, 1, hidden).
    fn pass(&mut self, row: Row, tokens: &[Token], layout: &Layout, step: Step) -> Result<Tensor> {
        let row = row as usize;
        let start = self.read[row].len();
        let x = self.embed(tokens)?;
        let positions = &layout.positions[start..][..tokens.len()];
        let hidden = self.model.reader.read(&x, positions, &mut self.caches[row], step)?;
        self.read[row].extend(tokens);
        Ok(hidden.narrow(1, tokens.len() - 1, 1)?.contiguous()?)
    }

    /// Tokens as the transformer reads them, (1, T, hidden).
    pub(super) fn embed(&self, tokens: &[Token]) -> Result<Tensor> {
        picture::embed(&self.model.reader, tokens, |id| self.pictures().find(|p| p.id() == id))
    }

    /// The conversation up to the model's next token, or its images alone.
    pub(super) fn render(&self, row: Row, sources: bool) -> Result<TokenSequence> {
        let ChatModel { text, template, config, .. } = self.model;
        let mute =
            |parts: &[Part<Picture>]| parts.iter().filter(|part| sources && part.image().is_some()).cloned().collect();
        let silent: Vec<(Role, Vec<Part<Picture>>)>;
        let silent_reply: Vec<Part<Picture>>;
        let pieces = match row {
            Row::Conditional => {
                let turns = self.turns.iter().map(|turn| (turn.role, &turn.parts[..]));
                template.render(text, &self.system, turns, &self.reply)?
            }
            Row::ImageConditional => {
                silent = self.turns.iter().map(|turn| (turn.role, mute(&turn.parts))).collect();
                silent_reply = mute(&self.reply);
                let turns = silent.iter().map(|(role, parts)| (*role, &parts[..]));
                template.render(text, "", turns, &silent_reply)?
            }
        };
        Ok(TokenSequence::of(pieces, &config.backbone))
    }
}
