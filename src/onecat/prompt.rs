//! The words and marks around what a user says. Generation has no newline behind `<|im_end|>`,
//! conversations have; both as the weights were trained with.

use crate::error::{Error, Result};
use crate::text::Text;

/// A stretch of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Ids of words and marks.
    Words(Vec<u32>),
    /// The picture that is edited.
    Picture,
}

/// The row of a guided image that a prompt is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// An image of a text; of no text for what guidance leads away from.
    Draw(String),
    /// An edit of the picture by a text.
    Edit(String),
    /// An image of nothing, which edits are led away from.
    Nothing,
}

/// Marks that prompts are made of. Only some of the model's 15 added tokens are ever read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    start: u32,
    end: u32,
    draw: u32,
    picture: [u32; 2],
}

/// What stands around a picture in a conversation.
pub const IMAGE: (&str, &str) = ("<img>", "</img>");

impl Marks {
    /// Those of a vocabulary, by name, for a model with so many rows for words.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a mark that is missing, or whose id has no row.
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

    /// What a row reads before the first scale, under a `system` prompt.
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
                pieces.extend([Piece::Words(std::mem::take(&mut ids)), Piece::Picture]);
                ids.push(self.picture[1]);
                ids.extend(text.encode(prompt)?);
            }
        }
        ids.extend([self.end, self.start]);
        ids.extend(text.encode("assistant\n")?);
        ids.push(self.draw);
        pieces.push(Piece::Words(ids));
        Ok(pieces)
    }
}
