//! `tokenizer.model`: a BPE vocabulary of the SentencePiece library, as Llama's.
//!
//! The file is a protocol buffer (SentencePiece's `ModelProto`). SentencePiece merges, again and again, the neighbours
//! whose union has the best score; a list of merges sorted by the score of what they make does the same.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::error::Result;

/// Kinds of pieces that text can become; the others are control words and single bytes.
const NORMAL: u64 = 1;
const USER_DEFINED: u64 = 4;
/// The `model_type` of a BPE.
const BPE: u64 = 2;
/// No more pieces than this, and none of more bytes.
const MAX_PIECES: usize = 1 << 20;
const MAX_PIECE: usize = 256;

/// What stands for a space.
const SPACE: &str = "\u{2581}";

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// The same vocabulary in the format of `tokenizer.json`.
///
/// Errors: a file that is none, or one of another kind than Llama's.
pub(super) fn convert(bytes: &[u8]) -> Result<Value> {
    let pieces =
        read(bytes).ok_or_else(|| bad("it is damaged, or not a BPE of SentencePiece without normalisation"))?;
    let ids: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, p)| (p.text.as_str(), id)).collect();
    if ids.len() != pieces.len() {
        return Err(bad("a piece is there twice"));
    }
    let unknown = pieces.iter().find(|p| p.kind == 2).map(|p| p.text.as_str());
    let tokenizer = json!({
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "vocab": ids, "merges": merges(&pieces, &ids),
            "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
        },
    });
    Ok(tokenizer)
}

/// Every way to make a piece of two others, the best pieces first.
fn merges<'a>(pieces: &'a [Piece], ids: &HashMap<&str, usize>) -> Vec<[&'a str; 2]> {
    let mut found = Vec::new();
    for piece in pieces.iter().filter(|p| [NORMAL, USER_DEFINED].contains(&p.kind)) {
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                found.push((-piece.score, l, r, [left, right]));
            }
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found.into_iter().map(|(.., merge)| merge).collect()
}

fn bad(what: &str) -> crate::error::Error {
    crate::error::Error::model(format!("tokenizer.model cannot be used: {what}"))
        .hint("copy the file from the checkpoint again")
}

/// The pieces of a model that splits text as Llama's does: a BPE that puts a space in front and changes nothing else.
fn read(bytes: &[u8]) -> Option<Vec<Piece>> {
    let (mut pieces, mut bpe, mut plain) = (Vec::new(), false, false);
    for field in Fields(bytes) {
        match field? {
            (1, Data::Bytes(piece)) if pieces.len() < MAX_PIECES => pieces.push(read_piece(piece)?),
            (1, _) => return None,
            (2, Data::Bytes(trainer)) => bpe = number(trainer, 3)? == Some(BPE),
            (3, Data::Bytes(normalizer)) => {
                let (map, squeeze) = (bytes_of(normalizer, 2)?, number(normalizer, 4)?);
                plain = map.is_none_or(<[u8]>::is_empty) && squeeze == Some(0) && number(normalizer, 3)? != Some(0);
            }
            _ => {}
        }
    }
    (bpe && plain).then_some(pieces)
}

fn read_piece(bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: NORMAL };
    for field in Fields(bytes) {
        match field? {
            (1, Data::Bytes(text)) if text.len() <= MAX_PIECE => piece.text = std::str::from_utf8(text).ok()?.into(),
            (1, _) => return None,
            (2, Data::Four(score)) => piece.score = f32::from_le_bytes(score),
            (3, Data::Number(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    (!piece.text.is_empty()).then_some(piece)
}

/// The last number in a message's field, if there is any.
fn number(message: &[u8], field: u64) -> Option<Option<u64>> {
    let mut found = None;
    for next in Fields(message) {
        match next? {
            (id, Data::Number(n)) if id == field => found = Some(n),
            _ => {}
        }
    }
    Some(found)
}

/// The last bytes in a message's field, if there are any.
fn bytes_of(message: &[u8], field: u64) -> Option<Option<&[u8]>> {
    let mut found = None;
    for next in Fields(message) {
        match next? {
            (id, Data::Bytes(bytes)) if id == field => found = Some(bytes),
            _ => {}
        }
    }
    Some(found)
}

/// The value of a field of a protocol buffer.
enum Data<'a> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

/// The fields of a message one by one; `None` as an item says that the message is broken, and is the last.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Data<'a>)> {
        let tag = self.varint()?;
        let data = match tag & 7 {
            0 => Data::Number(self.varint()?),
            1 => self.take(8).map(|_| Data::Eight)?,
            2 => {
                let length = self.varint()?;
                Data::Bytes(self.take(length)?)
            }
            5 => Data::Four(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some((tag >> 3, data))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Data<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Text;

    const MODEL: &[u8] = include_bytes!("../../tests/data/sentencepiece.model");

    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }

    #[test]
    fn splits_as_sentencepiece_does() {
        let text = Text::from_sentencepiece(MODEL).unwrap();
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/data/sentencepiece.json")).unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            assert_eq!(text.encode(&case.text).unwrap(), case.ids, "{:?}", case.text);
            assert_eq!(text.decode(&case.ids).unwrap(), case.text.replace('\u{2581}', " "), "{:?}", case.ids);
        }
        assert_eq!(text.vocab_size(), 700);
    }

    #[test]
    fn a_damaged_file_is_refused() {
        let refused = |bytes: &[u8]| match Text::from_sentencepiece(bytes) {
            Ok(_) => false,
            Err(e) => e.exit_code() == 3 && e.message.starts_with("tokenizer.model cannot be used"),
        };
        assert!(refused(b"") && refused(b"{}") && refused(&[0xff; 40]) && refused(&MODEL[..MODEL.len() / 2]));
        // The type of the model (field 3 of the trainer's settings) says unigram.
        let at = MODEL.windows(4).rposition(|w| w == [0x18, 0x02, 0x20, 0xbc]).unwrap();
        let mut unigram = MODEL.to_vec();
        unigram[at + 1] = 1;
        assert!(refused(&unigram));
        for at in (0..MODEL.len()).step_by(97) {
            let mut damaged = MODEL.to_vec();
            damaged[at] ^= 0xff;
            let _ = Text::from_sentencepiece(&damaged); // Whatever comes of it, it is no panic.
        }
    }
}
