//! How replies are made, what is heard of them on the way, and what they come to.

use std::ops::ControlFlow;

use candle_core::Tensor;
use serde::Serialize;

use super::{Picture, TextSampling};
use crate::backbone::Layout;
use crate::generate::{Event, Sampling};

/// How replies are made.
#[derive(Clone, Debug)]
pub struct ReplyOptions {
    /// How text tokens are drawn.
    pub sampling: TextSampling,
    /// The most tokens of a reply, an image counting as one.
    pub max_tokens: usize,
    /// How codes are drawn, by a model that draws.
    pub image: Option<Sampling>,
    /// Decides all randomness.
    pub seed: u64,
    /// Guidance leads away from an image with the same images before it, so that they are kept; else from any image.
    pub guide_from_sources: bool,
}

/// What happens while a reply is made.
#[derive(Debug)]
pub enum ReplyEvent<'a> {
    /// A part of the conversation has been read.
    Read,
    /// More words.
    Words(&'a str),
    /// An image is being drawn.
    Drawing(Event<'a>),
    /// An image is drawn, with this seed; the observer may give it a name.
    Drawn(&'a mut Picture, u64),
}

/// Called with everything that is [`ReplyEvent`]. An observer that answers `Break` stops the reply.
pub type ReplyObserver<'a> = &'a mut dyn FnMut(ReplyEvent) -> ControlFlow<()>;

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The model had said it all.
    Stop,
    /// It was as long as it may be.
    Length,
    /// The user broke it off.
    Interrupted,
}

/// What the model answered.
#[derive(Clone, Debug, Serialize)]
pub struct Reply {
    /// Its words.
    pub text: String,
    /// Tokens of the conversation up to it.
    pub prompt_tokens: usize,
    /// How many of them had been read before.
    pub cached_tokens: usize,
    /// Its own words, and one for each of its images.
    pub tokens: usize,
    /// Why it ended.
    pub ending: Ending,
}

/// A reply that is being made.
pub(super) struct Talk {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    /// Words and images so far, and the most that there may be.
    pub tokens: usize,
    pub max_tokens: usize,
    /// Of the last token, (1, 1, hidden).
    pub hidden: Tensor,
    pub layout: Layout,
    /// Which words of the vocabulary stand before the next.
    pub before: Vec<bool>,
}

/// Why the model stops speaking.
pub(super) enum Pause {
    /// It opens an image.
    Image,
    /// The reply is over.
    End(Ending),
}
