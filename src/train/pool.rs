//! Images already encoded: the transformer's training material, as the tokenizer's features before quantisation, so
//! that self-correction can draw other codes every time.

use candle_core::Device;

use super::sampler::{Sample, Sampler};
use crate::error::Result;
use crate::pixels;
use crate::rng::Rng;
use crate::scenes::BACKGROUNDS;
use crate::text::Text;
use crate::tokenizer::ImageTokenizer;

/// One image.
pub struct Item {
    /// Features before quantisation, (h * w, D).
    pub features: Vec<f32>,
    captions: Vec<Vec<u32>>,
}

impl Item {
    /// The canonical caption 40% of the time, for it is what most people type, else any.
    pub fn caption(&self, rng: &Rng) -> &[u32] {
        let pick = if rng.uniform(101) < 0.4 { 0 } else { rng.below(102, self.captions.len()) };
        &self.captions[pick]
    }
}

/// Sizes of the pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolSizes {
    /// Named backgrounds for every concept, beside white.
    pub backgrounds: usize,
    /// Compositions of shapes.
    pub scenes: usize,
    /// Compositions of two to four everyday things.
    pub several: usize,
}

/// All items by kind.
pub struct Pool {
    plain: Vec<Item>,
    coloured: Vec<Item>,
    scenes: Vec<Item>,
    several: Vec<Item>,
}

/// Images encoded at once.
const BATCH: usize = 16;

impl Pool {
    /// Renders and encodes everything.
    pub fn build(sampler: &Sampler, tokenizer: &ImageTokenizer, text: &Text, sizes: PoolSizes) -> Result<Self> {
        let side = crate::library::SIDE;
        let plain = sampler.everyday().iter().map(|&p| sampler.single(p, None, side, side));
        let coloured = (0..sizes.backgrounds).flat_map(|i| {
            sampler.everyday().iter().enumerate().map(move |(n, &p)| {
                let background = &BACKGROUNDS[(n * 7 + i * 3) % BACKGROUNDS.len()];
                sampler.single(p, Some(background), side, side)
            })
        });
        Ok(Self {
            plain: encode(plain, tokenizer, text)?,
            coloured: encode(coloured, tokenizer, text)?,
            scenes: encode((0..sizes.scenes as u64).map(|i| sampler.scene(i)), tokenizer, text)?,
            several: encode(
                (0..sizes.several as u64).map(|i| sampler.several(sampler.everyday(), i)),
                tokenizer,
                text,
            )?,
        })
    }

    /// Images held.
    pub fn len(&self) -> usize {
        [&self.plain, &self.coloured, &self.scenes, &self.several].iter().map(|p| p.len()).sum()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One item: single concepts 60%, most of them on white, shapes 34%, several things 6%.
    pub fn draw(&self, rng: &Rng) -> &Item {
        let kind = match rng.uniform(110) {
            u if u < 0.52 => &self.plain,
            u if u < 0.60 => &self.coloured,
            u if u < 0.94 => &self.scenes,
            _ => &self.several,
        };
        let kind = if kind.is_empty() { &self.plain } else { kind };
        &kind[rng.below(111, kind.len())]
    }
}

fn encode(samples: impl Iterator<Item = Sample>, tokenizer: &ImageTokenizer, text: &Text) -> Result<Vec<Item>> {
    let samples: Vec<Sample> = samples.collect();
    let mut items = Vec::with_capacity(samples.len());
    for batch in samples.chunks(BATCH) {
        let rows: Vec<&[u8]> = batch.iter().map(|s| s.canvas.rgb.as_slice()).collect();
        let (height, width) = (batch[0].canvas.height, batch[0].canvas.width);
        let f = tokenizer.features(&pixels::to_tensor(&rows, height, width, &Device::Cpu)?)?;
        let image = f.elem_count() / batch.len();
        let f = f.flatten_all()?.to_vec1::<f32>()?;
        for (sample, features) in batch.iter().zip(f.chunks_exact(image)) {
            let captions = sample.captions.iter().map(|c| text.encode(c)).collect::<Result<_>>()?;
            items.push(Item { features: features.to_vec(), captions });
        }
    }
    Ok(items)
}
