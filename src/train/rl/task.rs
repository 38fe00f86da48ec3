//! What a model is to do, and how well it has done it.

use image::RgbImage;

use crate::dataset::{Canvas, SIDE};
use crate::error::Result;
use crate::generate::prompt::EDIT;
use crate::pixels;
use crate::rng::Rng;
use crate::scenes::detector::{Detection, detect};
use crate::scenes::judge::{as_edited, judge, matched};
use crate::scenes::{Edit, Question, Scene, Split};
use crate::tokenizer::ImageTokenizer;
use crate::train::samples::Samples;

/// Part of an edit's reward that is for its words: what the model says the picture becomes.
const WORDS: f64 = 0.4;
/// The same of a partly right composition: the share of objects that are right.
const PARTLY: f64 = 0.4;
/// Where margins between cosines are cut off.
const MARGIN: f64 = 0.5;

/// How many groups of draws a step has of each kind of task.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    /// Compositions of shapes, judged by the detector.
    pub compositions: usize,
    /// Everyday things, judged by the semantic encoder.
    pub things: usize,
    /// Edits of compositions, judged by their words and the detector.
    pub edits: usize,
    /// Questions about compositions, judged by exact match.
    pub questions: usize,
}

/// The names of the kinds, in the order of [`Task::kind`].
pub const KINDS: [&str; 4] = ["compositions", "things", "edits", "questions"];

impl Mixture {
    /// Tasks of a step, in order.
    pub fn tasks(&self, dataset: &Samples, rng: &Rng) -> Vec<Task> {
        let counts = [self.compositions, self.things, self.edits, self.questions];
        let kinds = counts.into_iter().enumerate().flat_map(|(kind, count)| std::iter::repeat_n(kind, count));
        kinds.zip(0..).map(|(kind, i)| Task::sample(kind, dataset, &rng.fork(i))).collect()
    }

    /// All tasks of a step.
    pub fn count(&self) -> usize {
        self.compositions + self.things + self.edits + self.questions
    }
}

/// One task.
pub enum Task {
    /// Draw a composition by its caption.
    Composition(Scene, String),
    /// Draw the picture of an everyday thing by its caption.
    Thing(usize, String),
    /// Edit a composition by an instruction.
    Edit(Box<Edit>, String),
    /// Answer a question about a composition.
    Question(Question),
}

/// What a model has made of a task.
pub struct Outcome<'a> {
    /// Its words.
    pub words: &'a str,
    /// Its image, if it was to draw one.
    pub image: Option<&'a RgbImage>,
}

impl Task {
    fn sample(kind: usize, dataset: &Samples, rng: &Rng) -> Self {
        match kind {
            0 => {
                let scene = Scene::sample(&rng.fork(1), Split::Train);
                let caption = scene.caption(&rng.fork(2));
                Self::Composition(scene, caption)
            }
            1 => {
                let picture = dataset.everyday()[rng.below(0, dataset.everyday().len())];
                let captions = dataset.captions(picture, None);
                // The first is what most people type.
                let pick = if rng.below(1, 2) == 0 { 0 } else { rng.below(2, captions.len()) };
                Self::Thing(picture, captions[pick].clone())
            }
            2 => {
                let edit = Edit::sample(&rng.fork(1), Split::Train);
                let text = format!("{EDIT}{}", edit.instruction(&rng.fork(2), Split::Train).text);
                Self::Edit(Box::new(edit), text)
            }
            _ => Self::Question(Question::sample(&rng.fork(1), Split::Train)),
        }
    }

    /// Index into [`KINDS`].
    pub fn kind(&self) -> usize {
        match self {
            Self::Composition(..) => 0,
            Self::Thing(..) => 1,
            Self::Edit(..) => 2,
            Self::Question(_) => 3,
        }
    }

    /// What the model reads, and the picture that it looks at.
    pub fn request(&self) -> (&str, Option<&Scene>) {
        match self {
            Self::Composition(_, caption) | Self::Thing(_, caption) => (caption, None),
            Self::Edit(edit, text) => (text, Some(&edit.source)),
            Self::Question(question) => (&question.text, Some(&question.scene)),
        }
    }

    /// Whether it is done in a conversation, with words first.
    pub fn is_dialogue(&self) -> bool {
        matches!(self, Self::Edit(..) | Self::Question(_))
    }

    /// Whether an image is to be drawn.
    pub fn draws(&self) -> bool {
        !matches!(self, Self::Question(_))
    }

    /// How well an outcome does it, from 0 to 1 (for things from -0.5 to 0.5).
    pub fn reward(&self, outcome: &Outcome, gallery: &Gallery, tokenizer: &ImageTokenizer) -> Result<f64> {
        let of = |right: bool| if right { 1.0 } else { 0.0 };
        Ok(match (self, outcome.image) {
            (Self::Question(question), _) => of(outcome.words.trim() == question.answer),
            (_, None) => 0.0,
            (Self::Composition(scene, _), Some(image)) => {
                let found = detect(image);
                (1.0 - PARTLY) * of(judge(scene, &found)) + PARTLY * right_objects(scene, &found)
            }
            (Self::Edit(edit, _), Some(image)) => {
                WORDS * of(outcome.words.trim() == edit.thought()) + (1.0 - WORDS) * of(as_edited(edit, &detect(image)))
            }
            (Self::Thing(picture, _), Some(image)) => gallery.margin(*picture, image, tokenizer)?,
        })
    }
}

/// The share of objects that are as they should be, of those that should be there or are.
fn right_objects(scene: &Scene, found: &Detection) -> f64 {
    matched(&scene.objects, &found.objects) as f64 / scene.objects.len().max(found.objects.len()).max(1) as f64
}

/// The pictures that models learn to draw, which draws of everyday things are compared with: of
/// each its index, its concept and its semantic features, of length 1.
pub struct Gallery(Vec<(usize, usize, Vec<f32>)>);

impl Gallery {
    /// Embeds all of them.
    pub fn new(dataset: &Samples, tokenizer: &ImageTokenizer) -> Result<Self> {
        let embedded = |&picture: &usize| {
            let Canvas { rgb, .. } = dataset.single(picture, None, SIDE, SIDE).canvas;
            Ok((picture, dataset.concept(picture), features(&rgb, (SIDE, SIDE), tokenizer)?))
        };
        dataset.everyday().iter().map(embedded).collect::<Result<_>>().map(Self)
    }

    /// By how much an image is more like a picture than like those of other concepts: the
    /// difference of cosines.
    fn margin(&self, picture: usize, image: &RgbImage, tokenizer: &ImageTokenizer) -> Result<f64> {
        let drawn = features(image.as_raw(), (image.height() as usize, image.width() as usize), tokenizer)?;
        let cosine = |other: &[f32]| f64::from(other.iter().zip(&drawn).map(|(a, b)| a * b).sum::<f32>());
        let Some((_, concept, own)) = self.0.iter().find(|(known, ..)| *known == picture) else { return Ok(0.0) };
        let others = self.0.iter().filter(|(_, other, _)| other != concept).map(|(.., f)| cosine(f));
        Ok((cosine(own) - others.fold(-1.0, f64::max)).clamp(-MARGIN, MARGIN))
    }
}

fn features(rgb: &[u8], (height, width): (usize, usize), tokenizer: &ImageTokenizer) -> Result<Vec<f32>> {
    let pixels = pixels::to_tensor(&[rgb], height, width, tokenizer.quantizer().device())?;
    Ok(tokenizer.semantic().embed(&pixels)?.flatten_all()?.to_vec1()?)
}
