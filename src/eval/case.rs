//! Cases of an evaluation of dialogues, one by one, for whoever wants to see what went wrong.

use std::ops::ControlFlow;

use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::scenes::{Edit, Question, Riddle, Split};

/// One request to the model, and its answer.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// "edit", "question", "draw then edit", "riddle" or "edit of a thing".
    pub task: &'static str,
    /// Which edit or question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<serde_json::Value>,
    /// Where the wording is from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wording: Option<Split>,
    /// The image that the model looks at, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What it is asked or told.
    pub request: String,
    /// What it should say; before it draws, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What it says.
    pub reply: String,
    /// Whether the answer counts as right: of an edit, the image.
    pub right: bool,
}

impl Case {
    /// An edit, with an instruction and where its wording is from.
    pub(super) fn edit(
        task: &'static str,
        edit: &Edit,
        (request, wording): (String, Split),
        reply: String,
        right: bool,
    ) -> Self {
        Self {
            task,
            kind: serde_json::to_value(edit.kind).ok(),
            wording: Some(wording),
            image: Some(edit.source.prompt()),
            request,
            expected: Some(edit.thought()),
            reply,
            right,
        }
    }

    /// A question, and where its wording is from.
    pub(super) fn question(question: Question, wording: Split, reply: String, right: bool) -> Self {
        Self {
            task: "question",
            kind: serde_json::to_value(question.kind).ok(),
            wording: Some(wording),
            image: Some(question.scene.prompt()),
            request: question.text,
            expected: Some(question.answer),
            reply,
            right,
        }
    }

    /// A riddle.
    pub(super) fn riddle(riddle: &Riddle, reply: String, right: bool) -> Self {
        Self {
            task: "riddle",
            kind: None,
            wording: None,
            image: None,
            request: riddle.clue.clone(),
            expected: Some(riddle.answer()),
            reply,
            right,
        }
    }
}

/// Called with every case; `Break` stops the evaluation.
pub type Watch<'a> = &'a mut dyn FnMut(Case) -> ControlFlow<()>;

/// Passes a case on.
///
/// Errors: [`Kind::Interrupted`], if the evaluation is to stop.
pub(super) fn done(watch: Watch, case: Case) -> Result<()> {
    match watch(case) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "interrupted")),
    }
}
