//! Words for compositions, in English and Chinese.

use super::{BACKGROUNDS, COLOURS, Kind, Object, ObjectSize, Place, Scene, Shape};
use crate::rng::Rng;

pub(super) fn english(shape: Shape) -> &'static str {
    match shape {
        Shape::Circle => "circle",
        Shape::Square => "square",
        Shape::Triangle => "triangle",
        Shape::Star => "star",
        Shape::Heart => "heart",
        Shape::Diamond => "diamond",
    }
}

pub(super) fn chinese(shape: Shape) -> &'static str {
    match shape {
        Shape::Circle => "圆形",
        Shape::Square => "方形",
        Shape::Triangle => "三角形",
        Shape::Star => "星星",
        Shape::Heart => "心形",
        Shape::Diamond => "菱形",
    }
}

/// "large red circle".
fn noun(object: &Object) -> String {
    let size = match object.size {
        ObjectSize::Small => "small ",
        ObjectSize::Plain => "",
        ObjectSize::Large => "large ",
    };
    format!("{size}{} {}", COLOURS[object.colour].name, english(object.shape))
}

/// "a large red circle", "an orange star".
pub(super) fn phrase(object: &Object) -> String {
    let noun = noun(object);
    let article = if noun.starts_with("orange") { "an" } else { "a" };
    format!("{article} {noun}")
}

/// "on the left".
pub(super) fn at(place: Place) -> &'static str {
    ["in the middle", "on the left", "on the right", "at the top", "at the bottom"][place as usize]
}

/// "大的红色圆形".
pub(super) fn phrase_zh(object: &Object) -> String {
    let size = match object.size {
        ObjectSize::Small => "小的",
        ObjectSize::Plain => "",
        ObjectSize::Large => "大的",
    };
    format!("{size}{}{}", COLOURS[object.colour].name_zh, chinese(object.shape))
}

impl Scene {
    /// The canonical English caption, on which models are evaluated.
    pub fn prompt(&self) -> String {
        let first = &self.objects[0];
        let count = self.objects.len();
        let body = match self.kind {
            Kind::Counting => {
                let number = ["one", "two", "three", "four"][count - 1];
                format!("{number} {}{}", noun(first), if count > 1 { "s" } else { "" })
            }
            Kind::SingleObject | Kind::Colours => match self.place {
                Place::Unsaid => phrase(first),
                Place::Left => format!("{} on the left", phrase(first)),
                Place::Right => format!("{} on the right", phrase(first)),
                Place::Above => format!("{} at the top", phrase(first)),
                Place::Below => format!("{} at the bottom", phrase(first)),
            },
            Kind::TwoObjects | Kind::AttributeBinding | Kind::Position => {
                let relation = match self.place {
                    Place::Unsaid => "and",
                    Place::Left => "to the left of",
                    Place::Right => "to the right of",
                    Place::Above => "above",
                    Place::Below => "below",
                };
                format!("{} {relation} {}", phrase(first), phrase(&self.objects[1]))
            }
        };
        match self.background {
            Some(b) => format!("{body} on a {} background", BACKGROUNDS[b].name),
            None => body,
        }
    }

    /// The canonical caption in Chinese.
    pub fn prompt_zh(&self) -> String {
        let first = &self.objects[0];
        let count = self.objects.len();
        let body = match self.kind {
            Kind::Counting => format!("{}个{}", ["一", "两", "三", "四"][count - 1], phrase_zh(first)),
            Kind::SingleObject | Kind::Colours => match self.place {
                Place::Unsaid => format!("一个{}", phrase_zh(first)),
                Place::Left => format!("左边一个{}", phrase_zh(first)),
                Place::Right => format!("右边一个{}", phrase_zh(first)),
                Place::Above => format!("上面一个{}", phrase_zh(first)),
                Place::Below => format!("下面一个{}", phrase_zh(first)),
            },
            Kind::TwoObjects | Kind::AttributeBinding | Kind::Position => {
                let second = phrase_zh(&self.objects[1]);
                let first = phrase_zh(first);
                match self.place {
                    Place::Unsaid => format!("一个{first}和一个{second}"),
                    Place::Left => format!("一个{first}在一个{second}的左边"),
                    Place::Right => format!("一个{first}在一个{second}的右边"),
                    Place::Above => format!("一个{first}在一个{second}的上面"),
                    Place::Below => format!("一个{first}在一个{second}的下面"),
                }
            }
        };
        match self.background {
            Some(b) => format!("{body}，{}背景", BACKGROUNDS[b].name_zh),
            None => body,
        }
    }

    /// Any wording: the canonical one most often, other English ones, and Chinese about once in
    /// seven.
    pub fn caption(&self, rng: &Rng) -> String {
        match rng.below(0, 100) {
            0..14 => self.prompt_zh(),
            14..24 => format!("draw {}", self.prompt()),
            24..32 => self.prompt().replace("to the left of", "left of").replace("to the right of", "right of"),
            32..40 => self.prompt().replace("small", "tiny").replace("large", "big"),
            _ => self.prompt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;
    use crate::scenes::Split;

    #[test]
    fn captions_say_what_is_there() {
        let object = |shape, colour, size| Object { shape, colour, size, centre: (64.0, 64.0), radius: 20.0 };
        let mut scene = Scene {
            kind: Kind::Position,
            objects: vec![object(Shape::Circle, 1, ObjectSize::Plain), object(Shape::Star, 4, ObjectSize::Plain)],
            place: Place::Above,
            background: Some(0),
        };
        assert_eq!(scene.prompt(), "an orange circle above a blue star on a light blue background");
        assert_eq!(scene.prompt_zh(), "一个橙色圆形在一个蓝色星星的上面，浅蓝色背景");
        scene.kind = Kind::Counting;
        scene.background = None;
        scene.objects = vec![object(Shape::Heart, 0, ObjectSize::Plain); 3];
        assert_eq!(scene.prompt(), "three red hearts");
        assert_eq!(scene.prompt_zh(), "三个红色心形");
        scene.kind = Kind::AttributeBinding;
        scene.place = Place::Unsaid;
        scene.objects = vec![object(Shape::Square, 8, ObjectSize::Large), object(Shape::Square, 2, ObjectSize::Small)];
        assert_eq!(scene.prompt(), "a large black square and a small yellow square");
    }

    #[test]
    fn the_canonical_wording_is_the_most_frequent() {
        let scene = Scene::sample(&Rng::new(1, 0, Stream::Train, 0), Split::Train);
        let captions = (0..200).map(|i| scene.caption(&Rng::new(1, i, Stream::Train, 1)));
        let canonical = captions.filter(|c| *c == scene.prompt()).count();
        assert!((90..190).contains(&canonical), "{canonical}");
    }
}
