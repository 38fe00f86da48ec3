//! `tokenizer.model`: a BPE vocabulary of the SentencePiece library, as Llama's.
//!
//! The file is a protocol buffer (SentencePiece's `ModelProto`). SentencePiece merges, again and
//! again, the neighbours whose union has the best score; a list of merges sorted by the score of
//! what they make does the same.

use std::collections::{BTreeMap, HashMap};

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::{Prepend, Replace};

use super::Text;
use super::vocabulary::{MAX_MERGES, MAX_TOKENS, Merges, ModelFile, Words};
use crate::error::{Error, Result};

/// Kinds of pieces for text; the others are control tokens and single bytes.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const USER_DEFINED: u64 = 4;
/// The `model_type` of a BPE.
const BPE: u64 = 2;
/// The longest file, in bytes: Gemma's has 4.2 million.
const MAX_FILE: usize = 16 << 20;
/// The longest piece, in bytes: SentencePiece's own limit is 16 characters. Every split of a piece
/// is looked up.
const MAX_PIECE: usize = 64;

/// Replaces a space.
const SPACE: &str = "\u{2581}";

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// The tokenizer of a file: it puts a space in front of a text, and cuts it into pieces or, where
/// there are none, bytes.
///
/// Errors: [`crate::error::Kind::Model`] for a file that is damaged, too large, or of another kind
/// than Llama's.
pub(super) fn read(bytes: &[u8]) -> Result<Text> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::model("tokenizer.model is a git-lfs pointer file: the tokenizer itself was not downloaded")
            .hint("git lfs pull, in the folder of the file"));
    }
    if bytes.len() > MAX_FILE {
        return Err(bad(&format!("it has {} bytes, more than {MAX_FILE}", bytes.len())));
    }
    let pieces = pieces(bytes)
        .ok_or_else(|| bad("it is damaged, too large, or not a BPE of SentencePiece without normalisation"))?;
    let ids: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, p)| (p.text.as_str(), id)).collect();
    if ids.len() != pieces.len() {
        return Err(bad("a piece is there twice"));
    }
    let merges = merges(&pieces, &ids).ok_or_else(|| bad(&format!("it has more than {MAX_MERGES} merges")))?;
    let merges = merges.into_iter().map(|[left, right]| (left.to_string(), right.to_string())).collect();
    let model = ModelFile {
        kind: "BPE".into(),
        unk_token: pieces.iter().find(|p| p.kind == UNKNOWN).map(|p| p.text.clone()),
        vocab: Words::Ids(pieces.into_iter().zip(0..).map(|(piece, id)| (piece.text, id)).collect()),
        merges: Merges(merges),
        fuse_unk: Some(true),
        byte_fallback: Some(true),
        ..ModelFile::default()
    };
    let model = model.build(&BTreeMap::new()).map_err(|e| bad(&e))?;
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| bad(&e.to_string()));
    Ok(Text {
        normalizers: vec![Prepend::new(SPACE.into()).into(), replace(" ", SPACE)?.into()],
        pre_tokenizers: Vec::new(),
        model: model.model,
        decoders: vec![
            replace(SPACE, " ")?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
            Strip::new(' ', 1, 0).into(),
        ],
        size: model.size,
        control: BTreeMap::new(),
        shown: BTreeMap::new(),
    })
}

/// Every way to make a piece of two others, the best pieces first; `None` if there are more than
/// [`MAX_MERGES`].
fn merges<'a>(pieces: &'a [Piece], ids: &HashMap<&str, usize>) -> Option<Vec<[&'a str; 2]>> {
    let mut found = Vec::new();
    for piece in pieces.iter().filter(|p| [NORMAL, USER_DEFINED].contains(&p.kind)) {
        for (at, _) in piece.text.char_indices().skip(1) {
            let (left, right) = piece.text.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                if found.len() == MAX_MERGES {
                    return None;
                }
                found.push((-piece.score, l, r, [left, right]));
            }
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Some(found.into_iter().map(|(.., merge)| merge).collect())
}

fn bad(what: &str) -> Error {
    Error::model(format!("tokenizer.model cannot be used: {what}"))
        .hint("copy the file from the checkpoint again, or name another model: --model FOLDER")
}

/// The pieces of a model that splits text as Llama's does: a BPE that puts a space in front and
/// changes nothing else.
fn pieces(bytes: &[u8]) -> Option<Vec<Piece>> {
    let (mut pieces, mut bpe, mut plain) = (Vec::new(), false, false);
    for field in Fields(bytes) {
        match field? {
            (1, Data::Bytes(piece)) if pieces.len() < MAX_TOKENS => pieces.push(read_piece(piece)?),
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

/// The fields of a message one by one; an item of `None` means a broken message, and is the last.
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

    /// A field of bytes of a protocol buffer.
    fn field(id: u8, data: &[u8]) -> Vec<u8> {
        let mut out = vec![id << 3 | 2];
        let mut length = data.len();
        while length > 127 {
            out.push(length as u8 & 127 | 128);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend_from_slice(data);
        out
    }

    fn model(pieces: impl Iterator<Item = String>) -> Vec<u8> {
        let piece = |text: String| field(1, &[field(1, text.as_bytes()), b"\x15\0\0\0\0\x18\x01".to_vec()].concat());
        let mut file: Vec<u8> = pieces.flat_map(piece).collect();
        file.extend([field(2, b"\x18\x02"), field(3, b"\x18\x01\x20\x00")].concat());
        file
    }

    #[test]
    fn pieces_and_merges_are_bounded() {
        let refused = |file: &[u8], part: &str| {
            let error = Text::from_sentencepiece(file).unwrap_err();
            assert!(error.exit_code() == 3 && error.message.contains(part), "{error}");
        };
        // Every word of up to 15 letters a and b: each of them can be made of two others in all
        // ways.
        let words = (1..16).flat_map(|n| (0..1 << n).map(move |bits: u32| (bits, n)));
        let words = words.map(|(bits, n)| (0..n).map(|i| if bits >> i & 1 == 0 { 'a' } else { 'b' }).collect());
        refused(&model(words), "more than 524288 merges");
        refused(&model((0..=1 << 18).map(|i| format!("{i}"))), "damaged, too large, or not a BPE");
        refused(&model(["x".repeat(65)].into_iter()), "damaged, too large, or not a BPE");
        refused(&vec![0; (16 << 20) + 1], "more than 16777216");
        refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer");
    }
}
