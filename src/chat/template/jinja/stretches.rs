//! The output of a template in stretches: its own words, control tokens, and marks of what a user
//! or the model has said.

use super::IMAGE;
use crate::chat::template::{Piece, Pieces};
use crate::error::{Error, Result};
use crate::text::Text;

/// A text, its tokens if they are known, and whether the model generated it.
pub(super) type Said<'a> = (&'a str, Option<&'a [u32]>, bool);

/// A stretch of a rendering.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stretch<'a> {
    /// Text of the template.
    Text(&'a str),
    /// A control token.
    Control(u32),
    /// The mark of this number.
    Mark(usize),
}

/// A private-use character around a number: the placeholder for text that a template must not see.
pub(super) struct Mark(char);

impl Mark {
    /// One that no text has.
    pub(super) fn unused(texts: &[Said]) -> Result<Self> {
        let unused = ('\u{f0000}'..='\u{ffffd}').find(|c| texts.iter().all(|(text, ..)| !text.contains(*c)));
        unused.map(Self).ok_or_else(|| Error::usage("the conversation holds every character of private use"))
    }

    pub(super) fn text(&self, number: usize) -> String {
        format!("{0}{number}{0}", self.0)
    }

    /// The number of a mark at the beginning of a text, and what follows it.
    fn strip<'a>(&self, text: &'a str) -> Option<(usize, &'a str)> {
        let (number, rest) = text.strip_prefix(self.0)?.split_once(self.0)?;
        Some((number.parse().ok()?, rest))
    }
}

/// The control tokens of a vocabulary.
pub(super) struct Controls<'a> {
    text: &'a Text,
    /// Control tokens and ids, longer ones first.
    pub(super) words: Vec<(&'a str, u32)>,
}

impl<'a> Controls<'a> {
    pub(super) fn new(text: &'a Text) -> Self {
        let mut words: Vec<_> = text.controls().filter(|(word, _)| !word.is_empty()).collect();
        words.sort_by_key(|(word, _)| std::cmp::Reverse(word.len()));
        Self { text, words }
    }

    /// The index of the control token that a text begins with.
    fn first(&self, text: &str) -> Option<usize> {
        self.words.iter().position(|(word, _)| text.starts_with(word))
    }

    pub(super) fn word(&self, id: u32) -> &'a str {
        self.words.iter().find(|(_, other)| *other == id).map_or("", |(word, _)| word)
    }

    /// A text in which words of control tokens are marks, numbered from `first` on; what the model
    /// has `spoken` keeps those that are shown, for templates look for `</think>`.
    pub(super) fn escaped(&self, text: &str, spoken: bool, mark: &Mark, first: usize) -> String {
        let (mut escaped, mut rest) = (String::new(), text);
        while let Some(c) = rest.chars().next() {
            match self.first(rest) {
                Some(i) if !spoken || !self.text.is_shown(self.words[i].1) => {
                    escaped += &mark.text(first + i);
                    rest = &rest[self.words[i].0.len()..];
                }
                _ => {
                    escaped.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        escaped
    }

    /// A rendering in stretches.
    pub(super) fn cut<'t>(&self, rendered: &'t str, mark: &Mark) -> Vec<Stretch<'t>> {
        let (mut stretches, mut begin, mut at) = (Vec::new(), 0, 0);
        while let Some(c) = rendered[at..].chars().next() {
            let rest = &rendered[at..];
            let found = match (mark.strip(rest), self.first(rest)) {
                (Some((number, after)), _) => Some((Stretch::Mark(number), rest.len() - after.len())),
                (None, Some(i)) => Some((Stretch::Control(self.words[i].1), self.words[i].0.len())),
                (None, None) => None,
            };
            let Some((stretch, length)) = found else {
                at += c.len_utf8();
                continue;
            };
            stretches.extend((begin < at).then(|| Stretch::Text(&rendered[begin..at])));
            stretches.push(stretch);
            at += length;
            begin = at;
        }
        stretches.extend((begin < at).then(|| Stretch::Text(&rendered[begin..at])));
        stretches
    }

    /// The control tokens that open and close messages and images.
    pub(super) fn structure<'s>(&'s self, stretches: &'s [Stretch]) -> impl Iterator<Item = u32> + 's {
        stretches.iter().filter_map(|stretch| match stretch {
            Stretch::Control(id) if !self.text.is_shown(*id) => Some(*id),
            _ => None,
        })
    }
}

/// Joins the pieces; everything between control tokens is one text, as tokens may span its parts.
pub(super) struct Writer<'w, 'a, I> {
    text: &'w Text,
    controls: &'w Controls<'w>,
    /// Text that is not tokens yet.
    pub(super) open: String,
    pieces: Pieces<'a, I>,
    /// Images to come, the next one last.
    images: Vec<&'a I>,
}

impl<'w, 'a, I> Writer<'w, 'a, I> {
    /// `images` come in the reverse of their order.
    pub(super) fn new(text: &'w Text, controls: &'w Controls<'w>, images: Vec<&'a I>) -> Self {
        Self { text, controls, open: String::new(), pieces: Vec::new(), images }
    }

    fn flush(&mut self) -> Result<()> {
        if !self.open.is_empty() {
            let ids = self.text.encode(&std::mem::take(&mut self.open))?;
            self.pieces.push((Piece::Tokens(ids), false));
        }
        Ok(())
    }

    pub(super) fn stretch(&mut self, stretch: Stretch) -> Result<()> {
        match stretch {
            Stretch::Text(words) => self.open += words,
            Stretch::Mark(_) => {}
            Stretch::Control(id) => {
                self.flush()?;
                let image = if self.controls.word(id) == IMAGE { self.images.pop() } else { None };
                self.pieces.push((image.map_or_else(|| Piece::Tokens(vec![id]), Piece::Image), false));
            }
        }
        Ok(())
    }

    pub(super) fn text(&mut self, (words, ids, spoken): Said<'a>) -> Result<()> {
        match ids {
            None => self.open += words,
            Some(ids) => {
                self.flush()?;
                self.pieces.push((Piece::Tokens(ids.to_vec()), spoken));
            }
        }
        Ok(())
    }

    /// Errors: images that the template has left out.
    pub(super) fn finish(mut self, file: &str) -> Result<Pieces<'a, I>> {
        self.flush()?;
        match self.images.len() {
            0 => Ok(self.pieces),
            n => Err(Error::usage(format!("the chat template in {file} leaves {n} images out"))
                .hint("ask about fewer images, or without the template: take its file out of the folder")),
        }
    }
}
