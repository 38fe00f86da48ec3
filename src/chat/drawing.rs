//! Drawing images in a conversation.

use candle_core::Tensor;

use super::picture::{Token, TokenSequence};
use super::reply::{ReplyEvent, ReplyObserver, ReplyOptions, ReplyState};
use super::session::{CHUNK, Row};
use super::template::{Part, Role};
use super::{Picture, Session};
use crate::error::Result;
use crate::generate::next_input::NextInput;
use crate::generate::{Batch, Rows, Sampling, draw_codes, schedule};

impl Session<'_> {
    /// How many images the model has drawn.
    pub(super) fn drawn(&self) -> usize {
        let by_model = self.turns.iter().filter(|turn| turn.role == Role::Assistant);
        by_model.flat_map(|turn| &turn.parts).chain(&self.reply).filter_map(Part::image).count()
    }

    /// Draws the image that the model has opened in its reply, and reads it.
    pub(super) fn draw_within(
        &mut self,
        state: &mut ReplyState,
        options: &ReplyOptions,
        observe: ReplyObserver,
    ) -> Result<()> {
        self.draw_next(options, &self.next_scales()?, observe)?;
        state.tokens += 1;
        let sequence = self.render(Row::Conditional, true)?;
        state.max_tokens = state.max_tokens.min(state.tokens + self.room(sequence.tokens.len())?);
        self.caches[Row::Conditional as usize].reserve(sequence.tokens.len() + state.max_tokens.min(CHUNK))?;
        (_, state.hidden) = self.catch_up(Row::Conditional, &sequence, observe)?;
        state.layout = sequence.layout;
        Ok(())
    }

    /// The grids of an image that follows: those of the last one, for it is likely to be an edit.
    pub(super) fn next_scales(&self) -> Result<Vec<(usize, usize)>> {
        let last = self.pictures().filter_map(Picture::codes).last();
        last.map_or_else(|| self.model.usual_scales(), |codes| Ok(codes.scales.clone()))
    }

    /// Draws an image after the conversation and the reply so far, and adds it to the reply.
    pub(super) fn draw_next(
        &mut self,
        options: &ReplyOptions,
        scales: &[(usize, usize)],
        observe: ReplyObserver,
    ) -> Result<()> {
        let (model, config) = (self.model, &self.model.config.backbone);
        let Some((tokenizer, sampling)) = model.tokenizer.as_ref().zip(options.image.as_ref()) else {
            return Err(model.draws_nothing());
        };
        let guided = sampling.guided_scales(scales.len());
        let rows = if guided > 0 { &[Row::Conditional, Row::ImageConditional][..] } else { &[Row::Conditional] };
        let (mut layouts, mut hidden) = (Vec::new(), Vec::new());
        for &row in rows {
            let mut sequence = self.render(row, options.guide_from_sources)?;
            sequence.tokens.push(Token::Text(config.boi()));
            sequence.layout.push_image(scales, config.spatial_extent);
            self.room(sequence.layout.len())?;
            self.caches[row as usize].reserve(sequence.layout.len())?;
            hidden.push(self.catch_up(row, &sequence, observe)?.1);
            layouts.push(sequence.layout);
        }
        let hidden = Tensor::cat(&hidden, 0)?;
        let seed = options.seed.wrapping_add(self.drawn() as u64);
        // What follows reads the whole image.
        let sampling = Sampling { draft: 0, ..sampling.clone() };
        let batch = Batch { scales, sampling: &sampling, seeds: &[seed] };
        let input = NextInput::of_table(tokenizer.quantizer(), config.input_mode, scales);
        let drawing = Rows::resume(model.reader.backbone()?, &mut self.caches, layouts, scales)?;
        let images = draw_codes(drawing, hidden, input, batch, &mut |event| observe(ReplyEvent::Drawing(event)));
        let name = format!("${}", self.gallery().len() + 1);
        let picture = images.and_then(|mut images| {
            let codes = images.pop().unwrap_or_default();
            Picture::of_codes(&name, config, tokenizer.quantizer(), codes, scales)
        });
        let mut picture = match picture {
            Ok(picture) => picture,
            Err(error) => {
                rows.iter().for_each(|&row| self.caches[row as usize].truncate(self.read[row as usize].len()));
                return Err(error);
            }
        };
        // The loop has left the inputs of all scales in the cache, or of the guided ones.
        let mut sequence = TokenSequence::default();
        sequence.push_picture(&picture, config);
        for (&row, read) in rows.iter().zip([scales.len(), guided]) {
            let inputs = schedule::codes(&scales[..read]) - 1;
            self.read[row as usize].extend(&sequence.tokens[1..][..inputs]);
        }
        let _ = observe(ReplyEvent::Drawn(&mut picture, seed));
        self.reply.push(Part::Image(picture));
        Ok(())
    }
}
