//! GenEval's six categories, on compositions that no model was trained on or, to see the difference, on others.

use image::RgbImage;
use serde::Serialize;

use super::detector::detect;
use super::judge::judge;
use super::{Draw, Redraw};
use crate::error::{Error, Kind as Failure, Result};
use crate::rng::{Rng, Stream};
use crate::scenes::{KINDS, Kind, Scene, Split};

/// Shares of right images in one category.
#[derive(Clone, Debug, Serialize)]
pub struct Category {
    /// Which one.
    pub kind: Kind,
    /// Among those the model drew, 0 to 1.
    pub score: f64,
    /// Score of the rendered scenes of the same prompts after encoding and decoding: the limit of the tokenizer.
    pub ceiling: f64,
    /// Score of the rendered scenes of the same prompts: the limit of the detector.
    pub ground_truth: f64,
}

/// Draws `per_kind` compositions of every category, the i-th with seed `seed + i`, and judges them. `redraw`
/// takes an image through the tokenizer and back.
pub fn compositions(draw: Draw, redraw: Redraw, split: Split, per_kind: usize, seed: u64) -> Result<Vec<Category>> {
    let category = |(step, kind): (u64, Kind)| {
        let (mut drawn, mut redrawn, mut rendered) = (0, 0, 0);
        for i in 0..per_kind as u64 {
            let scene = Scene::of_kind(&Rng::new(seed, i, Stream::Train, 100 + step), kind, split);
            let image = draw(&scene.prompt(), seed.wrapping_add(i))?;
            let (width, height) = image.dimensions();
            drawn += usize::from(judge(&scene, &detect(&image)));
            let truth = RgbImage::from_raw(width, height, scene.render(width as usize, height as usize))
                .ok_or_else(|| Error::new(Failure::Failure, "a rendered scene has the wrong size"))?;
            redrawn += usize::from(judge(&scene, &detect(&redraw(&truth)?)));
            rendered += usize::from(judge(&scene, &detect(&truth)));
        }
        let share = |count: usize| count as f64 / per_kind.max(1) as f64;
        Ok(Category { kind, score: share(drawn), ceiling: share(redrawn), ground_truth: share(rendered) })
    };
    (0..).zip(KINDS).map(category).collect()
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
        assert!(
            categories.iter().all(|c| c.score == 0.0 && c.ceiling == 1.0 && c.ground_truth == 1.0),
            "{categories:?}"
        );
        assert_eq!((calls.len(), calls[0].1, calls[4].1), (30, 7, 11));
        let stop = &mut |_: &str, _: u64| Err(Error::new(Failure::Interrupted, "interrupted"));
        assert_eq!(compositions(stop, &same, Split::Train, 5, 7).unwrap_err().kind, Failure::Interrupted);
    }
}
