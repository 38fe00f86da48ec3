//! Compositions of one to four plain coloured shapes, as GenEval has them: what they show, how they
//! are called, how they look, how they are edited, asked about and hinted at. Everything is a pure
//! function of an [`Rng`].

mod caption;
mod colour;
mod describe;
pub mod detector;
mod edit;
mod fit;
mod grammar;
pub mod judge;
mod question;
mod render;
mod riddle;
mod smalltalk;
mod topics;
mod wording;

use crate::rng::{Rng, fnv1a};
pub use edit::{EDIT_KINDS, Edit, EditKind};
pub use question::{QUESTION_KINDS, Question, QuestionKind};
pub use render::inside;
pub use riddle::Riddle;
pub use smalltalk::{Smalltalk, smalltalk};
pub use topics::Topic;
pub use wording::Said;

/// A silhouette.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// A disc.
    Circle,
    /// An upright square.
    Square,
    /// An equilateral triangle that points up.
    Triangle,
    /// A five-pointed star.
    Star,
    /// A heart.
    Heart,
    /// A square on its corner, narrowed.
    Diamond,
}

/// All shapes.
pub const SHAPES: [Shape; 6] =
    [Shape::Circle, Shape::Square, Shape::Triangle, Shape::Star, Shape::Heart, Shape::Diamond];

/// A named colour.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Colour {
    /// English name.
    pub name: &'static str,
    /// Chinese name.
    pub name_zh: &'static str,
    /// sRGB.
    pub rgb: [u8; 3],
}

/// A pale colour for a background, named in the caption; white is not named.
pub type Background = Colour;

const fn colour(name: &'static str, name_zh: &'static str, rgb: [u8; 3]) -> Colour {
    Colour { name, name_zh, rgb }
}

/// Colours of objects.
pub const COLOURS: [Colour; 10] = [
    colour("red", "红色", [220, 30, 35]),
    colour("orange", "橙色", [250, 140, 20]),
    colour("yellow", "黄色", [250, 215, 30]),
    colour("green", "绿色", [40, 165, 60]),
    colour("blue", "蓝色", [35, 85, 220]),
    colour("purple", "紫色", [130, 45, 175]),
    colour("pink", "粉色", [250, 125, 185]),
    colour("brown", "棕色", [125, 75, 35]),
    colour("black", "黑色", [20, 20, 20]),
    colour("gray", "灰色", [135, 135, 140]),
];

/// Backgrounds other than white.
pub const BACKGROUNDS: [Background; 4] = [
    colour("light blue", "浅蓝色", [205, 228, 250]),
    colour("light yellow", "浅黄色", [252, 246, 205]),
    colour("light green", "浅绿色", [212, 240, 208]),
    colour("light pink", "浅粉色", [250, 222, 230]),
];

/// The six categories of GenEval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One object, its size or place named.
    SingleObject,
    /// Two different shapes.
    TwoObjects,
    /// One to four equal objects.
    Counting,
    /// One object, its colour named.
    Colours,
    /// Two objects, one beside, above or below the other.
    Position,
    /// Two objects of different colours, sometimes sizes.
    AttributeBinding,
}

/// All categories, in GenEval's order.
pub const KINDS: [Kind; 6] =
    [Kind::SingleObject, Kind::TwoObjects, Kind::Counting, Kind::Colours, Kind::Position, Kind::AttributeBinding];

/// Size of an object in the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectSize {
    /// Small.
    Small,
    /// Not mentioned.
    Plain,
    /// Large.
    Large,
}

/// Place of the first object in the prompt, relative to the second, or to the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Not mentioned.
    Unsaid,
    /// To the left.
    Left,
    /// To the right.
    Right,
    /// Above.
    Above,
    /// Below.
    Below,
}

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Silhouette.
    pub shape: Shape,
    /// Index into [`COLOURS`].
    pub colour: usize,
    /// As the caption says.
    pub size: ObjectSize,
    /// Centre (x, y) and half of the height, in 1/128 of the drawing square.
    pub centre: (f64, f64),
    /// Half of the side of the box that the shape is drawn in, in the same unit.
    pub radius: f64,
}

/// A composition.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Category.
    pub kind: Kind,
    /// In the order of the caption.
    pub objects: Vec<Object>,
    /// Relation of the first object to the second, or place of a single one.
    pub place: Place,
    /// Index into [`BACKGROUNDS`]; `None` is white.
    pub background: Option<usize>,
}

/// Which compositions to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation.
    HeldOut,
}

/// Centre of the drawing square, and of its left or upper and right or lower halves.
const MIDDLE: f64 = 64.0;
const NEAR: f64 = 36.0;
const FAR: f64 = 92.0;

impl Scene {
    /// A composition of any category; the harder ones more often.
    pub fn sample(rng: &Rng, split: Split) -> Self {
        let kind = match rng.below(1000, 100) {
            0..12 => Kind::SingleObject,
            12..30 => Kind::TwoObjects,
            30..50 => Kind::Counting,
            50..60 => Kind::Colours,
            60..82 => Kind::Position,
            _ => Kind::AttributeBinding,
        };
        Self::of_kind(rng, kind, split)
    }

    /// A composition of one category.
    pub fn of_kind(rng: &Rng, kind: Kind, split: Split) -> Self {
        let mut attempt = 0;
        loop {
            let scene = Self::draw(rng, kind, 64 * attempt);
            if held_out(&scene.key()) == (split == Split::HeldOut) {
                return scene;
            }
            attempt += 1;
        }
    }

    fn draw(rng: &Rng, kind: Kind, base: u64) -> Self {
        let below = |counter: u64, n: usize| rng.below(base + counter, n);
        let shape = |counter| SHAPES[below(counter, SHAPES.len())];
        // The second is another than the first.
        let other = |counter, first: usize, n: usize| (first + 1 + below(counter, n - 1)) % n;
        let (first, colour) = (shape(0), below(1, COLOURS.len()));
        let second = SHAPES[other(2, SHAPES.iter().position(|&s| s == first).unwrap_or(0), SHAPES.len())];
        let second_colour = other(3, colour, COLOURS.len());
        let background = (rng.uniform(base + 4) < 0.2).then(|| below(5, BACKGROUNDS.len()));
        let mut place = Place::Unsaid;
        let mut sizes = [ObjectSize::Plain; 2];
        let mut objects = vec![(first, colour)];
        match kind {
            Kind::Colours => {}
            Kind::SingleObject => {
                place =
                    [Place::Unsaid, Place::Unsaid, Place::Left, Place::Right, Place::Above, Place::Below][below(6, 6)];
                sizes[0] = [ObjectSize::Small, ObjectSize::Plain, ObjectSize::Large][below(7, 3)];
            }
            Kind::Counting => objects = vec![(first, colour); 1 + below(6, 4)],
            Kind::TwoObjects => objects.push((second, if below(6, 3) == 0 { colour } else { second_colour })),
            Kind::Position => {
                objects.push((second, second_colour));
                place = [Place::Left, Place::Right, Place::Above, Place::Below][below(6, 4)];
            }
            Kind::AttributeBinding => {
                objects.push((if below(6, 3) == 0 { first } else { second }, second_colour));
                sizes = [
                    [ObjectSize::Plain; 2],
                    [ObjectSize::Large, ObjectSize::Small],
                    [ObjectSize::Small, ObjectSize::Large],
                ][below(7, 3)];
            }
        }
        let count = objects.len();
        let jitter = |counter: u64, by: f64| (2.0 * rng.uniform(base + counter) - 1.0) * by;
        let objects = objects.into_iter().enumerate().map(|(i, (shape, colour))| {
            let size = sizes[i.min(1)];
            let (x, y) = centre(i, count, place);
            let counter = 10 + 3 * i as u64;
            Object {
                shape,
                colour,
                size,
                centre: (x + jitter(counter, 2.0), y + jitter(counter + 1, 2.0)),
                radius: radius(count, size, place) * (1.0 + jitter(counter + 2, 0.04)),
            }
        });
        Self { kind, objects: objects.collect(), place, background }
    }

    /// Identity of a scene, without jitter, sizes and background: the unit that is held out. The
    /// category is no part of it, as several can ask for the same picture.
    pub fn key(&self) -> String {
        let objects: Vec<String> =
            self.objects.iter().map(|o| format!("{} {:?}", COLOURS[o.colour].name, o.shape)).collect();
        format!("{:?} {}", self.place, objects.join(" "))
    }
}

/// One composition in eight is for evaluation, by its hash, for ever the same.
pub fn held_out(key: &str) -> bool {
    (fnv1a(key) >> 32).is_multiple_of(8)
}

fn centre(index: usize, count: usize, place: Place) -> (f64, f64) {
    let (left, right, above, below) = ((NEAR, MIDDLE), (FAR, MIDDLE), (MIDDLE, NEAR), (MIDDLE, FAR));
    match (count, place) {
        (1, Place::Unsaid) => (MIDDLE, MIDDLE),
        (1, Place::Left) => left,
        (1, Place::Right) => right,
        (1, Place::Above) => above,
        (1, Place::Below) => below,
        (2, Place::Unsaid | Place::Left) => [left, right][index],
        (2, Place::Right) => [right, left][index],
        (2, Place::Above) => [above, below][index],
        (2, Place::Below) => [below, above][index],
        (3, _) => [above, (NEAR, FAR), (FAR, FAR)][index],
        _ => [(NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)][index % 4],
    }
}

/// Radii between which an object of a size that is told lies, if it stands among so many, at a
/// place: nearer to its own than to the next one.
pub fn radii(count: usize, size: ObjectSize, place: Place) -> std::ops::Range<f64> {
    let between = |a, b| (radius(count, a, place) + radius(count, b, place)) / 2.0;
    match size {
        ObjectSize::Small => 0.0..between(ObjectSize::Small, ObjectSize::Plain),
        ObjectSize::Plain => 0.0..f64::INFINITY,
        ObjectSize::Large => between(ObjectSize::Plain, ObjectSize::Large)..f64::INFINITY,
    }
}

fn radius(count: usize, size: ObjectSize, place: Place) -> f64 {
    let alone = count == 1 && place == Place::Unsaid;
    match size {
        ObjectSize::Small if alone => 22.0,
        ObjectSize::Large if alone => 50.0,
        ObjectSize::Plain if alone => 36.0,
        ObjectSize::Small => 17.0,
        ObjectSize::Large => 31.0,
        ObjectSize::Plain if count > 2 => 24.0,
        ObjectSize::Plain => 26.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn rng(i: u64) -> Rng {
        Rng::new(5, i, Stream::Train, 0)
    }

    #[test]
    fn both_splits_hold_every_category_and_never_share_a_composition() {
        let mut prompts = [std::collections::HashSet::new(), std::collections::HashSet::new()];
        for kind in KINDS {
            for (split, prompts) in [Split::Train, Split::HeldOut].into_iter().zip(&mut prompts) {
                prompts.extend((0..2000).map(|i| Scene::of_kind(&rng(i), kind, split).prompt()));
            }
            let keys = |split| (0..300).map(|i| Scene::of_kind(&rng(i), kind, split).key()).collect::<Vec<_>>();
            let (train, test) = (keys(Split::Train), keys(Split::HeldOut));
            assert!(train.iter().all(|k| !held_out(k)) && test.iter().all(|k| held_out(k)));
            let distinct = |keys: &[String]| keys.iter().collect::<std::collections::HashSet<_>>().len();
            assert!(distinct(&test) >= 5, "{kind:?}: {}", distinct(&test));
        }
        let [train, test] = &prompts;
        assert!(train.is_disjoint(test), "{:?}", train.intersection(test).next());
    }

    #[test]
    fn objects_stay_apart_and_inside() {
        for i in 0..2000 {
            let scene = Scene::sample(&rng(i), Split::Train);
            for (n, a) in scene.objects.iter().enumerate() {
                let inside = |v: f64| v - a.radius >= 0.0 && v + a.radius <= 128.0;
                assert!(inside(a.centre.0) && inside(a.centre.1), "{a:?}");
                for b in &scene.objects[n + 1..] {
                    let (dx, dy) = ((a.centre.0 - b.centre.0).abs(), (a.centre.1 - b.centre.1).abs());
                    assert!(dx.max(dy) > 0.95 * (a.radius + b.radius), "{a:?} {b:?}");
                }
            }
        }
    }
}
