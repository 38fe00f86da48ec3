//! Edits of everyday things of which no edit was trained (their pictures were): a right result is
//! nearer to the true one than to the source, to other answers that one could give, and to the true
//! ones of ten other things.

use image::RgbImage;
use serde::Serialize;

use super::Share;
use super::case::{Case, Watch, done};
use super::dialogues::Examiner;
use super::metrics::{nearest, pixel_feature};
use crate::dataset::{Canvas, Dataset, SIDE, Style, with_article};
use crate::error::{Error, Kind as Failure, Result};
use crate::rng::Rng;
use crate::scenes::BACKGROUNDS;

/// The target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ThingEdit {
    /// Another background, of all that have names.
    Background,
    /// The mirror image, of pictures that are not nearly symmetric.
    Flip,
    /// Another style, of three.
    Style,
    /// Another thing, of ten.
    Replace,
}

/// All kinds.
pub const THING_EDITS: [ThingEdit; 4] = [ThingEdit::Background, ThingEdit::Flip, ThingEdit::Style, ThingEdit::Replace];

/// Edits of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct ThingEdits {
    /// Which kind.
    pub kind: ThingEdit,
    /// Right results; a copy of the source is never right.
    pub score: Share,
}

/// An instruction, the source, and all that could come of it, the right one first.
struct Choice {
    text: String,
    source: Canvas,
    answers: Vec<Canvas>,
}

const WHITE: [u8; 3] = [255; 3];
/// Root mean square difference, of 255, below which a picture counts as symmetric.
const ALIKE: f64 = 24.0;

fn canvas(library: &Dataset, picture: usize, background: [u8; 3]) -> Canvas {
    Canvas { width: SIDE, height: SIDE, rgb: library.over(picture, background) }
}

/// Concepts without trained edits, with a name: concepts with their own captions cannot be named in
/// an instruction.
fn things(library: &Dataset) -> Vec<usize> {
    library.everyday(true).filter(|&c| !library.concepts[c].names.is_empty()).collect()
}

/// The choice of these draws, among the [`things`], of which there are some; none if the library has
/// no such pictures.
fn choice(library: &Dataset, kind: ThingEdit, rng: &Rng) -> Option<Choice> {
    let concepts = things(library);
    let concept = |counter| concepts[rng.below(counter, concepts.len())];
    let thing = concept(0);
    let picture = library.picture(thing, Style::ThreeD)?;
    let source = canvas(library, picture, WHITE);
    let others: Vec<usize> = (1..11).map(concept).filter(|&c| c != thing).collect();
    let drawn = |style, background| {
        let picture = move |&c: &usize| Some(canvas(library, library.picture(c, style)?, background));
        others.iter().filter_map(picture).collect::<Vec<_>>()
    };
    let (text, answers, of_others) = match kind {
        ThingEdit::Background => {
            let n = rng.below(1, BACKGROUNDS.len());
            let turned = (0..BACKGROUNDS.len()).map(|i| &BACKGROUNDS[(n + i) % BACKGROUNDS.len()]);
            let answers = turned.map(|b| canvas(library, picture, b.rgb)).collect();
            let text = format!("make the background {}", BACKGROUNDS[n].name);
            (text, answers, drawn(Style::ThreeD, BACKGROUNDS[n].rgb))
        }
        ThingEdit::Flip => {
            let mirrored = source.clone().mirrored();
            let apart =
                source.rgb.iter().zip(&mirrored.rgb).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum::<f64>();
            if (apart / source.rgb.len() as f64).sqrt() < ALIKE {
                return None;
            }
            let others = drawn(Style::ThreeD, WHITE).into_iter().map(Canvas::mirrored).collect();
            ("flip the picture".into(), vec![mirrored], others)
        }
        ThingEdit::Style => {
            let flat = rng.below(1, 2) == 0;
            let (to, other) = if flat { (Style::Flat, Style::Noto) } else { (Style::Noto, Style::Flat) };
            let pictures = [to, other].map(|style| library.picture(thing, style));
            let answers = pictures.into_iter().map(|p| Some(canvas(library, p?, WHITE))).collect::<Option<_>>()?;
            (if flat { "make it flat" } else { "make it noto" }.into(), answers, drawn(to, WHITE))
        }
        ThingEdit::Replace => {
            let text = format!("turn it into {}", with_article(&library.concepts[*others.first()?].names[0]));
            let picture = |&c: &usize| Some(canvas(library, library.picture(c, Style::ThreeD)?, WHITE));
            (text, others.iter().map(picture).collect::<Option<_>>()?, Vec::new())
        }
    };
    let answers = answers.into_iter().chain(of_others).collect();
    Some(Choice { text, source, answers })
}

fn image(canvas: &Canvas) -> Result<RgbImage> {
    let wrong = || Error::new(Failure::Failure, "a canvas of the wrong size");
    RgbImage::from_raw(canvas.width as u32, canvas.height as u32, canvas.rgb.clone()).ok_or_else(wrong)
}

/// Plain pixels, with the colour of a corner: a background is little but brightness, which they
/// leave out.
fn feature(image: &RgbImage) -> Vec<f32> {
    let corner = image.get_pixel(2, 2).0.map(|v| f32::from(v) / 255.0 * 30.0);
    pixel_feature(image).into_iter().chain(corner).collect()
}

/// Edits of every kind; none if the library has no named things.
pub fn thing_edits(examiner: &Examiner, library: &Dataset, watch: Watch) -> Result<Vec<ThingEdits>> {
    if things(library).is_empty() {
        return Ok(Vec::new());
    }
    (0..)
        .zip(THING_EDITS)
        .map(|(step, kind)| {
            let mut score = Share::default();
            for n in 0..4 * examiner.per_kind {
                let drawn = choice(library, kind, &examiner.rng(n, 600 + step));
                let Some(Choice { text, source, answers }) = drawn else { continue };
                let (drawn, reply) = examiner.edit(&image(&source)?, &text, n)?;
                let gallery = answers.iter().chain([&source]).map(|c| Ok(feature(&image(c)?)));
                let right = nearest(&feature(&drawn), &gallery.collect::<Result<Vec<_>>>()?) == Some(0);
                score.push(right);
                let case = Case {
                    task: "edit of a thing",
                    kind: serde_json::to_value(kind).ok(),
                    wording: None,
                    image: None,
                    request: text,
                    expected: None,
                    reply,
                    right,
                };
                done(watch, case)?;
                if score.count() == examiner.per_kind {
                    break;
                }
            }
            Ok(ThingEdits { kind, score })
        })
        .collect()
}
