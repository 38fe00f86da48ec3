//! Images as a conversation holds them, and the tokens that they become.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;

use super::Reader;
use super::template::{Piece, Pieces};
use crate::backbone::{BackboneConfig, Layout, Step};
use crate::error::{Error, Kind, Result};
use crate::generate::ImageCodes;
use crate::generate::next_input::NextInput;
use crate::tokenizer::Quantizer;

/// An image as the transformer reads it.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Its name for the user.
    pub name: String,
    /// Unique number.
    id: u64,
    encoding: Encoding,
}

/// An image as the transformer's input.
#[derive(Clone, Debug)]
enum Encoding {
    /// The features of an image encoder, (h * w, hidden), for a grid (height, width).
    Patches(Tensor, (usize, usize)),
    /// The features (tokens, hidden) of an image whose tokens see each other, one after the other.
    Features(Tensor),
    /// Codes, scale by scale.
    Codes(Arc<PictureCodes>),
}

/// An image in codes.
#[derive(Debug)]
pub struct PictureCodes {
    /// Of every scale, coarse to fine, each row-major.
    pub codes: ImageCodes,
    /// Grids (height, width).
    pub scales: Vec<(usize, usize)>,
    /// Input features (h * w, D) of every scale from the second on and, where the model reads it,
    /// of the whole.
    inputs: Vec<Vec<f32>>,
}

impl Picture {
    /// Of features (h * w, hidden).
    pub(super) fn of_patches(name: &str, features: Tensor, tokens: (usize, usize)) -> Self {
        Self::new(name, Encoding::Patches(features, tokens))
    }

    /// Of features (tokens, hidden), each of which sees all others.
    pub(super) fn of_features(name: &str, features: Tensor) -> Self {
        Self::new(name, Encoding::Features(features))
    }

    /// Of codes, which fit the quantiser.
    pub(super) fn of_codes(
        name: &str,
        config: &BackboneConfig,
        quantizer: &Quantizer,
        codes: ImageCodes,
        scales: &[(usize, usize)],
    ) -> Result<Self> {
        let mut inputs = NextInput::of_table(quantizer, config.input_mode, scales).all(&codes)?;
        if let (true, Some(&grid)) = (config.context_last_scale, scales.last()) {
            inputs.push(quantizer.accumulate(&codes, scales, grid));
        }
        Ok(Self::new(name, Encoding::Codes(Arc::new(PictureCodes { codes, scales: scales.into(), inputs }))))
    }

    fn new(name: &str, encoding: Encoding) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { name: name.into(), id: NEXT.fetch_add(1, Ordering::Relaxed), encoding }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The codes, where it is read as codes.
    pub fn codes(&self) -> Option<&PictureCodes> {
        match &self.encoding {
            Encoding::Codes(codes) => Some(codes),
            Encoding::Patches(..) | Encoding::Features(_) => None,
        }
    }

    /// The features of an image encoder, (h * w, hidden).
    #[cfg(test)]
    pub(super) fn features(&self) -> &Tensor {
        match &self.encoding {
            Encoding::Patches(features, _) | Encoding::Features(features) => features,
            Encoding::Codes(_) => panic!("{} is read as codes", self.name),
        }
    }

    /// Tokens that it takes.
    pub fn tokens(&self) -> usize {
        match &self.encoding {
            Encoding::Patches(_, (h, w)) => h * w,
            Encoding::Features(features) => features.dims()[0],
            Encoding::Codes(codes) => {
                2 + codes.inputs.iter().zip(codes.grids()).map(|(_, (h, w))| h * w).sum::<usize>()
            }
        }
    }
}

impl PictureCodes {
    /// Grids of the inputs: the scales' from the second on, and once more the last one's.
    fn grids(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.scales.iter().skip(1).chain(self.scales.last()).copied()
    }
}

/// A token of the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Text(u32),
    /// Of an image, by its id: what an encoder made of it.
    Patch(u64, u32),
    /// Of an image, by its id, whose tokens see each other.
    Feature(u64, u32),
    /// Of an image, by its id: an input (0 for the second scale), and the place in it.
    Code(u64, u32, u32),
}

impl Token {
    /// What tokens that are read in one pass have in common: the input of an image, or that they
    /// are none.
    fn input(&self) -> Option<(u64, u32)> {
        match *self {
            Token::Code(id, input, _) => Some((id, input)),
            Token::Feature(id, _) => Some((id, 0)),
            Token::Text(_) | Token::Patch(..) => None,
        }
    }

    /// The image that a token is of.
    fn image(&self) -> Option<u64> {
        match *self {
            Token::Code(id, ..) | Token::Patch(id, _) | Token::Feature(id, _) => Some(id),
            Token::Text(_) => None,
        }
    }
}

/// Ranges of tokens for forward passes of at most `most` tokens, with their kind; the codes of one
/// input, and the features of one image that all see each other, stay together.
pub(super) fn passes(tokens: &[Token], most: usize) -> impl Iterator<Item = (&[Token], Step)> {
    tokens.chunk_by(|a, b| a.input() == b.input()).flat_map(move |run| {
        let step = if run[0].input().is_some() { Step::Scale } else { Step::Text };
        run.chunks(if step == Step::Scale { run.len() } else { most }).map(move |part| (part, step))
    })
}

/// Tokens and their positions.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenSequence {
    pub tokens: Vec<Token>,
    pub layout: Layout,
}

impl TokenSequence {
    /// A rendered conversation.
    pub fn of(pieces: Pieces<Picture>, config: &BackboneConfig) -> Self {
        let mut sequence = Self::default();
        for (piece, _) in pieces {
            match piece {
                Piece::Tokens(ids) => sequence.push_text(&ids),
                Piece::Image(picture) => sequence.push_picture(picture, config),
            }
        }
        sequence
    }

    pub fn push_text(&mut self, ids: &[u32]) {
        self.tokens.extend(ids.iter().map(|&id| Token::Text(id)));
        self.layout.push_text(ids.len());
    }

    pub fn push_picture(&mut self, picture: &Picture, config: &BackboneConfig) {
        match &picture.encoding {
            Encoding::Patches(_, grid) => {
                self.tokens.extend((0..(grid.0 * grid.1) as u32).map(|i| Token::Patch(picture.id, i)));
                self.layout.push_patches(*grid);
            }
            Encoding::Features(features) => {
                let count = features.dims()[0];
                self.tokens.extend((0..count as u32).map(|i| Token::Feature(picture.id, i)));
                self.layout.push_text(count);
            }
            Encoding::Codes(codes) => {
                self.tokens.push(Token::Text(config.boi()));
                for (input, (_, (h, w))) in codes.inputs.iter().zip(codes.grids()).enumerate() {
                    self.tokens.extend((0..(h * w) as u32).map(|i| Token::Code(picture.id, input as u32, i)));
                }
                self.tokens.push(Token::Text(config.eoi()));
                let whole = config.context_last_scale;
                self.layout.push_context_image(&codes.scales, config.spatial_extent, whole);
            }
        }
    }
}

/// Embeddings of tokens, (1, T, hidden); `find` returns images by their ids.
pub(super) fn embed<'a>(
    reader: &Reader,
    tokens: &[Token],
    find: impl Fn(u64) -> Option<&'a Picture>,
) -> Result<Tensor> {
    let device = reader.device();
    let mut parts = Vec::new();
    for run in tokens.chunk_by(|a, b| (a.image(), a.input()) == (b.image(), b.input())) {
        let Some(id) = run[0].image() else {
            let ids: Vec<u32> =
                run.iter().filter_map(|t| if let Token::Text(id) = t { Some(*id) } else { None }).collect();
            parts.push(reader.embed_text(&Tensor::new(ids, device)?.unsqueeze(0)?)?);
            continue;
        };
        let picture = find(id).ok_or_else(|| Error::new(Kind::Failure, "an image is gone"))?;
        parts.push(match (&picture.encoding, run[0]) {
            (Encoding::Codes(codes), Token::Code(_, input, first)) => {
                let backbone = reader.backbone()?;
                let (input, dim) = (input as usize, backbone.config().code_dim);
                let features = &codes.inputs[input][first as usize * dim..][..run.len() * dim];
                let features = Tensor::from_slice(features, (1, run.len(), dim), device)?.to_dtype(backbone.dtype())?;
                backbone.embed_codes(&features, input + 1, &codes.scales)?
            }
            (Encoding::Patches(features, _), Token::Patch(_, first))
            | (Encoding::Features(features), Token::Feature(_, first)) => {
                features.narrow(0, first as usize, run.len())?.unsqueeze(0)?.to_dtype(reader.dtype())?
            }
            _ => return Err(Error::new(Kind::Failure, "an image is gone")),
        });
    }
    Ok(Tensor::cat(&parts, 1)?)
}
