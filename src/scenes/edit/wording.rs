//! Words for edits, in English and Chinese.

use super::EditKind;
use super::change::Change;
use crate::scenes::caption::{chinese, english, phrase, phrase_zh};
use crate::scenes::describe::{centre_of, side};
use crate::scenes::wording::{Voice, Wordings, relation};
use crate::scenes::{BACKGROUNDS, COLOURS, Object, Place, Scene, Size};

// Gaps: {o} the object, {n} a new one, {c} a colour, {p} "on the left", {t} "to the left", {r} "to the left of", {z} larger
// or smaller, {v} enlarge or shrink, {b} a background.

const ADD: Wordings = Wordings {
    english: &[
        "add {n} {p}",
        "put {n} {p}",
        "draw {n} {p}",
        "place {n} {p}",
        "also show {n} {p}",
        "there should be {n} {p}",
        "insert {n} {p}",
        "{p}, add {n}",
    ],
    chinese: &["在{p}添加{n}", "在{p}画{n}", "在{p}加上{n}"],
};
const ADD_BESIDE: Wordings = Wordings {
    english: &["add {n} {r} {o}", "put {n} {r} {o}", "draw {n} {r} {o}", "{r} {o}, add {n}", "place {n} {r} {o}"],
    chinese: &["在{o}的{p}添加{n}", "在{o}的{p}画{n}", "在{o}的{p}加上{n}"],
};
const ADD_ANYWHERE: Wordings = Wordings {
    english: &["add {n}", "also draw {n}", "put {n} in the picture too", "add {n} to the picture", "insert {n}"],
    chinese: &["添加{n}", "再画{n}", "加上{n}"],
};
const REMOVE: Wordings = Wordings {
    english: &[
        "remove {o}",
        "delete {o}",
        "erase {o}",
        "take {o} away",
        "get rid of {o}",
        "take out {o}",
        "leave out {o}",
        "make {o} disappear",
    ],
    chinese: &["去掉{o}", "删除{o}", "把{o}拿走"],
};
const REPLACE: Wordings = Wordings {
    english: &[
        "replace {o} with {n}",
        "turn {o} into {n}",
        "change {o} into {n}",
        "swap {o} for {n}",
        "make {o} {n}",
        "put {n} in place of {o}",
        "draw {n} instead of {o}",
        "{o} should be {n}",
    ],
    chinese: &["把{o}换成{n}", "把{o}变成{n}", "用{n}代替{o}"],
};
const RECOLOUR: Wordings = Wordings {
    english: &[
        "make {o} {c}",
        "change the colour of {o} to {c}",
        "change the color of {o} to {c}",
        "paint {o} {c}",
        "colour {o} {c}",
        "turn {o} {c}",
        "{o} should be {c}",
        "let {o} be {c}",
    ],
    chinese: &["把{o}变成{c}", "把{o}改成{c}", "将{o}涂成{c}"],
};
const MOVE: Wordings = Wordings {
    english: &[
        "move {o} {t}",
        "put {o} {p}",
        "place {o} {p}",
        "shift {o} {t}",
        "bring {o} {t}",
        "{o} should be {p}",
        "draw {o} {p} instead",
    ],
    chinese: &["把{o}移到{p}", "将{o}放在{p}", "{o}应该在{p}"],
};
const RESIZE: Wordings = Wordings {
    english: &[
        "make {o} {z}",
        "{v} {o}",
        "{o} should be {z}",
        "draw {o} {z}",
        "let {o} be {z}",
        "i want {o} {z}",
        "change {o} to be {z}",
    ],
    chinese: &["把{o}变{z}", "让{o}{z}一点", "将{o}{v}"],
};
const FLIP: Wordings = Wordings {
    english: &[
        "flip the picture left to right",
        "mirror the picture",
        "flip it horizontally",
        "mirror the image",
        "flip the image from left to right",
        "show the mirror image",
        "swap left and right",
    ],
    chinese: &["左右翻转图片", "把图片水平翻转", "左右对调"],
};
const BACKGROUND: Wordings = Wordings {
    english: &[
        "make the background {b}",
        "change the background to {b}",
        "put everything on a {b} background",
        "set the background to {b}",
        "use a {b} background",
        "paint the background {b}",
        "the background should be {b}",
        "change the background colour to {b}",
    ],
    chinese: &["把背景变成{b}", "背景换成{b}", "使用{b}背景"],
};
const COMBINATION: Wordings = Wordings {
    english: &["{1} and {2}", "{1}, then {2}", "{1} and then {2}", "first {1}, then {2}", "{1} and also {2}"],
    chinese: &["{1}，{2}", "{1}，然后{2}", "先{1}，再{2}"],
};

/// An instruction that asks for these changes of a scene.
pub(super) fn say(changes: &[Change], scene: &Scene, voice: Voice) -> String {
    match changes {
        [only] => clause(only, scene, voice, false),
        _ => {
            let gaps = [("{1}", 0), ("{2}", 1)];
            let clauses = gaps.map(|(gap, i)| (gap, clause(&changes[i], scene, voice.again(i as u64), true)));
            voice.say(&COMBINATION, &clauses)
        }
    }
}

/// Words for one change; where it is `one_of_two` they do not depend on the other.
fn clause(change: &Change, scene: &Scene, voice: Voice, one_of_two: bool) -> String {
    let zh = voice.chinese;
    let o = |object: &Object| ("{o}", voice.name(object, scene, !one_of_two));
    match change {
        Change::Add { object, side, only } => {
            let new = if zh { format!("一个{}", phrase_zh(object)) } else { phrase(object) };
            let mut gaps = vec![("{n}", new), ("{p}", voice.at(*side))];
            match voice.pick(2, &[0, 0, 1, 2]) {
                1 if !one_of_two => {
                    gaps.extend([("{r}", relation(*side).to_string()), o(&scene.objects[0])]);
                    voice.say(&ADD_BESIDE, &gaps)
                }
                2 if *only && !one_of_two => voice.say(&ADD_ANYWHERE, &gaps),
                _ => voice.say(&ADD, &gaps),
            }
        }
        Change::Remove(object) => voice.say(&REMOVE, &[o(object)]),
        Change::Alter { kind: EditKind::Replace, old, new } => {
            let plain = Object { size: Size::Plain, ..new.clone() };
            // The colour may go without saying where it stays.
            let short = old.colour == new.colour && voice.pick(3, &[false, true]);
            let new = match (zh, short) {
                (true, false) => phrase_zh(&plain),
                (true, true) => chinese(new.shape).to_string(),
                (false, false) => phrase(&plain),
                (false, true) => format!("a {}", english(new.shape)),
            };
            voice.say(&REPLACE, &[o(old), ("{n}", new)])
        }
        Change::Alter { kind: EditKind::Move, old, new } => {
            let place = side(new.centre, centre_of(Place::Unsaid));
            voice.say(&MOVE, &[o(old), ("{p}", voice.at(place)), ("{t}", towards(place).to_string())])
        }
        Change::Alter { kind: EditKind::Resize, old, new } => {
            let (z, v): (&[&str], _) = match (new.radius > old.radius, zh) {
                (true, false) => (&["bigger", "larger"], "enlarge"),
                (false, false) => (&["smaller"], "shrink"),
                (true, true) => (&["大"], "放大"),
                (false, true) => (&["小"], "缩小"),
            };
            voice.say(&RESIZE, &[o(old), ("{z}", voice.pick(3, z).to_string()), ("{v}", v.to_string())])
        }
        Change::Alter { old, new, .. } => {
            let colour = &COLOURS[new.colour];
            voice.say(&RECOLOUR, &[o(old), ("{c}", if zh { colour.name_zh } else { colour.name }.to_string())])
        }
        Change::Flip => voice.say(&FLIP, &[]),
        Change::Background(background) => {
            let (english, chinese) = background.map_or(("white", "白色"), |b| {
                let background = &BACKGROUNDS[b];
                (background.name, background.name_zh)
            });
            voice.say(&BACKGROUND, &[("{b}", if zh { chinese } else { english }.to_string())])
        }
    }
}

/// "to the left".
fn towards(place: Place) -> &'static str {
    ["to the middle", "to the left", "to the right", "to the top", "to the bottom"][place as usize]
}
