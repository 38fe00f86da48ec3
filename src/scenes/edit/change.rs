//! Single steps of edits.

use super::EditKind;
use crate::rng::Rng;
use crate::scenes::describe::{centre_of, side};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, ObjectSize, Place, SHAPES, Scene};

/// A step, with what is to be said about it.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Add {
        object: Object,
        /// Of the square, where it goes.
        side: Place,
        /// Whether there is room on no other side.
        only: bool,
    },
    Remove(Object),
    /// Replaces, recolours, moves or resizes.
    Alter {
        kind: EditKind,
        old: Object,
        new: Object,
    },
    Flip,
    Background(Option<usize>),
}

/// Radii of an added object: as usual, and the least, for smaller ones are too small to be drawn.
const ADDED: f64 = 26.0;
const LEAST: f64 = 18.0;
/// The largest radius at which an object can be moved to a side.
const MOVABLE: f64 = 40.0;
/// The least ratio of radii of a resized object.
const RESIZED: f64 = 1.3;

impl Change {
    /// A step of a kind on `scene` and where it leads, if it can be done and named.
    pub fn draw(rng: &Rng, scene: &Scene, kind: EditKind) -> Option<(Self, Scene)> {
        let object = &scene.objects[rng.below(0, scene.objects.len())];
        let alone = scene.objects.len() == 1;
        let other = |counter, now: usize, n: usize| (now + 1 + rng.below(counter, n - 1)) % n;
        let alter = |new: Object| Self::Alter { kind, old: object.clone(), new };
        let change = match kind {
            EditKind::Add if alone => added(rng, object)?,
            EditKind::Remove if !alone => Self::Remove(object.clone()),
            EditKind::Replace => {
                let now = SHAPES.iter().position(|&s| s == object.shape).unwrap_or(0);
                let colour = other(2, object.colour, COLOURS.len());
                let colour = if rng.below(3, 2) == 0 { colour } else { object.colour };
                alter(Object { shape: SHAPES[other(1, now, SHAPES.len())], colour, ..object.clone() })
            }
            EditKind::Recolour => alter(Object { colour: other(1, object.colour, COLOURS.len()), ..object.clone() }),
            EditKind::Move if alone => alter(moved(rng, object)?),
            EditKind::Resize => alter(resized(rng, object, alone)?),
            EditKind::Flip => Self::Flip,
            EditKind::Background => {
                // Zero is white.
                let now = scene.background.map_or(0, |b| b + 1);
                Self::Background(other(1, now, BACKGROUNDS.len() + 1).checked_sub(1))
            }
            _ => return None,
        };
        let unnamed = change.object().is_some_and(|o| scene.objects.iter().filter(|p| alike(o, p)).count() > 1);
        let target = change.apply(scene).filter(|_| !unnamed)?;
        Some((change, target))
    }

    /// Two steps that do not concern the same object.
    pub fn draw_two(rng: &Rng, scene: &Scene) -> Option<(Vec<Self>, Scene)> {
        const KINDS: [EditKind; 5] =
            [EditKind::Remove, EditKind::Recolour, EditKind::Replace, EditKind::Background, EditKind::Add];
        let [first, second] = [0, 1].map(|counter| KINDS[rng.below(counter, KINDS.len())]);
        let (one, between) = Self::draw(&rng.fork(1), scene, first)?;
        let (two, target) = Self::draw(&rng.fork(2), &between, second)?;
        // The second must be of what was there before, for that is what its words mean.
        let known = two.object().is_none_or(|o| scene.objects.iter().any(|s| s.same(o)));
        let twice = first == second && first == EditKind::Background;
        let named = two.object().is_none_or(|o| scene.objects.iter().filter(|s| alike(o, s)).count() == 1);
        (known && named && !twice).then(|| (vec![one, two], target))
    }

    /// The object of the scene that it concerns.
    fn object(&self) -> Option<&Object> {
        match self {
            Self::Remove(object) | Self::Alter { old: object, .. } => Some(object),
            _ => None,
        }
    }

    fn apply(&self, scene: &Scene) -> Option<Scene> {
        let mut objects = scene.objects.clone();
        let mut background = scene.background;
        match self {
            Self::Add { object, .. } if objects.iter().any(|o| alike(o, object)) => return None,
            Self::Add { object, .. } => objects.push(object.clone()),
            Self::Remove(object) => objects.retain(|o| !o.same(object)),
            Self::Alter { old, new, .. } => {
                objects.iter_mut().filter(|o| o.same(old)).for_each(|o| *o = new.clone());
                // Two alike could not be told apart.
                if objects.iter().filter(|o| alike(o, new)).count() > 1 {
                    return None;
                }
            }
            Self::Flip => {
                let twin = |o: &Object| {
                    let near = |p: &Object| (p.centre.0 - o.centre.0).hypot(p.centre.1 - o.centre.1) < 12.0;
                    scene.objects.iter().any(|p| alike(o, p) && near(p))
                };
                objects.iter_mut().for_each(|o| o.centre.0 = 128.0 - o.centre.0);
                if objects.iter().all(twin) {
                    return None;
                }
            }
            Self::Background(to) => background = *to,
        }
        Scene::of_objects(objects, background)
    }
}

/// Whether two objects have one name.
fn alike(a: &Object, b: &Object) -> bool {
    (a.shape, a.colour) == (b.shape, b.colour)
}

/// Any number from -`by` to `by`.
fn jitter(rng: &Rng, counter: u64, by: f64) -> f64 {
    (2.0 * rng.uniform(counter) - 1.0) * by
}

/// An object opposite to a single one, or on any side of one in the middle, as large as there is
/// room.
fn added(rng: &Rng, beside: &Object) -> Option<Change> {
    let (to, only) = match side(beside.centre, centre_of(Place::Unsaid)) {
        Place::Left => (Place::Right, true),
        Place::Right => (Place::Left, true),
        Place::Above => (Place::Below, true),
        Place::Below => (Place::Above, true),
        Place::Unsaid => ([Place::Left, Place::Right, Place::Above, Place::Below][rng.below(1, 4)], false),
    };
    let [left, top, right, bottom] = beside.bounds();
    let (from, until) = match to {
        Place::Left => (0.0, left),
        Place::Above => (0.0, top),
        Place::Right => (right, 128.0),
        _ => (bottom, 128.0),
    };
    let radius = (ADDED * (1.0 + jitter(rng, 2, 0.04))).min((until - from) / 2.0 - 0.5);
    let (x, y) = centre_of(to);
    let (mut x, mut y) = (x + jitter(rng, 3, 2.0), y + jitter(rng, 4, 2.0));
    let along = if matches!(to, Place::Left | Place::Right) { &mut x } else { &mut y };
    *along = along.max(from + radius).min(until - radius);
    let object = Object {
        shape: SHAPES[rng.below(5, SHAPES.len())],
        colour: rng.below(6, COLOURS.len()),
        size: ObjectSize::Plain,
        centre: (x, y),
        radius,
    };
    (radius >= LEAST).then_some(Change::Add { object, side: to, only })
}

/// The object elsewhere, wholly inside the square.
fn moved(rng: &Rng, object: &Object) -> Option<Object> {
    let places = [Place::Unsaid, Place::Left, Place::Right, Place::Above, Place::Below];
    let to = places[rng.below(1, places.len())];
    if to == side(object.centre, centre_of(Place::Unsaid)) || object.radius > MOVABLE {
        return None;
    }
    let inside = |v: f64| v.clamp(object.radius + 1.0, 127.0 - object.radius);
    let (x, y) = centre_of(to);
    let centre = (inside(x + jitter(rng, 2, 2.0)), inside(y + jitter(rng, 3, 2.0)));
    Some(Object { centre, ..object.clone() })
}

/// The object at the nearest of the usual radii that is clearly larger or smaller.
fn resized(rng: &Rng, object: &Object, alone: bool) -> Option<Object> {
    let middle = alone && side(object.centre, centre_of(Place::Unsaid)) == Place::Unsaid;
    let usual = if middle { [22.0, 36.0, 50.0] } else { [17.0, 26.0, 31.0] };
    let radius = match rng.below(1, 2) {
        0 => usual.into_iter().find(|r| r / object.radius > RESIZED)?,
        _ => usual.into_iter().rfind(|r| object.radius / r > RESIZED)?,
    };
    Some(Object { radius: radius * (1.0 + jitter(rng, 2, 0.02)), ..object.clone() })
}
