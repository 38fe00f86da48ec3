//! Images already encoded: the transformer's training material, as the tokenizer's features before
//! quantisation, so that self-correction can draw other codes every time.

use rayon::prelude::*;

use super::samples::{Sample, Samples};
use crate::error::Result;
use crate::generate::schedule;
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
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolSizes {
    /// Number of everyday things, from the first.
    pub things: usize,
    /// Named backgrounds for every concept, beside white.
    pub backgrounds: usize,
    /// Compositions of shapes.
    pub scenes: usize,
    /// Compositions of two to four everyday things.
    pub several: usize,
    /// Images of each aspect ratio other than 1:1, half of them compositions of shapes.
    pub oblong: usize,
}

impl PoolSizes {
    fn things<'a>(&self, dataset: &'a Samples) -> &'a [usize] {
        let all = dataset.everyday();
        &all[..self.things.min(all.len())]
    }
}

/// All items of one aspect ratio, by kind.
pub struct Shelf {
    /// (height, width) of every scale.
    pub grids: &'static [(usize, usize)],
    plain: Vec<Item>,
    coloured: Vec<Item>,
    scenes: Vec<Item>,
    several: Vec<Item>,
}

/// All items: square ones, and some of other aspect ratios.
pub struct Pool {
    square: Shelf,
    oblong: Vec<Shelf>,
}

/// Images encoded at once.
const BATCH: usize = 64;
/// Height over width of the other aspect ratios that are trained: what lies between and beyond is
/// left to the positions, which are relative to the image's extent. Beyond 2:1 the grids are too low
/// for nano's image tokenizer to show shapes.
const RATIOS: [f64; 8] = [0.5, 9.0 / 16.0, 2.0 / 3.0, 0.75, 4.0 / 3.0, 1.5, 16.0 / 9.0, 2.0];
/// One batch of captioned images in this many is not square.
const OBLONG: usize = 4;
/// Share of shapes in such a batch, at least: dialogues, which have many, are square.
const OBLONG_SHAPES: f64 = 0.6;

impl Pool {
    /// Renders and encodes everything, for images of `scales` scales.
    pub fn build(
        dataset: &Samples,
        tokenizer: &ImageTokenizer,
        text: &Text,
        sizes: PoolSizes,
        scales: usize,
    ) -> Result<Self> {
        let oblong = RATIOS.iter().enumerate().filter(|_| sizes.oblong > 0);
        let oblong = oblong.map(|(i, &ratio)| {
            let grids = schedule::nearest_of(ratio, scales).prefix(scales);
            let stride = tokenizer.config().encoder.stride();
            let (h, w) = grids.last().map_or((0, 0), |&(h, w)| (h * stride, w * stride));
            let everyday = sizes.things(dataset);
            let singles = if everyday.is_empty() { 0 } else { sizes.oblong / 2 };
            let single = |n: usize| {
                let background = BACKGROUNDS.get(n % (2 * BACKGROUNDS.len()));
                dataset.single(everyday[(n * RATIOS.len() + i) % everyday.len()], background, w, h)
            };
            let scene = |n: usize| dataset.scene((1 << 32 | i << 24 | n) as u64, w, h);
            Ok(Shelf {
                grids,
                plain: encode(singles, single, tokenizer, text)?,
                coloured: Vec::new(),
                scenes: encode(sizes.oblong / 2, scene, tokenizer, text)?,
                several: Vec::new(),
            })
        });
        let oblong = oblong.collect::<Result<_>>()?;
        Ok(Self { square: Shelf::square(dataset, tokenizer, text, sizes, scales)?, oblong })
    }

    /// Images held.
    pub fn len(&self) -> usize {
        self.oblong.iter().chain([&self.square]).map(Shelf::len).sum()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a shelf is that of the square images.
    pub fn is_square(&self, shelf: &Shelf) -> bool {
        shelf.grids == self.square.grids
    }

    /// The images that the batch of a step is drawn from: all of one aspect ratio.
    pub fn shelf(&self, step: usize) -> &Shelf {
        let other = if step % OBLONG == OBLONG - 1 { self.oblong.get(step / OBLONG % RATIOS.len()) } else { None };
        other.unwrap_or(&self.square)
    }
}

impl Shelf {
    fn square(
        dataset: &Samples,
        tokenizer: &ImageTokenizer,
        text: &Text,
        sizes: PoolSizes,
        scales: usize,
    ) -> Result<Self> {
        let side = crate::dataset::SIDE;
        let everyday = sizes.things(dataset);
        let plain = |n: usize| dataset.single(everyday[n], None, side, side);
        let coloured = |i: usize| {
            let (i, n) = (i / everyday.len(), i % everyday.len());
            let background = &BACKGROUNDS[(n * 7 + i * 3) % BACKGROUNDS.len()];
            dataset.single(everyday[n], Some(background), side, side)
        };
        let scene = |i: usize| dataset.scene(i as u64, side, side);
        let several = |i: usize| dataset.several(everyday, i as u64, side);
        let groups = if everyday.is_empty() { 0 } else { sizes.several };
        Ok(Self {
            grids: schedule::nearest(1.0).prefix(scales),
            plain: encode(everyday.len(), plain, tokenizer, text)?,
            coloured: encode(sizes.backgrounds * everyday.len(), coloured, tokenizer, text)?,
            scenes: encode(sizes.scenes, scene, tokenizer, text)?,
            several: encode(groups, several, tokenizer, text)?,
        })
    }

    fn len(&self) -> usize {
        [&self.plain, &self.coloured, &self.scenes, &self.several].iter().map(|p| p.len()).sum()
    }

    /// One item: a share of `shapes`, or more where images are oblong; of the others single
    /// concepts on white 77%, on a colour 11.5%, several things 11.5%; of the kinds that there are.
    pub fn sample(&self, rng: &Rng, shapes: f64) -> &Item {
        let is_square = self.grids.last().is_some_and(|(h, w)| h == w);
        let shapes = if is_square { shapes } else { shapes.max(OBLONG_SHAPES) };
        let things = |share: f64| share * (1.0 - shapes);
        let kinds = [
            (&self.plain, things(0.77)),
            (&self.coloured, things(0.115)),
            (&self.scenes, shapes),
            (&self.several, things(0.115)),
        ];
        let there = || kinds.iter().filter(|(items, _)| !items.is_empty());
        let mut rest = rng.uniform(110) * there().map(|(_, share)| share).sum::<f64>();
        let drawn = there().find(|(_, share)| {
            rest -= share;
            rest < 0.0
        });
        let items = drawn.or(there().next_back()).map_or(&self.plain, |(items, _)| items);
        &items[rng.below(111, items.len())]
    }
}

/// Renders and encodes `count` images of one size.
fn encode(
    count: usize,
    sample: impl Fn(usize) -> Sample + Sync,
    tokenizer: &ImageTokenizer,
    text: &Text,
) -> Result<Vec<Item>> {
    let mut items = Vec::with_capacity(count);
    for first in (0..count).step_by(BATCH) {
        let samples: Vec<Sample> = (first..count.min(first + BATCH)).into_par_iter().map(&sample).collect();
        let rows: Vec<&[u8]> = samples.iter().map(|s| s.canvas.rgb.as_slice()).collect();
        let (height, width) = (samples[0].canvas.height, samples[0].canvas.width);
        let f = tokenizer.features(&pixels::to_tensor(&rows, height, width, tokenizer.quantizer().device())?)?;
        let image = f.elem_count() / samples.len();
        let f = f.flatten_all()?.to_vec1::<f32>()?;
        let item = |(sample, features): (&Sample, &[f32])| {
            let captions = sample.captions.iter().map(|c| text.encode(c)).collect::<Result<_>>()?;
            Ok(Item { features: features.to_vec(), captions })
        };
        let more: Vec<Item> = samples.par_iter().zip(f.par_chunks_exact(image)).map(item).collect::<Result<_>>()?;
        items.extend(more);
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Sampling, Size};
    use crate::train::tests;

    #[test]
    fn oblong_images_are_learnt_on_the_grids_that_they_are_drawn_on() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (run, library) = (tests::run(&folder)?, tests::library());
        let recipe = &run.recipe;
        let (tokenizer, _) = run.load(&[], |w| ImageTokenizer::load(w, &recipe.tokenizer))?;
        let dataset = Samples::new(&library, 1)?;
        let sizes = PoolSizes { things: 0, backgrounds: 0, scenes: 0, several: 0, oblong: 2 };
        let pool = Pool::build(&dataset, &tokenizer, &tests::text()?, sizes, recipe.scales)?;
        let config = recipe.model(recipe.tokenizer.clone(), Sampling::default());
        for (i, ratio) in RATIOS.into_iter().enumerate() {
            let shelf = pool.shelf(OBLONG * (i + 1) - 1);
            assert_eq!(shelf.grids, Size::Ratio(ratio).grids(&config)?, "{ratio}");
            let (h, w) = shelf.grids[recipe.scales - 1];
            assert_eq!(shelf.scenes[0].features.len(), h * w * recipe.backbone.code_dim);
        }
        Ok(())
    }
}
