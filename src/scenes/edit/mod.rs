//! Edits: a scene before and after, and the instruction.

mod change;
mod plan;
#[cfg(test)]
mod tests;
mod wording;
pub(super) mod words;

use super::wording::{Said, Voice};
use super::{Kind, Object, Scene, Split, held_out};
use crate::generate::prompt::FINAL;
use crate::rng::Rng;
use change::Change;

/// Kind of an edit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EditKind {
    /// One more object beside a single one.
    Add,
    /// One of two objects less.
    Remove,
    /// Another shape, sometimes of another colour, in place of an object.
    Replace,
    /// Another colour.
    Recolour,
    /// A single object elsewhere.
    Move,
    /// A clearly larger or smaller object.
    Resize,
    /// The mirror image, left for right.
    Flip,
    /// Another background.
    Background,
    /// Two of add, remove, replace, recolour and background.
    Combination,
}

/// All kinds of edits.
pub const EDIT_KINDS: [EditKind; 9] = [
    EditKind::Add,
    EditKind::Remove,
    EditKind::Replace,
    EditKind::Recolour,
    EditKind::Move,
    EditKind::Resize,
    EditKind::Flip,
    EditKind::Background,
    EditKind::Combination,
];

/// An instruction and its result on a scene.
#[derive(Clone, Debug)]
pub struct Edit {
    /// The target.
    pub kind: EditKind,
    /// Before.
    pub source: Scene,
    /// After. Everything that the edit does not concern is identical to the pixel.
    pub target: Scene,
    /// One, or the two of a combination.
    changes: Vec<Change>,
}

/// Units around what changes, where outlines blend.
const MARGIN: f64 = 3.0;
/// Draws after which no edit of a kind is thought to fit a scene.
const ATTEMPTS: u64 = 24;

impl Edit {
    /// Any kind; the harder ones more often.
    pub fn sample(rng: &Rng, split: Split) -> Self {
        let kind = match rng.below(1000, 100) {
            0..16 => EditKind::Add,
            16..28 => EditKind::Remove,
            28..40 => EditKind::Replace,
            40..52 => EditKind::Recolour,
            52..62 => EditKind::Move,
            62..71 => EditKind::Resize,
            71..77 => EditKind::Flip,
            77..84 => EditKind::Background,
            _ => EditKind::Combination,
        };
        Self::of_kind(rng, kind, split)
    }

    /// An edit of one kind. A held-out one ends at a held-out composition; a training one neither
    /// begins nor ends there.
    pub fn of_kind(rng: &Rng, kind: EditKind, split: Split) -> Self {
        let kinds: &[Kind] = match kind {
            EditKind::Add => &[Kind::SingleObject],
            EditKind::Remove => &[Kind::TwoObjects, Kind::Position, Kind::AttributeBinding],
            EditKind::Replace | EditKind::Recolour | EditKind::Resize | EditKind::Combination => {
                &[Kind::SingleObject, Kind::Colours, Kind::TwoObjects, Kind::Position, Kind::AttributeBinding]
            }
            EditKind::Move => &[Kind::SingleObject, Kind::Colours],
            EditKind::Flip => &[Kind::SingleObject, Kind::TwoObjects, Kind::Position, Kind::AttributeBinding],
            EditKind::Background => &super::KINDS,
        };
        let mut attempt = 0;
        loop {
            let rng = rng.fork(attempt);
            let before = match split {
                Split::HeldOut if rng.below(0, 2) == 0 => Split::HeldOut,
                _ => Split::Train,
            };
            // From other draws than the kind, or one would tell the other.
            let source = Scene::of_kind(&rng.fork(1), kinds[rng.below(1, kinds.len())], before);
            if let Some(edit) = Self::on(&rng.fork(0), &source, kind, split) {
                return edit;
            }
            attempt += 1;
        }
    }

    /// An edit of this very scene, if one of the kind and split fits it.
    pub fn on(rng: &Rng, source: &Scene, kind: EditKind, split: Split) -> Option<Self> {
        (0..ATTEMPTS).find_map(|attempt| {
            let rng = rng.fork(attempt);
            let (changes, target) = match kind {
                EditKind::Combination => Change::draw_two(&rng, source)?,
                _ => Change::draw(&rng, source, kind).map(|(change, target)| (vec![change], target))?,
            };
            // As they are, and as a viewer tells them.
            let trained = |scene: &Scene| !held_out(&scene.key()) && !scene.seen().is_some_and(|s| held_out(&s.key()));
            let right = match split {
                Split::Train => trained(source) && trained(&target),
                Split::HeldOut => held_out(&target.key()),
            };
            right.then(|| Self { kind, source: source.clone(), target, changes })
        })
    }

    /// One wording among those of the split: Chinese about once in six.
    pub fn instruction(&self, rng: &Rng, split: Split) -> Said {
        wording::say(&self.changes, &self.source, Voice::draw(rng, split))
    }

    /// The canonical English wording, which is always a trained one.
    pub fn canonical(&self) -> String {
        wording::say(&self.changes, &self.source, Voice::canonical()).text
    }

    /// What a model says before it draws: what it sees, what is done to it, and what that becomes,
    /// each as a viewer describes it: "a red circle to the left of a blue star. the red circle on
    /// the left is now gone. the final prompt is: a blue star on the right".
    pub fn thought(&self) -> String {
        let seen = |scene: &Scene| scene.seen().unwrap_or_else(|| scene.clone());
        let source = seen(&self.source);
        let steps = plan::steps(&self.changes, &source);
        format!("{}. {steps}. {FINAL}{}", source.prompt(), seen(&self.target).prompt())
    }

    /// Boxes (left, top, right, bottom), in 1/128 of the drawing square, outside of which nothing
    /// changes; the whole square if the background does.
    pub fn changed(&self) -> Vec<[f64; 4]> {
        if self.source.background != self.target.background {
            return vec![[0.0, 0.0, 128.0, 128.0]];
        }
        let (before, after) = (&self.source.objects, &self.target.objects);
        let gone = before.iter().filter(|o| !after.iter().any(|a| a.same(o)));
        let new = after.iter().filter(|o| !before.iter().any(|b| b.same(o)));
        let around = |o: &Object| {
            let [left, top, right, bottom] = o.bounds();
            [left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN].map(|v| v.clamp(0.0, 128.0))
        };
        gone.chain(new).map(around).collect()
    }
}
