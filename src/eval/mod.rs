//! Measures a model: compositions judged by a detector, recognition of what it draws, and its
//! tokenizer's fidelity.

mod case;
mod compare;
mod compositions;
pub mod dialogues;
pub mod metrics;
mod report;
mod share;
pub mod sheet;
mod texture;
pub mod things;

use candle_core::Device;
use image::RgbImage;
use serde::Serialize;

pub use case::Case;
pub use compare::Comparison;
pub use compositions::{Category, OBLONG, Oblong, compositions, oblong};
pub use dialogues::{Dialogues, Examiner};
pub use report::Report;
pub use share::Share;
pub use things::{ThingEdits, thing_edits};

use crate::dataset::{Canvas, Dataset};
use crate::error::Result;
use crate::pixels::{self, ResamplingFilter};
use crate::tokenizer::ImageTokenizer;
use metrics::{nearest, psnr, ssim};
use texture::Summary;
pub use texture::Texture;

/// Draws a prompt with a seed.
pub type Draw<'a> = &'a mut dyn FnMut(&str, u64) -> Result<RgbImage>;

/// Takes an image through a tokenizer and back.
pub type Redraw<'a> = &'a dyn Fn(&RgbImage) -> Result<RgbImage>;

/// The image tokenizer of a model and how the model draws: all that pictures are compared with.
pub struct Subject<'a> {
    /// The tokenizer.
    pub tokenizer: &'a ImageTokenizer,
    /// Grids (height, width) of a square image, coarse to fine.
    pub scales: &'a [(usize, usize)],
    /// Where the tokenizer is.
    pub device: &'a Device,
}

/// How often the nearest of all true pictures is that of the concept.
#[derive(Clone, Debug, Serialize)]
pub struct Recognition {
    /// Concepts drawn.
    pub concepts: usize,
    /// Pictures to choose among.
    pub gallery: usize,
    /// Drawn images, by features of the semantic encoder.
    pub semantic: Share,
    /// True pictures after encoding and decoding, by features of the semantic encoder.
    pub ceiling_semantic: Share,
    /// Drawn images compared with the originals, if they are there.
    pub texture: Option<Texture>,
    /// True pictures after encoding and decoding, compared with the originals.
    pub ceiling_texture: Option<Texture>,
}

/// How close images come back from the tokenizer.
#[derive(Clone, Debug, Serialize)]
pub struct Fidelity {
    /// Number of images.
    pub pictures: usize,
    /// Mean of the images' PSNR, dB.
    pub psnr: f64,
    /// Mean of the images' SSIM.
    pub ssim: f64,
}

/// Pictures of held-out concepts, which the tokenizer was not trained on, through encoding and
/// decoding.
#[derive(Clone, Debug, Serialize)]
pub struct Reconstruction {
    /// In the style that the model draws in.
    pub three_d: Fidelity,
    /// In every style.
    pub all_styles: Fidelity,
}

const WHITE: [u8; 3] = [255; 3];

impl Subject<'_> {
    /// A picture on white, as large as the model draws.
    fn picture(&self, library: &Dataset, picture: usize) -> Result<RgbImage> {
        let stride = self.tokenizer.config().encoder.stride();
        let side = self.scales.last().map_or(0, |&(h, w)| h.min(w)) * stride;
        let mut canvas = Canvas::new(side, side, WHITE);
        library.compose(&mut canvas, picture, (0, 0), side);
        RgbImage::from_raw(side as u32, side as u32, canvas.rgb)
            .ok_or_else(|| candle_core::Error::Msg("a canvas of the wrong size".into()).into())
    }

    fn tensor(&self, image: &RgbImage) -> Result<candle_core::Tensor> {
        Ok(pixels::to_tensor(&[image.as_raw()], image.height() as usize, image.width() as usize, self.device)?)
    }

    /// An image through encoding and decoding.
    pub fn reconstruct(&self, image: &RgbImage) -> Result<RgbImage> {
        let encoded = self.tokenizer.encode(&self.tensor(image)?, self.scales)?;
        let codes = encoded.first().map_or(&[][..], |e| &e.codes);
        self.tokenizer.decode_image(codes, self.scales)
    }

    /// The semantic encoder's features of an image.
    fn features(&self, image: &RgbImage) -> Result<Vec<f32>> {
        Ok(self.tokenizer.semantic().embed(&self.tensor(image)?)?.flatten_all()?.to_vec1()?)
    }

    /// A refined image in the size that the tokenizer decodes; others as they are.
    pub fn reduced(&self, image: RgbImage) -> RgbImage {
        let cell = self.tokenizer.config().cell();
        let (h, w) = self.scales.last().map_or((0, 0), |&(h, w)| ((h * cell) as u32, (w * cell) as u32));
        if image.dimensions() == (w, h) { image } else { pixels::resize(&image, (w, h), ResamplingFilter::Box) }
    }
}

/// The everyday concepts with a picture in the model's style, and the picture, in order.
fn drawable(library: &Dataset) -> Vec<(usize, usize)> {
    let mut concepts: Vec<usize> = library.everyday(false).chain(library.everyday(true)).collect();
    concepts.sort_unstable();
    concepts.into_iter().filter_map(|c| Some((c, library.drawn(c)?))).collect()
}

/// At most `limit` of `n`, evenly spread.
fn spread(n: usize, limit: Option<usize>) -> impl Iterator<Item = usize> {
    let count = limit.unwrap_or(n).min(n);
    (0..count).map(move |i| i * n / count)
}

/// How many images [`recognition`] draws.
pub fn recognisable(library: &Dataset, limit: Option<usize>) -> usize {
    spread(drawable(library).len(), limit).count()
}

/// Draws every everyday concept, or `limit` of them, by its canonical caption, looks for the
/// nearest among the true pictures of all, and compares textures with the `originals`, the same
/// pictures in the size that a refiner draws.
pub fn recognition(
    subject: &Subject,
    library: &Dataset,
    originals: Option<&Dataset>,
    draw: Draw,
    limit: Option<usize>,
    seed: u64,
) -> Result<Recognition> {
    let concepts = drawable(library);
    let mut gallery = Vec::new();
    for &(_, picture) in &concepts {
        gallery.push(subject.features(&subject.picture(library, picture)?)?);
    }
    let (mut right, mut summaries) = ([Share::default(), Share::default()], [Summary::default(), Summary::default()]);
    let (mut truth, mut count) = (Summary::default(), 0);
    for i in spread(concepts.len(), limit) {
        let (concept, picture) = concepts[i];
        let caption = library.caption(concept);
        let back = subject.reconstruct(&subject.picture(library, picture)?)?;
        let label = &library.concepts[concept].label;
        let original = originals.and_then(|o| Some((o, o.drawn(o.find(label)?)?)));
        for (j, image) in [draw(&caption, seed)?, back].into_iter().enumerate() {
            let features = subject.features(&subject.reduced(image.clone()))?;
            right[j].push(nearest(&features, &gallery) == Some(i));
            if let Some((originals, _)) = original {
                let side = originals.side() as u32;
                let large = pixels::resize(&image, (side, side), ResamplingFilter::Bicubic);
                summaries[j].add(large.as_raw(), side as usize, features);
            }
        }
        if let Some((originals, picture)) = original {
            truth.add(&originals.over(picture, WHITE), originals.side(), gallery[i].clone());
        }
        count += 1;
    }
    let [semantic, ceiling_semantic] = right;
    let texture = |i: usize| originals.map(|_| summaries[i].texture(&truth)).transpose();
    Ok(Recognition {
        concepts: count,
        gallery: concepts.len(),
        semantic,
        ceiling_semantic,
        texture: texture(0)?,
        ceiling_texture: texture(1)?,
    })
}

/// Encodes and decodes the pictures of all held-out concepts.
pub fn reconstruction(subject: &Subject, library: &Dataset) -> Result<Reconstruction> {
    // Sums: count, PSNR, SSIM.
    let (mut three_d, mut all) = ([0.0; 3], [0.0; 3]);
    for (i, picture) in library.pictures.iter().enumerate() {
        if !library.concepts[picture.concept].held_out {
            continue;
        }
        let image = subject.picture(library, i)?;
        let back = subject.reconstruct(&image)?;
        let values = [1.0, psnr(&image, &back), ssim(&image, &back)];
        let add = |sum: &mut [f64; 3]| sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
        add(&mut all);
        if picture.is_drawn() {
            add(&mut three_d);
        }
    }
    let mean = |[n, psnr, ssim]: [f64; 3]| {
        let count = n.max(1.0);
        Fidelity { pictures: n as usize, psnr: psnr / count, ssim: ssim / count }
    };
    Ok(Reconstruction { three_d: mean(three_d), all_styles: mean(all) })
}

#[cfg(test)]
mod tests;
