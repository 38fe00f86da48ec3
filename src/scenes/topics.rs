//! Instructions and questions about any picture, in trained wordings.

use super::Split;
use super::edit::words;
use super::question::wording as asked;
use super::wording::Voice;
use crate::rng::Rng;

/// What a text says or asks. The gaps of each: {o} "the dog", {a} "a dog", {s} "dog", {n} "a cat",
/// {p} "on the left", {b} a colour, {y} a style.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Add {n} {p}.
    Add,
    /// Remove {o}, {a}, {s}.
    Remove,
    /// Replace {o} with {n}.
    Replace,
    /// Make the background {b}.
    Background,
    /// Mirror the picture.
    Flip,
    /// Change the style to {y}.
    Style,
    /// What there is.
    What,
    /// What there is {p}.
    WhatAt,
    /// Whether there is {n}.
    Presence,
    /// Of which colour {o} is.
    Colour,
}

impl Topic {
    /// A trained wording in a language, with its gaps filled in.
    pub fn say(self, rng: &Rng, chinese: bool, gaps: &[(&str, &str)]) -> String {
        let wordings = match self {
            Self::Add => &words::ADD,
            Self::Remove => &words::REMOVE,
            Self::Replace => &words::REPLACE,
            Self::Background => &words::BACKGROUND,
            Self::Flip => &words::FLIP,
            Self::Style => &words::STYLE,
            Self::What => &asked::WHAT,
            Self::WhatAt => &asked::WHAT_AT,
            Self::Presence => &asked::PRESENCE,
            Self::Colour => &asked::COLOUR,
        };
        let mut gaps: Vec<(&str, String)> = gaps.iter().map(|(gap, words)| (*gap, words.to_string())).collect();
        gaps.extend([("{are}", "is".into()), ("{do}", "does".into())]);
        Voice::draw(rng, Split::Train).in_language(chinese).say(wordings, &gaps).text
    }
}
