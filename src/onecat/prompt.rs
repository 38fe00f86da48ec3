//! Prompt templates. Generation has no newline behind `<|im_end|>`, conversations have one; the
//! weights were trained with both.

use crate::error::{Error, Result};
use crate::text::Text;

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Ids of text and control tokens.
    Tokens(Vec<u32>),
    /// The source of an edit.
    Picture,
}

/// The row of a guided image that a prompt is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// An image of a text; the unconditional row is that of an empty text.
    Draw(String),
    /// An edit by an instruction.
    Edit(String),
    /// The unconditional row of edits.
    Nothing,
}

/// Control tokens of prompts. Only some of the model's 15 added tokens are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    start: u32,
    end: u32,
    draw: u32,
    picture: [u32; 2],
}

/// The control tokens around a picture in a conversation.
pub const IMAGE: (&str, &str) = ("<img>", "</img>");

impl Marks {
    /// The ids in a vocabulary, by name, for a model with `rows` embeddings.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a token that is missing, or whose id has no row.
    pub fn of(text: &Text, rows: usize) -> Result<Self> {
        const HINT: &str = "copy tokenizer.json from the same checkpoint as the weights again";
        let id = |mark: &str| match text.control(mark) {
            Some(id) if (id as usize) < rows => Ok(id),
            Some(id) => {
                Err(Error::model(format!("tokenizer.json gives {mark} the id {id}, the model has {rows} words"))
                    .hint(HINT))
            }
            None => Err(Error::model(format!("tokenizer.json has no {mark}, which OneCAT needs")).hint(HINT)),
        };
        id(IMAGE.0).and_then(|_| id(IMAGE.1))?;
        Ok(Self {
            start: id("<|im_start|>")?,
            end: id("<|im_end|>")?,
            draw: id("<img_gen>")?,
            picture: [id("<ref_gen>")?, id("</ref_gen>")?],
        })
    }

    /// The prompt of a row, with the system prompt `system`.
    ///
    /// Errors: a text that cannot be encoded.
    pub fn prompt(&self, text: &Text, system: &str, row: &Row) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut ids = vec![self.start];
        ids.extend(text.encode(&format!("system\n{system}"))?);
        ids.extend([self.end, self.start]);
        match row {
            Row::Draw(prompt) => ids.extend(text.encode(&format!("user\n{prompt}"))?),
            // Without the newline.
            Row::Nothing => ids.extend(text.encode("user")?),
            Row::Edit(prompt) => {
                ids.extend(text.encode("user\n")?);
                ids.push(self.picture[0]);
                pieces.extend([Piece::Tokens(std::mem::take(&mut ids)), Piece::Picture]);
                ids.push(self.picture[1]);
                ids.extend(text.encode(prompt)?);
            }
        }
        ids.extend([self.end, self.start]);
        ids.extend(text.encode("assistant\n")?);
        ids.push(self.draw);
        pieces.push(Piece::Tokens(ids));
        Ok(pieces)
    }
}
