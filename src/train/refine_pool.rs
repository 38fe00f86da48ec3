//! What the refiner learns from: pictures, and codes from which it is to restore them.
//!
//! Codes are of two kinds: those that the transformer draws from the picture's caption, so that the
//! refiner learns to repair what the transformer gets wrong, and the tokenizer's own of the
//! picture, with self-correction's noise or without the last scales.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::samples::{Sample, Samples};
use crate::dataset::{Canvas, SIDE};
use crate::error;
use crate::generate::{Batch, Event, Model, sampler};
use crate::pixels::{self, GridResampling};
use crate::rng::Rng;
use crate::scenes::BACKGROUNDS;
use crate::text::Text;
use crate::tokenizer::{ImageTokenizer, SelfCorrection};

/// Codes as the refiner sees them.
pub struct Coded {
    /// Their embeddings F, (h * w, D).
    pub features: Vec<f32>,
    /// The tokenizer's picture of them, (height, width, 3).
    pub picture: Vec<u8>,
}

/// How the picture of an item is rendered.
#[derive(Clone, Copy)]
enum Target {
    Single { picture: usize, background: Option<usize> },
    Several(u64),
    Scene(u64),
}

/// A picture and codes of it.
pub struct Item {
    target: Target,
    captions: Vec<Vec<u32>>,
    /// From which it is to be restored: any of them.
    pub coded: Vec<Coded>,
}

/// Sizes of the pool.
#[derive(Clone, Copy, Debug)]
pub struct RefinePoolSizes {
    /// Everyday things: the first so many.
    pub things: usize,
    /// Drawings of each of them by the transformer.
    pub draws: usize,
    /// Compositions of shapes.
    pub scenes: usize,
    /// Compositions of several everyday things.
    pub several: usize,
}

/// All items.
pub struct RefinePool<'a> {
    dataset: &'a Samples<'a>,
    /// Pixels of a target, along each side.
    side: usize,
    /// Single things; compositions.
    items: [Vec<Item>; 2],
}

/// Images encoded or drawn at once.
const BATCH: usize = 16;
/// Versions of a picture by the tokenizer's codes.
const ENCODED: usize = 2;
/// The fewest scales that a version keeps.
const FEWEST_SCALES: usize = 5;
/// Share of single things among the samples.
const SINGLES: f64 = 0.8;

impl<'a> RefinePool<'a> {
    /// Draws and encodes everything; targets have `side` pixels along each side.
    pub fn build(
        dataset: &'a Samples<'a>,
        (model, tokenizer, text): (&Model, &ImageTokenizer, &Text),
        correction: &SelfCorrection,
        sizes: RefinePoolSizes,
        side: usize,
    ) -> error::Result<Self> {
        let everyday = &dataset.everyday()[..sizes.things.min(dataset.everyday().len())];
        let singles = everyday.iter().enumerate().flat_map(|(i, &picture)| {
            let background = Some(i % BACKGROUNDS.len());
            [Target::Single { picture, background: None }, Target::Single { picture, background }]
        });
        let groups = if everyday.is_empty() { 0 } else { sizes.several as u64 };
        let composed = (0..groups).map(Target::Several).chain((0..sizes.scenes as u64).map(Target::Scene));
        let mut pool = Self { dataset, side, items: [Vec::new(), Vec::new()] };
        let targets: [Vec<Target>; 2] = [singles.collect(), composed.collect()];
        for (kind, targets) in targets.into_iter().enumerate() {
            for targets in targets.chunks(BATCH) {
                let samples: Vec<Sample> = targets.par_iter().map(|&target| pool.sample(target)).collect();
                let coded = pool.encode(&samples, tokenizer, correction)?;
                for ((&target, sample), coded) in targets.iter().zip(samples).zip(coded) {
                    let captions = sample.captions.iter().map(|c| text.encode(c)).collect::<error::Result<_>>()?;
                    pool.items[kind].push(Item { target, captions, coded });
                }
            }
        }
        pool.draw(model, tokenizer, sizes.draws)?;
        Ok(pool)
    }

    /// Items held.
    pub fn len(&self) -> usize {
        self.items.iter().map(Vec::len).sum()
    }

    /// Whether there is no item.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn sample(&self, target: Target) -> Sample {
        let side = self.side;
        match target {
            Target::Single { picture, background } => {
                self.dataset.single(picture, background.map(|i| &BACKGROUNDS[i]), side, side)
            }
            Target::Several(index) => self.dataset.several(self.dataset.everyday(), index, side),
            Target::Scene(index) => self.dataset.scene(index, side, side),
        }
    }

    /// The versions of pictures by the tokenizer's codes: one with self-correction's noise, the
    /// others without the last scales.
    fn encode(
        &self,
        samples: &[Sample],
        tokenizer: &ImageTokenizer,
        correction: &SelfCorrection,
    ) -> Result<Vec<Vec<Coded>>> {
        let device = tokenizer.quantizer().device();
        let rows: Vec<&[u8]> = samples.iter().map(|s| s.canvas.rgb.as_slice()).collect();
        let large = pixels::to_tensor(&rows, self.side, self.side, device)?;
        let small = GridResampling::area((self.side, self.side), (SIDE, SIDE)).channels_first(&large)?;
        let f = tokenizer.features(&small)?;
        let (_, h, w, d) = f.dims4()?;
        let f = f.flatten_all()?.to_vec1::<f32>()?;
        let scales = super::tokenizer::square_scales(h);
        let features: Vec<Vec<Vec<f32>>> = f
            .par_chunks_exact(h * w * d)
            .zip(samples)
            .map(|(f, sample)| {
                // Keyed by what is seen: the same in every run.
                let rng = self.dataset.rng(crate::rng::fnv1a(&sample.captions[0]), 40);
                let quantizer = tokenizer.quantizer();
                let versions = (0..ENCODED).map(|i| {
                    let noisy = (i == 0).then_some((correction, &rng));
                    let encoded = quantizer.encode(f, scales, noisy, |_, _, _| {});
                    let kept = match i {
                        0 => scales.len(),
                        i => FEWEST_SCALES + rng.below(1 << 40 | i as u64, scales.len() + 1 - FEWEST_SCALES),
                    };
                    quantizer.accumulate(&encoded.codes[..kept], scales, (h, w))
                });
                versions.collect()
            })
            .collect();
        features.into_iter().map(|versions| decode(versions, tokenizer, (h, w))).collect()
    }

    /// Adds what the transformer draws from captions of single things, each time another caption.
    fn draw(&mut self, model: &Model, tokenizer: &ImageTokenizer, draws: usize) -> error::Result<()> {
        let config = model.config();
        let square = super::tokenizer::square_scales(SIDE / config.tokenizer.cell());
        let sampling = &config.sampling;
        let grid = square.last().copied().unwrap_or((0, 0));
        for round in 0..draws {
            for first in (0..self.items[0].len()).step_by(BATCH) {
                let chunk = first..(first + BATCH).min(self.items[0].len());
                let targets: Vec<Target> = self.items[0][chunk.clone()].iter().map(|item| item.target).collect();
                let prompts: Vec<String> = targets.iter().map(|&target| self.prompt(target, round)).collect();
                let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
                let seeds: Vec<u64> = chunk.clone().map(|i| ((round as u64) << 32) | i as u64).collect();
                let mut codes = Vec::new();
                let mut observe = |event: Event| {
                    if let Event::Scale { codes: so_far, .. } = event {
                        codes = so_far.to_vec();
                    }
                    std::ops::ControlFlow::Continue(())
                };
                let batch = Batch { scales: square, sampling, seeds: &seeds };
                let images = model.draw_batch(&prompts, None, batch, &mut observe)?;
                let scales: Vec<_> =
                    codes.iter().map(sampler::to_host).collect::<std::result::Result<_, _>>().map_err(|fault| {
                        match fault {
                            sampler::Fault::Tensor(error) => error.into(),
                            sampler::Fault::NonFinite { .. } => error::Error::non_finite("codes"),
                        }
                    })?;
                for (i, image) in images.into_iter().enumerate() {
                    let codes: Vec<_> = scales.iter().map(|scale: &Vec<Vec<_>>| scale[i].clone()).collect();
                    let features = tokenizer.quantizer().accumulate(&codes, square, grid);
                    self.items[0][first + i].coded.push(Coded { features, picture: image.into_raw() });
                }
            }
        }
        Ok(())
    }

    /// What the transformer draws a single thing from: the canonical caption first, then others.
    fn prompt(&self, target: Target, round: usize) -> String {
        let captions = match target {
            Target::Single { picture, background } => {
                self.dataset.captions(picture, background.map(|i| &BACKGROUNDS[i]))
            }
            composed => self.sample(composed).captions,
        };
        captions[round.min(1) * (round * 5) % captions.len()].clone()
    }

    /// An item and one of its versions, for a sample.
    pub fn pick(&self, rng: &Rng) -> (&Item, &Coded) {
        let [singles, composed] = &self.items;
        let single = !singles.is_empty() && (composed.is_empty() || rng.uniform(0) < SINGLES);
        let items = if single { singles } else { composed };
        let item = &items[rng.below(1, items.len())];
        (item, &item.coded[rng.below(2, item.coded.len())])
    }

    /// The picture of an item, (side, side, 3).
    pub fn target(&self, item: &Item) -> Canvas {
        self.sample(item.target).canvas
    }
}

impl Item {
    /// The canonical caption 40% of the time, for it is what most people type, else any.
    pub fn caption(&self, rng: &Rng) -> &[u32] {
        let pick = if rng.uniform(3) < 0.4 { 0 } else { rng.below(4, self.captions.len()) };
        &self.captions[pick]
    }
}

/// The tokenizer's pictures of embeddings.
fn decode(versions: Vec<Vec<f32>>, tokenizer: &ImageTokenizer, (h, w): (usize, usize)) -> Result<Vec<Coded>> {
    let count = versions.len();
    let d = tokenizer.config().codebook.dim();
    let f = Tensor::from_vec(versions.concat(), (count, h, w, d), &Device::Cpu)?;
    let images = tokenizer.decode_features(&f.to_device(tokenizer.quantizer().device())?)?;
    let picture = |i: usize| pixels::to_image(&images.get(i)?, pixels::TOKENFLOW_GREY);
    let pictures: Vec<Vec<u8>> = (0..count)
        .map(|i| picture(i).map(|image| image.into_raw()))
        .collect::<error::Result<_>>()
        .map_err(|e| candle_core::Error::Msg(e.message))?;
    Ok(versions.into_iter().zip(pictures).map(|(features, picture)| Coded { features, picture }).collect())
}
