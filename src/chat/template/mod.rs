//! The chat template: from a conversation to control tokens, text and images. It is Qwen2.5-VL's
//! ChatML, or the checkpoint's own.

mod jinja;

use std::sync::Arc;

use serde::Serialize;

pub use jinja::ChatTemplate;

use crate::error::{Error, Result};
use crate::onecat::prompt::IMAGE;
use crate::text::Text;

/// The speaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// A part of a message.
#[derive(Clone, Debug)]
pub enum Part<I> {
    /// Text.
    Text(String),
    /// Text as the model generated it; its tokenizer may choose other ids for the same text.
    Drawn(String, Vec<u32>),
    /// An image.
    Image(I),
}

impl<I> Part<I> {
    /// The text, if it is text.
    pub fn text(&self) -> Option<&str> {
        match self {
            Part::Text(text) | Part::Drawn(text, _) => Some(text),
            Part::Image(_) => None,
        }
    }

    /// The image, if it is one.
    pub fn image(&self) -> Option<&I> {
        match self {
            Part::Image(image) => Some(image),
            Part::Text(_) | Part::Drawn(..) => None,
        }
    }
}

/// A stretch of a rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece<'a, I> {
    /// Ids of text and control tokens.
    Tokens(Vec<u32>),
    /// An image.
    Image(&'a I),
}

/// A rendered conversation; `said` is whether a piece is the model's, the token that ends its
/// message included.
pub type Pieces<'a, I> = Vec<(Piece<'a, I>, bool)>;

/// What stands around an image that is no code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageMarks {
    /// Control tokens before and after it.
    around: Option<(&'static str, &'static str)>,
    /// Words behind these.
    behind: &'static str,
}

impl ImageMarks {
    /// Of images that bring marks of their own.
    pub const NONE: Self = Self { around: None, behind: "" };
    /// Of Qwen2.5-VL.
    pub const QWEN: Self = Self { around: Some(("<|vision_start|>", "<|vision_end|>")), behind: "" };
    /// Of OneCAT.
    pub const ONECAT: Self = Self { around: Some(IMAGE), behind: "\n" };
}

/// Control tokens of ChatML, and the template in its place if the checkpoint has one.
#[derive(Clone, Debug)]
pub struct Template {
    start: u32,
    /// Ends a message.
    pub end: u32,
    /// The tokens before and after an image that has none itself.
    around_images: Option<(u32, u32)>,
    behind_images: &'static str,
    own: Option<Arc<ChatTemplate>>,
}

impl Template {
    /// The template of a vocabulary, with images between `marks`.
    ///
    /// Errors: [`crate::error::Kind::Model`] if its control tokens are missing: then the model does
    /// not chat.
    pub fn of(text: &Text, marks: ImageMarks) -> Result<Self> {
        let id = |word: &str| {
            text.control(word).ok_or_else(|| {
                Error::model(format!("the model does not chat: tokenizer.json has no {word}"))
                    .hint("nextflow chat --model Qwen/Qwen2.5-VL-3B-Instruct")
            })
        };
        let around_images =
            marks.around.map(|(before, after)| Ok::<_, Error>((id(before)?, id(after)?))).transpose()?;
        let (start, end) = (id("<|im_start|>")?, id("<|im_end|>")?);
        Ok(Self { start, end, around_images, behind_images: marks.behind, own: None })
    }

    /// The same, with the checkpoint's own template instead of ChatML.
    pub fn with_own(self, own: ChatTemplate) -> Self {
        Self { own: Some(Arc::new(own)), ..self }
    }

    /// A whole conversation. After the last user message come the assistant's header and `reply`,
    /// the part of its message so far.
    pub fn render<'a, I>(
        &self,
        text: &Text,
        system: &'a str,
        turns: impl IntoIterator<Item = (Role, &'a [Part<I>])>,
        reply: &'a [Part<I>],
    ) -> Result<Pieces<'a, I>> {
        if let Some(own) = &self.own {
            return own.render(text, system, turns, reply);
        }
        let newline = text.encode("\n")?;
        let close = |pieces: &mut Pieces<I>, said| {
            pieces.push((Piece::Tokens(vec![self.end]), said));
            pieces.push((Piece::Tokens(newline.clone()), false));
        };
        let mut pieces = Pieces::new();
        if !system.is_empty() {
            pieces.push((Piece::Tokens(vec![self.start]), false));
            pieces.push((Piece::Tokens(text.encode(&format!("system\n{system}"))?), false));
            close(&mut pieces, false);
        }
        let mut last = Role::Assistant;
        for (role, parts) in turns {
            last = role;
            pieces.push((Piece::Tokens(vec![self.start]), false));
            self.message(text, role, parts, &mut pieces)?;
            close(&mut pieces, role == Role::Assistant);
        }
        if last == Role::User {
            pieces.push((Piece::Tokens(vec![self.start]), false));
            self.message(text, Role::Assistant, reply, &mut pieces)?;
        }
        Ok(pieces)
    }

    fn message<'a, I>(&self, text: &Text, role: Role, parts: &'a [Part<I>], pieces: &mut Pieces<'a, I>) -> Result<()> {
        let said = role == Role::Assistant;
        let head = match role {
            Role::User => "user\n",
            Role::Assistant => "assistant\n",
        };
        // Everything between control tokens is one text, as tokens may span its parts.
        let mut open = head.to_string();
        let mut first = true;
        let mut flush = |open: &mut String, pieces: &mut Pieces<'a, I>| {
            let mut ids = text.encode(&std::mem::take(open))?;
            if let Some(head) = Some(text.encode(head)?).filter(|head| first && ids.starts_with(head)) {
                let rest = ids.split_off(head.len());
                pieces.push((Piece::Tokens(ids), false));
                ids = rest;
            }
            first = false;
            pieces.push((Piece::Tokens(ids), said));
            Ok::<_, Error>(())
        };
        for part in parts {
            match part {
                Part::Text(words) => open += words,
                Part::Drawn(_, ids) => {
                    flush(&mut open, pieces)?;
                    pieces.push((Piece::Tokens(ids.clone()), said));
                }
                Part::Image(image) => {
                    flush(&mut open, pieces)?;
                    let around = |mark: Option<u32>| (Piece::Tokens(mark.into_iter().collect()), false);
                    pieces.push(around(self.around_images.map(|marks| marks.0)));
                    pieces.push((Piece::Image(image), said));
                    pieces.push(around(self.around_images.map(|marks| marks.1)));
                    open += self.behind_images;
                }
            }
        }
        flush(&mut open, pieces)?;
        Ok(())
    }
}
