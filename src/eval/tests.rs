use super::*;
use crate::checkpoint::Weights;
use crate::dataset::{BYTES, CaptionedImage, Concept, Style};
use crate::rng::{Rng, Stream};

/// Concepts of one plain colour each in two hands; the last one is held out.
fn library(count: usize) -> Dataset {
    let concept = |i: usize| Concept {
        label: format!("thing{i}"),
        names: vec![format!("thing{i}")],
        everyday: true,
        held_out: i + 1 == count,
        ..Concept::default()
    };
    let pictures =
        (0..2 * count).map(|p| CaptionedImage { concept: p / 2, style: (p % 2 == 1).then_some(Style::Noto) }).collect();
    let rng = Rng::new(1, 0, Stream::Train, 0);
    let rgba = (0..2 * count * BYTES).map(|i| match i % 4 {
        3 => 255,
        c => rng.below((16 * (i / 2048) + c) as u64, 256) as u8,
    });
    Dataset::new((0..count).map(concept).collect(), pictures, rgba.collect()).unwrap()
}

#[test]
fn suites_run_on_a_tokenizer_with_any_weights() {
    let recipe: serde_json::Value = serde_json::from_str(include_str!("../train/nano.json")).unwrap();
    let config = serde_json::from_value(recipe["tokenizer"].clone()).unwrap();
    let tokenizer = ImageTokenizer::load(&Weights::trainable(0, &Device::Cpu), &config).unwrap();
    let scales = crate::generate::schedule::nearest(1.0).prefix(8);
    let subject = Subject { tokenizer: &tokenizer, scales, device: &Device::Cpu };
    let library = library(4);

    // A perfect artist is recognised every time, one who always draws the same thing once.
    let artist = |prompt: &str, always: Option<usize>| {
        let concept = library.find(prompt.trim_start_matches("a ")).unwrap();
        subject.picture(&library, 2 * always.unwrap_or(concept))
    };
    let mut seeds = Vec::new();
    let mut draw = |prompt: &str, seed: u64| {
        seeds.push(seed);
        artist(prompt, None)
    };
    let perfect = recognition(&subject, &library, Some(&library), &mut draw, None, 5).unwrap();
    assert_eq!(
        (perfect.concepts, perfect.gallery, perfect.semantic.value(), perfect.texture.is_some()),
        (4, 4, 1.0, true)
    );
    assert_eq!(seeds, [5; 4]);
    let dull = recognition(&subject, &library, None, &mut |p, _| artist(p, Some(2)), Some(2), 5).unwrap();
    assert_eq!((dull.concepts, dull.gallery, dull.semantic.value(), dull.texture.is_some()), (2, 4, 0.5, false));
    assert_eq!((recognisable(&library, Some(2)), recognisable(&library, Some(9))), (2, 4));

    let reconstruction = reconstruction(&subject, &library).unwrap();
    assert_eq!((reconstruction.three_d.pictures, reconstruction.all_styles.pictures), (1, 2));
    for f in [&reconstruction.three_d, &reconstruction.all_styles] {
        assert!(f.psnr > 0.0 && f.psnr < 40.0 && f.ssim < 1.0, "{f:?}");
    }
}

#[test]
fn a_limit_spreads_evenly() {
    assert_eq!(spread(10, Some(4)).collect::<Vec<_>>(), [0, 2, 5, 7]);
    assert_eq!(spread(3, None).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(spread(0, Some(4)).count() + spread(4, Some(0)).count(), 0);
}
