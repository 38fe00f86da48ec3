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
        "please add {n} {p}",
        "can you add {n} {p}?",
        "could you put {n} {p}?",
        "i want {n} {p}",
        "now add {n} {p}",
        "now draw {n} {p}",
        "{p}, put {n}",
        "{p}, draw {n}",
        "let there be {n} {p}",
        "show {n} {p} too",
        "add {n} to the picture {p}",
        "i would like {n} {p}",
        "place {n} {p} as well",
        "also put {n} {p}",
        "create {n} {p}",
        "make {n} appear {p}",
        "also add {n} {p}",
        "{p} there should be {n}",
    ],
    chinese: &[
        "在{p}添加{n}",
        "在{p}画{n}",
        "在{p}加上{n}",
        "请在{p}添加{n}",
        "{p}再画{n}",
        "在{p}放上{n}",
        "{p}应该有{n}",
    ],
};
const ADD_BESIDE: Wordings = Wordings {
    english: &[
        "add {n} {r} {o}",
        "put {n} {r} {o}",
        "draw {n} {r} {o}",
        "{r} {o}, add {n}",
        "place {n} {r} {o}",
        "please add {n} {r} {o}",
        "can you add {n} {r} {o}?",
        "could you put {n} {r} {o}?",
        "i want {n} {r} {o}",
        "now add {n} {r} {o}",
        "{r} {o}, put {n}",
        "{r} {o}, draw {n}",
        "also show {n} {r} {o}",
        "there should be {n} {r} {o}",
        "insert {n} {r} {o}",
        "also draw {n} {r} {o}",
        "let there be {n} {r} {o}",
        "show {n} {r} {o} too",
        "create {n} {r} {o}",
        "also add {n} {r} {o}",
        "make {n} appear {r} {o}",
    ],
    chinese: &[
        "在{o}的{p}添加{n}",
        "在{o}的{p}画{n}",
        "在{o}的{p}加上{n}",
        "请在{o}的{p}添加{n}",
        "在{o}的{p}放上{n}",
        "{o}的{p}再画{n}",
        "{o}的{p}应该有{n}",
    ],
};
const ADD_ANYWHERE: Wordings = Wordings {
    english: &[
        "add {n}",
        "also draw {n}",
        "put {n} in the picture too",
        "add {n} to the picture",
        "insert {n}",
        "please add {n}",
        "can you add {n}?",
        "could you draw {n} too?",
        "i want {n} as well",
        "now add {n}",
        "now draw {n}",
        "add {n} as well",
        "put {n} there too",
        "also show {n}",
        "there should be {n} too",
        "let there be {n} too",
        "also add {n}",
        "show {n} too",
        "draw {n} too",
        "also put {n}",
        "make {n} appear",
    ],
    chinese: &["添加{n}", "再画{n}", "加上{n}", "请添加{n}", "再加{n}", "放上{n}"],
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
        "please remove {o}",
        "can you remove {o}?",
        "could you delete {o}?",
        "now remove {o}",
        "now take {o} away",
        "remove {o} from the picture",
        "delete {o} from the image",
        "erase {o} from the picture",
        "take {o} out of the picture",
        "take {o} out",
        "i do not want {o}",
        "i want {o} to be gone",
        "{o} should be gone",
        "{o} should go away",
        "let {o} disappear",
        "{o} should disappear",
        "please erase {o}",
        "no more {o}",
        "without {o}",
        "drop {o}",
    ],
    chinese: &["去掉{o}", "删除{o}", "把{o}拿走", "请去掉{o}", "把{o}删除", "让{o}消失", "不要{o}"],
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
        "please replace {o} with {n}",
        "can you replace {o} with {n}?",
        "could you turn {o} into {n}?",
        "now turn {o} into {n}",
        "now replace {o} with {n}",
        "exchange {o} for {n}",
        "make {o} into {n}",
        "let {o} become {n}",
        "{o} should become {n}",
        "{o} should turn into {n}",
        "i want {n} instead of {o}",
        "show {n} instead of {o}",
        "put {n} instead of {o}",
        "put {n} where {o} is",
        "draw {n} where {o} is",
        "draw {n} in place of {o}",
        "let {o} be {n}",
        "please change {o} into {n}",
        "instead of {o}, draw {n}",
        "make {n} out of {o}",
    ],
    chinese: &[
        "把{o}换成{n}",
        "把{o}变成{n}",
        "用{n}代替{o}",
        "请把{o}换成{n}",
        "让{o}变成{n}",
        "把{o}改成{n}",
        "将{o}替换为{n}",
    ],
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
        "please make {o} {c}",
        "can you make {o} {c}?",
        "could you paint {o} {c}?",
        "now make {o} {c}",
        "now paint {o} {c}",
        "i want {o} to be {c}",
        "i want {o} in {c}",
        "give {o} the colour {c}",
        "give {o} a {c} colour",
        "{o} should become {c}",
        "let {o} become {c}",
        "set the colour of {o} to {c}",
        "set the color of {o} to {c}",
        "draw {o} in {c}",
        "show {o} in {c}",
        "color {o} {c}",
        "change {o} to {c}",
        "please turn {o} {c}",
        "{o} in {c}, please",
        "the colour of {o} should be {c}",
    ],
    chinese: &[
        "把{o}变成{c}",
        "把{o}改成{c}",
        "将{o}涂成{c}",
        "请把{o}变成{c}",
        "把{o}的颜色改成{c}",
        "让{o}变成{c}",
        "{o}应该是{c}",
    ],
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
        "please move {o} {t}",
        "can you move {o} {t}?",
        "could you put {o} {p}?",
        "now move {o} {t}",
        "now put {o} {p}",
        "i want {o} {p}",
        "i want {o} to be {p}",
        "let {o} be {p}",
        "let {o} go {t}",
        "slide {o} {t}",
        "push {o} {t}",
        "drag {o} {t}",
        "{o} should go {t}",
        "{o} should move {t}",
        "show {o} {p}",
        "set {o} {p}",
        "take {o} {t}",
        "have {o} {p}",
        "please place {o} {p}",
        "carry {o} {t}",
    ],
    chinese: &[
        "把{o}移到{p}",
        "将{o}放在{p}",
        "{o}应该在{p}",
        "请把{o}移到{p}",
        "把{o}放到{p}",
        "让{o}在{p}",
        "将{o}移动到{p}",
    ],
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
        "please make {o} {z}",
        "can you make {o} {z}?",
        "could you {v} {o}?",
        "please {v} {o}",
        "now make {o} {z}",
        "now {v} {o}",
        "i want {o} to be {z}",
        "{o} should become {z}",
        "let {o} become {z}",
        "show {o} {z}",
        "{o} {z}, please",
        "make {o} a bit {z}",
        "draw a {z} version of {o}",
        "{v} {o} a bit",
        "{v} {o} in the picture",
        "turn {o} {z}",
        "have {o} {z}",
        "can you {v} {o}?",
    ],
    chinese: &["把{o}变{z}", "让{o}{z}一点", "将{o}{v}", "请把{o}变{z}", "把{o}{v}", "请{v}{o}", "把{o}画{z}一点"],
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
        "please flip the picture",
        "can you flip the picture left to right?",
        "could you mirror the picture?",
        "now mirror the picture",
        "now flip it from left to right",
        "flip the picture from left to right",
        "flip the image horizontally",
        "mirror it",
        "mirror it from left to right",
        "please mirror the image",
        "turn the picture around from left to right",
        "swap the left and the right side",
        "exchange left and right",
        "show the picture in a mirror",
        "show it mirrored",
        "flip everything from left to right",
        "i want the picture mirrored",
        "left should be right",
    ],
    chinese: &[
        "左右翻转图片",
        "把图片水平翻转",
        "左右对调",
        "请左右翻转",
        "水平翻转这张图",
        "镜像翻转图片",
        "把左右交换",
    ],
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
        "please make the background {b}",
        "can you make the background {b}?",
        "could you change the background to {b}?",
        "now make the background {b}",
        "i want a {b} background",
        "i want the background to be {b}",
        "give it a {b} background",
        "give the picture a {b} background",
        "put it on a {b} background",
        "turn the background {b}",
        "let the background be {b}",
        "the background should become {b}",
        "show everything on a {b} background",
        "draw it on a {b} background",
        "colour the background {b}",
        "change the color of the background to {b}",
        "set the background colour to {b}",
        "replace the background with {b}",
        "a {b} background, please",
        "with a {b} background",
    ],
    chinese: &[
        "把背景变成{b}",
        "背景换成{b}",
        "使用{b}背景",
        "请把背景换成{b}",
        "让背景变成{b}",
        "背景应该是{b}",
        "把背景改成{b}",
    ],
};
const COMBINATION: Wordings = Wordings {
    english: &[
        "{1} and {2}",
        "{1}, then {2}",
        "{1} and then {2}",
        "first {1}, then {2}",
        "{1} and also {2}",
        "{1}, and {2}",
        "{1}; {2}",
        "{1}. {2}",
        "{1}. then {2}",
        "{1}, and then {2}",
        "first {1} and then {2}",
        "first {1}. then {2}",
        "{1}, next {2}",
        "{1}, after that {2}",
        "{1} and afterwards {2}",
        "{1}, also {2}",
        "both {1} and {2}",
        "{1} plus {2}",
        "please {1} and {2}",
        "now {1}, then {2}",
    ],
    chinese: &[
        "{1}，{2}",
        "{1}，然后{2}",
        "先{1}，再{2}",
        "{1}，并且{2}",
        "{1}。{2}",
        "{1}，接着{2}",
        "首先{1}，然后{2}",
    ],
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
