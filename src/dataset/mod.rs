//! The picture library: concepts ("red apple") with captions and pictures, for training and
//! evaluation.
//!
//! One safetensors file: the tensor `rgba`, u8, (pictures, side, side, 4), straight alpha, and in
//! the metadata under `library` the JSON of [`Concept`]s and [`CaptionedImage`]s.
//! `nextflow train data` writes it; other fields of older versions are ignored.

mod folder;
mod words;

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::rng::fnv1a;
pub use words::with_article;

/// Width and height of every picture in pixels, but for the targets of the refiner.
pub const SIDE: usize = 128;
/// Bytes of one picture: `SIDE` x `SIDE` x RGBA.
pub const BYTES: usize = SIDE * SIDE * 4;
/// The most pixels of a side.
const MAX_SIDE: usize = 1024;

const HINT: &str = "in a checkout: sh src/train/fetch-data.sh data && cargo run --release --features train -- train data, \
    or of images of your own: train data --folder DIR";

/// A concept that pictures show: a thing with names, from which captions are made, or with its own
/// captions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Concept {
    /// Name of the concept: the English label of emojibase, "red apple", or the first of its own
    /// captions.
    pub label: String,
    /// Names that a person would type, the canonical one first ("car" for the label "automobile"),
    /// then synonyms; no two everyday concepts share a name. There may be none where there are
    /// captions.
    #[serde(default)]
    pub names: Vec<String>,
    /// Chinese label, "红苹果", or nothing.
    #[serde(default)]
    pub label_zh: String,
    /// Captions of its own, in any language, the canonical one first: see [`Dataset::captions`].
    #[serde(default)]
    pub captions: Vec<String>,
    /// Whether models learn to draw it; the other concepts only train the image tokenizer.
    pub everyday: bool,
    /// Whether it is excluded from training, for evaluation: see [`held_out`].
    pub held_out: bool,
}

/// Drawing style of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Style {
    /// Fluent Emoji, 3D.
    #[serde(rename = "3d")]
    ThreeD,
    /// Fluent Emoji, flat.
    #[serde(rename = "flat")]
    Flat,
    /// Noto Emoji.
    #[serde(rename = "noto")]
    Noto,
}

/// What one picture shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptionedImage {
    /// Index into [`Dataset::concepts`].
    pub concept: usize,
    /// Its drawing style, if it is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style: Option<Style>,
}

impl CaptionedImage {
    /// Whether models learn to draw it: pictures in the 3D style, and those without a style.
    pub fn is_drawn(&self) -> bool {
        matches!(self.style, None | Some(Style::ThreeD))
    }
}

/// The metadata of the file.
#[derive(Serialize, Deserialize)]
struct Index {
    concepts: Vec<Concept>,
    pictures: Vec<CaptionedImage>,
}

/// An RGB image to paste pictures on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canvas {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// (height, width, 3), row by row.
    pub rgb: Vec<u8>,
}

impl Canvas {
    /// A canvas of one colour.
    pub fn new(width: usize, height: usize, background: [u8; 3]) -> Self {
        Self { width, height, rgb: background.repeat(width * height) }
    }

    /// Seen in a mirror: left is right.
    pub fn mirrored(mut self) -> Self {
        for row in self.rgb.chunks_exact_mut(3 * self.width) {
            for x in 0..self.width / 2 {
                (0..3).for_each(|c| row.swap(3 * x + c, 3 * (self.width - 1 - x) + c));
            }
        }
        self
    }
}

/// Concepts and their pictures, in memory.
pub struct Dataset {
    /// In the order of the Unicode emoji list, or of the files that they are from.
    pub concepts: Vec<Concept>,
    /// What each picture shows, in the order of the pixels.
    pub pictures: Vec<CaptionedImage>,
    /// Width and height of every picture, in pixels.
    side: usize,
    /// Holds the pixels, (pictures, side, side, 4), from byte `start` on.
    bytes: Vec<u8>,
    start: usize,
}

impl Dataset {
    /// A library of these parts; `rgba` is (pictures, 128, 128, 4), straight alpha.
    pub fn new(concepts: Vec<Concept>, pictures: Vec<CaptionedImage>, rgba: Vec<u8>) -> Result<Self> {
        Self::of_side(SIDE, concepts, pictures, rgba)
    }

    /// As [`Self::new`], with pictures of another side.
    pub fn of_side(side: usize, concepts: Vec<Concept>, pictures: Vec<CaptionedImage>, rgba: Vec<u8>) -> Result<Self> {
        Self::checked(Index { concepts, pictures }, side, rgba, 0)
    }

    fn checked(index: Index, side: usize, bytes: Vec<u8>, start: usize) -> Result<Self> {
        let Index { concepts, pictures } = index;
        if bytes.len() < start || bytes.len() - start != pictures.len() * side * side * 4 {
            return Err(
                Error::model(format!("picture library lists {} pictures but holds others", pictures.len())).hint(HINT)
            );
        }
        if let Some(p) = pictures.iter().find(|p| p.concept >= concepts.len()) {
            return Err(Error::model(format!("picture library has no concept {}", p.concept)).hint(HINT));
        }
        if let Some(c) = concepts.iter().find(|c| c.names.is_empty() && c.captions.is_empty()) {
            return Err(Error::model(format!("picture library has no name or caption for {}", c.label)).hint(HINT));
        }
        Ok(Self { concepts, pictures, side, bytes, start })
    }

    /// Reads the library at `path` into memory.
    ///
    /// Errors: there is no such file, or it is truncated, not a picture library or one whose
    /// pictures have another side than [`SIDE`]; the hint says how to build one.
    pub fn load(path: &Path) -> Result<Self> {
        let library = Self::load_any(path)?;
        match library.side {
            SIDE => Ok(library),
            side => {
                Err(Error::usage(format!("{} has pictures of {side} pixels, not {SIDE}", path.display())).hint(HINT))
            }
        }
    }

    /// As [`Self::load`], with pictures of any side.
    pub fn load_any(path: &Path) -> Result<Self> {
        let bad = |why: String| Error::model(format!("{} is not a picture library: {why}", path.display())).hint(HINT);
        let bytes = std::fs::read(path).map_err(|e| {
            Error::new(Kind::Usage, format!("cannot read the picture library {}: {e}", path.display())).hint(HINT)
        })?;
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let json = metadata.metadata().as_ref().and_then(|m| m.get("library"));
        let json = json.ok_or_else(|| bad("it has no list of concepts".into()))?;
        let index: Index = serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        let rgba = metadata.info("rgba").ok_or_else(|| bad("it has no tensor `rgba`".into()))?;
        let side = rgba.shape.get(1).copied().filter(|side| (1..=MAX_SIDE).contains(side)).unwrap_or(SIDE);
        let shape = [index.pictures.len(), side, side, 4];
        if rgba.dtype != Dtype::U8 || rgba.shape != shape {
            return Err(bad(format!("`rgba` is {:?} {:?}, not U8 {shape:?}", rgba.dtype, rgba.shape)));
        }
        // The tensor data begin after the length of the header (8 bytes) and the header.
        let start = 8 + header + rgba.data_offsets.0;
        Self::checked(index, side, bytes, start)
    }

    /// Writes the library to `path`, which appears complete or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let fail = |e: String| Error::new(Kind::Failure, format!("cannot write {}: {e}", path.display()));
        let index = Index { concepts: self.concepts.clone(), pictures: self.pictures.clone() };
        let json = serde_json::to_string(&index).map_err(|e| fail(e.to_string()))?;
        let rgba =
            TensorView::new(Dtype::U8, vec![self.pictures.len(), self.side, self.side, 4], &self.bytes[self.start..])
                .map_err(|e| fail(e.to_string()))?;
        let folder = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(folder).map_err(|e| fail(e.to_string()))?;
        let file = tempfile::NamedTempFile::new_in(folder).map_err(|e| fail(e.to_string()))?;
        let metadata = HashMap::from([("library".to_string(), json)]);
        safetensors::serialize_to_file([("rgba", rgba)], Some(metadata), file.path())
            .map_err(|e| fail(e.to_string()))?;
        file.persist(path).map_err(|e| fail(e.error.to_string()))?;
        Ok(())
    }

    /// Width and height of every picture, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// The pixels of a picture: (side, side, 4), straight alpha.
    pub fn rgba(&self, picture: usize) -> &[u8] {
        let bytes = self.side * self.side * 4;
        &self.bytes[self.start + picture * bytes..][..bytes]
    }

    /// Whether no background shows behind a picture.
    pub fn is_opaque(&self, picture: usize) -> bool {
        self.rgba(picture).iter().skip(3).step_by(4).all(|&alpha| alpha == 255)
    }

    /// A picture on a background: RGB, (side, side, 3).
    pub fn over(&self, picture: usize, background: [u8; 3]) -> Vec<u8> {
        let pixels = self.rgba(picture).chunks_exact(4);
        pixels.flat_map(|p| [0, 1, 2].map(|c| blend(p[c].into(), background[c], p[3] as f32 / 255.0))).collect()
    }

    /// Pastes a picture, scaled to `size` x `size` pixels by area, with its top left corner at
    /// (`x`, `y`); parts outside the canvas are clipped.
    pub fn compose(&self, canvas: &mut Canvas, picture: usize, (x, y): (i32, i32), size: usize) {
        let pixels = resize(self.rgba(picture), self.side, size);
        for (row, line) in pixels.chunks_exact(size.max(1)).enumerate() {
            let Some(top) = inside(y, row, canvas.height) else { continue };
            for (column, &[r, g, b, alpha]) in line.iter().enumerate() {
                let Some(left) = inside(x, column, canvas.width) else { continue };
                if alpha > 0.0 {
                    let at = 3 * (top * canvas.width + left);
                    for (to, colour) in canvas.rgb[at..at + 3].iter_mut().zip([r, g, b]) {
                        *to = blend(255.0 * colour / alpha, *to, alpha / 255.0);
                    }
                }
            }
        }
    }

    /// The concept of this label or name, letter case ignored.
    pub fn find(&self, name: &str) -> Option<usize> {
        let name = name.to_lowercase();
        let is = |other: &String| other.to_lowercase() == name;
        let by_label = self.concepts.iter().position(|c| is(&c.label));
        by_label.or_else(|| self.concepts.iter().position(|c| c.names.iter().any(is)))
    }

    /// The picture of a concept in a style.
    pub fn picture(&self, concept: usize, style: Style) -> Option<usize> {
        self.pictures.iter().position(|p| *p == CaptionedImage { concept, style: Some(style) })
    }

    /// The first picture of a concept that models learn to draw.
    pub fn drawn(&self, concept: usize) -> Option<usize> {
        self.pictures.iter().position(|p| p.concept == concept && p.is_drawn())
    }

    /// The everyday concepts that are held out, or those that are not.
    pub fn everyday(&self, held_out: bool) -> impl Iterator<Item = usize> + '_ {
        let kept = move |c: &Concept| c.everyday && c.held_out == held_out;
        self.concepts.iter().enumerate().filter(move |(_, c)| kept(c)).map(|(i, _)| i)
    }

    /// The canonical caption of a concept, which is also a noun phrase where the concept has a
    /// name: "a red apple".
    pub fn caption(&self, concept: usize) -> String {
        let Concept { captions, names, .. } = &self.concepts[concept];
        captions.first().cloned().unwrap_or_else(|| with_article(&names[0]))
    }

    /// Captions that a person might type for a concept: its own captions; else the canonical
    /// caption first ("a red apple"), then other forms, synonyms and Chinese.
    pub fn captions(&self, concept: usize) -> Vec<String> {
        let concept = &self.concepts[concept];
        if !concept.captions.is_empty() {
            return concept.captions.clone();
        }
        let mut captions = Vec::new();
        for (i, name) in concept.names.iter().enumerate() {
            let phrase = with_article(name);
            if i == 0 {
                captions.extend([phrase.clone(), name.clone()]);
                captions
                    .extend(["a picture of", "an image of", "a drawing of", "draw"].map(|f| format!("{f} {phrase}")));
            } else {
                captions.extend([phrase, name.clone()]);
            }
        }
        if !concept.label_zh.is_empty() {
            captions.push(concept.label_zh.clone());
            captions.push(format!("一张{}的图片", concept.label_zh));
        }
        // Without an article the phrase is the name.
        let mut seen = std::collections::HashSet::new();
        captions.retain(|c| seen.insert(c.clone()));
        captions
    }
}

/// Whether the concept of this identity, an emoji's hexcode or the first of its own captions, is
/// excluded from training: one in ten, by a fixed hash.
pub fn held_out(identity: &str) -> bool {
    fnv1a(identity).is_multiple_of(10)
}

/// `colour` (0 to 255) at `alpha` (0 to 1) over `below`, rounded.
fn blend(colour: f32, below: u8, alpha: f32) -> u8 {
    (below as f32 + (colour - below as f32) * alpha).round() as u8
}

/// `origin + offset` if it is within `0..limit`.
fn inside(origin: i32, offset: usize, limit: usize) -> Option<usize> {
    usize::try_from(origin as i64 + offset as i64).ok().filter(|&at| at < limit)
}

/// For each of `size` pixels, the pixels of the `side` that it covers and the share of each.
fn shares(side: usize, size: usize) -> Vec<Vec<(usize, f32)>> {
    let ratio = side as f32 / size as f32;
    let share = |i: usize| {
        let (from, to) = (i as f32 * ratio, ((i + 1) as f32 * ratio).min(side as f32));
        let covered = from as usize..(to.ceil() as usize).min(side);
        covered.map(|s| (s, (to.min((s + 1) as f32) - from.max(s as f32)).max(0.0) / ratio)).collect()
    };
    (0..size).map(share).collect()
}

/// A picture of straight alpha scaled by area to (size, size), alpha premultiplied, all channels on
/// 0 to 255.
fn resize(rgba: &[u8], side: usize, size: usize) -> Vec<[f32; 4]> {
    let add = |sum: &mut [f32; 4], p: &[f32; 4], w: f32| (0..4).for_each(|c| sum[c] += w * p[c]);
    let premultiply = |p: &[u8]| {
        let alpha = p[3] as f32;
        [p[0] as f32 * alpha / 255.0, p[1] as f32 * alpha / 255.0, p[2] as f32 * alpha / 255.0, alpha]
    };
    let pixels: Vec<[f32; 4]> = rgba.chunks_exact(4).map(premultiply).collect();
    let shares = shares(side, size);
    let mut narrow = vec![[0.0; 4]; side * size];
    for (to, from) in narrow.chunks_exact_mut(size.max(1)).zip(pixels.chunks_exact(side)) {
        for (sum, share) in to.iter_mut().zip(&shares) {
            share.iter().for_each(|&(s, w)| add(sum, &from[s], w));
        }
    }
    let mut out = vec![[0.0; 4]; size * size];
    for (to, share) in out.chunks_exact_mut(size.max(1)).zip(&shares) {
        for &(s, w) in share {
            to.iter_mut().zip(&narrow[s * size..]).for_each(|(sum, p)| add(sum, p, w));
        }
    }
    out
}

#[cfg(test)]
mod tests;
