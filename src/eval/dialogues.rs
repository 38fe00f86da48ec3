//! Dialogues that no model was trained on: edits, questions, several turns and reasoning, each with the score of a trivial
//! answer.

use std::collections::HashMap;
use std::ops::ControlFlow;

use image::RgbImage;
use serde::Serialize;

use super::detector::{Detection, detect};
use super::judge::{judge, on_its_background};
use super::metrics;
use crate::chat::{ChatModel, Picture, ReplyOptions, Session};
use crate::error::{Error, Kind as Failure, Result};
use crate::generate::prompt::{FINAL, THINK};
use crate::rng::{Rng, Stream};
use crate::scenes::{EDIT_KINDS, Edit, EditKind, QUESTION_KINDS, Question, QuestionKind, Riddle, Scene, Split};

/// Edits of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Edits {
    /// Which kind.
    pub kind: EditKind,
    /// Share of right results, 0 to 1, in wordings of the split.
    pub score: f64,
    /// The same of the same edits in trained wordings.
    pub trained_words: f64,
    /// The same for a copy of the source.
    pub copying: f64,
    /// The same for the true result after encoding and decoding.
    pub ceiling: f64,
    /// PSNR in dB of all right results in either wording, against the source's own reconstruction where nothing may change; none if all may.
    pub unchanged: Option<f64>,
}

/// Questions of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Questions {
    /// Which kind.
    pub kind: QuestionKind,
    /// Share of exact answers, 0 to 1, to wordings of the split.
    pub score: f64,
    /// The same of questions about the same scenes in trained wordings.
    pub trained_words: f64,
    /// The same for the answer that is right most often, given always.
    pub common: f64,
}

/// Drawing, then an edit of the drawn image.
#[derive(Clone, Debug, Serialize)]
pub struct Turns {
    /// Dialogues.
    pub count: usize,
    /// Share in which the first image is right, 0 to 1.
    pub drawn: f64,
    /// Share in which the second is as well.
    pub edited: f64,
    /// The same for a second image that copies the first.
    pub copying: f64,
}

/// Riddles about shapes, by pairs of clues that are not trained, answered by an image; and riddles about things.
#[derive(Clone, Debug, Serialize)]
pub struct Reasoning {
    /// Riddles.
    pub count: usize,
    /// Share whose final prompt, after whatever reasoning, is exactly right, 0 to 1.
    pub prompt: f64,
    /// Share whose image is right.
    pub image: f64,
    /// The same for an answer that always draws the most common target image.
    pub common: f64,
    /// Of as many riddles about things, by a clue that is not trained: share whose final prompt is exactly right.
    pub things: f64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Dialogues {
    /// By kind.
    pub edits: Vec<Edits>,
    /// By kind.
    pub questions: Vec<Questions>,
    /// Draw, then edit.
    pub turns: Turns,
    /// Think, then draw.
    pub reasoning: Reasoning,
}

/// Called with every piece of work that is done; `Break` stops the evaluation.
pub type Watch<'a> = &'a mut dyn FnMut() -> ControlFlow<()>;

/// A model under examination.
pub struct Examiner<'a> {
    /// The model.
    pub model: &'a ChatModel,
    /// Cases of each kind.
    pub per_kind: usize,
    /// Decides all randomness.
    pub seed: u64,
    /// Where the cases are from.
    pub split: Split,
}

/// The longest answer, in tokens.
const LONGEST: usize = 64;

impl Examiner<'_> {
    /// Every suite.
    pub fn run(&self, watch: Watch) -> Result<Dialogues> {
        let edits = (0..).zip(EDIT_KINDS).map(|(step, kind)| self.edits(kind, 200 + step, watch));
        let edits = edits.collect::<Result<_>>()?;
        let questions = (0..).zip(QUESTION_KINDS).map(|(step, kind)| self.questions(kind, 300 + step, watch));
        let questions = questions.collect::<Result<_>>()?;
        Ok(Dialogues { edits, questions, turns: self.turns(watch)?, reasoning: self.reasoning(watch)? })
    }

    pub(super) fn rng(&self, case: usize, step: u64) -> Rng {
        Rng::new(self.seed, case as u64, Stream::Train, step)
    }

    /// Where the wordings of edits and questions are from: the split, and then those that were trained.
    fn wordings(&self) -> &'static [Split] {
        match self.split {
            Split::HeldOut => &[Split::HeldOut, Split::Train],
            Split::Train => &[Split::Train],
        }
    }

    fn options(&self, case: usize) -> Result<ReplyOptions> {
        let config = self.model.config();
        let image = config.drawing.as_ref().map(|drawing| drawing.sampling.clone());
        let image = Some(image.ok_or_else(|| self.model.draws_nothing())?);
        let seed = self.seed.wrapping_add(case as u64);
        Ok(ReplyOptions { sampling: config.sampling, max_tokens: LONGEST, image, seed, guide_from_sources: true })
    }

    fn scene(&self, scene: &Scene) -> Result<Picture> {
        self.model.encode("scene", &render(scene)?, &self.model.usual_scales()?)
    }

    /// The model's edit of an image.
    pub(super) fn edit(&self, image: &RgbImage, text: &str, case: usize) -> Result<RgbImage> {
        self.edit_picture(self.model.encode("source", image, &self.model.usual_scales()?)?, text, case)
    }

    fn edit_picture(&self, source: Picture, text: &str, case: usize) -> Result<RgbImage> {
        let mut session = Session::new(self.model)?;
        session.draw(vec![source], text, &self.options(case)?, None, &mut |_| ControlFlow::Continue(()))?;
        self.last_image(&session)
    }

    fn edits(&self, kind: EditKind, step: u64, watch: Watch) -> Result<Edits> {
        let (mut right, mut copied, mut redrawn, mut unchanged) = ([0; 2], 0, 0, Vec::new());
        for case in 0..self.per_kind {
            let rng = self.rng(case, step);
            let edit = Edit::of_kind(&rng, kind, self.split);
            let source = self.scene(&edit.source)?;
            let copy = self.model.decode(&source)?;
            let succeeded = |image: &RgbImage| usize::from(as_edited(&edit, &detect(image)));
            for (right, &words) in right.iter_mut().zip(self.wordings()) {
                let image = self.edit_picture(source.clone(), &edit.instruction(&rng.fork(1), words).text, case)?;
                let done = succeeded(&image);
                *right += done;
                unchanged.extend(outside(&copy, &image, &edit.changed()).filter(|_| done > 0));
                stop(watch)?;
            }
            copied += succeeded(&copy);
            redrawn += succeeded(&self.model.decode(&self.scene(&edit.target)?)?);
        }
        let share = |count: usize| count as f64 / self.per_kind.max(1) as f64;
        // Mean of squared errors: one perfectly preserved image does not make up for others.
        let mean = |values: &[f64]| {
            let errors: f64 = values.iter().map(|psnr| 10f64.powf(-psnr / 10.0)).sum();
            -10.0 * (errors / values.len() as f64).log10()
        };
        Ok(Edits {
            kind,
            score: share(right[0]),
            trained_words: share(right[self.wordings().len() - 1]),
            copying: share(copied),
            ceiling: share(redrawn),
            unchanged: (!unchanged.is_empty()).then(|| mean(&unchanged)),
        })
    }

    fn questions(&self, kind: QuestionKind, step: u64, watch: Watch) -> Result<Questions> {
        let (mut right, mut answers) = ([0; 2], HashMap::<String, usize>::new());
        for case in 0..self.per_kind {
            for (right, &words) in right.iter_mut().zip(self.wordings()) {
                let question = Question::of_kind(&self.rng(case, step), kind, self.split, words);
                let mut session = Session::new(self.model)?;
                let (pictures, options) = (vec![self.scene(&question.scene)?], self.options(case)?);
                let reply = session.say(pictures, &question.text, &options, &mut |_| ControlFlow::Continue(()))?;
                *right += usize::from(reply.text.trim() == question.answer);
                if words == self.split {
                    *answers.entry(question.answer).or_default() += 1;
                }
                stop(watch)?;
            }
        }
        let share = |count: usize| count as f64 / self.per_kind.max(1) as f64;
        Ok(Questions {
            kind,
            score: share(right[0]),
            trained_words: share(right[self.wordings().len() - 1]),
            common: share(answers.into_values().max().unwrap_or(0)),
        })
    }

    fn turns(&self, watch: Watch) -> Result<Turns> {
        let (mut drawn, mut edited, mut copied) = (0, 0, 0);
        for case in 0..self.per_kind {
            let rng = self.rng(case, 400);
            // Targets that the judge cannot distinguish from their source are no cases.
            let edits = (0..).map(|i| Edit::of_kind(&rng.fork(2 + i), EDIT_KINDS[case % EDIT_KINDS.len()], self.split));
            let told = |edit: &Edit| Ok::<_, Error>(!as_asked(edit, &detect(&render(&edit.source)?)));
            let Some(edit) = edits.take(100).find(|edit| told(edit).unwrap_or(true)) else { continue };
            let mut session = Session::new(self.model)?;
            let options = self.options(case)?;
            let mut draw = |text: &str| {
                session.draw(vec![], text, &options, None, &mut |_| ControlFlow::Continue(()))?;
                self.last_image(&session)
            };
            let first = detect(&draw(&edit.source.prompt())?);
            let second = detect(&draw(&edit.instruction(&rng.fork(1), self.split).text)?);
            if judge(&edit.source, &first) {
                drawn += 1;
                // Drawn objects need not be exactly where the scene has them.
                edited += usize::from(as_asked(&edit, &second));
                copied += usize::from(as_asked(&edit, &first));
            }
            stop(watch)?;
        }
        let share = |count: usize| count as f64 / self.per_kind.max(1) as f64;
        Ok(Turns { count: self.per_kind, drawn: share(drawn), edited: share(edited), copying: share(copied) })
    }

    fn reasoning(&self, watch: Watch) -> Result<Reasoning> {
        let all = || (0..).map(|i| Riddle::sample(&self.rng(i, 500), self.split));
        let riddles: Vec<Riddle> = all().filter(|riddle| riddle.scene.is_some()).take(self.per_kind).collect();
        let things = all().filter(|riddle| riddle.scene.is_none()).take(self.per_kind);
        let (mut prompts, mut images, mut named) = (0, 0, 0);
        let mut asked: HashMap<&str, usize> = HashMap::new();
        let think = |case: usize, riddle: &Riddle| {
            let mut session = Session::new(self.model)?;
            let text = format!("{THINK}{}", riddle.clue);
            let reply = session.say(vec![], &text, &self.options(case)?, &mut |_| ControlFlow::Continue(()))?;
            let thought = reply.text.rsplit_once(FINAL).map(|(_, prompt)| prompt.trim());
            Ok::<_, Error>((session, thought == Some(&riddle.prompt)))
        };
        for (case, riddle) in things.enumerate() {
            named += usize::from(think(case, &riddle)?.1);
            stop(watch)?;
        }
        for (case, riddle) in riddles.iter().enumerate() {
            let (session, right) = think(case, riddle)?;
            prompts += usize::from(right);
            let drawn = session.last_image();
            if let Some((picture, scene)) = drawn.zip(riddle.scene.as_ref()) {
                images += usize::from(judge(scene, &detect(&self.model.decode(picture)?)));
            }
            *asked.entry(&riddle.prompt).or_default() += 1;
            stop(watch)?;
        }
        let share = |count: usize| count as f64 / riddles.len().max(1) as f64;
        let common = share(asked.values().copied().max().unwrap_or(0));
        let (prompt, image, things) = (share(prompts), share(images), share(named));
        Ok(Reasoning { count: riddles.len(), prompt, image, common, things })
    }

    fn last_image(&self, session: &Session) -> Result<RgbImage> {
        let drawn = session.last_image();
        self.model.decode(drawn.ok_or_else(|| Error::new(Failure::Failure, "the model drew nothing"))?)
    }
}

pub(super) fn stop(watch: Watch) -> Result<()> {
    match watch() {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(Failure::Interrupted, "interrupted")),
    }
}

fn render(scene: &Scene) -> Result<RgbImage> {
    let wrong = || Error::new(Failure::Failure, "a rendered scene has the wrong size");
    RgbImage::from_raw(128, 128, scene.render(128, 128)).ok_or_else(wrong)
}

/// Whether an image shows the target of an edit: objects drawn before need not be where their scene has them.
fn as_asked(edit: &Edit, found: &Detection) -> bool {
    judge(&edit.target, found) && on_its_background(&edit.target, found)
}

/// How far the centre of an object may be from where it should, in 1/128 of the image, and how much larger or smaller
/// it may be.
const NEAR: f64 = 9.0;
const SIZE: f64 = 1.2;

/// Whether an image shows what an edit makes of its source: every object in its shape, colour, place and size, nothing
/// else, and the right background.
pub fn as_edited(edit: &Edit, found: &Detection) -> bool {
    let mut rest: Vec<_> = found.objects.iter().collect();
    let there = edit.target.objects.iter().all(|object| {
        let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).hypot(a.1 - b.1) <= NEAR;
        let at = rest.iter().position(|f| {
            let ratio = f.radius / object.radius;
            let same = f.shape == Some(object.shape) && f.colour == object.colour;
            same && near(f.centre, object.centre) && (1.0 / SIZE..SIZE).contains(&ratio)
        });
        at.map(|at| rest.remove(at)).is_some()
    });
    there && rest.is_empty() && on_its_background(&edit.target, found)
}

/// PSNR in dB of two images outside boxes (left, top, right, bottom); none if they leave nothing.
fn outside(a: &RgbImage, b: &RgbImage, boxes: &[[f64; 4]]) -> Option<f64> {
    let free = |x: u32, y: u32| {
        let (x, y) = (f64::from(x) + 0.5, f64::from(y) + 0.5);
        !boxes.iter().any(|[l, t, r, b]| (*l..*r).contains(&x) && (*t..*b).contains(&y))
    };
    let kept = |image: &RgbImage| -> Vec<u8> {
        image.enumerate_pixels().filter(|(x, y, _)| free(*x, *y)).flat_map(|(_, _, p)| p.0).collect()
    };
    let (a, b) = (kept(a), kept(b));
    let pixels = (a.len() / 3) as u32;
    let strip = |data| RgbImage::from_raw(pixels, 1, data);
    if pixels == 0 { None } else { Some(metrics::psnr(&strip(a)?, &strip(b)?).min(60.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_truth_passes_and_a_copy_does_not() {
        for (step, kind) in (0..).zip(EDIT_KINDS) {
            let (mut right, mut copied, cases) = (0, 0, 30);
            for i in 0..cases {
                let edit = Edit::of_kind(&Rng::new(3, i, Stream::Train, step), kind, Split::HeldOut);
                let (source, target) = (render(&edit.source).unwrap(), render(&edit.target).unwrap());
                right += u64::from(as_edited(&edit, &detect(&target)));
                copied += u64::from(as_edited(&edit, &detect(&source)));
                if let Some(psnr) = outside(&source, &target, &edit.changed()) {
                    assert_eq!(psnr, 60.0, "{kind:?} {}", edit.canonical());
                }
            }
            assert!(right * 50 >= cases * 49 && copied == 0, "{kind:?}: {right} and {copied} of {cases}");
        }
    }

    #[test]
    fn what_lies_outside_counts_alone() {
        let plain = |v| RgbImage::from_pixel(128, 128, image::Rgb([v; 3]));
        let mut half = plain(10);
        (0..64).for_each(|x| (0..128).for_each(|y| half.put_pixel(x, y, image::Rgb([200; 3]))));
        assert_eq!(outside(&plain(10), &half, &[[0.0, 0.0, 64.0, 128.0]]), Some(60.0));
        assert!(outside(&plain(10), &half, &[]).unwrap() < 10.0);
        assert_eq!(outside(&plain(10), &half, &[[0.0, 0.0, 128.0, 128.0]]), None);
    }
}
