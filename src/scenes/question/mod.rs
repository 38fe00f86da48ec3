//! Questions about scenes, each with the one answer that a viewer of the picture can give.

#[cfg(test)]
mod tests;
pub(super) mod wording;

use super::caption::{at, chinese, english, phrase, phrase_zh};
use super::describe::{place_of, side};
use super::wording::{Said, Voice, relation};
use super::{BACKGROUNDS, COLOURS, KINDS, Kind, Object, ObjectSize, Place, SHAPES, Scene, Split, held_out};
use crate::rng::Rng;

/// Topic of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QuestionKind {
    /// Which object.
    What,
    /// Which colour, of an object or of the background.
    Colour,
    /// How many.
    Count,
    /// Where.
    Where,
    /// Whether there is such an object; as often yes as no.
    Presence,
    /// A description of all.
    Caption,
}

/// All kinds of questions.
pub const QUESTION_KINDS: [QuestionKind; 6] = [
    QuestionKind::What,
    QuestionKind::Colour,
    QuestionKind::Count,
    QuestionKind::Where,
    QuestionKind::Presence,
    QuestionKind::Caption,
];

impl QuestionKind {
    /// Any kind: presence, which is learnt most slowly, twice as often as each of the others.
    pub fn sample(rng: &Rng) -> Self {
        QUESTION_KINDS.get(rng.below(1000, QUESTION_KINDS.len() + 1)).copied().unwrap_or(Self::Presence)
    }
}

/// A question about a scene.
#[derive(Clone, Debug)]
pub struct Question {
    /// The topic.
    pub kind: QuestionKind,
    /// The picture.
    pub scene: Scene,
    /// In English, or about once in six in Chinese.
    pub text: String,
    /// The pattern of the text, which names a held-out wording.
    pub wording: &'static str,
    /// In the language of the question, short, in lower case, without a final stop.
    pub answer: String,
}

impl Question {
    /// A question of any kind.
    pub fn sample(rng: &Rng, split: Split) -> Self {
        Self::of_kind(rng, QuestionKind::sample(rng), split, split)
    }

    /// A question of one kind about a scene of the split `scenes`, in a wording of the split
    /// `words`.
    pub fn of_kind(rng: &Rng, kind: QuestionKind, scenes: Split, words: Split) -> Self {
        let kinds: &[Kind] = match kind {
            QuestionKind::Count => &[Kind::Counting, Kind::Counting, Kind::Counting, Kind::TwoObjects],
            QuestionKind::What | QuestionKind::Where => {
                &[Kind::SingleObject, Kind::Colours, Kind::TwoObjects, Kind::Position, Kind::AttributeBinding]
            }
            _ => &KINDS,
        };
        let mut attempt = 0;
        loop {
            let rng = rng.fork(attempt);
            // From other draws than the kind, or one would tell the other.
            let scene = Scene::of_kind(&rng.fork(1), kinds[rng.below(1, kinds.len())], scenes);
            if let Some(question) = Self::worded(&rng.fork(0), &scene, kind, scenes, words) {
                return question;
            }
            attempt += 1;
        }
    }

    /// A question about this very scene, if it is of the split and has an answer of the kind.
    pub fn on(rng: &Rng, scene: &Scene, kind: QuestionKind, split: Split) -> Option<Self> {
        Self::worded(rng, scene, kind, split, split)
    }

    fn worded(rng: &Rng, scene: &Scene, kind: QuestionKind, scenes: Split, words: Split) -> Option<Self> {
        let of_split = |scene: &Scene| held_out(&scene.key()) == (scenes == Split::HeldOut);
        let seen = scene.seen()?;
        if !of_split(scene) || kind == QuestionKind::Caption && !of_split(&seen) {
            return None;
        }
        let voice = Voice::draw(rng, words);
        let (Said { text, wording }, answer) = match kind {
            QuestionKind::What => what(rng, &seen, voice)?,
            QuestionKind::Colour => colour(rng, &seen, voice),
            QuestionKind::Count => count(rng, &seen, voice),
            QuestionKind::Where => place(rng, &seen, voice)?,
            QuestionKind::Presence => presence(rng, &seen, voice),
            QuestionKind::Caption => {
                (voice.say(&wording::CAPTION, &[]), if voice.chinese { seen.prompt_zh() } else { seen.prompt() })
            }
        };
        Some(Self { kind, scene: scene.clone(), text, wording, answer })
    }
}

impl Scene {
    /// The scene as a viewer tells it who knows the picture alone: the left or upper object first.
    /// `None` if there is no caption for it.
    pub fn seen(&self) -> Option<Self> {
        let mut objects = self.objects.clone();
        if let [first, second] = &objects[..]
            && matches!(side(first.centre, second.centre), Place::Right | Place::Below)
        {
            objects.reverse();
        }
        Self::of_objects(objects, self.background)
    }
}

/// Colour and shape, in the language of the question: "a red circle".
fn thing(object: &Object, voice: Voice) -> String {
    let plain = object.of_plain_size();
    if voice.chinese { format!("一个{}", phrase_zh(&plain)) } else { phrase(&plain) }
}

fn in_words(voice: Voice, english: &str, chinese: &str) -> String {
    if voice.chinese { chinese } else { english }.to_string()
}

fn what(rng: &Rng, scene: &Scene, voice: Voice) -> Option<(Said, String)> {
    match &scene.objects[..] {
        [only] => Some((voice.say(&wording::WHAT, &[]), thing(only, voice))),
        [first, second] if scene.kind != Kind::Counting => {
            let (asked, other) = if rng.below(1, 2) == 0 { (first, second) } else { (second, first) };
            let place = place_of(asked, scene);
            let by_colour = asked.colour != other.colour;
            match rng.below(2, 3) {
                0 if by_colour => {
                    let colour = &COLOURS[asked.colour];
                    let text = voice.say(&wording::SHAPE, &[("{c}", in_words(voice, colour.name, colour.name_zh))]);
                    Some((text, in_words(voice, &format!("a {}", english(asked.shape)), chinese(asked.shape))))
                }
                _ if place == Place::Unsaid => None,
                1 => {
                    let gaps = [
                        ("{r}", relation(place).to_string()),
                        ("{p}", voice.at(place)),
                        ("{o}", voice.name(other, scene, false)),
                    ];
                    Some((voice.say(&wording::WHAT_BESIDE, &gaps), thing(asked, voice)))
                }
                _ => Some((voice.say(&wording::WHAT_AT, &[("{p}", voice.at(place))]), thing(asked, voice))),
            }
        }
        _ => None,
    }
}

fn colour(rng: &Rng, scene: &Scene, voice: Voice) -> (Said, String) {
    if rng.below(1, 6) == 0 {
        let colour = scene.background.map(|b| &BACKGROUNDS[b]);
        let (english, chinese) = colour.map_or(("white", "白色"), |c| (c.name, c.name_zh));
        let gap = in_words(voice, "the background", "背景");
        let said = voice.say(&wording::COLOUR, &[("{o}", gap), ("{are}", "is".into()), ("{do}", "does".into())]);
        return (said, in_words(voice, english, chinese));
    }
    let object = &scene.objects[rng.below(2, scene.objects.len())];
    let (shape, shape_zh) = (english(object.shape), chinese(object.shape));
    let only = scene.objects.iter().filter(|o| o.shape == object.shape).count() == 1;
    let many = scene.kind == Kind::Counting && scene.objects.len() > 1;
    let (are, do_) = if many { ("are", "do") } else { ("is", "does") };
    let gap = match (only, scene.kind) {
        (true, _) => in_words(voice, &format!("the {shape}"), shape_zh),
        (_, Kind::Counting) => in_words(voice, &format!("the {shape}s"), shape_zh),
        // Two of one shape are told apart by their places.
        _ => {
            let at = voice.at(place_of(object, scene));
            in_words(voice, &format!("the {shape} {at}"), &format!("{at}的{shape_zh}"))
        }
    };
    let colour = &COLOURS[object.colour];
    let gaps = [("{o}", gap), ("{are}", are.to_string()), ("{do}", do_.to_string())];
    (voice.say(&wording::COLOUR, &gaps), in_words(voice, colour.name, colour.name_zh))
}

fn count(rng: &Rng, scene: &Scene, voice: Voice) -> (Said, String) {
    let object = &scene.objects[rng.below(1, scene.objects.len())];
    let (shape, colour) = (object.shape, &COLOURS[object.colour]);
    let count = |counted: &dyn Fn(&Object) -> bool| scene.objects.iter().filter(|o| counted(o)).count();
    let (english, chinese, n) = match rng.below(2, 4) {
        0 => ("shapes".into(), "图形".into(), scene.objects.len()),
        1 => {
            let of_colour = count(&|o| o.colour == object.colour);
            (format!("{} shapes", colour.name), format!("{}图形", colour.name_zh), of_colour)
        }
        2 => {
            let both = count(&|o| (o.shape, o.colour) == (shape, object.colour));
            let chinese = format!("{}{}", colour.name_zh, chinese(shape));
            (format!("{} {}s", colour.name, english(shape)), chinese, both)
        }
        _ => (format!("{}s", english(shape)), chinese(shape).to_string(), count(&|o| o.shape == shape)),
    };
    let (number, number_zh) = [("one", "一个"), ("two", "两个"), ("three", "三个"), ("four", "四个")][n - 1];
    let text = voice.say(&wording::COUNT, &[("{s}", in_words(voice, &english, &chinese))]);
    (text, in_words(voice, number, number_zh))
}

fn place(rng: &Rng, scene: &Scene, voice: Voice) -> Option<(Said, String)> {
    if scene.kind == Kind::Counting && scene.objects.len() > 1 {
        return None;
    }
    let object = &scene.objects[rng.below(1, scene.objects.len())];
    let place = place_of(object, scene);
    if scene.objects.len() > 1 && place == Place::Unsaid {
        return None;
    }
    let at_zh = ["在中间", "在左边", "在右边", "在上面", "在下面"][place as usize];
    Some((voice.say(&wording::WHERE, &[("{o}", voice.name(object, scene, true))]), in_words(voice, at(place), at_zh)))
}

/// As often yes as no, and a no is a near miss (what is there but for its colour or its shape) or
/// plainly absent.
fn presence(rng: &Rng, scene: &Scene, voice: Voice) -> (Said, String) {
    let there = rng.below(1, 2) == 0;
    let by_shape = rng.below(2, 3) == 0;
    let mut asked = scene.objects[rng.below(3, scene.objects.len())].clone();
    asked.size = ObjectSize::Plain;
    let found =
        |asked: &Object| scene.objects.iter().any(|o| o.shape == asked.shape && (by_shape || o.colour == asked.colour));
    if !there {
        let miss = if by_shape { Miss::Shape } else { [Miss::Shape, Miss::Colour, Miss::Both][rng.below(4, 3)] };
        let start = rng.below(5, 60);
        let others = (start..start + 60).map(|i| Object {
            shape: if miss == Miss::Colour { asked.shape } else { SHAPES[i % SHAPES.len()] },
            colour: if miss == Miss::Shape { asked.colour } else { (i / SHAPES.len()) % COLOURS.len() },
            ..asked.clone()
        });
        // Nothing in the scene has the shape or the colour of what is plainly absent.
        let absent = |o: &Object| !scene.objects.iter().any(|s| s.shape == o.shape || s.colour == o.colour);
        let right = |o: &Object| !found(o) && (miss != Miss::Both || absent(o));
        asked = others.clone().find(right).unwrap_or(asked);
    }
    let (shape, shape_zh) = (english(asked.shape), chinese(asked.shape));
    let gap = match by_shape {
        true => in_words(voice, &format!("a {shape}"), shape_zh),
        false => in_words(voice, &phrase(&asked), &phrase_zh(&asked)),
    };
    let answer = if found(&asked) { in_words(voice, "yes", "有") } else { in_words(voice, "no", "没有") };
    (voice.say(&wording::PRESENCE, &[("{n}", gap)]), answer)
}

/// What is wrong with an object that is not there.
#[derive(Clone, Copy, PartialEq)]
enum Miss {
    Shape,
    Colour,
    Both,
}
