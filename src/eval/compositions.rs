//! GenEval's six categories, on compositions that no model was trained on or, to see the
//! difference, on others.

use image::RgbImage;
use serde::Serialize;

use super::{Draw, Redraw, Share};
use crate::error::{Error, Kind as Failure, Result};
use crate::rng::{Rng, Stream};
use crate::scenes::detector::detect;
use crate::scenes::judge::judge;
use crate::scenes::{KINDS, Kind, Scene, Split};

/// Shares of right images.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Drawn {
    /// Among those the model drew.
    pub score: Share,
    /// Score of the rendered scenes of the same prompts after encoding and decoding: the limit of
    /// the tokenizer.
    pub ceiling: Share,
    /// Score of the rendered scenes of the same prompts: the limit of the detector.
    pub ground_truth: Share,
}

/// Those of one category.
#[derive(Clone, Debug, Serialize)]
pub struct Category {
    /// Which one.
    pub kind: Kind,
    /// The shares.
    #[serde(flatten)]
    pub drawn: Drawn,
}

/// Those of one aspect ratio, with compositions of all categories in turn.
#[derive(Clone, Debug, Serialize)]
pub struct Oblong {
    /// Width to height, "16:9".
    pub ratio: &'static str,
    /// The shares.
    #[serde(flatten)]
    pub drawn: Drawn,
}

impl Drawn {
    /// Draws a composition, judges it, and adds what came of it.
    fn add(&mut self, draw: Draw, redraw: Redraw, scene: &Scene, seed: u64) -> Result<()> {
        let image = draw(&scene.prompt(), seed)?;
        let (width, height) = image.dimensions();
        let truth = RgbImage::from_raw(width, height, scene.render(width as usize, height as usize))
            .ok_or_else(|| Error::new(Failure::Failure, "a rendered scene has the wrong size"))?;
        self.score.push(judge(scene, &detect(&image)));
        self.ceiling.push(judge(scene, &detect(&redraw(&truth)?)));
        self.ground_truth.push(judge(scene, &detect(&truth)));
        Ok(())
    }
}

/// Draws `per_kind` compositions of every category, the i-th with seed `seed + i`, and judges them.
/// `redraw` takes an image through the tokenizer and back.
pub fn compositions(draw: Draw, redraw: Redraw, split: Split, per_kind: usize, seed: u64) -> Result<Vec<Category>> {
    let category = |(step, kind): (u64, Kind)| {
        let mut drawn = Drawn::default();
        for i in 0..per_kind as u64 {
            let scene = Scene::of_kind(&Rng::new(seed, i, Stream::Train, 100 + step), kind, split);
            drawn.add(draw, redraw, &scene, seed.wrapping_add(i))?;
        }
        Ok(Category { kind, drawn })
    };
    (0..).zip(KINDS).map(category).collect()
}

/// Aspect ratios of [`oblong`], width to height: two that people ask for most often, and the
/// widest.
pub const OBLONG: [&str; 3] = ["16:9", "9:16", "4:1"];

/// Draws `count` compositions in one aspect ratio, of the categories in turn, and judges them as
/// [`compositions`] does. `draw` and `redraw` are for images of the ratio.
pub fn oblong(
    ratio: &'static str,
    draw: Draw,
    redraw: Redraw,
    split: Split,
    count: usize,
    seed: u64,
) -> Result<Oblong> {
    let mut drawn = Drawn::default();
    for i in 0..count {
        let scene = Scene::of_kind(&Rng::new(seed, i as u64, Stream::Train, 700), KINDS[i % KINDS.len()], split);
        drawn.add(draw, redraw, &scene, seed.wrapping_add(i as u64))?;
    }
    Ok(Oblong { ratio, drawn })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blank_image_is_never_right_and_the_truth_always() {
        let mut calls = Vec::new();
        let mut blank = |prompt: &str, seed: u64| {
            calls.push((prompt.to_string(), seed));
            Ok(RgbImage::from_pixel(128, 128, image::Rgb([255; 3])))
        };
        let same = |image: &RgbImage| Ok(image.clone());
        let categories = compositions(&mut blank, &same, Split::HeldOut, 5, 7).unwrap();
        assert_eq!(categories.len(), 6);
        let right = |d: &Drawn| [&d.score, &d.ceiling, &d.ground_truth].map(Share::value) == [0.0, 1.0, 1.0];
        assert!(categories.iter().all(|c| right(&c.drawn)), "{categories:?}");
        assert_eq!((calls.len(), calls[0].1, calls[4].1), (30, 7, 11));
        // In a wide image the truth is right too.
        let mut wide = |_: &str, _: u64| Ok(RgbImage::from_pixel(256, 64, image::Rgb([255; 3])));
        let wide = oblong("4:1", &mut wide, &same, Split::HeldOut, 24, 7).unwrap();
        assert!(right(&wide.drawn) && wide.drawn.score.count() == 24, "{wide:?}");
        let stop = &mut |_: &str, _: u64| Err(Error::new(Failure::Interrupted, "interrupted"));
        assert_eq!(compositions(stop, &same, Split::Train, 5, 7).unwrap_err().kind, Failure::Interrupted);
    }
}
