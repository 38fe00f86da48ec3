//! Words for questions, in English and Chinese.
//!
//! Gaps: {o} an object, {n} a thing that may be there, {s} things to be counted, {c} a colour, {p}
//! "on the left", {r} "to the left of", {are} and {do} as the object demands them.

use crate::scenes::wording::Wordings;

pub(in crate::scenes) const WHAT: Wordings = Wordings {
    english: &[
        "what (is|do you see|can you see|can be seen) in (the|this) PIC?",
        "what (is shown|is drawn|has been drawn) (here|in the PIC)?",
        "what('s| is) (this|that|here|in the PIC)?",
        "what is it?",
        "what do you see(| here)?",
        "(which|what) (object|thing) (is this|is that|do you see|is shown|is in the PIC)?",
        "what does (the|this) PIC (show|contain)?",
        "do you know what this is?",
        "[(tell me|say) what (this is|is in the PIC|you see|is shown)]",
        "[name (the object|this object|this thing|what you see|the thing in the PIC)]",
        "[(recognize|determine|work out|find out) what (this is|you see|the PIC shows)]",
        "[give the name of (this|this object|what you see)]",
    ],
    chinese: &[
        "(图中|图里|画里|这张图片)(是|画的是|有)(什么|什么东西)？",
        "这(是|个是)什么？",
        "你看到了什么？",
        "[(说说|说出|告诉我)(图中的物体|这是什么|图里有什么)]",
    ],
    held_out: &[
        "what did somebody draw here?",
        "i want to know what this is",
        "this is a picture of what?",
        "the object here is called what?",
        "identify this",
    ],
    held_out_chinese: &["图片显示的是什么？", "我想知道这是什么"],
};
pub(in crate::scenes) const WHAT_AT: Wordings = Wordings {
    english: &[
        "what (is|do you see|can you see|can be seen|is there|is shown|is drawn) {p}?",
        "what's {p}?",
        "(which|what) (object|thing) (is|do you see|can you see|is there|is shown) {p}?",
        "what is the (object|thing) {p}?",
        "what does the PIC show {p}?",
        "{p}, what (is there|do you see|can you see)?",
        "[(tell me|say) what (is|you see|there is) {p}]",
        "[name (the (object|thing)|what is|what you see) {p}]",
        "[(recognize|determine|work out|find out) what is {p}]",
        "[give the name of the (object|thing) {p}]",
    ],
    chinese: &[
        "(|图中|图里){p}(是|有|画的是)(什么|什么图形|什么东西)？",
        "{p}的(图形|物体|东西)是什么？",
        "[(说说|说出|告诉我){p}(的物体|是什么|有什么)]",
    ],
    held_out: &[
        "what has been drawn {p}?",
        "i want to know what is {p}",
        "{p} there is what?",
        "look {p}: what is it?",
        "identify the object {p}",
    ],
    held_out_chinese: &["我想知道{p}是什么", "看{p}，那是什么？"],
};
pub(in crate::scenes) const WHAT_BESIDE: Wordings = Wordings {
    english: &[
        "what (is|do you see|can you see|can be seen|is there|is shown|is drawn) {r} {o}?",
        "what's {r} {o}?",
        "(which|what) (object|thing|shape) (is|do you see|can you see|is there|is shown) {r} {o}?",
        "what is the (object|thing|shape) {r} {o}?",
        "what does the PIC show {r} {o}?",
        "{r} {o}, what (is there|do you see|can you see)?",
        "[(tell me|say) what (is|you see|there is) {r} {o}]",
        "[name (the (object|thing|shape)|what is|what you see) {r} {o}]",
        "[(recognize|determine|work out|find out) what is {r} {o}]",
        "[give the name of the (object|thing) {r} {o}]",
    ],
    chinese: &[
        "(|图中|图里){o}(的|){p}(是|有|画的是)(什么|什么图形|什么东西)？",
        "什么在{o}(的|){p}？",
        "[(说说|说出|告诉我){o}(的|){p}(的物体|是什么|有什么)]",
    ],
    held_out: &[
        "what has been drawn {r} {o}?",
        "i want to know what is {r} {o}",
        "{r} {o} there is what?",
        "look {r} {o}: what is it?",
        "identify the object {r} {o}",
    ],
    held_out_chinese: &["我想知道{o}的{p}是什么", "看{o}的{p}，那是什么？"],
};
pub(in crate::scenes) const SHAPE: Wordings = Wordings {
    english: &[
        "((which|what) (shape|object|thing)|which one) is {c}?",
        "which of the (shapes|objects|things) is {c}?",
        "what is {c}(|| here| in the PIC)?",
        "what is the {c} (thing|shape|object|one)?",
        "what shape (is the {c} one|does the {c} (object|thing) have)?",
        "what {c} shape (is there|do you see|can you see)?",
        "[(tell me|say) (which shape|what|which object) is {c}]",
        "[name the ({c} (shape|object|thing)|shape that is {c}|object that is {c})]",
        "[(recognize|determine|find|work out) the {c} (shape|object|thing)]",
    ],
    chinese: &[
        "(哪个图形|什么|哪个)是{c}的？",
        "(|图中|图里){c}的(是什么图形|图形是什么|是什么|东西是什么)？",
        "[(说说|说出|告诉我){c}的(图形|是什么|图形是什么)]",
    ],
    held_out: &[
        "the {c} shape is what?",
        "i want to know what is {c}",
        "which shape has been drawn in {c}?",
        "there is something {c}: what is it?",
        "identify the {c} object",
    ],
    held_out_chinese: &["我想知道什么是{c}的", "有个{c}的东西，那是什么？"],
};
pub(in crate::scenes) const COLOUR: Wordings = Wordings {
    english: &[
        "(what|which) COLOUR {are} {o}(|| in the PIC)?",
        "(what|which) COLOUR {do} {o} have?",
        "what (is|would you say is) the COLOUR of {o}?",
        "in (what|which) COLOUR {are} {o}(| painted| drawn)?",
        "what COLOUR (do|can) you see on {o}?",
        "{o}(:|,) (which|what) COLOUR?",
        "[(tell me|say|name) the COLOUR of {o}]",
        "[(tell me|say) (what|which) COLOUR {o} {are}]",
        "[(recognize|determine|give|find out|work out) the COLOUR of {o}]",
    ],
    chinese: &[
        "(|图中|图里|图中的){o}是(什么|哪种)颜色(|的)？",
        "{o}的颜色是(什么|哪种)？",
        "[(说说|说出|告诉我){o}(的颜色|是什么颜色)]",
    ],
    held_out: &[
        "the colour of {o} is what?",
        "i want to know the colour of {o}",
        "which colour was used for {o}?",
        "look at {o}: what colour do you see?",
        "identify the colour of {o}",
        "what hue {do} {o} have?",
    ],
    held_out_chinese: &["我想知道{o}的颜色", "看{o}，什么颜色？"],
};
pub(in crate::scenes) const COUNT: Wordings = Wordings {
    english: &[
        "how many {s} (are there|do you see|can you see|can you count|are here)(|| in the PIC)?",
        "how many {s} (are|are shown|can be seen|have been drawn) in the PIC?",
        "how many {s} does the PIC (show|have|contain)?",
        "how many {s}?",
        "(what is|what's) the number of {s}(|| in the PIC)?",
        "what number of {s} (is there|do you see)?",
        "[count (the|all|all the) {s}(| in the PIC)]",
        "[(tell me|say) (how many {s} (there are|you see|you can see)|the number of {s})]",
        "[(give|determine|work out|find out) the number of {s}]",
    ],
    chinese: &[
        "(|图中|图里|这里)(有|一共有)(几个|多少个){s}？",
        "{s}(一共|)有(几个|多少个)？",
        "[(数一数|数数|数一下){s}(|有几个)]",
        "[告诉我有几个{s}]",
    ],
    held_out: &[
        "the number of {s} is what?",
        "i want to know how many {s} there are",
        "{s}: how many?",
        "look at the {s}: what is their number?",
        "what is the quantity of {s}?",
        "calculate the number of {s}",
    ],
    held_out_chinese: &["我想知道有几个{s}", "{s}的数量是多少？"],
};
pub(in crate::scenes) const WHERE: Wordings = Wordings {
    english: &[
        "where (is|can you see|do you see|can i see|can i find|do you find) {o}(|| in the PIC)?",
        "where's {o}?",
        "where (can {o} be (found|seen)|has {o} been drawn|does the PIC show {o})?",
        "where in the PIC is {o}?",
        "(in|at) (which|what) (place|position) is {o}?",
        "in (which|what) part of the PIC is {o}?",
        "(on which side is {o}|which side is {o} on)?",
        "what is the (place|position) of {o}?",
        "[(tell me|say) where {o} (is|can be seen|can be found)]",
        "[find {o}]",
        "[(spot|search for|point out|point at|point to) {o}]",
        "[(give|determine|work out|find out) (the (place|position) of {o}|where {o} is)]",
    ],
    chinese: &[
        "{o}(在|位于)(|图中的|图的)(哪里|什么位置|什么地方|哪儿|哪边)？",
        "[(说说|说出|告诉我){o}(的位置|在哪里|在哪儿)]",
        "[(找一找|找找){o}]",
    ],
    held_out: &[
        "{o} is where?",
        "i want to know where {o} is",
        "where was {o} put?",
        "look for {o}: where is it?",
        "locate {o}",
        "what is the location of {o}?",
    ],
    held_out_chinese: &["我想知道{o}在哪里", "图的哪一边有{o}？"],
};
pub(in crate::scenes) const PRESENCE: Wordings = Wordings {
    english: &[
        "is there {n}(|| here| in the PIC)?",
        "(do you see|can you see|can you find) {n}(|| here| in the PIC)?",
        "does (the|this) PIC (show|have|contain) {n}?",
        "is {n} (in the PIC|here|there|shown|visible)?",
        "can {n} be (seen|found)(| in the PIC)?",
        "is there {n} or not?",
        "has {n} been drawn(| here)?",
        "[(tell me|say) (if|whether) (there is {n}|you see {n}|the PIC shows {n})]",
        "[check (if|whether) there is {n}]",
        "[(determine|find out|see|work out) (if|whether) there is {n}]",
    ],
    chinese: &[
        "(|图中|图里|这里)有(|一个){n}吗？",
        "(|图中|图里|这里)(有没有|是否有){n}？",
        "你(看到|看见|找到){n}了吗？",
        "[(看看|告诉我)有没有{n}]",
    ],
    held_out: &[
        "is it true that there is {n}?",
        "i want to know if there is {n}",
        "{n}: is it there or not?",
        "look for {n}: is there one?",
        "would you say that there is {n}?",
        "does {n} exist here?",
    ],
    held_out_chinese: &["我想知道有没有{n}", "图里存在{n}吗？"],
};
pub(in crate::scenes) const CAPTION: Wordings = Wordings {
    english: &[
        "[describe (the|this) PIC(|| in words)]",
        "[describe (what you see|everything|everything that you see|it|this)]",
        "[(write|give|give me) a (caption for|description of) (the|this) PIC]",
        "[write a (caption|description)]",
        "[caption (the|this) PIC]",
        "[put (the|this) PIC into words]",
        "[(say|tell me|write) (all that you see|everything that you see|what the whole PIC shows)]",
        "[(report|list|explain|tell me about) (what you see|everything|all that there is)]",
        "[give a summary of the PIC]",
        "how would you describe (the|this) PIC?",
        "what would (a|the) caption (say|be)?",
        "what does the whole PIC show?",
    ],
    chinese: &[
        "[描述(|一下)(这张图片|这张图|图片|图像|图中的内容)]",
        "[写一个(图片|)说明]",
        "[为(这张|)图片写一个说明]",
        "[(说说|说一说)(图中的内容|图里的一切)]",
    ],
    held_out: &[
        "what would you write under this picture?",
        "i want to know all that is in the picture",
        "the whole picture in words",
        "how does the picture look?",
        "summarize the picture",
        "a caption is needed for this picture",
    ],
    held_out_chinese: &["我想知道图里的一切", "用一句话说明这张图"],
};
