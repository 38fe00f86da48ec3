//! Words for questions, in English and Chinese. Gaps: {o} an object, {n} a thing that may be there, {s} things to be counted,
//! {c} a colour, {p} "on the left", {r} "to the left of".

use crate::scenes::wording::Wordings;

pub(super) const WHAT: Wordings = Wordings {
    english: &[
        "what is in the picture?",
        "what is this?",
        "what do you see?",
        "what is shown here?",
        "what can be seen in the picture?",
        "which object is this?",
        "name the object",
    ],
    chinese: &["图中是什么？", "这是什么？", "你看到了什么？"],
};
pub(super) const WHAT_AT: Wordings = Wordings {
    english: &[
        "what is {p}?",
        "which object is {p}?",
        "what do you see {p}?",
        "what is there {p}?",
        "name the object {p}",
        "what can be seen {p}?",
    ],
    chinese: &["{p}是什么？", "{p}有什么？", "{p}的图形是什么？"],
};
pub(super) const WHAT_BESIDE: Wordings = Wordings {
    english: &[
        "what is {r} {o}?",
        "which object is {r} {o}?",
        "what do you see {r} {o}?",
        "name the object {r} {o}",
        "what is there {r} {o}?",
    ],
    chinese: &["{o}的{p}是什么？", "{o}的{p}有什么？", "什么在{o}的{p}？"],
};
pub(super) const SHAPE: Wordings = Wordings {
    english: &[
        "which shape is {c}?",
        "what shape is {c}?",
        "which of the shapes is {c}?",
        "what is {c}?",
        "name the shape that is {c}",
    ],
    chinese: &["哪个图形是{c}的？", "什么是{c}的？", "{c}的是什么图形？"],
};
pub(super) const COLOUR: Wordings = Wordings {
    english: &[
        "what colour is {o}?",
        "what color is {o}?",
        "which colour does {o} have?",
        "what is the colour of {o}?",
        "which colour is {o}?",
        "name the colour of {o}",
        "in what colour is {o}?",
    ],
    chinese: &["{o}是什么颜色？", "{o}的颜色是什么？", "{o}是哪种颜色？"],
};
pub(super) const COLOUR_ALL: Wordings = Wordings {
    english: &[
        "what colour are {o}?",
        "what color are {o}?",
        "which colour do {o} have?",
        "what is the colour of {o}?",
        "which colour are {o}?",
        "name the colour of {o}",
        "in what colour are {o}?",
    ],
    chinese: COLOUR.chinese,
};
pub(super) const COUNT: Wordings = Wordings {
    english: &[
        "how many {s} are there?",
        "how many {s} do you see?",
        "how many {s} are in the picture?",
        "count the {s}",
        "what is the number of {s}?",
        "how many {s} can you count?",
        "how many {s} does the picture show?",
    ],
    chinese: &["有几个{s}？", "图中有多少个{s}？", "数一数{s}有几个？"],
};
pub(super) const WHERE: Wordings = Wordings {
    english: &[
        "where is {o}?",
        "where do you see {o}?",
        "in which place is {o}?",
        "where can {o} be found?",
        "where in the picture is {o}?",
        "what is the place of {o}?",
    ],
    chinese: &["{o}在哪里？", "{o}在什么位置？", "{o}在图中的哪里？"],
};
pub(super) const PRESENCE: Wordings = Wordings {
    english: &[
        "is there {n}?",
        "is there {n} in the picture?",
        "do you see {n}?",
        "does the picture show {n}?",
        "can you see {n}?",
        "does the picture have {n}?",
        "is {n} in the picture?",
    ],
    chinese: &["有{n}吗？", "图中有{n}吗？", "图里有没有{n}？"],
};
pub(super) const CAPTION: Wordings = Wordings {
    english: &[
        "describe the picture",
        "describe this image",
        "write a caption",
        "caption this picture",
        "give a caption for the image",
        "describe everything that you see",
        "put the picture into words",
    ],
    chinese: &["描述这张图片", "写一个图片说明", "描述图中的内容"],
};
